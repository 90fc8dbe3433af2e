"""Contract cases of the matmul room."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...formats import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    FP8_ROW,
    MXFP4,
    NVFP4,
    PRESETS,
    QuantFormat,
    QuantTensor,
)
from ...reference import quant as reference
from ..case import Case, Cost, Exact, Inputs, Yardstick, flatten


def _randn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def _scaled_mm(
    left: QuantFormat, right: QuantFormat, m: int, n: int, k: int, out_dtype: torch.dtype
) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        a, b, bias = _randn(seed, (m, k), (n, k), (n,))
        return {
            "a": reference.quantize(a, left),
            "b": reference.quantize(b, right),
            "bias": bias,
            "out_dtype": out_dtype,
        }

    return make


def _scaled_mm_cases() -> Iterator[Case]:
    pairs = [
        (FP8_ROW, FP8_ROW),
        (FP8_BLOCK_1X128, FP8_BLOCK_128X128),
        (MXFP4, MXFP4),
        (NVFP4, NVFP4),
        (PRESETS["MXFP8"], MXFP4),
    ]
    for left, right in pairs:
        id = f"{left}-{right}-5x37x200"
        make = _scaled_mm(left, right, 5, 37, 200, torch.bfloat16)
        # Not differentiable in its codes, so fp64 cannot widen them: the reference is the gold.
        yield Case(id, "matmul", "scaled_mm", make, Yardstick(terms=200))
    make = _scaled_mm(MXFP4, MXFP4, 4, 8, 64, torch.float32)  # opcheck cannot compare float8
    yield Case("compile", "matmul", "scaled_mm", make, tags=frozenset({"compile"}))


class _RoundTrip(Case):
    """Layouts belong to their backends: what counts is that unpacking restores every bit."""

    def run(self, inputs: Inputs, backend: str | None = None) -> tuple[torch.Tensor, ...]:
        from ... import pack_weight, unpack_weight

        return flatten(unpack_weight(pack_weight(inputs["weight"], backend=backend)))

    def reference(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return flatten(inputs["weight"])


def _pack_cases() -> Iterator[Case]:
    for name in ("MXFP4", "FP8_ROW", "NVFP4", "dense"):
        yield _RoundTrip(name, "matmul", "pack_weight", _weight(name), Exact())
        yield Case(name, "matmul", "unpack_weight", _packed(name), Exact())


def _weight(name: str) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        (w,) = _randn(seed, (21, 70))
        return {"weight": w if name == "dense" else reference.quantize(w, PRESETS[name])}

    return make


def _packed(name: str) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        from ... import pack_weight

        return {"packed": pack_weight(**_weight(name)(seed))}

    return make


def _quant_linear(
    format: QuantFormat | None, m: int, n: int, k: int, dtype: torch.dtype, **kwargs
) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        from ... import pack_weight

        x, w, bias = _randn(seed, (m, k), (n, k), (n,))
        weight = pack_weight(w if format is None else reference.quantize(w, format))
        return {"x": x.to(dtype), "weight": weight, "bias": bias, **kwargs}

    return make


def _quant_linear_cases() -> Iterator[Case]:
    for name in ("MXFP4", "FP8_ROW", "NVFP4", None):
        for activation in (None, "int8", "int16", PRESETS["MXFP8"]):
            make = _quant_linear(
                PRESETS[name] if name else None, 5, 37, 200, torch.float32, activation=activation
            )
            id = f"{name or 'dense'}-{activation or 'exact'}-5x37x200"
            yield Case(id, "matmul", "quant_linear", make, Yardstick(terms=200))
    # Odd sizes in every dtype of activations: K off the block, off the byte, and whole.
    for m, n, k, dtype in (
        (17, 70, 129, torch.bfloat16),
        (33, 64, 96, torch.float16),
        (3, 130, 256, torch.float32),
    ):
        yield Case(
            f"MXFP4-exact-{m}x{n}x{k}",
            "matmul",
            "quant_linear",
            _quant_linear(MXFP4, m, n, k, dtype),
            Yardstick(terms=k),
            take_rows=lambda inputs, rows: {**inputs, "x": inputs["x"][:rows]},
            rows=m,
            tags=frozenset({"small"}),
        )
    make = _quant_linear(MXFP4, 3, 16, 64, torch.bfloat16)
    yield Case("compile", "matmul", "quant_linear", make, tags=frozenset({"compile"}))


_DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXACT = [
    "FP8_TENSOR", "FP8_BLOCK_1X128", "FP8_BLOCK_128X128", "FP8_BLOCK_1X128_UE8M0",
    "FP8_BLOCK_128X128_UE8M0", "FP8_E5M2_ROW", "FP8_E4M3FNUZ_ROW", "MXFP8", "MXFP8_E5M2", "MXFP4",
    "MXFP6_E2M3", "MXINT8", "INT8", "NVFP4", *_DENSE,
]  # fmt: skip
#: (M, N, K): every path and tile remainder, N and K off their blocks, the shapes of small models.
_SHAPES = [
    (0, 5, 64), (1, 1, 96), (1, 576, 1536), (2, 7, 33), (3, 40, 2880), (5, 576, 576), (6, 16, 129),
    (7, 1, 255), (13, 33, 256), (33, 7, 288), (65, 80, 130), (200, 17, 97), (4, 0, 32), (3, 5, 0),
]  # fmt: skip


def _weight_only(
    name: str, m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True,
    tags: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    def make(seed: int) -> Inputs:
        from ... import pack_weight

        x, w, b = _randn(seed, (m, k), (n, k), (n,))
        weight = w.to(_DENSE[name]) if name in _DENSE else reference.quantize(w, PRESETS[name])
        inputs: Inputs = {"x": x.to(dtype), "weight": pack_weight(weight)}
        return inputs | ({"bias": b.to(dtype)} if bias else {})

    short = str(dtype).removeprefix("torch.")
    return Case(
        f"{name}-{short}-{m}x{n}x{k}", "matmul", "quant_linear", make, Yardstick(terms=k),
        cost=_cost, take_rows=lambda i, rows: i | {"x": i["x"][:rows]}, rows=m,
        tags=frozenset(tags),
    )  # fmt: skip


def _cost(inputs: Inputs) -> Cost:
    x, weight = inputs["x"], inputs["weight"]
    n, k = weight.shape
    m = x.numel() // max(k, 1)
    return Cost(weight.nbytes + m * (k + n) * x.element_size(), 2 * m * n * k)


def _random_codes(format: QuantFormat, n: int, k: int, seed: int) -> QuantTensor:
    """A weight of finite codes, without quantizing one: benches need many large ones."""
    g = torch.Generator().manual_seed(seed)

    def codes(shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    data = codes(format.data_shape((n, k)), 0, 256 if format.element == "e2m1" else 0x78)
    scale_shape = format.scale_shape((n, k))
    if format.scale == "e8m0":
        scale = codes(scale_shape, 118, 126)
    elif format.scale == "e4m3":
        scale = codes(scale_shape, 0x28, 0x48).view(torch.float8_e4m3fn)
    else:
        scale = torch.rand(scale_shape, generator=g) / 64
    global_scale = torch.tensor(0.5) if format.global_scale else None
    return QuantTensor(data.view(format.data_dtype), scale, global_scale, format, (n, k))


def _bench(name: str, m: int, n: int, k: int) -> Case:
    def make(seed: int) -> Inputs:
        from ... import pack_weight

        (x,) = _randn(seed, (m, k))
        if name in _DENSE:
            weight = pack_weight(_randn(seed + 1, (n, k))[0].to(_DENSE[name]))
        else:
            weight = pack_weight(_random_codes(PRESETS[name], n, k, seed))
        return {"x": x.bfloat16(), "weight": weight}

    return Case(
        f"{name}-{m}x{n}x{k}", "matmul", "quant_linear", make, Yardstick(terms=k), cost=_cost,
        tags=frozenset({"bench"}),
    )  # fmt: skip


def _weight_only_cases() -> Iterator[Case]:
    for name in _EXACT:
        yield _weight_only(name, 6, 37, 200, torch.float32)
    for i, shape in enumerate(_SHAPES):
        for name in ("MXFP4", ("FP8_BLOCK_128X128", "bfloat16")[i % 2]):
            dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
            yield _weight_only(name, *shape, dtype, bias=i % 2 == 0)


def _bench_cases() -> Iterator[Case]:
    for m in (1, 16, 512):
        for name in ("MXFP4", "FP8_BLOCK_128X128"):
            yield _bench(name, m, 4096, 4096)
    yield _bench("NVFP4", 1, 4096, 4096)
    yield _bench("bfloat16", 1, 4096, 4096)
    for m in (1, 64):  # the layers of SmolLM2-135M
        yield _bench("MXFP4", m, 1536, 576)
        yield _bench("MXFP4", m, 576, 1536)


def cases() -> Iterator[Case]:
    """Every case of this room."""
    yield from _weight_only_cases()
    yield from _bench_cases()
    yield from _scaled_mm_cases()
    yield from _pack_cases()
    yield from _quant_linear_cases()
