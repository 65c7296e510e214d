"""What the memory system computes when TMA and bulk copies reduce into memory.

Where the PTX ISA leaves bits open they are those that an H200 was seen to write (driver 580, 2026-11): a sum
that is NaN is all ones but its sign (of f64, the NaN that came in); min and max take the number rather than a
NaN, and order -0 below +0; an f32 sum keeps subnormals (the ISA says that it flushes them, and that of the
tensor type f32.ftz does).
"""

from __future__ import annotations

import numpy as np

from dsv4lab.emulator.errors import EmulatorError

_DTYPES = {
    "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32, "b64": np.uint64,
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f32.ftz": np.float32, "tf32": np.float32,
    "tf32.ftz": np.float32, "f64": np.float64,
}  # fmt: skip
_ORDERED = ("u32", "s32", "u64", "s64", "f16", "bf16")
_BITS = ("u32", "s32", "u64", "b32", "b64")
# Which types each operation takes; of tensors, and of untyped copies where the type is named "b32", "b64".
TYPES = {
    "add": ("u32", "s32", "u64", "f16", "bf16", "f32", "f32.ftz", "tf32", "tf32.ftz", "f64"),
    "min": _ORDERED,
    "max": _ORDERED,
    "inc": ("u32",),
    "dec": ("u32",),
    "and": _BITS,
    "or": _BITS,
    "xor": _BITS,
}


def check(operation: str, type_: str) -> None:
    """Raise EmulatorError for a combination that does not exist."""
    if operation not in TYPES:
        raise EmulatorError(f"no reduction {operation!r}")
    if type_ not in TYPES[operation]:
        raise EmulatorError(
            f"the reduction {operation} takes elements of {', '.join(TYPES[operation])}, got {type_}"
        )


def combine(operation: str, type_: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Element by element, what memory that holds `old` holds after `new` was reduced into it.

    Args:
        operation, type_: a combination that `check` allows.
        old, new: uint8, of one shape, whole elements in the last axis.
    Returns:
        uint8 of that shape.
    """
    check(operation, type_)
    dtype = _DTYPES[type_]
    old, new = (np.ascontiguousarray(x).view(dtype) for x in (old, new))
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(_result(operation, type_, old, new)).view(np.uint8)


def _result(operation: str, type_: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    match operation:
        case "add":
            return _sum(type_, old, new)
        case "min" | "max":
            return _extreme(operation, type_, old, new)
        case "inc":
            return np.where(old >= new, np.uint32(0), old + np.uint32(1))
        case "dec":
            return np.where((old == 0) | (old > new), new, old - np.uint32(1))
        case "and":
            return old & new
        case "or":
            return old | new
    return old ^ new


def _sum(type_: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    if type_ == "bf16":
        # With 24 bits, rounding the sum again to 8 gives what rounding once would.
        total = (old.astype(np.uint32) << 16).view(np.float32) + (new.astype(np.uint32) << 16).view(
            np.float32
        )
        bits = total.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
        return np.where(np.isnan(total), np.uint16(0x7FFF), rounded)
    if type_ == "f32.ftz":
        return _nan(_flushed(_flushed(old) + _flushed(new)))
    if type_ == "f64":
        return np.where(np.isnan(old), old, np.where(np.isnan(new), new, old + new))
    return _nan(old + new) if old.dtype.kind == "f" else old + new


def _nan(total: np.ndarray) -> np.ndarray:
    """Every NaN as the memory system writes it."""
    bits = total.view(f"u{total.dtype.itemsize}")
    ones = bits.dtype.type((1 << 8 * total.dtype.itemsize - 1) - 1)
    return np.where(np.isnan(total), ones, bits)


def _flushed(value: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def _extreme(operation: str, type_: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    choose = np.minimum if operation == "min" else np.maximum
    if type_ not in ("f16", "bf16"):
        return choose(old, new)
    infinity = np.uint16(0x7C00 if type_ == "f16" else 0x7F80)
    old, new = old.view(np.uint16), new.view(np.uint16)
    # Integers in the order of the numbers they stand for.
    keys = [np.where(x >> 15 == 1, ~x, x | np.uint16(0x8000)) for x in (old, new)]
    key = choose(*keys)
    result = np.where(key >> 15 == 1, key & np.uint16(0x7FFF), ~key)
    lost = [x & np.uint16(0x7FFF) > infinity for x in (old, new)]
    result = np.where(lost[0], new, np.where(lost[1], old, result))
    return np.where(lost[0] & lost[1], np.uint16(0x7FFF), result)
