"""The package as it is installed: what importing it costs, and files that must agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED_IN_CONDA = {"torch", "nvidia-cutlass-dsl"}
DISASSEMBLER = "nvidia-cuda-nvdisasm"  # the one package of NVIDIA's that is the same on every machine
CONDA_NAMES = {"matplotlib-base": "matplotlib"}


def python(code: str, **options) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return run.stdout


def test_importing_is_quick_and_pulls_in_no_heavy_package():
    heavy = "{'cutlass', 'matplotlib', 'transformers', 'IPython', 'ipywidgets'}"
    names = "[getattr(dsv4lab, name) for name in dsv4lab.__all__]"
    assert python(f"import dsv4lab, sys; {names}; print({heavy} & set(sys.modules))").strip() == "set()"
    start = time.perf_counter()
    python("import dsv4lab")
    assert time.perf_counter() - start < 3


def test_public_names_all_exist():
    import dsv4lab

    for name in dsv4lab.__all__:
        assert getattr(dsv4lab, name) is not None and name in dir(dsv4lab)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dsv4lab.nothing  # noqa: B018


def test_every_package_is_listed():
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "dsv4lab").rglob("__init__.py")}
    found = {".".join(f.parts) for f in folders} | {"dsv4lab.kernels"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_kernels_are_imported_as_part_of_the_package_alone(tmp_path):
    """Outside the repository no top-level `kernels` may shadow the PyPI package of that name."""
    code = (
        "import dsv4lab.kernels as k, importlib.util as u; print(k.__file__); "
        "s = u.find_spec('kernels'); print(s.origin if s else None)"
    )
    ours, other = python(code, cwd=tmp_path).splitlines()
    assert Path(ours).parent == ROOT / "kernels" and not other.startswith(str(ROOT / "kernels"))


def requirements(*extras: str) -> dict[str, SpecifierSet]:
    optional = PROJECT["project"]["optional-dependencies"]
    listed = [*PROJECT["project"]["dependencies"], *(r for e in ("test", *extras) for r in optional[e])]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, listed)}


def conda_requirements() -> dict[str, SpecifierSet]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry for entry in listed if isinstance(entry, dict))["pip"]
    assert "-e ." in pip
    names = [entry for entry in [*listed, *pip] if isinstance(entry, str) and not entry.startswith("-e")]
    found = map(Requirement, names)
    return {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): r.specifier for r in found}


def test_conda_environment_asks_for_what_pyproject_asks_for():
    ours, conda = requirements(), conda_requirements()
    assert set(conda) - {"python", "pip"} == set(ours)
    assert conda["python"].contains("3.11") and PROJECT["project"]["requires-python"] == ">=3.11"
    for name in set(ours) - PINNED_IN_CONDA:
        assert conda[name] == ours[name], name
    for name in PINNED_IN_CONDA:
        (pin,) = conda[name]
        assert pin.operator == "==" and ours[name].contains(pin.version), name


def test_ranges_are_bounded_and_the_compiler_is_pinned():
    for name, specifier in requirements("browser").items():
        operators = {s.operator for s in specifier}
        assert operators == {"=="} if name == "nvidia-cutlass-dsl" else operators == {">=", "<"}, name
    assert requirements()["torch"] == SpecifierSet(">=2.11,<2.14")


def test_constraints_lie_within_the_ranges():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    for name, specifier in requirements("browser").items():
        if name not in PINNED_IN_CONDA:
            assert specifier.contains(pinned[name]), name
    assert [name for name in pinned if re.match("torch$|nvidia-|cuda-", name)] == [DISASSEMBLER]


# ---- notebooks that need hardware


def test_a_notebook_that_needs_hardware_is_skipped_with_a_reason(tmp_path):
    cell = {
        "cell_type": "code",
        "source": "raise SystemError",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    metadata = {
        "dsv4lab": {"needs": ["reference", "sm_90a", "sm_100a"]},
        "kernelspec": {"name": "python3", "display_name": "p"},
    }
    notebook = {"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "needs.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        tmp_path,
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "1 skipped" in run.stdout, run.stdout
    # No GPU is both.
    assert re.search(r"needs sm_\d+a: \w", run.stdout), run.stdout


# ---- Binder


def test_binder_gets_the_package_and_a_torch_and_python_that_it_allows():
    python_version = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python_version)
    text = (ROOT / "binder" / "requirements.txt").read_text()
    index, torch, package = (line for line in text.splitlines() if line[0] != "#")
    assert index.startswith("--extra-index-url https://download.pytorch.org/") and package == "-e ."
    setup = re.search(r"^torch_version=(\S+)$", (ROOT / ".ci/setup").read_text(), re.M)[1]
    assert torch == f"torch=={setup}+cpu"
