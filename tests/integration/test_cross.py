"""Instruction sets that this machine lacks: the NEON units are compiled for AArch64 and run under
qemu, and must give the bits that the host's units give.  .ci/run installs compiler and emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=str(ROOT / ".venv/bin")) or shutil.which("cmake")
CROSS = "aarch64-linux-gnu-g++"


def build(folder, *flags):
    if CMAKE is None:
        pytest.skip("no cmake")
    options = ["-DMOESAIC_PYTHON=OFF", "-DMOESAIC_TESTS=ON", "-DMOESAIC_WERROR=ON", *flags]
    subprocess.run([CMAKE, "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    done = subprocess.run(
        [CMAKE, "--build", folder, "--parallel", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "csrc/isa_digest"


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"))


def test_host_units_agree_and_compile_without_warnings(host):
    scalar = output(host, "scalar")
    assert scalar.count("\n") > 10
    for isa in output(host, "list").split():
        assert output(host, isa) == scalar, isa


@pytest.mark.skipif(
    shutil.which(CROSS) is None, reason=f"no {CROSS}: apt-get install g++-aarch64-linux-gnu"
)
def test_neon_gives_the_same_bits(host, tmp_path):
    neon = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS}",
    )
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("NEON compiles; no qemu-aarch64 to run it: apt-get install qemu-user")
    run = [emulator, "-L", "/usr/aarch64-linux-gnu", neon]
    assert "neon" in output(*run, "list").split()
    assert output(*run, "neon") == output(host, "scalar")
