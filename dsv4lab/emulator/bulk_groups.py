"""Bulk async-groups: the copies out of shared memory that a thread has issued, committed and waits for.

A copy is performed in two steps, first reading its source and some time later writing its destination, so
that a wait that is missing, or a wait for the reading where the writing was meant, shows. Copies that are
still under way at the end of the kernel are completed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.copy_engine import LATENCY, Issue
from dsv4lab.emulator.ptx import Instruction

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine


@dataclass(eq=False, slots=True)
class Group:
    """Copies that are waited for together.

    Attributes:
        reading, writing: copies that have not read their source, not written their destination.
        accesses: tokens of the race checker, of all of them.
        end: model time at which the last is complete.
    """

    reading: int = 0
    writing: int = 0
    accesses: list[Access] = field(default_factory=list)
    end: int = 0


@dataclass(eq=False, slots=True)
class _Thread:
    open: Group = field(default_factory=Group)
    committed: list[Group] = field(default_factory=list)


class BulkGroups:
    """The groups of all threads of a wave; `machine.state(BulkGroups)` is the one object of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._threads: dict[int, dict[int, _Thread]] = {}
        self._since: dict[int, int] = {}

    def access(self, warp: int) -> Access | None:
        """Who reads shared memory: a copy that this warp issues now."""
        return self.machine.access_async(warp, ("bulk", warp))

    def add(
        self,
        issue: Issue,
        read: Callable[[], np.ndarray],
        write: Callable[[np.ndarray], None],
        access: Access | None,
        end: int,
    ) -> None:
        """A copy of the issuing threads: `write` will be given what `read` has read."""
        threads = self._threads.setdefault(issue.warp, {})
        groups = [threads.setdefault(lane, _Thread()).open for lane in issue.lanes]
        for group in groups:
            group.reading += 1
            group.writing += 1
            group.end = max(group.end, end)
            if access is not None:
                group.accesses.append(access)
        source: list[np.ndarray] = []
        key = ("bulk", issue.warp)

        def fetch() -> None:
            if not source:
                source.append(read())
                for group in groups:
                    group.reading -= 1
                self.machine.wake(key)

        def put() -> None:
            fetch()
            write(source[0])
            for group in groups:
                group.writing -= 1
            self.machine.wake(key)

        issue.later(("bulk read", issue.warp, issue.lane), fetch)
        issue.later(("bulk write", issue.warp, issue.lane), put)

    def commit(self, batch: Batch, mask: np.ndarray) -> None:
        """cp.async.bulk.commit_group: what a thread has issued since its last is a group."""
        for row, warp in enumerate(batch.warps.tolist()):
            # A thread that never issued a copy has nothing to wait for, however many groups it commits.
            for lane, thread in self._threads.get(warp, {}).items():
                if mask[row, lane]:
                    thread.committed.append(thread.open)
                    thread.open = Group()

    def wait(self, batch: Batch, mask: np.ndarray, ins: Instruction, most: int, reads: bool) -> None:
        """cp.async.bulk.wait_group: park rows of which a thread has more than `most` groups under way."""
        for row, warp in enumerate(batch.warps.tolist()):
            threads = [t for lane, t in self._threads.get(warp, {}).items() if mask[row, lane]]
            waited = [g for t in threads for g in t.committed[: max(len(t.committed) - most, 0)]]
            missing = sum(g.reading if reads else g.writing for g in waited)
            if missing:
                self._since.setdefault(warp, int(self.machine.time[warp]))
                what = "to read their source" if reads else "to complete"
                batch.park(row, ("bulk", warp), f"{missing} bulk copies {what}")
            elif waited:
                self._acquire(warp, waited)
                self._note(warp, ins, max(g.end for g in waited) - (LATENCY // 2 if reads else 0))
                for thread in threads:
                    _drop(thread, waited)

    def _acquire(self, warp: int, groups: list[Group]) -> None:
        """The warp is ordered behind what these groups have read."""
        order = self.machine.order
        if order is None:
            return
        key = ("bulk", warp)
        for group in groups:
            for access in group.accesses:
                order.release_access(access, key)
            group.accesses.clear()
        order.complete(key)
        order.acquire(warp, key)

    def _note(self, warp: int, ins: Instruction, end: int) -> None:
        machine = self.machine
        machine.time[warp] = end = max(int(machine.time[warp]), end)
        start = self._since.pop(warp, None)
        if start is not None and machine.trace is not None:
            cta, inside = divmod(warp, machine.warps_per_cta)
            machine.trace.add("wait", cta, inside, start, end, ins.line, ins.text.strip())


def _drop(thread: _Thread, waited: list[Group]) -> None:
    """Forget the oldest groups that have been waited for and are complete."""
    while thread.committed and thread.committed[0] in waited and not thread.committed[0].writing:
        thread.committed.pop(0)
