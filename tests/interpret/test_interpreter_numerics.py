"""Under the guard, Triton's interpreter computes what torch computes."""

import pytest
import torch
import triton
import triton.language as tl

from moesaic.testing import interpreter
from moesaic.testing.interpreter import checked

interpreter.install()


@triton.jit
def cast(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def matmul(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    lhs = tl.load(a + m[:, None] * K + k[None, :])
    rhs = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(lhs, rhs, input_precision=PRECISION))


@triton.jit
def bf16_arithmetic(x, y, total, product, top, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(product + i, a * b + a)
    tl.store(total, tl.sum(a, 0))
    tl.store(top, tl.max(a, 0))


def run_cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    with checked():
        cast[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), 4096)
    return out


def same(a, b):
    return torch.equal(a.float().nan_to_num(1.25e30), b.float().nan_to_num(1.25e30))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_widens_exactly(source):
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(source)
    assert same(run_cast(x, torch.float32), x.float())


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_code_widens_exactly(source):
    x = torch.arange(256).to(torch.uint8).view(source)
    assert same(run_cast(x, torch.float32), x.float())


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp32_rounds_to_nearest_even(target):
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-20, 16, (6000,), generator=generator).float()
    x = torch.randn(6000, generator=generator) * torch.exp2(exponents)
    codes = torch.arange(0, 127 if target.itemsize == 1 else 1 << 15)
    grid = codes.to(torch.uint8 if target.itemsize == 1 else torch.int16).view(target).float()
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([x, ties, -ties])
    x = x[x.isfinite()]
    limit = torch.finfo(target).max
    assert same(run_cast(x, target), x.clamp(-limit, limit).to(target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 32, generator=generator).to(dtype)
    b = torch.randn(32, 16, generator=generator).to(dtype)
    out = torch.empty(16, 16)
    with checked():
        matmul[(1,)](a, b, out, 16, 16, 32, "ieee")
    torch.testing.assert_close(out, (a.double() @ b.double()).float())


def test_dot_of_fp32_is_tf32_unless_told_otherwise():
    a = torch.full((16, 16), 1 + 2.0**-13)
    out = torch.empty(16, 16)
    with checked():
        matmul[(1,)](a, torch.eye(16), out, 16, 16, 16, None)
    assert torch.equal(out, torch.ones(16, 16))


def test_rows_of_a_dot_do_not_depend_on_the_tile_height():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(64, 128, generator=generator), torch.randn(128, 16, generator=generator)
    tall, flat = torch.empty(64, 16), torch.empty(1, 16)
    with checked():
        matmul[(1,)](a, b, tall, 64, 16, 128, "ieee")
        matmul[(1,)](a[:1].contiguous(), b, flat, 1, 16, 128, "ieee")
    assert torch.equal(tall[:1], flat)


def test_bf16_arithmetic_and_reductions():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(64, generator=generator).bfloat16() for _ in range(2))
    total, top = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
    product = torch.empty(64, dtype=torch.bfloat16)
    with checked():
        bf16_arithmetic[(1,)](x, y, total, product, top, 64)
    assert torch.equal(product, x * y + x)
    assert torch.equal(top[0], x.max())
    assert abs(total.float() - x.double().sum()) <= 2**-8 * x.double().sum().abs() + 1e-6
