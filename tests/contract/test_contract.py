"""Every case on every backend and instruction set of this machine: values, bits across instruction
sets, threads and batches, memory, torch.library.  Triton's turn is in tests/interpret."""

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
ISAS = cpu.extension.variants() if cpu.extension is not None else []
#: What the C++ kernels serve, by the committed snapshot; test_support_is_what_the_snapshot_says
#: keeps it true, so a kernel that starts refusing a case fails instead of being skipped.
SERVED = [c for c in CASES if ISAS and support.committed("cpu").get(str(c)) == "yes"]
SEED = 20260101


@pytest.fixture(params=ISAS)
def isa(request):
    cpu.extension.set_isa(request.param)
    yield request.param
    cpu.extension.set_isa("auto")


def outputs(case, inputs, backend="cpu"):
    return case.run(clone(inputs), backend)


def same(label, got, want):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        same_bits(f"{label} output {i}", g, w)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_backend_is_the_definition(case):
    with moesaic.use_backend("reference"):  # weights in the reference's own layout
        inputs = case.make_inputs(SEED)
    check(case, inputs, outputs(case, inputs, "reference"), "reference")


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_values(case, isa):
    inputs = case.make_inputs(SEED)
    check(case, inputs, outputs(case, inputs), isa)


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_every_isa_gives_the_same_bits(case):
    inputs = case.make_inputs(SEED + 1)
    want = outputs(case, inputs)
    try:
        for isa in ISAS:
            cpu.extension.set_isa(isa)
            same(f"{case} {isa} against {ISAS[0]}", outputs(case, inputs), want)
    finally:
        cpu.extension.set_isa("auto")


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_same_bits_again_and_for_every_thread_count(case):
    inputs = case.make_inputs(SEED + 2)
    threads = torch.get_num_threads()
    want = outputs(case, inputs)
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            same(f"{case} threads={count}", outputs(case, inputs), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [c for c in SERVED if c.take_rows], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(case):
    inputs = case.make_inputs(SEED + 3)
    whole = outputs(case, inputs)
    for n in sorted({1, max(case.rows // 2, 1)}):
        part = outputs(case, case.take_rows(inputs, n))
        same(f"{case} rows={n}", part, [w[: p.shape[0]] for p, w in zip(part, whole, strict=True)])


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_memory(case, isa, at_end):
    """Inputs that touch an inaccessible page: an access one byte outside kills the process. Outputs
    full of NaN between guard bytes: all of them is written and nothing beside them."""
    inputs = case.make_inputs(SEED + 4)
    want = outputs(case, inputs)
    with fenced(inputs, at_end) as walled, poisoned():
        same(f"{case} {isa}", case.run(walled, "cpu"), want)


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
    inputs = case.make_inputs(SEED + 5)
    recorded = registry.record(case.op, **clone(inputs))
    torch.library.opcheck(recorded.op.handle, (*recorded.args_of_op, None))
    want = case.run(clone(inputs))
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    same(f"{case} compiled", compiled(clone(inputs)), want)


def test_every_public_op_has_cases():
    """A meta-test: an op without a case would be neither tested nor measured."""
    covered = {c.op for c in all_cases()}
    missing = [name for name in registry.ops() if hasattr(moesaic, name) and name not in covered]
    assert not missing, f"ops without a contract case: {missing}"
