"""The integer decoders, on every code."""

import pytest
import torch
import triton
import triton.language as tl
from moesaic.kernels.common import codecs, math

from moesaic.formats import e8m0_values, element_values
from moesaic.testing import interpreter
from moesaic.testing.interpreter import checked

interpreter.install()


@triton.jit
def decode_all(out, CODEC: tl.constexpr):
    code = tl.arange(0, 256).to(tl.uint8)
    if CODEC == "e2m1":
        value = codecs.e2m1_to_bf16(code & 15).to(tl.float32)
    elif CODEC == "e8m0":
        value = codecs.e8m0_to_bf16(code).to(tl.float32)
    elif CODEC == "e4m3":
        value = codecs.e4m3_to_fp32(code)
    else:
        value = codecs.e5m2_to_fp32(code)
    tl.store(out + tl.arange(0, 256), value)


@triton.jit
def apply(x, out, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, math.tanh(value) if FUNCTION == "tanh" else math.log1p(value))


def expected(codec):
    codes = torch.arange(256).to(torch.uint8)
    if codec == "e2m1":
        return element_values("e2m1")[codes.long() & 15]
    if codec == "e8m0":
        return e8m0_values()
    dtype = torch.float8_e4m3fn if codec == "e4m3" else torch.float8_e5m2
    return codes.view(dtype).float()


@pytest.mark.parametrize("codec", ["e2m1", "e8m0", "e4m3", "e5m2"])
def test_every_code(codec):
    out = torch.empty(256)
    with checked():
        decode_all[(1,)](out, codec)
    want = expected(codec)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(
        out.nan_to_num(0.0, torch.inf, -torch.inf), want.nan_to_num(0.0, torch.inf, -torch.inf)
    )
    signs = ~want.isnan()
    assert torch.equal(out.signbit()[signs], want.signbit()[signs])


@pytest.mark.parametrize("function", ["tanh", "log1p"])
def test_functions_keep_their_digits_towards_zero(function):
    x = torch.cat([torch.logspace(-30, 0, 4096 - 64), torch.linspace(0.4, 0.6, 64)]).clamp(max=1.0)
    if function == "tanh":
        x = torch.cat([x, -x, x * 40, torch.full((4096,), torch.inf)])
    out = torch.empty_like(x)
    with checked():
        apply[(x.numel() // 4096,)](x, out, function, 4096)
    want = getattr(torch, function)(x.double())
    assert ((out - want).abs() <= 2.5 * 2**-23 * want.abs()).all()
