"""How the lanes of a register hold floating-point numbers: one, or two packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv4lab.emulator.rounding import F16, F32, F64

_SIXTEEN = np.array(16, np.uint32)
_U16, _U32, _U64 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)


@dataclass(frozen=True, slots=True)
class Held:
    """A floating-point type as it lies in registers.

    Attributes:
        name: "f16", "bf16", "f32" or "f64": the format of each number.
        dtype: float16, float32 (of bfloat16 too) or float64, of the lanes.
        load: from the array of a register to float16, float32 or float64 lanes; packed types get a last axis
            of 2, the low half first. bfloat16 comes as float32. NaN keep their bits.
        store: the other way; of float32 that hold bfloat16 values.
    """

    name: str
    dtype: np.dtype
    load: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _parts(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.ascontiguousarray(x)[..., None].view(dtype)


def _whole(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.ascontiguousarray(x).view(dtype)[..., 0]


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 as float32."""
    return (bits.astype(_U32) << _SIXTEEN).view(F32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 that hold bfloat16 values as uint16 bits."""
    return (values.view(_U32) >> _SIXTEEN).astype(_U16)


HELD = {
    "f16": Held("f16", F16, _same, _same),
    "f32": Held("f32", F32, _same, _same),
    "f64": Held("f64", F64, _same, _same),
    "bf16": Held("bf16", F32, bf16_values, bf16_bits),
    "f16x2": Held("f16", F16, _parts(F16), _whole(_U32)),
    "f32x2": Held("f32", F32, _parts(F32), _whole(_U64)),
    "bf16x2": Held("bf16", F32, lambda x: bf16_values(_parts(_U16)(x)), lambda x: _whole(_U32)(bf16_bits(x))),
}
