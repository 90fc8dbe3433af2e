"""The guard finds planted bugs and leaves clean kernels alone."""

import pytest
import torch
import triton
import triton.language as tl

from moesaic.testing import interpreter
from moesaic.testing.interpreter import ORDERS, KernelError, checked

interpreter.install()


@triton.jit
def add_one(x, out, n, BLOCK: tl.constexpr, GUARD_LOAD: tl.constexpr, GUARD_STORE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=(i < n) | (not GUARD_LOAD), other=0)
    tl.store(out + i, value + 1, mask=(i < n) | (not GUARD_STORE))


@triton.jit
def copy_rows(x, out, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + i, mask=i < columns, other=0)
    tl.store(out + row * BLOCK + i, value)


@triton.jit
def all_store_zeroth(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def shift_in_place(x, n):
    i = tl.program_id(0)
    value = tl.load(x + i + 1, mask=i + 1 < n, other=0)
    tl.store(x + i, value)


@triton.jit
def prefix_through_memory(x, out):
    i = tl.program_id(0)
    before = tl.load(out + i)
    tl.store(out + i + 1, before + tl.load(x + i))


@triton.jit
def count(out):
    tl.atomic_add(out, 1)


@triton.jit
def count_then_store(out):
    tl.atomic_add(out, 1)
    tl.store(out, 0)


@triton.jit
def store_colliding(out, BLOCK: tl.constexpr, SAME: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i * 0 if SAME else i)


@triton.jit
def multiply_offsets(x, out, a, b):
    offset = (tl.program_id(0) + a) * b
    tl.store(out, tl.load(x + offset * 0))


@triton.jit
def sum_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n)))


@triton.jit
def load_word_at_byte(x, out, offset):
    words = (x + offset).to(tl.pointer_type(tl.int32))
    tl.store(out, tl.load(words))


@triton.jit
def assert_positive(x):
    tl.device_assert(tl.load(x) > 0, "x must be positive")


def launch_add_one(n=233, guard_load=True, guard_store=True):
    x, out = torch.arange(n, dtype=torch.float32), torch.full((n,), torch.nan)
    add_one[(triton.cdiv(n, 64),)](x, out, n, 64, guard_load, guard_store)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_clean_kernel_passes(order):
    with checked(order) as launches:
        out = launch_add_one()
    assert torch.equal(out, torch.arange(1, 234, dtype=torch.float32))
    assert [(r.kernel, r.grid) for r in launches] == [("add_one", (4, 1, 1))]
    assert launches[0].accesses == 2 * 233


@pytest.mark.parametrize(
    ("guard_load", "guard_store", "message"),
    [
        (
            False,
            True,
            r"add_one, program \(3, 0, 0\): load of 23 of 64 lanes out .* byte 932 .* 'x'",
        ),
        (
            True,
            False,
            r"store of 23 of 64 lanes out of bounds; .* argument 'out', which has 932 bytes",
        ),
    ],
)
def test_overrun_is_found(guard_load, guard_store, message):
    with checked(), pytest.raises(KernelError, match=message):
        launch_add_one(guard_load=guard_load, guard_store=guard_store)


def test_access_before_the_first_byte_is_found():
    x = torch.zeros(8)
    with checked(), pytest.raises(KernelError, match=r"byte -8 of the storage of argument 'x'"):
        copy_rows[(2,)](x, torch.zeros(16), -2, 8, 8)


def test_gap_between_rows_of_a_view_is_outside():
    x = torch.zeros(4, 12)[:, :8]
    copy = torch.zeros(4, 8)
    with checked():
        copy_rows[(4,)](x, copy, 12, 8, 8)
    with checked(), pytest.raises(KernelError, match="between the elements of its view"):
        copy_rows[(4,)](x, copy, 12, 9, 16)


def test_views_of_one_storage_stay_one_storage():
    both = torch.arange(12.0)
    with checked():
        copy_rows[(1,)](both[:4], both[8:], 0, 4, 4)
    assert both.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]


def test_two_programs_storing_to_one_address():
    with (
        checked(),
        pytest.raises(KernelError, match="store in argument 'out' where another program stored"),
    ):
        all_store_zeroth[(2,)](torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("order", ORDERS)
def test_reading_what_another_program_overwrites(order):
    """Forward, the result is what was meant; the guard still objects."""
    with checked(order, seed=1), pytest.raises(KernelError, match="another program"):
        shift_in_place[(8,)](torch.arange(8.0), 8)


def test_reading_what_another_program_stored():
    with (
        checked(),
        pytest.raises(KernelError, match="load in argument 'out' where another program stored"),
    ):
        prefix_through_memory[(4,)](torch.ones(4), torch.zeros(5))


def test_atomics_may_meet_atomics_only():
    out = torch.zeros(1, dtype=torch.int32)
    with checked("random"):
        count[(5,)](out)
    assert out.item() == 5
    with checked(), pytest.raises(KernelError, match="another program"):
        count_then_store[(2,)](out)


def test_one_store_with_two_values_for_one_address():
    out = torch.zeros(8, dtype=torch.int32)
    with checked():
        store_colliding[(1,)](out, 16, True)
    with checked(), pytest.raises(KernelError, match="different values to one address"):
        store_colliding[(1,)](out, 16, False)


def test_int32_overflow_needs_no_large_tensor():
    x, out = torch.zeros(1), torch.zeros(1)
    with checked():
        multiply_offsets[(1,)](x, out, 7000, 70000)
    with checked(), pytest.raises(KernelError, match="overflow"):
        multiply_offsets[(1,)](x, out, 70000, 70000)
    with checked(overflow=False):
        multiply_offsets[(1,)](x, out, 70000, 70000)


def test_masked_lanes_without_other_are_poison():
    out = torch.zeros(1)
    with checked():
        sum_without_other[(1,)](torch.ones(5), out, 5, 8)
    assert out.isnan().item()


def test_misaligned_access():
    x = torch.arange(16, dtype=torch.uint8)
    out = torch.zeros(1, dtype=torch.int32)
    with checked():
        load_word_at_byte[(1,)](x, out, 4)
    assert out.item() == 0x07060504
    with checked(), pytest.raises(KernelError, match="not a multiple of its 4 bytes"):
        load_word_at_byte[(1,)](x, out, 3)


def test_device_assert_reports_the_program():
    with checked(), pytest.raises(KernelError, match=r"assert_positive.*x must be positive"):
        assert_positive[(1,)](torch.zeros(1))


def test_a_failed_launch_changes_nothing():
    x = torch.arange(8.0)
    with checked(), pytest.raises(KernelError):
        shift_in_place[(8,)](x, 8)
    assert torch.equal(x, torch.arange(8.0))


def test_unknown_order_is_refused():
    with (
        pytest.raises(ValueError, match=r"checked: order: expected one of .* got 'sideways'"),
        checked("sideways"),
    ):
        pass
