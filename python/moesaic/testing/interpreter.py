"""Run Triton kernels on the CPU, with right numbers and every access checked.

Start the process with ``TRITON_INTERPRET=1`` (Triton reads it when a kernel is decorated), then::

    from moesaic.testing import interpreter

    with interpreter.checked(order="random", seed=7) as launches:
        kernel[grid](...)          # raises KernelError on a finding

Each launch works on copies of its arguments that lie far apart, and raises KernelError when

* a load, store or atomic touches a byte that belongs to none of the arguments' elements (gaps
  between the rows of a strided view count as outside; masked-off lanes are not accesses), or is not
  aligned to its size;
* two programs race: one reads or stores where another stored, or stores where another read, in any
  order (atomics may meet atomics);
* one store writes different values to one address;
* signed or unsigned integer arithmetic narrower than 64 bits overflows (lanes whose result is
  masked later count too).

Programs run in forward, reverse or random order. The numbers are those of _interpreter_numerics.
Not modelled: the order of additions inside ``tl.sum``, contraction to FMA, approximate exp and
division, and races between the threads of one program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch

ORDERS = ("forward", "reverse", "random")

# Bytes of unused memory around each argument, so that an overrun does not reach another one.
_GAP = 1 << 24
# Program numbers in the access maps: nobody yet; several readers, or atomics among the writers.
_NOBODY, _MANY = -1, -2


class KernelError(AssertionError):
    """A kernel accessed memory it must not, raced, or overflowed."""


@dataclasses.dataclass(frozen=True)
class LaunchRecord:
    """One finished launch: the kernel's name, its grid, and how many element accesses it made."""

    kernel: str
    grid: tuple[int, int, int]
    accesses: int


@dataclasses.dataclass
class _Region:
    """A relocated storage. The maps have an entry per byte; ``owner`` 0 is no argument's byte."""

    label: str
    memory: np.ndarray
    storage: torch.UntypedStorage
    owner: np.ndarray
    reader: np.ndarray
    writer: np.ndarray
    stored: bool = False

    @property
    def start(self) -> int:
        return self.memory.ctypes.data


@dataclasses.dataclass
class _Launch:
    kernel: str
    order: str
    seed: int
    regions: list[_Region] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)
    permutation: np.ndarray | None = None
    program: int = 0
    grid_index: tuple[int, int, int] = (0, 0, 0)
    accesses: int = 0
    language: frozenset[str] = frozenset()  # modules of triton.language that are patched

    def fail(self, text: str) -> NoReturn:
        raise KernelError(f"{self.kernel}, program {self.grid_index}: {text}")

    def place(self, tensor: torch.Tensor, label: str) -> torch.Tensor:
        """A view like ``tensor`` over a relocated copy of its storage; marks its elements valid."""
        storage, size = tensor.untyped_storage(), tensor.element_size()
        nbytes = storage.nbytes()
        region = next((r for r in self.regions if r.storage.data_ptr() == storage.data_ptr()), None)
        if region is None or nbytes == 0:
            room = np.empty(nbytes + 2 * _GAP, np.uint8)  # untouched pages cost nothing
            begin = _GAP + (storage.data_ptr() - (room.ctypes.data + _GAP)) % 64
            memory = room[begin : begin + nbytes]
            memory[:] = _bytes_of(storage).numpy()
            owner, reader, writer = (
                np.full(nbytes, fill, np.int32) for fill in (0, _NOBODY, _NOBODY)
            )
            region = _Region(label, memory, storage, owner, reader, writer)
            self.regions.append(region)
            self.regions.sort(key=lambda r: r.start)
        self.labels.append(label)
        whole = nbytes // size * size

        def same_view(flat: torch.Tensor) -> torch.Tensor:
            shape, strides, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
            return flat.as_strided(shape, strides, offset)

        covered = torch.zeros(whole // size, dtype=torch.bool)
        if tensor.numel():
            same_view(covered).fill_(True)
        region.owner[:whole][covered.numpy().repeat(size)] = len(self.labels)
        return same_view(torch.from_numpy(region.memory[:whole]).view(tensor.dtype))

    def finish(self) -> None:
        """Copy what was stored back to the arguments' own memory."""
        for region in self.regions:
            if region.stored:
                _bytes_of(region.storage).copy_(torch.from_numpy(region.memory))

    def visit(
        self,
        kind: str,
        pointers: np.ndarray,
        mask: np.ndarray,
        size: int,
        values: np.ndarray | None = None,
    ) -> None:
        """Check one access of ``size`` bytes a lane; ``kind`` is "load", "store" or "atomic"."""
        mask = np.broadcast_to(mask, pointers.shape).reshape(-1)
        address = pointers.reshape(-1)[mask].astype(np.int64)
        if address.size == 0:
            return
        self.accesses += address.size
        rooms = np.array([r.start - _GAP for r in self.regions], np.int64)
        if rooms.size == 0:
            self.fail(f"{kind} of {address.size} lanes, but no argument is a tensor")
        if np.any(address % size):
            self.fail(f"{kind} at an address that is not a multiple of its {size} bytes")
        which = np.maximum(np.searchsorted(rooms, address, side="right") - 1, 0)
        for i in np.unique(which):
            region, lanes = self.regions[i], which == i
            self._visit_region(kind, region, address[lanes] - region.start, size)
        if kind == "store":
            self._check_duplicates(address, values, mask, size)

    def _visit_region(self, kind: str, region: _Region, at: np.ndarray, size: int) -> None:
        inside = (at >= 0) & (at + size <= region.memory.size)
        first = np.where(inside, at, 0)
        if region.memory.size:
            inside &= (region.owner[first] > 0) & (region.owner[first + (size - 1) * inside] > 0)
        if not inside.all():
            byte = int(at[~inside][0])
            self.fail(
                f"{kind} of {int((~inside).sum())} of {at.size} lanes out of bounds; the first "
                f"lies at byte {byte} of the storage of argument {region.label!r}, which has "
                f"{region.memory.size} bytes"
                + (", between the elements of its view" if 0 <= byte < region.memory.size else "")
            )
        writer, reader = region.writer[at], region.reader[at]
        label = self.labels[region.owner[at[0]] - 1]
        others_wrote = (writer != _NOBODY) & (writer != self.program)
        if kind != "store":
            others_wrote &= writer != _MANY  # a load or an atomic may meet atomics
        if others_wrote.any():
            self.fail(f"{kind} in argument {label!r} where another program stored in this launch")
        others_read = (reader != _NOBODY) & (reader != self.program)
        if kind == "store" and others_read.any():
            self.fail(f"store in argument {label!r} where another program read in this launch")
        if kind == "load":
            region.reader[at] = np.where(
                (reader == _NOBODY) | (reader == self.program), self.program, _MANY
            )
        else:
            region.writer[at] = _MANY if kind == "atomic" else self.program
            region.stored = True

    def _check_duplicates(
        self, address: np.ndarray, values: np.ndarray | None, mask: np.ndarray, size: int
    ) -> None:
        unique, inverse = np.unique(address, return_inverse=True)
        if values is None or unique.size == address.size:
            return
        flat = np.ascontiguousarray(np.broadcast_to(values.reshape(-1), mask.shape))[mask]
        bits = flat.view(f"uint{8 * size}")
        last = np.zeros(unique.size, bits.dtype)
        last[inverse] = bits
        if (last[inverse] != bits).any():
            self.fail("one store writes different values to one address")


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclasses.dataclass(frozen=True)
class _Settings:
    order: str
    seed: int
    overflow: bool
    records: list[LaunchRecord]


_settings: _Settings | None = None  # not None inside checked()
_launch: _Launch | None = None  # not None while a kernel of checked() runs
_installed = False


def install() -> None:
    """Repair the interpreter of this process; idempotent.

    Raises RuntimeError when Triton was imported without ``TRITON_INTERPRET=1``.
    """
    global _installed
    if _installed:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    # The variable is read when a function is decorated, so Triton's own functions tell.
    if os.environ.get("TRITON_INTERPRET") != "1" or not isinstance(tl.cdiv, InterpretedFunction):
        raise RuntimeError(
            "interpreter: TRITON_INTERPRET: expected '1' before Triton is first imported, got "
            f"{os.environ.get('TRITON_INTERPRET')!r} now and something else or nothing then"
        )
    from moesaic.testing import _interpreter_numerics

    _interpreter_numerics.patch()
    _patch_accesses()
    _patch_launch()
    _patch_language()
    _installed = True


@contextlib.contextmanager
def checked(
    order: str = "forward", *, seed: int = 0, overflow: bool = True
) -> Iterator[list[LaunchRecord]]:
    """Check every launch inside; yields the growing list of finished launches.

    ``order`` is the order in which a launch's programs run: "forward", "reverse" or "random" (by
    ``seed``).
    ``overflow`` reports integer overflow in the kernel's arithmetic.
    """
    global _settings
    if order not in ORDERS:
        raise ValueError(f"checked: order: expected one of {ORDERS}, got {order!r}")
    install()
    previous, _settings = _settings, _Settings(order, seed, overflow, [])
    try:
        yield _settings.records
    finally:
        _settings = previous


def _patch_accesses() -> None:
    from triton.runtime import interpreter as ti

    builder = ti.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def width(pointer) -> int:
        return max(1, pointer.get_element_ty().primitive_bitwidth // 8)

    def create_masked_load(self, ptrs, mask, *rest, **kwargs):
        if _launch:
            _launch.visit("load", ptrs.data, mask.data, width(ptrs))
        return load(self, ptrs, mask, *rest, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *rest):
        if _launch:
            _launch.visit("store", ptrs.data, mask.data, width(ptrs), value.data)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        if _launch:
            _launch.visit("atomic", ptr.data, mask.data, width(ptr))
        return rmw(self, op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr, cmp, val, *rest):
        if _launch:
            _launch.visit("atomic", ptr.data, np.ones((), bool), width(ptr))
        return cas(self, ptr, cmp, val, *rest)

    def create_assert(
        self, condition, message
    ):  # of tl.device_assert and of Triton's overflow checks
        if not np.all(condition.data if hasattr(condition, "data") else condition):
            where = f"{_launch.kernel}, program {_launch.grid_index}: " if _launch else ""
            raise KernelError(f"{where}assertion failed: {message}")

    patches = (
        create_masked_load,
        create_masked_store,
        create_atomic_rmw,
        create_atomic_cas,
        create_assert,
    )
    for patched in patches:
        setattr(builder, patched.__name__, patched)


def _patch_launch() -> None:
    from triton.runtime import interpreter as ti

    builder, executor = ti.InterpreterBuilder, ti.GridExecutor
    set_index, call, init = builder.set_grid_idx, executor.__call__, executor._init_args_hst
    restore = executor._restore_args_dev

    def set_grid_idx(self, x, y, z):
        if _launch:
            nx, ny, nz = self.grid_dim
            if _launch.permutation is None:
                _launch.permutation = _permutation(_launch.order, nx * ny * nz, _launch.seed)
            program = int(_launch.permutation[(x * ny + y) * nz + z])
            x, y, z = program // (ny * nz), program // nz % ny, program % nz
            _launch.program, _launch.grid_index = program, (x, y, z)
        set_index(self, x, y, z)

    def init_args(self, args_dev, kwargs):
        if not _launch:
            return init(self, args_dev, kwargs)
        args = [
            _relocate(_launch, arg, name)
            for arg, name in zip(args_dev, self.arg_names, strict=False)
        ]
        return args, {name: _relocate(_launch, arg, name) for name, arg in kwargs.items()}

    def restore_args(self, args_dev, args_hst, kwargs, kwargs_hst):
        if not _launch:
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)
        else:
            _launch.finish()

    def run(self, *args, **kwargs):
        global _launch
        if not _settings:
            with np.errstate(all="ignore"):
                return call(self, *args, **kwargs)
        options = ti.interpreter_builder.options
        _launch = _Launch(self.fn.__name__, _settings.order, _settings.seed)
        ti.interpreter_builder.options = dataclasses.replace(
            options, debug=_settings.overflow, sanitize_overflow=_settings.overflow
        )
        try:
            with np.errstate(all="ignore"):
                call(self, *args, **kwargs)
            grid = ti.interpreter_builder.grid_dim
            _settings.records.append(LaunchRecord(_launch.kernel, grid, _launch.accesses))
        except ti.InterpreterError as error:
            _reraise(error)
        finally:
            _launch, ti.interpreter_builder.options = None, options

    builder.set_grid_idx = set_grid_idx
    executor._init_args_hst, executor._restore_args_dev, executor.__call__ = (
        init_args,
        restore_args,
        run,
    )


def _patch_language() -> None:
    """The interpreter replaces Triton's builtins on every call of a device function, by searching
    all of triton.language: a third of its time. Once a launch and module is enough."""
    import triton.language as tl
    from triton.runtime import interpreter as ti

    patch = ti._patch_lang

    @functools.cache
    def modules(fn: Callable[..., Any]) -> frozenset[str]:
        return frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core)

    def patch_lang(fn: Callable[..., Any]) -> Any:
        if _launch and modules(fn) <= _launch.language:
            return ti._LangPatchScope()
        if _launch:
            _launch.language |= modules(fn)
        return patch(fn)

    ti._patch_lang = patch_lang


def _permutation(order: str, total: int, seed: int) -> np.ndarray:
    if order == "random":
        return np.random.default_rng(seed).permutation(total)
    return np.arange(total) if order == "forward" else np.arange(total)[::-1]


def _relocate(launch: _Launch, arg: Any, label: str) -> Any:
    from triton.runtime import interpreter as ti

    if isinstance(arg, tuple):
        return ti._tuple_create(
            arg, [_relocate(launch, a, f"{label}[{i}]") for i, a in enumerate(arg)]
        )
    if isinstance(arg, ti.TensorDescriptor):
        return dataclasses.replace(arg, base=_relocate(launch, arg.base, label))
    if not hasattr(arg, "data_ptr"):
        return arg
    return ti._rewrap_tensor(launch.place(ti._unwrap_tensor(arg), label), original_tensor=arg)


def _reraise(error: BaseException) -> NoReturn:
    """The interpreter wraps an exception once per device function; raise a finding bare."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, KernelError):
        raise cause from None
    raise error


def run_in_orders(
    function: Callable[[], Any], orders: tuple[str, ...] = ORDERS, seed: int = 0
) -> list[Any]:
    """Call ``function`` once per program order with all checks on, and return the results."""
    results = []
    for order in orders:
        with checked(order, seed=seed):
            results.append(function())
    return results
