"""The vector vocabulary: every instruction set against the scalar one, bit for bit, and the
elementary functions against fp64."""

import pytest
import torch

from moesaic.backends import cpu

if cpu.extension is None:
    pytest.skip("no C++ extension in this install", allow_module_level=True)
_C = cpu.extension

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -2.5,
    1e-45,
    -1e-45,
    1e-39,
    1.1754944e-38,
    3.4e38,
    -3.4e38,
]
SPECIAL += [
    float("inf"),
    float("-inf"),
    float("nan"),
    88.0,
    88.72,
    88.73,
    88.74,
    -87.3,
    -103.9,
    -104.1,
]
SPECIAL += [65504.0, 65519.9, 65520.0, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, 0.6249999, 0.625]
BINARY = ["add", "sub", "mul", "div", "fma", "min", "max", "select"]
UNARY = ["exp", "log", "tanh", "round_even", "sum", "horizontal_max"]


def run(isa, primitive, a, b=None, c=None, out_dtype=torch.float32):
    zeros = torch.zeros(a.numel())
    b, c = (zeros if t is None else t for t in (b, c))
    out = torch.zeros(a.numel(), dtype=out_dtype)
    addresses = [t.data_ptr() for t in (a, b, c, out)]
    _C.simd_selftest(isa, primitive, a.numel(), *addresses)
    return out


def samples(n=4096):
    x = torch.randn(n) * torch.exp2(torch.randint(-40, 40, (n,)).float())
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x


def equal(x, y):
    same = x.view(torch.int32 if x.element_size() == 4 else torch.int16) == y.view(
        torch.int32 if x.element_size() == 4 else torch.int16
    )
    if x.dtype.is_floating_point:
        same |= x.isnan() & y.isnan()
    return bool(same.all())


@pytest.mark.parametrize("isa", [i for i in _C.variants() if i != "scalar"])
@pytest.mark.parametrize("primitive", BINARY + UNARY)
def test_equals_scalar(isa, primitive):
    a, b, c = samples(), samples().roll(7), samples().roll(3)
    assert equal(run(isa, primitive, a, b, c), run("scalar", primitive, a, b, c))


@pytest.mark.parametrize("isa", _C.variants())
def test_all_16_bit_loads(isa):
    codes = torch.arange(-32768, 32768, dtype=torch.int16)
    for primitive, dtype in (("load_bf16", torch.bfloat16), ("load_f16", torch.float16)):
        assert equal(run(isa, primitive, codes), codes.view(dtype).float())


@pytest.mark.parametrize("isa", _C.variants())
def test_16_bit_stores_round_to_nearest_even(isa):
    every = torch.arange(-32768, 32768, dtype=torch.int16)
    for primitive, dtype in (("store_bf16", torch.bfloat16), ("store_f16", torch.float16)):
        exact = every.view(dtype).float()
        x = torch.cat(
            [exact, torch.nextafter(exact, exact + 1), (exact + exact.roll(1)) / 2, samples()]
        )
        got = run(isa, primitive, x, out_dtype=torch.int16).view(dtype)
        assert equal(got, x.to(dtype))


@pytest.mark.parametrize(
    ("primitive", "low", "high", "ulps"),
    [("exp", -87.0, 88.7, 2), ("log", 1e-38, 1e38, 2), ("tanh", -12.0, 12.0, 4)],
)
def test_elementary_functions(primitive, low, high, ulps):
    x = torch.linspace(low, high, 1 << 16)
    if primitive == "log":
        x = torch.exp(torch.linspace(-87, 88, 1 << 16))
    got = run(_C.isa(), primitive, x).double()
    gold = getattr(torch, primitive)(x.double())
    error = (got - gold).abs() / (gold.abs().clamp_min(1e-30) * 2.0**-24 * 2)
    assert error.max() <= ulps, (x[error.argmax()], error.max())


def test_edges_of_exp():
    x = torch.tensor(
        [float("-inf"), -200.0, -104.1, 0.0, 89.0, float("inf"), float("nan"), -100.0] * 2
    )
    got = run(_C.isa(), "exp", x)[:8]
    assert got[:6].tolist() == [0.0, 0.0, 0.0, 1.0, float("inf"), float("inf")]
    assert got[6].isnan()
    assert got[7] == torch.tensor(-100.0, dtype=torch.float64).exp().float()


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match=r"set_isa: name: expected one of auto, .* got 'sse9'"):
        _C.set_isa("sse9")
