"""The ahead-of-time compiler reports what it should, and survives what it should."""

import pytest
import torch
import triton
import triton.language as tl

from moesaic.testing import aot


@triton.jit(do_not_specialize=["free"])
def scaled_copy(x, out, one, many, free, factor, extra, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i * one + free, tl.load(x + i * many).to(tl.float32) * factor)


@triton.jit
def centred(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, values - tl.sum(values, 0))


def record(x=None, many=32, free=16, chip="sm_90", block=64):
    x = torch.empty(4096, dtype=torch.bfloat16) if x is None else x
    with aot.recording(chip) as launches:
        scaled_copy[(1,)](x, torch.empty(4096), 1, many, free, 0.5, None, BLOCK=block, num_warps=2)
    return launches[0]


def test_recorded_as_the_run_time_specializes():
    launch = record()
    assert launch.kernel == "scaled_copy"
    assert launch.signature == {
        "x": "*bf16", "out": "*fp32", "one": "constexpr", "many": "i32", "free": "i32",
        "factor": "fp32", "extra": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    assert launch.constants == {"one": 1, "extra": None, "BLOCK": 64}
    assert launch.divisible == ("x", "out", "many")
    assert launch.options == {"num_warps": 2}


def test_unaligned_pointers_and_large_integers():
    launch = record(torch.empty(4096, dtype=torch.bfloat16)[1:], many=2**31)
    assert launch.divisible == ("out", "many")
    assert launch.signature["many"] == "i64"


def test_nothing_is_launched_and_recording_ends():
    run = triton.runtime.jit.JITFunction.run
    with pytest.raises(ZeroDivisionError), aot.recording("sm_90"):
        raise ZeroDivisionError
    assert triton.runtime.jit.JITFunction.run is run


def test_reports_come_in_order_with_failures_among_them():
    fp8 = record(torch.empty(4096, dtype=torch.uint8).view(torch.float8_e4m3fn))
    good, bad, amd = aot.compile_all([(record(), "sm_90"), (fp8, "sm_80"), (record(), "gfx942")])
    assert not good.error and good.registers > 0 and good.chip == "sm_90"
    assert "fp8e4nv not supported" in bad.error
    assert not amd.error and amd.registers > 0 and amd.chip == "gfx942"


def test_spills_are_seen():
    """Every value is needed again after the sum of all: 1024 of them in each of 64 threads."""
    with aot.recording("sm_80") as launches:
        centred[(1,)](torch.empty(65536), torch.empty(65536), BLOCK=65536, num_warps=2)
    [report] = aot.compile_all([(launches[0], "sm_80")])
    assert report.spilled_bytes > 1000


def test_a_compile_that_takes_too_long_is_ended_and_the_next_one_runs():
    [late] = aot.compile_all([(record(), "sm_90")], timeout=0.01)
    [good] = aot.compile_all([(record(), "sm_90")])
    assert "took more than 0.01 s" in late.error
    assert not good.error
