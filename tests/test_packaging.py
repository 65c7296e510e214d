"""The package as it is installed: what importing it costs, and files that must agree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED_IN_CONDA = {"torch", "nvidia-cutlass-dsl"}
CONDA_NAMES = {"matplotlib-base": "matplotlib"}


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout


def test_importing_is_quick_and_pulls_in_no_heavy_package():
    heavy = "{'cutlass', 'matplotlib', 'transformers', 'IPython', 'ipywidgets'}"
    everything = f"import dsv4lab, sys; [getattr(dsv4lab, n) for n in dsv4lab.__all__]; print({heavy} & set(sys.modules))"
    assert python(everything).strip() == "set()"
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


def test_kernels_are_one_package_only():
    import dsv4lab.kernels

    assert Path(dsv4lab.kernels.__file__).parent == ROOT / "kernels"
    assert "kernels" not in sys.modules


def requirements() -> dict[str, SpecifierSet]:
    listed = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, listed)}


def conda_requirements() -> dict[str, SpecifierSet]:
    yaml = pytest.importorskip("yaml")
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
    for name, specifier in requirements().items():
        operators = {s.operator for s in specifier}
        assert operators == {"=="} if name == "nvidia-cutlass-dsl" else operators == {">=", "<"}, name
    assert requirements()["torch"] == SpecifierSet(">=2.11,<2.14")


def test_constraints_lie_within_the_ranges():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    for name, specifier in requirements().items():
        if name not in PINNED_IN_CONDA:
            assert specifier.contains(pinned[name]), name
    assert not [name for name in pinned if re.match("torch$|nvidia-|cuda-", name)]


def test_setup_script_installs_a_torch_that_pyproject_allows():
    version = re.search(r"^torch_version=(\S+)$", (ROOT / ".ci/setup").read_text(), re.M)[1]
    assert requirements()["torch"].contains(version)


# ---- set-up, with stand-ins for python and pip --------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
# Stands for the interpreter and for the one of the environment it makes; logs what pip is asked for.
case "$*" in
  *"venv --clear"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; echo "venv" >> "$LOG" ;;
  *"pip --version"*) ;;
  *"pip install"*) shift 3; echo "pip $*" >> "$LOG"
    for word in $REFUSED; do case "$*" in *"$word"*) exit 1 ;; esac; done
    case "$*" in *-e*) [ -z "$KILLED" ] || kill -9 $PPID ;; esac ;;
  -) exit 1 ;;
  --version) echo Python 3.12.0 ;;
esac
"""


@pytest.fixture
def workshop(tmp_path):
    """A copy of the set-up's files and a function that runs `make setup` on stand-ins; returns what pip saw."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/setup").write_text((ROOT / ".ci/setup").read_text())
    (tmp_path / ".ci/setup").chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").write_text(FAKE_PYTHON)
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit ${NO_GPU:-1}\n")
    (tools / "uname").write_text("#!/bin/sh\necho Linux\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    log = tmp_path / "log"

    def make(check=True, refused="", killed="", **variables):
        log.write_text("")
        environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "LOG": str(log), "REFUSED": refused,
                       "KILLED": killed, **variables}  # fmt: skip
        for name in ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "TORCH_INDEX", "VIRTUAL_ENV"):
            if name not in variables:
                environment.pop(name, None)
        run = subprocess.run(["make", "setup"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (run.returncode == 0) == check, run.stderr
        return log.read_text(), run.stderr

    make.folder = tmp_path
    return make


pytestmark_gpu = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")


@pytestmark_gpu
def test_setup_takes_the_cpu_build_first_and_runs_once(workshop):
    log, _ = workshop()
    assert re.findall("torch==.*", log) == ["torch==2.13.0+cpu"] and "venv" in log and "-e .[test]" in log
    assert workshop()[0] == ""
    (workshop.folder / "pyproject.toml").touch()
    log, _ = workshop()
    assert "-e .[test]" in log and "venv" not in log


@pytestmark_gpu
def test_setup_looks_at_pytorchs_index_next_and_says_when_it_takes_cuda(workshop):
    log, message = workshop(refused="+cpu")
    asked = [line for line in log.splitlines() if "torch==" in line]
    assert "download.pytorch.org/whl/cpu" in asked[1] and asked[2].endswith("torch==2.13.0")
    assert "gigabytes of CUDA" in message


def test_setup_with_a_gpu_takes_the_default_build(workshop):
    log, _ = workshop(NO_GPU="0")
    assert re.findall("torch==.*", log) == ["torch==2.13.0"]


def test_setup_obeys_torch_index(workshop):
    log, _ = workshop(TORCH_INDEX="https://example.org/simple")
    assert "torch==2.13.0 --index-url https://example.org/simple" in log and "+cpu" not in log


def test_a_failed_setup_is_not_taken_for_finished(workshop):
    _, message = workshop(check=False, refused="-e")
    assert "pip could not install" in message
    log, _ = workshop()
    assert "-e .[test]" in log and "venv" not in log


def test_a_killed_setup_starts_from_an_empty_environment(workshop):
    workshop(check=False, killed="1")
    log, _ = workshop()
    assert "venv" in log and "-e .[test]" in log


def test_setup_without_a_new_enough_python_says_so(workshop):
    old = workshop.folder / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    _, message = workshop(check=False, PYTHON=str(old))
    assert "is not a Python of 3.11 or newer" in message


# ---- notebooks that need hardware ---------------------------------------------------------------------------------


def test_a_notebook_that_needs_hardware_is_skipped_with_a_reason(tmp_path):
    cell = {"cell_type": "code", "source": "raise SystemError", "metadata": {}, "outputs": [], "execution_count": None}
    metadata = {"dsv4lab": {"needs": ["reference", "emulator"]}, "kernelspec": {"name": "python3", "display_name": "p"}}
    notebook = {"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "needs.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "--nbmake", "-rs", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "1 skipped" in run.stdout, run.stdout
    assert "needs emulator: the emulator is not written yet" in run.stdout
