"""The kernels that the emulator's tests share; CuTe DSL reads a kernel's source, so they are in files."""

from __future__ import annotations

import importlib
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


@pytest.fixture(scope="session")
def gpu_kernels():
    """A function that gives the modules of the folder gpu_kernels by name."""
    folder = Path(__file__).with_name("gpu_kernels")
    if "gpu_kernels" not in sys.modules:
        _load("gpu_kernels", folder / "__init__.py", [str(folder)])
    return lambda name: importlib.import_module(f"gpu_kernels.{name}")


@pytest.fixture(scope="session")
def ptx_kernel():
    """`kernel` of ptx_text beside this file: PTX around the body of a kernel."""
    return _module("ptx_text").kernel


@pytest.fixture(scope="session")
def lanes():
    """The module lanes beside this file."""
    return _module("lanes")


@pytest.fixture(scope="session")
def random_programs():
    """The module random_programs beside this file."""
    return _module("random_programs")


def _module(name: str):
    return _load(name, Path(__file__).with_name(f"{name}.py"))


def _load(name: str, path: Path, folders: list[str] | None = None):
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
