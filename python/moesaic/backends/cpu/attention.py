"""Rows of the cpu backend: attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import registry
from . import extension
from ._dtypes import DTYPE, address

_C: Any = extension  # imported only where the extension is there
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_not_pages(k_cache: Tensor, v_cache: Tensor, *inputs: Tensor | None) -> str | None:
    for tensor in (k_cache, v_cache, *inputs):
        if tensor is not None and tensor.device.type != "cpu":
            return f"it serves CPU tensors, not {tensor.device.type}"
    if k_cache.dtype not in FLOATS:
        return f"no C++ kernel for {_short(k_cache.dtype)} caches"
    if v_cache.dtype != k_cache.dtype:
        return f"k_cache is {_short(k_cache.dtype)} but v_cache {_short(v_cache.dtype)}"
    return None


def _why_not_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor | None, scale: float, causal: bool, window_left: int, window_right: int,
    softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, qq_mask: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> str | None:  # fmt: skip
    reason = _why_not_pages(k_cache, v_cache, q)
    if reason is not None:
        return reason
    for tensor in (q, alibi_slopes, sinks):
        if tensor is not None and tensor.dtype == torch.float64:
            return "it computes in float32, not float64"
    if qq_mask is not None:
        return "no C++ kernel for qq_mask"
    if k_scale is not None or v_scale is not None:
        return "no C++ kernel for scaled caches"
    return None


def _pages(cache: Tensor) -> tuple[int, ...]:
    return (address(cache), DTYPE[cache.dtype], cache.shape[3], *cache.stride())


def _rows(tensor: Tensor) -> Tensor:
    """Rows whose elements are adjacent."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor | None, scale: float, causal: bool, window_left: int, window_right: int,
    softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, qq_mask: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """csrc/cpu/attention/paged_attention.simd.cc"""
    tokens, heads, _ = q.shape
    num_blocks, block_size, kv_heads, _ = k_cache.shape
    batch, max_blocks = block_table.shape
    out = q.new_empty(tokens, heads, v_cache.shape[3])
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    q, block_table = _rows(q), _rows(block_table)
    seq_lens = seq_lens.contiguous()
    cu_seqlens_q = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    _C.paged_attention(
        address(q), DTYPE[q.dtype], tokens, heads, q.stride(0), q.stride(1), address(out),
        address(lse), _pages(k_cache), _pages(v_cache), kv_heads, num_blocks, block_size,
        address(block_table), block_table.dtype == torch.int64, batch, max_blocks,
        block_table.stride(0), address(seq_lens), seq_lens.dtype == torch.int64,
        address(cu_seqlens_q), cu_seqlens_q is not None and cu_seqlens_q.dtype == torch.int64,
        scale, causal, window_left, window_right, softcap, address(slopes),
        heads if slopes is not None and slopes.ndim == 2 else 0, address(sinks),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _why_not_write(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> str | None:  # fmt: skip
    reason = _why_not_pages(k_cache, v_cache, key)
    if reason is None and key.dtype not in FLOATS:
        reason = f"no C++ kernel for {_short(key.dtype)} keys"
    return reason


def reshape_and_cache(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """csrc/cpu/attention/reshape_and_cache.simd.cc; floating caches have no use for scales."""
    tokens, heads, _ = key.shape
    num_blocks, block_size = k_cache.shape[:2]
    key, value = _rows(key), _rows(value)
    slots = slot_mapping.to(torch.int64).contiguous()
    _C.reshape_and_cache(
        address(key), address(value), DTYPE[key.dtype], tokens, heads, key.stride(0),
        key.stride(1), value.stride(0), value.stride(1), _pages(k_cache), _pages(v_cache),
        num_blocks, block_size, address(slots), torch.get_num_threads(),
    )  # fmt: skip


registry.implement("paged_attention", "cpu", paged_attention, _why_not_attention)
registry.implement("reshape_and_cache", "cpu", reshape_and_cache, _why_not_write)
