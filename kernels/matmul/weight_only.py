"""What the weight-only linears share: y = x @ W^T + bias, transposed, in tiles of decoded bf16.

Layout    One program computes BLOCK_N outputs of BLOCK_M tokens, *transposed*: the weight tile is
          the left operand of the dot. It is decoded in registers, where Hopper's WGMMA can take
          its left operand from; and tokens, few in decode, are the instruction's flexible side
          (8, 16, ...) while its 64-row side is always full of weights.

Numbers   Decoded weights are exact in bf16. fp16 and fp32 activations are not: they enter as 2 or 3
          bf16 summands that add up to them exactly ("planes"), each against the same weight tile.

Order     K is walked upwards in steps of BLOCK_K by one program, and BLOCK_N, BLOCK_K and the
          number of warps do not depend on M: neither do the instruction and the order of additions.
          So row 0 of x[:1] and of x have the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chip import chip, is_amd, shared_memory

BLOCK_N = 64
BLOCK_K = 64
#: bf16 summands that hold a value of the activation's dtype exactly.
PLANES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def split_bf16(x):
    """The leading bf16 of fp32 ``x`` by truncation, and what is left; Inf and NaN leave nothing."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    # A NaN whose payload lies in the lower half would truncate to Inf: it is kept as it is.
    lead = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return lead.to(tl.bfloat16), tl.where(finite, x - lead, 0.0)


@triton.jit
def multiply(acc, weight, x, PLANES: tl.constexpr):
    """acc [N, M] + weight [N, K] x [K, M]: weight in bf16, x as loaded, entering by its planes."""
    if PLANES == 1:
        acc = tl.dot(weight, x, acc)
    else:
        rest = x.to(tl.float32)
        for _ in tl.static_range(PLANES):
            lead, rest = split_bf16(rest)
            acc = tl.dot(weight, lead, acc)
    return acc


@triton.jit
def place(M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tokens [BLOCK_M] and weight rows [BLOCK_N] of this program.

    Programs that share a weight tile run next to one another.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    tokens = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    return tokens, rows


@triton.jit
def clamp(index, end):
    """int64 indices; lanes past the end repeat the last one, so that loads need no mask."""
    return tl.minimum(index, end - 1).to(tl.int64)


@triton.jit
def finish(acc, bias, out, tokens, rows, M, N, stride_om):
    """out[tokens, rows] = acc [N, M] + bias, rounded once."""
    if bias is not None:
        acc += tl.load(bias + clamp(rows, N)).to(tl.float32)[:, None]
    out_at = out + tokens.to(tl.int64)[None, :] * stride_om + rows[:, None]
    stored = (tokens < M)[None, :] & (rows < N)[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=stored)


#: Most tokens of one tile by the number of planes: what fits in registers without spilling, on
#: chips whose accumulators live in registers of one warp, and on those with warp-group MMA.
TOKEN_LIMIT = {1: 64, 2: 32, 3: 32}
TOKEN_LIMIT_WARPGROUP = {1: 128, 2: 64, 3: 32}
TOKEN_LIMIT_UNALIGNED = {1: 32, 2: 16, 3: 16}


def heuristic(tokens: int, dtype: torch.dtype, aligned: bool, name: str) -> dict[str, int]:
    """BLOCK_M and launch options for ``tokens`` rows of ``dtype`` activations on a chip.

    aligned says that rows begin at multiples of 16 bytes. Only what cannot change bits may depend
    on ``tokens``.
    """
    planes = PLANES[dtype]
    if not aligned:
        limit = TOKEN_LIMIT_UNALIGNED[planes]
    elif name in ("sm_90", "sm_100"):
        limit = TOKEN_LIMIT_WARPGROUP[planes]
    else:
        limit = TOKEN_LIMIT[planes]
    block_m = min(max(16, triton.next_power_of_2(tokens)), limit)
    if is_amd(name):  # one MFMA shape for every BLOCK_M
        return {"BLOCK_M": block_m, "num_warps": 4, "num_stages": 2, "matrix_instr_nonkdim": 16}
    # A stage holds a tile of x and one of packed codes; a third is left for operands in transit.
    stage = block_m * BLOCK_K * dtype.itemsize + BLOCK_N * BLOCK_K // 2
    stages = max(2, min(4, shared_memory(name) * 2 // 3 // stage))
    return {"BLOCK_M": block_m, "num_warps": 4, "num_stages": stages}


def launch_options(x: Tensor, data: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options for x [M, K] and the weight's bytes [N, ...], rows contiguous."""
    aligned = all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (x, data)
    )
    options = heuristic(x.shape[0], x.dtype, aligned, chip(x.device))
    options |= {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "PLANES": PLANES[x.dtype]}
    blocks_m = triton.cdiv(x.shape[0], options["BLOCK_M"])
    return (blocks_m * triton.cdiv(data.shape[0], BLOCK_N),), options


def with_contiguous_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, those copied whose last dimension is strided."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
