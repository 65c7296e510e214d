"""Single instructions on arrays, and the arithmetic they are held against: exact, on Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from dsv4lab.emulator import ptx
from dsv4lab.emulator.isa import registry
from dsv4lab.emulator.lane_types import DTYPES, constant, narrow, register_class, widen

# Registers that an instruction may name: the letter says what they are.
_DECLARED = ".reg .b8 o<9>; .reg .b16 h<9>; .reg .b32 r<9>; .reg .b64 w<9>; .reg .pred p<9>;"


def parse(text: str) -> ptx.Instruction:
    """An instruction whose registers are o0 ... (8 bits), h0 ... (16), r0 ... (32), w0 ... (64) and p0 ..."""
    source = (
        f".version 9.0\n.target sm_100a\n.address_size 64\n.visible .entry k()\n{{ {_DECLARED} {text}; }}"
    )
    (found,) = ptx.parse(source).function("k").instructions
    return found


def execute(text: str, **registers: np.ndarray | list) -> np.ndarray | tuple[np.ndarray, ...]:
    """What an instruction writes.

    Args:
        text: as of parse; a batch is needed for effects, which this is not for.
        registers: arrays of one length; their bits are what counts, and lists are taken as integers.
    Returns:
        Unsigned integers of the registers written (bool for predicates), in the order of the operands.
    """
    action = registry.build(parse(text))
    files = {name: _stored(name, value) for name, value in registers.items()}
    with np.errstate(all="ignore"):
        results = action.function(*(_read(files, operand, type_) for operand, type_ in action.reads))
    results = results if isinstance(results, tuple) else (results,)
    written = [_written(v, *w) for v, w in zip(results, action.writes, strict=True)]
    shape = np.broadcast_shapes(*(value.shape for value in files.values()))
    written = [np.broadcast_to(value, shape).reshape(-1) for value in written]
    return written[0] if len(written) == 1 else tuple(written)


def _stored(name: str, value: np.ndarray | list) -> np.ndarray:
    storage = DTYPES[{"o": "b16", "h": "b16", "r": "b32", "w": "b64", "p": "pred"}[name[0]]]
    if isinstance(value, list):
        value = np.array(
            [x % (1 << 8 * storage.itemsize) if storage.kind == "u" else x for x in value], storage
        )
    value = np.ascontiguousarray(value)
    if value.dtype.itemsize != storage.itemsize:
        value = value.astype(storage)
    return value.view(storage).reshape(1, -1)


def _read(files: dict[str, np.ndarray], operand: ptx.Operand, type_: str) -> np.ndarray:
    dtype = DTYPES[type_]
    if isinstance(operand, ptx.Immediate):
        return constant(operand.bits, type_)
    if isinstance(operand, ptx.Not):
        return ~files[operand.register.name]
    value = files[operand.name]
    assert (dtype == np.bool_) == (value.dtype == np.bool_), f"{operand.name} cannot be read as {type_}"
    assert dtype.itemsize <= value.dtype.itemsize, f"{operand.name} is too narrow for {type_}"
    return value.view(dtype) if dtype.itemsize == value.dtype.itemsize else narrow(value, dtype)


def _written(value: np.ndarray, operand: ptx.Operand, type_: str) -> np.ndarray:
    assert value.dtype == DTYPES[type_], f"{value.dtype} is written as {type_}"
    storage = DTYPES[register_class(operand.type)]
    assert (storage == np.bool_) == (value.dtype == np.bool_)
    return widen(value, storage) if value.dtype.itemsize != storage.itemsize else value.view(storage)


# Exact rounding --------------------------------------------------------------------------------------------

# Bits of the fraction, smallest exponent of a normal number, largest exponent.
FORMATS = {
    "f64": (52, -1022, 1023),
    "f32": (23, -126, 127),
    "tf32": (10, -126, 127),
    "bf16": (7, -126, 127),
    "f16": (10, -14, 15),
    "e5m2": (2, -14, 15),
    "e4m3": (3, -6, 8),
    "e2m3": (3, 0, 2),
    "e3m2": (2, -2, 4),
    "e2m1": (1, 0, 2),
}


def rounded(value: Fraction, name: str, way: str = "rn") -> Fraction | float:
    """A number rounded to a format: "rn", "rz", "rm", "rp" or "rna". Infinity where it overflows."""
    fraction, least, most = FORMATS[name]
    if not value:
        return Fraction(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - fraction)
    count = size / unit
    whole, rest = count.numerator // count.denominator, count - count.numerator // count.denominator
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 > value,
        "rp": rest > 0 and value > 0,
    }[way]
    result = (whole + up) * unit
    largest = (2 - Fraction(1, 1 << fraction)) * Fraction(2) ** most
    if result > largest:
        stays = way == "rz" or (way == "rm" and value > 0) or (way == "rp" and value < 0)
        return (largest if stays else math.inf) * (1 if value > 0 else -1)
    return result if value > 0 else -result


def fractions(values: np.ndarray) -> list[Fraction]:
    """Finite floats of any type as exact numbers."""
    return [Fraction(float(value)) for value in np.asarray(values).reshape(-1)]


def f32(*values: float) -> np.ndarray:
    """float32 array."""
    return np.array(values, np.float32)


def bits32(values: np.ndarray | list) -> np.ndarray:
    """uint32 bits of float32."""
    return np.asarray(values, np.float32).view(np.uint32)


def bf16(values: np.ndarray | list) -> np.ndarray:
    """uint16 bits of values that bfloat16 holds exactly."""
    bits = bits32(values)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def f16(values: np.ndarray | list) -> np.ndarray:
    """uint16 bits of values that float16 holds exactly."""
    half = np.asarray(values, np.float16)
    assert (half.astype(np.float64) == np.asarray(values, np.float64)).all()
    return half.view(np.uint16)
