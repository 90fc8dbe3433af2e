"""Rows of the reference backend: attention."""

from __future__ import annotations

from typing import Any

from ... import registry
from ...reference import attention


def paged_attention(*args: Any) -> Any:
    """Flat arguments to the definition's keywords."""
    q, k, v, table, lens, cu_seqlens_q, scale, causal, left, right, softcap = args[:11]
    slopes, sinks, qq_mask, k_scale, v_scale = args[11:]
    return attention.paged_attention(
        q, k, v, table, lens, cu_seqlens_q=cu_seqlens_q, scale=scale, causal=causal,
        window=(left, right), softcap=softcap, alibi_slopes=slopes, sinks=sinks, qq_mask=qq_mask,
        k_scale=k_scale, v_scale=v_scale, return_lse=True,
    )  # fmt: skip


registry.implement("paged_attention", "reference", paged_attention)
for _name in ("reshape_and_cache", "merge_attn_states", "apply_sink", "gather_kv", "copy_blocks"):
    _function = registry.by_name(_name, getattr(attention, _name))
    registry.implement(_name, "reference", _function)
