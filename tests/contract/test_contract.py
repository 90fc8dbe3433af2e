"""Every case on every backend and instruction set of this machine: values, determinism, row and
thread invariance, poisoned outputs, layouts, torch.library."""

import pytest
import torch

import moesaic
from moesaic import registry
from moesaic.backends import cpu
from moesaic.testing.case import clone
from moesaic.testing.cases import all_cases
from moesaic.testing.metrics import check, same_bits

CASES = [c for c in all_cases() if "bench" not in c.tags]
TARGETS = [("reference", None)]
if cpu.extension is not None:
    TARGETS += [("cpu", isa) for isa in cpu.extension.variants()]
SEED = 20260101


def serves(case, inputs, backend):
    """None, or why the backend does not serve the case (only its own `supports` may say so)."""
    try:
        with moesaic.use_backend(backend):
            moesaic.explain(case.op, **inputs)
            case.run(clone(inputs))
    except NotImplementedError as error:
        return str(error)
    return None


@pytest.fixture(params=TARGETS, ids=lambda t: t[0] if t[1] is None else f"{t[0]}-{t[1]}")
def target(request):
    backend, isa = request.param
    if isa is not None:
        cpu.extension.set_isa(isa)
    yield request.param
    if isa is not None:
        cpu.extension.set_isa("auto")


def supported_or_declared(case, inputs, backend):
    """Skip a case that its backend declares unsupported; the support snapshot pins the set."""
    reason = serves(case, inputs, backend)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, target):
    inputs = case.make_inputs(SEED)
    supported_or_declared(case, inputs, target[0])
    check(case, inputs, case.run(clone(inputs), target[0]), str(target))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_again_and_for_every_thread_count(case, target):
    inputs = case.make_inputs(SEED + 1)
    supported_or_declared(case, inputs, target[0])
    threads = torch.get_num_threads()
    want = case.run(clone(inputs), target[0])
    counts = (1, 2, 3) if target[0] == "cpu" else (threads,)
    try:
        for count in counts:
            torch.set_num_threads(count)
            for got, expected in zip(case.run(clone(inputs), target[0]), want, strict=True):
                same_bits(f"{case} {target} threads={count}", got, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [c for c in CASES if c.take_rows], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(case, target):
    if target[0] == "reference":
        pytest.skip("the reference is defined up to rounding; kernels promise bits")
    inputs = case.make_inputs(SEED + 2)
    supported_or_declared(case, inputs, target[0])
    whole = case.run(clone(inputs), target[0])
    for n in sorted({1, max(case.rows // 2, 1)}):
        part = case.run(clone(case.take_rows(inputs, n)), target[0])
        for got, want in zip(part, whole, strict=True):
            same_bits(f"{case} {target} rows={n}", got, want[: got.shape[0]])


@pytest.mark.skipif(cpu.extension is None, reason="no C++ extension in this install")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_isa_gives_the_same_bits(case):
    inputs = case.make_inputs(SEED + 3)
    supported_or_declared(case, inputs, "cpu")
    results = {}
    try:
        for isa in cpu.extension.variants():
            cpu.extension.set_isa(isa)
            results[isa] = case.run(clone(inputs), "cpu")
    finally:
        cpu.extension.set_isa("auto")
    first, *others = results
    for isa in others:
        for got, want in zip(results[isa], results[first], strict=True):
            same_bits(f"{case} {isa} against {first}", got, want)


def test_every_public_op_has_cases():
    """A meta-test: an op without a case would be neither tested nor measured."""
    covered = {c.op for c in all_cases()}
    missing = [name for name in registry.ops() if hasattr(moesaic, name) and name not in covered]
    assert not missing, f"ops without a contract case: {missing}"
