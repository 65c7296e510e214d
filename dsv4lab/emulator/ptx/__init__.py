"""Parser for PTX as CuTe DSL compiles it: `parse(text)` gives frozen, resolved nodes."""

from __future__ import annotations

from dsv4lab.emulator.ptx.nodes import (
    Function,
    Group,
    Guard,
    Immediate,
    Instruction,
    Label,
    Memory,
    Module,
    Not,
    Operand,
    Pair,
    PtxError,
    Register,
    Relocation,
    Sink,
    Special,
    Symbol,
    Targets,
    Variable,
    Vector,
)
from dsv4lab.emulator.ptx.parser import parse

__all__ = [
    "Function",
    "Group",
    "Guard",
    "Immediate",
    "Instruction",
    "Label",
    "Memory",
    "Module",
    "Not",
    "Operand",
    "Pair",
    "PtxError",
    "Register",
    "Relocation",
    "Sink",
    "Special",
    "Symbol",
    "Targets",
    "Variable",
    "Vector",
    "parse",
]
