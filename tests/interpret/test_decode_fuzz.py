"""paged_decode on random shapes, strides and garbage, under the guard, against the definition."""

import pytest
import torch
from moesaic.kernels.attention.paged_decode import paged_decode

from moesaic.reference.attention import paged_attention
from moesaic.testing import interpreter
from moesaic.testing.interpreter import ORDERS, checked, run_in_orders
from moesaic.testing.metrics import same_bits, within

from .shapes import Draw

interpreter.install()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def caches(draw, lens, table, page, heads, d, dv, dtype, poison):
    """NaN (or 0x7F codes) wherever no sequence has a token; K and V strides differ."""
    blocks = int(table.max()) + 2
    both = []
    for width in (d, dv):
        pages = torch.full((blocks, page, heads, width), torch.nan)
        for b, length in enumerate(lens):
            position = torch.arange(length)
            pages[table[b, position // page], position % page] = draw.normal(length, heads, width)
        if dtype in CODES:
            top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
            pages = pages.nan_to_num(poison).clamp(-top, top)
        both.append(draw.strided(pages.to(dtype)))
    return both


def decode_problem(draw, dtype, cache_dtype):
    batch, heads, group = draw.integer(1, 3), draw.pick(1, 2, 3), draw.pick(1, 2, 3, 4, 7, 17)
    d = draw.pick(8, 16, 24, 64, 80)
    page, longest = draw.pick(1, 2, 5, 16, 48), draw.pick(4, 40, 300, 700)
    width = -(-longest // page) + draw.integer(0, 2)
    lens = [draw.integer(0, longest) for _ in range(batch)]
    ids = draw.permutation(batch * width + 2)[: batch * width].reshape(batch, width)
    k, v = caches(draw, lens, ids, page, heads, d, draw.pick(d, 8, 40), cache_dtype, poison=3.0)
    table = ids.to(draw.pick(torch.int32, torch.int64))
    for b, length in enumerate(lens):
        used = -(-length // page)
        table[b, used:] = torch.iinfo(table.dtype).max
        if used and draw.chance(4):  # an evicted or broken page
            table[b, draw.integer(0, used - 1)] = draw.pick(-1, -7, k.shape[0], 2**31 - 1)
    return {
        "q": draw.strided(draw.normal(batch, heads * group, d).to(dtype)),
        "k_cache": k,
        "v_cache": v,
        "block_table": table,
        "seq_lens": torch.tensor(lens, dtype=draw.pick(torch.int32, torch.int64)),
    }


def options(draw, heads, kv_heads, quantized):
    def scale():
        return draw.pick(None, torch.tensor([0.5]), torch.linspace(0.5, 1.5, kv_heads))

    return {
        "softcap": draw.pick(0.0, 0.0, 5.0),
        "alibi_slopes": draw.pick(None, None, draw.normal(heads).abs()),
        "sinks": draw.pick(None, draw.normal(heads)),
        "k_scale": scale() if quantized else None,
        "v_scale": scale() if quantized else None,
    }


def widen(kwargs):
    wide = {
        k: v.double() if k in ("q", "sinks", "alibi_slopes") and v is not None else v
        for k, v in kwargs.items()
    }
    floating = {c: kwargs[c].double() for c in ("k_cache", "v_cache") if kwargs[c].dtype in DTYPES}
    return wide | floating


@pytest.mark.parametrize("seed", range(50))
def test_random_sequences(seed):
    draw = Draw(seed)
    dtype = draw.pick(*DTYPES)
    cache_dtype = draw.pick(dtype, dtype, draw.pick(*DTYPES), draw.pick(*CODES))
    inputs = decode_problem(draw, dtype, cache_dtype)
    heads, kv_heads = inputs["q"].shape[1], inputs["k_cache"].shape[2]
    extra = options(draw, heads, kv_heads, cache_dtype in CODES)
    scale, left = inputs["q"].shape[2] ** -0.5, draw.pick(-1, -1, 0, 1, 17, 100)

    def run(rows):
        part = {
            k: v[:rows] if k in ("q", "block_table", "seq_lens") else v for k, v in inputs.items()
        }
        return paged_decode(**part, **extra, scale=scale, window_left=left)

    with checked(draw.pick(*ORDERS), seed=seed):
        out, lse = run(None)
        first = run(1)
    same_bits(f"first row, seed {seed}", first[0], out[:1])
    same_bits(f"first lse, seed {seed}", first[1], lse[:1])

    definition = {**inputs, **extra, "window": (left, -1)}
    ref, ref_lse = paged_attention(return_lse=True, **definition)
    gold, gold_lse = paged_attention(return_lse=True, **widen(definition))
    within(f"out, seed {seed}", out, ref, gold, terms=64)
    within(f"lse, seed {seed}", lse, ref_lse, gold_lse, terms=64)


def small(length=600, batch=2, page=16, dtype=torch.float32):
    draw = Draw(5)
    width = -(-length // page)
    table = draw.permutation(batch * width).reshape(batch, width)
    k, v = caches(draw, [length] * batch, table, page, 2, 16, 16, dtype, poison=0.0)
    return {
        "q": draw.normal(batch, 6, 16).to(dtype), "k_cache": k, "v_cache": v,
        "block_table": table, "seq_lens": torch.full((batch,), length), "scale": 0.25,
        "sinks": draw.normal(6),
    }  # fmt: skip


def test_same_bits_in_every_order_of_programs():
    first, *others = run_in_orders(lambda: paged_decode(**small()))
    for out, lse in others:
        same_bits("out", out, first[0])
        same_bits("lse", lse, first[1])


def test_width_of_the_table_changes_no_bit():
    narrow = small()
    wide = dict(
        narrow, block_table=torch.nn.functional.pad(narrow["block_table"], (0, 300), value=-3)
    )
    with checked():
        for got, want in zip(paged_decode(**wide), paged_decode(**narrow), strict=True):
            same_bits("wide table", got, want)


def test_length_beyond_the_table_is_cut_but_keeps_its_position():
    inputs = small(length=40, page=8)
    longer = dict(inputs, seq_lens=inputs["seq_lens"] + 5, window_left=20)
    with checked():
        out, lse = paged_decode(**longer)
    longer["window"] = (longer.pop("window_left"), -1)
    ref, ref_lse = paged_attention(return_lse=True, **longer)
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(lse, ref_lse)


def test_pages_far_apart_are_addressed_with_64_bits():
    """Strides of 2^31 elements over a cache of one page: only page 0 is ever touched."""
    inputs = small(length=10, batch=1, page=16)
    page = inputs["block_table"][0, 0]
    for name in ("k_cache", "v_cache"):
        one = inputs[name][page].contiguous()
        inputs[name] = one.as_strided((1, *one.shape), (2**31, *one.stride()))
    inputs["block_table"] = torch.tensor([[0, 2**31 - 1]])
    with checked():
        out, lse = paged_decode(**inputs)
    ref, ref_lse = paged_attention(return_lse=True, **inputs)
    torch.testing.assert_close(out, ref)
    torch.testing.assert_close(lse, ref_lse)


def test_no_sequences():
    inputs = small()
    for name in ("q", "block_table", "seq_lens"):
        inputs[name] = inputs[name][:0]
    out, lse = paged_decode(**inputs)
    assert out.shape == (0, 6, 16) and lse.shape == (0, 6)
