"""The recipe "a new op" of CONTRIBUTING, followed to the letter in a copy of the sources: four
files and a row make an op that has a door, a definition, contract tests and a place in
`explain`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = '''

def double_it(x):
    """2 x, elementwise.  x: floating [...]; returns the same shape and dtype."""
    return x * 2
'''
DOOR = '''

registry.define(
    "double_it(Tensor x) -> Tensor", room="quant", fake=lambda x: torch.empty_like(x)
)


def double_it(x, *, backend=None):
    """2 x, elementwise.  x: floating [...]; returns the same shape and dtype."""
    _check.tensor("double_it", "x", x, dtypes=(torch.float32, torch.bfloat16))
    return registry.call("double_it", x, backend=backend)
'''
ROW = """

registry.implement("double_it", "reference", registry.by_name("double_it", _quant.double_it))
"""
CASE = """

_cases_before = cases


def cases():
    yield from _cases_before()
    yield Case(
        "newcomer", "quant", "double_it",
        lambda seed: {"x": torch.randn(5, generator=torch.Generator().manual_seed(seed))},
        tags=frozenset({"compile"}),
    )
"""


def append(path, text, needs=()):
    source = path.read_text()
    missing = [line for line in needs if line not in source]
    future = "from __future__ import annotations\n"
    if missing:
        block = "\n".join(missing) + "\n"
        source = source.replace(future, future + block, 1) if future in source else block + source
    path.write_text(source + text)


def test_the_recipe_works(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "python", copy / "python", ignore=shutil.ignore_patterns("*.egg-info"))
    shutil.copytree(ROOT / "tests/contract", copy / "tests/contract")
    shutil.copy(ROOT / "tests/conftest.py", copy / "tests/conftest.py")
    shutil.copy(ROOT / "pyproject.toml", copy)
    package = copy / "python/moesaic"
    append(package / "reference/quant.py", REFERENCE)
    door = ["import torch", "from .. import registry", "from . import _check"]
    append(package / "ops/quant.py", DOOR, door)
    append(
        package / "backends/reference/quant.py",
        ROW,
        ["from ... import registry", "from ...reference import quant as _quant"],
    )
    append(package / "testing/cases/quant.py", CASE, ["import torch"])
    init = package / "__init__.py"
    public = "\nfrom .ops.quant import double_it\n__all__ += ['double_it']\n"
    init.write_text(init.read_text() + public)
    env = {**os.environ, "PYTHONPATH": str(copy / "python")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "double_it"]
    result = subprocess.run(
        [*command, "tests/contract"], cwd=copy, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # values and determinism on the reference, opcheck and compile; the cpu backend skips with a
    # reason
    assert " passed" in result.stdout and "failed" not in result.stdout
    code = "import torch, moesaic; print(moesaic.explain('double_it', torch.ones(2)))"
    text = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "reference yes" in " ".join(text.split())
