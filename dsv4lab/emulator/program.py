"""A kernel made ready to run: its blocks, what each instruction does, which registers outlive a block."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any

from dsv4lab.emulator.control_flow import analyse, branch_targets
from dsv4lab.emulator.errors import EmulatorError, at_instruction
from dsv4lab.emulator.inline import inlined
from dsv4lab.emulator.isa import registry
from dsv4lab.emulator.lane_types import register_class
from dsv4lab.emulator.ptx import (
    Function,
    Instruction,
    Memory,
    Module,
    Not,
    Operand,
    Register,
    Variable,
)

# Shared memory that the system keeps at the start of every CTA's window since sm_90.
RESERVED_SHARED = 1024
# Types whose unsuffixed mul and add may become one fma (PTX ISA, "add", "mul").
_FUSED = {"f32", "f32x2", "f64", "f16", "f16x2", "bf16", "bf16x2"}
_TERMINATORS = ("bra", "brx", "ret", "exit", "trap")


@dataclass(eq=False)
class Block:
    """Instructions that run one after the other, and where control goes then.

    Attributes:
        number: its place in `Program.blocks`.
        body: (instruction, what it does), the branch at the end left out.
        end: that branch, or None where control just runs on.
        targets: numbers of the blocks that its branch may go to; none where lanes end.
        following: the block behind it in the text.
        meeting: block at which lanes that part here meet again, -1 if they never do.
        waits: its one instruction may park rows.
        live: registers that are read after this block.
        compiled: (full, masked) forms of it as Python functions, made when first needed.
    """

    number: int
    body: list[tuple[Instruction, registry.Action]]
    end: Instruction | None
    targets: tuple[int, ...]
    following: int
    meeting: int
    waits: bool
    live: int = 0
    compiled: list[Callable[..., Any] | None] = field(default_factory=lambda: [None, None])

    @property
    def first(self) -> Instruction:
        """Its first instruction."""
        return self.body[0][0] if self.body else self.end

    @property
    def count(self) -> int:
        """Instructions in it."""
        return len(self.body) + (self.end is not None)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How many there are of each opcode."""
        ends = [self.end.opcode] if self.end else []
        return Counter([ins.opcode for ins, _ in self.body] + ends)

    @cached_property
    def fusable(self) -> int:
        """Sums of a product which ptxas may fuse, since neither says how to round; here they never are."""
        products: set[int] = set()
        pairs = 0
        for ins, action in self.body:
            free = not set(ins.modifiers) & {"rn", "rz", "rm", "rp"} and bool(set(ins.modifiers) & _FUSED)
            read = {r for operand, _ in action.reads for r in registers_in(operand)}
            pairs += free and ins.op in ("add", "sub") and bool(read & products)
            written = {o.index for o, _ in action.writes if isinstance(o, Register)}
            products = products | written if free and ins.op == "mul" else products - written
        return pairs


class Program:
    """One kernel of a module, translated.

    Args:
        module: the parsed PTX.
        kernel: name of an `.entry` in it.
        addresses: of the module's variables in global and constant memory, by name.
    Raises:
        UnsupportedInstruction: if it has an instruction that the emulator does not execute.
    """

    def __init__(self, module: Module, kernel: str, addresses: dict[str, int]) -> None:
        self.kernel = kernel
        self.module = module
        self.function = inlined(module, module.function(kernel))
        self.addresses = addresses
        self.lines: dict[CodeType, list[Instruction | None]] = {}
        self.blocks = _blocks(self.function)
        self._kept = _liveness(self.blocks)
        self.shared, self.static_shared, self.dynamic_align = _shared_layout(module, self.function)
        self.local, self.local_bytes = _local_layout(self.function)
        self.parameters = {p.name: p for p in self.function.parameters}

    @cached_property
    def stored(self) -> list[tuple[int, str]]:
        """(index, storage class) of the registers that live from one block to another."""
        registers = self.function.registers
        return [(r.index, register_class(r.type)) for r in registers if self._kept >> r.index & 1]

    @cached_property
    def shared_granularity(self) -> int:
        """Bytes of the smallest access to shared memory that an instruction makes for itself, at most 16."""
        sizes = [
            action.function.shared_bytes
            for block in self.blocks
            for _, action in block.body
            if hasattr(action.function, "shared_bytes")
        ]
        # An mbarrier's 8 bytes are not data, and must not share a cell with what is.
        barriers = any(ins.op == "mbarrier" for block in self.blocks for ins, _ in block.body)
        return min([8 if barriers else 16, *sizes])


def _blocks(function: Function) -> list[Block]:
    graph = analyse(function)
    code = function.instructions
    pieces = [list(_pieces(code, block.start, block.stop)) for block in graph.blocks]
    first, count = [], 0
    for parts in pieces:
        first.append(count)
        count += len(parts)
    number_at = {block.start: first[i] for i, block in enumerate(graph.blocks)}
    blocks = []
    for flow, parts in zip(graph.blocks, pieces, strict=True):
        for body, end in parts:
            targets = tuple(number_at[t] for t in branch_targets(end)) if end else ()
            meeting = -1 if flow.reconvergence is None else first[flow.reconvergence]
            waits = len(body) == 1 and isinstance(body[0][1], registry.Wait)
            blocks.append(Block(len(blocks), body, end, targets, len(blocks) + 1, meeting, waits))
    return blocks


def _pieces(
    code: tuple[Instruction, ...], start: int, stop: int
) -> Iterator[tuple[list[tuple[Instruction, registry.Action]], Instruction | None]]:
    """Parts of a basic block; an instruction that may park rows is a part of its own."""
    body: list[tuple[Instruction, registry.Action]] = []
    for instruction in code[start:stop]:
        if instruction.op in _TERMINATORS:
            yield body, instruction
            return
        try:
            action = registry.build(instruction)
        except EmulatorError as error:
            raise at_instruction(error, instruction) from None
        if isinstance(action, registry.Wait):
            if body:
                yield body, None
            yield [(instruction, action)], None
            body = []
        else:
            body.append((instruction, action))
    if body:
        yield body, None


def registers_in(operand: Operand) -> Iterator[int]:
    """Indices of the registers that reading an operand reads."""
    if isinstance(operand, Register):
        yield operand.index
    elif isinstance(operand, Not):
        yield operand.register.index
    elif isinstance(operand, Memory):
        yield from registers_in(operand.base)


def _liveness(blocks: list[Block]) -> int:
    """Fill in `live` of each block; returns the registers that live from one block to another, or are read
    before they are written. Sets of registers are the bits of Python integers."""
    reads, writes = zip(*(_uses(block) for block in blocks), strict=True)
    entering = list(reads)
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            live = 0
            for successor in _successors(block):
                live |= entering[successor]
            came = reads[block.number] | live & ~writes[block.number]
            changed |= came != entering[block.number]
            block.live, entering[block.number] = live, came
    for block in blocks:
        # A row that is parked runs its block again.
        if block.waits:
            block.live |= entering[block.number]
    return functools.reduce(operator.or_, (block.live for block in blocks), entering[0])


def _uses(block: Block) -> tuple[int, int]:
    """Registers that a block reads before it writes them, and those that it surely writes."""
    reads = writes = 0
    for ins, action in block.body:
        taken = [r for operand, _ in action.reads for r in registers_in(operand)]
        if ins.guard:
            taken.append(ins.guard.register.index)
        for index in taken:
            reads |= 1 << index & ~writes
        for operand, _ in action.writes:
            if isinstance(operand, Register):
                if ins.guard:
                    # Where the guard is false the old value stays, so that it is needed.
                    reads |= 1 << operand.index & ~writes
                writes |= 1 << operand.index
    if block.end:
        ends = [block.end.operands[0]] if block.end.op == "brx" else []
        ends += [block.end.guard.register] if block.end.guard else []
        for operand in ends:
            for index in registers_in(operand):
                reads |= 1 << index & ~writes
    return reads, writes


def _successors(block: Block) -> tuple[int, ...]:
    if block.end is None or (block.end.guard and not block.targets):
        return (block.following,)
    if block.targets and block.end.guard:
        return (*block.targets, block.following)
    return block.targets


def _shared_layout(module: Module, function: Function) -> tuple[dict[str, int], int, int]:
    """Offsets of the shared variables that a kernel uses, bytes of the static ones, alignment of others."""
    names = function.symbols()
    variables = [v for v in (*module.globals, *function.variables) if v.space == "shared" and v.name in names]
    static = [v for v in variables if v.linkage != "extern"]
    offsets, end = _layout(static, RESERVED_SHARED)
    dynamic = [v for v in variables if v.linkage == "extern"]
    align = max((v.align for v in dynamic), default=16)
    start = -(-end // align) * align
    return offsets | {v.name: start for v in dynamic}, end - RESERVED_SHARED, align


def _local_layout(function: Function) -> tuple[dict[str, int], int]:
    """Offset in a lane's local memory of its local variables and of the parameters of its calls."""
    mine = [v for v in function.variables if v.space in ("local", "param")]
    offsets, end = _layout(mine, 0)
    return offsets, -(-end // 16) * 16


def _layout(variables: list[Variable], start: int) -> tuple[dict[str, int], int]:
    offsets = {}
    for variable in variables:
        start = -(-start // variable.align) * variable.align
        offsets[variable.name] = start
        start += variable.size
    return offsets, start
