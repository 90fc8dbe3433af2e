"""Installing as a user does: isolated and editable builds without torch at build time, from a copy
of the sources, used from another directory; and the pure-Python install."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(torch.__file__).resolve().parents[1]

USE = """
import sys, torch, moesaic, moesaic.kernels.moe
from moesaic.backends import cpu
assert {root!r} in moesaic.__file__, moesaic.__file__
have = cpu.extension is not None
assert have == {cpp}, have
weights, ids = moesaic.fused_topk(torch.randn(5, 8), 2)
assert ids.shape == (5, 2)
x = torch.randn(3, 64)
w = moesaic.quantize(torch.randn(32, 64), moesaic.MXFP4)
y = moesaic.quant_linear(x, moesaic.pack_weight(w))
want = x @ moesaic.dequantize(w).T
assert torch.allclose(y, want, atol=1e-4), (y - want).abs().max()
print(moesaic.explain("fused_topk", torch.randn(5, 8), 2))
"""


@pytest.fixture
def sources(tmp_path):
    """The tracked files and the new ones that git does not ignore, in a folder of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    copy = tmp_path / "sources"
    for name in listed.stdout.split():
        if (ROOT / name).exists():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.mark.parametrize("kind", ["isolated", "editable", "pure-python"])
def test_install(kind, sources, tmp_path):
    env = tmp_path / "env"
    venv.create(env, with_pip=True)
    python = env / "bin/python"
    flags = ["-e"] if kind == "editable" else []
    settings = {**os.environ, "MOESAIC_NO_CPP": "1" if kind == "pure-python" else "0"}
    settings.pop("PYTHONPATH", None)
    settings.pop("MOESAIC_BUILD_DIR", None)
    # No torch in this environment while it builds: a build that needed it would fail here.
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", *flags, str(sources)],
        check=True, env=settings, timeout=300,
    )  # fmt: skip
    # torch from the environment of the tests, so that it is not downloaded again
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (Path(purelib) / "torch.pth").write_text(str(SITE))
    root = str(sources if kind == "editable" else env)
    code = USE.format(root=root, cpp=kind != "pure-python")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        [python, "-c", code], cwd=elsewhere, env=settings, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_missing_compiler_is_named(sources, tmp_path):
    settings = {k: v for k, v in os.environ.items() if k not in ("CXX", "MOESAIC_NO_CPP")}
    settings["PATH"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=sources, env=settings, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr and "MOESAIC_NO_CPP=1" in result.stderr
