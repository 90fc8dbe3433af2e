"""moesaic: fused MoE, FP8/FP4 quantized matmul and paged attention for PyTorch.

Every op has one definition (``moesaic.reference``, plain PyTorch) and several implementations (C++
SIMD on CPUs, Triton on GPUs) that agree with it.  ``moesaic.explain("op", ...)`` says which one a
call would use and why.
"""

import torch  # noqa: F401  (first: the extension shares the OpenMP runtime that torch loads)

from .formats import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    FP8_ROW,
    FP8_TENSOR,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    PackedWeight,
    QuantFormat,
    QuantTensor,
)
from .ops.attention import (
    apply_sink,
    copy_blocks,
    gather_kv,
    merge_attn_states,
    paged_attention,
    paged_mla_attention,
    reshape_and_cache,
)
from .ops.flash_attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from .ops.matmul import pack_weight, quant_linear, scaled_mm, unpack_weight
from .ops.moe import (
    fused_experts,
    fused_moe,
    fused_topk,
    grouped_mm,
    moe_activation,
    moe_align_block_size,
    moe_permute,
    moe_sort,
    moe_unpermute,
)
from .ops.quant import (
    dequantize,
    fake_quantize,
    quantization_error,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from .registry import explain, implementations, load_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "FP8_BLOCK_1X128",
    "FP8_BLOCK_128X128",
    "FP8_ROW",
    "FP8_TENSOR",
    "INT8",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "PackedWeight",
    "QuantFormat",
    "QuantTensor",
    "__version__",
    "apply_sink",
    "copy_blocks",
    "dequantize",
    "explain",
    "fake_quantize",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "fused_experts",
    "fused_moe",
    "fused_topk",
    "gather_kv",
    "grouped_mm",
    "implementations",
    "merge_attn_states",
    "moe_activation",
    "moe_align_block_size",
    "moe_permute",
    "moe_sort",
    "moe_unpermute",
    "pack_weight",
    "paged_attention",
    "paged_mla_attention",
    "quant_linear",
    "quantization_error",
    "quantize",
    "reshape_and_cache",
    "rms_norm_quantize",
    "scaled_mm",
    "silu_mul_quantize",
    "unpack_weight",
    "use_backend",
]

load_backends()
