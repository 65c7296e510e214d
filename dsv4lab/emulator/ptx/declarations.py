"""Declarations of variables, parameters and registers, with their initialisers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv4lab.emulator.ptx.cursor import Cursor
from dsv4lab.emulator.ptx.nodes import Immediate, Relocation, Variable

SPACES = ("global", "const", "shared", "local", "param")
LINKAGES = ("extern", "visible", "weak", "common")
# Bytes of each type that can be declared; a predicate lives in registers only.
TYPE_BYTES = {
    **{f"{kind}{8 * size}": size for kind in "bsu" for size in (1, 2, 4, 8)},
    "b128": 16,
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "f64": 8,
    "pred": 0,
}


@dataclass(frozen=True, slots=True)
class RegisterRange:
    """`.reg .b32 %r<40>`: registers %r0 to %r39; count None means one register of this very name."""

    name: str
    type: str
    count: int | None


def registers(cursor: Cursor) -> Iterator[RegisterRange]:
    """Read `.reg .type name, name<count>;` from behind `.reg`."""
    type_ = _type(cursor)
    while True:
        name = cursor.word("the name of a register")
        count = None
        if cursor.take("<"):
            count = cursor.integer()
            cursor.expect(">")
        yield RegisterRange(name, type_, count)
        if not cursor.take(","):
            break
    cursor.expect(";")


def variables(cursor: Cursor, space: str, linkage: str = "") -> Iterator[Variable]:
    """Read `.align 16 .b8 a[4] = {...}, b;` from behind the state space."""
    align, type_ = _qualifiers(cursor)
    while True:
        yield _with_initializer(cursor, _declarator(cursor, space, align, type_, linkage))
        if not cursor.take(","):
            break
    cursor.expect(";")


def parameters(cursor: Cursor) -> tuple[Variable, ...]:
    """Read a parenthesised list of `.param` (or `.reg`) parameters, laid out one after the other."""
    found: list[Variable] = []
    end = 0
    cursor.expect("(")
    while not cursor.take(")"):
        if found:
            cursor.expect(",")
        space = cursor.next()
        if space not in (".param", ".reg"):
            cursor.at -= 1
            raise cursor.expected("a parameter")
        align, type_ = _qualifiers(cursor)
        variable = _declarator(cursor, space[1:], align, type_, "")
        offset = -(-end // variable.align) * variable.align
        found.append(replace(variable, offset=offset))
        end = offset + variable.size
    return tuple(found)


def _qualifiers(cursor: Cursor) -> tuple[int | None, str]:
    align = type_ = None
    while cursor.text.startswith("."):
        if cursor.take(".align"):
            align = _alignment(cursor)
        elif cursor.take(".ptr"):  # what follows describes the memory pointed to, not the parameter
            if cursor.text[1:] in SPACES:
                cursor.next()
            if cursor.take(".align"):
                _alignment(cursor)
        elif type_ is None:
            type_ = _type(cursor)
        else:
            raise cursor.expected("a name")
    if type_ is None:
        raise cursor.expected("a type")
    return align, type_


def _alignment(cursor: Cursor) -> int:
    align = cursor.integer()
    if align <= 0 or align & (align - 1):
        cursor.at -= 1
        raise cursor.error(f"an alignment is a power of two, got {align}")
    return align


def _type(cursor: Cursor) -> str:
    type_ = cursor.text[1:]
    if not cursor.text.startswith(".") or type_ not in TYPE_BYTES:
        raise cursor.expected("a type")
    cursor.at += 1
    return type_


def _declarator(cursor: Cursor, space: str, align: int | None, type_: str, linkage: str) -> Variable:
    line, name = cursor.line, cursor.word("the name of a variable")
    if type_ == "pred" and space != "reg":
        cursor.at -= 1
        raise cursor.error("a predicate cannot lie in memory")
    shape = []
    while cursor.take("["):
        shape.append(0 if cursor.text == "]" else cursor.integer())
        cursor.expect("]")
    size = TYPE_BYTES[type_] * math.prod(shape)
    return Variable(name, space, type_, align or max(TYPE_BYTES[type_], 1), tuple(shape), size, line,
                    linkage=linkage)  # fmt: skip


def _with_initializer(cursor: Cursor, variable: Variable) -> Variable:
    if not cursor.take("="):
        return variable
    reader = _Initializer(cursor, TYPE_BYTES[variable.type], variable)
    reader.read(variable.shape)
    outer = math.prod(variable.shape[1:]) * reader.width
    shape = variable.shape
    if shape and shape[0] == 0 and outer:
        shape = (len(reader.bytes) // outer, *shape[1:])
    size = reader.width * math.prod(shape)
    return replace(
        variable,
        shape=shape,
        size=size,
        initializer=bytes(reader.bytes),
        relocations=tuple(reader.relocations),
    )


class _Initializer:
    def __init__(self, cursor: Cursor, width: int, variable: Variable) -> None:
        self.cursor = cursor
        self.width = width
        self.type = variable.type
        self.bytes = bytearray()
        self.relocations: list[Relocation] = []

    def read(self, shape: tuple[int, ...]) -> None:
        """One value, or braces around what the outermost extent holds; short rows end in zeros."""
        if not shape:
            self._value()
            return
        start, row = len(self.bytes), self.width * math.prod(shape[1:])
        self.cursor.expect("{")
        while not self.cursor.take("}"):
            self.read(shape[1:])
            if self.cursor.text != "}":
                self.cursor.expect(",")
        missing = row * shape[0] - (len(self.bytes) - start)
        if shape[0] and missing < 0:
            raise self.cursor.error(f"more initial values than the {shape[0]} elements")
        self.bytes += bytes(max(missing, 0))

    def _value(self) -> None:
        cursor = self.cursor
        if cursor.kind != "word":
            self.bytes += self._encode(cursor.number())
            return
        name, generic = cursor.next(), False
        if name == "generic" and cursor.take("("):
            generic, name = True, cursor.word("a variable")
            cursor.expect(")")
        sign = -1 if cursor.text == "-" else 1
        addend = sign * cursor.integer() if cursor.take("+") or cursor.take("-") else 0
        self.relocations.append(Relocation(len(self.bytes), self.width, name, addend, generic))
        self.bytes += bytes(self.width)

    def _encode(self, number: Immediate) -> bytes:
        if self.type in ("f32", "f64") and number.type != "int":
            return struct.pack("<f" if self.type == "f32" else "<d", number.value)
        if number.type != "int":
            raise self.cursor.error(f"a float cannot initialise {self.type}")
        return (number.bits & ((1 << 8 * self.width) - 1)).to_bytes(self.width, "little")
