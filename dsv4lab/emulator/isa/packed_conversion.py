"""cvt to and from packed numbers: f16x2, bf16x2, and the formats of 4, 6 and 8 bits in twos and fours.

Of two operands the first is the upper half. Stochastic rounding (.rs) adds random bits to the lost fraction;
where there are fewer of them than bits are lost they stand for the upper ones, and two numbers of four share
the bits of a half of the operand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from dsv4lab.emulator.isa.formats import HELD
from dsv4lab.emulator.isa.registry import Action, Pure, unsupported
from dsv4lab.emulator.ptx import Instruction, Vector
from dsv4lab.emulator.rounding import F16, F32, F64, SHAPES, bf16_bits, canonical, relu, round_to
from dsv4lab.emulator.small_floats import decode, encode, encode_stochastic

Function = Callable[..., np.ndarray]

_HALVES = ("f16x2", "bf16x2")
_SMALL = ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "ue8m0", "s2f6")
_SCALED = "scaled::n2::ue8m0"
_U8, _U16, _U32 = np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32)
_EIGHT, _SIXTEEN = np.array(8, _U16), np.array(16, _U32)


def build(ins: Instruction) -> Action:
    """cvt with a packed type. Raises UnsupportedInstruction."""
    rounding, *flags, dtype, atype = ins.modifiers
    scaled = _SCALED in flags
    flags = [flag for flag in flags if flag != _SCALED]
    name, _, many = dtype.partition("x")
    if not set(flags) <= {"relu", "satfinite"} or len(set(flags)) < len(flags):
        raise unsupported(ins)
    if rounding == "rs":
        return _stochastic(ins, name, int(many or 0), flags)
    if atype == "f32" and many == "2" and dtype in _HALVES and rounding in ("rn", "rz") and not scaled:
        return _halves_from_singles(ins, name, rounding, flags)
    if name in _SMALL and many == "2" and (atype == "f32" or atype in _HALVES):
        return _to_small(ins, name, atype, rounding, flags, scaled)
    if dtype in _HALVES and atype.endswith("x2") and atype[:-2] in _SMALL and rounding == "rn":
        return _from_small(ins, name, atype[:-2], flags, scaled)
    raise unsupported(ins)


def _joined(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """uint16 of two uint8, or uint32 of two uint16."""
    wide, shift = (_U16, _EIGHT) if upper.dtype == _U8 else (_U32, _SIXTEEN)
    return (upper.astype(wide) << shift) | lower


# Two f32 in a register ----------------------------------------------------------------------------------


def _half(name: str, rounding: str, flags: list[str]) -> Function:
    """Float32 as the bits (uint16) of f16 or bf16."""
    plain = not flags and rounding == "rn"

    def convert(x: np.ndarray) -> np.ndarray:
        return finished(x if rounding == "rn" and name == "f16" else round_to(x.astype(F64), name, rounding))

    def finished(r: np.ndarray) -> np.ndarray:
        return finish_half(r, name, flags)

    if plain and name == "bf16":
        return lambda x: (bf16_bits(x) >> _SIXTEEN).astype(_U16)
    if plain:
        return lambda x: canonical(x.astype(F16)).view(_U16)
    return convert


def finish_half(r: np.ndarray, name: str, flags: list[str]) -> np.ndarray:
    """The bits (uint16) of f16 or bf16 after .satfinite and .relu.

    Args:
        r: float32 that hold values of the format, or are to be rounded to f16.
        name: "f16" or "bf16".
        flags: of these two.
    """
    r = r.astype(F16) if name == "f16" else r
    if "satfinite" in flags:
        largest = r.dtype.type(SHAPES[name][2])
        r = np.minimum(np.maximum(r, -largest), largest)
    if "relu" in flags:
        r = relu(r)
    r = canonical(r)
    return r.view(_U16) if name == "f16" else HELD["bf16"].store(r)


def _halves_from_singles(ins: Instruction, name: str, rounding: str, flags: list[str]) -> Pure:
    target, a, b = ins.operands
    half = _half(name, rounding, flags)
    if name == "bf16" and rounding == "rn" and not flags:  # the upper half is in place already

        def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return bf16_bits(a) | (bf16_bits(b) >> _SIXTEEN)
    else:

        def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return _joined(half(a), half(b))

    return Pure(pair, ((a, "f32"), (b, "f32")), ((target, "b32"),))


# Formats of at most 8 bits ------------------------------------------------------------------------------


def _result_type(name: str) -> str:
    return "b8" if name == "e2m1" else "b16"


def _join(upper: np.ndarray, lower: np.ndarray, name: str) -> np.ndarray:
    return (upper << _U8.type(4)) | lower if name == "e2m1" else _joined(upper, lower)


def _to_small(ins: Instruction, name: str, atype: str, rounding: str, flags: list[str], scaled: bool) -> Pure:
    fixed = name == "s2f6"
    good = rounding in (("rz", "rp") if name == "ue8m0" else ("rn",)) and (scaled <= fixed)
    if not good or ("satfinite" not in flags and name != "ue8m0") or (name == "ue8m0" and atype == "f16x2"):
        raise unsupported(ins)
    with_relu, satfinite = "relu" in flags, "satfinite" in flags

    def code(x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        if fixed:
            return _to_fixed(x, scale, with_relu)
        return encode(x, name, rounding, with_relu, satfinite)

    def scales(rest: tuple[np.ndarray, ...]) -> tuple[np.ndarray | None, np.ndarray | None]:
        return (decode(rest[0] >> _EIGHT, "ue8m0"), decode(rest[0], "ue8m0")) if rest else (None, None)

    def from_singles(a: np.ndarray, b: np.ndarray, *scale: np.ndarray) -> np.ndarray:
        upper, lower = scales(scale)
        return _join(code(a, upper), code(b, lower), name)

    def from_halves(x: np.ndarray, *scale: np.ndarray) -> np.ndarray:
        upper, lower = scales(scale)
        values = HELD[atype].load(x).astype(F32)
        return _join(code(values[..., 1], upper), code(values[..., 0], lower), name)

    count = 2 if atype == "f32" else 1
    if len(ins.operands) != 1 + count + scaled:
        raise unsupported(ins)
    types = (["f32"] * 2 if atype == "f32" else [atype]) + ["b16"] * scaled
    function = from_singles if atype == "f32" else from_halves
    return Pure(
        function, tuple(zip(ins.operands[1:], types, strict=True)), ((ins.operands[0], _result_type(name)),)
    )


def _to_fixed(x: np.ndarray, scale: np.ndarray | None, with_relu: bool) -> np.ndarray:
    """s2f6: a byte that counts 64ths, in two's complement."""
    wide = x.astype(F64) if scale is None else x.astype(F64) / scale.astype(F64)
    r = np.minimum(np.maximum(np.rint(wide * 64), 0 if with_relu else -128), 127)
    return np.where(wide == wide, r, 127).astype(np.int8).view(_U8)


def _from_small(ins: Instruction, name: str, small: str, flags: list[str], scaled: bool) -> Pure:
    if (small == "ue8m0" and (name != "bf16" or flags)) or (small == "s2f6" and name != "bf16"):
        raise unsupported(ins)
    if (scaled and name != "bf16") or len(ins.operands) != 2 + scaled:
        raise unsupported(ins)
    values = _fixed_values if small == "s2f6" else lambda codes: decode(codes, small)

    def half(codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        r = values(codes)
        if scale is not None:
            r = round_to(r.astype(F64) * decode(scale, "ue8m0", np.float64), "bf16")
        return finish_half(r, name, flags)

    def convert(x: np.ndarray, *scale: np.ndarray) -> np.ndarray:
        upper, lower = (
            (x >> _U8.type(4), x) if small == "e2m1" else ((x >> _EIGHT).astype(_U8), x.astype(_U8))
        )
        scales = (scale[0] >> _EIGHT, scale[0]) if scale else (None, None)
        return _joined(half(upper, scales[0]), half(lower, scales[1]))

    if not scaled:
        convert = _looked_up(convert, _U8 if small == "e2m1" else _U16)
    reads = ((ins.operands[1], _result_type(small)), *((operand, "b16") for operand in ins.operands[2:]))
    return Pure(convert, reads, ((ins.operands[0], "b32"),))


def _looked_up(function: Function, dtype: np.dtype) -> Function:
    """A function of uint8 or uint16 as a table, made at its first call."""
    table = cache(lambda: function(np.arange(1 << 8 * dtype.itemsize).astype(dtype)))
    return lambda x: table().take(x)


def _fixed_values(codes: np.ndarray) -> np.ndarray:
    return codes.view(np.int8).astype(F32) / F32.type(64)


# Stochastic rounding ------------------------------------------------------------------------------------


def _stochastic(ins: Instruction, name: str, count: int, flags: list[str]) -> Pure:
    if ins.modifiers[-1] != "f32" or (name in ("f16", "bf16")) != (count == 2):
        raise unsupported(ins)
    if count == 2:
        return _stochastic_halves(ins, name, flags)
    if (
        count != 4
        or name not in _SMALL[:5]
        or "satfinite" not in flags
        or not isinstance(ins.operands[1], Vector)
    ):
        raise unsupported(ins)
    with_relu = "relu" in flags

    def convert(a: np.ndarray, b: np.ndarray, e: np.ndarray, f: np.ndarray, random: np.ndarray) -> np.ndarray:
        first, second = _shares(random, name)
        codes = [
            encode_stochastic(x, name, share, with_relu)
            for x, share in ((a, first), (b, first), (e, second), (f, second))
        ]
        return _joined(_join(*codes[:2], name), _join(*codes[2:], name))

    target, values, random = ins.operands
    reads = (*((operand, "f32") for operand in values), (random, "b32"))
    return Pure(convert, reads, ((target, "b16" if name == "e2m1" else "b32"),))


def _shares(random: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers in [0, 1) for the first two of four values, and for the last two."""
    upper, lower = random >> _SIXTEEN, random & _U32.type(0xFFFF)
    if name == "e2m1":  # one byte of each half, the upper bytes for the first two
        upper, lower = (
            (upper & _U32.type(0xFF00)) | (lower >> _U32.type(8)),
            (upper & _U32.type(0xFF)) << _U32.type(8) | (lower & _U32.type(0xFF)),
        )
    return upper.astype(F32) * F32.type(2.0**-16), lower.astype(F32) * F32.type(2.0**-16)


def _stochastic_halves(ins: Instruction, name: str, flags: list[str]) -> Pure:
    bits = 13 if name == "f16" else 16

    def half(x: np.ndarray, random: np.ndarray) -> np.ndarray:
        share = (random & _U32.type((1 << bits) - 1)).astype(F64) * 2.0**-bits
        wide = x.astype(F64)
        down = round_to(wide, name, "rz").astype(F64)
        precision, least, _ = SHAPES[name]
        exponent = np.maximum(np.frexp(down)[1] - 1, least)
        unit = np.ldexp(1.0, exponent - precision + 1)
        up = (np.abs(wide) - np.abs(down)) / unit + share >= 1
        grown = np.where(up & (np.abs(wide) < np.inf), down + np.copysign(unit, wide), down)
        return finish_half(round_to(grown, name), name, flags)

    def convert(a: np.ndarray, b: np.ndarray, random: np.ndarray) -> np.ndarray:
        return _joined(half(a, random >> _SIXTEEN), half(b, random))

    target, a, b, random = ins.operands
    return Pure(convert, ((a, "f32"), (b, "f32"), (random, "b32")), ((target, "b32"),))
