"""Catch kernels that read or write outside their tensors, or leave an output unwritten.

* :func:`fenced` copies tensors so that each ends (or begins) exactly at an inaccessible page: one
byte
  too far and the process dies with SIGSEGV, which no test can overlook.
* :func:`poisoned` makes ``torch.empty`` hand out memory full of NaN between guard bytes, and
checks the
  guards afterwards: an unwritten output shows as NaN, a stray write as a broken guard.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_GUARD = 256  # bytes on either side of a poisoned output; a multiple of the widest alignment
_PATTERN = 0xA5
_POISON = 0xFF  # NaN in every float format but E2M1, -1 in integers

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``fn`` on every tensor inside tensors, dicts, tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, fn) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        fresh = {k: map_tensors(v, fn) for k, v in held.items() if _holds_tensor(v)}
        return dataclasses.replace(value, **fresh) if fresh else value
    return value


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, list, tuple, dict)) or dataclasses.is_dataclass(value)


class _Fence:
    """Pages for ``size`` bytes with an inaccessible page on either side."""

    def __init__(self, size: int) -> None:
        self.inner = max(-(-size // _PAGE), 1) * _PAGE
        self.total = self.inner + 2 * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _libc.mmap(None, self.total, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("fenced: mmap failed")
        self.base: int = base
        _libc.mprotect(base, _PAGE, 0)
        _libc.mprotect(base + _PAGE + self.inner, _PAGE, 0)

    def __del__(self) -> None:
        _libc.munmap(self.base, self.total)


def _extent(t: Tensor) -> int:
    """Elements from the first to the last that the tensor's view covers."""
    if t.numel() == 0:
        return 0
    return sum((s - 1) * st for s, st in zip(t.shape, t.stride(), strict=True)) + 1


def fence(t: Tensor, at_end: bool, keep: list[Any]) -> Tensor:
    """A copy of ``t`` with its strides whose view touches an inaccessible page at its end or begin.

    The memory lives as long as ``keep`` holds it.
    """
    count, size = _extent(t), t.element_size()
    wall = _Fence(count * size)
    keep.append(wall)
    start = wall.base + _PAGE + (wall.inner - count * size if at_end else 0)
    raw = (ctypes.c_uint8 * (count * size)).from_address(start) if count else None
    if raw is None:
        return t.clone()
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(t.dtype)
    source = t.as_strided((count,), (1,))
    flat.view(torch.uint8).copy_(source.contiguous().view(torch.uint8))
    return flat.as_strided(t.shape, t.stride(), 0)


@contextmanager
def fenced(inputs: dict[str, Any], at_end: bool) -> Iterator[dict[str, Any]]:
    """The inputs with every tensor fenced; valid inside the block."""
    keep: list[Any] = []
    yield map_tensors(inputs, lambda t: fence(t, at_end, keep))


@contextmanager
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` and ``torch.empty_like`` inside is full of NaN and guarded.

    Raises AssertionError at the end if a byte outside one of them was written.
    """
    buffers: list[tuple[Tensor, int]] = []
    real = torch.empty

    def empty(*size: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
        out = real(shape, dtype=dtype, **kwargs)
        if out.device.type != "cpu" or out.numel() == 0:
            return out
        nbytes = out.numel() * out.element_size()
        raw = real(nbytes + 2 * _GUARD, dtype=torch.uint8).fill_(_PATTERN)
        raw[_GUARD : _GUARD + nbytes] = _POISON
        buffers.append((raw, nbytes))
        return raw[_GUARD : _GUARD + nbytes].view(out.dtype).view(shape)

    def empty_like(t: Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return empty(t.shape, dtype=dtype or t.dtype, device=kwargs.get("device", t.device))

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield
    for raw, nbytes in buffers:
        guards = torch.cat([raw[:_GUARD], raw[_GUARD + nbytes :]])
        assert bool((guards == _PATTERN).all()), (
            f"a byte beside an output of {nbytes} B was written"
        )
