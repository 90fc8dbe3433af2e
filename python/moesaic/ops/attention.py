"""Doors of the attention room.

Each op's meaning is the docstring of the function of the same name in
:mod:`moesaic.reference.attention`; the page layout and the rules that all share are at its head.
Tables, lengths and slots are data: they are not read here, and kernels skip what is out of range.
``MOESAIC_CHECK=1`` reads them and names what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..reference import attention as definition
from . import _check

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
CACHES = (*FLOATS, *CODES)
INDICES = (torch.int32, torch.int64)


def _result_dtype(*inputs: Any) -> torch.dtype:
    """fp64 if any floating input is, else fp32: the dtype of an LSE."""
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if wide else torch.float32


def _fake_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor | None, scale: float, causal: bool, window_left: int, window_right: int,
    softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None, qq_mask: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = _result_dtype(q, k_cache, v_cache, alibi_slopes, sinks, k_scale, v_scale)
    return q.new_empty(*q.shape[:2], v_cache.shape[3]), q.new_empty(q.shape[:2], dtype=lse)


registry.define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor seq_lens, Tensor? cu_seqlens_q, float scale, bool causal, int window_left, "
    "int window_right, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? qq_mask, "
    "Tensor? k_scale, Tensor? v_scale) -> (Tensor, Tensor)",
    room="attention",
    fake=_fake_attention,
)
registry.define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slot_mapping, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()",
    room="attention",
    fake=lambda *args: None,
)
registry.define(
    "merge_attn_states(Tensor out_a, Tensor lse_a, Tensor? out_b, Tensor? lse_b) "
    "-> (Tensor, Tensor)",
    room="attention",
    fake=lambda out_a, lse_a, out_b, lse_b: (
        out_a.new_empty(out_a.shape[-3:]),
        out_a.new_empty(out_a.shape[-3:-1], dtype=_result_dtype(out_a, lse_a, out_b, lse_b)),
    ),
)
registry.define(
    "apply_sink(Tensor out, Tensor lse, Tensor sinks) -> Tensor",
    room="attention",
    fake=lambda out, lse, sinks: out.new_empty(out.shape),
)
registry.define(
    "gather_kv(Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "int max_seq_len, Tensor? k_scale, Tensor? v_scale, ScalarType out_dtype) -> (Tensor, Tensor)",
    room="attention",
    fake=lambda k, v, table, lens, size, k_scale, v_scale, dtype: tuple(
        c.new_empty(table.shape[0], size, c.shape[2], c.shape[3], dtype=dtype) for c in (k, v)
    ),
)
registry.define(
    "copy_blocks(Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor block_mapping) -> ()",
    room="attention",
    fake=lambda *args: None,
)


def _pages(op: str, k_cache: Any, v_cache: Any, layout: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Checked caches as NHD views."""
    _check.choice(op, "layout", layout, ("NHD", "HND"))
    _check.tensor(op, "k_cache", k_cache, ndim=4, dtypes=CACHES, like=like)
    shape = (*k_cache.shape[:3], None)
    _check.tensor(op, "v_cache", v_cache, shape=shape, dtypes=CACHES, like=like)
    if layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if not all(k_cache.shape[1:]):
        expected = "at least one slot, head and dimension"
        _check.fail(op, "k_cache", expected, _check.describe(k_cache))
    if not v_cache.shape[3]:
        _check.fail(op, "v_cache", "at least one dimension", _check.describe(v_cache))
    return k_cache, v_cache


def _scale(
    op: str, argument: str, scale: Any, cache: Tensor, layout: str, *, quantized: bool = False
) -> Tensor | None:
    """A checked multiplier: None, one element, [Hkv], or [num_blocks, block_size, Hkv] (NHD)."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        return torch.tensor(_check.number(op, argument, scale), device=cache.device)
    _check.tensor(op, argument, scale, dtypes=FLOATS, like=cache)
    heads = cache.shape[2]
    if scale.ndim == 3:
        scale = scale.transpose(1, 2) if layout == "HND" else scale
        if scale.shape == cache.shape[:3]:
            if quantized and (cache.dtype not in CODES or scale.dtype != torch.float32):
                _check.fail(
                    op, argument, "float32 scales of tokens with an FP8 or int8 cache",
                    f"{_check.describe(scale)} with {_check.describe(cache)}",
                )  # fmt: skip
            return scale
    elif scale.numel() == 1 or tuple(scale.shape) == (heads,):
        return scale
    return _check.fail(
        op, argument,
        f"one element, [{heads}] (heads) or {list(cache.shape[:3])} (block, slot, head)",
        _check.describe(scale),
    )  # fmt: skip


def _table(op: str, block_table: Any, seq_lens: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    _check.tensor(op, "block_table", block_table, ndim=2, dtypes=INDICES, like=like)
    shape = (block_table.shape[0],)
    _check.tensor(op, "seq_lens", seq_lens, shape=shape, dtypes=INDICES, like=like)
    return block_table, seq_lens


def _checking() -> bool:
    return os.environ.get("MOESAIC_CHECK") == "1" and not torch.compiler.is_compiling()


def _verify_table(
    op: str, table: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int
) -> None:
    """MOESAIC_CHECK=1: every length fits its table, every page inside it exists or is -1."""
    pages, lengths = table.tolist(), seq_lens.tolist()
    capacity = table.shape[1] * block_size
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            _check.fail(
                op, "seq_lens", f"lengths in [0, {capacity}] (max_blocks * block_size)",
                f"{length} for sequence {b}",
            )  # fmt: skip
        for j in range(-(-length // block_size)):
            if not -1 <= pages[b][j] < num_blocks:
                _check.fail(
                    op, "block_table", f"page ids in [0, {num_blocks}), or -1 for an evicted page",
                    f"{pages[b][j]} at (sequence {b}, block {j})",
                )  # fmt: skip


def _verify_rows(op: str, cu_seqlens_q: Tensor, tokens: int) -> None:
    """MOESAIC_CHECK=1: row offsets never fall and stay inside q."""
    bounds = cu_seqlens_q.tolist()
    for b, (start, end) in enumerate(pairwise(bounds)):
        if not 0 <= start <= end <= tokens:
            _check.fail(
                op, "cu_seqlens_q", f"offsets that never fall, in [0, {tokens}]",
                f"{start} to {end} for sequence {b}",
            )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    qq_mask: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    layout: str = "NHD",
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    op = "paged_attention"
    _check.tensor(op, "q", q, ndim=3, dtypes=FLOATS)
    tokens, heads, dim = q.shape
    k_cache, v_cache = _pages(op, k_cache, v_cache, layout, q)
    num_blocks, block_size, kv_heads, k_dim = k_cache.shape
    if k_dim != dim:
        _check.fail(op, "q", f"head dimension {k_dim} as in k_cache", _check.describe(q))
    if heads < 1 or heads % kv_heads:
        _check.fail(op, "q", f"a multiple of k_cache's {kv_heads} heads", f"{heads} heads")
    block_table, seq_lens = _table(op, block_table, seq_lens, q)
    batch = block_table.shape[0]
    if cu_seqlens_q is not None:
        _check.tensor(op, "cu_seqlens_q", cu_seqlens_q, shape=(batch + 1,), dtypes=INDICES, like=q)
    elif tokens != batch:
        _check.fail(
            op, "q", f"one row for each of {batch} sequences", f"{tokens} rows",
            remedy="Pass cu_seqlens_q if sequences have other numbers of rows",
        )  # fmt: skip
    scale = dim**-0.5 if scale is None else _check.number(op, "scale", scale)
    _check.flag(op, "causal", causal)
    left, right = _window(op, window)
    softcap = _check.number(op, "softcap", softcap)
    if not 0 <= softcap < float("inf"):
        _check.fail(op, "softcap", "a finite number >= 0 (0 is off)", softcap)
    _check.optional_tensor(op, "alibi_slopes", alibi_slopes, ndim=(1, 2), dtypes=FLOATS, like=q)
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        got = _check.describe(alibi_slopes)
        _check.fail(op, "alibi_slopes", f"shape [{heads}] or [{batch}, {heads}]", got)
    _check.optional_tensor(op, "sinks", sinks, shape=(heads,), dtypes=FLOATS, like=q)
    mask_shape = (tokens, None)
    _check.optional_tensor(op, "qq_mask", qq_mask, shape=mask_shape, dtypes=(torch.bool,), like=q)
    k_scale = _scale(op, "k_scale", k_scale, k_cache, layout)
    v_scale = _scale(op, "v_scale", v_scale, v_cache, layout)
    out_shape = (tokens, heads, v_cache.shape[3])
    _check.optional_tensor(op, "out", out, shape=out_shape, dtypes=(q.dtype,), like=q)
    _check.flag(op, "return_lse", return_lse)
    if _checking():
        _verify_table(op, block_table, seq_lens, num_blocks, block_size)
        if cu_seqlens_q is not None:
            _verify_rows(op, cu_seqlens_q, tokens)
    result, lse = registry.call(
        op, q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, scale, causal, left, right,
        softcap, alibi_slopes, sinks, qq_mask, k_scale, v_scale, backend=backend,
    )  # fmt: skip
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def _window(op: str, window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        _check.fail(op, "window", "a pair (left, right)", repr(window), kind=TypeError)
    # No sequence is longer than int32: a wider window is that wide.
    left, right = (min(_check.integer(op, "window", side, -1), 2**31 - 1) for side in window)
    return left, right


def paged_mla_attention(
    q: Tensor | tuple[Tensor, Tensor],
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    v_dim: int = 512,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    qq_mask: Tensor | None = None,
    kv_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    op = "paged_mla_attention"
    if isinstance(q, (tuple, list)):
        if len(q) != 2:
            _check.fail(op, "q", "a tensor or a pair (q_nope, q_pe)", f"{len(q)} tensors")
        nope = _check.tensor(op, "q", q[0], ndim=3, dtypes=FLOATS)
        shape = (*nope.shape[:2], None)
        _check.tensor(op, "q", q[1], shape=shape, dtypes=(nope.dtype,), like=nope)
        q = torch.cat(tuple(q), dim=-1)
    _check.tensor(op, "q", q, ndim=3, dtypes=FLOATS)
    _check.tensor(op, "kv_cache", kv_cache, ndim=3, dtypes=(*CACHES, torch.uint8), like=q)
    if kv_cache.dtype == torch.uint8:
        if kv_cache.shape[2] != definition.MLA_FP8_TOKEN_BYTES:
            expected = f"{definition.MLA_FP8_TOKEN_BYTES} bytes a token in a uint8 cache"
            _check.fail(op, "kv_cache", expected, _check.describe(kv_cache))
        kv_cache = definition.unpack_mla_fp8(kv_cache)
    if q.shape[2] != kv_cache.shape[2]:
        _check.fail(
            op, "q", f"head dimension {kv_cache.shape[2]} as in kv_cache", _check.describe(q)
        )
    _check.integer(op, "v_dim", v_dim, 1, kv_cache.shape[2])
    scale = _check.number(op, "scale", scale)
    if isinstance(kv_scale, Tensor) and kv_scale.ndim == 2:
        kv_scale = kv_scale.unsqueeze(2)
    pages = kv_cache.unsqueeze(2)
    return paged_attention(
        q, pages, pages[..., :v_dim], block_table, seq_lens, cu_seqlens_q=cu_seqlens_q,
        scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks, qq_mask=qq_mask,
        k_scale=kv_scale, v_scale=kv_scale, out=out, return_lse=return_lse, backend=backend,
    )  # fmt: skip


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    layout: str = "NHD",
    backend: str | None = None,
) -> None:
    op = "reshape_and_cache"
    _check.tensor(op, "key", key, ndim=3, dtypes=FLOATS)
    k_pages, v_pages = _pages(op, k_cache, v_cache, layout, key)
    tokens, heads = key.shape[0], k_pages.shape[2]
    _check.tensor(op, "key", key, shape=(tokens, heads, k_pages.shape[3]))
    shape = (tokens, heads, v_pages.shape[3])
    _check.tensor(op, "value", value, shape=shape, dtypes=(key.dtype,), like=key)
    _check.tensor(op, "slot_mapping", slot_mapping, shape=(tokens,), dtypes=INDICES, like=key)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.requires_grad:
            _check.fail(
                op, name, "a tensor without gradient (it is written in place)",
                "one with requires_grad",
            )  # fmt: skip
    k_scale = _scale(op, "k_scale", k_scale, k_pages, layout, quantized=True)
    v_scale = _scale(op, "v_scale", v_scale, v_pages, layout, quantized=True)
    if _checking():
        capacity = k_pages.shape[0] * k_pages.shape[1]
        for t, slot in enumerate(slot_mapping.tolist()):
            if slot >= capacity:
                expected = f"slots below {capacity} (negative ones are skipped)"
                _check.fail(op, "slot_mapping", expected, f"{slot} for token {t}")
    registry.call(
        op, key.detach(), value.detach(), k_pages, v_pages, slot_mapping, k_scale, v_scale,
        backend=backend,
    )  # fmt: skip


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor | None = None,
    lse_b: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    op = "merge_attn_states"
    if (out_b is None) != (lse_b is None):
        _check.fail(op, "lse_b", "out_b and lse_b together", "one of them")
    ndim = 4 if out_b is None else 3
    _check.tensor(op, "out_a", out_a, ndim=ndim, dtypes=FLOATS)
    wide = (torch.float32, torch.float64)
    _check.tensor(op, "lse_a", lse_a, shape=out_a.shape[:-1], dtypes=wide, like=out_a)
    if out_b is not None:
        _check.tensor(op, "out_b", out_b, shape=out_a.shape, dtypes=(out_a.dtype,), like=out_a)
        _check.tensor(op, "lse_b", lse_b, shape=lse_a.shape, dtypes=wide, like=out_a)
    return registry.call(op, out_a, lse_a, out_b, lse_b, backend=backend)


def apply_sink(out: Tensor, lse: Tensor, sinks: Tensor, *, backend: str | None = None) -> Tensor:
    op = "apply_sink"
    _check.tensor(op, "out", out, ndim=3, dtypes=FLOATS)
    wide = (torch.float32, torch.float64)
    _check.tensor(op, "lse", lse, shape=out.shape[:2], dtypes=wide, like=out)
    _check.tensor(op, "sinks", sinks, shape=(out.shape[1],), dtypes=FLOATS, like=out)
    return registry.call(op, out, lse, sinks, backend=backend)


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_seq_len: int | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    layout: str = "NHD",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    op = "gather_kv"
    _check.tensor(op, "k_cache", k_cache, ndim=4, dtypes=CACHES)
    k_cache, v_cache = _pages(op, k_cache, v_cache, layout, k_cache)
    block_table, seq_lens = _table(op, block_table, seq_lens, k_cache)
    if max_seq_len is None:
        max_seq_len = block_table.shape[1] * k_cache.shape[1]
    _check.integer(op, "max_seq_len", max_seq_len, 0)
    if out_dtype is None:
        out_dtype = torch.float32 if k_cache.dtype in CODES else k_cache.dtype
    if out_dtype not in FLOATS:
        _check.fail(op, "out_dtype", _check.names(FLOATS), out_dtype, kind=TypeError)
    k_scale = _scale(op, "k_scale", k_scale, k_cache, layout)
    v_scale = _scale(op, "v_scale", v_scale, v_cache, layout)
    if _checking():
        _verify_table(op, block_table, seq_lens, *k_cache.shape[:2])
    return registry.call(
        op, k_cache, v_cache, block_table, seq_lens, max_seq_len, k_scale, v_scale, out_dtype,
        backend=backend,
    )  # fmt: skip


def copy_blocks(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    block_mapping: Tensor,
    *,
    backend: str | None = None,
) -> None:
    op = "copy_blocks"
    _check.tensor(op, "block_mapping", block_mapping, shape=(None, 2), dtypes=INDICES)
    lists = []
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        if isinstance(caches, Tensor):
            caches = [caches]
        if caches is not None and not isinstance(caches, (list, tuple)):
            expected = "a tensor, or a list of tensors"
            _check.fail(op, name, expected, type(caches).__name__, kind=TypeError)
        caches = list(caches or ())
        for cache in caches:
            _check.tensor(op, name, cache, like=block_mapping)
            if cache.ndim < 1:
                _check.fail(op, name, "a first dimension of blocks", _check.describe(cache))
        lists.append(caches)
    registry.call(op, *lists, block_mapping, backend=backend)


for _door in (
    paged_attention,
    paged_mla_attention,
    reshape_and_cache,
    merge_attn_states,
    apply_sink,
    gather_kv,
    copy_blocks,
):
    # One text for both: the definition's, with what a door adds.
    _door.__doc__ = (getattr(definition, _door.__name__).__doc__ or "").rstrip() + (
        '\n\n    backend is None, "cpu", "triton" or "reference".  Raises ValueError, TypeError '
        "(dtype) or\n    NotImplementedError (backend), naming the argument, what was expected and "
        "what came.\n    "
    )
