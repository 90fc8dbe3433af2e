"""Contract cases of the quant room: every format, ragged shapes, and values that try the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...formats import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    FP8_BLOCK_128X128_UE8M0,
    FP8_E5M2_ROW,
    FP8_ROW,
    FP8_TENSOR,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    PRESETS,
    QuantFormat,
    QuantTensor,
)
from ...reference import quant as reference
from ..case import Case, Cost, Exact, Inputs

_HALF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def values(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, specials: bool = True
) -> Tensor:
    """Magnitudes over many binades, a zero row, and with ``specials`` a few NaN, Inf, -0, tiny."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.randn(shape, generator=g).mul(2).exp2()
    if x.numel():
        x[..., 0, :] = 0
    if specials:
        odd = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-42, -3e38, 65504.0])
        pick = odd[torch.randint(len(odd), shape, generator=g)]
        x = torch.where(torch.rand(shape, generator=g) < 0.002, pick, x)
    return x.to(dtype)


def _first_rows(inputs: Inputs, n: int) -> Inputs:
    return {k: v[:n] if k in ("x", "residual") else v for k, v in inputs.items()}


def _quantize(
    id: str, format: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
    tags: tuple[str, ...] = (), **kwargs: Any,
) -> Case:  # fmt: skip
    by_row = format.block[0] == 1 and not format.global_scale and len(shape) == 2

    def make(seed: int) -> Inputs:
        extra = {k: v() if callable(v) else v for k, v in kwargs.items()}
        return {"x": values(seed, shape, dtype), "format": format, **extra}

    return Case(
        id, "quant", "quantize", make, Exact(),
        cost=lambda i: Cost(i["x"].nbytes + int(i["x"].numel() * format.bits_per_value / 8)),
        take_rows=_first_rows if by_row else None, rows=shape[0], tags=frozenset(tags),
    )  # fmt: skip


def _dequantize(
    id: str,
    format: QuantFormat,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tags: tuple[str, ...] = (),
) -> Case:
    def make(seed: int) -> Inputs:
        return {"q": reference.quantize(values(seed, shape), format), "dtype": dtype}

    return Case(
        id, "quant", "dequantize", make, Exact(),
        cost=lambda i: Cost(i["q"].nbytes + i["q"].shape[0] * i["q"].shape[1] * dtype.itemsize),
        tags=frozenset(tags),
    )  # fmt: skip


def _all_codes(format: QuantFormat) -> Callable[[int], Inputs]:
    """Every code under scales from the smallest to the largest, NaN scales included."""

    def make(seed: int) -> Inputs:
        count = 1 << format.element_type.bits
        codes = torch.arange(count, dtype=torch.uint8)
        rows, width = 16, -(-count // format.values_per_byte)
        data = codes if format.values_per_byte == 1 else codes[::2] | codes[1::2] << 4
        shape = (rows, count)
        grid = format.scale_shape(shape)
        if format.scale == "fp32":
            scale = torch.tensor([1.0, 1e-38, 3e38, float("nan"), 0.1]).repeat(32)
        else:
            scale = torch.arange(256, dtype=torch.uint8).repeat(8).view(format.scale_dtype)
        scale = scale[: grid[0] * grid[1]].reshape(grid)
        top = torch.full((1, 1), 0.7) if format.global_scale else None
        data = data.expand(rows, width).contiguous().view(format.data_dtype)
        return {"q": QuantTensor(data, scale, top, format, shape), "dtype": torch.float32}

    return make


def _static(format: QuantFormat) -> Callable[[], Tensor]:
    one = torch.tensor([[121]], dtype=torch.uint8) if format.scale == "e8m0" else torch.tensor(0.37)
    return lambda: one.clone()


def _quantize_cases() -> Iterator[Case]:
    for name, format in PRESETS.items():
        yield _quantize(f"{name}-7x67", format, (7, 67))
        yield _quantize(f"{name}-131x260-bf16", format, (131, 260), torch.bfloat16)
    for format in (MXFP4, FP8_ROW, FP8_BLOCK_128X128):
        for shape in ((0, 64), (3, 0), (1, 1), (2, 3, 33), (1, 4096), (33, 704), (5, 2880)):
            for dtype in (torch.float32, torch.float16):
                size = "x".join(map(str, shape))
                yield _quantize(f"{format}-{size}-{_HALF[dtype]}", format, shape, dtype)
    for rule in ("floor", "rceil", "even", "ceil"):
        for base in (MXFP4, MXFP8, FP8_BLOCK_128X128_UE8M0, FP8_BLOCK_1X128):
            format = replace(base, scale_rule=rule)
            yield _quantize(f"{format}-40x160", format, (40, 160))
    for format in (MXFP4, FP8_ROW, FP8_TENSOR, FP8_E5M2_ROW, INT8):
        yield _quantize(f"{format}-static", format, (9, 70), scale=_static(format))
    yield _quantize("bounds", FP8_BLOCK_1X128, (9, 300), eps=1e-4, amax_ub=2.0)
    yield _quantize("bounds-mxfp4", MXFP4, (9, 300), eps=1e-4, amax_ub=2.0)
    yield _quantize("nvfp4-row-global", NVFP4, (2, 9, 70), global_scale="row")
    yield _quantize("nvfp4-given-global", NVFP4, (9, 70), global_scale=lambda: torch.tensor(0.01))
    yield _quantize("stochastic", replace(MXFP4, rounding="stochastic"), (9, 70), seed=5)
    yield _quantize("compile-mxfp4", MXFP4, (4, 64), tags=("compile", "small"))
    yield _quantize("compile-nvfp4", NVFP4, (4, 64), torch.bfloat16, tags=("compile", "small"))
    for format in (MXFP4, FP8_ROW, FP8_BLOCK_128X128):
        for dtype in (torch.float32, torch.bfloat16):
            shape = (4096, 4096)
            yield _quantize(f"{format}-4096x4096-{_HALF[dtype]}", format, shape, dtype, ("bench",))


def _dequantize_cases() -> Iterator[Case]:
    for name, format in PRESETS.items():
        yield _dequantize(f"{name}-7x67", format, (7, 67), torch.float32)
        yield _dequantize(f"{name}-130x260-bf16", format, (130, 260), torch.bfloat16)
        codes = _all_codes(format)
        yield Case(f"{name}-all-codes", "quant", "dequantize", codes, Exact())
    for format in (MXFP4, FP8_ROW, FP8_BLOCK_128X128):
        for shape in ((0, 64), (3, 0), (1, 1), (2, 3, 33), (5, 2880)):
            size = "x".join(map(str, shape))
            yield _dequantize(f"{format}-{size}-fp16", format, shape, torch.float16)
    yield _dequantize("compile", MXFP4, (4, 64), torch.bfloat16, ("compile", "small"))
    yield _dequantize("fp64", MXFP4, (4, 64), torch.float64)
    for format in (MXFP4, FP8_ROW, FP8_BLOCK_128X128):
        for dtype in (torch.float32, torch.bfloat16):
            id = f"{format}-4096x4096-{_HALF[dtype]}"
            yield _dequantize(id, format, (4096, 4096), dtype, ("bench",))


def _producer_cases() -> Iterator[Case]:
    def norm(format: QuantFormat, residual: bool, return_norm: bool) -> Callable[[int], Inputs]:
        def make(seed: int) -> Inputs:
            g = torch.Generator().manual_seed(seed)
            x = torch.randn(5, 96, generator=g)
            extra = {"residual": torch.randn(5, 96, generator=g)} if residual else {}
            weight = torch.randn(96, generator=g)
            return {
                "x": x, "weight": weight, "format": format, "return_norm": return_norm, **extra,
            }  # fmt: skip

        return make

    def gate(format: QuantFormat, **kwargs: Any) -> Callable[[int], Inputs]:
        return lambda seed: {
            "x": values(seed, (5, 192), specials=False),
            "format": format,
            **kwargs,
        }

    compiled = frozenset({"compile"})
    for format in (FP8_ROW, MXFP4, NVFP4):
        for residual in (False, True):
            yield Case(
                f"{format}-{'residual' if residual else 'plain'}", "quant", "rms_norm_quantize",
                norm(format, residual, residual), Exact(),
                tags=compiled if format is MXFP4 else frozenset(),
            )  # fmt: skip
        yield Case(
            f"{format}", "quant", "silu_mul_quantize", gate(format), Exact(),
            tags=compiled if format is MXFP4 else frozenset(),
        )  # fmt: skip
    oai = gate(MXFP4, activation="swigluoai", interleaved=True)
    yield Case("swigluoai", "quant", "silu_mul_quantize", oai, Exact())
    yield Case(
        "fake", "quant", "fake_quantize",
        lambda seed: {"x": values(seed, (6, 70)), "format": MXFP4}, Exact(), tags=compiled,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every case of this room."""
    yield from _quantize_cases()
    yield from _dequantize_cases()
    yield from _producer_cases()
