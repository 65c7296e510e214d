"""Instructions that all 32 lanes of a warp execute together (.sync.aligned) and that mix their registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.convergence import Convergence, ConvergenceError, together
from dsv4lab.emulator.errors import at
from dsv4lab.emulator.isa.registry import Typed, Wait
from dsv4lab.emulator.ptx import Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_ALL = np.uint32(0xFFFFFFFF)


def warp_wide(ins: Instruction, core: Callable[..., Any], reads: Typed, writes: Typed = ()) -> Wait:
    """An instruction that waits for all lanes of the warp.

    Args:
        ins: the instruction.
        core: of (batch, mask, *reads), one row a warp whose mask is all True or all False; returns a tuple of
            values (n, 32), or None. It may park rows, and returns then what their destinations hold.
        reads, writes: as of Wait.
    """

    def function(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> Any:
        if mask.all():
            return _results(core(batch, mask, *values))
        whole = _whole(batch, mask, ins)
        _, first, of_warp = np.unique(batch.warps, return_index=True, return_inverse=True)
        rows = batch if len(first) == len(batch) else batch.take(first)
        results = together(batch, whole, lambda m, *v: core(rows, m, *v), *values)
        if rows is not batch:
            for row in np.flatnonzero(np.isin(of_warp, list(rows.parked))).tolist():
                batch.parked[row] = rows.parked[int(of_warp[row])]
        return _results(kept(batch, writes, results))

    return Wait(function, reads, writes)


def _whole(batch: Batch, mask: np.ndarray, ins: Instruction) -> np.ndarray:
    """The mask without the rows that still wait for lanes of their warp.

    Raises:
        ConvergenceError: a warp has fewer than 32 lanes, or some have ended.
    """
    needed = np.full(len(batch), _ALL)
    mask = mask & batch.machine.state(Convergence).gather(batch, mask, needed, ins)[:, None]
    here = together(batch, mask, lambda m: np.broadcast_to(m.sum(1)[:, None], m.shape))[:, 0]
    if ((here != 0) & (here != 32)).any():
        row = int(np.flatnonzero((here != 0) & (here != 32))[0])
        what = (
            f"{ins.opcode} takes all 32 lanes of a warp, and {here[row]} of its lanes are there or not ended"
        )
        raise at(ConvergenceError(what), row)
    return mask


def kept(batch: Batch, writes: Typed, results: tuple[np.ndarray, ...] | None) -> Any:
    """Results in which rows that were parked have what their destinations hold.

    They execute the instruction again, and destinations may be sources too.
    """
    if results is None or not batch.parked:
        return results
    rows = np.array(list(batch.parked))
    changed = []
    for (operand, _), result in zip(writes, results, strict=True):
        old = batch.machine.registers[operand.index] if isinstance(operand, Register) else None
        if old is not None:
            result = np.array(np.broadcast_to(result, (len(batch), 32)))
            result[rows] = old[batch.warps[rows]].view(result.dtype)
        changed.append(result)
    return tuple(changed)


def _results(results: tuple[np.ndarray, ...] | None) -> Any:
    return results[0] if results is not None and len(results) == 1 else results


def elements(operand: Operand, type_: str) -> Typed:
    """The registers of an operand in braces, or its one register, with a type."""
    if isinstance(operand, Vector):
        return tuple((element, type_) for element in operand)
    return ((operand, type_),)


def stacked(values: tuple[np.ndarray, ...]) -> np.ndarray:
    """Registers (n, 32) side by side, as a new array (n, 32, registers)."""
    return np.stack(values, axis=-1)
