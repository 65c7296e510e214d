"""Comparisons, and choices by a predicate: setp, set, selp, slct.

Logic on predicates (and, or, xor, not with .pred) is in bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.isa.formats import HELD
from dsv4lab.emulator.isa.registry import Action, Pure, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction, Operand, Pair, Sink
from dsv4lab.emulator.rounding import flush

Function = Callable[..., np.ndarray]

_INTEGERS = {f"{kind}{bits}" for kind in "bsu" for bits in (16, 32, 64)}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
# Of floating-point numbers; the ordered ones are false where an operand is NaN, those with a u true.
_FLOATS: dict[str, Function] = {
    **_COMPARE,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(ins: Instruction, name: str, type_: str, ftz: bool) -> Function:
    """The function of two registers of a type that gives bool, (..., 2) for packed types."""
    if type_ in _INTEGERS and not ftz:
        unsigned = _UNSIGNED if type_[0] == "u" else {}
        found = {**_COMPARE, **unsigned}.get(name) if type_[0] != "b" or name in ("eq", "ne") else None
        if found:
            return found
    elif type_ in HELD and type_ != "f32x2" and name in _FLOATS:
        compare, load = _FLOATS[name], HELD[type_].load
        if ftz:
            return lambda a, b: compare(flush(load(a)), flush(load(b)))
        return compare if type_ in ("f16", "f32", "f64") else lambda a, b: compare(load(a), load(b))
    raise unsupported(ins)


def _comparison_of(ins: Instruction, flags: list[str], type_: str) -> tuple[Function, str | None]:
    """The comparison, and how it is combined with a predicate."""
    ftz = "ftz" in flags
    name, *combine = [flag for flag in flags if flag != "ftz"]
    if len(combine) > 1 or not set(combine) <= set(_COMBINE):
        raise unsupported(ins)
    return comparison(ins, name, type_, ftz), combine[0] if combine else None


def combined(
    compare: Function, combine: str | None, packed: bool, wanted: tuple[bool, bool]
) -> Callable[..., np.ndarray | tuple[np.ndarray, ...]]:
    """A function of two values and perhaps a predicate.

    Args:
        compare: of the two values.
        combine: "and", "or", "xor" or None.
        packed: the two results are the comparisons of the halves, else the comparison and its contrary.
        wanted: which of the two results to return.
    """
    boolean = _COMBINE[combine] if combine else lambda t, c: t
    if not combine and not packed and wanted == (True, False):
        return compare

    def apply(
        a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> np.ndarray | tuple[np.ndarray, ...]:
        t = compare(a, b)
        first, second = (t[..., 0], t[..., 1]) if packed else (t, ~t if wanted[1] else None)
        results = [boolean(part, c) for part, want in zip((first, second), wanted, strict=True) if want]
        return results[0] if len(results) == 1 else tuple(results)

    return apply


@instruction("setp")
def setp(ins: Instruction) -> Action:
    """p|q = a compared with b, and perhaps combined with c."""
    *flags, type_ = ins.modifiers
    compare, combine = _comparison_of(ins, flags, type_)
    target, a, b, *c = ins.operands
    if len(c) != bool(combine):
        raise unsupported(ins)
    targets: list[Operand] = [target.first, target.second] if isinstance(target, Pair) else [target, Sink()]
    wanted = (not isinstance(targets[0], Sink), not isinstance(targets[1], Sink))
    if not any(wanted):
        wanted = (True, False)
    function = combined(compare, combine, type_.endswith("x2"), wanted)
    reads = ((a, type_), (b, type_), *((operand, "pred") for operand in c))
    writes = tuple((operand, "pred") for operand, want in zip(targets, wanted, strict=True) if want)
    return Pure(function, reads, writes)


# What set writes for true: all bits of an integer, 1.0 of a floating-point number.
_TRUE = {
    "u32": ("u32", 0xFFFFFFFF),
    "s32": ("s32", -1),
    "u16": ("u16", 0xFFFF),
    "s16": ("s16", -1),
    "f32": ("f32", 1),
    "f16": ("f16", 1),
    "bf16": ("bf16", 0x3F80),
    "f16x2": ("b16", 0x3C00),
    "bf16x2": ("b16", 0x3F80),
}


@instruction("set")
def set_(ins: Instruction) -> Action:
    """d = true or false for a compared with b, as a number."""
    *flags, dtype, type_ = ins.modifiers
    compare, combine = _comparison_of(ins, flags, type_)
    packed = type_.endswith("x2")
    if (
        dtype not in _TRUE
        or (dtype.endswith("x2") and not packed)
        or (packed and dtype in ("u16", "s16", "f32"))
    ):
        raise unsupported(ins)
    base, true = _TRUE[dtype]
    if packed and dtype in ("u32", "s32"):
        base, true = "b16", 0xFFFF
    one = np.array(true, DTYPES[base])
    boolean = _COMBINE.get(combine)

    def apply(a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
        t = compare(a, b)
        if boolean:
            t = boolean(t, c[..., None] if packed else c)
        r = np.where(t, one, one.dtype.type(0))
        return np.ascontiguousarray(r).view(np.uint32)[..., 0] if packed else r

    target, a, b, *c = ins.operands
    reads = ((a, type_), (b, type_), *((operand, "pred") for operand in c))
    return Pure(apply, reads, ((target, "b32" if packed else dtype),))


@instruction("selp")
def selp(ins: Instruction) -> Pure:
    """d = p ? a : b."""
    (type_,) = ins.modifiers
    if type_ not in _INTEGERS | {"f32", "f64"}:
        raise unsupported(ins)
    target, a, b, p = ins.operands
    return Pure(lambda p, a, b: np.where(p, a, b), ((p, "pred"), (a, type_), (b, type_)), ((target, type_),))


@instruction("slct")
def slct(ins: Instruction) -> Pure:
    """d = c >= 0 ? a : b; a NaN takes b."""
    *flags, type_, ctype = ins.modifiers
    if ctype not in ("s32", "f32") or flags not in ([], ["ftz"]) or type_ not in _INTEGERS | {"f32", "f64"}:
        raise unsupported(ins)
    target, a, b, c = ins.operands

    def choose(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where((flush(c) if flags else c) >= 0, a, b)

    return Pure(choose, ((c, ctype), (a, type_), (b, type_)), ((target, type_),))
