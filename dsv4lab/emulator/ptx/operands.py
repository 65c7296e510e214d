"""Instructions and every form of operand."""

from __future__ import annotations

import re

from dsv4lab.emulator.ptx.cursor import Cursor
from dsv4lab.emulator.ptx.nodes import (
    Group,
    Guard,
    Immediate,
    Instruction,
    Memory,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from dsv4lab.emulator.ptx.scope import Scope

_AXES = "ntid|tid|nctaid|ctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid"
_SPECIAL = re.compile(
    rf"%(?:(?:{_AXES})\.[xyz]|laneid|warpid|nwarpid|smid|nsmid|gridid|is_explicit_cluster|cluster_ctarank"
    r"|cluster_nctarank|lanemask_(?:eq|le|lt|ge|gt)|clock|clock_hi|clock64|pm\d+(?:_64)?|envreg\d+"
    r"|globaltimer(?:_lo|_hi)?|reserved_smem_offset_(?:begin|end|cap|\d+)|total_smem_size|aggr_smem_size"
    r"|dynamic_smem_size|current_graph_exec)"
)


def instruction(cursor: Cursor, scope: Scope, symbols: dict[str, Symbol]) -> Instruction:
    """Read one instruction with its semicolon.

    Args:
        cursor: at its guard or opcode.
        scope: block it stands in; all of its names are declared.
        symbols: variables and functions of the module.
    Raises:
        PtxError: for what cannot be read.
    """
    return _Reader(cursor, scope, symbols).instruction()


class _Reader:
    def __init__(self, cursor: Cursor, scope: Scope, symbols: dict[str, Symbol]) -> None:
        self.cursor = cursor
        self.scope = scope
        self.symbols = symbols

    def instruction(self) -> Instruction:
        cursor = self.cursor
        start, line = cursor.tokens.starts[cursor.at], cursor.line
        guard = self._guard() if cursor.take("@") else None
        opcode = cursor.word("an opcode")
        op, *modifiers = opcode.split(".")
        operands = []
        while cursor.text != ";":
            # A call's results stand in parentheses and are no more than an operand of their own.
            if operands:
                cursor.expect(",")
            operands.append(self.operand())
        text = " ".join(cursor.tokens.source[start : cursor.tokens.starts[cursor.at]].split())
        cursor.at += 1
        return Instruction(op, tuple(modifiers), opcode, guard, tuple(operands), line, text)

    def _guard(self) -> Guard:
        negated = self.cursor.take("!")
        return Guard(self._predicate(), negated)

    def operand(self) -> Operand:
        cursor = self.cursor
        kind, text = cursor.kind, cursor.text
        if kind == "word":
            return self._named()
        if kind in ("int", "float") or text == "-":
            return cursor.number()
        if text == "[":
            return self._memory()
        if cursor.take("{"):
            return Vector(self._list("}"))
        if cursor.take("("):
            return Group(self._list(")"))
        if cursor.take("!"):
            return Not(self._predicate())
        raise cursor.expected("an operand")

    def _list(self, end: str) -> tuple[Operand, ...]:
        cursor, elements = self.cursor, []
        while not cursor.take(end):
            if elements:
                cursor.expect(",")
            elements.append(self.operand())
        return tuple(elements)

    def _predicate(self) -> Register:
        found = self._single()
        if not isinstance(found, Register) or found.type != "pred":
            self.cursor.at -= 1
            raise self.cursor.expected("a predicate register")
        return found

    def _named(self) -> Operand:
        cursor = self.cursor
        first = self._single()
        if cursor.text == "|" and isinstance(first, Register | Sink):
            cursor.at += 1
            second = self._single() if cursor.kind == "word" else None
            if not isinstance(second, Register | Sink):
                raise cursor.expected("a register")
            return Pair(first, second)
        if isinstance(first, Symbol) and cursor.text in ("+", "-"):
            return Symbol(first.name, first.space, self._offset())
        return first

    def _offset(self) -> int:
        # `+-16` is how a negative offset is printed.
        if self.cursor.take("+"):
            return self.cursor.integer()
        return self.cursor.integer() if self.cursor.text == "-" else 0

    def _single(self) -> Operand:
        name = self.cursor.text
        if name == "_":
            self.cursor.at += 1
            return Sink()
        found = self.scope.find(name) or self.symbols.get(name)
        if found is None and _SPECIAL.fullmatch(name):
            found = Special(name)
        if found is None and name == "WARP_SZ":
            found = Immediate(32)
        if found is None:
            raise self.cursor.error(f"{name} is not declared")
        self.cursor.at += 1
        return found

    def _memory(self) -> Memory:
        cursor = self.cursor
        cursor.expect("[")
        base = self._single() if cursor.kind == "word" else Immediate(cursor.integer())
        if not isinstance(base, Register | Symbol | Immediate):
            cursor.at -= 1
            raise cursor.expected("an address")
        offset = self._offset()
        coordinates = None
        if cursor.take(","):
            cursor.expect("{")
            coordinates = Vector(self._list("}"))
        cursor.expect("]")
        return Memory(base, offset, coordinates)
