"""Floating-point arithmetic of f16, bf16, f32, f64 and their packed and mixed forms.

PTX leaves the bits of approximate functions open. Here they are worked out in float64 and rounded: all but
about one in 2**28 are correctly rounded. Where PTX names a value, for zeros and infinities, it is that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.floats import is_tiny, operation
from dsv4lab.emulator.isa.formats import HELD
from dsv4lab.emulator.isa.registry import Action, Pure, instruction, unsupported
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.rounding import (
    F32,
    F64,
    canonical,
    flush,
    on_grid,
    propagate,
    quiet,
    relu,
    round_to,
    saturate,
)

_ROUNDINGS = ("rn", "rz", "rm", "rp")
_CLAMPS = {"sat": saturate, "relu": relu}
Function = Callable[..., np.ndarray]


def build(ins: Instruction) -> Action:
    """add, sub, mul, mad, fma, div, min, max, abs, neg, rcp, sqrt. Raises UnsupportedInstruction."""
    names = [m for m in ins.modifiers if m in HELD]
    flags = [m for m in ins.modifiers if m not in HELD]
    if not names or list(ins.modifiers) != flags + names:
        raise unsupported(ins)
    if ins.op in ("min", "max"):
        return _elementwise(ins, names, flags, _extreme(ins, flags))
    if ins.op in ("abs", "neg"):
        return _elementwise(ins, names, flags, _sign_change(ins.op))
    if "approx" in flags or "full" in flags:
        return _approximate(ins, names, flags)
    given = flags.pop(0) if flags and flags[0] in _ROUNDINGS else None
    op, rounding, held = "fma" if ins.op == "mad" else ins.op, given or "rn", HELD[names[0]]
    if (rounding != "rn" and held.name in ("f16", "bf16")) or (
        given is None and op not in ("add", "sub", "mul")
    ):
        raise unsupported(ins)
    function = operation(op, held.name, rounding)
    if "ftz" in flags and op in ("mul", "fma", "div"):
        function = _flushing_exactly(op, function)
    return _elementwise(ins, names, flags, function)


def _flushing_exactly(op: str, function: Function) -> Function:
    """Zero also where rounding makes the smallest normal number of a smaller one: a GPU flushes before it."""

    def flushed(*values: np.ndarray) -> np.ndarray:
        r = function(*values)
        least = np.finfo(r.dtype).tiny
        edge = np.abs(r) == least
        if not np.count_nonzero(edge):
            return r
        return np.where(edge & is_tiny(op, float(least), *values), np.copysign(r.dtype.type(0), r), r)

    return flushed


def _sign_change(op: str) -> Function:
    change = np.abs if op == "abs" else np.negative
    return lambda x: canonical(change(x)) if x.dtype != F64 else np.where(x == x, change(x), quiet(x))


def _elementwise(ins: Instruction, names: list[str], flags: list[str], function: Function) -> Pure:
    """An instruction that does the same to each number: its types, .ftz and clamps around the function."""
    if len(names) > 2 or not all(_applies(flag, ins.op, names[0]) for flag in flags):
        raise unsupported(ins)
    target, *sources = ins.operands
    if len(names) == 2:  # mixed precision: all operands but the last are of the second type
        if names[0] != "f32" or names[1] not in ("f16", "bf16") or ins.op not in ("add", "sub", "fma"):
            raise unsupported(ins)
        types = [names[1]] * (len(sources) - 1) + ["f32"]
    else:
        types = [names[0]] * len(sources)
    wrapped = _wrap(names[0], types, flags, function)
    return Pure(wrapped, tuple(zip(sources, types, strict=True)), ((target, names[0]),))


def _applies(flag: str, op: str, type_: str) -> bool:
    """Whether PTX has a modifier for a type."""
    if flag == "ftz":
        return type_ in ("f32", "f32x2", "f16", "f16x2") or op in ("ex2", "rcp", "rsqrt")
    if flag == "relu":
        return op == "fma" and HELD[type_].name in ("f16", "bf16")
    return flag == "sat" and type_ in ("f32", "f16", "f16x2")


def _wrap(result: str, types: list[str], flags: list[str], function: Function) -> Function:
    if not flags and set(types) | {result} <= {"f16", "f32", "f64"} and len({*types, result}) == 1:
        return function
    loads = [HELD[type_].load for type_ in types]
    if result == "f32":
        loads = [
            (lambda x: x.astype(F32)) if t == "f16" else load for t, load in zip(types, loads, strict=True)
        ]
    store, ftz = HELD[result].store, "ftz" in flags
    clamps = [_CLAMPS[flag] for flag in flags if flag in _CLAMPS]

    def apply(*values: np.ndarray) -> np.ndarray:
        lanes = [load(value) for load, value in zip(loads, values, strict=True)]
        if ftz:
            lanes = [flush(lane) for lane in lanes]
        r = function(*lanes)
        if ftz:
            r = flush(r)
        for clamp in clamps:
            r = clamp(r)
        return store(r)

    return apply


def _extreme(ins: Instruction, flags: list[str]) -> Function:
    """min or max of two or three, with the modifiers that say how; takes these off `flags`."""
    nan, absolute = "NaN" in flags, "abs" in flags
    exclusive = flags[-2:] == ["xorsign", "abs"]
    flags[:] = [flag for flag in flags if flag not in ("NaN", "xorsign", "abs")]
    largest = ins.op == "max"
    choose = (np.maximum if largest else np.minimum) if nan else (np.fmax if largest else np.fmin)

    def two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = choose(a, b)
        same = a == b
        if np.count_nonzero(same):  # which of two zeros NumPy takes is open; PTX has -0 < +0
            zero = np.where(np.signbit(b) == largest, a, b)
            r = np.where(same, zero, r)
        return canonical(r) if r.dtype != F64 else propagate(r, a, b)

    def any_number(*values: np.ndarray) -> np.ndarray:
        sizes = [np.abs(value) for value in values] if absolute else values
        r = two(sizes[0], sizes[1])
        if len(sizes) == 3:
            r = two(r, sizes[2])
        if exclusive:
            negative = np.signbit(values[0]) ^ np.signbit(values[1])
            r = np.where(negative & (r == r), -r, r)
        return r

    return any_number if absolute or len(ins.operands) == 4 else two


def _reciprocal_root(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(x)


_APPROXIMATE: dict[str, Function] = {
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": _reciprocal_root,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "div": np.divide,
}
# What there is beside .f32, which all of them have.
_OTHER_TYPES = {
    "ex2": ("f16", "f16x2", "bf16", "bf16x2"),
    "tanh": ("f16", "f16x2", "bf16", "bf16x2"),
    "rcp": ("f64",),
    "rsqrt": ("f64",),
}


# rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 give the upper half of a number.
_COARSE_NAN = np.array(0x7FFFFFFF << 32, np.uint64).view(F64)


def _approximate(ins: Instruction, names: list[str], flags: list[str]) -> Pure:
    function = _APPROXIMATE.get(ins.op)
    way = flags.pop(0)
    if function is None or len(names) > 1 or names[0] not in ("f32", *_OTHER_TYPES.get(ins.op, ())):
        raise unsupported(ins)
    if way == "full" and ins.op != "div":
        raise unsupported(ins)
    name = HELD[names[0]].name
    if name == "f64":
        coarse = "ftz" in flags

        def compute(x: np.ndarray) -> np.ndarray:
            r = function(x)
            return np.where(r == r, on_grid(r, 21, -1022, "rn"), _COARSE_NAN) if coarse else propagate(r, x)
    elif ins.op == "div" and way == "approx":
        compute = _approximate_quotient
    else:

        def compute(*values: np.ndarray) -> np.ndarray:
            return round_to(function(*(value.astype(F64) for value in values)), name)

    return _elementwise(ins, names, flags, compute)


def _approximate_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div.approx.f32, which multiplies by a reciprocal: of a divisor beyond 2**126 that is zero."""
    b = np.where((np.abs(b) > 2.0**126) & (np.abs(b) < np.inf), np.copysign(F32.type(np.inf), b), b)
    quotient = a.astype(F64) / b.astype(F64)
    return round_to(quotient, "f32")


@instruction("fma", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def floating(ins: Instruction) -> Action:
    """The opcodes that only floating-point numbers have."""
    exact = ins.op in ("fma", "rcp", "sqrt")
    if not exact and "approx" not in ins.modifiers:
        raise unsupported(ins, "it needs .approx")
    return build(ins)


@instruction("copysign")
def copysign(ins: Instruction) -> Pure:
    """d = b with the sign of a."""
    type_ = ins.modifiers[-1]
    if type_ not in ("f32", "f64"):
        raise unsupported(ins)
    target, a, b = ins.operands
    return Pure(lambda a, b: np.copysign(b, a), ((a, type_), (b, type_)), ((target, type_),))


def _normal(x: np.ndarray) -> np.ndarray:
    return (np.abs(x) >= np.finfo(x.dtype).tiny) & (np.abs(x) < np.inf)


_TESTS: dict[str, Function] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: x == x,
    "notanumber": np.isnan,
    "normal": lambda x: _normal(x) | (x == 0),
    "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0),
}


@instruction("testp")
def testp(ins: Instruction) -> Pure:
    """Is the number finite, normal, ...? An H200 counts zero as normal."""
    test, type_ = ins.modifiers
    if test not in _TESTS or type_ not in ("f32", "f64"):
        raise unsupported(ins)
    return Pure(_TESTS[test], ((ins.operands[1], type_),), ((ins.operands[0], "pred"),))
