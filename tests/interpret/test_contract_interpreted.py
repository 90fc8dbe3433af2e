"""The contract cases on the triton backend, interpreted under the guard.

Every case that the backend serves is compared with the definition in one order of programs; those
tagged "small" in three, and row against batch.
"""

import zlib

import pytest
import torch

import moesaic
from moesaic import registry
from moesaic.formats import MXFP4
from moesaic.testing import interpreter, support
from moesaic.testing.case import clone
from moesaic.testing.cases import all_cases
from moesaic.testing.interpreter import ORDERS, checked
from moesaic.testing.metrics import check, same_bits

interpreter.install()

#: The ops with Triton kernels; packing only keeps the plain order.
OPS = {op for op, backends in registry.implementations().items() if "triton" in backends}
OPS -= {"pack_weight", "unpack_weight"}
CASES = [case for case in all_cases() if case.op in OPS and "bench" not in case.tags]
SMALL = [case for case in CASES if "small" in case.tags]
SEED = 20261123


def prepare(case, seed):
    """Inputs made for this backend: weights are packed in its layout."""
    try:
        with moesaic.use_backend("triton"):
            return case.make_inputs(seed)
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def run(case, inputs, order):
    """The outputs; or a skip where the backend says that it does not serve the case, of which
    support.json keeps account."""
    with checked(order, seed=SEED) as launches:
        try:
            outputs = case.run(clone(inputs), "triton")
        except NotImplementedError as reason:
            pytest.skip(str(reason))
    assert launches or all(out.numel() == 0 for out in outputs), "no kernel ran"
    return outputs


@pytest.mark.parametrize("op", sorted(OPS))
def test_each_op_has_a_small_case_that_is_served(op):
    """A skip of everything must not look like a pass."""
    reasons = {str(case): support.why_not("triton", case) for case in SMALL if case.op == op}
    assert None in reasons.values(), reasons


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    inputs = prepare(case, SEED)
    order = ORDERS[zlib.crc32(case.id.encode()) % len(ORDERS)]
    check(case, inputs, run(case, inputs, order), f"triton {order}")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_same_bits_in_every_order_of_programs(case):
    inputs = prepare(case, SEED + 1)
    first, *others = (run(case, inputs, order) for order in ORDERS)
    for outputs in others:
        for got, want in zip(outputs, first, strict=True):
            same_bits(f"{case} triton", got, want)


@pytest.mark.parametrize("case", [case for case in SMALL if case.take_rows], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(case):
    inputs = prepare(case, SEED + 2)
    whole = run(case, inputs, "forward")
    for n in sorted({1, max(case.rows // 2, 1)}):
        part = run(case, case.take_rows(inputs, n), "reverse")
        for got, want in zip(part, whole, strict=True):
            same_bits(f"{case} triton rows={n}", got, want[: got.shape[0]])


def test_what_it_does_not_serve_is_refused_with_the_reason():
    weight = moesaic.quantize(torch.zeros(8, 64), MXFP4)
    packed = moesaic.pack_weight(weight, backend="triton")
    x = torch.zeros(2, 64, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"quant_linear: .* not float64"):
        moesaic.quant_linear(x, packed, backend="triton")
    with pytest.raises(NotImplementedError, match=r"quant_linear: .* no Triton kernel for int8"):
        moesaic.quant_linear(x.float(), packed, activation="int8", backend="triton")
