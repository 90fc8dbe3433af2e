"""The user's cache folder, and folders that appear in it whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DemoError


def cache_folder() -> Path:
    """``MOESAIC_CACHE_DIR``, else ``moesaic`` in ``XDG_CACHE_HOME``, else in ``~/.cache``."""
    explicit = os.environ.get("MOESAIC_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "moesaic"


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """A temporary folder beside ``final`` that takes its name when the block succeeds.

    An exception or Ctrl-C removes it. What a killed process left is removed by the next one. If
    another process was faster, its folder is kept.
    """
    temporary = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        temporary.mkdir()
    except OSError as error:
        raise DemoError(
            f"demo: cannot write to {final.parent} ({error.strerror}). Set MOESAIC_CACHE_DIR to a "
            "folder with 300 MB of free space."
        ) from error
    try:
        yield temporary
        if not final.exists():
            temporary.rename(final)
    except OSError as error:
        raise DemoError(
            f"demo: writing {final} failed ({error.strerror}). Set MOESAIC_CACHE_DIR to a folder "
            "with 300 MB of free space."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(final: Path) -> None:
    for folder in final.parent.glob(f"{final.name}.partial-*"):
        if not _alive(int(folder.name.rpartition("-")[2])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
