"""DType codes of csrc/include/moesaic/formats.h."""

import torch

DTYPE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.uint8: 5,  # E2M1 pairs; E8M0 scales are code 7 and never ambiguous where they appear
    torch.int8: 6,
    torch.int32: 8,
    torch.int64: 9,
}


def address(tensor: torch.Tensor | None) -> int:
    """data_ptr(), 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()
