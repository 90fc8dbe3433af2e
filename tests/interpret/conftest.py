"""Tests in Triton's interpreter, chosen before Triton is imported: a process of their own."""

import os
import sys

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run tests/interpret alone, in its own process: pytest tests/interpret")
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(2)
