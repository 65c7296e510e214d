"""Float64 arithmetic that float64 itself does not give: fused multiply-add, and the directed roundings.

A fused multiply-add of moderate numbers is made of sums whose errors are kept; everything else is worked out
lane by lane with fractions, which is slow and seldom needed.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from dsv4lab.emulator.rounding import F64, odd_sum, propagate, sum_error

_SPLIT = 134217729.0  # 2**27 + 1
_LEAST, _MOST = 2.0**-400, 2.0**400


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.f64 of float64."""
    product = a * b
    lost = _product_error(a, b, product)
    low = c + lost
    low_error = sum_error(c, lost, low)
    high = product + low
    r = high + odd_sum(sum_error(product, low, high), low_error)
    hard = ~(_moderate(a) & _moderate(b) & _moderate(c))
    return propagate(_replace(r, hard, "fma", "rn", a, b, c) if np.count_nonzero(hard) else r, a, c, b)


def rounded64(op: str, rounding: str, *values: np.ndarray) -> np.ndarray:
    """An operation on float64 with any rounding.

    Args:
        op: "add", "sub", "mul", "fma", "div", "rcp" or "sqrt".
        rounding: "rn", "rz", "rm" or "rp".
        values: its operands.
    """
    shape = np.broadcast_shapes(*(value.shape for value in values))
    r = _replace(np.empty(shape), np.ones(shape, bool), op, rounding, *values)
    return propagate(r, *in_order(op, values))


def in_order(op: str, values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """The operands in the order in which a GPU prefers their NaN, the last one first."""
    if op == "div":
        return values[::-1]
    return (values[0], values[2], values[1]) if op == "fma" else values


def _product_error(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    (ah, al), (bh, bl) = _halves(a), _halves(b)
    return ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = x * _SPLIT
    high = scaled - (scaled - x)
    return high, x - high


def _moderate(x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    return ((size >= _LEAST) & (size <= _MOST)) | (x == 0)


def _replace(r: np.ndarray, where: np.ndarray, op: str, rounding: str, *values: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(r.shape, where.shape)
    r, where = np.broadcast_to(r, shape).copy(), np.broadcast_to(where, shape)
    lanes = zip(*(np.broadcast_to(value, shape)[where].tolist() for value in values), strict=True)
    r[where] = np.array([_lane(op, rounding, *lane) for lane in lanes], F64)
    return r


def _lane(op: str, rounding: str, *values: float) -> float:
    if op == "rcp":
        op, values = "div", (1.0, *values)
    elif op == "sub":
        op, values = "add", (values[0], -values[1])
    if (
        not all(map(math.isfinite, values))
        or (op == "div" and values[1] == 0)
        or (op == "sqrt" and values[0] < 0)
    ):
        return _special(op, *values)
    if op == "sqrt":
        return _root(values[0], rounding)
    result = _VALUES[op](*map(Fraction, values))
    return _round(result, rounding) if result else _zero(op, rounding, *values)


def _special(op: str, *values: float) -> float:
    """Of infinities and NaN, or a division by zero, or a root of a negative number."""
    if op == "fma" and math.isfinite(values[0]) and math.isfinite(values[1]):
        return values[2]  # the product may overflow, but then it does so only here
    with np.errstate(all="ignore"):
        return float((np.sqrt if op == "sqrt" else _VALUES[op])(*map(np.float64, values)))


def _zero(op: str, rounding: str, *values: float) -> float:
    if op in ("mul", "div"):
        return math.copysign(0.0, math.copysign(1, values[0]) * math.copysign(1, values[1]))
    signs = [math.copysign(1, value) for value in values]
    first = signs[0] * signs[1] if op == "fma" else signs[0]
    negative = first < 0 and signs[-1] < 0 if rounding != "rm" else first < 0 or signs[-1] < 0
    return -0.0 if negative else 0.0


def _root(value: float, rounding: str) -> float:
    root = math.sqrt(value)
    return _step(root, Fraction(root) ** 2, Fraction(value), rounding)


def _round(value: Fraction, rounding: str) -> float:
    try:
        nearest = value.numerator / value.denominator  # correctly rounded, subnormal results too
    except OverflowError:
        nearest = math.inf if value > 0 else -math.inf
        outward = {"rn": True, "rz": False, "rp": value > 0, "rm": value < 0}[rounding]
        return nearest if outward else math.nextafter(nearest, 0)
    if not nearest:
        nearest = math.copysign(0.0, value)
    return _step(nearest, Fraction(nearest), value, rounding)


def _step(nearest: float, is_value: Fraction, should: Fraction, rounding: str) -> float:
    """The neighbour of the nearest number where the rounding asks for the other side of the exact value."""
    above, below = is_value > should, is_value < should
    if rounding == "rp" and below:
        return math.nextafter(nearest, math.inf)
    if rounding == "rm" and above:
        return math.nextafter(nearest, -math.inf)
    if rounding == "rz" and (above if should > 0 else below):
        return math.nextafter(nearest, 0)
    return nearest


_VALUES = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}
