"""The emulator's README: its example runs, its table is the registry's, and what it names exists."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from dsv4lab.kernels.nvfp4_tile_gemm import nvfp4_tile_gemm

from dsv4lab import emulator, quantize_nvfp4
from dsv4lab.emulator.isa import registry
from dsv4lab.emulator.run import CHECKS

FOLDER = Path(inspect.getfile(emulator)).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, flags=re.DOTALL | re.MULTILINE)
    assert found, f"no section {title}"
    return found[1]


def test_the_example_runs(tmp_path):
    """From a file, since CuTe DSL reads the source of kernels."""
    code = re.search(r"```python\n(.*?)```", section("Use"), flags=re.DOTALL)[1]
    (tmp_path / "example.py").write_text(code)
    run = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("(1, 1, 1) 128 ")


def test_the_table_of_opcodes_is_the_registry():
    """After a change: put into the table what is missing, take out what is not emulated any more."""
    importlib.import_module("dsv4lab.emulator.isa")
    table = [line for line in section("What is covered").splitlines() if line.startswith("| ")][1:]
    listed = [op for line in table for op in re.findall(r"`([^`]+)`", line)]
    assert len(listed) == len(set(listed)), "an opcode is in two families"
    covered = set(registry.covered())
    assert covered - set(listed) == set(), "not in the README"
    assert set(listed) - covered == set(), "in the README, but not emulated"


def test_options_and_checks_are_those_of_device():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.*) \|$", section("Use"), flags=re.MULTILINE)
    parameters = inspect.signature(emulator.device).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "arch"}
    assert {name for name, *_ in rows} == set(defaults)
    for name, default, _ in rows:
        power = re.fullmatch("10([⁰¹²³⁴-⁹]+)", default)
        shown = str(10 ** int(unicodedata.normalize("NFKC", power[1]))) if power else default.strip("`")
        assert shown.replace('"', "'") == repr(defaults[name]), name
    (checks,) = [text for name, _, text in rows if name == "checks"]
    assert all(f"`{check}`" in checks for check in CHECKS)


def test_what_it_names_exists():
    for name in re.findall(r"`(\w+/?)`", section("Where things are")):
        path = FOLDER / name
        assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").exists() or path.is_dir(), (
            name
        )
    for target in re.findall(r"\]\(((?!https?://)[^)#]+)\)", README):
        assert (FOLDER / target).exists(), target


def test_counters_named_there_are_counted():
    """By a kernel that does a bit of everything."""
    a = quantize_nvfp4(torch.randn(128, 256))
    with emulator.device("sm_100a") as gpu:
        nvfp4_tile_gemm(a, a)
    names = re.findall(r"`((?!gpu)[a-z0-9]+\.[a-z0-9_]+)`", section("Counters, trace, time"))
    assert len(names) >= 8
    for name in names:
        assert gpu.counters[name] > 0, name


def test_the_instruction_shown_works():
    """The builder in the section on adding instructions, against Python's own shift."""
    code = re.search(r"```python\n(.*?)```", section("How to add an instruction"), flags=re.DOTALL)[1]
    builders = {}
    names = {"np": np, "Pure": registry.Pure, "instruction": lambda op: lambda b: builders.setdefault(op, b)}
    exec(code, names)
    text = ".version 8.8\n.target sm_100a\n.address_size 64\n.visible .entry k() {\n.reg .b32 %r<4>;\n"
    module = emulator.Module("m", "sm_100a", text + "shl.b32 %r1, %r2, %r3;\nret;\n}")
    ins = module.parsed.functions[0].instructions[0]
    action = builders["shl"](ins)
    values, by = np.array([[3, 0x80000001]], np.uint32), np.array([[4, 1]], np.uint32)
    assert action.function(values, by).tolist() == [[48, 2]]
    assert action.function(values, np.array([[31, 32]], np.uint32)).tolist() == [[0x80000000, 0]]
