"""Selection: order of strength, forced and automatic choice, strict mode, explain, gradients."""

import logging

import pytest
import torch

import moesaic
from moesaic import registry


@pytest.fixture(scope="module")
def op():
    """An op of this test alone: the cpu row serves up to four elements, the reference
    everything."""
    if "test_scale" not in registry._ops:
        registry.define(
            "test_scale(Tensor x, float by) -> Tensor",
            room="quant",
            fake=lambda x, by: torch.empty_like(x),
        )
        registry.implement("test_scale", "reference", lambda x, by: x * by)
        registry.implement(
            "test_scale",
            "cpu",
            lambda x, by: (x * by) + 1000,
            supports=lambda x, by: None if x.numel() <= 4 else "more than 4 elements",
        )
    yield lambda x, by=2.0, backend=None: registry.call("test_scale", x, by, backend=backend)
    registry._ops.pop("test_scale", None)


SMALL, LARGE = torch.ones(3), torch.ones(5)


def test_the_first_backend_that_serves_is_chosen(op):
    assert op(SMALL)[0] == 1002
    assert op(LARGE)[0] == 2


def test_argument_beats_context_beats_environment(op, monkeypatch):
    monkeypatch.setenv("MOESAIC_BACKEND", "reference")
    assert op(SMALL)[0] == 2
    with moesaic.use_backend("cpu"):
        assert op(SMALL)[0] == 1002
        assert op(SMALL, backend="reference")[0] == 2
    assert op(SMALL)[0] == 2
    monkeypatch.setenv("MOESAIC_BACKEND", "auto")
    assert op(SMALL)[0] == 1002


def test_a_forced_backend_that_cannot_serve_says_why(op):
    with pytest.raises(
        NotImplementedError, match=r"'cpu' cannot serve this call: more than 4 elem"
    ):
        op(LARGE, backend="cpu")
    with pytest.raises(NotImplementedError, match="it has no triton implementation"):
        op(LARGE, backend="triton")


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_unknown_backends_are_refused(op, how, monkeypatch):
    expected = "expected one of cpu, triton, reference, got 'cuda'"
    if how == "argument":
        with pytest.raises(ValueError, match=f"backend: {expected}"):
            op(SMALL, backend="cuda")
    elif how == "context":
        with (
            pytest.raises(ValueError, match=f"use_backend: {expected}"),
            moesaic.use_backend("cuda"),
        ):
            pass
    else:
        monkeypatch.setenv("MOESAIC_BACKEND", "cuda")
        with pytest.raises(ValueError, match=f"MOESAIC_BACKEND: {expected}"):
            op(SMALL)


def test_a_fallback_is_logged_once_with_its_reason(op, caplog):
    registry._warned.clear()
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        op(LARGE)
        op(LARGE)
    assert len(caplog.records) == 1
    assert "cpu: more than 4 elements" in caplog.text


def test_strict_mode_makes_the_fallback_an_error(op, monkeypatch):
    monkeypatch.setenv("MOESAIC_STRICT", "1")
    with pytest.raises(NotImplementedError, match="MOESAIC_STRICT=1"):
        op(LARGE)
    assert op(LARGE, backend="reference")[0] == 2


def test_a_context_is_closed_by_an_exception(op):
    with pytest.raises(RuntimeError, match="inside"), moesaic.use_backend("reference"):
        raise RuntimeError("inside")
    assert op(SMALL)[0] == 1002


def test_gradients_go_through_the_reference(op):
    x = SMALL.clone().requires_grad_()
    op(x, 3.0).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0, 3.0]
    with torch.no_grad():
        assert op(x)[0] == 1002


def test_compiles_without_a_graph_break(op):
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="eager")
    assert compiled(SMALL)[0] == 1003


def test_opcheck(op):
    torch.library.opcheck(torch.ops.moesaic.test_scale.default, (SMALL, 2.0))


def test_unknown_ops_are_refused():
    with pytest.raises(ValueError, match=r"explain: name: expected a public op"):
        moesaic.explain("no_such_op")
    with pytest.raises(ValueError, match=r"moesaic: op: expected one of"):
        moesaic.implementations("no_such_op")


def test_explain_computes_nothing_and_names_every_backend():
    text = moesaic.explain("fused_topk", torch.randn(4, 8), 2)
    assert text.startswith("moesaic::fused_topk on cpu:")
    for name in registry.BACKENDS:
        assert name in text
