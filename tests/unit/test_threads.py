"""One OpenMP runtime, shared with torch, that obeys torch.set_num_threads."""

import subprocess
import sys

import pytest

from moesaic.backends import cpu

if cpu.extension is None:
    pytest.skip("no C++ extension in this install", allow_module_level=True)

ONE_RUNTIME = """
import re, torch, moesaic
from moesaic.backends import cpu
runtime = re.compile(r"/lib(gomp|omp|iomp5)\\b[^/]*$")
files = {line.split()[-1] for line in open("/proc/self/maps") if runtime.search(line)}
assert len(files) == 1, files
torch.set_num_threads(3)
assert cpu.extension.max_threads() == 3, cpu.extension.max_threads()
"""

OBEYS = """
import os, torch, moesaic
threads = lambda: len(os.listdir("/proc/self/task"))
x, w = torch.randn(64, 256), torch.randn(256, 256)
torch.set_num_threads(1)
packed = moesaic.pack_weight(w)
before = threads()
moesaic.quant_linear(x, packed, backend="cpu")
assert threads() == before, "an op started threads although torch asked for one"
torch.set_num_threads(3)
moesaic.quant_linear(x, packed, backend="cpu")
assert threads() == before + 2, (before, threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("code", [ONE_RUNTIME, OBEYS], ids=["one-runtime", "obeys-torch"])
def test_openmp_is_shared_with_torch(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
