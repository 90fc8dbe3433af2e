"""Contract cases of the attention room.

Unused slots of every cache hold NaN and unused table entries hold ids far out of range, so a case
passes only if neither is ever looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Cost, Exact, Inputs

FAR = 2**31 - 1
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def paged_inputs(
    seed: int,
    lengths: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int | None = None,
    page: int = 16,
    q_lens: Sequence[int] | None = None,
    dtype: torch.dtype = BF16,
    q_dtype: torch.dtype | None = None,
    index: torch.dtype = torch.int32,
    layout: str = "NHD",
    **options: Any,
) -> Inputs:
    """Arguments of `paged_attention` with shuffled pages, one more than needed, and poison."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    dim_v = dim if dim_v is None else dim_v
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + 1, generator=g)
    caches = [randn(len(order), page, kv_heads, d) for d in (dim, dim_v)]
    table = torch.full((len(lengths), max(pages, default=0) + 1), FAR, dtype=index)
    used = torch.zeros(len(order), page, dtype=torch.bool)
    start = 0
    for b, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        table[b, :count] = order[start : start + count]
        for j in range(count):
            used[order[start + j], : n - j * page] = True
        start += count
    for cache in caches:
        cache[~used] = math.nan
    if layout == "HND":
        caches = [c.transpose(1, 2).contiguous() for c in caches]
    rows = len(lengths) if q_lens is None else sum(q_lens)
    inputs = {
        "q": randn(rows, heads, dim).to(q_dtype or dtype),
        "k_cache": caches[0].to(dtype),
        "v_cache": caches[1].to(dtype),
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=index),
        "layout": layout,
        "return_lse": True,
        **options,
    }
    if q_lens is not None:
        inputs["cu_seqlens_q"] = torch.tensor([0, *q_lens], dtype=index).cumsum(0, dtype=index)
    return inputs


def take_rows(inputs: Inputs, n: int) -> Inputs:
    """The same call for its first n rows: whole sequences, then the older rows of the next."""
    taken = dict(inputs)
    taken["q"] = inputs["q"][:n]
    if inputs.get("cu_seqlens_q") is None:
        for name in ("block_table", "seq_lens"):
            taken[name] = inputs[name][:n]
        return taken
    cu = inputs["cu_seqlens_q"].clamp(max=n)
    taken["cu_seqlens_q"] = cu
    taken["seq_lens"] = (inputs["seq_lens"] - (inputs["cu_seqlens_q"].diff() - cu.diff())).clamp(
        min=0
    )
    return taken


def attention_cost(inputs: Inputs) -> Cost:
    """Every visible K and V element once, q and out once; two multiply-adds for each pair."""
    q, k, v = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    heads = q.shape[1]
    kv_heads = k.shape[1 if inputs["layout"] == "HND" else 2]
    lengths = inputs["seq_lens"].tolist()
    cu = inputs.get("cu_seqlens_q")
    q_lens = [1] * len(lengths) if cu is None else cu.diff().tolist()
    dims = k.shape[3] + v.shape[3]
    keys = sum(n for n, rows in zip(lengths, q_lens, strict=True) if rows)
    pairs = sum(
        sum(max(n - rows + i + 1, 0) for i in range(rows))
        for n, rows in zip(lengths, q_lens, strict=True)
    )
    moved = keys * kv_heads * dims * k.element_size() + q.numel() * q.element_size()
    moved += q.shape[0] * heads * v.shape[3] * q.element_size()
    return Cost(bytes=moved, flops=2 * pairs * heads * dims)


def _case(
    id: str,
    lengths: Sequence[int],
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    *,
    tags: Sequence[str] = (),
    rows_independent: bool = True,
    **kwargs: Any,
) -> Case:
    q_lens = kwargs.get("q_lens")
    return Case(
        id,
        "attention",
        "paged_attention",
        lambda seed: change(paged_inputs(seed, lengths, **kwargs)),
        cost=attention_cost,
        take_rows=take_rows if rows_independent else None,
        rows=len(lengths) if q_lens is None else sum(q_lens),
        tags=frozenset(tags),
    )


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _interleaved(inputs: Inputs) -> Inputs:
    """K and V side by side in one tensor, as views with a common stride."""
    both = torch.cat((inputs["k_cache"], inputs["v_cache"]), dim=-1)
    k, v = both.split((inputs["k_cache"].shape[3], inputs["v_cache"].shape[3]), dim=-1)
    return {**inputs, "k_cache": k, "v_cache": v}


def _sparse_elements(inputs: Inputs) -> Inputs:
    """Caches and queries whose neighbouring elements are 2 apart."""
    names = ("q", "k_cache", "v_cache")
    return {**inputs, **{n: inputs[n].repeat_interleave(2, dim=-1)[..., ::2] for n in names}}


def _evicted(inputs: Inputs) -> Inputs:
    """Pages inside the length that are gone: -1, and ids out of range on both sides."""
    table = inputs["block_table"].clone()
    table[0, 1], table[0, 3], table[1, 0] = -1, FAR, -(2**31)
    return {**inputs, "block_table": table}


def _padded_rows(inputs: Inputs) -> Inputs:
    """Two rows of q that belong to no sequence."""
    return {**inputs, "q": torch.cat((inputs["q"], torch.full_like(inputs["q"][:2], math.nan)))}


def _quantized(dtype: torch.dtype, kind: str) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        k, v = inputs["k_cache"].nan_to_num(0.0), inputs["v_cache"].nan_to_num(0.0)
        top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        shape = {"scalar": (), "head": (k.shape[2],), "token": k.shape[:3]}[kind]
        scale = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 4) / top
        codes = [(c.float() / (4.5 / top)).clamp(-top, top) for c in (k, v)]
        codes = [c.round() if dtype == torch.int8 else c for c in codes]
        return {
            **inputs, "k_cache": codes[0].to(dtype), "v_cache": codes[1].to(dtype),
            "k_scale": scale, "v_scale": scale.clone(),
        }  # fmt: skip

    return change


def _attention_cases() -> Iterator[Case]:
    llama: dict[str, Any] = {"heads": 8, "kv_heads": 2, "dim": 128}
    small: dict[str, Any] = {"heads": 6, "kv_heads": 2, "dim": 64}
    edges = [1, 255, 256, 257, 0, 700]  # around the tile of the C++ kernel, and empty
    mixed: dict[str, Any] = {"lengths": [300, 513, 40, 0, 7, 260], "q_lens": [37, 1, 0, 3, 7, 1]}
    for name, dtype in (("bf16", BF16), ("fp16", F16), ("fp32", F32)):
        yield _case(f"decode-{name}", edges, dtype=dtype, **llama)
        yield _case(f"mixed-{name}", dtype=dtype, **mixed, **small)
    yield _case("smollm2-page1", [33, 260, 5], heads=9, kv_heads=3, dim=64, page=1)
    yield _case("qwen2-group7-page13", [33, 300, 5], heads=14, kv_heads=2, dim=64, page=13)
    yield _case("group7-page528", [700, 30], heads=7, kv_heads=1, dim=128, page=528)
    yield _case("falcon-71-heads", [270, 3], heads=71, kv_heads=1, dim=64, dtype=F32)
    yield _case("group1-phi3-d96", [270, 3], heads=4, kv_heads=4, dim=96)
    yield _case("d72-dv40", [270, 3], heads=6, kv_heads=2, dim=72, dim_v=40)
    yield _case("d8-fp16", [270, 3], heads=2, kv_heads=1, dim=8, dtype=F16)
    yield _case("d64-dv256", [270, 3], heads=4, kv_heads=2, dim=64, dim_v=256)
    yield _case("one-long", [1500], heads=4, kv_heads=1, dim=64)
    yield _case("hnd", edges, layout="HND", page=13, **llama)
    yield _case("hnd-mixed", layout="HND", **mixed, **small)
    yield _case("interleaved-kv", edges, _interleaved, **small)
    yield _case("last-stride-2", [270, 3], _sparse_elements, **small)
    yield _case("int64-q-fp32", edges, index=torch.int64, q_dtype=F32, **small)
    yield _case("q-bf16-cache-fp32", edges, q_dtype=BF16, dtype=F32, **small)
    yield _case("q-bf16-cache-fp16", edges, q_dtype=BF16, dtype=F16, **small)
    yield _case("evicted", [300, 70], _evicted, **small)
    yield _case("evicted-mixed", [300, 70], _evicted, q_lens=[30, 3], **small)
    yield _case(
        "padded-rows", [20, 9], _padded_rows, q_lens=[3, 1], rows_independent=False, **small
    )
    yield _case("more-rows-than-keys", [5, 20], q_lens=[9, 20], **small)
    yield _case("spec-verify", [600, 130], q_lens=[8, 8], **small)
    yield _case("window", edges, window=(127, -1), **small)
    yield _case("window-0", edges, window=(0, 0), **small)
    yield _case("window-mixed", window=(20, -1), **mixed, **small)
    yield _case(
        "bidirectional", causal=False, window=(50, 20), rows_independent=False, **mixed, **small
    )
    yield _case("full", causal=False, rows_independent=False, **mixed, **small)
    yield _case("softcap", edges, softcap=5.0, scale=0.3, **small)
    sinks, slopes = _randn(3, 6), _randn(4, 6).abs() / 10
    yield _case("sinks", edges, sinks=sinks, window=(127, -1), **small)
    yield _case("alibi", edges, alibi_slopes=slopes, **small)
    per_sequence = _randn(5, 6, 6).abs() / 10
    yield _case(
        "everything", alibi_slopes=per_sequence, sinks=sinks, softcap=9.0, window=(200, -1),
        scale=0.2, rows_independent=False, **mixed, **small,
    )  # fmt: skip
    tree = torch.ones(11, 8).tril().bool()
    yield _case(
        "tree-mask", [40, 3], q_lens=[8, 3], qq_mask=tree, causal=False, rows_independent=False,
        **small,
    )  # fmt: skip
    quantized = (
        (torch.float8_e4m3fn, "scalar"),
        (torch.float8_e5m2, "head"),
        (torch.int8, "token"),
    )
    for dtype, kind in quantized:
        name = str(dtype).removeprefix("torch.")
        yield _case(
            f"{name}-{kind}", [40, 3], _quantized(dtype, kind), q_dtype=BF16, dtype=F32, **small
        )
    yield _case("no-rows", [], heads=2, kv_heads=1, dim=32)
    yield _case(
        "small", [5, 9], heads=4, kv_heads=2, dim=32, page=4, dtype=F32, tags=["small", "compile"]
    )
    yield _case(
        "small-mixed", [5, 9], heads=4, kv_heads=2, dim=32, page=4, q_lens=[1, 4],
        sinks=_randn(6, 4), window=(3, -1), tags=["small", "compile"],
    )  # fmt: skip

    for name, shape, lengths in (
        ("llama3-8b-1x4096", (32, 8, 128), [4096]),
        ("llama3-8b-8x2048", (32, 8, 128), [2048] * 8),
        ("llama3-8b-32x512", (32, 8, 128), [512] * 32),
        ("smollm2-8x2048", (9, 3, 64), [2048] * 8),
        ("qwen2.5-7b-8x2048", (28, 4, 128), [2048] * 8),
        ("gpt-oss-8x2048", (64, 8, 64), [2048] * 8),
    ):
        heads, kv_heads, dim = shape
        yield _case(name, lengths, heads=heads, kv_heads=kv_heads, dim=dim, tags=["bench"])
    yield _case(
        "llama3-8b-prefill-512", [512], q_lens=[512], heads=32, kv_heads=8, dim=128, tags=["bench"]
    )


def _mla_inputs(seed: int, **options: Any) -> Inputs:
    made = paged_inputs(seed, [270, 3], heads=5, kv_heads=1, dim=576, dtype=BF16, q_dtype=BF16)
    keep = ("q", "block_table", "seq_lens", "return_lse")
    cache = made["k_cache"].squeeze(2)
    return {**{n: made[n] for n in keep}, "kv_cache": cache, "scale": 192**-0.5, **options}


def _cache_inputs(
    seed: int, dtype: torch.dtype, key_dtype: torch.dtype, layout: str = "NHD", kind: str = "none",
    dim: int = 40, stride: int = 1,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(9, 3, d, generator=g).to(key_dtype) for d in (dim, 24))
    key[0, 0, 0], value[1, 1, 1] = math.inf, math.nan
    pages = (5, 4, 3) if layout == "NHD" else (5, 3, 4)
    caches = [torch.zeros(*pages, d * stride).to(dtype)[..., ::stride] for d in (dim, 24)]
    slots = torch.tensor([3, -1, 0, 19, 20, 7, -(2**31), FAR, 11], dtype=torch.int64)
    inputs = {
        "key": key, "value": value, "k_cache": caches[0], "v_cache": caches[1],
        "slot_mapping": slots, "layout": layout,
    }  # fmt: skip
    if kind == "static":
        inputs |= {"k_scale": 0.02, "v_scale": torch.tensor([0.02, 0.03, 0.04])}
    if kind == "token":
        inputs |= {"k_scale": torch.zeros(pages), "v_scale": torch.zeros(pages)}
    return inputs


def _write_cases() -> Iterator[Case]:
    def case(id: str, *args: Any, tags: Sequence[str] = (), **kwargs: Any) -> Case:
        mutates: tuple[str, ...] = ("k_cache", "v_cache")
        if kwargs.get("kind") == "token":
            mutates += ("k_scale", "v_scale")
        return Case(
            id, "attention", "reshape_and_cache",
            lambda seed: _cache_inputs(seed, *args, **kwargs), Exact(),
            mutates=mutates, tags=frozenset(tags),
        )  # fmt: skip

    for cache in (BF16, F16, F32):
        for key in (BF16, F16, F32):
            names = [str(d).removeprefix("torch.") for d in (key, cache)]
            yield case("-to-".join(names), cache, key)
    yield case("hnd", BF16, BF16, "HND")
    yield case("last-stride-2", BF16, F32, stride=2)
    yield case("int8-static", torch.int8, BF16, kind="static")
    yield case("int8-token", torch.int8, F32, "HND", kind="token")
    yield case("e4m3-token", torch.float8_e4m3fn, BF16, kind="token")
    yield case("e5m2-static", torch.float8_e5m2, BF16, kind="static")
    yield case("compile", F32, F32, tags=["compile", "small"])


def _state_cases() -> Iterator[Case]:
    def states(seed: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = _randn(seed, n, 7, 3, 40).to(dtype), 4 * _randn(seed + 1, n, 7, 3)
        lse[:, 2] = -math.inf
        lse[0, 3], lse[-1, 4] = math.inf, -math.inf
        out[:, 2], out[0, 3] = math.nan, math.inf
        return out, lse

    def two(seed: int) -> Inputs:
        out, lse = states(seed, 2, BF16)
        return {"out_a": out[0], "lse_a": lse[0], "out_b": out[1], "lse_b": lse[1]}

    def many(seed: int) -> Inputs:
        out, lse = states(seed, 5, F32)
        return {"out_a": out, "lse_a": lse}

    def sink(seed: int) -> Inputs:
        out, lse = states(seed, 1, F32)
        sinks = torch.tensor([0.3, -math.inf, 50.0])
        return {
            "out": out[0],
            "lse": lse[0].nan_to_num(posinf=0.0, neginf=-math.inf),
            "sinks": sinks,
        }

    tags = frozenset({"compile", "small"})
    yield Case("two-bf16", "attention", "merge_attn_states", two, tags=tags)
    yield Case("five-fp32", "attention", "merge_attn_states", many, tags=tags)
    yield Case("fp32", "attention", "apply_sink", sink, tags=tags)


def _copy_cases() -> Iterator[Case]:
    def gather(seed: int, **options: Any) -> Inputs:
        made = paged_inputs(seed, [5, 19, 0], heads=2, kv_heads=2, dim=24, dim_v=40, page=4)
        keep = ("k_cache", "v_cache", "block_table", "seq_lens")
        return {**{n: made[n] for n in keep}, **options}

    def copy(seed: int) -> Inputs:
        pairs = torch.tensor([[0, 3], [3, 0], [1, 2], [-1, 4], [4, FAR]])
        return {
            "k_caches": _randn(seed, 5, 4, 2, 8),
            "v_caches": _randn(seed, 5, 2),
            "block_mapping": pairs,
        }

    tags = frozenset({"compile", "small"})
    make = lambda seed: gather(seed, max_seq_len=12, out_dtype=F32)  # noqa: E731
    yield Case("bf16", "attention", "gather_kv", gather, Exact())
    yield Case("cut-fp32", "attention", "gather_kv", make, Exact(), tags=tags)
    mutates = ("k_caches", "v_caches")
    yield Case("swap", "attention", "copy_blocks", copy, Exact(), mutates=mutates, tags=tags)


def _dense(seed: int) -> Inputs:
    q, k, v = (
        _randn(seed, 2, 5, 6, 64),
        _randn(seed + 1, 2, 9, 2, 64),
        _randn(seed + 2, 2, 9, 2, 40),
    )
    return {"q": q, "k": k, "v": v, "causal": True, "s_aux": _randn(seed + 3, 6)}


def _packed(seed: int) -> Inputs:
    q, k, v = _randn(seed, 9, 6, 64), _randn(seed + 1, 12, 2, 64), _randn(seed + 2, 12, 2, 64)
    return {
        "q": q, "k": k, "v": v, "max_seqlen_q": 6, "max_seqlen_k": 7, "causal": True,
        "cu_seqlens_q": torch.tensor([0, 3, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 12], dtype=torch.int32), "window_size": (3, 0),
    }  # fmt: skip


def _kvcache(seed: int) -> Inputs:
    return {
        "q": _randn(seed, 2, 3, 4, 32), "k": _randn(seed + 1, 2, 3, 2, 32),
        "v": _randn(seed + 2, 2, 3, 2, 32), "k_cache": _randn(seed + 3, 6, 4, 2, 32),
        "v_cache": _randn(seed + 4, 6, 4, 2, 32), "causal": True,
        "block_table": torch.tensor([[5, 1, 0], [2, 3, 4]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([6, 0], dtype=torch.int32),
    }  # fmt: skip


def cases() -> Iterator[Case]:
    """Every case of this room."""
    yield from _attention_cases()
    yield Case("deepseek", "attention", "paged_mla_attention", _mla_inputs)
    yield from _write_cases()
    yield from _state_cases()
    yield from _copy_cases()
    yield Case("causal-sinks", "flash_attention", "flash_attn_func", _dense)
    yield Case("window", "flash_attention", "flash_attn_varlen_func", _packed)
    yield Case(
        "append", "flash_attention", "flash_attn_with_kvcache", _kvcache,
        mutates=("k_cache", "v_cache"),
    )  # fmt: skip
