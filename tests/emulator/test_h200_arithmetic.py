"""What an NVIDIA H200 gave for 1,375 forms of arithmetic, logic and conversion, on 128 lanes each.

Recorded on 2026-11-21 with driver 580.159.04: for each form a kernel of loads, the instruction and a store,
which ptxas 13.0 compiled for sm_90a. Half of the operands are pairs of special values (zeros, limits, NaN,
infinities, subnormal numbers), half are random. Left out are approximate functions, and
cvt.rna.satfinite.tf32, which turns NaN into numbers there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).with_name("h200_arithmetic.npz")) as file:
        return dict(file)


def execute(lanes, opcode, target, sources, inputs):
    """The instruction on registers named by their class: h0, r1, ..."""
    letters = {"b8": "o", "b16": "h", "b32": "r", "b64": "w", "pred": "p"}
    names, values = [], {}
    for i, source in enumerate(sources.split()):
        kind, _, key = source.partition(":")
        name = f"{letters[kind]}{i}"
        names.append(name)
        values[name] = inputs[key] & 1 == 1 if kind == "pred" else inputs[key]
    written = "p7|p8" if target == "pred2" else f"{letters[target]}8"
    result = lanes.execute(f"{opcode} {written}, {', '.join(names)}", **values)
    if target == "pred2":
        return result[0] + 2 * result[1].astype(np.uint64)
    return result.astype(np.uint64) & (0xFF if target == "b8" else 0xFFFFFFFFFFFFFFFF)


def test_every_form_gives_the_bits_of_an_h200(lanes, recorded):
    inputs = dict(zip(recorded["names"].tolist(), recorded["inputs"], strict=True))
    wrong = []
    forms = zip(
        recorded["opcodes"], recorded["targets"], recorded["sources"], recorded["results"], strict=True
    )
    for opcode, target, sources, expected in forms:
        found = execute(lanes, str(opcode), str(target), str(sources), inputs)
        different = np.nonzero(found != expected)[0]
        if len(different):
            i = different[0]
            operands = [hex(inputs[s.partition(":")[2]][i]) for s in str(sources).split()]
            wrong.append(
                f"{opcode} {operands}: {found[i]:#x}, not {expected[i]:#x}, and {len(different)} lanes"
            )
    assert not wrong, "\n".join(wrong)


def test_it_covers_the_families(recorded):
    first = {str(opcode).split(".")[0] for opcode in recorded["opcodes"]}
    assert len(recorded["opcodes"]) > 1300
    assert {"add", "mad", "fma", "cvt", "setp", "set", "selp", "bfe", "prmt", "dp4a", "div", "sqrt"} <= first
