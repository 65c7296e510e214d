"""Counting, finding and reversing bits."""

from __future__ import annotations

import numpy as np

from dsv4lab.emulator.isa.bits import checked_type, pure
from dsv4lab.emulator.isa.registry import Action, instruction
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction

_U32, _U64 = np.dtype(np.uint32), np.dtype(np.uint64)


_ONES = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)
_REVERSED = np.packbits(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), axis=1, bitorder="little"
)[:, 0]


def ones(x: np.ndarray) -> np.ndarray:
    """Set bits of uint32 or uint64 (...), as uint32."""
    parts = np.ascontiguousarray(x)[..., None].view(np.uint16)
    return _ONES[parts].sum(axis=-1, dtype=_U32)


def highest(x: np.ndarray) -> np.ndarray:
    """Position of the highest set bit of uint32 or uint64 (...), -1 for 0, as int32."""
    if x.dtype == _U64:
        upper = highest((x >> 32).astype(_U32))
        return np.where(upper >= 0, upper + 32, highest(x.astype(_U32)))
    exponent = (x.astype(np.float64).view(np.int64) >> 52).astype(np.int32) - 1023
    return np.maximum(exponent, -1)


@instruction("popc", "clz", "brev")
def count(ins: Instruction) -> Action:
    """Number of ones, of leading zeros; the bits in reverse."""
    type_ = checked_type(ins, "b32", "b64")
    top = np.int32(DTYPES[type_].itemsize * 8 - 1)
    if ins.op == "brev":
        return pure(ins, reverse, (type_,), type_)
    function = ones if ins.op == "popc" else lambda a: (top - highest(a)).view(_U32)
    return pure(ins, function, (type_,), "u32")


def reverse(x: np.ndarray) -> np.ndarray:
    """The bits of uint32 or uint64 (...) in reverse order."""
    octets = np.ascontiguousarray(x)[..., None].view(np.uint8)
    return np.ascontiguousarray(_REVERSED[octets[..., ::-1]]).view(x.dtype)[..., 0]


@instruction("bfind")
def bfind(ins: Instruction) -> Action:
    """Position of the highest bit that is not a sign bit, 0xffffffff if there is none."""
    type_ = checked_type(ins, "u32", "s32", "u64", "s64")
    width = DTYPES[type_].itemsize * 8
    unsigned = DTYPES[f"u{width}"]
    amount = ins.modifiers[0] == "shiftamt"

    def function(a: np.ndarray) -> np.ndarray:
        found = highest((np.where(a < 0, ~a, a) if type_[0] == "s" else a).view(unsigned))
        return (np.where(found >= 0, width - 1 - found, found) if amount else found).view(_U32)

    return pure(ins, function, (type_,), "u32")


@instruction("fns")
def fns(ins: Instruction) -> Action:
    """Position of the offset-th set bit of a mask from the bit `base` on: up, or down for negative ones."""
    checked_type(ins, "b32")
    bit = np.arange(32)

    def function(mask: np.ndarray, base: np.ndarray, offset: np.ndarray) -> np.ndarray:
        mask, base, offset = (x[..., None].astype(np.int64) for x in (mask, base, offset))
        is_set = (mask >> bit & 1).astype(np.bool_)
        up, down = is_set & (bit >= base), is_set & (bit <= base)
        rank_up = np.cumsum(up, axis=-1)
        rank_down = np.cumsum(down[..., ::-1], axis=-1)[..., ::-1]
        at = is_set & (bit == base)
        hit = np.where(
            offset > 0, up & (rank_up == offset), np.where(offset < 0, down & (rank_down == -offset), at)
        )
        return np.where(hit.any(axis=-1), hit.argmax(axis=-1), 0xFFFFFFFF).astype(_U32)

    return pure(ins, function, ("b32", "u32", "s32"), "b32")
