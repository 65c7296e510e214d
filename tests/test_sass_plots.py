"""Figures and tables about machine code: what is drawn is what was counted."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from dsv4lab.kernels.sass import Instruction

from dsv4lab import plots
from dsv4lab.plots.sass import PURPOSES, REST, purpose


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


def code(*opcodes: str) -> list[Instruction]:
    return [Instruction(16 * i, "", opcode, f"R{i},R0") for i, opcode in enumerate(opcodes)]


def row(kernel: str, **changes) -> SimpleNamespace:
    values = {"threads": 192, "registers": 96, "shared_bytes": 2000, "stages": 4, "spills": 0}
    return SimpleNamespace(kernel=kernel, instructions=900, **(values | changes))


def test_each_opcode_has_one_purpose():
    listed = [name for names in PURPOSES.values() for name in names]
    assert len(listed) == len(set(listed))
    assert purpose("UTCOMMA") == "tensor cores" and purpose("UIADD3") == REST


def test_instructions_are_counted_by_purpose():
    counts = plots.by_purpose(code("UTMALDG.2D", "UTMALDG.3D", "NOP", "UMOV", "F2FP.SATFINITE.E2M1.F32"))
    assert counts == {what: 0 for what in (*PURPOSES, REST)} | {"TMA": 2, "conversions": 1, REST: 1}


def test_bars_are_as_long_as_the_code():
    (axes,) = drawn(plots.instruction_mix({"a": code("UMOV", "UMOV", "LDTM"), "b": code("BRA", "NOP")})).axes
    ends = {}
    for patch in axes.patches:
        ends[round(patch.get_y() + patch.get_height() / 2)] = patch.get_x() + patch.get_width()
    assert ends == {0: 3, 1: 1}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in axes.texts] == [" 3", " 1"]
    legend = [t.get_text() for t in axes.get_legend().get_texts()]
    assert legend == ["sums from tensor memory", REST]


def test_a_listing_may_leave_out():
    whole = plots.listing(code("UMOV", "UTCCP.T.S", "LDL.64"), caption="All.")
    assert len(whole.rows) == 3 and whole.caption == "All."
    (line,) = plots.listing(code("UMOV", "LDL.64"), ("LDL",)).rows
    assert line == ("0x0010", "", "LDL.64", "R1, R0", "load from local memory")


def test_the_summary_has_the_ends_of_ranges():
    rows = [row("gemm"), row("gemm", registers=80, stages=None), row("swizzle", stages=None, spills=2)]
    table = plots.kernel_summary(rows)
    assert table.rows == [
        ("gemm", 2, "192", "80 to 96", "2,000", "4", "900", 0),
        ("swizzle", 1, "192", "96", "2,000", "", "900", 2),
    ]


def test_registers_are_drawn_below_what_an_sm_has():
    (axes,) = drawn(plots.registers([row("gemm"), row("swizzle", threads=1024, registers=64)])).axes
    limits, points = axes.lines[:3], axes.lines[3:]
    for line, ctas in zip(limits, (1, 2, 4), strict=True):
        assert line.get_xdata() * line.get_ydata() * ctas == pytest.approx(65536)
    drawn_at = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in points]
    assert drawn_at == [[(192, 96)], [(1024, 64)]]


def test_the_model_is_called_one():
    case = SimpleNamespace(kind="linear", size="1x64x128")
    cost = SimpleNamespace(case=case, memory_seconds=2e-6, tensor_seconds=5e-7)
    picture = drawn(plots.model_times([cost]))
    assert picture.caption.startswith("A model, not a measurement")
    assert sorted(patch.get_width() for patch in picture.axes[0].patches) == pytest.approx([0.5, 2])
