"""A packed weight that was edited or damaged is refused before a kernel trusts its addresses, and
what the doors let through never crashes."""

from dataclasses import replace

import pytest
import torch

import moesaic
from moesaic.backends import cpu

if cpu.extension is None:
    pytest.skip("no C++ extension in this install", allow_module_level=True)

X = torch.randn(3, 128)
ROW = moesaic.pack_weight(moesaic.quantize(torch.randn(64, 128), moesaic.FP8_ROW))
MX = moesaic.pack_weight(moesaic.quantize(torch.randn(64, 128), moesaic.MXFP4))
DAMAGED = [
    (replace(MX, shape=(1 << 22, 128)), "data"),
    (replace(MX, shape=(128, 128)), "data"),
    (replace(MX, data=MX.data[:0]), "data"),
    (replace(MX, scale=None), "scale"),
    (replace(MX, scale=MX.scale[:0]), "scale"),
    (replace(MX, scale=MX.scale.float()), "scale"),
    (replace(MX, scale=MX.scale.to("meta")), "scale"),
    (replace(MX, scale=MX.scale.transpose(-1, -2)), "scale"),
    (replace(MX, poison=torch.empty(0)), "poison"),
    (replace(ROW, row_scale=None), "row_scale"),
    (replace(ROW, row_scale=ROW.row_scale[:1]), "row_scale"),
    (replace(ROW, row_scale=ROW.row_scale.bfloat16()), "row_scale"),
    (replace(ROW, format=MX.format), "data"),
]


@pytest.mark.parametrize(("weight", "field"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_weight_is_refused(weight, field):
    with pytest.raises(ValueError, match=f"packed weight: {field}: expected"):
        moesaic.quant_linear(X, weight, backend="cpu")
    with pytest.raises(ValueError, match=f"packed weight: {field}: expected"):
        moesaic.unpack_weight(weight, backend="cpu")
    assert moesaic.quant_linear(X, MX).shape == (3, 64)


def test_a_weight_that_left_the_cpu_is_refused():
    with pytest.raises((ValueError, NotImplementedError)):
        moesaic.quant_linear(X.to("meta"), MX.to("meta"))


def test_head_dimension_zero_is_refused():
    k = torch.randn(8, 4, 2, 32)
    table, lengths = torch.tensor([[0, 1]]), torch.tensor([5])
    with pytest.raises(ValueError, match="v_cache: expected at least one dimension"):
        moesaic.paged_attention(torch.randn(1, 4, 32), k, k[..., :0], table, lengths)
    with pytest.raises(ValueError, match="k_cache: expected at least one slot, head and dimension"):
        moesaic.paged_attention(torch.randn(1, 4, 0), k[..., :0], k, table, lengths)


def test_a_negation_that_torch_only_noted_is_seen():
    x = torch.complex(X, X).conj().imag
    assert x.is_neg()
    assert torch.equal(moesaic.quant_linear(x, MX), moesaic.quant_linear(-X, MX))
