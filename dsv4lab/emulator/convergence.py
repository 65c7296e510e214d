"""Lanes of one warp that must execute an instruction together: those that come first wait for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.batch import bits_of
from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.waits import Reason

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine


class ConvergenceError(EmulatorError):
    """Lanes that should execute an instruction together, and cannot."""


def alive(machine: Machine) -> np.ndarray:
    """uint32 (warps,), the lanes of each warp that exist and have not ended."""
    return machine.alive


class Convergence:
    """Lanes of a wave that wait for others of their warp; `machine.state(Convergence)` is a machine's one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._waiting: dict[tuple[int, int], int] = {}
        machine.on_exit.append(self._exited)

    def gather(self, batch: Batch, mask: np.ndarray, needed: np.ndarray, ins: Instruction) -> np.ndarray:
        """Rows (n,) bool whose warps are complete; the others are parked.

        Args:
            mask: (n, 32) bool, lanes that execute the instruction now.
            needed: uint32 (n,), lanes of each row's warp that must, unless they have ended.
        Raises:
            ConvergenceError: a needed lane is in the row, and its guard lets it skip the instruction.
        """
        here, present = _of_warps(batch, bits_of(mask)), _of_warps(batch, bits_of(batch.mask))
        needed = needed & alive(self.machine)[batch.warps]
        self._check_skipped(mask, needed & present & ~here, needed, ins)
        complete = (needed & ~here == 0) | ~mask.any(1)
        for row in np.flatnonzero(~complete).tolist():
            self._wait(batch, row, int(here[row]), int(needed[row]), ins)
        return complete

    def _check_skipped(
        self, mask: np.ndarray, skipped: np.ndarray, needed: np.ndarray, ins: Instruction
    ) -> None:
        wrong = (skipped != 0) & mask.any(1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise at(
                ConvergenceError(
                    f"lanes {int(needed[row]):#010x} must execute {ins.opcode} together, "
                    f"but the guard of {int(skipped[row]):#010x} is false"
                ),
                row,
            )

    def _wait(self, batch: Batch, row: int, here: int, needed: int, ins: Instruction) -> None:
        warp = int(batch.warps[row])
        key = ("lanes", warp, ins.line)
        come = self._waiting[warp, ins.line] = self._waiting.get((warp, ins.line), 0) | here
        if needed & ~come == 0:
            # The last to come: all of them run again, in one batch.
            del self._waiting[warp, ins.line]
            self.machine.wake(key)

        def reason() -> str:
            have = self._waiting.get((warp, ins.line), 0)
            return f"lanes {needed & ~have:#010x} of its warp to come there too (lanes {have:#010x} have)"

        batch.park(row, key, Reason(reason))

    def _exited(self, warps: np.ndarray) -> None:
        """Lanes of these warps have ended: those that waited for them look again."""
        for warp, line in list(self._waiting):
            if warp in warps:
                del self._waiting[warp, line]
                self.machine.wake(("lanes", warp, line))


def _of_warps(batch: Batch, bits: np.ndarray) -> np.ndarray:
    """For each row, the lanes of all rows of its warp: two rows may be parts of one."""
    warps = batch.warps
    if len(warps) < 2 or (np.diff(warps) > 0).all():
        return bits
    unique, inverse = np.unique(warps, return_inverse=True)
    together = np.zeros(len(unique), np.uint32)
    np.bitwise_or.at(together, inverse, bits)
    return together[inverse]


def together(batch: Batch, mask: np.ndarray, core: Callable[..., Any], *reads: np.ndarray) -> Any:
    """core(mask, *reads) with one row for each warp, its results given to all rows of the warp.

    Args:
        mask: (n, 32) bool.
        core: returns a value or a tuple of values that broadcast to (n, 32).
        reads: (n, 32) each.
    """
    warps = batch.warps
    if len(warps) < 2 or (np.diff(warps) > 0).all():
        return core(mask, *reads)
    unique, inverse = np.unique(warps, return_inverse=True)
    row, lane = np.nonzero(mask)
    shape = (len(unique), 32)

    def joined(value: np.ndarray) -> np.ndarray:
        result = np.zeros(shape, value.dtype)
        result[inverse[row], lane] = value[row, lane]
        return result

    results = core(joined(mask), *map(joined, reads))
    if results is None:
        return None
    if isinstance(results, tuple):
        return tuple(np.broadcast_to(result, shape)[inverse] for result in results)
    return np.broadcast_to(results, shape)[inverse]
