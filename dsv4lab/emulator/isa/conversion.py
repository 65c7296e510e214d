"""cvt between single numbers: integers and f16, bf16, tf32, f32, f64; and cvt.pack.

From one floating-point format to another is in float_conversion, packed formats are in packed_conversion.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.exact import rounded64
from dsv4lab.emulator.isa import float_conversion, packed_conversion
from dsv4lab.emulator.isa.formats import HELD
from dsv4lab.emulator.isa.registry import Action, Pure, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.rounding import F64, flush, odd_sum, round_to

Function = Callable[..., np.ndarray]

_INTEGERS = {f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)}
_FLOATS = ("f16", "bf16", "f32", "f64")
_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rs")
_TO_INTEGER = float_conversion.TO_INTEGER


@instruction("cvt")
def cvt(ins: Instruction) -> Action:
    """cvt in all its forms."""
    if ins.modifiers[0] == "pack":
        return _pack(ins)
    *flags, dtype, atype = ins.modifiers
    if "x" in dtype or "x" in atype:
        return packed_conversion.build(ins)
    rounding = flags.pop(0) if flags and flags[0] in (*_ROUNDINGS, *_TO_INTEGER) else None
    known = [flag for flag in ("ftz", "sat", "satfinite", "relu") if flag in flags]
    if len(known) != len(flags) or len(ins.operands) != 2 or rounding == "rs":
        raise unsupported(ins)
    function = _conversion(dtype, atype, rounding, flags)
    if function is None:
        raise unsupported(ins)
    target, source = ins.operands
    return Pure(function, ((source, atype),), ((target, "b32" if dtype == "tf32" else dtype),))


def _conversion(dtype: str, atype: str, rounding: str | None, flags: list[str]) -> Function | None:
    if atype in _INTEGERS and dtype in _INTEGERS:
        return _between_integers(dtype, "sat" in flags) if not rounding else None
    if atype in _FLOATS and dtype in _INTEGERS:
        return _to_integer(dtype, atype, rounding, "ftz" in flags) if rounding in _TO_INTEGER else None
    if atype in _INTEGERS and dtype in _FLOATS:
        return _from_integer(dtype, atype, rounding, flags) if rounding in _ROUNDINGS[:4] else None
    if atype in _FLOATS and dtype in (*_FLOATS, "tf32"):
        return float_conversion.between(dtype, atype, rounding, flags)
    return None


def _between_integers(dtype: str, sat: bool) -> Function:
    to = DTYPES[dtype]
    if not sat:
        return lambda x: x.astype(to)
    limits = np.iinfo(to)

    def clamp(x: np.ndarray) -> np.ndarray:
        own = np.iinfo(x.dtype)
        return np.clip(x, max(limits.min, own.min), min(limits.max, own.max)).astype(to)

    return clamp


def _to_integer(dtype: str, atype: str, rounding: str, ftz: bool) -> Function:
    """Rounded and clamped; NaN gives 0, or the sign bit alone if 64-bit numbers are involved."""
    to, load, to_whole = DTYPES[dtype], HELD[atype].load, _TO_INTEGER[rounding]
    limits = np.iinfo(to)
    low, high = float(limits.min), float(limits.max)
    of_nan = 1 << 8 * to.itemsize - 1 if atype == "f64" or to.itemsize == 8 else 0
    nan_value = np.array(of_nan, f"u{to.itemsize}").view(to)
    wide = np.dtype(np.uint64) if dtype == "u64" else np.dtype(np.int64)

    def convert(x: np.ndarray) -> np.ndarray:
        x = load(x)
        whole = to_whole(flush(x) if ftz else x).astype(F64)
        r = np.minimum(np.maximum(whole, low), high).astype(wide).astype(to)
        if to.itemsize == 8:  # the upper limit is no float64
            r = np.where(whole >= high, to.type(limits.max), r)
        bad = x != x
        return np.where(bad, nan_value, r) if np.count_nonzero(bad) else r

    return convert


def _from_integer(dtype: str, atype: str, rounding: str, flags: list[str]) -> Function:
    finish, store = float_conversion.clamps(flags), HELD[dtype].store
    if dtype in ("f32", "f64") and rounding == "rn":
        to = DTYPES[dtype]
        return lambda x: finish(x.astype(to))  # one rounding
    if atype[1:] != "64":
        if dtype == "f64":
            return lambda x: finish(x.astype(F64))
        return lambda x: store(finish(round_to(x.astype(F64), dtype, rounding)))

    def convert(x: np.ndarray) -> np.ndarray:
        upper, lower = (
            (x >> x.dtype.type(32)).astype(F64) * 2.0**32,
            (x & x.dtype.type(0xFFFFFFFF)).astype(F64),
        )
        if dtype == "f64":
            return finish(rounded64("add", rounding, upper, lower))
        return store(finish(round_to(odd_sum(upper, lower), dtype, rounding)))

    return convert


# cvt.pack -----------------------------------------------------------------------------------------------


def _pack(ins: Instruction) -> Action:
    """a and b saturated to narrow integers side by side, with what c holds above them."""
    sat, dtype, atype, *ctype = ins.modifiers[1:]
    bits, signed = int(dtype[1:]), dtype[0] == "s"
    if sat != "sat" or atype != "s32" or bits not in (2, 4, 8, 16) or ctype != (["b32"] if bits < 16 else []):
        raise unsupported(ins)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    field, place = np.uint32((1 << bits) - 1), np.uint32(bits)

    def pack(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        upper, lower = ((np.clip(x, low, high).view(np.uint32) & field) for x in (a, b))
        both = upper << place | lower
        return both | c[0] << np.uint32(2 * bits) if c else both

    target, a, b, *c = ins.operands
    reads = ((a, "s32"), (b, "s32"), *((operand, "b32") for operand in c))
    return Pure(pack, reads, ((target, "b32"),))
