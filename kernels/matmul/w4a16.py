"""Linear layers with MXFP4 weights and floating activations: y = x @ W^T + bias.

Problem   x [M, K] in bf16, fp16 or fp32. W [N, K] as E2M1 codes, two to a byte, the low nibble
          the even k, with one E8M0 scale for 32 codes of a row. Weights decode exactly, products
          are exact, sums are fp32, the result is rounded once.

Plan      That of `weight_only`. bf16 holds E2M1 times a power of two exactly, so the scale is part
          of the decoded weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.codecs import e2m1_to_bf16, e8m0_to_bf16
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
        values = tl.load(x_at, mask=(k < K)[:, None], other=0.0)
    else:
        values = tl.load(x_at)
    weight = decode_tile(data, scale, rows, k0, K, stride_dn, stride_sn, BLOCK_N, BLOCK_K, MASKED)
    return multiply(acc, weight, values, PLANES)


@triton.jit(do_not_specialize=["M"])
def mxfp4_linear_kernel(
    x, data, scale, bias, out, M, N, K, stride_xm, stride_dn, stride_sn, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):  # fmt: skip
    tokens, rows = place(M, BLOCK_M, BLOCK_N)
    token_at, row_at = clamp(tokens, M), clamp(rows, N)
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
    finish(acc, bias, out, tokens, rows, M, N, stride_om)


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
    x, data, scale = with_contiguous_rows(x, data, scale)
    grid, options = launch_options(x, data)
    mxfp4_linear_kernel[grid](
        x, data, scale, bias, out, tokens, n, k,
        x.stride(0), data.stride(0), scale.stride(0), out.stride(0),
        HAS_TAIL=k % BLOCK_K != 0, enable_fp_fusion=True, **options,
    )  # fmt: skip
    return out
