"""Error measures.  A failure says where, by how much, and which bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, Exact, Inputs, Tolerance, Yardstick, clone, to_gold

#: Spacing of a dtype at 1: half of it is the rounding of a correctly rounded result.
EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mismatch(AssertionError):
    """An implementation differs from the definition by more than the contract allows."""


def as_bits(t: Tensor) -> Tensor:
    """The bit patterns as integers."""
    return t.contiguous().view(_BITS[t.element_size()])


def same_bits(label: str, got: Tensor, want: Tensor) -> None:
    """Raise Mismatch unless dtype, shape and every bit agree (all NaNs of a float count as one)."""
    _same_form(label, got, want)
    g, w = as_bits(got), as_bits(want)
    differ = g != w
    if got.dtype.is_floating_point and got.element_size() > 1:
        differ &= ~(got.isnan() & want.isnan())
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        raise Mismatch(
            f"{label}: {int(differ.sum())} of {differ.numel()} elements differ in bits; the first "
            f"at {at}: got {_show(got, at)}, expected {_show(want, at)}"
        )


def _show(t: Tensor, at: tuple[int, ...]) -> str:
    width = 2 * t.element_size()
    raw = int(as_bits(t)[at].item()) & ((1 << 8 * t.element_size()) - 1)
    return (
        f"{float(t[at].float()) if t.dtype.is_floating_point else int(t[at])} (0x{raw:0{width}x})"
    )


def _same_form(label: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Mismatch(
            f"{label}: got {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
        )


def within(label: str, got: Tensor, ref: Tensor, gold: Tensor, terms: int) -> None:
    """The yardstick of :class:`~moesaic.testing.case.Yardstick`; raises Mismatch."""
    _same_form(label, got, ref)
    if got.numel() == 0:
        return
    g, r, d = got.double(), ref.double(), gold.double()
    for name, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
        # Inf may come from the rounding to the output dtype: judge it against the reference.
        wrong = test(g) != test(r)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise Mismatch(
                f"{label}: {name} at other places; first {at}: got {g[at]}, expected {r[at]}"
            )
    finite = torch.isfinite(r) & torch.isfinite(d)
    g, r, d = (torch.where(finite, t, 0.0) for t in (g, r, d))
    slack = 2 * (r - d).abs().max() + terms * 2.0**-24 * d.abs().max()
    allowed = slack + EPS[got.dtype] * d.abs()
    error = (g - d).abs()
    if (error > allowed).any():
        at = _worst(error - allowed)
        raise Mismatch(
            f"{label}: error {error[at]:.3e} at {at} exceeds {allowed[at]:.3e}; "
            f"got {_show(got, at)}, reference {_show(ref, at)}, fp64 {d[at]:.9g}; "
            f"{int((error > allowed).sum())} elements exceed"
        )


def _worst(t: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(t.argmax(), t.shape))


def check(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], label: str = "") -> None:
    """Compare the outputs of ``case`` on (untouched) ``inputs`` with the definition."""
    ref = case.reference(clone(inputs))
    tolerances: tuple[Tolerance, ...] = case.tolerances(len(outputs))
    gold = ref
    if any(isinstance(t, Yardstick) for t in tolerances):
        gold = case.reference(to_gold(clone(inputs)))
    if len(outputs) != len(ref):
        raise Mismatch(f"{case} {label}: {len(outputs)} outputs, expected {len(ref)}")
    for i, (out, want, exact, tol) in enumerate(zip(outputs, ref, gold, tolerances, strict=True)):
        name = f"{case} {label} output {i}"
        if isinstance(tol, Exact):
            same_bits(name, out, want)
        else:
            within(name, out, want, exact, tol.terms)
