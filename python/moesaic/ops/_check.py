"""Checks for the doors.  Every failure reads ``op: argument: expected ..., got ...``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def fail(
    op: str, argument: str, expected: str, got: object, *,
    kind: type[Exception] = ValueError, remedy: str = "",
) -> NoReturn:  # fmt: skip
    """Raise ``kind`` with the uniform message, and the way out if there is one."""
    raise kind(f"{op}: {argument}: expected {expected}, got {got}{'. ' + remedy if remedy else ''}")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """'float32, bfloat16 or float16'"""
    short = [str(d).removeprefix("torch.") for d in dtypes]
    return short[0] if len(short) == 1 else ", ".join(short[:-1]) + " or " + short[-1]


def describe(t: Tensor) -> str:
    """'bfloat16 [3, 4]'"""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def tensor(
    op: str, argument: str, value: Any, *,
    ndim: int | tuple[int, ...] | None = None,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    like: Tensor | None = None,
    remedy: str = "",
) -> Tensor:  # fmt: skip
    """Check type, rank, shape (None = any size), dtype, and that it is on the device of
    ``like``."""
    if not isinstance(value, Tensor):
        fail(op, argument, "a torch.Tensor", type(value).__name__, kind=TypeError, remedy=remedy)
    if ndim is not None and value.ndim not in ((ndim,) if isinstance(ndim, int) else ndim):
        fail(op, argument, f"{ndim} dimensions", describe(value), remedy=remedy)
    if shape is not None and (
        value.ndim != len(shape)
        or any(
            want is not None and want != have for want, have in zip(shape, value.shape, strict=True)
        )
    ):
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        fail(op, argument, f"shape {wanted}", describe(value), remedy=remedy)
    if dtypes is not None and value.dtype not in dtypes:
        fail(op, argument, names(dtypes), describe(value), kind=TypeError, remedy=remedy)
    if like is not None and value.device != like.device:
        fail(op, argument, f"a tensor on {like.device}", f"one on {value.device}", remedy=remedy)
    return value


def optional_tensor(op: str, argument: str, value: Any, **kwargs: Any) -> Tensor | None:
    """None, or what :func:`tensor` accepts."""
    return None if value is None else tensor(op, argument, value, **kwargs)


def integer(op: str, argument: str, value: Any, low: int, high: int | None = None) -> int:
    """An int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(op, argument, "an int", type(value).__name__, kind=TypeError)
    if value < low or (high is not None and value > high):
        fail(
            op,
            argument,
            f"an int >= {low}" if high is None else f"an int in [{low}, {high}]",
            value,
        )
    return value  # type: ignore[return-value]  # a SymInt stands for an int under torch.compile


def number(op: str, argument: str, value: Any) -> float:
    """A real number (int or float, not bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, argument, "a number", type(value).__name__, kind=TypeError)
    return float(value)


def choice(op: str, argument: str, value: Any, options: Sequence[str]) -> str:
    """One of a fixed set of strings."""
    if value not in options:
        fail(op, argument, "one of " + ", ".join(map(repr, options)), repr(value))
    return value


def flag(op: str, argument: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        fail(op, argument, "a bool", type(value).__name__, kind=TypeError)
    return value
