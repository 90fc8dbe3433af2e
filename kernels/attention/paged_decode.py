"""Attention of one query row per sequence over a paged KV cache (decode).

Problem   q [B, H, D]; K and V lie in pages [num_blocks, page_size, Hkv, D] with any strides; row b
          of block_table lists the pages of sequence b. Memory bound: every visible K and V element
          is read once, so the H / Hkv query heads of one KV head share a program (packed GQA).

Plan      A sequence's visible keys are cut into splits of one fixed size; a program computes one
          split for one KV head and writes a normalised partial result and its log-sum-exp. A second
          kernel merges a sequence's splits in ascending order. The split size follows from the
          sequence's own length alone, and splits that do not exist are not looked at: neither the
          batch nor the width of the table changes a bit.

Safety    A page id is used only if it lies in [0, num_blocks); addresses are 64-bit from the id on;
          keys past the length or outside the window are never loaded, so garbage there (NaN, wild
          ids) cannot matter. The sink enters once, in the merge; the LSE is without it.

Scores are kept in base 2 (exp2 is the hardware's exponential).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chip import chip, is_amd
from ..common.codecs import e4m3_to_fp32, e5m2_to_fp32
from ..common.math import online_softmax, tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Keys of a split, unless a sequence would then have more than max_splits() of them.
MIN_SPLIT = 256
#: Codes that are loaded as bytes and decoded by integer operations.
CODES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}


def max_splits(num_kv_heads: int) -> int:
    """Most splits of a sequence, a power of two: enough programs for one sequence to fill a GPU."""
    return min(max(256 // triton.next_power_of_2(num_kv_heads), 16), 128)


@triton.jit
def visible_keys(seq_len, capacity, window_left):
    """First and one-past-last key position that the last row of a sequence sees, as int32."""
    end = tl.minimum(tl.maximum(seq_len, 0), capacity)
    start = tl.where(window_left < 0, 0, tl.maximum(seq_len - 1 - window_left, 0))
    return tl.minimum(start, end).to(tl.int32), end.to(tl.int32)


@triton.jit
def split_size(keys, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys in one split of a sequence with ``keys`` visible keys."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, MAX_SPLITS), MIN_SPLIT), 1) * MIN_SPLIT


@triton.jit
def decode_cache(tile, CODE: tl.constexpr, dtype: tl.constexpr):
    """A loaded tile of the cache in the dot's dtype."""
    if CODE == "e4m3":
        tile = e4m3_to_fp32(tile)
    elif CODE == "e5m2":
        tile = e5m2_to_fp32(tile)
    return tile.to(dtype)


@triton.jit(do_not_specialize=["table_width", "num_blocks"])
def paged_decode_kernel(
    q, k_cache, v_cache, block_table, seq_lens, alibi_slopes, k_scale, v_scale,
    partial_out, partial_lse,
    scale, softcap, window_left, num_blocks, page_size, table_width, group,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd, stride_tb, stride_ab, stride_ah,
    stride_ksc, stride_vsc, stride_ob, stride_oh, stride_os,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    CODE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    head_blocks = tl.cdiv(group, BLOCK_H)
    kv_head = (tl.program_id(1) // head_blocks).to(tl.int64)
    split = tl.program_id(2)

    seq_len = tl.load(seq_lens + b).to(tl.int64)
    start, end = visible_keys(seq_len, table_width.to(tl.int64) * page_size, window_left)
    size = split_size(end - start, MIN_SPLIT, MAX_SPLITS)
    first = start + split * size
    last = tl.minimum(first + size, end)
    if first < last:
        in_group = tl.program_id(1) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        real = in_group < group
        head = kv_head * group + in_group
        d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        d_real, dv_real = d < D, dv < DV

        q_at = q + b * stride_qb + head[:, None] * stride_qh + d[None, :]
        query = tl.load(q_at, mask=real[:, None] & d_real[None, :], other=0.0)
        slope = tl.zeros([BLOCK_H], tl.float32)
        if alibi_slopes is not None:
            slope_at = alibi_slopes + b * stride_ab + head * stride_ah
            slope = tl.load(slope_at, mask=real, other=0.0).to(tl.float32) * LOG2E
        # Multipliers of stored keys act on scores, those of values on the result.
        factor = scale
        if k_scale is not None:
            factor = factor * tl.load(k_scale + kv_head * stride_ksc).to(tl.float32)

        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
        for tile in range(first, last, TILE):
            key = tile + tl.arange(0, TILE)
            inside = key < last
            page = key // page_size
            slot = (key - page * page_size).to(tl.int64)
            page_at = block_table + b * stride_tb + page
            page_id = tl.load(page_at, mask=inside, other=-1).to(tl.int64)
            present = inside & (page_id >= 0) & (page_id < num_blocks)

            k_row = page_id * stride_kb + slot * stride_ks + kv_head * stride_kh
            k_at = k_cache + k_row[None, :] + d[:, None] * stride_kd
            keys = tl.load(k_at, mask=present[None, :] & d_real[:, None], other=0)
            v_row = page_id * stride_vb + slot * stride_vs + kv_head * stride_vh
            v_at = v_cache + v_row[:, None] + dv[None, :] * stride_vd
            values = tl.load(v_at, mask=present[:, None] & dv_real[None, :], other=0)

            keys = decode_cache(keys, CODE, query.dtype)
            scores = tl.dot(query, keys, input_precision="ieee") * factor
            if SOFTCAP:
                scores = softcap * tanh(scores / softcap)
            scores = scores * LOG2E
            if alibi_slopes is not None:
                distance = (seq_len - 1 - key).to(tl.float32)
                scores = scores - slope[:, None] * distance[None, :]
            scores = tl.where(present[None, :], scores, float("-inf"))
            weights, shrink, top, total = online_softmax(scores, top, total)
            values = decode_cache(values, CODE, query.dtype)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(query.dtype), values, acc, input_precision="ieee")

        if v_scale is not None:
            acc = acc * tl.load(v_scale + kv_head * stride_vsc).to(tl.float32)
        seen = total != 0
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        lse = tl.where(seen, top + tl.log2(total), float("-inf"))
        part = b * stride_ob + head * stride_oh + split * stride_os
        out_at = partial_out + part[:, None] * DV + dv[None, :]
        tl.store(out_at, acc, mask=real[:, None] & dv_real[None, :])
        tl.store(partial_lse + part, lse, mask=real)


@triton.jit(do_not_specialize=["table_width"])
def merge_splits_kernel(
    partial_out, partial_lse, seq_lens, sinks, out, out_lse,
    window_left, page_size, table_width, stride_pb, stride_ph, stride_ps, stride_ob, stride_oh,
    num_heads, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """out[b, h] = sum_s 2^(lse_s - top) out_s / (sum_s 2^(lse_s - top) + e^sink / 2^top)."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    dv_real = dv < DV
    seq_len = tl.load(seq_lens + b).to(tl.int64)
    start, end = visible_keys(seq_len, table_width.to(tl.int64) * page_size, window_left)
    splits = tl.cdiv(end - start, split_size(end - start, MIN_SPLIT, MAX_SPLITS))

    part = b * stride_pb + head * stride_ph
    index = tl.arange(0, MAX_SPLITS)
    lses = tl.load(partial_lse + part + index * stride_ps, mask=index < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(0, splits):
        at = part + split * stride_ps
        weight = tl.exp2(tl.load(partial_lse + at) - pivot)
        total += weight
        acc += weight * tl.load(partial_out + at * DV + dv, mask=dv_real, other=0.0)
    seen = total != 0
    share = tl.where(seen, total, 1.0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        share += tl.where(seen, tl.exp2(sink - pivot), 0.0)
    out_at = out + b * stride_ob + head * stride_oh + dv
    tl.store(out_at, (acc / share).to(out.dtype.element_ty), mask=dv_real)
    lse = tl.where(seen, (pivot + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    tl.store(out_lse + b * num_heads + head + tl.arange(0, 1), lse)


def heuristic(block_d: int, itemsize: int, aligned: bool, name: str) -> dict[str, int]:
    """Keys of a tile and launch options for padded head dimension ``block_d`` on a chip.

    itemsize is that of q. aligned says that the caches' rows begin at multiples of 16 bytes; loads
    of single elements need far more registers. TILE never depends on the batch.
    """
    if itemsize == 4:  # tensor cores do not multiply fp32 exactly: operands stay in registers
        tile = 2048 // block_d
    else:
        tile = (8192 if aligned else 2048) // block_d
    options = {"TILE": max(16, min(tile, 64)), "num_warps": 4, "num_stages": 2}
    if is_amd(name):
        options["matrix_instr_nonkdim"] = 16
    return options


def is_aligned(cache: Tensor) -> bool:
    """Whether every row of a cache is contiguous and begins at a multiple of 16 bytes."""
    size = cache.element_size()
    offsets = [cache.data_ptr(), *(stride * size for stride in cache.stride()[:-1])]
    return cache.stride(-1) == 1 and all(offset % 16 == 0 for offset in offsets)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window_left: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode attention: out [B, H, Dv] in q's dtype and lse [B, H] fp32, without the sink.

    q [B, H, D]; caches [num_blocks, page_size, Hkv, D | Dv] with any strides; block_table
    [B, max_blocks] and seq_lens [B], int32 or int64; alibi_slopes [H] or [B, H]; sinks [H];
    k_scale, v_scale [1] or [Hkv] multipliers. Mask rules: moesaic.reference.attention.
    """
    batch, num_heads, d = q.shape
    num_blocks, page_size, num_kv_heads, dv = v_cache.shape
    group = num_heads // num_kv_heads
    table_width = block_table.shape[1]
    out = torch.empty(batch, num_heads, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse

    code = CODES.get(k_cache.dtype, "")
    if code in ("e4m3", "e5m2"):
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    elif not code and not q.dtype == k_cache.dtype == v_cache.dtype:
        q = q.float()  # the dot's dtype is that of q: fp32 holds every other exactly
    q = q if q.stride(-1) == 1 else q.contiguous()
    block_table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    seq_lens = seq_lens.contiguous()
    sinks = None if sinks is None else sinks.contiguous()

    block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (d, dv))
    block_h = min(max(16, triton.next_power_of_2(group)), 64)
    limit = max_splits(num_kv_heads)
    splits = max(1, min(limit, triton.cdiv(table_width * page_size, MIN_SPLIT)))
    partial_out = torch.empty(batch, num_heads, splits, dv, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(batch, num_heads, splits, dtype=torch.float32, device=q.device)
    aligned = is_aligned(k_cache) and is_aligned(v_cache)
    options = heuristic(max(block_d, block_dv), q.element_size(), aligned, chip(q.device))
    slopes = (0, 0) if alibi_slopes is None else (0, *alibi_slopes.stride())[-2:]
    scales = [0 if s is None or s.numel() == 1 else s.stride(0) for s in (k_scale, v_scale)]

    grid = (batch, num_kv_heads * triton.cdiv(group, block_h), splits)
    paged_decode_kernel[grid](
        q, k_cache, v_cache, block_table, seq_lens, alibi_slopes, k_scale, v_scale,
        partial_out, partial_lse,
        float(scale), float(softcap), window_left, num_blocks, page_size, table_width, group,
        q.stride(0), q.stride(1), *k_cache.stride(), *v_cache.stride(),
        block_table.stride(0), *slopes, *scales, *partial_lse.stride(),
        D=d, DV=dv, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_H=block_h,
        MIN_SPLIT=MIN_SPLIT, MAX_SPLITS=limit, CODE=code, SOFTCAP=softcap > 0,
        enable_fp_fusion=True, **options,
    )  # fmt: skip
    merge_splits_kernel[(batch, num_heads)](
        partial_out, partial_lse, seq_lens, sinks, out, lse,
        window_left, page_size, table_width, *partial_lse.stride(), out.stride(0), out.stride(1),
        num_heads, DV=dv, BLOCK_DV=block_dv, MIN_SPLIT=MIN_SPLIT,
        MAX_SPLITS=limit,
        enable_fp_fusion=True, num_warps=max(1, min(4, block_dv // 64)),
    )  # fmt: skip
    return out, lse
