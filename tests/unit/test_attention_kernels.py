"""What the attention kernels promise beyond values: bits that depend on a row and its keys alone,
inputs that cannot hurt, and errors that say what is wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic
from moesaic.backends import cpu
from moesaic.reference import attention as ref
from moesaic.testing.case import to_gold
from moesaic.testing.cases.attention import paged_inputs
from moesaic.testing.metrics import same_bits, within

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
needs_extension = pytest.mark.skipif(cpu.extension is None, reason="no C++ extension")


def attend(inputs, **changes):
    return moesaic.paged_attention(**{**inputs, **changes}, backend="cpu")


def repaged(inputs, page):
    """The same sequences in pages of another size, in another order."""
    k, v = ref.gather_kv(
        inputs["k_cache"], inputs["v_cache"], inputs["block_table"], inputs["seq_lens"]
    )
    width = -(-k.shape[1] // page)
    table = torch.randperm(k.shape[0] * width).reshape(k.shape[0], width).int()
    caches = []
    for dense in (k, v):
        cache = dense.new_full((k.shape[0] * width, page, *dense.shape[2:]), math.nan)
        padded = dense.new_zeros(k.shape[0], width * page, *dense.shape[2:])
        padded[:, : dense.shape[1]] = dense
        cache[table.flatten().long()] = padded.reshape(cache.shape)
        caches.append(cache)
    return {**inputs, "k_cache": caches[0], "v_cache": caches[1], "block_table": table}


@needs_extension
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_calls_are_right_and_independent_of_everything_else(data):
    """Values, and bits under: other threads, other pages, each sequence alone, each row alone."""
    draw = data.draw
    batch = draw(st.integers(1, 4))
    lengths = [draw(st.sampled_from([0, 1, 5, 31, 255, 256, 257, 400])) for _ in range(batch)]
    q_lens = [draw(st.integers(0, 9)) for _ in range(batch)]
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 7, 9]))
    window = draw(st.sampled_from([(-1, -1), (3, -1), (100, 0), (300, -1)]))
    seed = draw(st.integers(0, 2**31))
    inputs = paged_inputs(
        seed, lengths, heads=kv_heads * group, kv_heads=kv_heads,
        dim=draw(st.sampled_from([8, 32, 64, 72])), dim_v=draw(st.sampled_from([32, 40])),
        page=draw(st.sampled_from([1, 3, 16, 300])), q_lens=q_lens,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        window=window, softcap=draw(st.sampled_from([0.0, 8.0])),
        layout="NHD",
    )  # fmt: skip
    out, lse = attend(inputs)
    gold = ref.paged_attention(**to_gold(inputs))
    plain = ref.paged_attention(**inputs)
    within(f"out, seed {seed}", out, plain[0], gold[0], terms=32)
    within(f"lse, seed {seed}", lse, plain[1], gold[1], terms=32)

    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            for got, want in zip(attend(inputs), (out, lse), strict=True):
                same_bits(f"threads {count}, seed {seed}", got, want)
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(
        attend(repaged(inputs, draw(st.integers(1, 40)))), (out, lse), strict=True
    ):
        same_bits(f"pages, seed {seed}", got, want)
    row = 0
    for b, (n, rows) in enumerate(zip(lengths, q_lens, strict=True)):
        for i in range(rows):
            if n - rows + i + 1 > 0:
                alone = attend(
                    inputs,
                    q=inputs["q"][row : row + 1],
                    block_table=inputs["block_table"][b : b + 1],
                    seq_lens=torch.tensor([n - rows + i + 1]),
                    cu_seqlens_q=None,
                )
                same_bits(f"row {row} as decode, seed {seed}", alone[0], out[row : row + 1])
                same_bits(f"lse {row} as decode, seed {seed}", alone[1], lse[row : row + 1])
            row += 1


@needs_extension
@pytest.mark.parametrize("group", [1, 4, 7])
def test_a_prefill_row_has_the_bits_of_its_decode_step(group):
    """Hundreds of rows take converted tiles, blocks of rows and masked edges; decode takes none."""
    n, kv_heads = 530, 2
    inputs = paged_inputs(
        1, [n], heads=kv_heads * group, kv_heads=kv_heads, dim=64, q_lens=[n], window=(290, -1)
    )
    out, lse = attend(inputs)
    for i in (0, 1, 15, 16, 254, 255, 256, 257, 289, 290, 291, 400, 511, 512, 529):
        alone, alone_lse = attend(
            inputs, q=inputs["q"][i : i + 1], seq_lens=torch.tensor([i + 1]), cu_seqlens_q=None
        )
        same_bits(f"row {i}", alone, out[i : i + 1])
        same_bits(f"lse {i}", alone_lse, lse[i : i + 1])


@needs_extension
@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("q_len", [1, 40])
def test_poison_that_a_row_cannot_see_changes_no_bit(dim, q_len):
    """NaN and Inf in keys after a row, before its window, and in all slots that no one owns."""
    n = 300
    inputs = paged_inputs(
        2, [n], heads=4, kv_heads=2, dim=dim, q_lens=[q_len], window=(120, -1), dtype=torch.float32
    )
    want, want_lse = attend(inputs)
    position = n - q_len  # of the first row
    for cache, poison in (("k_cache", math.nan), ("v_cache", math.inf), ("v_cache", math.nan)):
        dirty = inputs[cache].clone()
        for j in [*range(position - 120), *range(position + 1, n)]:
            dirty[inputs["block_table"][0, j // 16], j % 16] = poison
        got, lse = attend(inputs, **{cache: dirty})
        same_bits(f"{cache} {poison}", got[:1], want[:1])
        same_bits(f"{cache} {poison} lse", lse[:1], want_lse[:1])


@needs_extension
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hostile_tables_and_lengths_are_masked(data):
    """Ids, lengths and row offsets straight from hell: the reference's answer, and no crash."""
    draw = data.draw
    inputs = paged_inputs(
        draw(st.integers(0, 99)), [40, 9], heads=2, kv_heads=1, dim=32, q_lens=[2, 1]
    )
    wide = st.sampled_from([INT_MIN, -7, -1, 0, 1, 2, 3, 4, 5, 40, INT_MAX])
    table = torch.tensor([[draw(wide) for _ in range(4)] for _ in range(2)], dtype=torch.int32)
    lens = torch.tensor([draw(wide) for _ in range(2)], dtype=torch.int32)
    cu = torch.tensor([draw(wide) for _ in range(3)], dtype=torch.int32)
    inputs |= {
        "block_table": table, "seq_lens": lens, "cu_seqlens_q": cu, "causal": draw(st.booleans()),
        "k_cache": inputs["k_cache"].nan_to_num(1.0), "v_cache": inputs["v_cache"].nan_to_num(2.0),
    }  # fmt: skip
    got, lse = attend(inputs)
    want, want_lse = ref.paged_attention(**inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)


@needs_extension
def test_trap_04_block_strides_beyond_2_31_elements():
    """Page 1 starts past 2^31 elements: address space is reserved, two pages of it are used."""
    big = torch.empty(2**31 + 8 * 32, dtype=torch.bfloat16)  # never touched but at its two ends
    strides = (2**31 + 4 * 32, 32, 32, 1)
    cache = big.as_strided((2, 4, 1, 32), strides)
    small = torch.randn(2, 4, 1, 32).bfloat16()
    cache[0], cache[1] = small[0], small[1]
    q, table, lens = torch.randn(1, 2, 32), torch.tensor([[1, 0]]), torch.tensor([7])
    want = moesaic.paged_attention(q, small, small, table, lens, backend="cpu")
    same_bits(
        "far page", moesaic.paged_attention(q, cache, cache, table, lens, backend="cpu"), want
    )
    new = torch.randn(1, 1, 32)
    moesaic.reshape_and_cache(new, new, cache, cache, torch.tensor([6]), backend="cpu")
    assert torch.equal(cache[1, 2], new[0].bfloat16())


@needs_extension
def test_explain_says_who_serves_and_why_not():
    inputs = paged_inputs(0, [5], heads=2, kv_heads=1, dim=32)
    assert "-> cpu" in moesaic.explain("paged_attention", **inputs)
    assert "no C++ kernel for qq_mask" in moesaic.explain(
        "paged_attention", **inputs, qq_mask=torch.ones(1, 1, dtype=torch.bool)
    )
    int8 = {name: torch.zeros(1, 4, 1, 32, dtype=torch.int8) for name in ("k_cache", "v_cache")}
    with pytest.raises(NotImplementedError, match="no C\\+\\+ kernel for int8 caches"):
        attend(inputs, **int8)


def test_gradients_run_the_definition():
    inputs = paged_inputs(0, [5], heads=2, kv_heads=1, dim=32, dtype=torch.float32)
    q = inputs["q"].clone().requires_grad_()
    moesaic.paged_attention(**{**inputs, "q": q})[0].sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().sum() > 0


def test_out_is_written_and_returned():
    inputs = paged_inputs(0, [5, 0], heads=2, kv_heads=1, dim=32)
    want, _ = moesaic.paged_attention(**inputs)
    out = torch.full((2, 4, 32), math.nan, dtype=torch.bfloat16)[:, ::2]
    got, _ = moesaic.paged_attention(**inputs, out=out)
    assert got is out
    same_bits("out", out, want)


BASE = paged_inputs(0, [5, 9], heads=4, kv_heads=2, dim=32, page=4)
ERRORS = [
    (dict(q=BASE["q"][0]), ValueError, "q: expected 3 dimensions, got bfloat16 [4, 32]"),
    (dict(q=[1]), TypeError, "q: expected a torch.Tensor, got list"),
    (
        dict(q=BASE["q"].int()),
        TypeError,
        "q: expected float32, bfloat16, float16 or float64, got int32",
    ),
    (dict(q=BASE["q"][..., :16]), ValueError, "q: expected head dimension 32 as in k_cache, got"),
    (
        dict(q=BASE["q"][:, :3]),
        ValueError,
        "q: expected a multiple of k_cache's 2 heads, got 3 heads",
    ),
    (
        dict(q=BASE["q"][:, :0]),
        ValueError,
        "q: expected a multiple of k_cache's 2 heads, got 0 heads",
    ),
    (
        dict(q=BASE["q"][:1]),
        ValueError,
        "q: expected one row for each of 2 sequences, got 1 rows. Pass cu_",
    ),
    (dict(k_cache=BASE["k_cache"][0]), ValueError, "k_cache: expected 4 dimensions, got"),
    (dict(k_cache=BASE["k_cache"].bool()), TypeError, "k_cache: expected float32"),
    (
        dict(k_cache=BASE["k_cache"][:, :0]),
        ValueError,
        "v_cache: expected shape [6, 0, 2, any], got",
    ),
    (dict(v_cache=BASE["v_cache"][:3]), ValueError, "v_cache: expected shape [6, 4, 2, any], got"),
    (dict(block_table=BASE["block_table"][0]), ValueError, "block_table: expected 2 dimensions"),
    (
        dict(block_table=BASE["block_table"].float()),
        TypeError,
        "block_table: expected int32 or int64",
    ),
    (
        dict(seq_lens=BASE["seq_lens"][:1]),
        ValueError,
        "seq_lens: expected shape [2], got int32 [1]",
    ),
    (
        dict(seq_lens=BASE["seq_lens"].short()),
        TypeError,
        "seq_lens: expected int32 or int64, got int16",
    ),
    (
        dict(cu_seqlens_q=BASE["seq_lens"]),
        ValueError,
        "cu_seqlens_q: expected shape [3], got int32 [2]",
    ),
    (dict(scale="1"), TypeError, "scale: expected a number, got str"),
    (dict(causal=1), TypeError, "causal: expected a bool, got int"),
    (dict(window=3), TypeError, "window: expected a pair (left, right), got 3"),
    (dict(window=(-2, 0)), ValueError, "window: expected an int >= -1, got -2"),
    (dict(softcap=-1.0), ValueError, "softcap: expected a finite number >= 0 (0 is off), got -1.0"),
    (
        dict(softcap=math.nan),
        ValueError,
        "softcap: expected a finite number >= 0 (0 is off), got nan",
    ),
    (
        dict(alibi_slopes=torch.ones(3)),
        ValueError,
        "alibi_slopes: expected shape [4] or [2, 4], got",
    ),
    (dict(sinks=torch.ones(2)), ValueError, "sinks: expected shape [4], got float32 [2]"),
    (dict(qq_mask=torch.ones(2, 2)), TypeError, "qq_mask: expected bool, got float32 [2, 2]"),
    (
        dict(k_scale=torch.ones(3)),
        ValueError,
        "k_scale: expected one element, [2] (heads) or [6, 4, 2]",
    ),
    (dict(v_scale="a"), TypeError, "v_scale: expected a number, got str"),
    (dict(layout="HDN"), ValueError, "layout: expected one of 'NHD', 'HND', got 'HDN'"),
    (
        dict(out=torch.ones(2, 4, 8)),
        ValueError,
        "out: expected shape [2, 4, 32], got float32 [2, 4, 8]",
    ),
    (dict(out=torch.ones(2, 4, 32)), TypeError, "out: expected bfloat16, got float32 [2, 4, 32]"),
    (dict(return_lse=None), TypeError, "return_lse: expected a bool, got NoneType"),
    (dict(backend="gpu"), ValueError, "backend: expected one of cpu, triton, reference, got 'gpu'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=lambda x: str(x)[:40])
def test_attention_errors(change, kind, message):
    with pytest.raises(kind) as error:
        moesaic.paged_attention(**{**BASE, **change})
    assert message in str(error.value)


def write(**changes):
    base = {
        "key": torch.randn(3, 2, 8), "value": torch.randn(3, 2, 4),
        "k_cache": torch.zeros(2, 4, 2, 8), "v_cache": torch.zeros(2, 4, 2, 4),
        "slot_mapping": torch.tensor([0, 1, 2]),
    }  # fmt: skip
    return moesaic.reshape_and_cache(**{**base, **changes})


WRITE_ERRORS = [
    (dict(key=torch.ones(3, 8)), ValueError, "key: expected 3 dimensions, got float32 [3, 8]"),
    (dict(key=torch.ones(3, 1, 8)), ValueError, "key: expected shape [3, 2, 8], got"),
    (dict(value=torch.ones(2, 2, 4)), ValueError, "value: expected shape [3, 2, 4], got"),
    (dict(value=torch.ones(3, 2, 4).half()), TypeError, "value: expected float32, got float16"),
    (
        dict(slot_mapping=torch.ones(3)),
        TypeError,
        "slot_mapping: expected int32 or int64, got float32",
    ),
    (dict(slot_mapping=torch.ones(2).int()), ValueError, "slot_mapping: expected shape [3], got"),
    (
        dict(k_cache=torch.zeros(2, 4, 2, 8, requires_grad=True)),
        ValueError,
        "k_cache: expected a tensor without",
    ),
    (
        dict(k_scale=torch.zeros(2, 4, 2)),
        ValueError,
        "k_scale: expected float32 scales of tokens with an FP8",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRITE_ERRORS, ids=lambda x: str(x)[:40])
def test_write_errors(change, kind, message):
    with pytest.raises(kind) as error:
        write(**change)
    assert message in str(error.value)


def test_errors_of_the_other_doors():
    x, lse = torch.ones(2, 3, 4), torch.ones(2, 3)
    pages, table = torch.ones(2, 4, 1, 8), torch.zeros(1, 1, dtype=torch.int32)
    lens, latent = torch.ones(1, dtype=torch.int32), torch.ones(2, 4, 656, dtype=torch.uint8)
    calls = [
        (
            lambda: moesaic.merge_attn_states(x, lse, x),
            "merge_attn_states: lse_b: expected out_b and lse_b together",
        ),
        (
            lambda: moesaic.merge_attn_states(x, lse),
            "merge_attn_states: out_a: expected 4 dimensions",
        ),
        (lambda: moesaic.apply_sink(x, lse, lse), "apply_sink: sinks: expected shape [3]"),
        (
            lambda: moesaic.gather_kv(pages, pages, table, lens, max_seq_len=-1),
            "max_seq_len: expected an int >= 0",
        ),
        (
            lambda: moesaic.gather_kv(pages, pages, table, lens, out_dtype=torch.int8),
            "out_dtype: expected float32",
        ),
        (
            lambda: moesaic.copy_blocks(3, None, table),
            "copy_blocks: block_mapping: expected shape [any, 2]",
        ),
        (
            lambda: moesaic.copy_blocks(3, None, torch.zeros(1, 2).int()),
            "k_caches: expected a tensor, or a list of",
        ),
        (
            lambda: moesaic.paged_mla_attention(
                torch.ones(1, 2, 8), latent[..., :8], table, lens, scale=1.0
            ),
            "kv_cache: expected 656 bytes a token in a uint8 cache",
        ),
        (
            lambda: moesaic.paged_mla_attention(
                torch.ones(1, 2, 8), latent, table, lens, scale=1.0
            ),
            "q: expected head dimension 576 as in kv_cache",
        ),
        (
            lambda: moesaic.flash_attn_func(x[None], x[None], x[None], 0.1),
            "dropout_p: expected 0, got 0.1. Attention",
        ),
        (
            lambda: moesaic.flash_attn_with_kvcache(x[None], x[None], x[None], x[None]),
            "v: expected k and v together",
        ),
    ]
    for call, message in calls:
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
            call()
        assert message in str(error.value)


def test_check_mode_names_the_sequence_and_the_block(monkeypatch):
    monkeypatch.setenv("MOESAIC_CHECK", "1")
    moesaic.paged_attention(**BASE)
    table = BASE["block_table"].clone()
    table[1, 2] = 77
    with pytest.raises(ValueError, match=r"got 77 at \(sequence 1, block 2\)"):
        moesaic.paged_attention(**{**BASE, "block_table": table})
    table[1, 2] = -1  # an evicted page is allowed
    moesaic.paged_attention(**{**BASE, "block_table": table})
    with pytest.raises(ValueError, match=r"lengths in \[0, 16\].*got 17 for sequence 0"):
        moesaic.paged_attention(**{**BASE, "seq_lens": torch.tensor([17, 1])})
    with pytest.raises(ValueError, match=r"offsets that never fall.*got 2 to 1 for sequence 1"):
        moesaic.paged_attention(**BASE, cu_seqlens_q=torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match=r"slots below 8.*got 8 for token 2"):
        write(slot_mapping=torch.tensor([-1, 7, 8]))
