"""Progress of the slow steps: a bar on a terminal that has rich, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show ``title`` and how many of ``total`` steps are done; yields what to call after each
    one."""
    if sys.stderr.isatty():
        try:
            import rich.progress
        except ImportError:
            pass
        else:
            from rich.console import Console

            with rich.progress.Progress(console=Console(stderr=True)) as bar:
                task = bar.add_task(title, total=total)
                yield lambda: bar.advance(task)
            return
    done, shown = 0, -1

    def step() -> None:
        nonlocal done, shown
        done += 1
        quarter = done * 4 // total
        if quarter != shown:
            shown = quarter
            print(f"{title}: {done * 100 // total}%", file=sys.stderr, flush=True)

    yield step
