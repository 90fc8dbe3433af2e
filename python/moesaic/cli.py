"""The command ``moesaic`` (also ``python -m moesaic``): env, check, demo, bench.

Each command is a function ``add(subparsers)`` that declares its flags and sets ``run``; what it
needs beyond the package is imported when it runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence

from .demo import add_arguments as demo_flags
from .demo import run as run_demo


def _env(args: argparse.Namespace) -> int:
    """Print what a bug report needs: versions, CPU, backends, settings."""
    import torch

    import moesaic
    from moesaic.backends import cpu, triton

    extension = cpu.extension
    rows = [
        ("moesaic", moesaic.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("platform", platform.platform()),
        ("cpu", cpu_name()),
        ("threads", str(torch.get_num_threads())),
        ("C++ extension", "isa " + extension.isa() if extension else "absent: reference only"),
        ("  runs here", ", ".join(extension.variants()) if extension else "-"),
        ("  compiled", ", ".join(extension.compiled_isas()) if extension else "-"),
        ("triton", triton.describe() or "absent"),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]
    rows += [(k, v) for k, v in sorted(os.environ.items()) if k.startswith("MOESAIC_")]
    for name, value in rows:
        print(f"{name:14} {value}")
    return 0


def cpu_name() -> str:
    """The processor's marketing name, if the system tells."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(
                line.split(":", 1)[1].strip() for line in f if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _check(args: argparse.Namespace) -> int:
    """Compare every available backend with the reference on the small contract cases."""
    import torch

    from moesaic.backends import cpu
    from moesaic.testing.case import clone
    from moesaic.testing.cases import all_cases
    from moesaic.testing.metrics import Mismatch, check

    targets = [("cpu", isa) for isa in (cpu.extension.variants() if cpu.extension else [])]
    if torch.cuda.is_available():
        targets.append(("triton", ""))
    start, failed, passed = time.monotonic(), 0, 0
    for case in (c for c in all_cases() if "bench" not in c.tags):
        for backend, isa in targets:
            if time.monotonic() - start > args.seconds:
                print(f"stopped after {args.seconds} s: {passed} passed, {failed} failed")
                return 1 if failed else 0
            if isa and cpu.extension:
                cpu.extension.set_isa(isa)
            inputs = case.make_inputs(0)
            try:
                check(case, inputs, case.run(clone(inputs), backend))
                passed += 1
            except NotImplementedError:
                continue
            except Mismatch as error:
                failed += 1
                print(f"FAILED {backend} {isa}: {error}")
    if cpu.extension:
        cpu.extension.set_isa("auto")
    names = ", ".join(f"{b} {i}".strip() for b, i in targets) or "the reference alone"
    print(f"{passed} passed, {failed} failed on {names} in {time.monotonic() - start:.1f} s")
    return 1 if failed else 0


def _bench(args: argparse.Namespace) -> int:
    """Measure the bench cases of the rooms named."""
    from pathlib import Path

    from moesaic.testing import bench

    report = bench.measure_all(args.rooms, seconds=0.3 if args.quick else 1.0)
    print("call overhead in us:", {op: round(us, 1) for op, us in report["overhead_us"].items()})
    if args.json:
        bench.save(report, Path(args.json))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="moesaic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, CPU, backends, settings").set_defaults(run=_env)
    check = commands.add_parser("check", help="compare the kernels with the reference (< 60 s)")
    check.add_argument("--seconds", type=float, default=60.0, help="time limit (default 60)")
    check.set_defaults(run=_check)
    demo = commands.add_parser("demo", help="a real language model on moesaic and off it")
    demo_flags(demo)
    demo.set_defaults(run=run_demo)
    bench = commands.add_parser("bench", help="measure the kernels beside roofs and rivals")
    bench.add_argument("rooms", nargs="*", help="quant matmul moe attention (default: all)")
    bench.add_argument("--quick", action="store_true", help="a third of the time per variant")
    bench.add_argument("--json", metavar="FILE", help="write the results")
    bench.set_defaults(run=_bench)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
