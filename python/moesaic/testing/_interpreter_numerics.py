"""Right numbers from Triton's interpreter: what `moesaic.testing.interpreter.install` repairs.

Triton 3.6 to 3.9 keep bf16 and fp8 values as raw bits in numpy arrays, and several operations
forget it: fp32 -> bf16 truncates, fp32 -> fp8 loses the carry at an exponent step, bf16 arithmetic
and ``tl.dot`` work on the bit patterns. Here each such operation decodes to fp32, computes, and
encodes with torch's own casts.

Two things are modelled more strictly than the interpreter does, because a GPU would show them:

* ``tl.dot`` adds along K one element after the other, so a row of the result cannot depend on how
  many rows the tile has (BLAS gives no such promise), and fp32 operands are rounded to tf32 unless
  the kernel names another ``input_precision``;
* lanes of a load that are masked off and have no ``other=`` hold poison, not zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_TORCH_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}

# What a masked-off lane without other= reads: NaN, or a huge odd number as an integer.
_POISON_BYTE = 0xFF
_POISON_INT_BYTE = 0x6B


def _is_soft(dtype: tl.dtype) -> bool:
    """True for the types that numpy lacks, which the interpreter keeps as unsigned bits."""
    scalar = dtype.scalar
    return scalar == tl.bfloat16 or (scalar.is_floating() and scalar.primitive_bitwidth == 8)


def convert_float(data: np.ndarray, src: tl.dtype, dst: tl.dtype) -> np.ndarray:
    """Round ``data`` (values or bits of ``src``) to ``dst`` as torch does; fp8 saturates.

    Returns an array of ``dst``'s bits for the soft types and of values otherwise.
    """
    bits = np.ascontiguousarray(data).view(_UNSIGNED[data.itemsize])
    signed = bits.view(f"int{8 * data.itemsize}") if data.itemsize > 1 else bits
    values = torch.from_numpy(signed.copy()).view(_TORCH[src]).float()
    target = _TORCH[dst]
    if target.itemsize == 1:
        top = torch.finfo(target).max
        values = torch.where(values.isnan(), values, values.clamp(-top, top))
    out = (
        values.to(target)
        .view(_TORCH_BITS[target.itemsize])
        .numpy()
        .view(_UNSIGNED[target.itemsize])
    )
    return (
        out.reshape(data.shape)
        if _is_soft(dst)
        else out.view(ti._get_np_dtype(dst)).reshape(data.shape)
    )


def _decode(handle: ti.TensorHandle) -> np.ndarray:
    if not _is_soft(handle.dtype):
        return handle.data
    return convert_float(handle.data, handle.dtype.scalar, tl.float32)


def _encode(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if not _is_soft(dtype) or values.dtype == np.bool_:
        return values
    return convert_float(np.asarray(values, np.float32), tl.float32, dtype.scalar)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    """Round fp32 to the 10-bit mantissa of tf32, ties to even; NaN and Inf stay."""
    bits = values.view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    out = acc.copy()
    for k in range(a.shape[-1]):
        out += a[..., :, k, None] * b[..., None, k, :]
    return out


def _patch_builder() -> None:
    builder, handle = ti.InterpreterBuilder, ti.TensorHandle
    cast, binary, ternary = builder.cast_impl, builder.binary_op, builder.ternary_op
    fp_to_fp, fma, load = builder.create_fp_to_fp, builder.create_fma, builder.create_masked_load

    def cast_impl(self, src, dst_type):
        dst = dst_type.scalar
        if not (_is_soft(src.dtype) or _is_soft(dst)):
            return cast(self, src, dst_type)
        values = _decode(src)
        if _is_soft(dst):
            return handle(_encode(values, dst), dst)
        return handle(values.astype(ti._get_np_dtype(dst)), dst)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        src_type, dst = src.dtype.scalar, dst_type.scalar
        if rounding_mode == ti._ir.ROUNDING_MODE.RTZ or src_type not in _TORCH or dst not in _TORCH:
            return fp_to_fp(self, src, dst_type, rounding_mode)
        return handle(convert_float(src.data, src_type, dst), dst)

    def binary_op(self, lhs, rhs, op):
        if not _is_soft(lhs.dtype):
            return binary(self, lhs, rhs, op)
        return handle(_encode(op(_decode(lhs), _decode(rhs)), lhs.dtype), lhs.dtype.scalar)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_soft(other.dtype):
            return ternary(self, lhs, rhs, other, op)
        values = op(_decode(lhs), _decode(rhs), _decode(other))
        return handle(_encode(values, other.dtype), other.dtype.scalar)

    def unary_op(self, arg, op):
        return handle(_encode(op(_decode(arg)), arg.dtype), arg.dtype.scalar)

    def create_fma(self, x, y, z):
        if z.dtype.scalar == tl.float64 or not z.dtype.scalar.is_floating():
            return fma(self, x, y, z)
        wide = _decode(x).astype(np.float64) * _decode(y) + _decode(z)
        narrow = wide.astype(np.float32)
        values = narrow if _is_soft(z.dtype) else narrow.astype(z.data.dtype)
        return handle(_encode(values, z.dtype), z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        lhs, rhs, acc = _decode(a), _decode(b), _decode(d)
        if a.dtype.scalar == tl.float32 and input_precision == ti._ir.INPUT_PRECISION.TF32:
            lhs, rhs = _to_tf32(lhs), _to_tf32(rhs)
        if acc.dtype.kind == "f":
            lhs, rhs = lhs.astype(acc.dtype), rhs.astype(acc.dtype)
            out = _dot(lhs, rhs, acc)
        else:
            out = np.matmul(lhs, rhs, dtype=acc.dtype) + acc
        return handle(_encode(out, d.dtype), d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, *rest):
        if other is None and not np.all(mask.data):
            element = ptrs.get_element_ty()
            fill = np.empty(ptrs.data.shape, ti._get_np_dtype(element))
            fill.view(np.uint8).fill(_POISON_BYTE if element.is_floating() else _POISON_INT_BYTE)
            if element == tl.int1:
                fill[...] = True
            other = handle(fill, element)
        return load(self, ptrs, mask, other, *rest)

    for patched in (
        cast_impl,
        create_fp_to_fp,
        binary_op,
        ternary_op,
        unary_op,
        create_fma,
        create_dot,
    ):
        setattr(builder, patched.__name__, patched)
    builder.create_masked_load = create_masked_load
    builder.get_bf16 = lambda self, v: self.create_fp_trunc(self.get_fp32(v), tl.bfloat16)
    # The GPU's max and min drop a NaN; the interpreter's propagate it.
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _through_fp32(reduction: Callable[..., Any]) -> Callable[..., Any]:
    """Let a reduction or scan see soft types as fp32 and round its results back."""

    def reduce(self, inputs, *args, **kwargs):
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        if not _is_soft(first.dtype):
            return reduction(self, inputs, *args, **kwargs)

        def restore(result):
            if result.dtype != tl.float32:
                return result  # the index of an argmax
            bits = ti.TensorHandle(_encode(result.handle.data, first.dtype), first.dtype.scalar)
            shape = (
                tl.block_type(first.dtype, result.shape) if result.type.is_block() else first.dtype
            )
            return tl.core.tensor(bits, shape)

        results = reduction(
            self, self.to_tensor(_decode(first.handle), tl.float32), *args, **kwargs
        )
        if isinstance(results, (tuple, list)):
            return type(results)(map(restore, results))
        return restore(results)

    return reduce


def patch() -> None:
    """Replace the interpreter's wrong operations, once for the life of the process."""
    _patch_builder()
    ti.ReduceOps.sum = _through_fp32(ti.ReduceOps.sum)
    ti.ReduceOps.min_max = _through_fp32(ti.ReduceOps.min_max)
    ti.ScanOps.cumsum = _through_fp32(ti.ScanOps.cumsum)
