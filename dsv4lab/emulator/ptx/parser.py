"""Parse a PTX module."""

from __future__ import annotations

from collections.abc import Iterator

from dsv4lab.emulator.ptx import declarations
from dsv4lab.emulator.ptx.body import Body
from dsv4lab.emulator.ptx.cursor import Cursor
from dsv4lab.emulator.ptx.declarations import LINKAGES, SPACES
from dsv4lab.emulator.ptx.lexer import Tokens
from dsv4lab.emulator.ptx.nodes import Function, Module, Symbol, Variable

# Performance directives of a function, and how many integers each takes at least and at most.
_DIRECTIVES = {
    "reqntid": (1, 3),
    "maxntid": (1, 3),
    "reqnctapercluster": (1, 3),
    "minnctapersm": (1, 1),
    "maxnctapersm": (1, 1),
    "maxclusterrank": (1, 1),
    "maxnreg": (1, 1),
    "explicitcluster": (0, 0),
    "blocksareclusters": (0, 0),
    "noreturn": (0, 0),
}
_THREE = ("reqntid", "maxntid", "reqnctapercluster")


def parse(source: str) -> Module:
    """Parse the text of a PTX module.

    Args:
        source: PTX as a compiler prints it.
    Returns:
        The module, with every name resolved.
    Raises:
        PtxError: for anything that cannot be read, with its line.
    """
    # Some compilers hand PTX over as a C string.
    return _Parser(Cursor(Tokens(source.rstrip("\0")))).module()


class _Parser:
    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.symbols: dict[str, Symbol] = {}
        self.globals: list[Variable] = []
        self.functions: list[Function] = []

    def module(self) -> Module:
        cursor = self.cursor
        version, target, address_size = self._header()
        while cursor.kind != "end":
            if cursor.take(".section"):
                cursor.next()
                cursor.skip_block()
            elif cursor.take(".pragma"):
                cursor.skip_statement()
            else:
                self._declaration()
        return Module(version, target, address_size, tuple(self.functions), tuple(self.globals))

    def _header(self) -> tuple[tuple[int, int], tuple[str, ...], int]:
        cursor = self.cursor
        cursor.expect(".version")
        major, dot, minor = cursor.next().partition(".")
        if not (dot and major.isdigit() and minor.isdigit()):
            cursor.at -= 1
            raise cursor.expected("a version such as 8.8")
        cursor.expect(".target")
        target = [cursor.word("a target")]
        while cursor.take(","):
            target.append(cursor.word("a target"))
        size = cursor.integer() if cursor.take(".address_size") else 32
        if size != 64:
            raise cursor.error(f"only 64-bit addresses are supported, got .address_size {size}")
        return (int(major), int(minor)), tuple(target), size

    def _declaration(self) -> None:
        cursor = self.cursor
        linkage = cursor.next()[1:] if cursor.text[1:] in LINKAGES and cursor.text[0] == "." else ""
        if cursor.text in (".entry", ".func"):
            self._function(linkage)
        elif cursor.text.startswith(".") and cursor.text[1:] in SPACES:
            for variable in declarations.variables(cursor, cursor.next()[1:], linkage):
                self.globals.append(variable)
                self.symbols[variable.name] = Symbol(variable.name, variable.space)
        else:
            raise cursor.expected("a declaration")

    def _function(self, linkage: str) -> None:
        cursor, line = self.cursor, self.cursor.line
        kind = cursor.next()[1:]
        results = declarations.parameters(cursor) if cursor.text == "(" else ()
        name = cursor.word("the name of a function")
        parameters = declarations.parameters(cursor) if cursor.text == "(" else ()
        directives = dict(self._directives())
        self.symbols[name] = Symbol(name, "func")
        body = Body(self.cursor, self.symbols, (*results, *parameters))
        defined = not cursor.take(";")
        instructions = body.read() if defined else ()
        self.functions.append(
            Function(
                name, kind, parameters, results, tuple(body.file.registers), tuple(body.variables),
                instructions, body.labels, directives, linkage, line, defined,
            )
        )  # fmt: skip

    def _directives(self) -> Iterator[tuple[str, tuple[int | str, ...]]]:
        cursor = self.cursor
        while cursor.text.startswith("."):
            name = cursor.text[1:]
            if name == "pragma":
                cursor.next()
                yield name, (cursor.next().strip('"'),)
                cursor.expect(";")
                continue
            if name not in _DIRECTIVES:
                raise cursor.expected("a directive of a function")
            least, most = _DIRECTIVES[name]
            cursor.next()
            values = cursor.integers() if most else ()
            if not least <= len(values) <= most:
                raise cursor.error(f".{name} takes at most {most} values, got {values}")
            yield name, values + (1,) * (3 - len(values)) if name in _THREE else values
