"""cp.async: small copies from global to shared memory that each thread waits for in groups of its own.

They are performed some time after they were issued, those of a warp in order, and at the latest when they are
waited for. A wait performs no more than it waits for, so that data of a later group is not there by luck.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import EmulatorError, at

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine

LATENCY = 500  # cycles of the model's time


@dataclass(eq=False, slots=True)
class Copy:
    """One cp.async of a warp.

    Attributes:
        row: of the batch that issued it, for errors.
        cta: whose shared memory is written.
        mask: (32,) bool, lanes that copy.
        targets: (32,) int64, offsets in shared memory.
        sources: (32,) int64, global addresses.
        nbytes: bytes that each lane writes.
        given: (32,) int64, bytes that each lane reads; the rest is zero.
        group: (32,) int64, number of each lane's group.
        access: token for the race checker.
        end: model time at which it is complete.
        waited: lanes that have waited for it.
    """

    row: int
    cta: int
    mask: np.ndarray
    targets: np.ndarray
    sources: np.ndarray
    nbytes: int
    given: np.ndarray
    group: np.ndarray
    access: Access | None
    end: int
    waited: np.ndarray = field(default_factory=lambda: np.zeros(32, np.bool_))


@dataclass(eq=False, slots=True)
class _Arrival:
    """One cp.async.mbarrier.arrive of a warp: lanes by the barrier that they arrive at, copies before it."""

    row: int
    lanes: dict[tuple[int, int], np.ndarray]
    copies: list[Copy]
    end: int


class ThreadCopies:
    """The copies of all warps of a wave; `machine.state(ThreadCopies)` is the one object of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._committed = np.zeros((machine.warps, 32), np.int64)
        self._copies: defaultdict[int, list[Copy]] = defaultdict(list)  # not waited for by all of their lanes
        self._queue: defaultdict[int, list[Copy | _Arrival]] = defaultdict(list)  # not performed

    # Issue.

    def groups(self, warp: int) -> np.ndarray:
        """(32,) the number of the group that each lane's next copy belongs to."""
        return self._committed[warp].copy()

    def add(self, warp: int, copy: Copy) -> None:
        """A copy is issued."""
        self._copies[warp].append(copy)
        self._enqueue(warp, copy)

    def arrive(self, warp: int, row: int, lanes: dict[tuple[int, int], np.ndarray], end: int) -> None:
        """Lanes (32,) bool arrive at mbarriers (CTA, offset) when the copies they issued so far are done."""
        tracked = [c for c in self._copies[warp] if any((c.mask & mask).any() for mask in lanes.values())]
        self._enqueue(warp, _Arrival(row, lanes, tracked, max([end, *(c.end for c in tracked)])))

    def _enqueue(self, warp: int, item: Copy | _Arrival) -> None:
        self._queue[warp].append(item)

        def perform() -> None:
            if item in self._queue[warp]:
                self._perform(warp, list(self._queue[warp]))

        self.machine.later(("cp.async", warp), perform)

    def commit(self, batch: Batch, mask: np.ndarray) -> None:
        """cp.async.commit_group."""
        np.add.at(self._committed, batch.warps, mask)

    # Waits.

    def wait(self, batch: Batch, mask: np.ndarray, most: int) -> None:
        """cp.async.wait_group: all groups of these lanes but the last `most` are complete."""
        for row, warp in enumerate(batch.warps.tolist()):
            copies = self._copies.get(warp)
            if not copies:
                continue
            bound = np.where(mask[row], self._committed[warp] - most, 0)
            needed = [c for c in copies if (c.mask & (c.group < bound)).any()]
            queue = self._queue[warp]
            self._perform(warp, [c for c in needed if c in queue])
            self._acquire(warp, needed)
            for copy in needed:
                copy.waited |= copy.group < bound
            self._copies[warp] = [c for c in copies if (c.mask & ~c.waited).any()]

    def _acquire(self, warp: int, copies: list[Copy]) -> None:
        """The warp, and its clock, are ordered behind these copies."""
        machine, key = self.machine, ("cp.async", warp)
        if not copies:
            return
        machine.time[warp] = max(int(machine.time[warp]), *(c.end for c in copies))
        if machine.order is not None:
            for copy in copies:
                machine.order.release_access(copy.access, key)
            machine.order.complete(key)
            machine.order.acquire(warp, key)

    # Performing.

    def _perform(self, warp: int, items: list[Copy | _Arrival]) -> None:
        """Perform what is in the queue: the copies, then the arrivals that wait for them."""
        for item in items:
            self._queue[warp].remove(item)
        copies = [item for item in items if isinstance(item, Copy)]
        for nbytes in {copy.nbytes for copy in copies}:
            self._move([copy for copy in copies if copy.nbytes == nbytes], nbytes)
        for item in items:
            if isinstance(item, _Arrival):
                self._arrive(item)

    def _move(self, copies: list[Copy], nbytes: int) -> None:
        """Read global and write shared memory for copies of one size."""
        mask, targets = np.stack([c.mask for c in copies]), np.stack([c.targets for c in copies])
        try:
            data = self._read(copies, mask, nbytes)
        except EmulatorError as error:
            i = error.row or 0
            # Lanes that do not copy are checked with the address of the first that does.
            lane = error.lane if error.lane is None or mask[i, error.lane] else int(mask[i].argmax())
            raise at(error, copies[i].row, lane) from None
        places = targets[..., None] + np.arange(nbytes)
        shared, cta = self.machine.shared, copies[0].cta
        if self.machine.order is None:
            shared.write(cta, places[mask], data[mask], None)
            return
        for i, copy in enumerate(copies):
            shared.write(cta, places[i][copy.mask], data[i][copy.mask], copy.access)

    def _read(self, copies: list[Copy], mask: np.ndarray, nbytes: int) -> np.ndarray:
        """(copies, 32, nbytes) uint8 from global memory, zero behind what each lane is given."""
        memory = self.machine.memory
        sources, given = np.stack([c.sources for c in copies]), np.stack([c.given for c in copies])
        whole = mask & (given == nbytes)
        raw = memory.gather(whole, sources, nbytes)
        data = np.ascontiguousarray(raw).view(np.uint8).reshape(*mask.shape, nbytes)
        data = np.where(whole[..., None], data, np.uint8(0))
        for i, lane in zip(*np.nonzero(mask & (given > 0) & ~whole), strict=True):
            count = int(given[i, lane])
            try:
                data[i, lane, :count] = memory.view(int(sources[i, lane]), count)
            except EmulatorError as error:
                raise at(error, int(i), int(lane)) from None
        return data

    def _arrive(self, arrival: _Arrival) -> None:
        barriers, order = self.machine.state(Barriers), self.machine.order
        for (cta, offset), mask in arrival.lanes.items():
            if order is not None:
                for copy in arrival.copies:
                    if (copy.mask & mask).any():
                        order.release_access(copy.access, ("mbarrier", cta, offset))
            try:
                barriers.arrive(cta, offset, int(np.count_nonzero(mask)), None, arrival.end)
            except EmulatorError as error:
                raise at(error, arrival.row) from None
