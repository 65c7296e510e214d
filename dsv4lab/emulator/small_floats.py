"""Floating-point formats of 4 to 19 bits: what their codes mean, and the code that a value rounds to.

`ue4m3` and `ue8m0` are the unsigned scale factors of block-scaled MMA. `tf32` lies in the upper 19 bits of an
f32, whose other bits tensor cores ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Format:
    """A binary format.

    Attributes:
        exponent, mantissa: their bits.
        bias: of the exponent.
        specials: "ieee" (the last exponent holds infinities and NaN), "nan" (the last code alone is NaN) or
            "none" (every code is a number).
        signed: the bit above the exponent is a sign.
    """

    exponent: int
    mantissa: int
    bias: int
    specials: str
    signed: bool = True

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.signed + self.exponent + self.mantissa

    @property
    def last(self) -> int:
        """Largest code without its sign bit."""
        return (1 << (self.exponent + self.mantissa)) - 1

    @property
    def largest(self) -> int:
        """Code of the largest finite value."""
        return self.last - {"ieee": 1 << self.mantissa, "nan": 1, "none": 0}[self.specials]

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def infinity(self) -> int:
        """Code of infinity; in a format without it, that of NaN or of the largest value."""
        return self.largest + 1 if self.specials == "ieee" else self.last


FORMATS = {
    "f16": Format(5, 10, 15, "ieee"),
    "bf16": Format(8, 7, 127, "ieee"),
    "tf32": Format(8, 10, 127, "ieee"),
    "e4m3": Format(4, 3, 7, "nan"),
    "e5m2": Format(5, 2, 15, "ieee"),
    "e2m1": Format(2, 1, 1, "none"),
    "e2m3": Format(2, 3, 1, "none"),
    "e3m2": Format(3, 2, 3, "none"),
    "ue4m3": Format(4, 3, 7, "nan", signed=False),
    "ue8m0": Format(8, 0, 127, "nan", signed=False),
}


def decode(bits: np.ndarray, name: str, dtype: type = np.float32) -> np.ndarray:
    """Values of codes; float32 holds each of them exactly.

    Args:
        bits: codes in the low bits of unsigned integers of any shape; of tf32, f32 bit patterns (uint32).
        name: of FORMATS. Bits above the format's width are ignored.
        dtype: np.float32 or np.float64.
    Returns:
        Array of the same shape; NaN codes give the quiet NaN.
    """
    if name == "f16":
        return bits.astype(np.uint16, copy=False).view(np.float16).astype(dtype)
    if name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(dtype, copy=False)
    if name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(dtype, copy=False)
    return table(name, dtype).take(bits.astype(np.uint8, copy=False))


def decode_nibbles(packed: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Values (..., 2) of e2m1 codes packed in bytes (...), the low nibble first."""
    return _nibble_table(dtype).take(packed.astype(np.uint8, copy=False), axis=0)


@cache
def table(name: str, dtype: type = np.float32) -> np.ndarray:
    """Values of all 256 bytes as codes of a format of at most 8 bits, read-only."""
    form = FORMATS[name]
    codes = np.arange(256) & ((1 << form.bits) - 1)
    magnitude = codes & form.last
    exponent = np.maximum(magnitude >> form.mantissa, 1 if form.mantissa else 0)
    fraction = magnitude - ((exponent - 1) << form.mantissa) if form.mantissa else 1
    values = np.ldexp(np.float64(1) * fraction, exponent - form.bias - form.mantissa)
    if form.specials == "ieee":
        values[magnitude == form.infinity] = np.inf
    if form.specials != "none":
        values[magnitude > form.infinity - (form.specials == "nan")] = np.nan
    return _frozen(np.where(codes > form.last, -values, values).astype(dtype))


@cache
def _nibble_table(dtype: type) -> np.ndarray:
    codes = np.arange(256, dtype=np.uint8)
    return _frozen(
        np.stack([decode(codes & np.uint8(15), "e2m1", dtype), decode(codes >> 4, "e2m1", dtype)], axis=1)
    )


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def encode(
    x: np.ndarray, name: str, rounding: str = "rn", relu: bool = False, satfinite: bool = True
) -> np.ndarray:
    """Codes that values round to.

    Args:
        x: float32 of any shape.
        name: a format of at most 8 bits.
        rounding: "rn", "rz" or, for ue8m0, "rp". Of ue8m0, which has no sign, it is that of the magnitude.
        relu: negative values give 0.
        satfinite: what is too large, infinity included, gives the largest finite value; else infinity, or NaN
            in a format without it.
    Returns:
        uint8 of the same shape. NaN gives the last code: a NaN, or the largest value where there is none.
    """
    bits = x.view(np.uint32)
    # Seven bits of the fraction and whether there are more decide how a value rounds.
    place = (bits | ((bits & _REST) + _REST)) >> _BELOW
    return _codes_of(name, rounding, relu, satfinite).take(place)


def encode_stochastic(x: np.ndarray, name: str, random: np.ndarray, relu: bool = False) -> np.ndarray:
    """Codes of values rounded up in magnitude as often as random numbers say, the largest where too large.

    Args:
        x: float32.
        name: a format of at most 8 bits but ue8m0.
        random: float32 in [0, 1), multiples of 2**-16; values go up whose lost fraction and it make 1.
        relu: negative values give 0.
    """
    return _encode(x, FORMATS[name], lambda q: np.floor(q + random), relu, True)


_REST, _BELOW = np.array(0x7FFF, np.uint32), np.array(15, np.uint32)
_MAGNITUDE, _EXPONENT = np.array(0x7FFFFFFF, np.uint32), np.array(0x7F800000, np.uint32)
_ROUND = {"rn": np.rint, "rz": np.floor, "rp": np.ceil}


@cache
def _codes_of(name: str, rounding: str, relu: bool, satfinite: bool) -> np.ndarray:
    """Codes of float32 by their upper 16 bits and whether any bit below is set, read-only uint8."""
    upper = np.arange(1 << 17, dtype=np.uint32) << 15
    x = upper.view(np.float32)
    with np.errstate(all="ignore"):
        if name == "ue8m0":
            return _frozen(_encode_exponent(x, rounding, satfinite))
        return _frozen(_encode(x, FORMATS[name], _ROUND[rounding], relu, satfinite))


def _encode(
    x: np.ndarray, form: Format, integer: Callable[[np.ndarray], np.ndarray], relu: bool, satfinite: bool
) -> np.ndarray:
    bits = x.view(np.uint32)
    magnitude = bits & _MAGNITUDE
    nan, negative = magnitude > _EXPONENT, bits > _MAGNITUDE
    # Larger than any value of the format, so that the code below does not run over.
    magnitude = np.minimum(magnitude, np.uint32(127 + 32 << 23))
    least = np.uint32(127 + form.least_exponent << 23)
    exponent = np.maximum(magnitude & _EXPONENT, least)
    unit = (exponent - np.uint32(form.mantissa << 23)).view(np.float32)
    # A fraction that rounds up to 2 carries into the exponent, as it should.
    code = integer(magnitude.view(np.float32) / unit).astype(np.uint32)
    code += (exponent - least) >> np.uint32(23 - form.mantissa)
    code = np.where(code > form.largest, form.largest if satfinite else form.infinity, code)
    sign = np.uint32(1 << form.bits - 1) if form.signed else np.uint32(0)
    code = np.where(negative, np.uint32(0) if relu or not form.signed else code | sign, code)
    return np.where(nan, form.last, code).astype(np.uint8)


def _encode_exponent(x: np.ndarray, rounding: str, satfinite: bool) -> np.ndarray:
    """ue8m0: a power of two each, none of them zero."""
    mantissa, exponent = np.frexp(np.abs(x).astype(np.float64))
    code = exponent - 1 + 127 + ((mantissa > 0.5) & (rounding == "rp"))
    code = np.where(x == 0, 0, np.maximum(code, 0))
    code = np.where(np.isinf(x), 255, code)
    code = np.minimum(code, 254 if satfinite else 255)
    return np.where(x == x, code, 255).astype(np.uint8)
