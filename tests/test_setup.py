"""Set-up by make, with stand-ins for python and pip: what is installed when, and what a failure leaves."""

from __future__ import annotations

import os
import re
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

FAKE_PYTHON = """#!/bin/sh
# Stands for the interpreter and for the one of the environment it makes; logs what pip is asked for.
case "$*" in
  *"venv --clear"*) for last; do :; done; mkdir -p "$last/bin"
    cp "$0" "$last/bin/python"; echo "venv" >> "$LOG" ;;
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
    """Runs `make setup` on stand-ins in a copy of its files; returns what pip saw and stderr."""
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


without_gpu = pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU"
)


def _age(folder: Path) -> None:
    """Put the last set-up a minute back: files made within one tick of the clock are equally new to make."""
    now = time.time()
    for name in ("pyproject.toml", "constraints.txt", ".ci/setup"):
        os.utime(folder / name, (now - 120, now - 120))
    os.utime(folder / ".venv/.complete", (now - 60, now - 60))


@without_gpu
def test_setup_takes_the_cpu_build_first_and_runs_once(workshop):
    log, _ = workshop()
    assert re.findall("torch==.*", log) == ["torch==2.13.0+cpu"] and "venv" in log and "-e .[test]" in log
    assert workshop()[0] == ""
    _age(workshop.folder)
    (workshop.folder / "pyproject.toml").touch()
    log, _ = workshop()
    assert "-e .[test]" in log and "venv" not in log


@without_gpu
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


def test_the_torch_it_installs_is_one_that_pyproject_allows():
    version = re.search(r"^torch_version=(\S+)$", (ROOT / ".ci/setup").read_text(), re.M)[1]
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = [r for r in map(Requirement, listed) if r.name == "torch"]
    assert torch.specifier.contains(version)


def test_continuous_integration_runs_the_tests_then_the_browser():
    text = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert re.search(
        r"^make test\n.*^if .ci/chromium --install; then make test-browser \|\| make test-browser",
        text,
        re.M | re.S,
    )


def test_a_browser_is_named_or_found_or_missed(tmp_path):
    def find(**variables):
        run = subprocess.run(
            [ROOT / ".ci/chromium"], env={"PATH": f"{tmp_path}", **variables}, capture_output=True, text=True
        )
        return run.returncode, run.stdout.strip(), run.stderr

    for name, code in (("chromium", 0), ("other", 0), ("snap", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    assert find() == (0, str(tmp_path / "chromium"), "")
    assert find(CHROMIUM=str(tmp_path / "other")) == (0, str(tmp_path / "other"), "")
    for missing in ("/nowhere/chrome", str(tmp_path / "snap")):
        code, out, message = find(CHROMIUM=missing)
        assert code == 1 and not out and f"no Chromium at {missing}: install it" in message
