"""Calls of functions with a body, replaced by that body: a kernel then is one flow of control."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace

from dsv4lab.emulator.errors import EmulatorError, at_instruction
from dsv4lab.emulator.ptx import (
    Function,
    Group,
    Guard,
    Instruction,
    Label,
    Memory,
    Module,
    Not,
    Operand,
    Pair,
    Register,
    Symbol,
    Targets,
    Variable,
    Vector,
)


def inlined(module: Module, function: Function) -> Function:
    """A function without calls of functions that the module defines.

    Args:
        module: which defines them.
        function: a kernel.
    Returns:
        The same function if it makes no such call, otherwise one with more registers and variables.
    Raises:
        EmulatorError: for recursion, or a call through a pointer.
    """
    return _inlined(module, function, ())


def _inlined(module: Module, function: Function, callers: tuple[str, ...]) -> Function:
    bodies = {f.name: f for f in module.functions if f.defined and f.kind == "func"}
    calls = [_callee(ins, bodies) for ins in function.instructions]
    if not any(calls):
        return function
    result = _Body(list(function.registers), list(function.variables))
    for ins, name in zip(function.instructions, calls, strict=True):
        result.starts.append(len(result.code))
        if name is None:
            result.code.append((ins, True))
            continue
        if name in (function.name, *callers):
            raise at_instruction(EmulatorError(f"{name} calls itself, which is not emulated"), ins)
        callee = _inlined(module, bodies[name], (*callers, function.name))
        _splice(result, ins, callee)
    result.starts.append(len(result.code))
    code = tuple(_moved(ins, result.starts) if mine else ins for ins, mine in result.code)
    labels = {name: result.starts[index] for name, index in function.labels.items()}
    return replace(
        function,
        registers=tuple(result.registers),
        variables=tuple(result.variables),
        instructions=code,
        labels=labels,
    )


def _callee(ins: Instruction, bodies: dict[str, Function]) -> str | None:
    if ins.op != "call":
        return None
    names = [o.name for o in ins.operands if isinstance(o, Symbol) and o.space == "func"]
    return names[0] if names and names[0] in bodies else None


@dataclass
class _Body:
    """A function being put together: (instruction, whether its branches still count in the old places)."""

    registers: list[Register]
    variables: list[Variable]
    code: list[tuple[Instruction, bool]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def _splice(result: _Body, call: Instruction, callee: Function) -> None:
    """Put the body of a function where it is called."""
    groups = [o.elements for o in call.operands if isinstance(o, Group)]
    results = groups[0] if callee.results else ()
    arguments = groups[-1] if callee.parameters else ()
    copy = _Copy(len(result.registers), f"@{call.line}.{len(result.code)}")
    for declared, given in zip((*callee.results, *callee.parameters), (*results, *arguments), strict=True):
        if not isinstance(given, Symbol):
            why = f"{callee.name} takes {declared.name} in a register, which is not emulated"
            raise at_instruction(EmulatorError(why), call)
        copy.names[declared.name] = given.name
    for variable in callee.variables:
        copy.names[variable.name] = variable.name + copy.suffix
        result.variables.append(replace(variable, name=copy.names[variable.name]))
    result.registers.extend(copy.operand(r) for r in callee.registers)
    first = len(result.code) + (call.guard is not None)
    end = first + len(callee.instructions)
    if call.guard:
        skip = Guard(call.guard.register, not call.guard.negated)
        result.code.append((_branch(call, end, skip), False))
    for ins in callee.instructions:
        if ins.op == "ret":
            guard = ins.guard and copy.guard(ins.guard)
            result.code.append((_branch(ins, end, guard), False))
        else:
            result.code.append((copy.instruction(ins, first), False))


def _branch(like: Instruction, target: int, guard: Guard | None) -> Instruction:
    """A branch in place of another instruction, whose line and text it keeps."""
    return replace(
        like, op="bra", modifiers=(), opcode="bra", guard=guard, operands=(Label("behind the call", target),)
    )


@dataclass
class _Copy:
    """Renames what belongs to a called function, for one call."""

    base: int
    suffix: str
    names: dict[str, str] = field(default_factory=dict)

    def instruction(self, ins: Instruction, first: int) -> Instruction:
        operands = tuple(_shifted(self.operand(o), first) for o in ins.operands)
        return replace(ins, operands=operands, guard=ins.guard and self.guard(ins.guard))

    def guard(self, guard: Guard) -> Guard:
        return Guard(self.operand(guard.register), guard.negated)

    def operand(self, operand: Operand) -> Operand:
        if isinstance(operand, Register):
            return replace(operand, name=operand.name + self.suffix, index=operand.index + self.base)
        if isinstance(operand, Symbol):
            return replace(operand, name=self.names.get(operand.name, operand.name))
        if isinstance(operand, (Vector, Group)):
            return type(operand)(tuple(self.operand(o) for o in operand.elements))
        if isinstance(operand, (Memory, Not, Pair)):
            parts = {f.name: getattr(operand, f.name) for f in dataclasses.fields(operand)}
            return type(operand)(**{k: self.operand(v) if _is_node(v) else v for k, v in parts.items()})
        return operand


def _is_node(value: object) -> bool:
    return dataclasses.is_dataclass(value)


def _shifted(operand: Operand, by: int) -> Operand:
    """A branch target further down."""
    if isinstance(operand, Label):
        return Label(operand.name, operand.target + by)
    if isinstance(operand, Targets):
        return Targets(operand.name, tuple(t + by for t in operand.targets))
    return operand


def _moved(ins: Instruction, starts: list[int]) -> Instruction:
    """An instruction of the calling function, with its branch targets where they are now."""
    if not any(isinstance(o, (Label, Targets)) for o in ins.operands):
        return ins
    operands = []
    for operand in ins.operands:
        if isinstance(operand, Label):
            operand = Label(operand.name, starts[operand.target])
        elif isinstance(operand, Targets):
            operand = Targets(operand.name, tuple(starts[t] for t in operand.targets))
        operands.append(operand)
    return replace(ins, operands=tuple(operands))
