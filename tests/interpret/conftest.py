"""Tests in Triton's interpreter, chosen before Triton is imported: a process of their own."""

import os
import sys

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run tests/interpret alone, in its own process: pytest tests/interpret")
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(2)


def pytest_configure(config):
    # Triton 3.6's interpreter indexes with arrays of one element, which numpy 2.4 will refuse.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning")
