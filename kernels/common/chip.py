"""Which chip a launch is for: the key of every heuristic."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Shared memory (LDS on AMD) that one program may have, in bytes.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("chip", default=None)


def chip(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... for a GPU; "interpreter" for the CPU."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return "interpreter" if device.type == "cpu" else _query(device.index or 0)


@functools.cache
def _query(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def is_amd(name: str) -> bool:
    """True for the names of AMD's chips."""
    return name.startswith("gfx")


def shared_memory(name: str) -> int:
    """Bytes one program may have; for a chip not listed the smallest of its vendor."""
    small = "gfx942" if is_amd(name) else "sm_89"
    return SHARED_MEMORY.get(name, SHARED_MEMORY[small])


@contextmanager
def assume_chip(name: str) -> Iterator[None]:
    """Let heuristics choose as if for chip ``name``: to compile for a GPU that is absent."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)
