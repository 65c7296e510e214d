"""Bit fields: extract, insert, make a mask, extend."""

from __future__ import annotations

import numpy as np

from dsv4lab.emulator.isa.bits import checked_type, pure
from dsv4lab.emulator.isa.registry import Action, instruction
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction

_U32, _BYTE = np.dtype(np.uint32), np.array(0xFF, np.uint32)
_THIRTY_TWO, _THIRTY_ONE = np.array(32, _U32), np.array(31, _U32)


def _low_mask(length: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Ones in the low `length` bits; all of them beyond the width."""
    return ~np.left_shift(~dtype.type(0), length, dtype=dtype)


@instruction("bfe")
def bfe(ins: Instruction) -> Action:
    """Extract c bits of a from position b on; signed types repeat the field's upper bit."""
    type_ = checked_type(ins, "u32", "s32", "u64", "s64")
    dtype = DTYPES[type_]
    width = dtype.type(dtype.itemsize * 8)

    def unsigned(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        position, length = (b & _BYTE).astype(dtype), (c & _BYTE).astype(dtype)
        return np.right_shift(a, position) & _low_mask(length, dtype)

    def signed(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        position, length = (b & _BYTE).astype(dtype), (c & _BYTE).astype(dtype)
        above = width - np.minimum(position + length, width)  # bits above the field go out at the top
        return np.where(length == 0, dtype.type(0), np.right_shift(np.left_shift(a, above), above + position))

    return pure(ins, unsigned if type_[0] == "u" else signed, (type_, "u32", "u32"), type_)


@instruction("bfi")
def bfi(ins: Instruction) -> Action:
    """b with d bits of a put in at position c."""
    type_ = checked_type(ins, "b32", "b64")
    dtype = DTYPES[type_]

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        position = (c & _BYTE).astype(dtype)
        mask = np.left_shift(_low_mask((d & _BYTE).astype(dtype), dtype), position)
        return (b & ~mask) | (np.left_shift(a, position) & mask)

    return pure(ins, function, (type_, type_, "u32", "u32"), type_)


@instruction("bmsk")
def bmsk(ins: Instruction) -> Action:
    """b ones from position a on."""
    checked_type(ins, "b32")
    clamp = ins.modifiers[0] == "clamp"

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not clamp:
            a, b = a & _THIRTY_ONE, b & _THIRTY_ONE
        return np.left_shift(_low_mask(b, _U32), a)

    return pure(ins, function, ("u32", "u32"), "b32")


@instruction("szext")
def szext(ins: Instruction) -> Action:
    """The low b bits of a, sign- or zero-extended."""
    type_ = checked_type(ins, "u32", "s32")
    clamp = ins.modifiers[0] == "clamp"

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        length = b if clamp else b & _THIRTY_ONE
        rest = _THIRTY_TWO - np.minimum(length, _THIRTY_TWO)
        up = np.left_shift(a.view(_U32), rest).view(a.dtype)
        return np.right_shift(up, rest.view(a.dtype))

    return pure(ins, function, (type_, "u32"), type_)
