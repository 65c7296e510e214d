"""PTX text as tokens, without comments and line directives."""

from __future__ import annotations

import re
from bisect import bisect_right

from dsv4lab.emulator.ptx.nodes import PtxError

# One alternation, tried in this order at each place. `.loc` and `.file` end with their line, not with a
# semicolon, so they go here. A word takes dots and `::` along: ld.global, shared::cta, %tid.x, .reg.
_TOKEN = re.compile(
    r"""
    (?P<skip>   [ \t\r\n]+ | //[^\n]* | /\*.*?\*/ | \.(?:loc|file)\b[^\n]* )
  | (?P<word>   [.%$_A-Za-z] (?: [\w$.] | :: )* )
  | (?P<float>  0[fF][0-9a-fA-F]{8}(?!\w) | 0[dD][0-9a-fA-F]{16}(?!\w)
              | \d+\.\d*(?:[eE][+-]?\d+)? | \d+[eE][+-]?\d+ )
  | (?P<int>    0[xX][0-9a-fA-F]+U?(?!\w) | 0[bB][01]+U?(?!\w) | \d+U?(?!\w) )
  | (?P<string> "[^"\n]*" )
  | (?P<punct>  [{}\[\](),;:@!|+\-=<>] )
    """,
    re.VERBOSE | re.DOTALL,
)


class Tokens:
    """The tokens of a text, as parallel lists that end with an empty one.

    Attributes:
        kinds: "word", "float", "int", "string", "punct" or "end".
        texts: what was written.
        starts: where in the source.
    """

    def __init__(self, source: str) -> None:
        """Raises PtxError for a character that starts no token."""
        self.source = source
        self._lines = [0, *(m.end() for m in re.finditer("\n", source))]
        self.kinds: list[str] = []
        self.texts: list[str] = []
        self.starts: list[int] = []
        self._scan()
        self.kinds.append("end")
        self.texts.append("")
        self.starts.append(len(source))

    def _scan(self) -> None:
        match, place, end = _TOKEN.match, 0, len(self.source)
        while place < end:
            found = match(self.source, place)
            if found is None:
                raise self.error(f"no PTX token starts with {self.source[place]!r}", place)
            kind = found.lastgroup
            if kind != "skip":
                self.kinds.append(kind)
                self.texts.append(found[0])
                self.starts.append(place)
            place = found.end()

    def line(self, start: int) -> int:
        """Number of the line that holds this place of the source, from 1."""
        return bisect_right(self._lines, start)

    def error(self, message: str, start: int) -> PtxError:
        """An error at this place of the source."""
        line = self.line(start)
        return PtxError(message, line, self.source.splitlines()[line - 1] if self.source else "")
