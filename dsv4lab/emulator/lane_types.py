"""Types of values on lanes: which NumPy array carries a PTX type, and how registers turn into one another."""

from __future__ import annotations

import numpy as np

# What a builder's type string stands for. "b128" is a pair of 64-bit halves in a last axis of 2.
DTYPES = {
    "pred": np.dtype(np.bool_),
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "b8": np.dtype(np.uint8),
    "u16": np.dtype(np.uint16),
    "s16": np.dtype(np.int16),
    "b16": np.dtype(np.uint16),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "u32": np.dtype(np.uint32),
    "s32": np.dtype(np.int32),
    "b32": np.dtype(np.uint32),
    "f32": np.dtype(np.float32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "u64": np.dtype(np.uint64),
    "s64": np.dtype(np.int64),
    "b64": np.dtype(np.uint64),
    "f64": np.dtype(np.float64),
    "f32x2": np.dtype(np.uint64),
    "b128": np.dtype(np.uint64),
    "address": np.dtype(np.int64),
}

# Storage of a register by the width of its declared type.
_STORAGE = {8: "b16", 16: "b16", 32: "b32", 64: "b64", 128: "b128"}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def register_class(declared: str) -> str:
    """Storage class of a register: "pred", "b16", "b32", "b64" or "b128"."""
    if declared == "pred":
        return declared
    return _STORAGE[bit_width(declared)]


def bit_width(type_: str) -> int:
    """Bits of a PTX type: 32 of "f32", 32 of "bf16x2"."""
    base, _, count = type_.partition("x")
    digits = "".join(c for c in base if c.isdigit())
    return int(digits) * int(count or 1)


def constant(bits: int, type_: str) -> np.ndarray:
    """A (1, 1) array of an integer, given modulo its width, or of a float's bit pattern."""
    dtype = DTYPES[type_]
    if dtype == np.bool_:
        return np.array([[bool(bits)]])
    if type_ == "b128":
        return np.array([[[bits & (1 << 64) - 1, bits >> 64 & (1 << 64) - 1]]], np.uint64)
    width = 8 * dtype.itemsize
    unsigned = np.array([[bits & (1 << width) - 1]], _UNSIGNED[dtype.itemsize])
    return unsigned.view(dtype)


def narrow(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The low bits of an unsigned value, as a smaller type."""
    return value.astype(_UNSIGNED[dtype.itemsize]).view(dtype)


def widen(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A value zero- or sign-extended, by its own type, to an unsigned register."""
    if value.dtype.kind == "f":
        value = value.view(_UNSIGNED[value.dtype.itemsize])
    signed = np.dtype(f"i{dtype.itemsize}") if value.dtype.kind == "i" else dtype
    return value.astype(signed).view(dtype)
