"""When bulk copies run and finish in the model's time, and what they share: issue, place, errors.

The model: each SM has one copy engine that serves its copies in the order of their issue at the SM's share of
the memory's bandwidth; the bytes are there LATENCY cycles after they have passed. It says what can overlap
with what, not how long a GPU takes, and decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.errors import AddressError, EmulatorError, at
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.shared_address import locate

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine

LATENCY = 600
# Bandwidth of the memory by SMs and boost clock, from NVIDIA's product data: H200 4.8 TB/s, 132 SMs, 1.98
# GHz; B200 and B300 8 TB/s, 148 SMs, 1.92 GHz.
BYTES_PER_CYCLE = {"sm_90a": 18, "sm_100a": 28, "sm_103a": 28}


class CopyEngines:
    """The copy engines of a wave; `machine.state(CopyEngines)` is the one object of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._rate = BYTES_PER_CYCLE.get(machine.arch.name, 18)
        self._free = [0] * machine.ctas
        self._serial = 0

    def serial(self) -> int:
        """A number for each copy."""
        self._serial += 1
        return self._serial

    def occupy(self, cta: int, issued: int, nbytes: int) -> int:
        """Let a CTA's engine copy `nbytes` that were issued at a time; returns when they are there."""
        passed = max(issued, self._free[cta]) + -(-nbytes // self._rate)
        self._free[cta] = passed
        return passed + LATENCY


class Issue:
    """One lane that issues a copy, or several of a warp that issue the same.

    Attributes:
        machine, row, lane: of the batch; the first lane.
        lanes: all of them.
        cta, warp: indices in the wave.
        ins: the instruction.
        time: model time of the issue.
    """

    __slots__ = ("cta", "ins", "lane", "lanes", "machine", "row", "time", "warp")

    def __init__(self, batch: Batch, row: int, lanes: list[int], ins: Instruction) -> None:
        self.machine = batch.machine
        self.row, self.lane, self.lanes, self.ins = row, lanes[0], lanes, ins
        self.cta, self.warp = int(batch.ctas[row]), int(batch.warps[row])
        self.time = int(self.machine.time[self.warp])

    def later(self, queue: Hashable, function: Callable[[], None]) -> None:
        """Perform a part of the copy later; an error names the lane."""

        def perform() -> None:
            try:
                function()
            except EmulatorError as error:
                raise self.blamed(error) from None

        self.machine.later(queue, perform)

    def blamed(self, error: EmulatorError) -> EmulatorError:
        """An error with the lane in it."""
        return error if error.row is not None else at(error, self.row, self.lane)

    def shared(
        self, name: str, address: int, nbytes: int, alignment: int, space: str | None
    ) -> tuple[int, int]:
        """CTA and offset of an operand in shared memory, `nbytes` of which must lie inside.

        Raises:
            AddressError: naming the operand, if it does not, or is not aligned.
        """
        try:
            cta, offset = locate(self.machine, self.cta, address, space)
        except AddressError as error:
            raise AddressError(f"operand {name}: {error}") from None
        if offset % alignment:
            raise AddressError(
                f"operand {name}: the shared address {address:#x} is not a multiple of {alignment}"
            )
        if offset + nbytes > self.machine.shared.size:
            raise AddressError(
                f"operand {name}: the {nbytes} bytes from shared offset {offset:#x} on do not end within the "
                f"CTA's {self.machine.shared.size}"
            )
        return cta, offset

    def trace(self, end: int, text: str, **detail: Any) -> None:
        """Record the copy, from its issue to its end."""
        machine = self.machine
        if machine.trace is not None:
            warp = self.warp % machine.warps_per_cta
            machine.trace.add("tma", self.cta, warp, self.time, end, self.ins.line, text, **detail)


def each(
    batch: Batch,
    mask: np.ndarray,
    ins: Instruction,
    act: Callable[..., None],
    *reads: np.ndarray,
    together: bool = False,
) -> None:
    """act(Issue, *values) for each lane of a mask, with the lane's values of the reads as ints.

    Args:
        together: lanes of a warp that all have the same values act once, for copies that may be repeated.
    """
    for row, lanes in _issuers(batch, mask, reads, together):
        issue = Issue(batch, row, lanes, ins)
        try:
            act(issue, *(int(read[row, lanes[0]]) for read in reads))
        except EmulatorError as error:
            raise issue.blamed(error) from None


def _issuers(
    batch: Batch, mask: np.ndarray, reads: tuple[np.ndarray, ...], together: bool
) -> list[tuple[int, list[int]]]:
    """(row, lanes) that act as one."""
    if not together:
        return [(row, [lane]) for row, lane in batch.lanes(mask)]
    found = []
    for row in np.flatnonzero(mask.any(1)).tolist():
        lanes = np.flatnonzero(mask[row]).tolist()
        alike = all((read[row, lanes] == read[row, lanes[0]]).all() for read in reads)
        found += [(row, lanes)] if alike else [(row, [lane]) for lane in lanes]
    return found
