"""How values on NumPy lanes are rounded, flushed, clamped, and what their NaN look like.

Arrays are float16, float32 or float64. A bfloat16 or tf32 value is held in a float32.
"""

from __future__ import annotations

import numpy as np

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
U16, U32, I64 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.int64)
count = np.count_nonzero

# Constants are arrays without axes: NumPy is slower with scalars of its own.
NAN = {
    F16: np.array(0x7FFF, np.uint16).view(F16),
    F32: np.array(0x7FFFFFFF, np.uint32).view(F32),
    F64: np.array(0xFFF8 << 48, np.uint64).view(F64),
}
_EXPONENT32, _SIGN32 = np.array(0x7F800000, U32), np.array(0x80000000, U32)
_EXPONENT64, _ONE64 = np.array(0x7FF << 52, I64), np.array(1, I64)
_QUIET64 = np.array(1 << 51, I64)
_SIXTEEN, _ONE32, _ALMOST_HALF = np.array(16, U32), np.array(1, U32), np.array(0x7FFF, U32)
_UPPER, _NAN_BF16 = np.array(0xFFFF0000, U32), np.array(0x7FFF0000, U32)
_TO_INTEGER = {
    "rn": np.rint,
    "rz": np.trunc,
    "rm": np.floor,
    "rp": np.ceil,
    "rna": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
}
# Significant bits, exponent of the smallest normal value, largest value.
SHAPES = {
    "f32": (24, -126, float(np.finfo(F32).max)),
    "tf32": (11, -126, float(np.uint32(0x7F7FE000).view(F32))),
    "bf16": (8, -126, float(np.uint32(0x7F7F0000).view(F32))),
    "f16": (11, -14, 65504.0),
}


def canonical(x: np.ndarray) -> np.ndarray:
    """`x` with each NaN replaced by the one that a GPU gives."""
    bad = x != x
    return np.where(bad, NAN[x.dtype], x) if count(bad) else x


def quiet(x: np.ndarray) -> np.ndarray:
    """Float64 with signaling NaN made quiet; the rest of their bits stays."""
    bad = x != x
    return np.where(bad, x.view(I64) | _QUIET64, x.view(I64)).view(F64) if count(bad) else x


def propagate(r: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """Float64 results with NaN as a GPU gives them: that of the last operand that is one, else its own."""
    bad = r != r
    if not count(bad):
        return r
    result = np.where(bad, NAN[F64], r)
    for operand in operands:
        result = np.where(bad & (operand != operand), quiet(operand), result)
    return result


def flush(x: np.ndarray) -> np.ndarray:
    """`x` with subnormal values replaced by zeros of their sign (.ftz)."""
    if x.dtype != F32:
        tiny = np.abs(x) < np.finfo(x.dtype).tiny
        return np.where(tiny, np.copysign(x.dtype.type(0), x), x) if count(tiny) else x
    bits = x.view(U32)
    exponent = bits & _EXPONENT32
    if count(exponent) == exponent.size:
        return x
    return np.where(exponent, bits, bits & _SIGN32).view(F32)


def saturate(x: np.ndarray) -> np.ndarray:
    """`x` limited to 0 ... 1, NaN as +0 (.sat)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu(x: np.ndarray) -> np.ndarray:
    """`x` with negative values replaced by +0; NaN stays (.relu)."""
    return np.where(x <= 0, x.dtype.type(0), x)


def to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The sum rounded + error, rounded to odd.

    Args:
        rounded: float64, the sum rounded to nearest.
        error: float64, what the rounding has lost; NaN counts as nothing.
    """
    bits = rounded.view(I64)
    away = np.where((error > 0) == (rounded > 0), 1, -1)
    change = (np.abs(error) > 0) & ((bits & _ONE64) == 0)
    return (bits + away * change).view(F64)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64 far from overflow, rounded to odd."""
    rounded = a + b
    error = sum_error(a, b, rounded)
    return to_odd(rounded, error) if count(error) else rounded


def sum_error(a: np.ndarray, b: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """What is lost when a + b is rounded to nearest, exactly."""
    part = rounded - a
    return (a - (rounded - part)) + (b - part)


def on_grid(x: np.ndarray, precision: int, least: int, rounding: str) -> np.ndarray:
    """Float64 rounded to `precision` significant bits, none of them below 2**(least - precision + 1).

    Args:
        x: float64.
        precision: bits, the leading one included.
        least: exponent below which the spacing no longer shrinks.
        rounding: "rn", "rz", "rm", "rp" or "rna" (ties away from zero).
    """
    exponent = np.maximum(x.view(I64) & _EXPONENT64, (least + 1023) << 52)
    unit = (exponent - ((precision - 1) << 52)).view(F64)
    return _TO_INTEGER[rounding](x / unit) * unit


def round_to(x: np.ndarray, name: str, rounding: str = "rn") -> np.ndarray:
    """Float64 rounded to a format of at most 32 bits.

    Args:
        x: float64, exact or rounded to odd.
        name: of SHAPES.
        rounding: as of on_grid.
    Returns:
        float16 for "f16", else float32; NaN are those of the GPU.
    """
    dtype = F16 if name == "f16" else F32
    if rounding == "rn" and name in ("f16", "f32"):
        return canonical(x.astype(dtype))
    precision, least, largest = SHAPES[name]
    r = on_grid(x, precision, least, rounding)
    if rounding not in ("rn", "rna"):
        finite = np.abs(x) < np.inf
        if rounding != "rp":
            r = np.where(finite, np.minimum(r, largest), r)
        if rounding != "rm":
            r = np.where(finite, np.maximum(r, -largest), r)
    return canonical(r.astype(dtype))  # what lies beyond the largest value becomes infinite here


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest bfloat16, as uint32 with its bits in the upper half."""
    bits = x.view(U32)
    rounded = bits + (((bits >> _SIXTEEN) & _ONE32) + _ALMOST_HALF)
    bad = x != x
    if count(bad):
        rounded = np.where(bad, _NAN_BF16, rounded)
    return rounded & _UPPER


def bf16_rn(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest bfloat16, in a float32."""
    return bf16_bits(x).view(F32)
