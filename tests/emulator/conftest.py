"""The kernels that the tests of the launch side share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernels():
    """The module launch_kernels beside this file; CuTe DSL reads a kernel's source, so it must be a file."""
    spec = importlib.util.spec_from_file_location(
        "launch_kernels", Path(__file__).with_name("launch_kernels.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
