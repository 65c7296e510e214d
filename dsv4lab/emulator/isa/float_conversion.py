"""cvt between single floating-point numbers: f16, bf16, tf32, f32, f64.

PTX leaves the bits of NaN open; they are those of an H200.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.isa.formats import HELD
from dsv4lab.emulator.rounding import (
    F16,
    F32,
    F64,
    SHAPES,
    U16,
    U32,
    bf16_rn,
    canonical,
    flush,
    quiet,
    relu,
    round_to,
    saturate,
)

Function = Callable[..., np.ndarray]

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_WIDTH = {"f64": 3, "f32": 2, "f16": 1, "bf16": 1}
_TF32_HALF, _TF32_BITS = np.array(0x1000, U32), np.array(0xFFFFE000, U32)


def between(dtype: str, atype: str, rounding: str | None, flags: list[str]) -> Function | None:
    """The conversion from registers of type atype to registers of dtype; None if there is none such."""
    if rounding in TO_INTEGER:
        compute = TO_INTEGER[rounding] if dtype == atype else None
    elif dtype == "tf32" or (dtype != atype and _WIDTH[dtype] <= _WIDTH[atype]):
        if (dtype, rounding, flags) == ("tf32", "rna", []):
            return _nearest_tf32
        compute = _narrowing(dtype, atype, rounding)
    elif not flags and (dtype, atype) in (("f32", "f32"), ("f64", "f64"), ("f32", "bf16")):
        return HELD[atype].load  # bits as they are
    else:
        to = F32 if dtype == "bf16" else HELD[dtype].dtype
        compute = lambda x: x.astype(to, copy=False)  # noqa: E731
    return _finished(compute, dtype, atype, flags) if compute else None


def _finished(compute: Function, dtype: str, atype: str, flags: list[str]) -> Function:
    """A conversion of values with all that the flags ask for around it."""
    load, clamp = HELD[atype].load, clamps(flags)
    store = HELD[dtype].store if dtype != "tf32" else lambda x: x.view(U32) & _TF32_BITS
    # An H200 does not flush subnormal f32 that become f16.
    flush_in = "ftz" in flags and atype == "f32" and dtype != "f16"
    flush_out = "ftz" in flags and dtype == "f32"
    largest = SHAPES[dtype][2] if "satfinite" in flags else None
    nan = (
        _nan_of_double
        if atype == "f64" != dtype
        else lambda r, x: quiet(r) if dtype == "f64" else canonical(r)
    )

    def convert(x: np.ndarray) -> np.ndarray:
        x = load(x)
        if flush_in:
            x = canonical(flush(x))
        r = compute(x)
        if largest is not None:
            r = limited(r, largest)
        if flush_out:
            r = flush(r)
        return store(nan(clamp(r), x))

    return convert


def clamps(flags: list[str]) -> Function:
    """What .sat or .relu do to a result."""
    return saturate if "sat" in flags else relu if "relu" in flags else lambda r: r


def limited(x: np.ndarray, largest: float) -> np.ndarray:
    """Infinities as the largest value of their sign (.satfinite); NaN stays."""
    return np.minimum(np.maximum(x, x.dtype.type(-largest)), x.dtype.type(largest))


def _narrowing(dtype: str, atype: str, rounding: str | None) -> Function | None:
    """Float16, float32 or float64 rounded to f16 (as float16), or bf16, tf32, f32 (as float32)."""
    if rounding is None and {dtype, atype} == {"f16", "bf16"}:
        rounding = "rn"
    if rounding is None or (rounding == "rna" and dtype != "tf32"):
        return None
    if (dtype, rounding) == ("f16", "rn"):
        return lambda x: x.astype(F16)
    if (dtype, rounding) == ("bf16", "rn") and atype != "f64":
        return lambda x: bf16_rn(x.astype(F32, copy=False))
    return lambda x: round_to(x.astype(F64), dtype, rounding)


def _nearest_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: half a unit is added to the bits; a NaN keeps its own, as on an H200."""
    half = np.where(x != x, np.uint32(0), _TF32_HALF)
    return (x.view(U32) + half) & _TF32_BITS


def _nan_of_double(r: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Narrowed float64 `x` (float16, or float32 that may hold bfloat16) with the upper bits of its NaN."""
    bad = r != r
    if not np.count_nonzero(bad):
        return r
    nan = x.astype(F32)
    if r.dtype == F16:
        bits = nan.view(U32) >> 13
        nan = ((bits >> 3 & 0x8000) | 0x7E00 | (bits & 0x3FF)).astype(U16).view(F16)
    return np.where(bad, nan, r)
