"""What every row of the triton backend asks and does."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

#: Dtypes of activations and everything the kernels compute in fp32 with.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # the first NVIDIA chips with bf16 tensor cores

Result = TypeVar("Result")


def short(dtype: torch.dtype) -> str:
    """'bfloat16'"""
    return str(dtype).removeprefix("torch.")


def why_not_device(tensor: Tensor) -> str | None:
    """None if Triton runs where ``tensor`` lives: CUDA and ROCm GPUs, or the CPU if interpreted."""
    if tensor.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it serves CUDA tensors; CPU tensors need TRITON_INTERPRET=1 from the start"
    if tensor.device.type != "cuda":
        return f"it serves CUDA tensors, not {tensor.device.type}"
    capability = _capability(tensor.device.index or 0)
    if torch.version.hip is None and capability < _OLDEST:
        return f"it needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_floats(*tensors: Tensor | None) -> str | None:
    """None if every tensor given has a dtype that the kernels read."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"it reads float32, bfloat16 and float16, not {short(tensor.dtype)}"
    return None


def on_its_device(call: Callable[..., Result]) -> Callable[..., Result]:
    """Make the device of a row's first argument current: Triton launches on the current one.

    On the CPU, Triton's interpreter runs; see moesaic.testing.interpreter.
    """

    @functools.wraps(call)
    def run(*args: Any) -> Result:
        device = args[0].device
        if device.type == "cpu":  # Triton's own interpreter computes bf16 and fp8 wrongly
            from ...testing import interpreter

            interpreter.install()
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return call(*args)
        with torch.cuda.device(device):
            return call(*args)

    return run
