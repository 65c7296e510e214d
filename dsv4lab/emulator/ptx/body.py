"""The body of a function: nested blocks, declarations, labels and instructions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dsv4lab.emulator.ptx import declarations
from dsv4lab.emulator.ptx.cursor import Cursor
from dsv4lab.emulator.ptx.declarations import SPACES
from dsv4lab.emulator.ptx.nodes import Instruction, Label, PtxError, Symbol, Targets, Variable
from dsv4lab.emulator.ptx.operands import instruction
from dsv4lab.emulator.ptx.scope import RegisterFile, Scope


class Body:
    """Reads { ... } in two passes: declarations, labels and where instructions are; then the instructions.

    A branch may name a label further down, so that operands can be read only when all labels are known.
    """

    def __init__(self, cursor: Cursor, symbols: dict[str, Symbol], parameters: tuple[Variable, ...]) -> None:
        self.cursor = cursor
        self.symbols = symbols
        self.file = RegisterFile()
        self.variables: list[Variable] = []
        self.labels: dict[str, int] = {}
        self.scope = Scope(self.file)
        self._found: list[tuple[int, Scope]] = []
        self._tables: list[tuple[str, Scope, int]] = []
        self._suffixes: dict[int, int] = {}
        for parameter in parameters:
            if parameter.space == "reg":
                self.scope.declare_registers(declarations.RegisterRange(parameter.name, parameter.type, None))
            else:
                self.scope.declare(parameter.name, Symbol(parameter.name, "param"))

    def read(self) -> tuple[Instruction, ...]:
        cursor = self.cursor
        cursor.expect("{")
        while self.scope is not None:
            self._statement()
        end = cursor.at
        self._read_tables()
        instructions = tuple(self._instruction(at, scope) for at, scope in self._found)
        cursor.at = end
        return instructions

    def _statement(self) -> None:
        cursor, text = self.cursor, self.cursor.text
        if text == "{":
            suffix = self._suffix(cursor.line)
            cursor.next()
            self.scope = Scope(self.file, self.scope, suffix)
        elif text == "}":
            cursor.next()
            self.scope = self.scope.parent
        elif text.startswith("."):
            self._directive()
        elif cursor.kind == "word" and cursor.texts[cursor.at + 1] == ":":
            self._label()
        elif cursor.kind == "word" or text == "@":
            self._found.append((cursor.at, self.scope))
            self._to_semicolon()
        elif not cursor.take(";"):
            raise cursor.expected("an instruction")

    def _suffix(self, line: int) -> str:
        count = self._suffixes[line] = self._suffixes.get(line, 0) + 1
        return f"@{line}" if count == 1 else f"@{line}.{count}"

    def _to_semicolon(self) -> None:
        cursor = self.cursor
        try:
            end = cursor.texts.index(";", cursor.at)
        except ValueError:
            raise cursor.error("no ';' ends this instruction") from None
        cursor.at = end + 1

    @contextmanager
    def _named_error(self) -> Iterator[None]:
        at = self.cursor.at
        try:
            yield
        except ValueError as error:
            if isinstance(error, PtxError):
                raise
            self.cursor.at = at
            raise self.cursor.error(str(error)) from None

    def _label(self) -> None:
        cursor = self.cursor
        name = cursor.text
        with self._named_error():
            if cursor.texts[cursor.at + 2] == ".branchtargets":
                self._tables.append((name, self.scope, cursor.at + 3))
                cursor.skip_statement()
            elif cursor.texts[cursor.at + 2] in (".callprototype", ".calltargets"):
                self.scope.declare(name, Symbol(name, "prototype"))
                cursor.skip_statement()
            else:
                self.scope.label(name, len(self._found))
                self.labels[name + self.scope.suffix] = len(self._found)
                cursor.at += 2

    def _directive(self) -> None:
        cursor, text = self.cursor, self.cursor.text
        if text == ".pragma":
            cursor.skip_statement()
            return
        with self._named_error():
            if cursor.take(".reg"):
                for declared in declarations.registers(cursor):
                    self.scope.declare_registers(declared)
            elif text[1:] in SPACES:
                cursor.next()
                for variable in declarations.variables(cursor, text[1:]):
                    self._variable(variable)
            else:
                raise cursor.expected("a directive of a function's body")

    def _variable(self, variable: Variable) -> None:
        renamed = replace(variable, name=variable.name + self.scope.suffix)
        self.scope.declare(variable.name, Symbol(renamed.name, variable.space))
        self.variables.append(renamed)

    def _read_tables(self) -> None:
        cursor = self.cursor
        for name, scope, at in self._tables:
            cursor.at = at
            targets = []
            while not cursor.take(";"):
                if targets:
                    cursor.expect(",")
                targets.append(self._target(scope))
            with self._named_error():
                scope.declare(name, Targets(name + scope.suffix, tuple(targets)))

    def _target(self, scope: Scope) -> int:
        label = scope.find(self.cursor.text)
        if not isinstance(label, Label):
            raise self.cursor.expected("a label")
        self.cursor.next()
        return label.target

    def _instruction(self, at: int, scope: Scope) -> Instruction:
        self.cursor.at = at
        return instruction(self.cursor, scope, self.symbols)
