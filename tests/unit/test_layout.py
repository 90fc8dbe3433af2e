"""Meta-tests: the same room on every floor, and nothing that the layout forbids."""

import subprocess
import sys
from pathlib import Path

import pytest

import moesaic
from moesaic import registry

ROOT = Path(__file__).resolve().parents[2]


def test_no_package_that_shadows_another():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's `kernels`"
    assert not (ROOT / "kernels/triton").exists(), "it would shadow `triton` for scripts there"


@pytest.mark.parametrize("room", registry.ROOMS)
def test_every_room_is_on_every_floor(room):
    package = ROOT / "python/moesaic"
    for floor in (
        "ops",
        "reference",
        "testing/cases",
        *(f"backends/{b}" for b in registry.BACKENDS),
    ):
        assert (package / floor / f"{room}.py").exists() or (package / floor / room).is_dir()
    assert (ROOT / f"csrc/include/moesaic/{room}.h").exists()
    assert (ROOT / f"csrc/cpu/{room}").is_dir()
    assert (ROOT / f"csrc/bindings/{room}.cc").exists()


def test_every_op_has_a_reference_and_a_public_door():
    for name, op in registry.ops().items():
        if not name.startswith("test_"):
            assert "reference" in op.implementations, name
    for name in moesaic.__all__:
        assert hasattr(moesaic, name), name
        assert getattr(moesaic, name) is not None


def test_public_functions_are_documented():
    for name in moesaic.__all__:
        thing = getattr(moesaic, name)
        if callable(thing):
            assert thing.__doc__ and len(thing.__doc__) > 40, name


def test_importing_moesaic_imports_nothing_heavy():
    code = (
        "import sys, moesaic; "
        "heavy = {'transformers', 'triton', 'gguf', 'hypothesis', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    # torch itself may import triton when it is installed: compare with a bare `import torch`.
    bare = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('triton' in sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if bare == "True":
        code = code.replace("'triton', ", "")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_isa_flags_reach_shared_code():
    text = (ROOT / "csrc/CMakeLists.txt").read_text()
    assert "-march=native" not in text
    shared = text.split("add_library(moesaic_flags")[1].split("string(TOLOWER")[0]
    assert "-mavx" not in shared and "-mfma" not in shared
