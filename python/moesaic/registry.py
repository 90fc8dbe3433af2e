"""Ops and their implementations: define, implement, select, explain.

An *op* is a torch.library schema over plain tensors and numbers, ``moesaic::<name>``.  Its *door*
in ``moesaic.ops.<room>`` checks and normalises what a user passes and then says
``registry.call(name, *args, backend=backend)``.  An *implementation* is a row in
``moesaic.backends.<backend>.<room>``: a callable with the op's flat arguments, and ``supports``,
which answers None or the reason why not.

Which implementation runs, in order of strength: the ``backend=`` argument, ``with
use_backend(...)``, the environment variable ``MOESAIC_BACKEND``, and else the first of
:data:`PREFERENCE` that supports the call.  A forced backend that cannot serve raises
NotImplementedError.  Falling back to the reference is logged once per op and reason, and is an
error under ``MOESAIC_STRICT=1``.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "moesaic"
ROOMS = ("quant", "matmul", "moe", "attention")
#: Backends from the most to the least preferred, by device type.  The reference serves every
#: device.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
BACKENDS = ("cpu", "triton", "reference")

log = logging.getLogger("moesaic")

Supports = Callable[..., str | None]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: ``call(*args)`` with the op's flat arguments."""

    op: str
    backend: str
    call: Callable[..., Any]
    supports: Supports

    def why_not(self, *args: Any) -> str | None:
        """None if this implementation serves the call, else the reason in a few words."""
        return self.supports(*args)


@dataclass
class Op:
    """A defined op: its schema, argument names and implementations by backend."""

    name: str
    room: str
    schema: str
    arguments: tuple[str, ...]
    mutates: bool
    handle: Callable[..., Any]
    implementations: dict[str, Implementation] = field(default_factory=dict)


_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, Op] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "moesaic_backend", default=None
)
_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("moesaic_explain", default=False)
_warned: set[tuple[str, str]] = set()


class Recorded(Exception):
    """A call carried out of its door instead of being run: the op, the backend asked for, the flat
    arguments."""

    def __init__(self, op: Op, backend: str | None, args: tuple[Any, ...]) -> None:
        self.op, self.backend, self.args_of_op = op, backend, args


def define(schema: str, *, room: str, fake: Callable[..., Any] | None) -> None:
    """Define ``moesaic::<op>`` from a torch schema without the namespace.

    A trailing ``str? backend=None`` is added.  ``fake`` gets the flat arguments without it and
    returns empty tensors of the right shape, dtype and device.  None makes the op eager only: its
    implementations may return any object, and torch.compile gets a NotImplementedError.
    """
    head, _, returns = schema.rpartition("->")
    head = head.rstrip()[:-1]  # drop the closing parenthesis
    full = f"{head}, str? backend=None) -> {returns.strip()}"
    name = full.split("(", 1)[0]
    _library.define(full, tags=(torch.Tag.pt2_compliant_tag,))
    handle = getattr(getattr(torch.ops, NAMESPACE), name).default
    arguments = handle._schema.arguments
    op = Op(
        name=name,
        room=room,
        schema=full,
        arguments=tuple(a.name for a in arguments[:-1]),
        mutates=any(a.alias_info is not None and a.alias_info.is_write for a in arguments),
        handle=handle,
    )
    _ops[name] = op

    def run(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher drops trailing defaults and may pass keywords: put them back in order.
        backend = kwargs.pop("backend", None)
        if len(args) > len(op.arguments):
            *args, backend = args  # type: ignore[assignment]
        for argument in arguments[len(args) : -1]:
            args = (*args, kwargs.get(argument.name, argument.default_value))
        return _run(op, backend, args)

    def run_fake(*args: Any, backend: str | None = None) -> Any:
        if fake is None:
            raise NotImplementedError(f"{name}: is not traceable; call it outside torch.compile")
        return fake(*args[: len(op.arguments)])

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", run_fake, lib=_library)


def implement(
    op: str, backend: str, call: Callable[..., Any], supports: Supports | None = None
) -> None:
    """Register one implementation row; called at import of
    ``moesaic.backends.<backend>.<room>``."""
    _ops[op].implementations[backend] = Implementation(
        op, backend, call, supports or (lambda *args: None)
    )


def by_name(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt a function with keyword arguments named as the schema's to flat arguments."""
    names = _ops[op].arguments

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(**dict(zip(names, args, strict=True)))

    return call


def load_backends() -> None:
    """Import every backend's rows, once the doors have defined their ops; what ``import moesaic``
    ends with.  Each backend package decides by itself what it can offer on this machine."""
    for backend in BACKENDS:
        importlib.import_module(f"moesaic.backends.{backend}")


def implementations(op: str | None = None) -> dict[str, tuple[str, ...]]:
    """The backends that implement each op (or the one named), best first."""
    names = _ops if op is None else {op: _find(op)}
    return {
        name: tuple(b for b in BACKENDS if b in _ops[name].implementations)
        for name in sorted(names)
    }


def ops() -> dict[str, Op]:
    """All defined ops by name."""
    return dict(_ops)


def _find(name: str) -> Op:
    if name not in _ops:
        raise ValueError(f"moesaic: op: expected one of {', '.join(sorted(_ops))}, got {name!r}")
    return _ops[name]


def _check_backend(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"moesaic: {where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of this thread inside the block on one backend: "cpu", "triton" or "reference".

    Raises ValueError for an unknown name, and inside the block NotImplementedError, with the
    reason, for a call that the backend cannot serve.
    """
    token = _forced.set(_check_backend(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _asked(backend: str | None) -> str | None:
    """The backend that the argument, the context or the environment asks for."""
    if backend is not None:
        return _check_backend(backend, "backend")
    forced = _forced.get()
    if forced is not None:
        return forced
    env = os.environ.get("MOESAIC_BACKEND")
    if env and env != "auto":
        return _check_backend(env, "MOESAIC_BACKEND")
    return None


def _device(args: tuple[Any, ...]) -> str:
    for a in args:
        if isinstance(a, Tensor):
            return a.device.type
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device.type
    return "cpu"


def select(op: Op, backend: str | None, args: tuple[Any, ...]) -> Implementation:
    """The implementation that serves this call; see the module's docstring for the order."""
    asked = _asked(backend)
    if asked is not None:
        row = op.implementations.get(asked)
        reason = f"it has no {asked} implementation" if row is None else row.why_not(*args)
        if row is None or reason is not None:
            served = ", ".join(b for b in BACKENDS if b in op.implementations)
            raise NotImplementedError(
                f"{op.name}: backend: {asked!r} cannot serve this call: {reason}. "
                f"Backends of this op: {served}; leave backend=None for an automatic choice."
            )
        return row
    reasons = []
    for name in PREFERENCE.get(_device(args), ("reference",)):
        row = op.implementations.get(name)
        if row is None:
            reasons.append(f"{name}: not available")
            continue
        reason = row.why_not(*args)
        if reason is None:
            if name == "reference" and reasons:
                _report_fallback(op, reasons)
            return row
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(
        f"{op.name}: no implementation serves this call: {'; '.join(reasons)}"
    )


def _report_fallback(op: Op, reasons: list[str]) -> None:
    text = "; ".join(reasons)
    if os.environ.get("MOESAIC_STRICT") == "1":
        raise NotImplementedError(
            f"{op.name}: only the reference serves this call ({text}) and MOESAIC_STRICT=1 forbids "
            'falling back to it. Ask for it with backend="reference", or change the call.'
        )
    if (op.name, text) not in _warned:
        _warned.add((op.name, text))
        log.warning(
            "%s runs on the slow PyTorch reference: %s. moesaic.explain(%r, ...) tells more.",
            op.name, text, op.name,
        )  # fmt: skip


def _run(op: Op, backend: str | None, args: tuple[Any, ...]) -> Any:
    return select(op, backend, args).call(*args)


def _plain(args: tuple[Any, ...]) -> tuple[bool, bool, bool]:
    """(every tensor is a plain torch.Tensor, some tensor requires grad, some is lazily negated)."""
    plain, grad, negated = True, False, False
    eager = not torch.compiler.is_compiling()  # the dispatcher resolves negations by itself
    for a in args:
        if isinstance(a, Tensor):
            plain &= type(a) in (Tensor, torch.nn.Parameter)
            grad |= a.requires_grad
            negated |= eager and a.is_neg()
    return plain, grad, negated


def _materialize(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors whose negation torch has only noted (imag of a conjugate), written out: a kernel sees
    memory, not the note."""
    if op.mutates:
        raise ValueError(
            f"{op.name}: tensors: expected none with torch's negative bit, got one. "
            "Pass tensor.resolve_neg()"
        )
    return tuple(a.resolve_neg() if isinstance(a, Tensor) else a for a in args)


def call(name: str, *args: Any, backend: str | None = None) -> Any:
    """Run op ``name`` on flat arguments; what every door ends with.

    * Gradients: if a tensor requires grad, the reference runs and autograd goes through it.
    * Eager calls on plain tensors skip the torch dispatcher (it costs 2-4 us); under torch.compile,
      fake tensors and tensor subclasses the op goes through ``torch.ops.moesaic``.
    """
    op = _ops[name]
    plain, grad, negated = _plain(args)
    if negated:
        args = _materialize(op, args)
    if grad and torch.is_grad_enabled():
        return op.implementations["reference"].call(*args)
    if torch.compiler.is_compiling() or not plain:
        return op.handle(*args, backend)
    if _explaining.get():
        raise Recorded(op, backend, args)
    return _run(op, backend, args)


def _report(op: Op, backend: str | None, args: tuple[Any, ...]) -> str:
    try:
        chosen: str | None = select(op, backend, args).backend
        note = ""
    except NotImplementedError as error:
        chosen, note = None, f"  {error}\n"
    lines = [f"moesaic::{op.name} on {_device(args)}: {chosen or 'nothing serves this call'}"]
    for name in BACKENDS:
        row = op.implementations.get(name)
        reason = "not available here" if row is None else row.why_not(*args)
        mark = "->" if name == chosen else "  "
        lines.append(
            f" {mark} {name:9} {'yes' if reason is None else 'no: ' + reason}{_detail(name)}"
        )
    asked = _asked(backend)
    if asked:
        lines.append(f"  forced: {asked}")
    return "\n".join(lines) + ("\n" + note.rstrip() if note else "")


def _detail(backend: str) -> str:
    """What a backend runs on: the CPU backend names its instruction set."""
    module = importlib.import_module(f"moesaic.backends.{backend}")
    describe = getattr(module, "describe", None)
    text = describe() if describe else ""
    return f" ({text})" if text else ""


def record(name: str, *args: Any, **kwargs: Any) -> Recorded | None:
    """The first op call that ``moesaic.<name>(...)`` would make, not run; None if it makes none."""
    import moesaic

    if name not in moesaic.__all__ or not callable(getattr(moesaic, name, None)):
        raise ValueError(f"explain: name: expected a public op of moesaic, got {name!r}")
    token = _explaining.set(True)
    try:
        getattr(moesaic, name)(*args, **kwargs)
    except Recorded as asked:
        return asked
    finally:
        _explaining.reset(token)
    return None


def explain(name: str, *args: Any, **kwargs: Any) -> str:
    """Say which implementation ``moesaic.<name>(*args, **kwargs)`` would use, and why.

    The arguments are those of the public function, and are checked as a call would check them;
    nothing is computed.  Returns one line per backend with yes, or no and the reason.  Of a
    function that is composed of several ops the first one is explained.
    """
    asked = record(name, *args, **kwargs)
    if asked is None:
        return f"{name}: needs no kernel for these arguments"
    return _report(asked.op, asked.backend, asked.args_of_op)


def why_not(backend: str, name: str, *args: Any, **kwargs: Any) -> str | None:
    """None if ``backend`` can serve ``moesaic.<name>(*args, **kwargs)``, else the reason."""
    _check_backend(backend, "backend")
    asked = record(name, *args, **kwargs)
    if asked is None:
        return None
    row = asked.op.implementations.get(backend)
    if row is None:
        return f"it has no {backend} implementation"
    return row.why_not(*asked.args_of_op)
