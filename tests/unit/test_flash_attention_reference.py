"""The FlashAttention-shaped functions against SDPA with explicit masks and hand-made caches."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moesaic.reference import attention as ref
from moesaic.reference.flash_attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

F64 = torch.float64


def sdpa(q, k, v, causal, left=-1, scale=None):
    """q [S, H, D], k [Sk, Hkv, D]: bottom-right aligned attention."""
    group = q.shape[1] // k.shape[1]
    i = torch.arange(len(k) - len(q), len(k))[:, None]
    j = torch.arange(len(k))
    mask = (j <= i) if causal else torch.ones(len(q), len(k), dtype=torch.bool)
    mask = mask & (j >= i - left) if left >= 0 else mask
    return scaled_dot_product_attention(
        q.transpose(0, 1), *(t.transpose(0, 1).repeat_interleave(group, 0) for t in (k, v)),
        attn_mask=mask, scale=scale,
    ).transpose(0, 1)  # fmt: skip


@pytest.mark.parametrize(("causal", "left"), [(False, -1), (True, -1), (True, 2)])
def test_dense(causal, left):
    q, k, v = torch.randn(2, 5, 6, 8, dtype=F64), *torch.randn(2, 2, 9, 2, 8, dtype=F64)
    got, lse, mask = flash_attn_func(
        q, k, v, causal=causal, window_size=(left, -1), return_attn_probs=True
    )
    assert lse.shape == (2, 6, 5) and mask is None
    for b in range(2):
        torch.testing.assert_close(got[b], sdpa(q[b], k[b], v[b], causal, left))


@pytest.mark.parametrize("paged", [False, True])
def test_varlen(paged):
    q_lens, k_lens = [3, 0, 5], [7, 2, 5]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (q_lens, k_lens))
    q, k, v = torch.randn(8, 4, 8, dtype=F64), *torch.randn(2, 14, 2, 8, dtype=F64)
    keys, values, table = k, v, None
    if paged:
        table = torch.tensor([[0, 1], [2, 9], [3, 4]])
        keys, values = torch.zeros(2, 5, 4, 2, 8, dtype=F64)
        for b, pages in enumerate(table):
            for j in range(k_lens[b]):
                keys[pages[j // 4], j % 4] = k[cu_k[b] + j]
                values[pages[j // 4], j % 4] = v[cu_k[b] + j]
    got, lse, _ = flash_attn_varlen_func(
        q, keys, values, cu_q, cu_k, 5, 7, causal=True, return_attn_probs=True, block_table=table
    )
    assert lse.shape == (4, 8)
    for b in range(3):
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        torch.testing.assert_close(got[rows], sdpa(q[rows], k[cols], v[cols], True))


@pytest.mark.parametrize("paged", [False, True])
def test_kvcache_appends_then_attends(paged):
    lens, new, size = torch.tensor([3, 6]), 2, 12
    k_cache, v_cache = torch.randn(2, 2, size, 2, 8, dtype=F64)
    q, k, v = torch.randn(2, new, 4, 8, dtype=F64), *torch.randn(2, 2, new, 2, 8, dtype=F64)
    dense = [
        (torch.cat((k_cache[b, :n], k[b])), torch.cat((v_cache[b, :n], v[b])))
        for b, n in enumerate(lens)
    ]
    kc, vc, table = k_cache.clone(), v_cache.clone(), None
    if paged:
        table = torch.tensor([[0, 1, 2], [3, 4, 5]])
        kc, vc = (c.reshape(6, 4, 2, 8) for c in (kc, vc))
    got, lse = flash_attn_with_kvcache(
        q, kc, vc, k, v, cache_seqlens=lens, block_table=table, causal=True, return_softmax_lse=True
    )
    assert lse.shape == (2, 4, new)
    for b in range(2):
        torch.testing.assert_close(got[b], sdpa(q[b], *dense[b], True))
        row = kc.reshape(2, size, 2, 8)[b]
        assert torch.equal(row[lens[b] : lens[b] + new], k[b])
        assert torch.equal(row[: lens[b]], k_cache[b, : lens[b]])


def test_kvcache_batch_index_left_padding_and_overflow():
    k_cache, v_cache = torch.randn(2, 3, 6, 2, 8, dtype=F64)
    q = torch.randn(2, 1, 2, 8, dtype=F64)
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor([6, 4]),
        cache_batch_idx=torch.tensor([2, 0]), cache_leftpad=torch.tensor([1, 3]),
    )  # fmt: skip
    torch.testing.assert_close(got[0], sdpa(q[0], k_cache[2, 1:6], v_cache[2, 1:6], False))
    torch.testing.assert_close(got[1], sdpa(q[1], k_cache[0, 3:4], v_cache[0, 3:4], False))
    before = k_cache.clone()
    new = torch.randn(1, 2, 2, 8, dtype=F64)
    flash_attn_with_kvcache(q[:1], k_cache, v_cache, new, new, cache_seqlens=6)
    assert torch.equal(k_cache, before)  # no room: not written, not in a neighbour's row
    with pytest.raises(
        NotImplementedError, match="cache_leftpad: expected None with a block_table"
    ):
        flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_leftpad=torch.tensor([1, 1]),
            block_table=torch.tensor([[0], [1]]),
        )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_kvcache_rotary_against_complex_numbers(interleaved, causal):
    lens, q_len, half = torch.tensor([3, 0]), 2, 3
    angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.3, 0.1]))
    k_cache, v_cache = torch.randn(2, 2, 8, 1, 8)
    q, k, v = torch.randn(2, q_len, 2, 8), *torch.randn(2, 2, q_len, 1, 8)

    def turn(x, position):
        front = x[..., : 2 * half]
        re, im = (front[..., ::2], front[..., 1::2]) if interleaved else front.split(half, -1)
        z = torch.complex(re, im) * torch.polar(torch.ones(half), angles[position])
        front = (
            torch.stack((z.real, z.imag), -1).flatten(-2)
            if interleaved
            else torch.cat((z.real, z.imag), -1)
        )
        return torch.cat((front, x[..., 2 * half :]), -1)

    want = []
    for b, n in enumerate(lens):
        keys = torch.cat(
            (k_cache[b, :n], torch.stack([turn(k[b, i], n + i) for i in range(q_len)]))
        )
        rows = torch.stack([turn(q[b, i], n + i if causal else n) for i in range(q_len)])
        want.append(sdpa(rows, keys, torch.cat((v_cache[b, :n], v[b])), causal))
    got = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos(), angles.sin(), cache_seqlens=lens,
        causal=causal, rotary_interleaved=interleaved,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-5)


def test_dense_sinks_are_those_of_paged_attention():
    q, k, v = torch.randn(1, 2, 4, 8), *torch.randn(2, 1, 5, 2, 8)
    sinks = torch.randn(4)
    want = ref.paged_attention(
        q[0], k, v, torch.tensor([[0]]), torch.tensor([5]), cu_seqlens_q=torch.tensor([0, 2]),
        causal=False, sinks=sinks,
    )  # fmt: skip
    assert torch.equal(flash_attn_func(q, k, v, s_aux=sinks)[0], want)
