"""Attention over a paged KV cache, in plain torch: the definition every backend is held to.

The cache is two tensors of pages, `[num_blocks, block_size, Hkv, D]` ("NHD") or
`[num_blocks, Hkv, block_size, D]` ("HND"), with any strides. Row `b` of `block_table` lists the
pages of sequence `b`: its token at position `j` lives in page `block_table[b, j // block_size]`,
slot `j % block_size`.

Rules that hold for every function here:

- **Alignment.** The last query row of a sequence sits at its last key ("bottom right"): row `i` of
  `q_len` has position `p = seq_len - q_len + i`. Rows with `p < 0` see nothing under a causal mask.
- **Mask order.** scale, soft-cap, ALiBi, mask, softmax.
- **Windows** are inclusive counts: row `p` sees keys `p - left .. p + right`; -1 is no limit.
- **Nothing to see.** A row that sees no key gives 0 and an LSE of -inf.
- **LSE** is the natural logarithm of the sum of `exp(score)`, without the sink.
- **Garbage never matters.** Table entries past a sequence's length are not read. A key whose page
  id is out of range (-1, say, for an evicted page), or whose position is past the table's width,
  is masked. What a row cannot see (NaN included) does not change a bit of its result.
- Everything is computed in fp32, or in fp64 when a floating input is fp64, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "apply_sink",
    "copy_blocks",
    "gather_kv",
    "merge_attn_states",
    "paged_attention",
    "paged_mla_attention",
    "reshape_and_cache",
]

MLA_FP8_TOKEN_BYTES = 656
"""Bytes of one FlashMLA FP8 token: 512 e4m3 codes, 4 fp32 scales (one per 128), 64 bf16 of rope."""

_TINY = torch.finfo(torch.float32).tiny


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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of query rows over keys and values read from pages.

    For row t of query head h, at position p of its sequence, with g = h // (H // Hkv):

        s_j = softcap_c(scale * q[t, h] . K[j, g]) - slope_h * |p - j|       for visible keys j
        lse = log(sum_j exp(s_j))
        out = sum_j exp(s_j) V[j, g] / (sum_j exp(s_j) + exp(sink_h))

    where softcap_c(x) = c * tanh(x / c) if c > 0, else x, and K, V are the stored values times
    their scales. Decode, prefill and any mix of them are the same call: `cu_seqlens_q` says how
    many rows each sequence has.

    Args:
        q: [T, H, D] query rows, all sequences after one another.
        k_cache: [num_blocks, block_size, Hkv, D] (or HND); Hkv divides H. fp32, fp16, bf16, fp64,
            float8_e4m3fn, float8_e5m2 or int8.
        v_cache: [num_blocks, block_size, Hkv, Dv] (or HND); strides may differ from k_cache's.
        block_table: [B, max_blocks] int32 or int64 page ids.
        seq_lens: [B] int32 or int64; keys per sequence, those of this call's rows included.
        cu_seqlens_q: [B + 1] int32 or int64; sequence b owns rows cu_seqlens_q[b] up to
            cu_seqlens_q[b + 1]. None means one row each (T == B). Rows owned by no sequence give
            0 and -inf.
        scale: factor of the scores; None means D ** -0.5.
        causal: row p sees keys j <= p only.
        window: (left, right) inclusive counts of keys beside p; -1 is no limit.
        softcap: c above; 0 is off.
        alibi_slopes: [H] or [B, H] float slopes, a penalty per token of distance.
        sinks: [H] float logits that take part in the denominator alone. They are natural-log
            scores: neither `scale` nor `softcap` applies to them.
        qq_mask: [T, max_q] bool; row t sees key j of its sequence's own `q_len` newest keys only
            if qq_mask[t, j - (seq_len - q_len)]. Older keys are not affected; columns that the
            mask lacks are False. It narrows the causal mask: pass causal=False to let it decide
            alone (tree verification).
        k_scale: multiplier of stored keys: a number, a tensor of one element, [Hkv], or one per
            token and head (k_cache's shape without D).
        v_scale: the same for values.
        layout: "NHD" or "HND".
        out: [T, H, Dv] tensor of q's dtype to write the result to.
        return_lse: also return the LSE.

    Returns:
        out [T, H, Dv] in q's dtype; with return_lse also lse [T, H] fp32 (fp64 for fp64 inputs).
    """
    k_cache, v_cache = _as_nhd(k_cache, layout), _as_nhd(v_cache, layout)
    k_scale, v_scale = _scale_as_nhd(k_scale, layout), _scale_as_nhd(v_scale, layout)
    dtype = _compute_dtype(q, k_cache, v_cache, alibi_slopes, sinks, k_scale, v_scale)
    num_tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale

    rows_out = torch.zeros(num_tokens, num_heads, v_cache.shape[-1], dtype=dtype, device=q.device)
    rows_lse = torch.full((num_tokens, num_heads), -math.inf, dtype=dtype, device=q.device)
    # Pieces are concatenated rather than assigned, so that gradients flow through them.
    outs, lses, row = [], [], 0
    for b, (start, end) in enumerate(_row_ranges(cu_seqlens_q, seq_lens.shape[0], num_tokens)):
        seq_len = int(seq_lens[b])
        if start < row or end <= start or seq_len <= 0:
            continue
        k, v, present = _gather_sequence(
            k_cache, v_cache, block_table[b], seq_len, k_scale, v_scale, dtype
        )
        visible = _visible(
            end - start, seq_len, present, causal, window,
            None if qq_mask is None else qq_mask[start:end],
        )  # fmt: skip
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        seq_out, seq_lse = _attend(
            q[start:end].to(dtype), k, v, visible, seq_len, scale, softcap, slopes, sinks
        )
        outs += [rows_out[row:start], seq_out]
        lses += [rows_lse[row:start], seq_lse]
        row = end
    result = torch.cat([*outs, rows_out[row:]]).to(q.dtype)
    lse = torch.cat([*lses, rows_lse[row:]])
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head latent attention in its absorbed form: one KV head whose values are its keys.

    `paged_attention` with K = kv_cache (every dimension) and V = its first `v_dim` dimensions.

    Args:
        q: [T, H, D] rows (DeepSeek: 512 latent + 64 rope), or the pair (q_nope [T, H, v_dim],
            q_pe [T, H, D - v_dim]).
        kv_cache: [num_blocks, block_size, D] latent then rope, in any cache dtype; or uint8
            [num_blocks, block_size, 656], the FP8 tokens of FlashMLA (D = 576): 512 e4m3 codes,
            4 fp32 multipliers for 128 codes each, 64 bf16.
        block_table, seq_lens, cu_seqlens_q, causal, window, softcap, sinks, qq_mask, out,
            return_lse: as in `paged_attention`.
        scale: factor of the scores. It has no default: it comes from the head dimension before
            absorption (DeepSeek-V3: 192 ** -0.5), which these shapes do not tell.
        v_dim: leading dimensions that are the value.
        kv_scale: multiplier of stored values: a number, one element, or [num_blocks, block_size].

    Returns:
        out [T, H, v_dim] in q's dtype; with return_lse also lse [T, H] fp32.
    """
    if isinstance(q, (tuple, list)):
        q = torch.cat(tuple(q), dim=-1)
    if kv_cache.dtype == torch.uint8:
        kv_cache = unpack_mla_fp8(kv_cache)
    if isinstance(kv_scale, Tensor) and kv_scale.numel() > 1:
        kv_scale = kv_scale.unsqueeze(2)
    pages = kv_cache.unsqueeze(2)
    return paged_attention(
        q, pages, pages[..., :v_dim], block_table, seq_lens, cu_seqlens_q=cu_seqlens_q,
        scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks, qq_mask=qq_mask,
        k_scale=kv_scale, v_scale=kv_scale, out=out, return_lse=return_lse,
    )  # fmt: skip


def unpack_mla_fp8(tokens: Tensor) -> Tensor:
    """Decode FlashMLA's FP8 tokens, uint8 [..., 656], to fp32 [..., 576]."""
    codes, scales, rope = tokens.contiguous().split((512, 16, 128), dim=-1)
    latent = codes.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128))
    latent = latent * scales.contiguous().view(torch.float32).unsqueeze(-1)
    return torch.cat((latent.flatten(-2), rope.contiguous().view(torch.bfloat16).float()), dim=-1)


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
) -> None:
    """Write new keys and values into their pages, converting or quantizing them on the way.

    Token t goes to page slot_mapping[t] // block_size, slot slot_mapping[t] % block_size. Slots
    below 0 or beyond the cache are skipped. Two tokens of one call with the same slot: which of
    them is kept is undefined.

    Floating caches take the value rounded to nearest even. FP8 and int8 caches take
    `rne(clamp(x / scale, -max, max))` with max 448 (e4m3fn), 57344 (e5m2), 127 (int8). NaN stays
    NaN in FP8 and becomes 0 in int8; infinities saturate.

    Args:
        key: [T, Hkv, D] floating.
        value: [T, Hkv, Dv] floating.
        k_cache: [num_blocks, block_size, Hkv, D] (or HND), **mutated**.
        v_cache: [num_blocks, block_size, Hkv, Dv] (or HND), **mutated**.
        slot_mapping: [T] int32 or int64.
        k_scale: None (1.0), a number, one element or [Hkv]: the multiplier that reading will
            apply. Of k_cache's shape without D (fp32): quantized caches only, **mutated**; each
            token and head gets its own multiplier `amax / max` (amax over finite values, 1.0 where
            it is 0, never below 2 ** -126), written beside the codes.
        v_scale: the same for values.
        layout: "NHD" or "HND".
    """
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        pages, scales = _as_nhd(cache, layout), _scale_as_nhd(scale, layout)
        num_blocks, block_size = pages.shape[:2]
        slots = slot_mapping.long()
        keep = (slots >= 0) & (slots < num_blocks * block_size)
        where = (slots[keep] // block_size, slots[keep] % block_size) if block_size else ()
        rows = new.detach()[keep]
        if not rows.shape[0]:
            continue
        if isinstance(scales, Tensor) and scales.dim() == 3:
            row_scale = _row_scale(rows, pages.dtype)
            scales[where] = row_scale.squeeze(-1).to(scales.dtype)
        else:
            row_scale = _expand_scale(scales, rows.shape[1], torch.float32, new.device)
        pages[where] = _encode(rows, row_scale, pages.dtype)


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor | None = None,
    lse_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over their union.

    lse = log(sum_i exp(lse_i));  out = sum_i exp(lse_i - lse) out_i, summed in order of i.
    A state with lse -inf (or +inf, which some libraries write for an empty row) saw no key: its
    `out` is not looked at. Rows with no state left give 0 and -inf. Sinks must not be part of the
    states; apply them once at the end with `apply_sink`.

    Args:
        out_a: [T, H, D]; or [n, T, H, D] to merge n states, with out_b and lse_b None.
        lse_a: [T, H] or [n, T, H], natural log.
        out_b: [T, H, D] or None.
        lse_b: [T, H] or None.

    Returns:
        out [T, H, D] in out_a's dtype and lse [T, H] fp32 (fp64 for fp64 inputs).
    """
    outs = out_a.unbind(0) if out_b is None else (out_a, out_b)
    lses = lse_a.unbind(0) if lse_b is None else (lse_a, lse_b)
    dtype = _compute_dtype(*outs, *lses)
    out = torch.zeros(out_a.shape[-3:], dtype=dtype, device=out_a.device)
    if not outs:
        return out.to(out_a.dtype), out.new_full(out.shape[:-1], -math.inf)
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    stacked = stacked.masked_fill(stacked == math.inf, -math.inf)
    top = stacked.amax(0).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(stacked - top)
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    for state, weight in zip(outs, weights, strict=True):
        seen = (weight > 0).unsqueeze(-1)
        out = out + torch.where(seen, state.to(dtype), 0.0) * weight.unsqueeze(-1)
    empty = total == 0
    out = out / total.masked_fill(empty, 1.0).unsqueeze(-1)
    lse = (top + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -math.inf)
    return out.to(out_a.dtype), lse


def apply_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let attention sinks take their share of finished attention: out * sigmoid(lse - sink).

    Exact: the same as having had exp(sink) in the denominator from the start.

    Args:
        out: [T, H, D], attention without sinks.
        lse: [T, H], its LSE (natural log).
        sinks: [H] logits; -inf is no sink.

    Returns:
        [T, H, D] in out's dtype. Rows with lse -inf give 0.
    """
    dtype = _compute_dtype(out, lse, sinks)
    lse, sinks = lse.to(dtype), sinks.to(dtype)
    empty = lse == -math.inf
    gap = torch.where(empty, 0.0, lse) - sinks
    share = torch.sigmoid(gap).masked_fill(empty, 0.0)
    return torch.where(empty.unsqueeze(-1), 0.0, out.to(dtype) * share.unsqueeze(-1)).to(out.dtype)


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
) -> tuple[Tensor, Tensor]:
    """Copy the pages of each sequence into dense, padded tensors, decoded to floating point.

    Args:
        k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, layout: as in `paged_attention`.
        max_seq_len: S below; None means max_blocks * block_size. Longer sequences are cut.
        out_dtype: None means the cache's dtype if it is floating with 16 bits or more, else fp32.

    Returns:
        keys [B, S, Hkv, D] and values [B, S, Hkv, Dv]; 0 past a sequence's length and where a page
        id is out of range.
    """
    k_cache, v_cache = _as_nhd(k_cache, layout), _as_nhd(v_cache, layout)
    k_scale, v_scale = _scale_as_nhd(k_scale, layout), _scale_as_nhd(v_scale, layout)
    if out_dtype is None:
        out_dtype = torch.float32 if k_cache.dtype.itemsize == 1 else k_cache.dtype
    dtype = _compute_dtype(k_cache, v_cache, k_scale, v_scale)
    size = block_table.shape[1] * k_cache.shape[1] if max_seq_len is None else max_seq_len
    shape = (block_table.shape[0], size, k_cache.shape[2])
    keys = torch.zeros(*shape, k_cache.shape[3], dtype=out_dtype, device=k_cache.device)
    values = torch.zeros(*shape, v_cache.shape[3], dtype=out_dtype, device=k_cache.device)
    for b in range(shape[0]):
        length = min(int(seq_lens[b]), size)
        if length > 0:
            k, v, _ = _gather_sequence(
                k_cache, v_cache, block_table[b], length, k_scale, v_scale, dtype
            )
            keys[b, : k.shape[0]], values[b, : v.shape[0]] = k.to(out_dtype), v.to(out_dtype)
    return keys, values


def copy_blocks(
    k_caches: Tensor | Sequence[Tensor],
    v_caches: Tensor | Sequence[Tensor] | None,
    block_mapping: Tensor,
) -> None:
    """Copy whole pages inside each cache, as if all sources were read before any was written.

    Args:
        k_caches: one cache, or one per layer, each [num_blocks, ...] of any dtype, **mutated**.
        v_caches: the same; None where there are none (MLA).
        block_mapping: [n, 2] int32 or int64 pairs (source, destination). Pairs with an id out of
            range are skipped. Two pairs with one destination: which is kept is undefined.
    """
    pairs = block_mapping.long()
    for caches in (k_caches, v_caches):
        for cache in [caches] if isinstance(caches, Tensor) else caches or ():
            inside = ((pairs >= 0) & (pairs < cache.shape[0])).all(1)
            source, target = pairs[inside].unbind(1)
            cache[target] = cache[source].clone()


def _compute_dtype(*inputs: object) -> torch.dtype:
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if wide else torch.float32


def _as_nhd(cache: Tensor, layout: str) -> Tensor:
    return cache.transpose(1, 2) if layout == "HND" else cache


def _scale_as_nhd(scale: float | Tensor | None, layout: str) -> float | Tensor | None:
    per_token = isinstance(scale, Tensor) and scale.dim() == 3
    return scale.transpose(1, 2) if per_token and layout == "HND" else scale  # type: ignore[union-attr]


def _row_ranges(cu_seqlens_q: Tensor | None, batch: int, tokens: int) -> list[tuple[int, int]]:
    """Rows of each sequence, clamped to the rows that there are."""
    if cu_seqlens_q is None:
        return [(b, b + 1) for b in range(min(batch, tokens))]
    bounds = [min(max(int(x), 0), tokens) for x in cu_seqlens_q]
    return [(bounds[b], bounds[b + 1]) for b in range(batch)]


def _gather_sequence(
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    seq_len: int,
    k_scale: float | Tensor | None,
    v_scale: float | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [n, Hkv, D], values [n, Hkv, Dv] and whether each is there [n], n <= seq_len."""
    num_blocks, block_size = k_cache.shape[:2]
    used = min(-(-seq_len // max(block_size, 1)), pages.shape[0])
    ids = pages[:used].long()
    there = (ids >= 0) & (ids < num_blocks)
    positions = torch.arange(min(seq_len, used * block_size), device=k_cache.device)
    present = there[positions // max(block_size, 1)]
    page = ids[positions // max(block_size, 1)][present]
    slot = positions[present] % max(block_size, 1)

    def read(cache: Tensor, scale: float | Tensor | None) -> Tensor:
        rows = cache[page, slot].to(dtype)
        if isinstance(scale, Tensor) and scale.dim() == 3:
            rows = rows * scale[page, slot].to(dtype).unsqueeze(-1)
        else:
            rows = rows * _expand_scale(scale, cache.shape[2], dtype, cache.device)
        dense = rows.new_zeros(positions.shape[0], *rows.shape[1:])
        return dense.index_put((present.nonzero().squeeze(1),), rows)

    return read(k_cache, k_scale), read(v_cache, v_scale), present


def _expand_scale(
    scale: float | Tensor | None, heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A scalar or per-head multiplier as [Hkv, 1]."""
    scale = torch.as_tensor(1.0 if scale is None else scale, dtype=dtype, device=device)
    return scale.reshape(-1, 1).expand(heads, 1)


def _visible(
    q_len: int,
    seq_len: int,
    present: Tensor,
    causal: bool,
    window: tuple[int, int],
    qq_mask: Tensor | None,
) -> Tensor:
    """Which of the n gathered keys each row sees: bool [q_len, n]."""
    first = seq_len - q_len
    position = torch.arange(first, seq_len, device=present.device).unsqueeze(1)
    key = torch.arange(present.shape[0], device=present.device)
    visible = present.expand(q_len, -1)
    left, right = window
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    if causal:
        visible = visible & (key <= position)
    if qq_mask is not None:
        column = (key - first).expand(q_len, -1)
        inside = (column >= 0) & (column < qq_mask.shape[1])
        allowed = torch.zeros_like(visible)
        if qq_mask.shape[1]:
            allowed = qq_mask.gather(1, column.clamp(0, qq_mask.shape[1] - 1)) & inside
        visible = visible & ((column < 0) | allowed)
    return visible


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    seq_len: int,
    scale: float,
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [q_len, H, D] over k, v [n, Hkv, D] under visible [q_len, n]."""
    q_len, num_heads, _ = q.shape
    num_keys, num_kv_heads, v_dim = v.shape
    # A key that no row sees may hold anything; zeros keep it out of the gradients too.
    seen = visible.any(0)[:, None, None]
    k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)

    group = num_heads // num_kv_heads
    grouped = q.reshape(q_len, num_kv_heads, group, q.shape[-1])
    scores = torch.einsum("tgrd,ngd->tgrn", grouped, k).reshape(q_len, num_heads, num_keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        position = torch.arange(seq_len - q_len, seq_len, device=q.device).unsqueeze(1)
        distance = (position - torch.arange(num_keys, device=q.device)).abs().to(q.dtype)
        scores = scores - slopes.to(q.dtype)[:, None] * distance.unsqueeze(1)
    scores = scores.masked_fill(~visible.unsqueeze(1), -math.inf)

    floor = scores.new_full((q_len, num_heads, 1), -math.inf)
    top = torch.cat((scores.detach(), floor), dim=-1).amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1)
    empty = total == 0
    lse = (top.squeeze(-1) + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -math.inf)
    denominator = total.masked_fill(empty, 1.0)
    if sinks is not None:
        denominator = denominator + torch.exp(sinks.to(q.dtype) - top.squeeze(-1))
    grouped = weights.reshape(q_len, num_kv_heads, group, num_keys)
    out = _weighted_sum(grouped, v, visible).reshape(q_len, num_heads, v_dim)
    return out / denominator.unsqueeze(-1), lse


def _weighted_sum(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """sum_n weights[t, g, r, n] v[n, g, d], where an unseen NaN or Inf counts 0, not NaN."""
    finite = v.isfinite()
    out = torch.einsum("tgrn,ngd->tgrd", weights, torch.where(finite, v, 0.0))
    for n in (~finite).flatten(1).any(1).nonzero().flatten().tolist():
        term = weights[..., n, None] * torch.where(finite[n], 0.0, v[n])[None, :, None, :]
        out = out + torch.where(visible[:, n, None, None, None], term, 0.0)
    return out


def _quant_max(dtype: torch.dtype) -> float:
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def _row_scale(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Dynamic multiplier of each token and head: fp32 [T, Hkv, 1]."""
    amax = torch.where(rows.isfinite(), rows.float().abs(), 0.0).amax(-1, keepdim=True)
    scale = (amax / _quant_max(dtype)).clamp_min(_TINY)
    return torch.where(amax == 0, 1.0, scale)


def _encode(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [T, Hkv, D] in a cache's dtype; scale [T, Hkv, 1] or [Hkv, 1], used by 8-bit caches."""
    if dtype.itemsize > 1:
        return rows.to(dtype)
    limit = _quant_max(dtype)
    codes = (rows.float() / scale).clamp(-limit, limit)
    return codes.round().nan_to_num(0.0).to(dtype) if dtype == torch.int8 else codes.to(dtype)
