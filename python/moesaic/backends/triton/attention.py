"""Rows of the triton backend: attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import registry
from ._launch import FLOATS, on_its_device, short, why_not_device, why_not_floats

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_MAX_HEAD_DIM = 512
_MAX_KEYS = 2**31 - 2**16  # key positions are 32-bit


def _why_not_caches(k_cache: Tensor, v_cache: Tensor) -> str | None:
    for cache in (k_cache, v_cache):
        if cache.dtype not in (*FLOATS, *_CODES):
            return f"no Triton kernel for {short(cache.dtype)} caches"
    if k_cache.dtype != v_cache.dtype and {k_cache.dtype, v_cache.dtype} & {*_CODES}:
        return f"k_cache is {short(k_cache.dtype)} but v_cache {short(v_cache.dtype)}"
    widest = max(k_cache.shape[3], v_cache.shape[3])
    if widest > _MAX_HEAD_DIM:
        return f"it serves head dimensions up to {_MAX_HEAD_DIM}, not {widest}"
    return None


def _why_not_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor | None, scale: float, causal: bool, window_left: int, window_right: int,
    softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, qq_mask: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> str | None:  # fmt: skip
    if cu_seqlens_q is not None:
        return "the Triton kernel is for decode, one query row a sequence (no cu_seqlens_q)"
    if qq_mask is not None:
        return "no Triton kernel for qq_mask"
    for multiplier in (k_scale, v_scale):
        if multiplier is not None and multiplier.dim() > 1 and multiplier.numel() > 1:
            return "no Triton kernel for a scale per token"
    if block_table.shape[1] * k_cache.shape[1] > _MAX_KEYS:
        return f"it serves tables of up to {_MAX_KEYS} keys"
    floats = (q, alibi_slopes, sinks, k_scale, v_scale)
    return why_not_device(q) or why_not_floats(*floats) or _why_not_caches(k_cache, v_cache)


def _paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: None, scale: float, causal: bool, window_left: int, window_right: int,
    softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, qq_mask: None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The row of a sequence sits at its last key: nothing lies to the right of it."""
    from ...kernels.attention.paged_decode import paged_decode

    return paged_decode(
        q, k_cache, v_cache, block_table, seq_lens, scale=scale, window_left=window_left,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


registry.implement("paged_attention", "triton", on_its_device(_paged_attention), _why_not_attention)
