"""IEEE arithmetic on NumPy lanes, rounded once, as PTX defines it.

Where a format of up to 32 bits needs more than itself, its sums and products are computed in float64 and
*rounded to odd* there: if bits are lost, the last bit that is left is set. Rounding that to 24 bits or fewer
gives what rounding once would have given. Operands and results broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dsv4lab.emulator.exact import fma64, in_order, rounded64
from dsv4lab.emulator.rounding import (
    F16,
    F32,
    F64,
    I64,
    NAN,
    U32,
    bf16_rn,
    canonical,
    count,
    odd_sum,
    propagate,
    round_to,
    sum_error,
    to_odd,
)

# Constants are arrays without axes: NumPy is slower with scalars of its own.
_NAN32, _ONE_F32 = NAN[F32], np.array(1, F32)
_TIE_SHIFT, _TIE = np.array(35, I64), np.array(-1 << 63, I64)
_EXPONENT32, _MAGNITUDE32 = np.array(0x7F800000, U32), np.array(0x7FFFFFFF, U32)


def add32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """add.rn.f32"""
    r = a + b
    bad = r != r
    return np.where(bad, _NAN32, r) if count(bad) else r


def sub32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sub.rn.f32"""
    r = a - b
    bad = r != r
    return np.where(bad, _NAN32, r) if count(bad) else r


def mul32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.rn.f32"""
    r = a * b
    bad = r != r
    return np.where(bad, _NAN32, r) if count(bad) else r


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.f32 of float32"""
    product = a.astype(F64) * b.astype(F64)  # exact
    c = c.astype(F64)
    total = product + c
    r = total.astype(F32)
    # Rounding twice differs from rounding once only if the first has led exactly between two float32: then
    # the 29 bits that float32 lacks are 100...0. Subnormal results lack more; they all go the careful way.
    between = (total.view(I64) << _TIE_SHIFT) == _TIE
    if count(between) or _any_subnormal(r):
        error = sum_error(product, c, total)
        if count(error):
            r = to_odd(total, error).astype(F32)
    bad = r != r
    return np.where(bad, _NAN32, r) if count(bad) else r


def fma_half(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn of f16 (float16) or bf16 (float32)"""
    a, b, c = (x.astype(F32).astype(F64) for x in (a, b, c))
    product = a * b  # exact
    total = product + c
    r = total.astype(F32)
    # Rounding on from float32 is wrong only where that lies half-way between two values and is not exact.
    between = (r.view(U32) & _TAILS[name][0]) == _TAILS[name][1]
    if count(between):
        inexact = (total != r) | (np.abs(sum_error(product, c, total)) > 0)
        if count(between & inexact):
            return round_to(odd_sum(product, c), name)
    return bf16_rn(r) if name == "bf16" else canonical(r.astype(F16))


# Bits of a float32 that a format lacks, and what they are if it lies half-way. A subnormal float16 lacks more
# than the 13 bits of the others; twelve zeros are common to all.
_TAILS = {
    "bf16": (np.array(0xFFFF, U32), np.array(0x8000, U32)),
    "f16": (np.array(0xFFF, U32), np.array(0, U32)),
}


def _any_subnormal(x: np.ndarray) -> bool:
    bits = x.view(U32)
    normal = count(bits & _EXPONENT32)
    return normal != bits.size and normal != count(bits & _MAGNITUDE32)


def operation(op: str, name: str, rounding: str = "rn") -> Callable[..., np.ndarray]:
    """Arithmetic in one format, rounded once.

    Args:
        op: "add", "sub", "mul", "fma", "div", "rcp" or "sqrt".
        name: "f16" (float16), "bf16", "f32" (float32) or "f64", of the operands and the result.
        rounding: "rn", "rz", "rm" or "rp".
    """
    if name == "f64":
        native = _NATIVE.get(op)
        if rounding == "rn" and native:
            return lambda *values: propagate(native(*values), *in_order(op, values))
        return fma64 if (op, rounding) == ("fma", "rn") else partial(rounded64, op, rounding)
    if rounding == "rn" and (op, name) in _FAST:
        return _FAST[op, name]
    return partial(_once, op, name, rounding)


def _once(op: str, name: str, rounding: str, *values: np.ndarray) -> np.ndarray:
    """An operation worked out in float64 and rounded to odd there."""
    wide = [value.astype(F64) for value in values]
    if op not in ("add", "sub", "fma"):
        return round_to(_ODD[op](*wide), name, rounding)
    *first, last = wide
    first = first[0] if op != "fma" else first[0] * first[1]
    last = -last if op == "sub" else last
    if rounding == "rm":  # by way of rp, for the sign of a sum that is zero
        return canonical(-round_to(odd_sum(-first, -last), name, "rp"))
    return round_to(odd_sum(first, last), name, rounding)


def is_tiny(op: str, least: float, *values: np.ndarray) -> np.ndarray:
    """Whether the exact product, quotient or fma of float16 or float32 is nearer to zero than `least`."""
    wide = [value.astype(F64) for value in values]
    exact = odd_sum(wide[0] * wide[1], wide[2]) if op == "fma" else _ODD[op](*wide)
    return np.abs(exact) < least


# float64 holds products exactly. A quotient or a root of numbers of 24 bits that is no such number itself
# differs from all of them by more than float64 rounds off: rounding it again, in any direction, does no harm.
_ODD = {
    "mul": np.multiply,
    "div": np.divide,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}
_NATIVE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
}
# float32 holds sums and products of two float16 or bfloat16 so well that rounding again does no harm
# (24 >= 2 * 11 + 2 bits); a bfloat16 product that is subnormal is exact in it.
_FAST = {
    ("add", "f32"): add32,
    ("sub", "f32"): sub32,
    ("mul", "f32"): mul32,
    ("fma", "f32"): fma32,
    ("div", "f32"): lambda a, b: canonical(a / b),
    ("rcp", "f32"): lambda a: canonical(_ONE_F32 / a),
    ("sqrt", "f32"): lambda a: canonical(np.sqrt(a)),
    ("add", "f16"): lambda a, b: canonical(a + b),
    ("sub", "f16"): lambda a, b: canonical(a - b),
    ("mul", "f16"): lambda a, b: canonical(a * b),
    ("fma", "f16"): partial(fma_half, "f16"),
    ("fma", "bf16"): partial(fma_half, "bf16"),
    ("add", "bf16"): lambda a, b: bf16_rn(a + b),
    ("sub", "bf16"): lambda a, b: bf16_rn(a - b),
    ("mul", "bf16"): lambda a, b: bf16_rn(a * b),
}
