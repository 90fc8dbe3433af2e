"""Number formats: what a code means, how blocks share a scale, and the values that carry both.

A quantized matrix is three things: *codes* of a small element type, one *scale* per block of codes,
and sometimes one *global scale* above them. The value of a code is

    value = element_value(code) * scale[block] * global_scale

and every scale is a multiplier, whatever a checkpoint calls it. :class:`QuantFormat` says which
element type, which blocks and which scales; :class:`QuantTensor` is a matrix in such a format, as
checkpoints store it; :class:`PackedWeight` is the same matrix in the layout one backend streams.

This module holds definitions only. The functions that quantize are in ``moesaic.reference.quant``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch.utils import _pytree as pytree

__all__ = [
    "FP8_BLOCK_1X128",
    "FP8_BLOCK_1X128_UE8M0",
    "FP8_BLOCK_128X128",
    "FP8_BLOCK_128X128_UE8M0",
    "FP8_E4M3FNUZ_ROW",
    "FP8_E4M3FNUZ_TENSOR",
    "FP8_E5M2_ROW",
    "FP8_E5M2_TENSOR",
    "FP8_ROW",
    "FP8_TENSOR",
    "INT8",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8",
    "MXFP8_E5M2",
    "MXINT8",
    "NVFP4",
    "NVFP4_4OVER6",
    "PRESETS",
    "ElementType",
    "PackedWeight",
    "QuantFormat",
    "QuantTensor",
    "e8m0_values",
    "element_type",
    "element_values",
]


@dataclass(frozen=True)
class ElementType:
    """One element type: a sign, ``exponent_bits`` and ``mantissa_bits``, or a signed integer when
    there is no exponent.

    ``max`` is the largest finite value, ``emax`` its exponent, ``min_exponent`` the exponent of the
    smallest normal (so subnormals are spaced ``2**(min_exponent - mantissa_bits)``). ``nan_code``
    is the code quantization writes for NaN, or None where the type has no NaN. ``dtype`` stores the
    codes; types below 8 bits are held in uint8.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    nan_code: int | None
    dtype: torch.dtype

    @property
    def emax(self) -> int:
        return math.frexp(self.max)[1] - 1

    @property
    def min_exponent(self) -> int:
        return 1 - self.bias

    @property
    def is_float(self) -> bool:
        return self.exponent_bits > 0


_ELEMENTS = {
    e.name: e
    for e in (
        ElementType("e4m3fn", 8, 4, 3, 7, 448.0, 0x7F, torch.float8_e4m3fn),
        ElementType("e5m2", 8, 5, 2, 15, 57344.0, 0x7F, torch.float8_e5m2),
        ElementType("e4m3fnuz", 8, 4, 3, 8, 240.0, 0x80, torch.float8_e4m3fnuz),
        ElementType("e5m2fnuz", 8, 5, 2, 16, 57344.0, 0x80, torch.float8_e5m2fnuz),
        ElementType("e2m1", 4, 2, 1, 1, 6.0, None, torch.uint8),
        ElementType("e2m3", 6, 2, 3, 1, 7.5, None, torch.uint8),
        ElementType("e3m2", 6, 3, 2, 3, 28.0, None, torch.uint8),
        # The MX specification reads INT8 as a fixed-point number with 6 fraction bits; see
        # QuantFormat.code_unit.
        ElementType("int8", 8, 0, 6, 0, 127.0, None, torch.int8),
    )
}
_SCALE_DTYPES = {"fp32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
_SCALE_RULES = {
    "fp32": ("exact", "floor", "rceil", "even", "ceil"),
    "e8m0": ("floor", "rceil", "even", "ceil"),
    "e4m3": ("exact",),
}
_ROUNDINGS = ("rne", "stochastic")


def _expect_one_of(field: str, value: str, allowed: Iterable[str], condition: str = "") -> None:
    if value not in allowed:
        raise ValueError(
            f"QuantFormat: {field}: expected one of {', '.join(allowed)}{condition}, got {value!r}"
        )


def element_type(name: str) -> ElementType:
    """The element type called ``name``; ValueError names the known ones."""
    _expect_one_of("element", name, _ELEMENTS)
    return _ELEMENTS[name]


def _decode(element: ElementType, code: int) -> float:
    """Value of one code, from the definition of the type (OCP 8-bit and MX specifications, and
    AMD's FNUZ pair).
    """
    if not element.is_float:
        return float(code - 256 if code >= 128 else code)
    sign_bit = 1 << (element.bits - 1)
    sign = -1.0 if code & sign_bit else 1.0
    exponent = (code & (sign_bit - 1)) >> element.mantissa_bits
    mantissa = code & ((1 << element.mantissa_bits) - 1)
    if element.name.endswith("fnuz") and code == sign_bit:
        return math.nan
    if element.name == "e4m3fn" and code & 0x7F == 0x7F:
        return math.nan
    if element.name == "e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, element.min_exponent - element.mantissa_bits)
    significand = (1 << element.mantissa_bits) + mantissa
    return sign * math.ldexp(significand, exponent - element.bias - element.mantissa_bits)


@cache
def _element_values(name: str) -> tuple[float, ...]:
    element = element_type(name)
    return tuple(_decode(element, code) for code in range(1 << element.bits))


def element_values(name: str, device: torch.device | str | None = None) -> torch.Tensor:
    """Values of all codes of an element type: fp32 ``[2**bits]``, indexed by the code's bits (int8:
    two's complement).
    """
    return torch.tensor(_element_values(name), dtype=torch.float32, device=device)


def e8m0_values(device: torch.device | str | None = None) -> torch.Tensor:
    """Values of all E8M0 scale codes: fp32 ``[256]``, ``2**(code - 127)`` (code 0 is a subnormal
    fp32), NaN for 255.
    """
    values = [math.ldexp(1.0, code - 127) for code in range(255)] + [math.nan]
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is quantized. Immutable, hashable, and equal when every field is equal.

    element: element type of the codes: ``e4m3fn e5m2 e4m3fnuz e5m2fnuz e2m1 e2m3 e3m2 int8``.
    block: (rows, columns) of the last two dimensions that share one scale; -1 means the whole
        dimension. ``(-1, -1)`` is one scale per matrix, ``(1, -1)`` one per row, ``(1, 32)`` an MX
        block, ``(128, 128)`` a DeepSeek weight block. Blocks at the end of a dimension may be
        shorter.
    scale: type of the stored scales: ``fp32``, ``e8m0`` (uint8 codes of powers of two) or ``e4m3``
        (float8_e4m3fn, >= 0).
    global_scale: whether an fp32 scale stands above the block scales (NVFP4).
    scale_rule: how a block's largest magnitude becomes its scale. ``exact`` divides by the
        element's max; ``floor``, ``rceil``, ``even`` and ``ceil`` give a power of two and are
        described in ``docs/formats.md``. E8M0 scales need one of the last four; fp32 scales take
        any (UE8M0 checkpoints often hold their powers of two as fp32); E4M3 scales only ``exact``.
        The rule is a property of a checkpoint: change it with ``dataclasses.replace(MXFP4,
        scale_rule="floor")``.
    rounding: ``rne`` (nearest, ties to the even code) or ``stochastic``.
    four_over_six: choose per block whether its largest magnitude maps to 6 or to 4, whichever has
        the smaller squared error; E2M1 with E4M3 scales only.
    """

    element: str
    block: tuple[int, int]
    scale: str
    global_scale: bool = False
    scale_rule: str = "exact"
    rounding: str = "rne"
    four_over_six: bool = False

    def __post_init__(self) -> None:
        block = tuple(self.block)
        if len(block) != 2 or any(not isinstance(b, int) or (b < 1 and b != -1) for b in block):
            raise ValueError(
                "QuantFormat: block: expected two positive ints, or -1 for a whole dimension, "
                f"got {self.block!r}"
            )
        object.__setattr__(self, "block", block)
        _expect_one_of("element", self.element, _ELEMENTS)
        _expect_one_of("scale", self.scale, _SCALE_RULES)
        _expect_one_of(
            "scale_rule", self.scale_rule, _SCALE_RULES[self.scale], f" for {self.scale} scales"
        )
        _expect_one_of("rounding", self.rounding, _ROUNDINGS)
        if self.global_scale and self.scale != "e4m3":
            raise ValueError(
                f"QuantFormat: global_scale: expected e4m3 block scales, got {self.scale} scales"
            )
        if self.four_over_six and (self.element, self.scale) != ("e2m1", "e4m3"):
            raise ValueError(
                "QuantFormat: four_over_six: expected element e2m1 with e4m3 scales, "
                f"got {self.element} with {self.scale} scales"
            )
        # Made once: torch.compile sees a constant, and every op call hands it to its schema.
        object.__setattr__(self, "_spec", self._make_spec())

    def _make_spec(self) -> str:
        rows, cols = ("*" if b == -1 else str(b) for b in self.block)
        scale = self.scale + ("+global" if self.global_scale else "")
        parts = [self.element, f"{rows}x{cols}", scale, self.scale_rule, self.rounding]
        return ":".join(parts + ["4over6"] * self.four_over_six)

    def __str__(self) -> str:
        return self._spec  # type: ignore[attr-defined]

    @classmethod
    def from_string(cls, spec: str) -> QuantFormat:
        """Inverse of ``str(format)``, for example ``"e2m1:1x32:e8m0:even:rne"`` for MXFP4."""
        if not isinstance(spec, str):
            raise TypeError(f"QuantFormat: spec: expected str, got {type(spec).__name__}")
        return _from_string(spec)

    @property
    def element_type(self) -> ElementType:
        return _ELEMENTS[self.element]

    @property
    def data_dtype(self) -> torch.dtype:
        """dtype of ``QuantTensor.data``."""
        return self.element_type.dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of ``QuantTensor.scale``."""
        return _SCALE_DTYPES[self.scale]

    @property
    def code_unit(self) -> float:
        """What one unit of an element is worth before scaling: 1, except 2**-6 for MXINT8, as the
        MX specification says.
        """
        return 2.0**-6 if self.element == "int8" and self.scale == "e8m0" else 1.0

    @property
    def max(self) -> float:
        """Largest element value, in the units the scale multiplies."""
        return self.element_type.max * self.code_unit

    @property
    def emax(self) -> int:
        """Exponent of ``max``: ``floor(log2(max))``."""
        return math.frexp(self.max)[1] - 1

    @property
    def values_per_byte(self) -> int:
        """Codes per byte along the last dimension: 2 for FP4, else 1."""
        return 2 if self.element_type.bits == 4 else 1

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value including block scales, for whole blocks; blocks of a whole
        dimension count 0.
        """
        rows, cols = self.block
        stored = 8.0 / self.values_per_byte
        return (
            stored if -1 in self.block else stored + 8.0 * self.scale_dtype.itemsize / (rows * cols)
        )

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of ``QuantTensor.data`` for a logical shape ``[..., N, K]``."""
        return (*shape[:-1], -(-shape[-1] // self.values_per_byte))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of ``QuantTensor.scale`` for a logical shape ``[..., N, K]``: lead + (ceil(N/rows),
        ceil(K/columns)).

        A whole dimension (-1) has one block, also when the dimension is empty.
        """
        grid = (1 if b == -1 else -(-n // b) for n, b in zip(shape[-2:], self.block, strict=True))
        return (*shape[:-2], *grid)

    def values(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Values of all codes before scaling: fp32 ``[2**bits]``."""
        return element_values(self.element, device) * self.code_unit


@lru_cache(maxsize=256)
def _from_string(spec: str) -> QuantFormat:
    parts = spec.split(":")
    four_over_six = parts[-1] == "4over6"
    parts = parts[: len(parts) - four_over_six]
    block = parts[1].split("x") if len(parts) == 5 else []
    if len(block) != 2 or not all(b == "*" or b.isdigit() for b in block):
        raise ValueError(
            "QuantFormat: spec: expected "
            f"'element:ROWSxCOLUMNS:scale[+global]:scale_rule:rounding[:4over6]', got {spec!r}"
        )
    element, _, scale, scale_rule, rounding = parts
    rows, cols = (-1 if b == "*" else int(b) for b in block)
    return QuantFormat(
        element,
        (rows, cols),
        scale.removesuffix("+global"),
        global_scale=scale.endswith("+global"),
        scale_rule=scale_rule,
        rounding=rounding,
        four_over_six=four_over_six,
    )


FP8_TENSOR = QuantFormat("e4m3fn", (-1, -1), "fp32")
FP8_ROW = QuantFormat("e4m3fn", (1, -1), "fp32")
FP8_BLOCK_1X128 = QuantFormat("e4m3fn", (1, 128), "fp32")
FP8_BLOCK_128X128 = QuantFormat("e4m3fn", (128, 128), "fp32")
FP8_BLOCK_1X128_UE8M0 = QuantFormat("e4m3fn", (1, 128), "e8m0", scale_rule="rceil")
FP8_BLOCK_128X128_UE8M0 = QuantFormat("e4m3fn", (128, 128), "e8m0", scale_rule="rceil")
FP8_E5M2_TENSOR = replace(FP8_TENSOR, element="e5m2")
FP8_E5M2_ROW = replace(FP8_ROW, element="e5m2")
FP8_E4M3FNUZ_TENSOR = replace(FP8_TENSOR, element="e4m3fnuz")
FP8_E4M3FNUZ_ROW = replace(FP8_ROW, element="e4m3fnuz")
# The default rules of the MX formats. FP8 has mantissa to spare, so a scale that never clips
# ("rceil", NVIDIA's rule) has the smaller error. FP4 has one mantissa bit: halving the step of the
# whole block is worth more than clipping the few largest values a little, so "even" (AMD's and
# compressed-tensors' rule) has the smaller error.
MXFP8 = QuantFormat("e4m3fn", (1, 32), "e8m0", scale_rule="rceil")
MXFP8_E5M2 = replace(MXFP8, element="e5m2")
MXFP6_E2M3 = replace(MXFP8, element="e2m3")
MXFP6_E3M2 = replace(MXFP8, element="e3m2")
MXFP4 = QuantFormat("e2m1", (1, 32), "e8m0", scale_rule="even")
MXINT8 = replace(MXFP8, element="int8")
NVFP4 = QuantFormat("e2m1", (1, 16), "e4m3", global_scale=True)
NVFP4_4OVER6 = replace(NVFP4, four_over_six=True)
INT8 = QuantFormat("int8", (1, 32), "fp32")

PRESETS: dict[str, QuantFormat] = {
    k: v for k, v in list(globals().items()) if isinstance(v, QuantFormat)
}


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A quantized matrix in its plain form, as checkpoints store it. A pytree of its tensors.

    data: codes. FP8 (float8 dtype) and INT8: logical shape ``[..., N, K]``. FP4: uint8 ``[..., N,
        ceil(K/2)]``, two codes per byte, the even k in the low nibble (viewable as
        ``torch.float4_e2m1fn_x2``); for odd K the last high nibble is 0. FP6: uint8 ``[..., N,
        K]``, one code per byte.
    scale: ``format.scale_shape(shape)``: one multiplier per block; fp32, uint8 (E8M0 codes) or
        float8_e4m3fn.
    global_scale: None, or an fp32 multiplier broadcastable to ``[..., N, 1]``.
    shape: the logical shape ``[..., N, K]``.
    """

    data: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None
    format: QuantFormat
    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.nbytes for t in (self.data, self.scale, self.global_scale) if t is not None)

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same matrix on another device."""
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), self)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight ``[..., N, K]`` in the layout one backend streams; made by ``pack_weight``, undone
    by ``unpack_weight``.

    Its fields belong to the backend that made it; only ``format``, ``shape``, ``layout`` and
    ``nbytes`` are for everyone.

    data: uint8 bytes of the codes (or of the values of a dense weight).
    scale, row_scale, global_scale: the scales in the layout's own order, or None.
    poison: None, or what the layout needs to restore NaN that its decoding cannot express.
    format: ``str(QuantFormat)``, or ``"dense:<dtype>"`` for an unquantized weight.
    shape: the logical shape ``[..., N, K]``.
    layout: name of the layout; ``"plain"`` is the order of :class:`QuantTensor`.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    row_scale: torch.Tensor | None
    poison: torch.Tensor | None
    format: str
    shape: tuple[int, ...]
    layout: str
    global_scale: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything the kernel may read."""
        tensors = (self.data, self.scale, self.row_scale, self.poison, self.global_scale)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same bytes on another device; whether that device has the layout is for the caller to
        know.
        """
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), self)


def _register_pytree(cls: type, tensors: tuple[str, ...], constants: tuple[str, ...]) -> None:
    def flatten(value):
        return [getattr(value, f) for f in tensors], tuple(getattr(value, f) for f in constants)

    def unflatten(children, context):
        fields = dict(zip(tensors, children, strict=True)) | dict(
            zip(constants, context, strict=True)
        )
        return cls(**fields)

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"moesaic.{cls.__name__}"
    )


_register_pytree(QuantTensor, ("data", "scale", "global_scale"), ("format", "shape"))
_register_pytree(
    PackedWeight,
    ("data", "scale", "row_scale", "poison", "global_scale"),
    ("format", "shape", "layout"),
)
