"""The memory checks find what they are for."""

import subprocess
import sys

import pytest
import torch

from moesaic.testing.memory import fence, fenced, poisoned

READ_OVER = """
import ctypes, torch
from moesaic.testing.memory import fence
keep = []
t = fence(torch.arange(5, dtype=torch.float32), {at_end}, keep)
assert t.tolist() == [0, 1, 2, 3, 4]
ctypes.string_at(t.data_ptr() + {offset}, 1)
"""


@pytest.mark.parametrize(("at_end", "inside", "outside"), [(True, 19, 20), (False, 0, -1)])
def test_one_byte_outside_is_fatal(at_end, inside, outside):
    for offset, fatal in ((inside, False), (outside, True)):
        code = READ_OVER.format(at_end=at_end, offset=offset)
        status = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
        assert (status == -11) == fatal, (offset, status)


def test_strides_are_kept():
    keep = []
    t = torch.randn(4, 6).t()[1:, ::2]
    copy = fence(t, True, keep)
    assert copy.stride() == t.stride() and torch.equal(copy, t)
    with fenced({"a": t, "n": 3, "deep": (t, None)}, False) as inputs:
        assert torch.equal(inputs["a"], t) and inputs["n"] == 3
        assert torch.equal(inputs["deep"][0], t) and inputs["deep"][1] is None


def test_unwritten_outputs_show():
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, 2)).isnan().all()


def test_a_write_beside_an_output_is_found():
    with (
        pytest.raises(AssertionError, match="a byte beside an output of 12 B was written"),
        poisoned(),
    ):
        out = torch.empty(3)
        out.as_strided((4,), (1,)).fill_(0.0)
