"""Doors of the matmul room: packed weights and the linears and GEMMs on quantized operands."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..formats import PackedWeight, QuantFormat, QuantTensor
from . import _check
from .quant import FLOATING, flat

_DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PACKED = (
    "Tensor data, Tensor? scale, Tensor? row_scale, Tensor? poison, Tensor? global_scale, "
    "str format, SymInt[] shape, str layout"
)

# Packing happens once, when a model is loaded; what a layout holds is its backend's own affair, so
# these two cannot be traced.
registry.define(
    "pack_weight(Tensor data, Tensor? scale, Tensor? global_scale, str format, SymInt[] shape) "
    "-> Tensor[]",
    room="matmul",
    fake=None,
)
registry.define(f"unpack_weight({_PACKED}) -> Tensor[]", room="matmul", fake=None)
registry.define(
    f"quant_linear(Tensor x, {_PACKED}, Tensor? bias, str activation, ScalarType out_dtype) "
    "-> Tensor",
    room="matmul",
    fake=lambda x, *rest: x.new_empty((*x.shape[:-1], rest[6][-2]), dtype=rest[-1]),
)
registry.define(
    "scaled_mm(Tensor a_data, Tensor a_scale, Tensor? a_global_scale, str a_format, "
    "SymInt[] a_shape, Tensor b_data, Tensor b_scale, Tensor? b_global_scale, str b_format, "
    "SymInt[] b_shape, Tensor? bias, ScalarType out_dtype) -> Tensor",
    room="matmul",
    fake=lambda *a: a[0].new_empty((*a[4][:-1], a[9][-2]), dtype=a[-1]),
)


def pack_weight(weight: QuantTensor | Tensor, *, backend: str | None = None) -> PackedWeight:
    """Rearrange a weight [..., N, K] into the layout that one backend's kernels stream.

    weight: a :class:`QuantTensor`, or a floating tensor (float32, bfloat16, float16; float64 on the
        reference backend) for an unquantized weight. Leading dimensions are experts.
    backend: whose layout; by default that of the backend that serves the weight's device and
        format.

    Returns a :class:`PackedWeight`, an opaque value for :func:`quant_linear` and the moe ops on the
    same backend. Nothing is lost: :func:`unpack_weight` undoes it bit for bit. Keep the plain form
    in checkpoints. Not traceable by torch.compile: pack when the model is loaded.
    """
    op = "pack_weight"
    if isinstance(weight, QuantTensor):
        return registry.call(op, *flat(op, "weight", weight), backend=backend)
    _check.tensor(op, "weight", weight, dtypes=_DENSE, remedy="Quantize it for other types")
    if weight.ndim < 2:
        _check.fail(op, "weight", "at least 2 dimensions", _check.describe(weight))
    spec = "dense:" + str(weight.dtype).removeprefix("torch.")
    return registry.call(
        op, weight.detach(), None, None, spec, tuple(weight.shape), backend=backend
    )


def unpack_weight(packed: PackedWeight, *, backend: str | None = None) -> QuantTensor | Tensor:
    """What :func:`pack_weight` was given, bit for bit. The layout decides which backend serves."""
    return registry.call(
        "unpack_weight", *flat_packed("unpack_weight", "packed", packed), backend=backend
    )


def quant_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | QuantFormat | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` with a packed weight.

    x: [..., K] of float32, bfloat16, float16 or float64. weight: packed from [N, K]. bias: [N],
    floating.
    activation: None keeps x as it is and decodes the weight exactly; "int8" and "int16" quantize x
        per 32 of K first, a QuantFormat with blocks of one row quantizes x to that format.
    out_dtype: dtype of the result; that of x unless given.

    Returns [..., N]. Sums are fp32, the bias is added in fp32, one rounding to ``out_dtype``. A row
    of the result does not depend on the other rows. Differentiable in x and bias (through the
    definition).
    """
    op = "quant_linear"
    _check.tensor(op, "x", x, dtypes=FLOATING)
    packed = flat_packed(op, "weight", weight)
    if len(weight.shape) != 2:
        _check.fail(
            op, "weight", "a weight [N, K]", list(weight.shape),
            remedy="Experts [E, N, K] go to the moe ops",
        )  # fmt: skip
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        _check.fail(op, "x", f"a last dimension of {k} (the weight's K)", _check.describe(x))
    _check.tensor(op, "weight", weight.data, like=x)
    _check.optional_tensor(op, "bias", bias, shape=(n,), dtypes=FLOATING, like=x)
    out_dtype = _out_dtype(op, x.dtype if out_dtype is None else out_dtype)
    how = _activation(op, activation)
    return registry.call(op, x, *packed, bias, how, out_dtype, backend=backend)


def scaled_mm(
    a: QuantTensor,
    b: QuantTensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """``a @ b.T + bias`` of two quantized matrices.

    a: [..., M, K]; b: [N, K], in the same or another format (any blocks); bias: [N], floating.

    Returns [..., M, N] of ``out_dtype`` (float32, bfloat16, float16 or float64). fp32 sums, bias
    added in fp32, one rounding. The operands of ``torch.nn.functional.scaled_mm`` with every
    recipe, on any device.
    """
    op = "scaled_mm"
    left = flat(op, "a", a)
    right = flat(op, "b", b, like=left[0])
    if len(b.shape) != 2:
        _check.fail(op, "b", "a matrix [N, K]", list(b.shape))
    if a.shape[-1] != b.shape[-1]:
        _check.fail(op, "b", f"K = {a.shape[-1]} as in a", list(b.shape))
    _check.optional_tensor(op, "bias", bias, shape=b.shape[:1], dtypes=FLOATING, like=left[0])
    return registry.call(op, *left, *right, bias, _out_dtype(op, out_dtype), backend=backend)


def unpack_by_layout(packed: PackedWeight) -> QuantTensor | Tensor:
    """:func:`unpack_weight` by whichever backend made the layout, whatever backend is forced."""
    args = flat_packed("unpack_weight", "packed", packed)
    rows = registry.ops()["unpack_weight"].implementations.values()
    for row in rows:
        if row.why_not(*args) is None:
            return row.call(*args)
    _check.fail(
        "unpack_weight", "packed", "a layout that a backend here knows", repr(packed.layout),
        remedy="Unpack it where it was packed",
    )  # fmt: skip


def flat_packed(op: str, argument: str, packed: PackedWeight) -> tuple:
    """A PackedWeight as the arguments that cross a schema."""
    if not isinstance(packed, PackedWeight):
        _check.fail(
            op, argument, "a PackedWeight", type(packed).__name__, kind=TypeError,
            remedy="moesaic.pack_weight makes one from a QuantTensor or a floating tensor",
        )  # fmt: skip
    return (
        packed.data,
        packed.scale,
        packed.row_scale,
        packed.poison,
        packed.global_scale,
        packed.format,
        tuple(packed.shape),
        packed.layout,
    )


def _out_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATING:
        _check.fail(op, "out_dtype", _check.names(FLOATING), dtype, kind=TypeError)
    return dtype


def _activation(op: str, activation: str | QuantFormat | None) -> str:
    """ "" for none, "int8", "int16", or the spec of a format."""
    if activation is None:
        return ""
    if isinstance(activation, QuantFormat):
        if activation.block[0] != 1:
            _check.fail(
                op, "activation", "a format with blocks of one row", activation,
                remedy="A row of the result must not depend on the others",
            )  # fmt: skip
        if activation.rounding != "rne" or activation.global_scale:
            _check.fail(
                op, "activation", "a format without stochastic rounding or global scale", activation
            )
        return str(activation)
    if activation not in ("int8", "int16"):
        _check.fail(op, "activation", "None, 'int8', 'int16' or a QuantFormat", repr(activation))
    return activation
