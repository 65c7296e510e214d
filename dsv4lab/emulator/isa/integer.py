"""Integer arithmetic of 16, 32 and 64 bits, and of packed halves.

Divisions by zero, for which PTX promises nothing, give what an H200 gives: all bits set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dsv4lab.emulator.isa.registry import Action, Pure, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction

TYPES = ("u16", "s16", "u32", "s32", "u64", "s64", "u16x2", "s16x2")
_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_LOW32, _BITS32 = np.array(0xFFFFFFFF, np.uint64), np.array(32, np.uint64)

Function = Callable[..., np.ndarray]


def build(ins: Instruction) -> Action:
    """An operation that exists for floating-point numbers too, on integers. Raises UnsupportedInstruction."""
    type_, flags = ins.modifiers[-1], ins.modifiers[:-1]
    packed = type_.endswith("x2")
    found = _function(ins.op, flags, type_.removesuffix("x2")) if _exists(ins.op, flags, type_) else None
    if found is None:
        raise unsupported(ins)
    function, result = found
    if packed:
        function, type_, result = _packed(function, DTYPES[result]), "b32", "b32"
    reads = [(operand, type_) for operand in ins.operands[1:]]
    if ins.op == "mad" and result != type_:
        reads[2] = (ins.operands[2 + 1], result)
    return Pure(function, tuple(reads), ((ins.operands[0], result),))


def _exists(op: str, flags: tuple[str, ...], type_: str) -> bool:
    """Whether PTX has a modifier, or the operation at all, for a type."""
    if type_.endswith("x2") and op not in ("add", "min", "max"):
        return False
    if "sat" in flags:
        return type_ == "s32"
    if "relu" in flags:
        return type_ in ("s32", "s16x2")
    return op not in ("abs", "neg") or type_[0] == "s"


def _function(op: str, flags: tuple[str, ...], type_: str) -> tuple[Function, str] | None:
    """The function of an opcode without its type, and the type of its result."""
    if op in ("mul", "mad") and flags[:1] == ("wide",) and type_ in _WIDE:
        wide = DTYPES[_WIDE[type_]]
        return partial(_wide_product if op == "mul" else _wide_sum, wide), _WIDE[type_]
    if (op, *flags) == ("mul", "hi"):
        return partial(high_product, type_), type_
    if (op, *flags[:1]) == ("mad", "hi"):
        if flags == ("hi", "sat") and type_ == "s32":
            return (lambda a, b, c: saturated(high_product("s32", a, b).astype(np.int64) + c)), type_
        return (lambda a, b, c: high_product(type_, a, b) + c) if flags == ("hi",) else None, type_
    if (op, *flags) == ("div",):
        return partial(quotient, type_), type_
    function = _PLAIN.get((op, *flags))
    return None if function is None else (function, type_)


def _wide_product(wide: np.dtype, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(wide) * b.astype(wide)


def _wide_sum(wide: np.dtype, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype(wide) * b.astype(wide) + c


def saturated(value: np.ndarray) -> np.ndarray:
    """int64 limited to int32."""
    return np.clip(value, -(2**31), 2**31 - 1).astype(np.int32)


def high_product(type_: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of two values of a type."""
    if type_ in _WIDE:
        wide = DTYPES[_WIDE[type_]]
        bits = 8 * a.dtype.itemsize
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    al, ah, bl, bh = ua & _LOW32, ua >> _BITS32, ub & _LOW32, ub >> _BITS32
    low, cross, other = al * bl, al * bh, ah * bl
    carry = (low >> _BITS32) + (cross & _LOW32) + (other & _LOW32)
    high = (ah * bh + (cross >> _BITS32) + (other >> _BITS32) + (carry >> _BITS32)).view(a.dtype)
    return high if type_ == "u64" else high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def quotient(type_: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, rounded toward zero."""
    zero = b == 0
    if type_ in _WIDE:  # float64 holds both, and its quotient cannot reach the next integer
        q = np.trunc(a.astype(np.float64) / b.astype(np.float64)).astype(np.int64).astype(a.dtype)
    else:
        q = (a - np.fmod(a, b)) // b
    return np.where(zero, ~a.dtype.type(0), q) if np.count_nonzero(zero) else q


def remainder(type_: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b * quotient, with the sign of a."""
    zero = b == 0
    r = a - b * quotient(type_, a, b) if type_ in _WIDE else np.fmod(a, b)
    return np.where(zero, ~a.dtype.type(0), r) if np.count_nonzero(zero) else r


def halves(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Packed values (...) as their parts (..., 2), the low one first."""
    return np.ascontiguousarray(x)[..., None].view(dtype)


def _packed(function: Function, dtype: np.dtype) -> Function:
    def apply(*values: np.ndarray) -> np.ndarray:
        result = function(*(halves(value, dtype) for value in values))
        return np.ascontiguousarray(result).view(np.uint32)[..., 0]

    return apply


_PLAIN: dict[tuple[str, ...], Function] = {
    ("add",): np.add,
    ("sub",): np.subtract,
    ("add", "sat"): lambda a, b: saturated(a.astype(np.int64) + b),
    ("sub", "sat"): lambda a, b: saturated(a.astype(np.int64) - b),
    ("mul", "lo"): np.multiply,
    ("mad", "lo"): lambda a, b, c: a * b + c,
    ("min",): np.minimum,
    ("max",): np.maximum,
    ("min", "relu"): lambda a, b: np.maximum(np.minimum(a, b), a.dtype.type(0)),
    ("max", "relu"): lambda a, b: np.maximum(np.maximum(a, b), a.dtype.type(0)),
    ("abs",): np.abs,
    ("neg",): np.negative,
}


@instruction("rem")
def rem(ins: Instruction) -> Action:
    """rem.type"""
    type_ = ins.modifiers[-1]
    if len(ins.modifiers) > 1 or type_ not in TYPES[:6]:
        raise unsupported(ins)
    return _uniform(ins, partial(remainder, type_), type_)


@instruction("sad")
def sad(ins: Instruction) -> Action:
    """d = c + |a - b|"""
    return _uniform(ins, lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c, ins.modifiers[-1])


def _uniform(ins: Instruction, function: Function, type_: str) -> Pure:
    return Pure(function, tuple((o, type_) for o in ins.operands[1:]), ((ins.operands[0], type_),))


@instruction("mul24", "mad24")
def mul24(ins: Instruction) -> Action:
    """Products of the low 24 bits: bits 0 ... 31 of it (.lo) or 16 ... 47 (.hi)."""
    part, *saturate, type_ = ins.modifiers
    if (
        part not in ("lo", "hi")
        or type_ not in ("u32", "s32")
        or (saturate and (type_, part) != ("s32", "hi"))
    ):
        raise unsupported(ins)
    wide, up = DTYPES[_WIDE[type_]], DTYPES[_WIDE[type_]].type(8)

    def low24(x: np.ndarray) -> np.ndarray:
        return (x << x.dtype.type(8)).astype(wide) >> up

    def product(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        p = low24(a) * low24(b)
        p = (p >> wide.type(16) if part == "hi" else p).astype(a.dtype)
        if saturate:
            return saturated(p.astype(np.int64) + c[0])
        return p + c[0] if c else p

    return _uniform(ins, product, type_)


@instruction("dp4a", "dp2a")
def dot(ins: Instruction) -> Action:
    """d = c + the dot product of four bytes with four, or of two 16-bit values with two bytes of b."""
    *mode, atype, btype = ins.modifiers
    four = ins.op == "dp4a"
    if mode not in ([[]] if four else [["lo"], ["hi"]]) or not {atype, btype} <= {"u32", "s32"}:
        raise unsupported(ins)
    first = np.dtype(("i" if atype == "s32" else "u") + ("1" if four else "2"))
    second = np.dtype("i1" if btype == "s32" else "u1")
    start = 2 * (mode == ["hi"])
    result = "u32" if atype == btype == "u32" else "s32"

    def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        left, right = halves(a, first).astype(np.int32), halves(b, second).astype(np.int32)
        for i in range(left.shape[-1]):
            c = c + left[..., i] * right[..., start + i]
        return c.view(DTYPES[result])

    a, b, c = ins.operands[1:]
    return Pure(product, ((a, "b32"), (b, "b32"), (c, "s32")), ((ins.operands[0], result),))
