"""What instructions have in common that the lanes of a member mask execute together.

The lanes that the mask names wait for each other at the instruction. A lane whose own mask does not name it
is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.convergence import Convergence, ConvergenceError, together
from dsv4lab.emulator.errors import at
from dsv4lab.emulator.isa.registry import Typed, Wait
from dsv4lab.emulator.ptx import Immediate, Instruction, Not, Operand, Pair, Sink

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

LANE = np.arange(32, dtype=np.uint32)
EVERYBODY = np.ones((1, 1, 32), np.bool_)  # peers_of where all lanes name all


def collective(
    ins: Instruction,
    core: Callable[..., Any],
    reads: Typed,
    writes: Typed,
    whole: Callable[..., Any] | None = None,
) -> Wait:
    """An instruction whose last operand is the member mask.

    Args:
        core: of (mask, *reads, members) on arrays (n, 32), one row for each warp.
        whole: of (*reads), the same where all lanes of all rows execute it and name each other.
    """
    members = ins.operands[-1]
    everybody = isinstance(members, Immediate) and members.bits & 0xFFFFFFFF == 0xFFFFFFFF
    reads = (*reads, (members, "u32"))

    def function(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> Any:
        if everybody and all_here(batch, mask):
            return core(mask, *values) if whole is None else whole(*values[:-1])
        going = gathered(batch, mask, values[-1], ins)
        results = together(batch, going, core, *values)
        return unless_parked(results, (mask & ~going).any(1), reads, values, writes)

    return Wait(function, reads, writes)


def all_here(batch: Batch, mask: np.ndarray) -> bool:
    """Whether all lanes of all rows execute the instruction."""
    return (batch.full and mask is batch.mask) or bool(mask.all())


def unless_parked(
    results: Any, parked: np.ndarray, reads: Typed, values: tuple[np.ndarray, ...], writes: Typed
) -> Any:
    """Results that leave operands of parked rows (n,) as they are: those execute the instruction again."""
    if not parked.any() or results is None:
        return results
    kept = list(results) if isinstance(results, tuple) else [results]
    for i, (target, _) in enumerate(writes):
        for (source, _), value in zip(reads, values, strict=True):
            if source == target:
                kept[i] = np.where(parked[:, None], value, kept[i])
            elif source == Not(target):
                kept[i] = np.where(parked[:, None], ~value, kept[i])
    return tuple(kept) if isinstance(results, tuple) else kept[0]


def gathered(batch: Batch, mask: np.ndarray, members: np.ndarray, ins: Instruction) -> np.ndarray:
    """The lanes (n, 32) bool of warps that are complete; the other rows are parked."""
    outside = mask & (members >> LANE & 1 == 0)
    if outside.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(outside))
        raise at(
            ConvergenceError(
                f"the lane executes {ins.opcode} with the member mask {int(members[row, lane]):#010x}, "
                "which does not name it"
            ),
            row,
            lane,
        )
    needed = np.bitwise_or.reduce(np.where(mask, members, np.uint32(0)), axis=1)
    return mask & batch.machine.state(Convergence).gather(batch, mask, needed, ins)[:, None]


def peers_of(mask: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Which lanes take part with each lane: (n, 1, 32) where a row has one mask, else (n, 32, 32)."""
    first = np.where(mask, members, np.uint32(0)).max(1)[:, None]
    if ((members == first) | ~mask).all():
        members = first
    return mask[:, None, :] & (members[:, :, None] >> LANE & 1 != 0)


def with_predicate(operand: Operand, kinds: tuple[str, str]) -> Typed:
    """The writes of d or of d|p."""
    if isinstance(operand, Pair):
        return (operand.first, kinds[0]), (operand.second, kinds[1])
    return ((operand, kinds[0]), (Sink(), kinds[1]))
