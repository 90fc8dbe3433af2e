"""Linear layers with MXFP4 weights and floating activations: y = x @ W^T + bias.

Problem   x [M, K] in bf16, fp16 or fp32. W [N, K] as E2M1 codes, two to a byte, the low nibble
          the even k, with one E8M0 scale for 32 codes of a row. Weights decode exactly, products
          are exact, sums are fp32, the result is rounded once.

Layout    One program computes BLOCK_N outputs of BLOCK_M tokens, *transposed*: the weight tile is
          the left operand of the dot. It is decoded in registers, where Hopper's WGMMA can take
          its left operand from; and tokens, few in decode, are the instruction's flexible side
          (8, 16, ...) while its 64-row side is always full of weights.

Numbers   bf16 holds E2M1 times a power of two exactly, so the scale is part of the decoded weight.
          fp16 and fp32 activations do not fit bf16: they enter as 2 or 3 bf16 summands that add up
          to them exactly ("planes"), each against the same decoded tile.

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
from ..common.codecs import e2m1_to_bf16, e8m0_to_bf16

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
def decode_tile(
    data, scale, rows, k0, K, stride_dn, stride_sn,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """W[rows, k0 : k0 + BLOCK_K] as bf16 [BLOCK_N, BLOCK_K], 0 past K. rows are int64."""
    byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    data_at = data + rows[:, None] * stride_dn + byte[None, :]
    scale_at = scale + rows[:, None] * stride_sn + group[None, :]
    if MASKED:
        packed = tl.load(data_at, mask=(2 * byte < K)[None, :], other=0)
        exponent = tl.load(scale_at, mask=(32 * group < K)[None, :], other=127)
    else:
        packed = tl.load(data_at)
        exponent = tl.load(scale_at)
    codes = tl.join(packed & 15, packed >> 4).reshape(BLOCK_N, BLOCK_K // 32, 32)
    weight = e2m1_to_bf16(codes) * e8m0_to_bf16(exponent)[:, :, None]
    weight = weight.reshape(BLOCK_N, BLOCK_K)
    if MASKED:  # the pad nibble of an odd K is in the last byte
        weight = tl.where((k0 + tl.arange(0, BLOCK_K) < K)[None, :], weight, 0.0)
    return weight


@triton.jit
def multiply_block(
    acc, x, data, scale, tokens, rows, k0, K, stride_xm, stride_dn, stride_sn,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus W[rows, k] x[tokens, k]^T over one block of k."""
    k = k0 + tl.arange(0, BLOCK_K)
    x_at = x + tokens[None, :] * stride_xm + k[:, None]
    if MASKED:
        rest = tl.load(x_at, mask=(k < K)[:, None], other=0.0)
    else:
        rest = tl.load(x_at)
    weight = decode_tile(data, scale, rows, k0, K, stride_dn, stride_sn, BLOCK_N, BLOCK_K, MASKED)
    if PLANES == 1:
        acc = tl.dot(weight, rest, acc)
    else:
        rest = rest.to(tl.float32)
        for _ in tl.static_range(PLANES):
            lead, rest = split_bf16(rest)
            acc = tl.dot(weight, lead, acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def mxfp4_linear_kernel(
    x, data, scale, bias, out, M, N, K, stride_xm, stride_dn, stride_sn, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):  # fmt: skip
    # Programs that share a weight tile run next to one another.
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_m = tl.program_id(0) % blocks_m * BLOCK_M
    first_n = tl.program_id(0) // blocks_m * BLOCK_N
    tokens = first_m + tl.arange(0, BLOCK_M)
    rows = first_n + tl.arange(0, BLOCK_N)
    # Lanes past the end repeat a valid row instead of masking every load; they are not stored.
    token_at = tl.minimum(tokens, M - 1).to(tl.int64)
    row_at = tl.minimum(rows, N - 1).to(tl.int64)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    whole = K // BLOCK_K * BLOCK_K
    for k0 in range(0, whole, BLOCK_K):
        acc = multiply_block(
            acc, x, data, scale, token_at, row_at, k0, K, stride_xm, stride_dn, stride_sn,
            BLOCK_N, BLOCK_K, PLANES, MASKED=False,
        )  # fmt: skip
    if HAS_TAIL:
        acc = multiply_block(
            acc, x, data, scale, token_at, row_at, whole, K, stride_xm, stride_dn, stride_sn,
            BLOCK_N, BLOCK_K, PLANES, MASKED=True,
        )  # fmt: skip

    if bias is not None:
        acc += tl.load(bias + row_at).to(tl.float32)[:, None]
    out_at = out + token_at[None, :] * stride_om + rows[:, None]
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


def mxfp4_linear(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x [M, K] @ W^T + bias -> [M, N] in ``out_dtype``.

    data uint8 [N, ceil(K / 2)]; scale uint8 [N, ceil(K / 32)] of E8M0 codes; bias [N] or None.
    """
    tokens, k = x.shape
    n = data.shape[0]
    out = torch.empty(tokens, n, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, data, scale = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, data, scale))
    aligned = all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (x, data)
    )
    options = heuristic(tokens, x.dtype, aligned, chip(x.device))
    grid = (triton.cdiv(tokens, options["BLOCK_M"]) * triton.cdiv(n, BLOCK_N),)
    mxfp4_linear_kernel[grid](
        x, data, scale, bias, out, tokens, n, k,
        x.stride(0), data.stride(0), scale.stride(0), out.stride(0),
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, PLANES=PLANES[x.dtype], HAS_TAIL=k % BLOCK_K != 0,
        enable_fp_fusion=True, **options,
    )  # fmt: skip
    return out
