"""The contract cases: one file per room, each with ``cases()``.

Tests run every case on every backend and instruction set; benches time those with the tag "bench".
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from ...registry import ROOMS
from ..case import Case


def all_cases(*rooms: str) -> Iterator[Case]:
    """Cases of the rooms named, or of all rooms."""
    for room in rooms or ROOMS:
        yield from importlib.import_module(f"{__name__}.{room}").cases()
