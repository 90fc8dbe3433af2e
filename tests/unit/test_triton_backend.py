"""The triton backend where nothing can be launched: it says why, and imports Triton late."""

import os
import subprocess
import sys

import pytest
import torch

import moesaic
from moesaic.formats import MXFP4

pytest.importorskip("triton")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_importing_moesaic_does_not_import_triton():
    done = run("import sys, moesaic; sys.exit('triton' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_cpu_tensors_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = moesaic.quantize(torch.zeros(8, 64), MXFP4)
    with pytest.raises(NotImplementedError, match=r"CPU tensors need TRITON_INTERPRET=1"):
        moesaic.pack_weight(weight, backend="triton")


def test_cpu_tensors_are_served_interpreted_when_asked_for():
    code = """
import torch, moesaic
weight = moesaic.quantize(torch.ones(8, 64), moesaic.MXFP4)
with moesaic.use_backend("triton"):
    y = moesaic.quant_linear(torch.ones(2, 64), moesaic.pack_weight(weight))
print(y.tolist() == [[64.0] * 8] * 2)
x = torch.ones(2, 64)
print("-> triton" in moesaic.explain("quant_linear", x, moesaic.pack_weight(weight)))
"""
    done = run(code, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_the_guard_needs_a_process_of_its_own():
    done = run("from moesaic.testing import interpreter; interpreter.install()")
    assert "RuntimeError" in done.stderr and "TRITON_INTERPRET" in done.stderr
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'\n"
    late += "from moesaic.testing import interpreter; interpreter.install()"
    done = run(late, TRITON_INTERPRET="0")
    assert "RuntimeError" in done.stderr, done.stderr
