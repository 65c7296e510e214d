"""A place in the tokens, and the small things that are read there."""

from __future__ import annotations

import struct

from dsv4lab.emulator.ptx.lexer import Tokens
from dsv4lab.emulator.ptx.nodes import Immediate, PtxError


class Cursor:
    """Reads tokens one after the other.

    Attributes:
        at: index of the next token.
    """

    def __init__(self, tokens: Tokens, at: int = 0) -> None:
        self.tokens = tokens
        self.texts = tokens.texts
        self.kinds = tokens.kinds
        self.at = at

    @property
    def text(self) -> str:
        """The next token, "" at the end."""
        return self.texts[self.at]

    @property
    def kind(self) -> str:
        """Kind of the next token."""
        return self.kinds[self.at]

    @property
    def line(self) -> int:
        """Number of the line of the next token."""
        return self.tokens.line(self.tokens.starts[self.at])

    def error(self, message: str) -> PtxError:
        """An error at the next token."""
        last = self.kinds[self.at] == "end" and self.at > 0  # rather the last line than an empty one
        return self.tokens.error(message, self.tokens.starts[self.at - last])

    def expected(self, what: str) -> PtxError:
        """An error that names what should have come."""
        return self.error(f"expected {what}, got {self.text or 'the end of the text'!r}")

    def next(self) -> str:
        """The next token, and past it."""
        self.at += 1
        return self.texts[self.at - 1]

    def take(self, text: str) -> bool:
        """Go past the next token if it is this one."""
        if self.texts[self.at] != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> None:
        """Go past the next token, which must be this one."""
        if not self.take(text):
            raise self.expected(repr(text))

    def word(self, what: str) -> str:
        """A name that is no directive."""
        if self.kind != "word" or self.text.startswith("."):
            raise self.expected(what)
        return self.next()

    def number(self) -> Immediate:
        """A constant with its sign."""
        negative = self.take("-")
        if self.kind == "int":
            value = integer(self.next())
            return Immediate(-value if negative else value)
        if self.kind != "float":
            raise self.expected("a number")
        return _float(self.next(), negative)

    def integer(self) -> int:
        """A constant that must be an integer."""
        if self.kind != "int" and not (self.text == "-" and self.kinds[self.at + 1] == "int"):
            raise self.expected("an integer")
        return self.number().bits

    def integers(self) -> tuple[int, ...]:
        """Integers with commas between."""
        values = [self.integer()]
        while self.take(","):
            values.append(self.integer())
        return tuple(values)

    def skip_block(self) -> None:
        """Past a { } block, whatever is in it."""
        self.expect("{")
        depth = 1
        while depth:
            if self.kind == "end":
                raise self.expected("'}'")
            text = self.next()
            depth += (text == "{") - (text == "}")

    def skip_statement(self) -> None:
        """Past the next semicolon."""
        while self.text != ";":
            if self.kind == "end" or self.text in "{}":
                raise self.expected("';'")
            self.at += 1
        self.at += 1


def integer(text: str) -> int:
    """Value of an integer literal: decimal, hexadecimal, binary, or octal with a leading 0."""
    digits = text.rstrip("U")
    if len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXbB":
        return int(digits, 8)
    return int(digits, 0)


def _float(text: str, negative: bool) -> Immediate:
    prefix = text[:2].lower()
    if prefix == "0f":
        return Immediate(int(text[2:], 16) ^ (negative << 31), "f32")
    if prefix == "0d":
        return Immediate(int(text[2:], 16) ^ (negative << 63), "f64")
    value = -float(text) if negative else float(text)
    return Immediate(struct.unpack("<Q", struct.pack("<d", value))[0], "f64")
