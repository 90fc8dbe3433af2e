"""Measure cases: our kernels and rivals in turns, beside the machine's measured roofs.

Rules, so that a number can be trusted: a variant that fails the comparison with the reference gets
no time; inputs rotate through a pool several times the last-level cache; the variants of a case
run in turns within one loop, so that a slow moment of the machine hits all of them; medians are
reported with their quartiles; roofs are measured in the same session with the same threads.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu
from . import rivals
from .case import Case, Cost, Inputs, clone, with_tag
from .cases import all_cases
from .metrics import Mismatch, check
from .roofline import Roofs, measure_roofs

#: The pool of inputs is at least this large, several times any last-level cache that we know of.
COLD_BYTES = 160 << 20

Call = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Result:
    """One measured variant of one case.  Times in seconds, bytes and flops of the case's cost."""

    case: str
    room: str
    variant: str
    median: float
    low: float
    high: float
    runs: int
    bytes: int
    flops: int
    roof_fraction: float | None
    bound: str


@dataclass(frozen=True)
class Variant:
    """One way to compute a case; isa is None for a rival."""

    name: str
    call: Call
    isa: str | None


def _variants(case: Case) -> Iterator[Variant]:
    for isa in cpu.extension.variants() if cpu.extension else []:
        if isa != "scalar":
            yield Variant(f"moesaic {isa}", lambda inputs: case.run(inputs, "cpu"), isa)
    for name, call in rivals.of(case.op).items():
        yield Variant(name, call, None)


def _prepared(variant: Variant, case: Case, pool: list[Inputs]) -> list[Inputs] | str:
    """The inputs that the variant is timed on, or why it gets no time."""
    if variant.isa is not None:
        try:
            outputs = case.run(clone(pool[0]), "cpu")
            check(case, pool[0], outputs, variant.name)
        except NotImplementedError as reason:
            return f"not served: {reason}"
        except Mismatch as error:
            return f"wrong: {error}"
        return pool
    try:
        prepare = rivals.preparation(case.op)
        prepared = [prepare(inputs) for inputs in pool]
        got, want = variant.call(prepared[0]), case.reference(clone(pool[0]))[0]
    except rivals.NotServed as reason:
        return f"not served: {reason}"
    off = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    return prepared if off < rivals.RELATIVE_L2 else f"wrong: relative L2 error {off:.1e}"


def _use(isa: str | None) -> None:
    if isa is not None and cpu.extension is not None:
        cpu.extension.set_isa(isa)


def measure(case: Case, roofs: dict[str, Roofs], seconds: float = 1.0) -> Iterator[Result | str]:
    """Time all variants of one case, in turns, for about ``seconds`` each; yields results, and a
    line of text for each variant that gets no time."""
    first = case.make_inputs(0)
    cost = case.cost(first) if case.cost else Cost(0)
    count = max(1, min(64, -(-COLD_BYTES // max(cost.bytes, 1))))
    pool = [first, *(case.make_inputs(seed) for seed in range(1, count))]
    times: dict[str, list[float]] = {}
    running: list[tuple[Variant, list[Inputs]]] = []
    for variant in _variants(case):
        _use(variant.isa)
        prepared = _prepared(variant, case, pool)
        if isinstance(prepared, str):
            yield f"{case}: {variant.name}: {prepared}"
            continue
        times[variant.name] = []
        running.append((variant, prepared))
    end = time.perf_counter() + seconds * len(running)
    rounds = 0
    while running and (rounds < 5 or time.perf_counter() < end):
        for i, (variant, inputs) in enumerate(running):
            _use(variant.isa)
            # Each variant is elsewhere in the pool: none finds in the cache what another just read.
            arguments = inputs[(rounds + i * len(inputs) // len(running)) % len(inputs)]
            start = time.perf_counter()
            variant.call(arguments)
            times[variant.name].append(time.perf_counter() - start)
        rounds += 1
    _use("auto")
    for variant, _ in running:
        yield _result(case, variant, cost, times[variant.name], roofs)


def _result(
    case: Case, variant: Variant, cost: Cost, times: list[float], roofs: dict[str, Roofs]
) -> Result:
    settled = sorted(times[1:])  # the first run of each variant warms up
    low, median, high = statistics.quantiles(settled, n=4)
    # Memory has one roof, whichever instruction set reached it; arithmetic has one for each.
    best = max(roofs.values(), key=lambda r: r.flops_per_s)
    read = max(r.read_bytes_per_s for r in roofs.values())
    roof = replace(roofs.get(variant.isa or "", best), read_bytes_per_s=read)
    fraction = roof.seconds(cost) / median if cost.bytes or cost.flops else None
    memory = cost.bytes / roof.read_bytes_per_s >= cost.flops / roof.flops_per_s
    return Result(
        str(case), case.room, variant.name, median, low, high, len(settled),
        cost.bytes, cost.flops, fraction, "memory" if memory else "compute",
    )  # fmt: skip


def measure_all(
    rooms: Iterable[str] = (), *, seconds: float = 1.0, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run every bench case of the rooms (all by default); returns what :func:`save` writes."""
    if cpu.extension is None:
        raise RuntimeError("bench: the C++ extension is not installed; see moesaic env")
    roofs = {}
    for isa in (i for i in cpu.extension.variants() if i != "scalar"):
        cpu.extension.set_isa(isa)
        roofs[isa] = measure_roofs()
        report(
            f"roofs {isa}: read {roofs[isa].read_bytes_per_s / 1e9:.1f} GB/s, "
            f"FMA {roofs[isa].flops_per_s / 1e9:.1f} GFLOP/s, {roofs[isa].threads} threads"
        )
    cpu.extension.set_isa("auto")
    results: list[Result] = []
    notes: list[str] = []
    for case in with_tag(all_cases(*rooms), "bench"):
        for item in measure(case, roofs, seconds):
            report(item if isinstance(item, str) else line(item))
            (notes if isinstance(item, str) else results).append(item)  # type: ignore[arg-type]
    return {
        "machine": machine(),
        "roofs": {isa: roof.as_dict() for isa, roof in roofs.items()},
        "results": [asdict(r) for r in results],
        "notes": notes,
        "overhead_us": overhead(),
    }


def line(r: Result) -> str:
    """One result as text: time, rate, share of the roof."""
    rate = f"{r.bytes / r.median / 1e9:7.1f} GB/s" if r.bound == "memory" else (
        f"{r.flops / r.median / 1e9:7.1f} GF/s"
    )  # fmt: skip
    share = "" if r.roof_fraction is None else f"{100 * r.roof_fraction:5.0f} % of {r.bound} roof"
    return f"{r.case:58} {r.variant:22} {r.median * 1e3:9.3f} ms {rate} {share}"


def overhead(calls: int = 300) -> dict[str, float]:
    """Microseconds of one public call on the smallest case of each op, CPU kernels, one thread:
    mostly door, selection and binding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    try:
        for case in with_tag(all_cases(), "compile"):
            inputs = case.make_inputs(0)
            try:
                case.run(inputs, "cpu")
            except NotImplementedError:
                continue
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                case.run(inputs, "cpu")
                times.append(time.perf_counter() - start)
            us = 1e6 * statistics.median(times)
            found[case.op] = min(us, found.get(case.op, us))
    finally:
        torch.set_num_threads(threads)
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from ..cli import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": torch.get_num_threads(),
        "isas": cpu.extension.variants() if cpu.extension else [],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def save(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def tensors_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements, for costs."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
