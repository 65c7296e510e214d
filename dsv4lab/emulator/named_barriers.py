"""The sixteen named barriers of each CTA: bar.sync, bar.arrive and bar.red.

A warp arrives once all of its lanes that have not ended have come; its 32 threads then count together.
Without a thread count all warps of the CTA that have not ended take part, as hardware has it since Volta;
with one, exactly that many threads. All participants of a phase must name the same count, and may not mix
reductions with plain arrivals. A warp that has only arrived may come again to wait, and counts twice: so a
kernel opens the first phase of a barrier by which warps take turns. It may not arrive again without waiting.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.convergence import alive

if TYPE_CHECKING:
    from dsv4lab.emulator.machine import Machine

COUNT = 16
ALL = -1  # threads of a barrier whose participants name no count


class _Barrier:
    """A barrier of a CTA.

    Attributes:
        phase: how often it was complete.
        threads: that the current phase waits for: a count, or ALL; None if nobody has arrived.
        reducing: the current phase is a reduction's.
        warps: those that have arrived.
        true, lanes: of their lanes, how many are true and how many there are.
        latest: model time of the latest arrival.
        completed_at: model time of the last completion.
    """

    __slots__ = ("completed_at", "lanes", "latest", "phase", "reducing", "threads", "true", "warps")

    def __init__(self) -> None:
        self.phase = self.completed_at = 0
        self.clear()

    def clear(self) -> None:
        """Nobody has arrived in the current phase."""
        self.threads: int | None = None
        self.warps: list[int] = []
        self.true = self.lanes = self.latest = 0


class _Comer:
    """A warp at a barrier; sets of lanes are the bits of integers.

    Attributes:
        come: lanes that wait for the others of the warp.
        due: lanes whose warp has arrived and that have not passed.
        phase: the phase that it arrived in.
        threads, waits, reducing, true, lanes: what its lanes said, as of _Barrier.
    """

    __slots__ = ("come", "due", "lanes", "phase", "reducing", "threads", "true", "waits")

    def __init__(self) -> None:
        self.come = self.due = self.phase = self.true = self.lanes = 0


class NamedBarriers:
    """The named barriers of a wave; `machine.state(NamedBarriers)` is the one of a machine.

    Attributes:
        reduced: int64 (3, warps), all, any and count of the last reduction that a warp took part in.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reduced = np.zeros((3, machine.warps), np.int64)
        self._barriers: defaultdict[tuple[int, int], _Barrier] = defaultdict(_Barrier)
        self._comers: defaultdict[tuple[int, int], _Comer] = defaultdict(_Comer)
        # Warps that lanes are missing from.
        self._coming: set[tuple[int, int]] = set()
        self._living = (alive(machine).reshape(machine.ctas, -1) != 0).sum(1).tolist()
        machine.on_exit.append(self._exited)

    # What lanes do -----------------------------------------------------------------------------------------

    def is_new(self, number: int, warp: int, bits: int) -> bool:
        """Whether some of these lanes of a warp come to a barrier now, and do not already wait there."""
        comer = self._comers[number, warp]
        return bits & ~(comer.come | comer.due) != 0

    def come(
        self, number: int, warp: int, bits: int, threads: int, true: int | None = None, waits: bool = True
    ) -> None:
        """Lanes come to a barrier, or come again after they have waited; nothing changes for the latter.

        Args:
            number: of the barrier, 0 to 15.
            warp: index in the wave.
            bits: the lanes.
            threads: the count that they name, or ALL.
            true: of a reduction, the lanes whose predicate is true.
            waits: whether they will wait.
        Raises:
            BarrierError: for a count that cannot be, or does not go with what others said.
        """
        comer = self._comers[number, warp]
        new = bits & ~(comer.come | comer.due)
        if not new:
            return
        comer.come |= new
        comer.threads, comer.waits, comer.reducing = threads, waits, true is not None
        if true is not None:
            comer.true += (new & true).bit_count()
            comer.lanes += new.bit_count()
        self._arrive_if_whole(number, warp, comer)

    def passes(self, number: int, warp: int, bits: int, wait: bool) -> bool:
        """Whether these lanes go on: their warp has arrived and, if they wait, the phase is complete."""
        comer = self._comers[number, warp]
        if bits & ~comer.due:
            return False
        if wait and self._of(number, warp)[1].phase <= comer.phase:
            return False
        comer.due &= ~bits
        return True

    def completed_at(self, number: int, warp: int) -> int:
        """Model time of the last completion of a barrier of the warp's CTA."""
        return self._of(number, warp)[1].completed_at

    # Arrivals of whole warps -------------------------------------------------------------------------------

    def _of(self, number: int, warp: int) -> tuple[int, _Barrier]:
        cta = warp // self.machine.warps_per_cta
        return cta, self._barriers[cta, number]

    def _arrive_if_whole(self, number: int, warp: int, comer: _Comer) -> None:
        if comer.come != 0xFFFFFFFF and int(alive(self.machine)[warp]) & ~comer.come:
            self._coming.add((number, warp))
            return
        self._coming.discard((number, warp))
        cta, barrier = self._of(number, warp)
        self._check(number, cta, barrier, comer, warp)
        comer.due, comer.come, comer.phase = comer.due | comer.come, 0, barrier.phase
        barrier.warps.append(warp)
        barrier.latest = max(barrier.latest, int(self.machine.time[warp]))
        if comer.reducing:
            barrier.true, barrier.lanes = barrier.true + comer.true, barrier.lanes + comer.lanes
            comer.true = comer.lanes = 0
        self._settle(number, cta, barrier)

    def _check(self, number: int, cta: int, barrier: _Barrier, comer: _Comer, warp: int) -> None:
        """Refuse a count that cannot be; note what a phase is about, and refuse what does not go with it."""

        def refuse(what: str) -> None:
            raise BarrierError(f"{self.describe(number, cta)}: {what}")

        whole = self.machine.warps_per_cta * 32
        named = whole if comer.threads == ALL else comer.threads
        if named <= 0 or named % 32 or named > whole:
            refuse(f"the thread count is {named}, and must be a multiple of 32 from 32 to the CTA's {whole}")
        if barrier.threads is None:
            barrier.threads, barrier.reducing = comer.threads, comer.reducing
        before = whole if barrier.threads == ALL else barrier.threads
        if before != named:
            refuse(f"it is for {before} threads, and a warp comes to it for {named}")
        if barrier.reducing != comer.reducing:
            refuse("bar.red meets bar.sync or bar.arrive in one phase")
        if not comer.waits and warp in barrier.warps and "barriers" in self.machine.checks:
            refuse("the warp arrives a second time in one phase")

    def _needed(self, cta: int, barrier: _Barrier) -> int:
        return self._living[cta] * 32 if barrier.threads in (ALL, None) else barrier.threads

    def _settle(self, number: int, cta: int, barrier: _Barrier) -> None:
        """Complete the phase if nobody is missing."""
        if barrier.threads is None or len(barrier.warps) * 32 < self._needed(cta, barrier):
            return
        if barrier.reducing:
            result = barrier.true == barrier.lanes, barrier.true > 0, barrier.true
            self.reduced[:, barrier.warps] = np.array(result, np.int64)[:, None]
        barrier.phase += 1
        barrier.completed_at = barrier.latest
        barrier.clear()
        if self.machine.order is not None:
            self.machine.order.complete(("bar", cta, number))
        self.machine.wake(("bar", cta, number))

    def _exited(self, warps: np.ndarray) -> None:
        """Lanes of these warps have ended: others need not wait for them."""
        ended = set(warps.tolist())
        ctas = {warp // self.machine.warps_per_cta for warp in ended}
        for cta in ctas:
            first = cta * self.machine.warps_per_cta
            self._living[cta] = np.count_nonzero(
                alive(self.machine)[first : first + self.machine.warps_per_cta]
            )
        for number, warp in [key for key in self._coming if key[1] in ended]:
            self._arrive_if_whole(number, warp, self._comers[number, warp])
        for cta, number in itertools.product(ctas, range(COUNT)):
            barrier = self._barriers.get((cta, number))
            if barrier is not None and barrier.threads == ALL:
                self._settle(number, cta, barrier)

    def describe(self, number: int, cta: int) -> str:
        """Which barrier, its phase, and how many threads have arrived."""
        barrier = self._barriers[cta, number]
        index = ", ".join(map(str, self.machine.cta_index[cta].tolist()))
        return (
            f"barrier {number} of CTA ({index}) (phase {barrier.phase}, {len(barrier.warps) * 32} of "
            f"{self._needed(cta, barrier)} threads have arrived)"
        )
