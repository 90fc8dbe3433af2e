"""Contract cases of the moe room: the odd shapes first, then real models for the benches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...formats import (
    FP8_BLOCK_128X128,
    FP8_ROW,
    MXFP4,
    NVFP4,
    PackedWeight,
    QuantFormat,
    QuantTensor,
)
from ...reference.moe import ACTIVATIONS
from ..case import Case, Cost, Exact, Inputs, Yardstick

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _first_rows(*names: str) -> Callable[[Inputs, int], Inputs]:
    """The same call on its first n rows; ``names`` are the arguments with one row a token."""

    def take(inputs: Inputs, n: int) -> Inputs:
        return {k: v[:n] if k in names and v is not None else v for k, v in inputs.items()}

    return take


# Routing


def _topk_inputs(
    tokens: int, experts: int, top_k: int, *, dtype: str = "fp32", logits: str = "random",
    bias: bool = False,
    scale: bool = False, mask: bool = False, given: bool = False, expert_map: bool = False,
    **kwargs: Any,
) -> Callable[[int], Inputs]:  # fmt: skip
    def make(seed: int) -> Inputs:
        g = _generator(seed)
        x = torch.randn(tokens, experts, generator=g)
        if logits == "constant":
            x.fill_(0.5)
        elif logits == "few":  # long runs of ties
            x = torch.randint(0, 3, x.shape, generator=g).float()
        elif logits == "masked":  # rows with fewer than top_k, and with no, usable logits
            x[torch.rand(x.shape, generator=g) < 0.8] = float("-inf")
            x[torch.rand(x.shape, generator=g) < 0.1] = float("nan")
            x[torch.rand(x.shape, generator=g) < 0.02] = float("inf")
            x[: tokens // 4] = float("-inf")
        elif logits == "wide":
            x = 60 * x
        inputs: Inputs = {"router_logits": x.to(_DTYPES[dtype]), "top_k": top_k, **kwargs}
        if bias:
            inputs["e_score_correction_bias"] = torch.randn(experts, generator=g)
        if scale:
            inputs["per_expert_scale"] = torch.rand(experts, generator=g) + 0.5
        if mask:
            inputs["token_mask"] = torch.rand(tokens, generator=g) < 0.7
        if given:
            inputs["topk_ids"] = torch.randint(-1, experts + 1, (tokens, top_k), generator=g)
        if expert_map:
            total = experts + kwargs.get("num_fused_shared_experts", 0)
            local = torch.randperm(total, generator=g).to(torch.int32)
            inputs["expert_map"] = torch.where(local < total // 2, local, -1)
        return inputs

    return make


_DEEPSEEK = dict(
    scoring_func="sigmoid", bias=True, renormalize=True, routed_scaling_factor=2.5,
    num_expert_group=8,
    topk_group=4,
)  # fmt: skip


def _topk_case(name: str, tokens: int, experts: int, top_k: int, *tags: str, **kwargs: Any) -> Case:
    def cost(inputs: Inputs) -> Cost:
        logits = inputs["router_logits"]
        return Cost(logits.nbytes + 8 * tokens * top_k, 0)

    return Case(
        id=f"{name}-T{tokens}-E{experts}-k{top_k}",
        room="moe",
        op="fused_topk",
        make_inputs=_topk_inputs(tokens, experts, top_k, **kwargs),
        tolerance=(Yardstick(terms=16 + top_k), Exact()),
        cost=cost,
        take_rows=_first_rows("router_logits", "token_mask", "topk_ids"),
        rows=tokens,
        tags=frozenset(tags),
    )


def _topk_cases() -> Iterator[Case]:
    yield _topk_case("qwen2", 5, 60, 4)
    yield _topk_case("mixtral", 33, 8, 2, "small", "compile", renormalize=True)
    yield _topk_case("granite", 7, 72, 10, softmax_after_topk=True)
    yield _topk_case("gpt-oss", 65, 32, 4, "small", softmax_after_topk=True, dtype="bf16")
    yield _topk_case("deepseek-v2", 9, 160, 6, num_expert_group=8, topk_group=3, group_score="max")
    yield _topk_case("deepseek-v3", 17, 256, 8, **_DEEPSEEK)
    yield _topk_case(
        "groups-without-bias", 9, 40, 3, scoring_func="sigmoid", num_expert_group=8, topk_group=2
    )
    yield _topk_case("groups-of-one", 6, 8, 4, bias=True, num_expert_group=8, topk_group=5)
    yield _topk_case(
        "deepseek-v4", 9, 384, 6, scoring_func="sqrtsoftplus", bias=True, renormalize=True,
        routed_scaling_factor=1.5,
    )  # fmt: skip
    yield _topk_case("hash", 9, 256, 6, scoring_func="sqrtsoftplus", renormalize=True, given=True)
    yield _topk_case("replay", 9, 24, 3, softmax_after_topk=True, given=True)
    yield _topk_case("llama-4", 9, 16, 1, scoring_func="sigmoid", dtype="fp16")
    yield _topk_case("longcat", 5, 768, 12, bias=True, routed_scaling_factor=6.0)
    yield _topk_case("kimi-k3", 3, 896, 16, scoring_func="sigmoid", bias=True, renormalize=True)
    yield _topk_case("nemotron", 3, 512, 22, scoring_func="sigmoid", bias=True, renormalize=True)
    yield _topk_case("gemma-4", 11, 128, 8, renormalize=True, scale=True)
    yield _topk_case(
        "shared", 11, 48, 5, "compile", renormalize=True, num_fused_shared_experts=2,
        shared_expert_weight=0.4,
        mask=True, expert_map=True,
    )  # fmt: skip
    yield _topk_case("raw", 6, 19, 3, scoring_func="none")
    yield _topk_case("one-expert", 4, 1, 1, renormalize=True)
    yield _topk_case("all-experts", 6, 13, 13)
    yield _topk_case("no-tokens", 0, 8, 2)
    for logits in ("constant", "few", "masked", "wide"):
        yield _topk_case(logits, 24, 41, 6, logits=logits, renormalize=True)
        yield _topk_case(
            f"{logits}-groups", 24, 40, 6, logits=logits, num_expert_group=5, topk_group=2,
            scoring_func="sigmoid",
        )  # fmt: skip
    yield _topk_case("constant-bf16", 5, 288, 8, logits="constant", dtype="bf16")
    yield _topk_case("many-tokens", 300, 64, 6, dtype="bf16")
    for tokens in (1, 4096):
        yield _topk_case("qwen3-30b", tokens, 128, 8, "bench", renormalize=True, dtype="bf16")
        yield _topk_case("deepseek-v3", tokens, 256, 8, "bench", **_DEEPSEEK)
        yield _topk_case("qwen3.5", tokens, 512, 10, "bench", renormalize=True, dtype="bf16")


# Sorting


def _sorting_inputs(
    slots: Callable[[torch.Generator], Tensor], **kwargs: Any
) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        return {"topk_ids": slots(_generator(seed)), **kwargs}

    return make


def _random_ids(
    tokens: int, top_k: int, low: int, high: int
) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(low, high, (tokens, top_k), generator=g, dtype=torch.int32)


def _sorting_cases() -> Iterator[Case]:
    layouts = {
        "odd": (_random_ids(13, 6, -1, 62), 60),
        "one-expert": (_random_ids(9, 1, 0, 1), 1),
        "all-on-one": (_random_ids(17, 2, 3, 4), 8),
        "idle-experts": (_random_ids(3, 2, 0, 40), 40),
        "nowhere": (_random_ids(5, 2, -1, 0), 4),
        "no-tokens": (_random_ids(0, 4, 0, 8), 8),
        "int64": (lambda g: torch.randint(-(2**40), 2**40, (6, 3), generator=g) % 9 - 1, 7),
    }
    for name, (slots, experts) in layouts.items():
        tags = frozenset({"compile"} if name == "odd" else ())
        yield Case(
            id=name, room="moe", op="moe_sort", tolerance=Exact(), tags=tags,
            make_inputs=_sorting_inputs(slots, num_experts=experts),
        )  # fmt: skip
        for block in (1, 7, 16):
            yield Case(
                id=f"{name}-{block}", room="moe", op="moe_align_block_size", tolerance=Exact(),
                tags=tags,
                make_inputs=_sorting_inputs(
                    slots, num_experts=experts, block_size=block, pad_sorted_ids=block == 7
                ),
            )  # fmt: skip
    mapped = torch.tensor([2, -1, 0, 1, -1, 9], dtype=torch.int32)
    yield Case(
        id="expert-map", room="moe", op="moe_align_block_size", tolerance=Exact(),
        make_inputs=_sorting_inputs(
            _random_ids(11, 3, -1, 8), num_experts=3, block_size=4, expert_map=mapped
        ),
    )  # fmt: skip

    def permute(seed: int) -> Inputs:
        g = _generator(seed)
        perm = torch.cat([torch.randperm(21, generator=g), torch.tensor([-1, 21, 2**31 - 1])])
        return {"x": torch.randn(7, 5, generator=g).bfloat16(), "perm": perm, "top_k": 3}

    tags = frozenset({"compile"})
    yield Case(
        id="garbage",
        room="moe",
        op="moe_permute",
        tolerance=Exact(),
        make_inputs=permute,
        tags=tags,
    )

    def unpermute(dtype: str, weighted: bool) -> Callable[[int], Inputs]:
        def make(seed: int) -> Inputs:
            g = _generator(seed)
            y = torch.randn(21, 10, generator=g)
            y[4] = float("nan")  # no slot points here
            places = torch.randint(5, 21, (7, 3), generator=g)
            places[1, 2], places[3] = -1, 21
            weights = torch.rand(7, 3, generator=g) if weighted else None
            return {"y": y.to(_DTYPES[dtype]), "inv_perm": places, "topk_weights": weights}

        return make

    for dtype, weighted in (("fp32", True), ("bf16", True), ("fp16", False)):
        yield Case(
            id=f"{dtype}-{'weighted' if weighted else 'plain'}", room="moe", op="moe_unpermute",
            make_inputs=unpermute(dtype, weighted), tags=tags,
        )  # fmt: skip


# Expert layers


def _random_codes(shape: tuple[int, ...], fmt: QuantFormat, g: torch.Generator) -> QuantTensor:
    """Any codes but NaN, with scales that make the rows of a matrix about 1 long."""
    if fmt.data_dtype == torch.uint8:
        data = torch.randint(0, 256, fmt.data_shape(shape), generator=g, dtype=torch.uint8)
        if fmt.values_per_byte == 2 and shape[-1] % 2:
            data[..., -1] &= 15
    else:
        values = torch.randn(shape, generator=g) * fmt.max / 3
        data = values.clamp(-fmt.max, fmt.max).to(fmt.data_dtype)
    scale = (torch.rand(fmt.scale_shape(shape), generator=g) + 0.5) / (fmt.max / 3)
    global_scale = torch.tensor(shape[-1] ** -0.5) if fmt.global_scale else None
    if global_scale is None:
        scale = scale * shape[-1] ** -0.5
    if fmt.scale == "e8m0":
        scale = scale.log2().round().add(127).to(torch.uint8)
    return QuantTensor(data, scale.to(fmt.scale_dtype), global_scale, fmt, shape)


def _weight(
    shape: tuple[int, ...], fmt: QuantFormat | None, dtype: torch.dtype, g: torch.Generator
) -> Tensor | QuantTensor:
    if fmt is not None:
        return _random_codes(shape, fmt, g)
    return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)


def _grouped_cases() -> Iterator[Case]:
    def make(fmt: QuantFormat | None, dtype: str, by: str) -> Callable[[int], Inputs]:
        def inputs(seed: int) -> Inputs:
            g = _generator(seed)
            kind = _DTYPES[dtype]
            out: Inputs = {
                "a": torch.randn(14, 36, generator=g).to(kind),
                "weight": _weight((5, 19, 36), fmt, kind, g),
                "bias": torch.randn(5, 19, generator=g),
            }
            if by == "offs":
                out["offs"] = torch.tensor([0, 3, 3, 11, 12])
            else:
                out["expert_ids"] = torch.randint(-1, 6, (14,), generator=g)
            return out

        return inputs

    for name, fmt in {"dense": None, "mxfp4": MXFP4}.items():
        for dtype in ("fp32", "bf16"):
            for by in ("offs", "expert_ids"):
                yield Case(
                    id=f"{name}-{dtype}-{by}", room="moe", op="grouped_mm",
                    make_inputs=make(fmt, dtype, by), tolerance=Yardstick(terms=36),
                    tags=frozenset({"compile"} if dtype == "fp32" else ()),
                )  # fmt: skip


def _activation_cases() -> Iterator[Case]:
    def make(activation: str, dtype: str, interleaved: bool) -> Callable[[int], Inputs]:
        def inputs(seed: int) -> Inputs:
            x = 6 * torch.randn(5, 3, 22, generator=_generator(seed))
            return {"x": x.to(_DTYPES[dtype]), "activation": activation, "interleaved": interleaved}

        return inputs

    for activation in ACTIVATIONS:
        for dtype, interleaved in (("fp32", False), ("bf16", True)):
            yield Case(
                id=f"{activation}-{dtype}", room="moe", op="moe_activation",
                make_inputs=make(activation, dtype, interleaved),
                tags=frozenset({"compile"} if activation == "silu" else ()),
            )  # fmt: skip


def _pack(weight: Tensor | QuantTensor) -> PackedWeight:
    from ... import pack_weight

    return pack_weight(weight)


def experts_inputs(
    tokens: int, experts: int, top_k: int, hidden: int, inner: int, *,
    fmt: QuantFormat | None = None,
    dtype: str = "fp32", ids: str = "random", biases: bool = False, expert_map: bool = False,
    transposed: bool = False, shared: bool = False, packed: bool = False, activation: str = "silu",
    **kwargs: Any,
) -> Callable[[int], Inputs]:  # fmt: skip
    """Inputs of fused_experts; see the cases for what the settings are for."""

    def make(seed: int) -> Inputs:
        g = _generator(seed)
        kind = _DTYPES[dtype]
        rows = 2 * inner if ACTIVATIONS[activation].gated else inner
        known = experts + 3 if expert_map else experts
        identity = kwargs.get("num_identity_experts", 0)
        choices = {
            "random": lambda: torch.rand(tokens, known + identity, generator=g).argsort(1)[
                :, :top_k
            ],
            "one": lambda: torch.full((tokens, top_k), experts - 1),
            "invalid": lambda: torch.randint(-2, experts + 2, (tokens, top_k), generator=g),
        }
        inputs: Inputs = {
            "hidden_states": torch.randn(tokens, hidden, generator=g).to(kind),
            "w13": _weight((experts, rows, hidden), fmt, kind, g),
            "w2": _weight((experts, hidden, inner), fmt, kind, g),
            "topk_weights": torch.rand(tokens, top_k, generator=g) + 0.1,
            "topk_ids": choices[ids](),
            "activation": activation,
            **kwargs,
        }
        if ids == "invalid":  # what is skipped may hold anything
            skipped = (inputs["topk_ids"] < 0) | (inputs["topk_ids"] >= experts)
            inputs["topk_weights"][skipped] = float("nan")
        if biases:
            inputs["w13_bias"] = torch.randn(experts, rows, generator=g).to(kind)
            inputs["w2_bias"] = torch.randn(experts, hidden, generator=g).to(kind)
        if expert_map:
            local = torch.full((known,), -1, dtype=torch.int32)
            local[torch.randperm(known, generator=g)[:experts]] = torch.arange(
                experts, dtype=torch.int32
            )
            inputs["expert_map"] = local
        if transposed:
            inputs["transposed"] = True
            for name in ("w13", "w2"):
                inputs[name] = inputs[name].transpose(1, 2).contiguous()
        if shared:
            inputs["shared_w13"] = _weight((rows, hidden), None, kind, g)
            inputs["shared_w2"] = _weight((hidden, inner), None, kind, g)
            inputs["shared_gate"] = _weight((1, hidden), None, kind, g)
        if packed:
            for name in ("w13", "w2"):
                inputs[name] = _pack(inputs[name])
        return inputs

    return make


def _experts_case(
    name: str, tokens: int, experts: int, top_k: int, hidden: int, inner: int, *tags: str,
    **kwargs: Any,
) -> Case:  # fmt: skip
    return Case(
        id=f"{name}-T{tokens}-E{experts}-k{top_k}-H{hidden}-I{inner}",
        room="moe",
        op="fused_experts",
        make_inputs=experts_inputs(tokens, experts, top_k, hidden, inner, **kwargs),
        tolerance=Yardstick(terms=16 + top_k),
        take_rows=_first_rows("hidden_states", "topk_weights", "topk_ids"),
        rows=tokens,
        tags=frozenset(tags),
    )


#: A bench takes turns with layers of at least this many bytes, so that weights come from memory.
_COLD_BYTES = 160 << 20


@lru_cache(maxsize=8)
def _bench_layer(
    experts: int, hidden: int, inner: int, fmt: QuantFormat | None, copy: int
) -> tuple[PackedWeight, PackedWeight]:
    g = _generator(copy)
    shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
    first, second = (_pack(_weight(shape, fmt, torch.bfloat16, g)) for shape in shapes)
    return first, second


def _experts_bench(
    name: str, tokens: int, experts: int, top_k: int, hidden: int, inner: int,
    fmt: QuantFormat | None,
) -> Case:  # fmt: skip
    bytes_per_value = 2 if fmt is None else fmt.bits_per_value / 8
    per_expert = int(3 * hidden * inner * bytes_per_value)
    copies = -(-_COLD_BYTES // (experts * per_expert))

    def make(seed: int) -> Inputs:
        g = _generator(seed)
        w13, w2 = _bench_layer(experts, hidden, inner, fmt, seed % copies)
        return {
            "hidden_states": torch.randn(tokens, hidden, generator=g).bfloat16(),
            "w13": w13,
            "w2": w2,
            "topk_weights": torch.rand(tokens, top_k, generator=g),
            "topk_ids": torch.rand(tokens, experts, generator=g).argsort(1)[:, :top_k],
        }

    def cost(inputs: Inputs) -> Cost:
        used = inputs["topk_ids"].unique().numel()
        moved = used * per_expert + 2 * inputs["hidden_states"].nbytes
        return Cost(moved, 2 * tokens * top_k * 3 * hidden * inner)

    return Case(
        id=f"{name}-T{tokens}",
        room="moe",
        op="fused_experts",
        make_inputs=make,
        tolerance=Yardstick(terms=16 + top_k),
        cost=cost,
        tags=frozenset({"bench"}),
    )


def _experts_cases() -> Iterator[Case]:
    case = _experts_case
    yield case("qwen2", 5, 60, 4, 80, 44)
    yield case("gemma-4", 9, 12, 8, 88, 22, activation="gelu_tanh", dtype="bf16")
    yield case("odd", 7, 6, 3, 33, 21)
    yield case("odd-interleaved", 7, 6, 3, 33, 21, interleaved=True, dtype="fp16")
    yield case("one-expert", 6, 1, 1, 16, 16, "small")
    yield case("all-experts", 6, 5, 5, 24, 20, "small", "compile")
    yield case("idle-experts", 2, 40, 2, 32, 16, dtype="bf16")
    yield case("all-on-one", 210, 4, 2, 48, 40, ids="one")
    yield case("invalid-ids", 30, 6, 4, 32, 24, ids="invalid")
    yield case("no-tokens", 0, 4, 2, 32, 16)
    yield case("many-rows", 260, 3, 2, 40, 72, dtype="bf16")
    yield case("mxfp4", 21, 8, 4, 96, 64, fmt=MXFP4, dtype="bf16")
    yield case("mxfp4-odd", 5, 4, 2, 90, 45, fmt=MXFP4, dtype="fp32")
    yield case("mxfp4-many-rows", 130, 3, 2, 64, 32, fmt=MXFP4, dtype="bf16")
    yield case("nvfp4", 9, 4, 2, 64, 48, fmt=NVFP4, dtype="bf16")
    yield case("fp8-block", 9, 4, 2, 272, 136, fmt=FP8_BLOCK_128X128, dtype="bf16")
    yield case(
        "gpt-oss", 13, 8, 4, 90, 90, "compile", fmt=MXFP4, dtype="bf16", activation="swigluoai",
        interleaved=True,
        biases=True,
    )  # fmt: skip
    yield case(
        "gpt-oss-dense",
        13,
        8,
        4,
        45,
        45,
        activation="swigluoai",
        interleaved=True,
        biases=True,
        transposed=True,
    )
    yield case("deepseek-v4", 7, 6, 3, 64, 32, limit=0.5, fmt=MXFP4)
    yield case("nemotron", 7, 6, 3, 48, 29, activation="relu2", biases=True)
    yield case("kimi-k3", 7, 6, 3, 48, 32, activation="situ", dtype="bf16")
    yield case("step", 7, 6, 3, 48, 32, activation="swiglustep", limit=0.3)
    yield case("gelu", 7, 6, 3, 48, 32, activation="gelu")
    yield case("llama-4", 9, 4, 1, 40, 32, apply_router_weight_on_input=True, dtype="bf16")
    yield case("longcat", 11, 6, 4, 40, 32, num_identity_experts=5, dtype="bf16")
    yield case("expert-map", 11, 4, 3, 40, 32, expert_map=True)
    yield case("identity-and-map", 11, 4, 3, 40, 32, expert_map=True, num_identity_experts=2)
    yield case("shared", 11, 4, 2, 40, 32, shared=True)
    yield case("packed-bf16", 9, 6, 3, 40, 44, dtype="bf16", packed=True)
    yield case("packed-mxfp4", 14, 6, 3, 96, 64, "small", fmt=MXFP4, dtype="bf16", packed=True)
    yield case("packed-fp8-row", 9, 4, 2, 48, 40, fmt=FP8_ROW, dtype="fp16", packed=True)
    for tokens in (1, 16, 128):
        for name, fmt in {"bf16": None, "mxfp4": MXFP4}.items():
            yield _experts_bench(f"E32-k4-H1024-I768-{name}", tokens, 32, 4, 1024, 768, fmt)
    for tokens in (1, 64):
        yield _experts_bench("qwen3-30b-mxfp4", tokens, 128, 8, 2048, 768, MXFP4)


def _moe_cases() -> Iterator[Case]:
    def make(experts: int, routing: dict[str, Any], **kwargs: Any) -> Callable[[int], Inputs]:
        layer = experts_inputs(9, experts, 3, 40, 24, **kwargs)

        def inputs(seed: int) -> Inputs:
            out = layer(seed)
            columns = experts - routing.get("num_fused_shared_experts", 0)
            columns += out.get("num_identity_experts", 0)
            for name in ("topk_weights", "topk_ids"):
                del out[name]
            logits = torch.randn(9, columns, generator=_generator(seed + 1))
            return {**out, "router_logits": logits, "top_k": 3, **routing}

        return inputs

    layers = {
        "mixtral": make(8, dict(renormalize=True)),
        "shared": make(
            7, dict(scoring_func="sigmoid", renormalize=True, num_fused_shared_experts=1)
        ),
        "longcat": make(6, {}, num_identity_experts=4),
        "gpt-oss": make(
            8, dict(softmax_after_topk=True), fmt=MXFP4, activation="swigluoai", interleaved=True,
            biases=True, dtype="bf16",
        ),
    }  # fmt: skip
    for name, inputs in layers.items():
        yield Case(
            id=name, room="moe", op="fused_moe", make_inputs=inputs, tolerance=Yardstick(terms=24),
            take_rows=_first_rows("hidden_states", "router_logits"), rows=9,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every case of this room."""
    yield from _topk_cases()
    yield from _sorting_cases()
    yield from _grouped_cases()
    yield from _activation_cases()
    yield from _experts_cases()
    yield from _moe_cases()
