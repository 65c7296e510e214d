"""Opcodes that mean integer or floating-point arithmetic, by their type."""

from __future__ import annotations

from dsv4lab.emulator.isa import carry, floating, integer
from dsv4lab.emulator.isa.registry import Action, instruction
from dsv4lab.emulator.ptx import Instruction


@instruction("add", "sub", "mul", "mad", "div", "min", "max", "abs", "neg")
def arithmetic(ins: Instruction) -> Action:
    """Hands on to carry, integer or floating."""
    if "cc" in ins.modifiers:
        return carry.build(ins)
    return (integer if ins.modifiers[-1] in integer.TYPES else floating).build(ins)
