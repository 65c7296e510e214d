"""What the tests of kernels share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dsv4lab.emulator import device


@pytest.fixture(scope="session")
def cases():
    """The module gemm_cases beside this file."""
    path = Path(__file__).with_name("gemm_cases.py")
    spec = importlib.util.spec_from_file_location("gemm_cases", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def b200():
    """An emulated B200 with all checks, for all tests of a file: every kernel is compiled once."""
    with device("sm_100a") as gpu:
        yield gpu
