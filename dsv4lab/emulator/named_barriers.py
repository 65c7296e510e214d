"""The sixteen named barriers of each CTA: bar.sync, bar.arrive and bar.red.

A warp arrives once all of its lanes that have not ended have come; its 32 threads then count together.
Without a thread count all warps of the CTA that have not ended take part, as hardware has it since Volta;
with one, exactly that many threads. All participants of a phase must name the same count, and may not mix
reductions with plain arrivals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.batch import bits_of, mask_of
from dsv4lab.emulator.convergence import alive
from dsv4lab.emulator.errors import at

if TYPE_CHECKING:
    from dsv4lab.emulator.machine import Machine

COUNT = 16
ALL = -1  # threads of a barrier whose participants name no count
_NOBODY = 0
# What a lane waits for: nothing, the other lanes of its warp, or else the completion of a phase.
_NOTHING, _LANES = -1, -2


class NamedBarriers:
    """The named barriers of a wave; `machine.state(NamedBarriers)` is the one of a machine.

    Attributes:
        phase: int64 (16, ctas), completions of each barrier.
        threads: int64 (16, ctas), threads that the current phase waits for: a count, ALL, or 0 at first.
        arrived: int64 (16, ctas), threads that have.
        completed_at: int64 (16, ctas), model time of the last completion.
        due: int64 (warps, 32), what each lane waits for.
        reduced: int64 (3, warps), all, any and count of the last reduction that a warp took part in.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        shape = (COUNT, machine.ctas)
        self.phase, self.threads, self.arrived, self.completed_at, self._latest = np.zeros(
            (5, *shape), np.int64
        )
        self._reducing = np.zeros(shape, np.bool_)
        self._come = np.zeros((COUNT, machine.warps), np.uint32)
        self._here = np.zeros((COUNT, machine.warps), np.bool_)
        # How many lanes are true, and how many there are: of each warp that is coming, of those arrived.
        self._warp_sums = np.zeros((2, machine.warps), np.int64)
        self._sums = np.zeros((2, *shape), np.int64)
        self.due = np.full((machine.warps, 32), _NOTHING, np.int64)
        self.reduced = np.zeros((3, machine.warps), np.int64)
        # What the warps that are coming said: how many threads, and whether it is a reduction.
        self._named = np.zeros(machine.warps, np.int64)
        self._reduces = np.zeros(machine.warps, np.bool_)
        machine.on_exit.append(self._exited)

    def come(
        self,
        barrier: int,
        warps: np.ndarray,
        mask: np.ndarray,
        threads: np.ndarray,
        values: np.ndarray | None = None,
    ) -> None:
        """Lanes come to a barrier, or come again after they have waited; nothing changes for the latter.

        Args:
            barrier: 0 to 15.
            warps: (n,) int64; a warp may come in several rows.
            mask: (n, 32) bool.
            threads: (n,) int64, the count that each row names, or ALL.
            values: (n, 32) bool of a reduction.
        Raises:
            BarrierError: with row.
        """
        new = mask & (self.due[warps] == _NOTHING)
        row, lane = np.nonzero(new)
        if not len(row):
            return
        self.due[warps[row], lane] = _LANES
        np.bitwise_or.at(self._come[barrier], warps, bits_of(new))
        if values is not None:
            np.add.at(self._warp_sums[0], warps, (new & values).sum(1))
            np.add.at(self._warp_sums[1], warps, new.sum(1))
        self._named[warps], self._reduces[warps] = threads, values is not None
        self._arrive_whole(barrier, warps)

    def fresh(self, warps: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Which rows (n,) bool have lanes that do not wait yet."""
        return (mask & (self.due[warps] == _NOTHING)).any(1)

    def passes(self, barrier: int, warps: np.ndarray, mask: np.ndarray, wait: bool) -> np.ndarray:
        """Which rows (n,) bool go on: their warp has arrived and, if they wait, the phase is complete."""
        due = self.due[warps]
        ready = due >= 0
        if wait:
            ready &= due < self.phase[barrier, warps // self.machine.warps_per_cta][:, None]
        passed = (ready | ~mask).all(1)
        row, lane = np.nonzero(mask & passed[:, None])
        self.due[warps[row], lane] = _NOTHING
        return passed

    # Arrivals of whole warps -------------------------------------------------------------------------------

    def _arrive_whole(self, barrier: int, warps: np.ndarray) -> None:
        """Those of these warps (n,) arrive whose lanes have all come."""
        come = self._come[barrier, warps]
        whole = np.flatnonzero((come != 0) & (alive(self.machine)[warps] & ~come == 0))
        unique, first = np.unique(warps[whole], return_index=True)
        if len(unique):
            self._arrive(barrier, unique, whole[first])

    def _arrive(self, barrier: int, warps: np.ndarray, rows: np.ndarray) -> None:
        """Warps (n,), each once, arrive; `rows` are theirs in the batch, for errors."""
        ctas, threads = warps // self.machine.warps_per_cta, self._named[warps]
        if len(warps) > 1 and self._overflows(barrier, ctas, threads):
            # More come at once than one phase takes: one after the other.
            for i in range(len(warps)):
                self._arrive(barrier, warps[i : i + 1], rows[i : i + 1])
            return
        self._check(barrier, warps, rows)
        bits = self._come[barrier, warps]
        self.due[warps] = np.where(mask_of(bits), self.phase[barrier, ctas][:, None], self.due[warps])
        self._come[barrier, warps] = 0
        self._here[barrier, warps] = True
        np.add.at(self.arrived[barrier], ctas, 32)
        np.maximum.at(self._latest[barrier], ctas, self.machine.time[warps])
        for total, mine in zip(self._sums[:, barrier], self._warp_sums, strict=True):
            np.add.at(total, ctas, mine[warps])
        self._warp_sums[:, warps] = 0
        self._settle(barrier, np.unique(ctas))

    def _needed(self, ctas: np.ndarray, threads: np.ndarray) -> np.ndarray:
        living = (alive(self.machine).reshape(self.machine.ctas, -1)[ctas] != 0).sum(1)
        return np.where(threads == ALL, living * 32, threads)

    def _overflows(self, barrier: int, ctas: np.ndarray, threads: np.ndarray) -> bool:
        come = np.bincount(ctas, minlength=self.machine.ctas) * 32 + self.arrived[barrier]
        return bool((come[ctas] > self._needed(ctas, threads)).any())

    def _check(self, barrier: int, warps: np.ndarray, rows: np.ndarray) -> None:
        """Refuse counts that cannot be; note what the phase is about, and refuse what does not go with it."""
        threads, reducing = self._named[warps], self._reduces[warps]
        ctas, whole = warps // self.machine.warps_per_cta, self.machine.warps_per_cta * 32

        def refuse(wrong: np.ndarray, why: str) -> None:
            if wrong.any():
                i = int(wrong.argmax())
                what = why.format(named=named[i], before=before[i], whole=whole)
                raise at(BarrierError(f"{self.describe(barrier, int(ctas[i]))}: {what}"), int(rows[i]))

        before = named = np.where(threads == ALL, whole, threads)
        refuse(
            (named <= 0) | (named % 32 != 0) | (named > whole),
            "the thread count is {named}, and must be a multiple of 32 from 32 to the CTA's {whole}",
        )
        first = self.threads[barrier, ctas] == _NOBODY
        self.threads[barrier, ctas[first]] = threads[first]
        self._reducing[barrier, ctas[first]] = reducing[first]
        before = self.threads[barrier, ctas]
        before = np.where(before == ALL, whole, before)
        refuse(before != named, "it is for {before} threads, and a warp comes to it for {named}")
        refuse(self._reducing[barrier, ctas] != reducing, "bar.red meets bar.sync or bar.arrive in one phase")
        if "barriers" in self.machine.checks:
            refuse(self._here[barrier, warps], "the warp arrives a second time in one phase")

    def _settle(self, barrier: int, ctas: np.ndarray) -> None:
        """Complete the phases of these CTAs that nobody is missing from."""
        threads, arrived = self.threads[barrier, ctas], self.arrived[barrier, ctas]
        done = ctas[(threads != _NOBODY) & (arrived >= self._needed(ctas, threads))]
        if not len(done):
            return
        per_cta = self.machine.warps_per_cta
        warps = (done[:, None] * per_cta + np.arange(per_cta)).reshape(-1)
        here = warps[self._here[barrier, warps]]
        true, lanes = self._sums[:, barrier, here // per_cta]
        self.reduced[:, here] = true == lanes, true > 0, true
        self._here[barrier, warps] = False
        self.phase[barrier, done] += 1
        self.completed_at[barrier, done] = self._latest[barrier, done]
        for state in (self.threads, self.arrived, self._latest, *self._sums):
            state[barrier, done] = 0
        for cta in done.tolist():
            key = ("bar", cta, barrier)
            if self.machine.order is not None:
                self.machine.order.complete(key)
            self.machine.wake(key)

    def _exited(self, warps: np.ndarray) -> None:
        """Lanes of these warps have ended: others need not wait for them."""
        ctas = np.unique(warps // self.machine.warps_per_cta)
        for barrier in np.flatnonzero(self._come[:, warps].any(1)).tolist():
            self._arrive_whole(barrier, warps)
        for barrier in np.flatnonzero((self.threads[:, ctas] == ALL).any(1)).tolist():
            self._settle(barrier, ctas)

    def describe(self, barrier: int, cta: int) -> str:
        """Which barrier, its phase, and how many threads have arrived."""
        index = ", ".join(map(str, self.machine.cta_index[cta].tolist()))
        needed = self._needed(np.array([cta]), self.threads[barrier, [cta]])[0]
        return (
            f"barrier {barrier} of CTA ({index}) (phase {self.phase[barrier, cta]}, "
            f"{self.arrived[barrier, cta]} of {needed} threads have arrived)"
        )
