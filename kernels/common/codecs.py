"""Number formats decoded by integer operations, so that one routine serves every chip.

Typed FP8 loads exist from sm_89 on and only for some formats on AMD; bytes and shifts exist
everywhere, under the interpreter too. All decodes are exact, NaN and subnormals included.
"""

import triton
import triton.language as tl


@triton.jit
def e2m1_to_bf16(code):
    """E2M1 codes 0..15 (integer tensor) as bf16: 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.

    The exponent and mantissa bits land in place by one shift and the difference of the biases
    (127 - 1, in bf16's bits 0x3F00); the two codes below 1 have no implicit bit.
    """
    code = code.to(tl.uint16)
    magnitude = code & 7
    bits = tl.where(magnitude == 1, 0x3F00, (magnitude << 6) + 0x3F00)
    bits = tl.where(magnitude == 0, 0, bits).to(tl.uint16)
    return (bits | ((code & 8) << 12)).to(tl.bfloat16, bitcast=True)


@triton.jit
def e8m0_to_bf16(code):
    """E8M0 bytes as bf16: 2^(code - 127), 255 is NaN. Code 0 is bf16's subnormal 2^-127."""
    code = code.to(tl.uint16)
    bits = tl.where(code == 0, 0x0040, tl.where(code == 255, 0x7FC0, code << 7))
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def e4m3_to_fp32(code):
    """E4M3FN bytes as fp32. As fp16 bits, seven places up, they mean 2^-8 of their value."""
    code = code.to(tl.uint16)
    half = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.float16, bitcast=True)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def e5m2_to_fp32(code):
    """E5M2 bytes as fp32: the upper byte of an fp16."""
    return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
