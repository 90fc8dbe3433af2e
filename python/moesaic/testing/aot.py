"""Compile Triton kernels for GPUs that are absent, and report what came out.

::

    with aot.recording("sm_90") as launches:      # launchers run; nothing is launched
        mxfp4_linear(x, data, scale, None, torch.bfloat16)
    [report] = aot.compile_all([(launches[0], "sm_90")])
    report.registers, report.spilled_bytes, report.shared_memory, report.instructions["wgmma"]

A recorded launch is specialized as the run time would: by dtypes, by pointers and integers that 16
divides, by integers that are 1. Compiling needs Triton's wheel alone: no GPU, no driver. It happens
in worker processes with a time limit, because a compile can hang.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

CHIPS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

#: Instructions worth counting: label -> what its line begins with, in PTX and in AMD's assembly.
_PTX = {
    "mma.sync": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c[ag]",
    "atomic": r"(atom|red)\.",
}
_GCN = {
    "mfma": r"v_mfma_",
    "wide load": r"(global|buffer)_load_dwordx4",
    "atomic": r"(global|buffer|flat)_atomic",
}
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one launch asks Triton to compile. ``signature`` maps each argument to its type or to
    "constexpr"; ``divisible`` names the arguments that 16 divides."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """The machine code of one launch on one chip; ``error`` is empty when it compiled."""

    kernel: str
    chip: str
    error: str = ""
    registers: int = 0
    spilled_bytes: int = 0
    shared_memory: int = 0
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


@contextlib.contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Let launchers run on CPU tensors as if for ``chip``, and collect instead of launching.

    Outputs of the launchers are uninitialised.
    """
    from triton.runtime.jit import JITFunction

    from moesaic.kernels.common.chip import assume_chip

    launches: list[Launch] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(_specialize(self, args, kwargs))

    JITFunction.run = record
    try:
        with assume_chip(chip):
            yield launches
    finally:
        JITFunction.run = run


def _specialize(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = set(function.arg_names)
    given = {name: value for name, value in kwargs.items() if name in names}
    bound = inspect.signature(function.fn).bind(*args, **given)
    bound.apply_defaults()
    signature, constants, divisible = {}, {}, []
    for parameter in function.params:
        name, value = parameter.name, bound.arguments[parameter.name]
        free = not parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and free
        if parameter.is_constexpr or value is None or one:
            if not isinstance(value, (int, float, str, type(None))):
                raise TypeError(
                    f"recording: {name}: expected a number, string or None, got {value!r}"
                )
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        address = value.data_ptr() if hasattr(value, "data_ptr") else value
        if free and isinstance(address, int) and address % _ALIGNMENT == 0:
            divisible.append(name)
    options = {name: value for name, value in kwargs.items() if name not in names}
    module, kernel = function.fn.__module__, function.fn.__name__
    return Launch(module, kernel, signature, constants, tuple(divisible), options)


def _type_of(value: Any) -> str:
    if hasattr(value, "data_ptr"):
        from triton.runtime.jit import mangle_type

        return mangle_type(value)
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_all(
    jobs: Sequence[tuple[Launch, str]], *, workers: int = 2, timeout: float = 120.0
) -> list[Report]:
    """Compile each (launch, chip); reports come in the order of the jobs, failures included."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    reports: dict[int, Report] = {}

    def work() -> None:
        with tempfile.TemporaryDirectory() as cache:
            worker = _Worker(cache)
            try:
                while True:
                    index = waiting.get_nowait()
                    reports[index] = worker.compile(*jobs[index], timeout)
            except queue.Empty:
                worker.stop()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [reports[index] for index in range(len(jobs))]


class _Worker:
    """A process that compiles one job a line; ended and replaced when a job takes too long."""

    def __init__(self, cache: str) -> None:
        self.environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        self.process: subprocess.Popen[str] | None = None

    def compile(self, launch: Launch, chip: str, timeout: float) -> Report:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=self.environment,
            )  # fmt: skip
        process = self.process
        assert process.stdin and process.stdout and process.stderr
        late = threading.Timer(timeout, process.kill)
        late.start()
        process.stdin.write(json.dumps([dataclasses.asdict(launch), chip]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        expired = late.finished.is_set()
        late.cancel()
        if answer:
            return Report(**json.loads(answer))
        self.process = None
        said = process.stderr.read().strip()[-400:]
        process.wait()
        return Report(
            launch.kernel,
            chip,
            error=f"took more than {timeout} s" if expired else f"ended: {said}",
        )

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()


def _target(chip: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if chip.startswith("sm_"):
        return GPUTarget("cuda", int(chip[3:]), 32)
    return GPUTarget("hip", chip, 64 if chip.startswith("gfx9") else 32)


def compile_here(launch: Launch, chip: str) -> Report:
    """Compile in this process. Raises what Triton raises."""
    import triton
    from triton.compiler import ASTSource

    begin = time.monotonic()
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    place = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=launch.signature,
        constexprs={place[name]: value for name, value in launch.constants.items()},
        attrs={place[name]: [["tt.divisibility", _ALIGNMENT]] for name in launch.divisible},
    )
    triton.knobs.compilation.always_compile = True  # a cached kernel comes without ptxas's log
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=_target(chip), options=launch.options)
    found = _inspect_amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else None
    return Report(
        launch.kernel,
        chip,
        shared_memory=kernel.metadata.shared,
        seconds=round(time.monotonic() - begin, 2),
        **(found or _inspect_nvidia(kernel.asm["ptx"], log.getvalue())),
    )


def _inspect_nvidia(ptx: str, log: str) -> dict[str, Any]:
    lines = [re.sub(r"^@!?%\w+\s+", "", line.strip()) for line in ptx.splitlines()]
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spilled_bytes": _number(r"(\d+) bytes spill stores", log),
        "instructions": _count(lines, _PTX),
    }


def _inspect_amd(assembly: str) -> dict[str, Any]:
    lines = [line.strip() for line in assembly.splitlines()]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "spilled_bytes": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "instructions": _count(lines, _GCN),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(
            f"aot: the compiler's output has no {pattern!r}; is this Triton supported?"
        )
    return int(found.group(1))


def _count(lines: list[str], table: dict[str, str]) -> dict[str, int]:
    rules = {label: re.compile(pattern) for label, pattern in table.items()}
    return dict(
        Counter(label for line in lines for label, rule in rules.items() if rule.match(line))
    )


def _serve() -> None:
    """The worker: a job a line on stdin, a report a line on stdout."""
    answers = sys.stdout
    for line in sys.stdin:
        launch, chip = json.loads(line)
        try:
            report = compile_here(Launch(**launch), chip)
        except Exception as error:  # a kernel that does not compile is an answer
            text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
            report = Report(launch["kernel"], chip, error=" ".join(text.split())[-600:])
        print(json.dumps(dataclasses.asdict(report)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
