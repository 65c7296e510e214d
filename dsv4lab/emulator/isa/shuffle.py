"""shfl.sync: lanes of a warp read each other's registers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.batch import ALL_LANES, bits_of
from dsv4lab.emulator.convergence import together
from dsv4lab.emulator.errors import UninitialisedError
from dsv4lab.emulator.isa.collective import LANE, all_here, gathered, unless_parked, with_predicate
from dsv4lab.emulator.isa.registry import Wait, instruction, unsupported
from dsv4lab.emulator.ptx import Instruction

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch


@instruction("shfl")
def shfl(ins: Instruction) -> Wait:
    """shfl.sync.mode.b32 d{|p}, a, b, c, membermask."""
    if len(ins.modifiers) != 3 or ins.modifiers[0] != "sync" or ins.modifiers[2] != "b32":
        raise unsupported(ins)
    mode = ins.modifiers[1]
    if mode not in ("up", "down", "bfly", "idx"):
        raise unsupported(ins)
    target, *operands = ins.operands
    sources = tuple((operand, "u32") for operand in operands)
    writes = with_predicate(target, ("u32", "pred"))

    def function(batch: Batch, mask: np.ndarray, *reads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        full, here = all_here(batch, mask) and bool((reads[3] == ALL_LANES).all()), mask
        if full and not any(reads[1].strides + reads[2].strides):
            source, valid = _fixed_sources(mode, int(reads[1][0, 0]), int(reads[2][0, 0]))
            return reads[0].take(source, 1), valid
        if not full:
            mask = gathered(batch, mask, reads[3], ins)
        checked = not full and "initialised" in batch.machine.checks

        def core(mask: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, members: np.ndarray):
            source, valid = _sources(mode, b, c)
            given = True if full else np.take_along_axis(mask, source, 1) & (members >> source & 1 != 0)
            if checked and not (given | ~mask).all():
                _refuse_source(mask & ~given, source, mask)
            value = np.take_along_axis(a, source, 1)
            return (value if full else np.where(given, value, a)), valid

        results = together(batch, mask, core, *reads)
        return unless_parked(results, (here & ~mask).any(1), sources, reads, writes)

    return Wait(function, sources, writes)


def _sources(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads (n, 32), and whether it lies in the lane's segment."""
    lane = LANE.astype(np.int64)
    distance, clamp, segment = (x.astype(np.int64) for x in (b & 31, c & 31, c >> 8 & 31))
    first = lane & segment
    last = first | clamp & ~segment
    if mode == "up":
        source = lane - distance
        valid = source >= last
    else:
        source = {
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": first | distance & ~segment,
        }[mode]
        valid = source <= last
    return np.where(valid, source, lane), valid


@lru_cache
def _fixed_sources(mode: str, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """The same where all lanes have the same operands: (32,) and (1, 32)."""
    source, valid = _sources(mode, np.array([[b]]), np.array([[c]]))
    return source[0], valid


def _refuse_source(wrong: np.ndarray, source: np.ndarray, mask: np.ndarray) -> None:
    row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
    raise UninitialisedError(
        f"lane {lane} reads lane {int(source[row, lane])}, which does not take part in the shuffle "
        f"(lanes {int(bits_of(mask[[row]])[0]):#010x} execute it)"
    )
