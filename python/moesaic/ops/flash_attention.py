"""The FlashAttention-shaped functions on the doors of the attention room.

They rearrange arguments and call `paged_attention` and `reshape_and_cache`, so they run on whatever
those run on.  Meanings are in :mod:`moesaic.reference.flash_attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..reference import flash_attention as definition
from . import _check
from .attention import CACHES, FLOATS, INDICES, paged_attention, reshape_and_cache


def _check_common(op: str, dropout_p: float, window_size: Any) -> None:
    if dropout_p != 0:
        _check.fail(
            op, "dropout_p", "0", dropout_p, kind=NotImplementedError,
            remedy="Attention dropout is not implemented",
        )  # fmt: skip
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        expected = "a pair (left, right)"
        _check.fail(op, "window_size", expected, repr(window_size), kind=TypeError)
    for side in window_size:
        _check.integer(op, "window_size", side, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    backend: str | None = None,
) -> definition.Result:
    op = "flash_attn_func"
    _check_common(op, dropout_p, window_size)
    _check.tensor(op, "q", q, ndim=4, dtypes=FLOATS)
    _check.tensor(op, "k", k, shape=(q.shape[0], None, None, q.shape[3]), dtypes=CACHES, like=q)
    _check.tensor(op, "v", v, shape=(*k.shape[:3], None), dtypes=CACHES, like=q)
    if not k.shape[1]:
        _check.fail(op, "k", "at least one key", _check.describe(k))
    return definition.dense(
        partial(paged_attention, backend=backend), q, k, v, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs, s_aux=s_aux,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
    backend: str | None = None,
) -> definition.Result:
    op = "flash_attn_varlen_func"
    _check_common(op, dropout_p, window_size)
    _check.tensor(op, "q", q, ndim=3, dtypes=FLOATS)
    ndim = 3 if block_table is None else 4
    _check.tensor(op, "k", k, ndim=ndim, dtypes=CACHES, like=q)
    _check.tensor(op, "v", v, shape=(*k.shape[:-1], None), dtypes=CACHES, like=q)
    _check.tensor(op, "cu_seqlens_q", cu_seqlens_q, ndim=1, dtypes=INDICES, like=q)
    shape = cu_seqlens_q.shape
    _check.tensor(op, "cu_seqlens_k", cu_seqlens_k, shape=shape, dtypes=INDICES, like=q)
    _check.integer(op, "max_seqlen_k", max_seqlen_k, 0)
    return definition.packed(
        partial(paged_attention, backend=backend), q, k, v, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_k, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs,
        block_table=block_table, s_aux=s_aux,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    backend: str | None = None,
) -> definition.Result:
    op = "flash_attn_with_kvcache"
    _check_common(op, 0.0, window_size)
    _check.tensor(op, "q", q, ndim=4, dtypes=FLOATS)
    batch, _, _, dim = q.shape
    _check.tensor(op, "k_cache", k_cache, shape=(None, None, None, dim), dtypes=CACHES, like=q)
    _check.tensor(op, "v_cache", v_cache, shape=(*k_cache.shape[:3], None), dtypes=CACHES, like=q)
    if not k_cache.shape[1]:
        _check.fail(op, "k_cache", "at least one slot", _check.describe(k_cache))
    if (k is None) != (v is None):
        _check.fail(op, "v", "k and v together", "one of them")
    if k is not None:
        shape = (batch, None, *k_cache.shape[2:])
        _check.tensor(op, "k", k, shape=shape, dtypes=FLOATS, like=q)
        shape = (*k.shape[:3], v_cache.shape[3])
        _check.tensor(op, "v", v, shape=shape, dtypes=(k.dtype,), like=q)
    if (rotary_cos is None) != (rotary_sin is None):
        _check.fail(op, "rotary_sin", "rotary_cos and rotary_sin together", "one of them")
    if rotary_cos is not None:
        _check.tensor(op, "rotary_cos", rotary_cos, ndim=2, dtypes=FLOATS, like=q)
        shape = rotary_cos.shape
        _check.tensor(op, "rotary_sin", rotary_sin, shape=shape, dtypes=FLOATS, like=q)
        if 2 * rotary_cos.shape[1] > dim or not rotary_cos.shape[0]:
            expected = f"[positions, at most {dim // 2}]"
            _check.fail(op, "rotary_cos", expected, _check.describe(rotary_cos))
    if isinstance(cache_seqlens, Tensor):
        _check.tensor(op, "cache_seqlens", cache_seqlens, shape=(batch,), dtypes=INDICES, like=q)
    elif cache_seqlens is not None:
        _check.integer(op, "cache_seqlens", cache_seqlens, 0)
    for name, rows in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        _check.optional_tensor(op, name, rows, shape=(batch,), dtypes=INDICES, like=q)
    shape = (batch, None)
    _check.optional_tensor(op, "block_table", block_table, shape=shape, dtypes=INDICES, like=q)
    return definition.with_kvcache(
        partial(paged_attention, backend=backend), partial(reshape_and_cache, backend=backend),
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, rotary_interleaved=rotary_interleaved,
        alibi_slopes=alibi_slopes, return_softmax_lse=return_softmax_lse, s_aux=s_aux,
    )  # fmt: skip


for _door in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
    # One text for both: the definition's, with what a door adds.
    _door.__doc__ = (getattr(definition, _door.__name__).__doc__ or "").rstrip() + (
        '\n\n    backend is None, "cpu", "triton" or "reference".  Raises ValueError, TypeError '
        "(dtype) or\n    NotImplementedError (dropout, backend).\n    "
    )
