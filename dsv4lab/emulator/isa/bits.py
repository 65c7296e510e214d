"""Logic and shifts; logic on predicates too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.isa.registry import Action, Pure, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction

Function = Callable[..., np.ndarray]

_LOGIC: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
}
_BITS = ("b16", "b32", "b64")


def checked_type(ins: Instruction, *allowed: str) -> str:
    """The type of an instruction. Raises UnsupportedInstruction if it is none of those allowed."""
    type_ = ins.modifiers[-1] if ins.modifiers else ""
    if type_ not in allowed:
        raise unsupported(ins)
    return type_


def pure(ins: Instruction, function: Function, types: tuple[str, ...], result: str) -> Pure:
    """A function of the operands after the first, which have these types."""
    sources = ins.operands[1:]
    if len(sources) != len(types):
        raise unsupported(ins, f"it takes {len(types)} sources")
    return Pure(function, tuple(zip(sources, types, strict=True)), ((ins.operands[0], result),))


@instruction(*_LOGIC)
def logic(ins: Instruction) -> Action:
    """and, or, xor, not, cnot"""
    type_ = checked_type(ins, *_BITS, *(("pred",) if ins.op != "cnot" else ()))
    return pure(ins, _LOGIC[ins.op], (type_,) * (len(ins.operands) - 1), type_)


# The sixteen functions of two values, by their truth table; bit 2 * a + b says what they give for a and b.
_TWO: tuple[Function, ...] = (
    lambda a, b: a ^ a,
    lambda a, b: ~(a | b),
    lambda a, b: ~a & b,
    lambda a, b: ~a,
    lambda a, b: a & ~b,
    lambda a, b: ~b,
    lambda a, b: a ^ b,
    lambda a, b: ~(a & b),
    lambda a, b: a & b,
    lambda a, b: ~(a ^ b),
    lambda a, b: b,
    lambda a, b: ~a | b,
    lambda a, b: a,
    lambda a, b: a | ~b,
    lambda a, b: a | b,
    lambda a, b: ~(a & ~a),
)


def logic_of_three(table: int) -> Function:
    """The function of three values with a truth table: bit 4a + 2b + c says what it gives for a, b and c."""
    for_clear, for_set = _TWO[table & 15], _TWO[table >> 4]
    if table & 15 == table >> 4:
        return lambda a, b, c: for_clear(b, c)
    if table & 15 == 0:
        return lambda a, b, c: a & for_set(b, c)
    if table >> 4 == 15:
        return lambda a, b, c: a | for_clear(b, c)
    if (table & 15) ^ (table >> 4) == 15:
        return lambda a, b, c: a ^ for_clear(b, c)
    return lambda a, b, c: (a & for_set(b, c)) | (~a & for_clear(b, c))


@instruction("lop3")
def lop3(ins: Instruction) -> Action:
    """Any function of three values; with a predicate, whether the result is not zero."""
    checked_type(ins, "b32")
    combine = [m for m in ins.modifiers if m in ("and", "or", "xor")]
    if len(ins.modifiers) - len(combine) != 1:
        raise unsupported(ins)
    target, a, b, c, table, *predicate = ins.operands
    function = logic_of_three(table.bits & 0xFF)
    reads = tuple((operand, "b32") for operand in (a, b, c))
    if not combine:
        return Pure(function, reads, ((target, "b32"),))
    boolean = _LOGIC[combine[0]]

    def both(a: np.ndarray, b: np.ndarray, c: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = function(a, b, c)
        return value, boolean(value != 0, q)

    writes = ((target.first, "b32"), (target.second, "pred"))
    return Pure(both, (*reads, (predicate[0], "pred")), writes)


_SHIFT_WIDE = {"b16": "b32", "u16": "b32", "s16": "s32"}


@instruction("shl", "shr")
def shift(ins: Instruction) -> Action:
    """Shift by an amount that is clamped to the width."""
    type_ = checked_type(
        ins, *_BITS, *(("u16", "u32", "u64", "s16", "s32", "s64") if ins.op == "shr" else ())
    )
    # NumPy gives 0, or the sign, for amounts beyond the width, which a negative one counts as.
    ufunc = np.left_shift if ins.op == "shl" else np.right_shift
    amount = "s32" if type_[0] == "s" else "u32"
    if type_ not in _SHIFT_WIDE:
        return pure(ins, ufunc, (type_, amount), type_)
    narrow, wide = DTYPES[type_], DTYPES[_SHIFT_WIDE[type_]]
    return pure(ins, lambda a, b: ufunc(a.astype(wide), b).astype(narrow), (type_, amount), type_)


_U32, _U64 = np.dtype(np.uint32), np.dtype(np.uint64)
_THIRTY_TWO, _THIRTY_ONE = np.array(32, _U32), np.array(31, _U32)


@instruction("shf")
def funnel_shift(ins: Instruction) -> Action:
    """Shift of the 64 bits b:a; the upper half of it to the left, the lower half to the right."""
    checked_type(ins, "b32")
    way, mode = ins.modifiers[:-1]
    if way not in ("l", "r") or mode not in ("clamp", "wrap"):
        raise unsupported(ins)

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        both = b.astype(_U64) << 32 | a
        n = np.minimum(c, _THIRTY_TWO) if mode == "clamp" else c & _THIRTY_ONE
        return ((both << n) >> 32 if way == "l" else both >> n).astype(_U32)

    return pure(ins, function, ("b32", "b32", "b32"), "b32")
