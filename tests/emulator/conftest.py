"""The kernels that the emulator's tests share; CuTe DSL reads a kernel's source, so they are in files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernels():
    """The module launch_kernels beside this file."""
    return _module("launch_kernels")


@pytest.fixture(scope="session")
def ptx_kernels():
    """The module ptx_kernels beside this file."""
    return _module("ptx_kernels")


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
