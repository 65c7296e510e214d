"""What a parsed PTX module is made of: frozen and resolved, each instruction with its line for errors."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from dsv4lab.emulator.errors import EmulatorError


class PtxError(EmulatorError, ValueError):
    """PTX that the emulator cannot read.

    Attributes:
        line: number of the line, from 1.
        text: that line.
    """

    def __init__(self, message: str, line: int, text: str) -> None:
        super().__init__(f"line {line}: {message}: {text.strip()!r}")
        self.line = line
        self.text = text


@dataclass(frozen=True, slots=True)
class Register:
    """A register; registers of an inline-asm block are renamed apart.

    Attributes:
        name: "%r5", or "p@31" for the register p of the block that opens on line 31.
        type: "pred", "b8" to "b128", "u32", "f32", ...
        index: its place in `Function.registers`.
    """

    name: str
    type: str
    index: int


@dataclass(frozen=True, slots=True)
class Special:
    """A read-only special register, "%tid.x"."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant.

    Attributes:
        bits: an integer as written; of a float, its bit pattern.
        type: "int", "f32" (0f...) or "f64" (0d... and decimals).
    """

    bits: int
    type: str = "int"

    @property
    def value(self) -> int | float:
        """The number meant."""
        if self.type == "int":
            return self.bits
        width = "<If" if self.type == "f32" else "<Qd"
        return struct.unpack(f"<{width[2]}", struct.pack(f"<{width[1]}", self.bits))[0]


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, parameter or function, as `mov` takes it.

    Attributes:
        name: as `Variable.name` or `Function.name`; a variable of a block is renamed apart as registers are.
        space: "param", "shared", "global", "const", "local", "func", or "prototype" for a call prototype.
        offset: bytes added to its address.
    """

    name: str
    space: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    """Operands in braces: a vector of registers, coordinates, or nested vectors."""

    elements: tuple[Operand, ...]

    def __len__(self) -> int:
        return len(self.elements)

    def __iter__(self):
        return iter(self.elements)


@dataclass(frozen=True, slots=True)
class Memory:
    """An address in brackets.

    Attributes:
        base: register, symbol (its own offset is 0) or absolute address.
        offset: bytes added to it.
        coordinates: of a tensor operand [base, {c0, c1}], else None.
    """

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """A branch target: the index in `Function.instructions` at which execution goes on."""

    name: str
    target: int


@dataclass(frozen=True, slots=True)
class Targets:
    """A `.branchtargets` list, as brx.idx takes it: indices in `Function.instructions`."""

    name: str
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sink:
    """The bit bucket `_`: a result nobody wants."""


@dataclass(frozen=True, slots=True)
class Not:
    """A negated predicate operand, `!%p1`."""

    register: Register


@dataclass(frozen=True, slots=True)
class Pair:
    """Two results `first|second`, such as the register and predicate of elect.sync and shfl.sync."""

    first: Register | Sink
    second: Register | Sink


@dataclass(frozen=True, slots=True)
class Group:
    """Operands in parentheses: arguments or results of a call."""

    elements: tuple[Operand, ...]


Operand = (
    Register | Special | Immediate | Symbol | Vector | Memory | Label | Targets | Sink | Not | Pair | Group
)


@dataclass(frozen=True, slots=True)
class Guard:
    """The predicate an instruction runs under, `@p` or `@!p`."""

    register: Register
    negated: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        op: first part of the opcode, "ld".
        modifiers: the other parts, ("global", "v4", "b32").
        opcode: all of it, "ld.global.v4.b32".
        guard: None for an instruction that always runs.
        operands: in the order written.
        line: number of its PTX line, from 1.
        text: as written, without the semicolon.
    """

    op: str
    modifiers: tuple[str, ...]
    opcode: str
    guard: Guard | None
    operands: tuple[Operand, ...]
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Relocation:
    """A pointer inside an initialiser, known only when addresses are: symbol + addend at byte `offset`.

    `generic` asks for the generic address, otherwise the one within the symbol's space.
    """

    offset: int
    size: int
    symbol: str
    addend: int
    generic: bool


@dataclass(frozen=True, slots=True)
class Variable:
    """A declared variable or parameter.

    Attributes:
        name: renamed apart if a block declares it.
        space: "global", "const", "shared", "local" or "param".
        type: of an element, "b8", "f32", ...
        align: in bytes.
        shape: extents of an array, outermost first, () of a scalar; an extern array `[]` has extent 0.
        size: in bytes; 0 for the dynamic shared memory `.extern .shared .b8 s[]`.
        offset: of a parameter, bytes from the start of the parameter block, else 0.
        initializer: its bytes, zero where nothing is given; None if it has none.
        relocations: pointers to fill into the initializer.
        linkage: "extern", "visible", "weak", "common" or "".
    """

    name: str
    space: str
    type: str
    align: int
    shape: tuple[int, ...]
    size: int
    line: int
    offset: int = 0
    initializer: bytes | None = None
    relocations: tuple[Relocation, ...] = ()
    linkage: str = ""


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel (`.entry`), a device function (`.func`), or the declaration of one.

    Attributes:
        kind: "entry" or "func".
        parameters: `.param` (or, of a .func, `.reg`) parameters with their offsets in the parameter block.
        results: of a .func.
        registers: those that instructions use, in the order of first use; `Register.index` is the place here.
        variables: declared in the body, blocks included.
        instructions: in order; branches name indices into it.
        labels: name to index of an instruction; may equal len(instructions) at the end.
        directives: performance directives such as {"reqntid": (32, 1, 1), "minnctapersm": (1,)}.
        linkage: "extern", "visible", "weak" or "".
        defined: False for a declaration without body.
    """

    name: str
    kind: str
    parameters: tuple[Variable, ...]
    results: tuple[Variable, ...]
    registers: tuple[Register, ...]
    variables: tuple[Variable, ...]
    instructions: tuple[Instruction, ...] = field(repr=False)
    labels: dict[str, int]
    directives: dict[str, tuple[int | str, ...]]
    linkage: str
    line: int
    defined: bool = True

    def symbols(self) -> set[str]:
        """Names of the variables and functions that its instructions mention."""
        names = set()
        for instruction in self.instructions:
            for operand in instruction.operands:
                base = operand.base if isinstance(operand, Memory) else operand
                if isinstance(base, Symbol):
                    names.add(base.name)
        return names

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter block."""
        return max((p.offset + p.size for p in self.parameters), default=0)


@dataclass(frozen=True, slots=True)
class Module:
    """A parsed PTX module."""

    version: tuple[int, int]
    target: tuple[str, ...]
    address_size: int
    functions: tuple[Function, ...]
    globals: tuple[Variable, ...]

    def function(self, name: str) -> Function:
        """The defined function of this name. Raises KeyError if there is none."""
        for function in self.functions:
            if function.name == name and function.defined:
                return function
        raise KeyError(f"the PTX module defines no function {name}")
