"""Blocks of PTX as Python functions: one call on NumPy arrays for each instruction.

The function of a block loads the registers it reads for all rows of a batch, passes values from one
instruction to the next as local variables, and stores the registers that are read later. It comes in two
forms: one for batches with all lanes, which assigns registers, and one that stores only the lanes there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, at_instruction
from dsv4lab.emulator.isa.registry import Action, Pure
from dsv4lab.emulator.lane_types import DTYPES, bit_width, constant, narrow, register_class, widen
from dsv4lab.emulator.program import Block, Program
from dsv4lab.emulator.ptx import (
    Immediate,
    Instruction,
    Memory,
    Not,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
)


def compile_block(program: Program, block: Block, full: bool) -> Any:
    """The Python function of a block: of (machine, batch), returns the guard of its branch or None."""
    place = 0 if full else 1
    if block.compiled[place] is None:
        block.compiled[place] = _Writer(program, block, full).compile()
    return block.compiled[place]


def _lanes(value: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A value for every lane of every row."""
    return value if value.shape[:2] == shape else np.broadcast_to(value, shape + value.shape[2:])


def _select(guard: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(guard if new.ndim == 2 else guard[..., None], new, old)


class _Value:
    """A local variable of the function being written.

    Attributes:
        name: of the variable.
        dtype: of its array.
        roots: registers whose storage it may share.
        views: other variables with the same bits, by dtype.
    """

    __slots__ = ("dtype", "name", "roots", "views")

    def __init__(self, name: str, dtype: np.dtype, roots: frozenset[int] = frozenset()) -> None:
        self.name, self.dtype, self.roots = name, dtype, roots
        self.views = {dtype: name}


class _Writer:
    """Writes the function of one block."""

    def __init__(self, program: Program, block: Block, full: bool) -> None:
        self.program, self.block, self.full = program, block, full
        self.text = ["def block(m, b):", " s = b.index; R = m.registers; k = b.mask; shape = k.shape"]
        self.origin: list[Instruction | None] = [None, None]
        self.names: dict[str, Any] = {
            "narrow": narrow, "widen": widen, "lanes": _lanes, "select": _select, "i8": np.int64,
        }  # fmt: skip
        self.held: dict[int, _Value] = {}
        self.written: dict[int, None] = {}
        self.current: Instruction | None = None
        self.serial = 0

    def compile(self) -> Any:
        for ins, action in self.block.body:
            self.current = ins
            try:
                self.instruction(ins, action)
            except EmulatorError as error:
                raise at_instruction(error, ins) from None
        self.finish()
        code = compile("\n".join(self.text), f"<{self.program.kernel} block {self.block.number}>", "exec")
        exec(code, self.names)
        function = self.names["block"]
        self.program.lines[function.__code__] = self.origin
        return function

    def emit(self, line: str) -> None:
        self.text.append(" " + line)
        self.origin.append(self.current)

    def name(self, prefix: str = "v") -> str:
        self.serial += 1
        return f"{prefix}{self.serial}"

    def known(self, thing: Any, prefix: str) -> str:
        """A name under which the function sees an object."""
        name = self.name(prefix)
        self.names[name] = thing
        return name

    def instruction(self, ins: Instruction, action: Action) -> None:
        if self.moved(ins):
            return
        guard = self.guard(ins)
        reads = [self.read(operand, type_) for operand, type_ in action.reads]
        roots = frozenset().union(*(value.roots for value in reads))
        names = [value.name for value in reads]
        if not isinstance(action, Pure):
            mask = f"k & {guard}" if guard else "k"
            names = ["b", mask, *(f"lanes({name}, shape)" for name in names)]
        if isinstance(action.function, np.ufunc):
            roots = frozenset()
        results = [self.name() for _ in action.writes]
        call = f"{self.known(action.function, 'f')}({', '.join(names)})"
        self.emit(f"{', '.join(results)} = {call}" if results else call)
        for result, (operand, type_) in zip(results, action.writes, strict=True):
            self.write(operand, type_, result, roots, guard)

    def moved(self, ins: Instruction) -> bool:
        """A plain move gives the value another name."""
        if ins.op != "mov" or ins.guard or not all(isinstance(o, Register) for o in ins.operands):
            return False
        target, source = ins.operands
        if register_class(target.type) != register_class(source.type):
            return False
        self.held[target.index] = self.load(source)
        self.written[target.index] = None
        return True

    def guard(self, ins: Instruction) -> str | None:
        if ins.guard is None:
            return None
        name = self.load(ins.guard.register).name
        if not ins.guard.negated:
            return name
        negated = self.name()
        self.emit(f"{negated} = ~{name}")
        return negated

    def load(self, register: Register) -> _Value:
        """The register's value as it is stored."""
        value = self.held.get(register.index)
        if value is None:
            name = self.name()
            self.emit(f"{name} = R[{register.index}][s]")
            dtype = DTYPES[register_class(register.type)]
            value = self.held[register.index] = _Value(name, dtype, frozenset([register.index]))
        return value

    def read(self, operand: Operand, type_: str) -> _Value:
        if isinstance(operand, Register):
            return self.typed(self.load(operand), type_, register_class(operand.type))
        if isinstance(operand, Not):
            name = self.name()
            self.emit(f"{name} = ~{self.load(operand.register).name}")
            return _Value(name, DTYPES["pred"])
        if isinstance(operand, Immediate):
            return _Value(self.known(_immediate(operand, type_), "c"), DTYPES[type_])
        if isinstance(operand, Special):
            return self.computed(
                f"m.special({operand.name!r}, b)", "b64" if "64" in operand.name else "b32", type_
            )
        if isinstance(operand, Symbol):
            return self.symbol(operand, type_)
        if isinstance(operand, Memory):
            return self.address(operand)
        raise EmulatorError(f"an operand of kind {type(operand).__name__} cannot be read as {type_}")

    def computed(self, expression: str, have: str, type_: str) -> _Value:
        name = self.name()
        self.emit(f"{name} = {expression}")
        return self.typed(_Value(name, DTYPES[have]), type_, have)

    def typed(self, value: _Value, type_: str, storage: str) -> _Value:
        """A stored value as the type that an instruction takes it as."""
        if (type_ == "pred") != (storage == "pred") or (type_ == "b128") != (storage == "b128"):
            raise EmulatorError(f"a {storage} register cannot be read as {type_}")
        dtype = DTYPES[type_]
        if dtype not in value.views:
            have = value.dtype.itemsize
            if type_ == "address" and have < 8:
                conversion = f"{value.name}.astype(i8)"
            elif dtype.itemsize == have:
                conversion = f"{value.name}.view({self.known(dtype, 't')})"
            elif dtype.itemsize < have:
                conversion = f"narrow({value.name}, {self.known(dtype, 't')})"
            else:
                raise EmulatorError(f"a {storage} register is too narrow to be read as {type_}")
            name = self.name()
            self.emit(f"{name} = {conversion}")
            value.views[dtype] = name
        return _Value(value.views[dtype], dtype, value.roots)

    def symbol(self, symbol: Symbol, type_: str) -> _Value:
        program = self.program
        if symbol.space == "shared":
            offset = self.known(np.uint32(program.shared[symbol.name] + symbol.offset), "c")
            own = self.computed(f"m.own_shared[s] + {offset}", "b32", "b32")
            return own if type_ in ("b32", "u32") else self.widened(own, type_)
        if symbol.space == "param" and symbol.name in program.parameters:
            offset = program.parameters[symbol.name].offset + symbol.offset
            return self.computed(f"m.parameter_address({offset})", "b64", type_)
        if symbol.space in ("local", "param"):
            address = program.local[symbol.name] + symbol.offset
        elif symbol.name in program.addresses:
            address = program.addresses[symbol.name] + symbol.offset
        else:
            raise EmulatorError(f"the {symbol.space} symbol {symbol.name} has no address")
        return _Value(self.known(constant(address, type_), "c"), DTYPES[type_])

    def widened(self, value: _Value, type_: str) -> _Value:
        name = self.name()
        self.emit(f"{name} = {value.name}.astype({self.known(DTYPES[type_], 't')})")
        return _Value(name, DTYPES[type_])

    def address(self, memory: Memory) -> _Value:
        base = self.read(memory.base, "address")
        if not memory.offset:
            return base
        name = self.name()
        self.emit(f"{name} = {base.name} + {memory.offset}")
        return _Value(name, DTYPES["address"])

    def write(
        self, operand: Operand, type_: str, name: str, roots: frozenset[int], guard: str | None
    ) -> None:
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise EmulatorError(f"an operand of kind {type(operand).__name__} cannot be written")
        storage = DTYPES[register_class(operand.type)]
        value = _Value(name, DTYPES[type_], roots)
        if value.dtype.itemsize != storage.itemsize:
            wide = self.name()
            self.emit(f"{wide} = widen({name}, {self.known(storage, 't')})")
            value = _Value(wide, storage)
        if guard:
            kind = register_class(operand.type)
            raw, old = (self.typed(v, kind, kind).name for v in (value, self.load(operand)))
            chosen = self.name()
            self.emit(f"{chosen} = select({guard}, {raw}, {old})")
            value = _Value(chosen, storage)
        self.held[operand.index] = value
        self.written[operand.index] = None

    def finish(self) -> None:
        """Store what is read later, and return the guard of the branch."""
        self.current = self.block.end
        end = self.block.end
        result = None
        if end is not None and end.op == "brx":
            index, guard = self.read(end.operands[0], "u32").name, self.guard(end)
            result = self.name()
            self.emit(f"{result} = {index}.astype(i8)")
            if guard:
                self.emit(f"{result} = select({guard}, {result}, {self.known(constant(-1, 's64'), 'c')})")
        elif end is not None and end.guard:
            result = self.guard(end)
        stored = [index for index in self.written if self.block.live >> index & 1]
        registers = self.program.function.registers
        values = [(index, self.raw(index, registers[index], stored)) for index in stored]
        for index, name in values:
            store = f"R[{index}][s] = {name}" if self.full else f"b.put(R[{index}], {name})"
            if self.block.waits:
                # A row that is parked will need its operands again, one of which this may be.
                store = f"b.put_rest(R[{index}], {name}) if b.parked else b.put(R[{index}], {name})"
            self.emit(store)
        if result:
            self.emit(f"return lanes({result}, shape)")

    def raw(self, index: int, register: Register, stored: list[int]) -> str:
        """The variable to store into a register; a copy if it lies in one that is stored too."""
        value = self.held[index]
        kind = register_class(register.type)
        name = self.typed(value, kind, kind).name
        if value.roots.intersection(stored):
            copied = self.name()
            self.emit(f"{copied} = {name}.copy()")
            return copied
        return name


def _immediate(operand: Immediate, type_: str) -> np.ndarray:
    dtype = DTYPES[type_]
    if operand.type == "int" or bit_width("b64" if type_ == "address" else type_) == _width(operand):
        return constant(operand.bits, type_)
    if dtype.kind != "f":
        raise EmulatorError(f"a constant of type {operand.type} cannot be read as {type_}")
    return np.array([[operand.value]], dtype)


def _width(operand: Immediate) -> int:
    return {"f32": 32, "f64": 64}[operand.type]
