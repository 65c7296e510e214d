"""redux.sync: reductions over the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.isa.collective import EVERYBODY, collective, peers_of
from dsv4lab.emulator.isa.registry import Wait, instruction, unsupported
from dsv4lab.emulator.ptx import Instruction

_NAN = np.uint32(0x7FFFFFFF)


@instruction("redux")
def redux(ins: Instruction) -> Wait:
    """redux.sync.op.type d, a, membermask; redux.sync.{min, max}{.abs}{.NaN}.f32 on sm_100a."""
    op, *options, type_ = ins.modifiers[1:]
    if ins.modifiers[0] != "sync" or (op, type_) not in _REDUCTIONS:
        raise unsupported(ins)
    if type_ == "f32" and {"abs", "NaN"}.issuperset(options):
        reduce_ = _float_reduction(op, "abs" in options, "NaN" in options)
    elif not options:
        ufunc, neutral = _REDUCTIONS[op, type_]

        def reduce_(peers: np.ndarray, value: np.ndarray) -> np.ndarray:
            value = np.where(peers, value, value.dtype.type(neutral))
            return ufunc.reduce(value, axis=2, dtype=value.dtype)
    else:
        raise unsupported(ins)
    kind = "u32" if type_ == "f32" else type_

    def core(mask: np.ndarray, value: np.ndarray, members: np.ndarray) -> np.ndarray:
        return reduce_(peers_of(mask, members), value[:, None, :])

    target, value, _ = ins.operands
    return collective(
        ins, core, ((value, kind),), ((target, kind),), lambda value: reduce_(EVERYBODY, value[:, None, :])
    )


_U, _S = np.iinfo(np.uint32), np.iinfo(np.int32)
_REDUCTIONS = {
    ("add", "u32"): (np.add, 0),
    ("add", "s32"): (np.add, 0),
    ("min", "u32"): (np.minimum, _U.max),
    ("max", "u32"): (np.maximum, _U.min),
    ("min", "s32"): (np.minimum, _S.max),
    ("max", "s32"): (np.maximum, _S.min),
    ("and", "b32"): (np.bitwise_and, _U.max),
    ("or", "b32"): (np.bitwise_or, 0),
    ("xor", "b32"): (np.bitwise_xor, 0),
    ("min", "f32"): (np.minimum, None),
    ("max", "f32"): (np.maximum, None),
}


def _float_reduction(op: str, absolute: bool, nan: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """On bit patterns: -0 is below +0; NaN is left out, or with .NaN is the result."""
    choose, neutral = (np.minimum, _S.max) if op == "min" else (np.maximum, _S.min)

    def reduce_(peers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        if absolute:
            bits = bits & np.uint32(0x7FFFFFFF)
        is_nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
        # Integers in the order of the floats they stand for.
        key = bits.view(np.int32) ^ (bits.view(np.int32) >> 31 & 0x7FFFFFFF)
        best = choose.reduce(np.where(peers & ~is_nan, key, np.int32(neutral)), axis=2)
        found = (best ^ (best >> 31 & 0x7FFFFFFF)).view(np.uint32)
        none = (peers & is_nan).any(2) if nan else ~(peers & ~is_nan).any(2)
        return np.where(none, _NAN, found)

    return reduce_
