"""The machine's own limits, measured in the same process, threads and instruction set as the
kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ..backends import cpu
from .case import Cost


@dataclass(frozen=True)
class Roofs:
    """Measured limits: streaming reads in bytes/s, fp32 FMA in flop/s, for ``threads`` threads."""

    isa: str
    threads: int
    read_bytes_per_s: float
    flops_per_s: float

    def seconds(self, cost: Cost) -> float:
        """The shortest time in which a call of this cost can run."""
        return max(cost.bytes / self.read_bytes_per_s, cost.flops / self.flops_per_s)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def best_time(call: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of ``repeats`` runs in seconds, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def median_time(call: Callable[[], object], seconds: float = 0.3, least: int = 5) -> float:
    """Median of as many runs as fit in ``seconds`` (at least ``least``), after one to warm up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_roofs(read_bytes: int = 1 << 28) -> Roofs:
    """Measure both roofs on the CPU extension; takes about half a second.

    ``read_bytes`` must be several times the last-level cache.  Raises RuntimeError without the
    extension.
    """
    extension = cpu.extension
    if extension is None:
        raise RuntimeError("measure_roofs: the C++ extension is not installed")
    threads = torch.get_num_threads()
    data = torch.ones(read_bytes // 4)
    read = best_time(lambda: extension.roof_read(data.data_ptr(), data.numel(), threads))
    steps = 12_000_000
    fma = best_time(lambda: extension.roof_fma(steps, threads))
    return Roofs(extension.isa(), threads, read_bytes / read, 32.0 * steps * threads / fma)
