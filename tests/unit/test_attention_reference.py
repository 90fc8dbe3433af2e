"""The attention definitions against oracles that share none of their code."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from moesaic.reference import attention as ref

F64 = torch.float64
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def paged(lengths, *, heads_kv=2, dim=16, dim_v=None, page=4, layout="NHD", dtype=F64, extra=3):
    """Dense keys and values per sequence, and the same laid out in shuffled pages."""
    dim_v = dim if dim_v is None else dim_v
    keys = [torch.randn(n, heads_kv, dim, dtype=dtype) for n in lengths]
    values = [torch.randn(n, heads_kv, dim_v, dtype=dtype) for n in lengths]
    width = max(-(-n // page) for n in lengths) + 1
    ids = torch.randperm(sum(-(-n // page) for n in lengths) + extra)
    k_cache = torch.full((len(ids), page, heads_kv, dim), math.nan, dtype=dtype)
    v_cache = torch.full((len(ids), page, heads_kv, dim_v), math.nan, dtype=dtype)
    table = torch.full((len(lengths), width), INT_MAX, dtype=torch.int64)
    used = 0
    for b, n in enumerate(lengths):
        for i in range(-(-n // page)):
            block = ids[used]
            part = slice(i * page, min(n, (i + 1) * page))
            k_cache[block, : part.stop - part.start] = keys[b][part]
            v_cache[block, : part.stop - part.start] = values[b][part]
            table[b, i] = block
            used += 1
    if layout == "HND":
        k_cache, v_cache = (c.transpose(1, 2).contiguous() for c in (k_cache, v_cache))
    return keys, values, k_cache, v_cache, table, torch.tensor(lengths)


def cu(q_lens):
    return torch.tensor([0, *q_lens]).cumsum(0)


def mask_of(q_len, n, causal, window):
    """Bottom-right alignment, straight from the definition."""
    rows = []
    for i in range(q_len):
        p = n - q_len + i
        rows.append([
            (not causal or j <= p) and (window[0] < 0 or j >= p - window[0])
            and (window[1] < 0 or j <= p + window[1]) for j in range(n)
        ])  # fmt: skip
    return torch.tensor(rows, dtype=torch.bool).reshape(q_len, n)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [1, 3, 16])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, (-1, -1)), (False, (-1, -1)), (True, (3, -1)), (False, (2, 1))]
)
def test_against_sdpa_with_an_explicit_mask(page, layout, causal, window):
    lengths, q_lens = [7, 1, 20, 5], [7, 1, 4, 3]
    keys, values, kc, vc, table, lens = paged(lengths, page=page, layout=layout, dim_v=8)
    q = torch.randn(sum(q_lens), 6, 16, dtype=F64)
    got = ref.paged_attention(
        q, kc, vc, table, lens, cu_seqlens_q=cu(q_lens), causal=causal, window=window, layout=layout
    )
    for rows, k, v in zip(q.split(q_lens), keys, values, strict=True):
        want = scaled_dot_product_attention(
            rows.transpose(0, 1), k.transpose(0, 1).repeat_interleave(3, 0),
            v.transpose(0, 1).repeat_interleave(3, 0),
            attn_mask=mask_of(len(rows), len(k), causal, window),
        ).transpose(0, 1)  # fmt: skip
        torch.testing.assert_close(got[: len(rows)], want)
        got = got[len(rows) :]


def test_against_flex_attention_with_softcap_alibi_and_lse():
    n, q_len, heads, scale, cap = 23, 9, 4, 0.3, 5.0
    keys, values, kc, vc, table, lens = paged([n], heads_kv=2, page=5)
    q = torch.randn(q_len, heads, 16, dtype=F64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=F64)

    def score_mod(score, b, h, qi, kj):
        p = qi + n - q_len
        score = cap * torch.tanh(score / cap) - slopes[h] * (p - kj).abs()
        return torch.where((kj <= p) & (kj >= p - 6), score, -math.inf)

    want, want_lse = flex_attention(
        q.transpose(0, 1)[None], keys[0].transpose(0, 1)[None], values[0].transpose(0, 1)[None],
        score_mod=score_mod, scale=scale, enable_gqa=True, return_lse=True,
    )  # fmt: skip
    got, lse = ref.paged_attention(
        q, kc, vc, table, lens, cu_seqlens_q=cu([q_len]), scale=scale, softcap=cap,
        alibi_slopes=slopes, window=(6, -1), return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(
        got, want[0].transpose(0, 1), check_dtype=False, atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(lse, want_lse[0].t(), check_dtype=False, atol=1e-6, rtol=1e-5)
    per_sequence = ref.paged_attention(
        q, kc, vc, table, lens, cu_seqlens_q=cu([q_len]), scale=scale, softcap=cap,
        alibi_slopes=slopes[None], window=(6, -1),
    )  # fmt: skip
    assert torch.equal(got, per_sequence)


def test_hand_case():
    """Scores ln 1, ln 3 with values 0 and 4: 3; a sink of ln 4 halves it; the LSE is ln 4."""
    q = torch.tensor([[[1.0]]], dtype=F64)
    k = torch.tensor([0.0, math.log(3.0)], dtype=F64).reshape(1, 2, 1, 1)
    v = torch.tensor([0.0, 4.0], dtype=F64).reshape(1, 2, 1, 1)
    table, lens = torch.tensor([[0]]), torch.tensor([2])
    out, lse = ref.paged_attention(q, k, v, table, lens, scale=1.0, return_lse=True)
    assert out.item() == pytest.approx(3.0) and lse.item() == pytest.approx(math.log(4.0))
    sinks = torch.tensor([math.log(4.0)], dtype=F64)
    out, lse = ref.paged_attention(q, k, v, table, lens, scale=1.0, sinks=sinks, return_lse=True)
    assert out.item() == pytest.approx(1.5) and lse.item() == pytest.approx(math.log(4.0))


def test_trap_01_empty_sequences_and_rows_give_zero_and_minus_inf():
    _, _, kc, vc, table, lens = paged([3, 4], page=2)
    q = torch.randn(2, 2, 16, dtype=F64)
    out = torch.full_like(q, math.nan)
    got, lse = ref.paged_attention(
        q, kc, vc, table, torch.tensor([0, 4]), out=out, return_lse=True, sinks=torch.ones(2)
    )
    assert got is out and (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
    # rows of no sequence (graph padding), a negative length, no rows at all
    out, lse = ref.paged_attention(
        q, kc, vc, table, lens, cu_seqlens_q=torch.tensor([0, 1, 1]), return_lse=True
    )
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and out[0].isfinite().all()
    assert (ref.paged_attention(q, kc, vc, table, torch.tensor([-5, -1])) == 0).all()
    assert ref.paged_attention(q[:0], kc, vc, table, lens, cu_seqlens_q=cu([0, 0])).shape == (
        0,
        2,
        16,
    )


def test_trap_02_poison_in_unused_slots_never_shows():
    _, _, kc, vc, table, lens = paged([5, 9], page=4)  # unwritten slots hold NaN already
    q = torch.randn(2, 4, 16, dtype=F64)
    clean = ref.paged_attention(q, kc.nan_to_num(0.0), vc.nan_to_num(0.0), table, lens)
    assert torch.equal(ref.paged_attention(q, kc, vc, table, lens), clean)
    assert torch.equal(
        ref.paged_attention(q, kc.nan_to_num(1e30), vc.nan_to_num(math.inf), table, lens), clean
    )


def test_trap_02_poison_that_a_row_cannot_see_never_shows():
    _, _, kc, vc, table, lens = paged([6], page=8)
    q = torch.randn(6, 2, 16, dtype=F64)
    want = ref.paged_attention(q, kc, vc, table, lens, cu_seqlens_q=cu([6]))
    page = table[0, 0]
    vc[page, 4] = math.nan
    kc[page, 5] = math.inf
    got = ref.paged_attention(q, kc, vc, table, lens, cu_seqlens_q=cu([6]))
    assert torch.equal(got[:4], want[:4])
    assert got[4:].isnan().all()


@pytest.mark.parametrize("garbage", [INT_MAX, INT_MIN, -7, 10_000])
def test_trap_03_table_garbage_past_the_length_is_not_read(garbage):
    _, _, kc, vc, table, lens = paged([5, 9], page=4)
    q = torch.randn(2, 2, 16, dtype=F64)
    want = ref.paged_attention(q, kc, vc, table, lens)
    for b, used in enumerate((2, 3)):
        table[b, used:] = garbage
    assert torch.equal(ref.paged_attention(q, kc, vc, table, lens), want)


@pytest.mark.parametrize("evicted", [-1, INT_MAX, INT_MIN])
def test_trap_03_an_id_out_of_range_inside_the_length_is_masked(evicted):
    keys, values, kc, vc, table, lens = paged([11], page=4)
    q = torch.randn(1, 2, 16, dtype=F64)
    table[0, 1] = evicted
    keep = torch.tensor([j for j in range(11) if not 4 <= j < 8])
    want = ref.paged_attention(
        q, keys[0][keep][None], values[0][keep][None], torch.tensor([[0]]), torch.tensor([7])
    )
    torch.testing.assert_close(ref.paged_attention(q, kc, vc, table, lens), want)


def test_trap_03_a_length_past_the_table_is_masked_but_keeps_its_position():
    keys, values, kc, vc, table, _ = paged([8], page=4)
    q = torch.randn(1, 2, 16, dtype=F64)
    table = table[:, :2]
    want = ref.paged_attention(q, kc, vc, table, torch.tensor([8]))
    assert torch.equal(ref.paged_attention(q, kc, vc, table, torch.tensor([INT_MAX])), want)
    got = ref.paged_attention(q, kc, vc, table, torch.tensor([10]), window=(4, -1))
    want = ref.paged_attention(
        q, keys[0][None, 5:], values[0][None, 5:], torch.tensor([[0]]), torch.tensor([3])
    )
    torch.testing.assert_close(got, want)


def test_trap_05_slots_out_of_range_are_skipped():
    kc, vc = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    key, value = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    ref.reshape_and_cache(key, value, kc, vc, torch.tensor([11, -1, 0, 12, INT_MIN]))
    assert torch.equal(kc[2, 3], key[0]) and torch.equal(vc[0, 0], value[2])
    assert int((kc != 0).any(-1).sum()) == 4


def test_trap_06_key_and_value_strides_are_independent():
    _, _, kc, vc, table, lens = paged([9, 2], page=4, dim_v=8)
    q = torch.randn(2, 2, 16, dtype=F64)
    want = ref.paged_attention(q, kc, vc, table, lens)
    both = torch.cat((kc, vc), dim=-1)
    wide = torch.zeros(*vc.shape[:3], 24, dtype=F64)
    wide[..., ::3] = vc
    assert torch.equal(ref.paged_attention(q, both[..., :16], wide[..., ::3], table, lens), want)


def test_trap_07_sinks_are_not_in_the_lse_and_can_be_applied_later():
    _, _, kc, vc, table, lens = paged([9, 2], page=4)
    q, sinks = (
        torch.randn(2, 4, 16, dtype=F64),
        torch.tensor([0.3, -1.0, 5.0, -math.inf], dtype=F64),
    )
    want, lse = ref.paged_attention(q, kc, vc, table, lens, sinks=sinks, return_lse=True)
    out, plain = ref.paged_attention(q, kc, vc, table, lens, return_lse=True)
    assert torch.equal(lse, plain)
    torch.testing.assert_close(ref.apply_sink(out, plain, sinks), want)
    nothing = ref.apply_sink(
        torch.full((1, 2, 3), math.nan), torch.full((1, 2), -math.inf), sinks[2:]
    )
    assert torch.equal(nothing, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("sink", [0.7, 60.0])
def test_trap_08_sinks_after_a_split_are_counted_once(sink):
    _, _, kc, vc, table, lens = paged([9], page=3)
    q, sinks = torch.randn(1, 2, 16, dtype=F64), torch.full((2,), sink, dtype=F64)
    parts = []
    for columns in ([0], [1, 2], []):
        part = torch.full_like(table, -1)
        part[:, columns] = table[:, columns]
        parts.append(ref.paged_attention(q, kc, vc, part, lens, return_lse=True))
    out, lse = ref.merge_attn_states(
        torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts])
    )
    want, want_lse = ref.paged_attention(q, kc, vc, table, lens, sinks=sinks, return_lse=True)
    torch.testing.assert_close(ref.apply_sink(out, lse, sinks), want)
    torch.testing.assert_close(lse, want_lse)


def test_trap_09_merging_empty_states_is_not_nan():
    out = torch.full((2, 1, 1, 4), math.nan)
    for empty in (-math.inf, math.inf):
        merged, lse = ref.merge_attn_states(out, torch.full((2, 1, 1), empty))
        assert (merged == 0).all() and (lse == -math.inf).all()
    real = torch.randn(1, 1, 4)
    merged, lse = ref.merge_attn_states(
        out[0], torch.full((1, 1), math.inf), real, torch.full((1, 1), 3.0)
    )
    assert torch.equal(merged, real) and lse.item() == 3.0
    merged, lse = ref.merge_attn_states(out[:0], torch.zeros(0, 1, 1))
    assert (merged == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("length", range(1, 13))
def test_trap_10_every_split_of_every_length_merges_to_the_whole(length):
    _, _, kc, vc, table, lens = paged([length], page=1)
    q = torch.randn(1, 2, 16, dtype=F64)
    want, want_lse = ref.paged_attention(q, kc, vc, table, lens, return_lse=True)
    states = []
    for split in range(0, 16, 2):
        part = torch.full_like(table, -1)
        part[:, split : split + 2] = table[:, split : split + 2]
        states.append(ref.paged_attention(q, kc, vc, part, lens, return_lse=True))
    out, lse = ref.merge_attn_states(
        torch.stack([o for o, _ in states]), torch.stack([s for _, s in states])
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_trap_11_lse_is_natural_with_shape_t_h():
    q = torch.zeros(1, 2, 4)
    _, lse = ref.paged_attention(
        q,
        torch.zeros(1, 8, 1, 4),
        torch.zeros(1, 8, 1, 4),
        torch.tensor([[0]]),
        torch.tensor([8]),
        return_lse=True,
    )
    assert lse.shape == (1, 2) and lse.dtype == torch.float32
    torch.testing.assert_close(lse, torch.full((1, 2), math.log(8.0)))


def test_trap_12_more_rows_than_keys():
    _, values, kc, vc, table, lens = paged([2], page=4)
    q = torch.randn(5, 2, 16, dtype=F64)
    out, lse = ref.paged_attention(q, kc, vc, table, lens, cu_seqlens_q=cu([5]), return_lse=True)
    assert (out[:3] == 0).all() and (lse[:3] == -math.inf).all()
    torch.testing.assert_close(out[3], values[0][0])


def test_trap_13_window_counts_are_inclusive():
    """Hugging Face's sliding_window = W is W keys with the row's own: left = W - 1."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    width, n = 4, 9
    allowed = sliding_window_causal_mask_function(width)
    want = torch.tensor(
        [
            [bool(allowed(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(n)]
            for i in range(n)
        ]
    )
    kc = torch.zeros(n, 1, 1, 4)
    vc = torch.eye(n).reshape(n, 1, 1, n)
    out = ref.paged_attention(
        torch.zeros(n, 1, 4), kc, vc, torch.arange(n)[None], torch.tensor([n]),
        cu_seqlens_q=cu([n]), window=(width - 1, -1),
    )  # fmt: skip
    assert torch.equal(out[:, 0] > 0, want)


def test_trap_14_alibi_is_relative_to_the_row():
    _, _, kc, vc, table, lens = paged([6], page=4)
    q, slopes = torch.zeros(1, 2, 16, dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)
    _, lse = ref.paged_attention(q, kc, vc, table, lens, alibi_slopes=slopes, return_lse=True)
    want = [math.log(sum(math.exp(-s * d) for d in range(6))) for s in (1.0, 0.5)]
    torch.testing.assert_close(lse[0], torch.tensor(want, dtype=F64))


def test_trap_15_per_head_parameters_index_global_heads():
    _, _, kc, vc, table, lens = paged([6], heads_kv=2, page=4)
    q, sinks = torch.randn(1, 6, 16, dtype=F64), torch.randn(6, dtype=F64)
    slopes = torch.rand(6, dtype=F64)
    whole = ref.paged_attention(q, kc, vc, table, lens, sinks=sinks, alibi_slopes=slopes)
    for h in range(6):
        pages = (c[:, :, h // 3 : h // 3 + 1] for c in (kc, vc))
        alone = ref.paged_attention(
            q[:, h : h + 1],
            *pages,
            table,
            lens,
            sinks=sinks[h : h + 1],
            alibi_slopes=slopes[h : h + 1],
        )
        torch.testing.assert_close(whole[:, h], alone[:, 0])


def test_trap_16_tree_mask_covers_only_the_new_keys():
    n, q_len = 9, 4
    keys, values, kc, vc, table, lens = paged([n], page=4)
    q = torch.randn(q_len, 2, 16, dtype=F64)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    got = ref.paged_attention(
        q, kc, vc, table, lens, cu_seqlens_q=cu([q_len]), qq_mask=tree, causal=False
    )
    full = torch.cat((torch.ones(q_len, n - q_len, dtype=torch.bool), tree), dim=1)
    want = scaled_dot_product_attention(
        q.transpose(0, 1), keys[0].transpose(0, 1), values[0].transpose(0, 1), attn_mask=full
    ).transpose(0, 1)
    torch.testing.assert_close(got, want)
    narrow = ref.paged_attention(
        q, kc, vc, table, lens, cu_seqlens_q=cu([q_len]), qq_mask=tree[:, :1], causal=False
    )
    assert not torch.equal(narrow, got)  # columns that the mask lacks are False


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("kind", ["scalar", "head", "token-head"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_trap_19_quantized_caches_round_trip_within_half_a_step(dtype, kind, layout):
    key, value = torch.randn(7, 2, 16), torch.randn(7, 2, 8) * 3
    shape = (3, 4, 2) if layout == "NHD" else (3, 2, 4)
    kc, vc = (torch.zeros(*shape, d).to(dtype) for d in (16, 8))
    scales = {
        "scalar": (0.05, torch.tensor(0.1)),
        "head": (torch.tensor([0.05, 0.06]), torch.tensor([0.1, 0.2])),
        "token-head": (torch.zeros(shape), torch.zeros(shape)),
    }[kind]
    slots = torch.tensor([3, 9, 0, 5, 11, 2, 7])
    ref.reshape_and_cache(
        key, value, kc, vc, slots, k_scale=scales[0], v_scale=scales[1], layout=layout
    )
    table, lens = torch.tensor([[0, 1, 2]]), torch.tensor([12])
    k, v = ref.gather_kv(kc, vc, table, lens, k_scale=scales[0], v_scale=scales[1], layout=layout)
    step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 0.0}[dtype]
    for got, want, scale in ((k[0, slots], key, scales[0]), (v[0, slots], value, scales[1])):
        if kind == "token-head":
            scale = (scale if layout == "NHD" else scale.transpose(1, 2)).reshape(12, 2)[slots][
                ..., None
            ]
            top = 127 if dtype == torch.int8 else torch.finfo(dtype).max
            torch.testing.assert_close(scale, want.abs().amax(-1, keepdim=True) / top)
        elif kind == "head":
            scale = scale[:, None]
        floor = 0.5 * scale if dtype == torch.int8 else scale * 2**-9
        assert ((got - want).abs() <= want.abs() * step + floor * 1.0001).all()


def test_trap_19_special_values():
    key = torch.tensor([0.0, math.nan, math.inf, -math.inf, 1e9, -0.5]).reshape(1, 1, 6)
    limits = (
        (torch.float8_e4m3fn, 448.0, math.nan),
        (torch.float8_e5m2, 57344.0, math.nan),
        (torch.int8, 127.0, 0.0),
    )
    for dtype, top, nan in limits:
        kc, vc = torch.zeros(1, 1, 1, 6).to(dtype), torch.zeros(1, 1, 1, 6).to(dtype)
        ref.reshape_and_cache(key, key, kc, vc, torch.tensor([0]), k_scale=0.25)
        want = torch.tensor([0.0, nan, top, -top, top, -2.0])
        torch.testing.assert_close(kc.float().flatten(), want, equal_nan=True)
        scale = torch.zeros(1, 1, 1)
        ref.reshape_and_cache(torch.zeros_like(key), key, kc, vc, torch.tensor([0]), k_scale=scale)
        assert scale.item() == 1.0 and (kc.float() == 0).all()
        ref.reshape_and_cache(key, key, kc, vc, torch.tensor([0]), k_scale=scale)
        torch.testing.assert_close(scale.item(), 1e9 / top)


def test_quantized_caches_attend_like_their_decoded_values():
    kc, vc = (
        torch.randint(-127, 128, (3, 4, 2, 16), dtype=torch.int8),
        torch.randn(3, 4, 2, 8).to(torch.float8_e4m3fn),
    )
    ks, vs = torch.rand(3, 4, 2) / 50, torch.rand(2)
    table, lens, q = torch.tensor([[2, 0, 1]]), torch.tensor([10]), torch.randn(1, 4, 16)
    got = ref.paged_attention(q, kc, vc, table, lens, k_scale=ks, v_scale=vs)
    want = ref.paged_attention(q, kc * ks[..., None], vc.float() * vs[:, None], table, lens)
    torch.testing.assert_close(got, want)


def test_mla_is_multi_query_with_values_inside_keys():
    q, cache = torch.randn(3, 8, 576), torch.randn(4, 8, 576)
    table, lens = torch.tensor([[3, 1], [0, 2], [1, 3]]), torch.tensor([13, 16, 2])
    got, lse = ref.paged_mla_attention(q, cache, table, lens, scale=192**-0.5, return_lse=True)
    want, want_lse = ref.paged_attention(
        q,
        cache[:, :, None],
        cache[:, :, None, :512].clone(),
        table,
        lens,
        scale=192**-0.5,
        return_lse=True,
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)
    pair = ref.paged_mla_attention(
        (q[..., :512], q[..., 512:]), cache, table, lens, scale=192**-0.5
    )
    assert torch.equal(pair, got)


def test_mla_fp8_tokens_of_flashmla():
    codes = torch.randn(2, 4, 512).to(torch.float8_e4m3fn)
    scales, rope = torch.rand(2, 4, 4), torch.randn(2, 4, 64, dtype=torch.bfloat16)
    packed = torch.cat([t.view(torch.uint8) for t in (codes, scales, rope)], dim=-1)
    assert packed.shape[-1] == ref.MLA_FP8_TOKEN_BYTES
    plain = torch.cat((codes.float() * scales.repeat_interleave(128, -1), rope.float()), dim=-1)
    q, table, lens = torch.randn(1, 3, 576), torch.tensor([[1, 0]]), torch.tensor([7])
    got = ref.paged_mla_attention(q, packed, table, lens, scale=0.1)
    assert torch.equal(got, ref.paged_mla_attention(q, plain, table, lens, scale=0.1))


def test_gather_kv_pads_with_zeros_and_masks_bad_pages():
    keys, values, kc, vc, table, lens = paged([5, 9], page=4, dtype=torch.float32)
    table[1, 1] = -1
    k, v = ref.gather_kv(kc, vc, table, lens)
    assert k.shape == (2, 16, 2, 16) and torch.equal(k[0, :5], keys[0]) and (k[0, 5:] == 0).all()
    assert (
        torch.equal(v[1, :4], values[1][:4])
        and (v[1, 4:8] == 0).all()
        and torch.equal(v[1, 8], values[1][8])
    )
    k, _ = ref.gather_kv(kc, vc, table, lens, max_seq_len=6, out_dtype=torch.bfloat16)
    assert k.shape == (2, 6, 2, 16) and torch.equal(k[0, :5], keys[0].bfloat16())


def test_copy_blocks_reads_before_it_writes_and_skips_bad_ids():
    a, b = torch.randn(4, 2, 1, 3), torch.randint(-9, 9, (4, 2), dtype=torch.int8)
    want = a.clone()
    want[1], want[0] = a[0], a[1]
    want_b = b.clone()
    want_b[1], want_b[0] = b[0], b[1]
    ref.copy_blocks(
        [a, b], None, torch.tensor([[0, 1], [1, 0], [-1, 2], [3, 4], [INT_MAX, INT_MIN]])
    )
    assert torch.equal(a, want) and torch.equal(b, want_b)


def test_gradients_reach_queries_pages_and_sinks():
    _, _, kc, vc, table, lens = paged([5, 3], page=4, dim=4, heads_kv=1, extra=0)
    kc, vc = (c.nan_to_num(0.0).requires_grad_() for c in (kc, vc))
    q = torch.randn(4, 2, 4, dtype=F64, requires_grad=True)
    sinks = torch.randn(2, dtype=F64, requires_grad=True)

    def attend(*tensors):
        q, kc, vc, sinks = tensors
        return ref.paged_attention(
            q,
            kc,
            vc,
            table,
            lens,
            cu_seqlens_q=cu([3, 1]),
            softcap=3.0,
            window=(2, -1),
            sinks=sinks,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(attend, (q, kc, vc, sinks))


def test_gradients_of_merge_and_apply_sink():
    out = torch.randn(3, 2, 2, 3, dtype=F64, requires_grad=True)
    lse = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    sinks = torch.randn(2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(ref.merge_attn_states, (out, lse))
    assert torch.autograd.gradcheck(ref.apply_sink, (out[0], lse[0], sinks))
