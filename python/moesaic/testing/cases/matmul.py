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
)
from ...reference import quant as reference
from ..case import Case, Exact, Inputs, Yardstick, flatten


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


def cases() -> Iterator[Case]:
    """Every case of this room."""
    yield from _scaled_mm_cases()
    yield from _pack_cases()
    yield from _quant_linear_cases()
