"""Shared by all tests: the seed of a test is printed when it fails; a forced ISA never leaks."""

import zlib

import pytest
import torch

from moesaic.backends import cpu


@pytest.fixture(autouse=True)
def seeded(request):
    """Seed torch from the test's id, so that every failure names a repeatable seed."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    print(f"seed {seed}")
    yield seed


def isas():
    """Instruction sets that this machine runs, best first; empty without the extension."""
    return cpu.extension.variants() if cpu.extension is not None else []


@pytest.fixture
def isa(request):
    """Force the instruction set ``request.param`` for one test."""
    cpu.extension.set_isa(request.param)
    yield request.param
    cpu.extension.set_isa("auto")
