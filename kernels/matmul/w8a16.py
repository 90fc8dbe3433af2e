"""Linear layers with FP8 weights and floating activations: y = x @ W^T + bias.

Problem   x [M, K] in bf16, fp16 or fp32. W [N, K] as E4M3FN or E5M2 codes, one to a byte, with
          fp32 or E8M0 scales for a row, the whole matrix, or blocks of some rows and a multiple of
          BLOCK_K columns. Bytes are decoded by integer operations, on chips without FP8 too.

Plan      That of `weight_only`. Codes are exact in bf16 but fp32 scales are not, so a scale
          multiplies the fp32 sum over its columns: each BLOCK_K of a block's scale, everything at
          the end for one of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.codecs import e4m3_to_fp32, e5m2_to_fp32, e8m0_to_bf16
from .weight_only import (
    BLOCK_K,
    clamp,
    finish,
    launch_options,
    multiply,
    place,
    with_contiguous_rows,
)


@triton.jit
def load_scale(scale, rows, column, stride_sn, ROWS: tl.constexpr):
    """fp32 scales [BLOCK_N] of ``rows``; ROWS share one, -1 is all of them."""
    row = rows // ROWS if ROWS > 0 else rows * 0
    loaded = tl.load(scale + row * stride_sn + column)
    if scale.dtype.element_ty == tl.uint8:
        loaded = e8m0_to_bf16(loaded)
    return loaded.to(tl.float32)


@triton.jit
def multiply_block(
    acc, x, data, tokens, rows, k0, K, stride_xm, stride_dn,
    BLOCK_K: tl.constexpr, PLANES: tl.constexpr, CODE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus codes[rows, k] x[tokens, k]^T over one block of k."""
    k = k0 + tl.arange(0, BLOCK_K)
    x_at = x + tokens[None, :] * stride_xm + k[:, None]
    data_at = data + rows[:, None] * stride_dn + k[None, :]
    if MASKED:
        values = tl.load(x_at, mask=(k < K)[:, None], other=0.0)
        code = tl.load(data_at, mask=(k < K)[None, :], other=0)
    else:
        values = tl.load(x_at)
        code = tl.load(data_at)
    weight = e4m3_to_fp32(code) if CODE == "e4m3fn" else e5m2_to_fp32(code)
    return multiply(acc, weight.to(tl.bfloat16), values, PLANES)


@triton.jit(do_not_specialize=["M"])
def fp8_linear_kernel(
    x, data, scale, bias, out, M, N, K, stride_xm, stride_dn, stride_sn, stride_om,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):  # fmt: skip
    tokens, rows = place(M, BLOCK_M, BLOCK_N)
    token_at, row_at = clamp(tokens, M), clamp(rows, N)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    whole = K // BLOCK_K * BLOCK_K
    for k0 in range(0, whole, BLOCK_K):
        if COLUMNS > 0:
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            part = multiply_block(
                part, x, data, token_at, row_at, k0, K, stride_xm, stride_dn,
                BLOCK_K, PLANES, CODE, MASKED=False,
            )  # fmt: skip
            acc += part * load_scale(scale, row_at, k0 // COLUMNS, stride_sn, ROWS)[:, None]
        else:
            acc = multiply_block(
                acc, x, data, token_at, row_at, k0, K, stride_xm, stride_dn,
                BLOCK_K, PLANES, CODE, MASKED=False,
            )  # fmt: skip
    if HAS_TAIL:
        part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        part = multiply_block(
            part, x, data, token_at, row_at, whole, K, stride_xm, stride_dn,
            BLOCK_K, PLANES, CODE, MASKED=True,
        )  # fmt: skip
        if COLUMNS > 0:
            part = part * load_scale(scale, row_at, whole // COLUMNS, stride_sn, ROWS)[:, None]
        acc += part
    if COLUMNS <= 0:
        acc = acc * load_scale(scale, row_at, 0, stride_sn, ROWS)[:, None]
    finish(acc, bias, out, tokens, rows, M, N, stride_om)


def fp8_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    element: str,
    block: tuple[int, int],
) -> Tensor:
    """x [M, K] @ W^T + bias -> [M, N] in ``out_dtype``.

    data uint8 [N, K], codes of ``element`` "e4m3fn" or "e5m2"; scale fp32, or uint8 of E8M0 codes,
    one for each ``block`` (rows, columns) of W, -1 meaning all; bias [N] or None. Columns are -1 or
    a multiple of BLOCK_K.
    """
    tokens, k = x.shape
    n = data.shape[0]
    out = torch.empty(tokens, n, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand(tokens, n))
    x, data, scale = with_contiguous_rows(x, data, scale)
    grid, options = launch_options(x, data)
    fp8_linear_kernel[grid](
        x, data, scale, bias, out, tokens, n, k,
        x.stride(0), data.stride(0), scale.stride(0), out.stride(0),
        ROWS=block[0], COLUMNS=block[1], CODE=element, HAS_TAIL=k % BLOCK_K != 0,
        enable_fp_fusion=True, **options,
    )  # fmt: skip
    return out
