"""Build moesaic: the pure-Python package, the Triton rooms under kernels/, and the CPU extension.

torch is never needed to build.  MOESAIC_NO_CPP=1 leaves the C++ extension out; every op is then
served by the reference (or Triton on a GPU).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# Each room of kernels/ is mapped by itself: mapping kernels/ whole breaks editable installs, and a
# kernels/__init__.py would shadow the Hugging Face package of that name.
ROOMS = {
    f"moesaic.kernels.{init.parent.name}": f"kernels/{init.parent.name}"
    for init in sorted(ROOT.glob("kernels/*/__init__.py"))
}


class CMakeBuild(build_ext):
    """Configure and build csrc/ with CMake, then put the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if not (compiler or shutil.which("clang++")):
            raise CompileError(
                "moesaic: no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one "
                "(Debian: apt-get install g++), or set MOESAIC_NO_CPP=1 for the pure-Python "
                "package, whose ops run on the PyTorch reference."
            )
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # A kept folder makes rebuilds incremental (make build); pip's own builds start clean,
        # because CMake remembers tools of the isolated environment, which is gone the next time.
        kept = os.environ.get("MOESAIC_BUILD_DIR")
        with tempfile.TemporaryDirectory(prefix="moesaic-") as fresh:
            self.cmake(Path(kept or fresh).resolve() / "cmake", output, pybind11.get_cmake_dir())

    def cmake(self, build: Path, output: Path, pybind11_dir: str) -> None:
        """Configure and build in the folder ``build``; the module goes to ``output``."""
        ninja = ["-GNinja"] if shutil.which("ninja") else []
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), *ninja,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DMOESAIC_OUTPUT_DIR={output.parent}",
            f"-DMOESAIC_OUTPUT_NAME={output.name}",
            *os.environ.get("MOESAIC_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = str(os.cpu_count() or 2)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(
    packages=[*find_packages("python"), *ROOMS],
    package_dir={"": "python", **ROOMS},
    ext_modules=[] if os.environ.get("MOESAIC_NO_CPP") == "1" else [Extension("moesaic._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
