"""The comparison with an H200 that data/emulator keeps: all of it agrees, and is of this emulator still."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dsv4lab.emulator import ptx
from dsv4lab.emulator.isa import registry

FOLDER = Path(__file__).parents[2] / "data" / "emulator"


@pytest.fixture(scope="module")
def instructions():
    """data/emulator/instructions.py."""
    spec = importlib.util.spec_from_file_location("emulator_instructions", FOLDER / "instructions.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    with (FOLDER / "h200.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_agrees_and_says_where_it_is_from(rows):
    for row in rows:
        assert row["passed"] == "True", row
        assert row["kind"] in ("approx", "bound") or row["differing"] == "0", row
    for field in ("gpu", "driver", "torch", "cutlass", "date"):
        assert len({row[field] for row in rows}) == 1 and rows[0][field]
    assert "H200" in rows[0]["gpu"]


def test_the_readme_counts_what_is_there(rows, instructions):
    text = (FOLDER / "README.md").read_text()
    forms = sum(trial.kind == "bits" for trial in instructions.trials())
    assert f"{len(rows)} comparisons" in text and f"{forms} instruction forms" in text


def test_each_instruction_form_was_compared(rows, instructions):
    trials = Counter(trial.text.split()[0] for trial in instructions.trials())
    compared = Counter(row["what"] for row in rows)
    assert not trials - compared


def test_each_instruction_form_is_emulated(instructions):
    """That it was so when the GPU was asked is not enough."""
    for trial in instructions.trials():
        (function,) = ptx.parse(instructions.module([trial], "sm_90a")).functions
        for ins in function.instructions:
            if ins.op != "ret":
                registry.build(ins)


def test_a_difference_is_noticed(instructions):
    """The same operands through another instruction."""
    trial = instructions.Trial("add.s32 {d}, {a}, {b}", "s32", ("s32", "s32"))
    other = instructions.Trial("add.sat.s32 {d}, {a}, {b}", "s32", ("s32", "s32"))
    (first,), (second,) = (instructions.emulate([t], "sm_90a", 3) for t in (trial, other))
    a, b = (x.view(np.int32).astype(np.int64) for x in instructions.inputs(trial, 3))
    assert ((first != second) == (np.abs(a + b + 0.5) > 2**31)).all() and (first != second).any()
