"""Integer arithmetic with the carry flag: add.cc, addc, sub.cc, subc, mad.cc and madc.

Every lane has one flag. After a subtraction it holds the borrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.isa.integer import high_product
from dsv4lab.emulator.isa.registry import Action, Effect, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine

_TYPES = ("u32", "s32", "u64", "s64")
_UNSIGNED = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


class Carry:
    """The carry flags of a wave.

    Attributes:
        flags: bool (warps, 32).
    """

    def __init__(self, machine: Machine) -> None:
        self.flags = np.zeros((machine.warps, 32), np.bool_)


def build(ins: Instruction) -> Action:
    """add.cc, sub.cc, mad.lo.cc and mad.hi.cc, and the forms that take the carry in."""
    takes, op = ins.op.endswith("c"), ins.op.removesuffix("c")
    *flags, type_ = ins.modifiers
    gives = "cc" in flags
    part = [flag for flag in flags if flag != "cc"]
    if type_ not in _TYPES or part not in ([["lo"], ["hi"]] if op == "mad" else [[]]) or not (takes or gives):
        raise unsupported(ins)

    def function(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> np.ndarray:
        if op == "mad":
            a, b, c = values
            values = (a * b if part == ["lo"] else high_product(type_, a, b)), c
        unsigned = _UNSIGNED[values[0].dtype.itemsize]
        first, second = (value.view(unsigned) for value in values)
        state = batch.machine.state(Carry)
        carry = state.flags[batch.warps] if takes else np.zeros(mask.shape, np.bool_)
        result, out = (_difference if op == "sub" else _sum)(first, second, carry.astype(unsigned))
        if gives:
            row, lane = np.nonzero(mask)  # lane by lane: two rows may be parts of one warp
            state.flags[batch.warps[row], lane] = out[row, lane]
        return result.view(DTYPES[type_])

    reads = tuple((operand, type_) for operand in ins.operands[1:])
    return Effect(function, reads, ((ins.operands[0], type_),))


def _sum(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    part = a + b
    total = part + carry
    return total, (part < a) | (total < part)


def _difference(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    part = a - b
    return part - borrow, (a < b) | (part < borrow)


instruction("addc", "subc", "madc")(build)
