"""The instruction set as a table: what each PTX opcode does, as a function on NumPy lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv4lab.emulator.errors import EmulatorError
from dsv4lab.emulator.ptx import Instruction, Operand

Typed = tuple[tuple[Operand, str], ...]


class UnsupportedInstruction(EmulatorError, NotImplementedError):
    """An instruction, or a form of one, that the emulator does not execute."""


@dataclass(frozen=True, slots=True)
class Pure:
    """An instruction whose results depend on its operands alone.

    Args:
        function: of the reads; returns one value for each write (a tuple if there are several). Values are
            arrays that broadcast to (rows, 32); lanes that do not execute hold garbage.
        reads: source operands, each with the type that the function takes it as.
        writes: destinations, each with the type of the value.
    """

    function: Callable[..., Any]
    reads: Typed
    writes: Typed


@dataclass(frozen=True, slots=True)
class Effect:
    """An instruction that touches memory or other lanes.

    Args:
        function: of (batch, mask, *reads); the reads and the mask (rows, 32).
        reads: as of Pure.
        writes: as of Pure.
    """

    function: Callable[..., Any]
    reads: Typed = ()
    writes: Typed = ()


@dataclass(frozen=True, slots=True)
class Wait(Effect):
    """An Effect that may park rows, which then execute it again once woken."""


Action = Pure | Effect | Wait
Builder = Callable[[Instruction], Action]

_BUILDERS: dict[str, Builder] = {}


def instruction(*ops: str) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes that begin with one of `ops`, "st" or "st.async"; the longest counts."""

    def register(builder: Builder) -> Builder:
        for op in ops:
            if op in _BUILDERS:
                raise ValueError(f"two builders for {op}")
            _BUILDERS[op] = builder
        return builder

    return register


def unsupported(ins: Instruction, why: str = "") -> UnsupportedInstruction:
    """The error for an instruction that is not covered."""
    return UnsupportedInstruction(f"{ins.opcode} is not emulated{': ' + why if why else ''}")


def build(ins: Instruction) -> Action:
    """What an instruction does. Raises UnsupportedInstruction."""
    parts = (ins.op, *ins.modifiers)
    for length in range(len(parts), 0, -1):
        builder = _BUILDERS.get(".".join(parts[:length]))
        if builder is not None:
            return builder(ins)
    raise unsupported(ins)


def covered() -> tuple[str, ...]:
    """What the opcodes that have a builder begin with."""
    return tuple(sorted(_BUILDERS))
