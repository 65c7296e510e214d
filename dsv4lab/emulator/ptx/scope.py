"""Names inside a function: registers, variables and labels of nested blocks, each found and renamed apart."""

from __future__ import annotations

import re

from dsv4lab.emulator.ptx.declarations import RegisterRange
from dsv4lab.emulator.ptx.nodes import Label, Register, Symbol, Targets

_NUMBERED = re.compile(r"(.*?)(0|[1-9]\d*)")

Named = Register | Symbol | Label | Targets


class RegisterFile:
    """Gives each register of a function its index when it is first used."""

    def __init__(self) -> None:
        self.registers: list[Register] = []

    def new(self, name: str, type_: str) -> Register:
        register = Register(name, type_, len(self.registers))
        self.registers.append(register)
        return register


class Scope:
    """A { } block of a function.

    Args:
        file: of the function.
        parent: the block around it; None for the body of the function.
        suffix: what makes its names differ from those of other blocks, "" for the body.
    """

    def __init__(self, file: RegisterFile, parent: Scope | None = None, suffix: str = "") -> None:
        self.file = file
        self.parent = parent
        self.suffix = suffix
        self.names: dict[str, Named] = {}
        self.labels: dict[str, Label] = {}
        self._ranges: dict[str, RegisterRange] = {}

    def declare_registers(self, declared: RegisterRange) -> None:
        """Raises ValueError if the block has it already."""
        if declared.name in self._ranges:
            raise ValueError(f"register {declared.name} is declared twice")
        self._ranges[declared.name] = declared

    def declare(self, name: str, what: Symbol | Targets) -> None:
        """Raises ValueError if the block has the name already."""
        if name in self.names:
            raise ValueError(f"{name} is declared twice")
        self.names[name] = what

    def label(self, name: str, target: int) -> None:
        """Raises ValueError if the block has the label already."""
        if name in self.labels:
            raise ValueError(f"label {name} stands twice")
        self.labels[name] = Label(name + self.suffix, target)

    def find(self, name: str) -> Named | None:
        """What a name means here: the innermost block that declares it."""
        scope: Scope | None = self
        while scope is not None:
            found = scope.names.get(name) or scope._register(name) or scope.labels.get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None

    def _register(self, name: str) -> Register | None:
        declared = self._ranges.get(name)
        if declared is None or declared.count is not None:
            numbered = _NUMBERED.fullmatch(name)
            declared = self._ranges.get(numbered[1]) if numbered else None
            if declared is None or declared.count is None or int(numbered[2]) >= declared.count:
                return None
        register = self.file.new(name + self.suffix, declared.type)
        self.names[name] = register
        return register
