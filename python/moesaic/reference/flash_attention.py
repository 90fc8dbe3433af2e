"""The three functions of flash-attention's Python interface, spelled as paged attention.

A dense [B, S, Hkv, D] cache is a paged one whose pages are S tokens long, and a packed
[T, Hkv, D] one has pages of a single token; so there is one attention to get right.

`dense`, `packed` and `with_kvcache` take the paged attention (and cache write) to use: the
functions below pass the reference, `moesaic.ops.flash_attention` passes its doors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.reference.attention import paged_attention, reshape_and_cache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

Result = Tensor | tuple[Tensor | None, ...]


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
) -> Result:
    """Attention of dense batches, with flash-attention's argument list.

    Args:
        q: [B, S, H, D].
        k: [B, Sk, Hkv, D]; a causal mask aligns the last row with the last key.
        v: [B, Sk, Hkv, Dv].
        dropout_p: must be 0.
        softmax_scale: None means D ** -0.5.
        causal, softcap, alibi_slopes: as in `paged_attention`.
        window_size: (left, right) inclusive counts, -1 is no limit.
        deterministic: accepted; results always are.
        return_attn_probs: return (out, lse [B, H, S], None); the third is flash-attention's
            dropout mask, which does not exist here.
        s_aux: [H] attention sinks.

    Returns:
        [B, S, H, Dv] in q's dtype, or the triple above.
    """
    return dense(
        paged_attention, q, k, v, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
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
) -> Result:
    """Attention of packed sequences, with flash-attention's argument list.

    Args:
        q: [T, H, D]; sequence b owns rows cu_seqlens_q[b] up to cu_seqlens_q[b + 1].
        k: [Tk, Hkv, D] packed by cu_seqlens_k; with block_table [num_blocks, block_size, Hkv, D].
        v: like k, with Dv.
        cu_seqlens_q: [B + 1] int32.
        cu_seqlens_k: [B + 1] int32; with block_table only its differences count.
        max_seqlen_q: accepted; not needed.
        max_seqlen_k: longest sequence in k; keys past it are not seen.
        block_table: [B, max_blocks] page ids, or None.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux:
            as in `flash_attn_func`.
        return_attn_probs: return (out, lse [H, T], None).

    Returns:
        [T, H, Dv] in q's dtype, or the triple above.
    """
    return packed(
        paged_attention, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs, block_table=block_table,
        s_aux=s_aux,
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
) -> Result:
    """Append new keys and values to a cache and attend to it, with flash-attention's argument list.

    Args:
        q: [B, S, H, D].
        k_cache: [Bc, Sc, Hkv, D] dense, or [num_blocks, block_size, Hkv, D] with block_table.
            **Mutated** if k is given.
        v_cache: the same with Dv.
        k: [B, Snew, Hkv, D] keys to append at position cache_seqlens[b], or None.
        v: [B, Snew, Hkv, Dv], together with k.
        rotary_cos: [positions, rotary_dim / 2]; turns k at its positions, and q at its own if the
            mask is causal or local, else all rows of q at cache_seqlens[b].
        rotary_sin: the same shape.
        cache_seqlens: keys in the cache before the append: [B], or one number; None means all.
        cache_batch_idx: [B] rows of a dense cache to use; None means the first B.
        cache_leftpad: [B] leading keys to leave out; dense caches only.
        block_table: [B, max_blocks] page ids, or None.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
        num_splits: accepted; splits depend on nothing but a key's position.
        return_softmax_lse: return (out, lse [B, H, S]).
        softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux: as in `flash_attn_func`.

    Returns:
        [B, S, H, Dv] in q's dtype, or the pair above.
    """
    return with_kvcache(
        paged_attention, reshape_and_cache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin,
        cache_seqlens, cache_batch_idx, cache_leftpad, block_table, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap,
        rotary_interleaved=rotary_interleaved, alibi_slopes=alibi_slopes,
        return_softmax_lse=return_softmax_lse, s_aux=s_aux,
    )  # fmt: skip


def dense(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    s_aux: Tensor | None,
) -> Result:
    """`flash_attn_func` on the given paged attention: one page per sequence."""
    batch, q_len = q.shape[:2]
    out, lse = attend(
        q.flatten(0, 1),
        k,
        v,
        torch.arange(batch, device=q.device, dtype=torch.int32).unsqueeze(1),
        torch.full((batch,), k.shape[1], device=q.device, dtype=torch.int32),
        cu_seqlens_q=_even_rows(batch, q_len, q.device),
        scale=softmax_scale,
        causal=causal,
        window=tuple(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=s_aux,
        return_lse=True,
    )
    out = out.unflatten(0, (batch, q_len))
    return (out, _batched_lse(lse, batch, q_len), None) if return_attn_probs else out


def packed(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    block_table: Tensor | None,
    s_aux: Tensor | None,
) -> Result:
    """`flash_attn_varlen_func` on the given paged attention: one-token pages, or the caller's."""
    if block_table is None:
        columns = torch.arange(max_seqlen_k, device=q.device, dtype=cu_seqlens_k.dtype)
        block_table = cu_seqlens_k[:-1, None] + columns
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    out, lse = attend(
        q,
        k,
        v,
        block_table,
        cu_seqlens_k.diff(),
        cu_seqlens_q=cu_seqlens_q,
        scale=softmax_scale,
        causal=causal,
        window=tuple(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=s_aux,
        return_lse=True,
    )
    return (out, lse.t().contiguous(), None) if return_attn_probs else out


def with_kvcache(
    attend: Callable[..., Any],
    write: Callable[..., None],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    return_softmax_lse: bool,
    s_aux: Tensor | None,
) -> Result:
    """`flash_attn_with_kvcache` on the given paged attention and cache write."""
    batch, q_len = q.shape[:2]
    device = q.device
    table = block_table
    if table is None:
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(batch, device=device)
        table = cache_batch_idx.unsqueeze(1)
    capacity = table.shape[1] * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        length = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), length, device=device, dtype=torch.int32)
    seq_lens = cache_seqlens.long()

    if rotary_cos is not None and rotary_sin is not None:
        rows = torch.arange(q_len, device=device)
        if not causal and tuple(window_size) == (-1, -1):
            rows = torch.zeros_like(rows)
        turn = (rotary_cos, rotary_sin, rotary_interleaved)
        q = _rotate(q, seq_lens[:, None] + rows, *turn)
        if k is not None:
            k = _rotate(k, seq_lens[:, None] + torch.arange(k.shape[1], device=device), *turn)
    if k is not None and v is not None:
        new = seq_lens[:, None] + torch.arange(k.shape[1], device=device)
        slots = _slots(table, new, k_cache.shape[1])
        write(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())
        seq_lens = seq_lens + k.shape[1]
    if cache_leftpad is not None:
        if block_table is not None:
            raise NotImplementedError(
                "flash_attn_with_kvcache: cache_leftpad: expected None with a block_table, got a "
                "tensor; leave the padding out of the pages instead"
            )
        # Every mask is relative to the last key, so dropping leading keys is the whole change.
        size = k_cache.shape[1]
        columns = cache_leftpad.long()[:, None] + torch.arange(size, device=device)
        table = torch.where(columns < size, table.long() * size + columns, -1)
        seq_lens = (seq_lens - cache_leftpad.long()).clamp_min(0)
        k_cache, v_cache = k_cache.flatten(0, 1).unsqueeze(1), v_cache.flatten(0, 1).unsqueeze(1)
    out, lse = attend(
        q.flatten(0, 1),
        k_cache,
        v_cache,
        table,
        seq_lens,
        cu_seqlens_q=_even_rows(batch, q_len, device),
        scale=softmax_scale,
        causal=causal,
        window=tuple(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=s_aux,
        return_lse=True,
    )
    out = out.unflatten(0, (batch, q_len))
    return (out, _batched_lse(lse, batch, q_len)) if return_softmax_lse else out


def _even_rows(batch: int, q_len: int, device: torch.device) -> Tensor:
    """cu_seqlens_q of `batch` sequences of q_len rows."""
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * q_len


def _batched_lse(lse: Tensor, batch: int, q_len: int) -> Tensor:
    """[B * S, H] to flash-attention's [B, H, S]."""
    return lse.unflatten(0, (batch, q_len)).transpose(1, 2).contiguous()


def _slots(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slot of each position [B, n] through table [B, max_blocks]; -1 where there is no page."""
    column = positions // block_size
    inside = (column >= 0) & (column < table.shape[1])
    page = table.long().gather(1, column.clamp(0, table.shape[1] - 1))
    return torch.where(inside & (page >= 0), page * block_size + positions % block_size, -1)


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the first 2 * cos.shape[1] dimensions of x [B, S, H, D]; fp32 inside."""
    positions = positions.clamp(0, cos.shape[0] - 1)
    cos, sin = cos.float()[positions].unsqueeze(2), sin.float()[positions].unsqueeze(2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
