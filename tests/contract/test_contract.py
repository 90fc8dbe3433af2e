"""Every case on every backend and instruction set of this machine: values, determinism, row and
thread invariance, poisoned outputs, layouts, torch.library."""

from contextlib import contextmanager

import pytest
import torch

import moesaic
from moesaic import registry
from moesaic.backends import cpu
from moesaic.testing import support
from moesaic.testing.case import clone
from moesaic.testing.cases import all_cases
from moesaic.testing.memory import fenced, poisoned
from moesaic.testing.metrics import check, same_bits

CASES = [c for c in all_cases() if "bench" not in c.tags]
TARGETS = [("reference", None)]
if cpu.extension is not None:
    TARGETS += [("cpu", isa) for isa in cpu.extension.variants()]
SEED = 20260101


def name(target):
    return target[0] if target[1] is None else f"{target[0]}-{target[1]}"


@pytest.fixture(params=TARGETS, ids=name)
def target(request):
    with forced(request.param):
        yield request.param


@pytest.fixture(params=[t for t in TARGETS if t[0] != "reference"], ids=name)
def kernel_target(request):
    """Kernels promise bits across batches; the reference is defined up to rounding."""
    with forced(request.param):
        yield request.param


@contextmanager
def forced(target):
    if target[1] is not None:
        cpu.extension.set_isa(target[1])
    yield
    if target[1] is not None:
        cpu.extension.set_isa("auto")


def run(case, inputs, backend):
    """Run the case, or skip it where the backend says that it does not serve it: which cases those
    are is pinned by support.json."""
    try:
        return case.run(clone(inputs), backend)
    except NotImplementedError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, target):
    inputs = case.make_inputs(SEED)
    check(case, inputs, run(case, inputs, target[0]), str(target))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_again_and_for_every_thread_count(case, target):
    inputs = case.make_inputs(SEED + 1)
    threads = torch.get_num_threads()
    want = run(case, inputs, target[0])
    counts = (1, 2, 3) if target[0] == "cpu" else (threads,)
    try:
        for count in counts:
            torch.set_num_threads(count)
            for got, expected in zip(case.run(clone(inputs), target[0]), want, strict=True):
                same_bits(f"{case} {target} threads={count}", got, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [c for c in CASES if c.take_rows], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(case, kernel_target):
    target = kernel_target
    inputs = case.make_inputs(SEED + 2)
    whole = run(case, inputs, target[0])
    for n in sorted({1, max(case.rows // 2, 1)}):
        part = case.run(clone(case.take_rows(inputs, n)), target[0])
        for got, want in zip(part, whole, strict=True):
            same_bits(f"{case} {target} rows={n}", got, want[: got.shape[0]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_output_is_written_and_nothing_beside_it(case, kernel_target):
    inputs = case.make_inputs(SEED + 5)
    want = run(case, inputs, kernel_target[0])
    with poisoned():
        got = case.run(clone(inputs), kernel_target[0])
    for g, w in zip(got, want, strict=True):
        same_bits(f"{case} {kernel_target} poisoned", g, w)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_outside_the_inputs_is_touched(case, kernel_target, at_end):
    """Inputs that touch an inaccessible page: an access one byte outside kills the process."""
    inputs = case.make_inputs(SEED + 6)
    want = run(case, inputs, kernel_target[0])
    with fenced(inputs, at_end) as walled:
        got = case.run(walled, kernel_target[0])
        for g, w in zip(got, want, strict=True):
            same_bits(f"{case} {kernel_target} fenced", g, w)


@pytest.mark.skipif(cpu.extension is None, reason="no C++ extension in this install")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_isa_gives_the_same_bits(case):
    inputs = case.make_inputs(SEED + 3)
    results = {}
    try:
        for isa in cpu.extension.variants():
            cpu.extension.set_isa(isa)
            results[isa] = run(case, inputs, "cpu")
    finally:
        cpu.extension.set_isa("auto")
    first, *others = results
    for isa in others:
        for got, want in zip(results[isa], results[first], strict=True):
            same_bits(f"{case} {isa} against {first}", got, want)


def test_support_is_what_the_snapshot_says():
    """A kernel that starts refusing a case fails here instead of skipping.  `make docs` rewrites
    it."""
    if cpu.extension is None:
        pytest.skip("no C++ extension in this install")
    assert support.snapshot("cpu") == support.committed("cpu")


@pytest.mark.parametrize("case", [c for c in CASES if "compile" in c.tags], ids=str)
def test_torch_library(case):
    """opcheck through the public door, and one graph under torch.compile."""
    torch.compiler.reset()  # every case compiles the same function: keep under the recompile limit
    inputs = case.make_inputs(SEED + 4)
    recorded = registry.record(case.op, **clone(inputs))
    torch.library.opcheck(recorded.op.handle, (*recorded.args_of_op, None))
    want = case.run(clone(inputs))
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(clone(inputs)), want, strict=True):
        same_bits(f"{case} compiled", got, expected)


def test_every_public_op_has_cases():
    """A meta-test: an op without a case would be neither tested nor measured."""
    covered = {c.op for c in all_cases()}
    missing = [name for name in registry.ops() if hasattr(moesaic, name) and name not in covered]
    assert not missing, f"ops without a contract case: {missing}"
