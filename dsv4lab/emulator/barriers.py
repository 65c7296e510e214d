"""mbarrier objects: phases of arrivals and transaction bytes, kept by where in shared memory they lie.

The state lives here; the 8 bytes in shared memory hold an encoding of it, which every operation checks and
writes anew, so that a store over a live barrier is noticed at its next use. Phases count up from 0; a wait
for parity p is over when the current phase has the other parity.

Order of accesses: an arrival publishes under the key ("mbarrier", cta, offset), the completion of the phase
makes what was published visible, a successful wait takes it up. That a barrier was initialised before other
warps use it is checked as a race of plain accesses, once per warp. A cluster barrier that is arrived at with
`.relaxed` orders initialisations alone (after fence.mbarrier_init), which that check cannot tell from
data, so it is off in clusters and once `orders_unseen` was called.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import EmulatorError
from dsv4lab.emulator.mbarrier_state import MAX_COUNT, MBarrier

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine


class BarrierError(EmulatorError):
    """A barrier that is used in a way whose result is undefined."""


class Barriers:
    """The mbarrier objects of a wave; `machine.state(Barriers)` is the one of a machine.

    Everywhere `cta` is an index in the wave, `offset` a byte offset in that CTA's shared memory, divisible
    by 8, `warp` an index in the wave or None for an asynchronous operation, `time` a model time in cycles.
    All methods raise BarrierError for a barrier that is not there or a use that PTX leaves undefined.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._barriers: dict[tuple[int, int], MBarrier] = {}
        self._keys: defaultdict[tuple[int, int], set[Hashable]] = defaultdict(set)
        self._memory = memoryview(machine.shared.bytes).cast("B")
        self._stride = machine.shared.bytes.shape[1]
        self._initialisations_seen = machine.cluster_size == 1
        machine.at_end.append(self._at_end)

    # Life of a barrier -------------------------------------------------------------------------------------

    def init(self, cta: int, offset: int, count: int, warp: int | None = None) -> None:
        """Make a barrier in phase 0 that expects `count` arrivals a phase, 1 to 2**20 - 1."""
        if offset % 8:
            raise BarrierError(f"{self._name(cta, offset)} is not aligned to 8 bytes")
        _check_count(count, lambda: f"{self._name(cta, offset)} is initialised")
        old = self._barriers.get((cta, offset))
        if old is not None and old.busy and self._intact(cta, offset, old):
            raise BarrierError(f"{self.describe(cta, offset)} is initialised again in the middle of a phase")
        barrier = self._barriers[cta, offset] = MBarrier(count)
        self._store(cta, offset, barrier.stored, warp)

    def inval(self, cta: int, offset: int, warp: int | None = None) -> None:
        """End a barrier; its 8 bytes are plain memory again."""
        if self._live(cta, offset, "invalidated", warp).tx:
            raise BarrierError(
                f"{self.describe(cta, offset)} is invalidated with transaction bytes outstanding"
            )
        del self._barriers[cta, offset]
        self._store(cta, offset, bytes(8), warp)

    def orders_unseen(self) -> None:
        """From now on warps may be ordered after an initialisation in ways that are not followed."""
        self._initialisations_seen = False

    # Transaction bytes -------------------------------------------------------------------------------------

    def expect_tx(self, cta: int, offset: int, nbytes: int, warp: int | None = None) -> None:
        """Let the current phase wait for `nbytes` more transaction bytes."""
        barrier = self._live(cta, offset, "told to expect bytes", warp)
        self._add_tx(cta, offset, barrier, nbytes, 1)
        if warp is not None:
            barrier.expecting = warp, self.machine.instruction_now()
        self._settle(cta, offset, barrier)

    def complete_tx(
        self, cta: int, offset: int, nbytes: int, access: Access | None = None, time: int = 0
    ) -> None:
        """`nbytes` transaction bytes have come, written by `access` at model time `time`."""
        barrier = self._live(cta, offset, "told of completed bytes", access=access)
        self._add_tx(cta, offset, barrier, nbytes, -1)
        barrier.some_came = True
        self._release(cta, offset, None, access)
        barrier.latest = max(barrier.latest, time)
        self._settle(cta, offset, barrier)

    def _add_tx(self, cta: int, offset: int, barrier: MBarrier, nbytes: int, sign: int) -> None:
        tx = barrier.tx + sign * int(nbytes)
        if not 0 <= nbytes <= MAX_COUNT or abs(tx) > MAX_COUNT:
            raise BarrierError(
                f"{self.describe(cta, offset)}: {sign * nbytes:+d} bytes take its transaction count to {tx}, "
                f"beyond {sign * MAX_COUNT:+d}"
            )
        barrier.tx = tx

    # Arrivals ----------------------------------------------------------------------------------------------

    def arrive(
        self,
        cta: int,
        offset: int,
        count: int = 1,
        warp: int | None = None,
        time: int = 0,
        access: Access | None = None,
        *,
        release: bool = True,
        complete: bool = True,
        drop: bool = False,
    ) -> int:
        """Count arrivals, by a warp or by an asynchronous operation with its `access`.

        Args:
            release: publish what the warp or the operation did.
            complete: False for .noComplete: it is an error if this completes the phase.
            drop: expect `count` fewer arrivals from the next phase on.
        Returns:
            The state token: the phase and pending count before the arrival.
        """
        barrier = self._live(cta, offset, "arrived at", warp, access)
        _check_count(count, lambda: f"{self.describe(cta, offset)} is arrived at")
        if count > barrier.pending:
            raise BarrierError(
                f"{self.describe(cta, offset)} is arrived at {count} more times: "
                f"more than the {barrier.expected} arrivals that it expects in a phase"
            )
        if not complete and count == barrier.pending:
            raise BarrierError(
                f"{self.describe(cta, offset)}: an arrival with .noComplete completes its phase"
            )
        token = barrier.token(self._tag(cta, offset))
        if release:
            self._release(cta, offset, warp, access)
        count = int(count)
        barrier.pending -= count
        barrier.expected -= count if drop else 0
        barrier.latest = max(barrier.latest, time)
        self._settle(cta, offset, barrier)
        return token

    def add_pending(self, cta: int, offset: int, count: int = 1, warp: int | None = None) -> None:
        """Let the current phase wait for `count` more arrivals: cp.async.mbarrier.arrive without .noinc."""
        barrier = self._live(cta, offset, "given more pending arrivals", warp)
        if barrier.pending + count > MAX_COUNT:
            raise BarrierError(f"{self.describe(cta, offset)} gets more than {MAX_COUNT} pending arrivals")
        barrier.pending += count
        self._settle(cta, offset, barrier)

    def _release(self, cta: int, offset: int, warp: int | None, access: Access | None) -> None:
        if self.machine.order is None:
            return
        if warp is not None:
            self.machine.order.release(warp, _key(cta, offset))
        if access is not None:
            self.machine.order.release_access(access, _key(cta, offset))

    def _settle(self, cta: int, offset: int, barrier: MBarrier) -> None:
        """Complete the phase if nothing is missing, and write the new state."""
        done = barrier.settle()
        place = cta * self._stride + offset
        self._memory[place : place + 8] = barrier.stored
        if done:
            if self.machine.order is not None:
                self.machine.order.complete(_key(cta, offset))
            for key in (_key(cta, offset), *self._keys.pop((cta, offset), ())):
                self.machine.wake(key)

    # Waits -------------------------------------------------------------------------------------------------

    def completed(self, cta: int, offset: int, parity: int, warp: int | None = None) -> bool:
        """Whether the phase of this parity is complete: the current one has the other parity."""
        barrier = self._live(cta, offset, "waited for", warp)
        if parity not in (0, 1):
            raise BarrierError(f"{self.describe(cta, offset)} is waited for with parity {parity}, not 0 or 1")
        return barrier.phase & 1 != parity

    def completed_token(self, cta: int, offset: int, token: int, warp: int | None = None) -> bool:
        """Whether the phase of a state token is complete; it must be the current one or the one before."""
        barrier = self._live(cta, offset, "waited for", warp)
        age = barrier.age(token, self._tag(cta, offset))
        if age is None:
            raise BarrierError(
                f"{self.describe(cta, offset)} is waited for with the state of another: {token:#x}"
            )
        if age > 1:
            raise BarrierError(
                f"{self.describe(cta, offset)} is waited for with the state of {age} phases ago"
            )
        return age == 1

    def acquire(self, cta: int, offset: int, warp: int, acquire: bool = True) -> int:
        """A warp goes on after its wait, taking up what was published; returns when the phase completed."""
        if acquire and self.machine.order is not None:
            self.machine.order.acquire(warp, _key(cta, offset))
        time = self._barriers[cta, offset].completed_at
        self.machine.time[warp] = max(self.machine.time[warp], time)
        return time

    def also_wake(self, cta: int, offset: int, key: Hashable) -> None:
        """Wake this key too when the current phase is complete: for a row that waits for one of several."""
        self._keys[cta, offset].add(key)

    # State -------------------------------------------------------------------------------------------------

    def phase(self, cta: int, offset: int) -> int:
        """Number of the current phase, from 0."""
        return self._live(cta, offset, "asked for its phase").phase

    def pending(self, cta: int, offset: int) -> int:
        """Arrivals that the current phase still needs; 0 of a barrier that is not there."""
        barrier = self._barriers.get((cta, offset))
        return 0 if barrier is None else barrier.pending

    def describe(self, cta: int, offset: int) -> str:
        """Address, phase and counts, for messages; also of a barrier that is not there."""
        barrier = self._barriers.get((cta, offset))
        if barrier is None:
            return f"{self._name(cta, offset)} (not initialised)"
        return (
            f"{self._name(cta, offset)} (phase {barrier.phase}, parity {barrier.phase & 1}, "
            f"{barrier.pending} of {barrier.expected} arrivals and {barrier.tx} transaction bytes pending)"
        )

    def _name(self, cta: int, offset: int) -> str:
        address = cta % self.machine.cluster_size << 24 | offset
        index = ", ".join(map(str, np.asarray(self.machine.cta_index)[cta].tolist()))
        return f"the mbarrier at shared address {address:#x} of CTA ({index})"

    def _tag(self, cta: int, offset: int) -> int:
        return cta % self.machine.cluster_size << 15 | offset >> 3

    def _live(
        self, cta: int, offset: int, use: str, warp: int | None = None, access: Access | None = None
    ) -> MBarrier:
        if self.machine.shared.some_ended and (warp is not None or access is not None):
            self.machine.shared.check_there(cta, warp if access is None else access.warp)
        barrier = self._barriers.get((cta, offset))
        if barrier is None:
            raise BarrierError(f"{self._name(cta, offset)} is {use}, but was not initialised")
        if not self._intact(cta, offset, barrier):
            found = self.machine.shared.bytes[cta, offset : offset + 8].tobytes().hex()
            raise BarrierError(f"{self.describe(cta, offset)} is {use}, but was overwritten with {found}")
        if warp is not None and warp not in barrier.warps:
            barrier.warps.add(warp)
            if self._initialisations_seen and self.machine.order is not None:
                self.machine.shared.read_range(cta, offset, 8, self.machine.access(warp))
        return barrier

    def _intact(self, cta: int, offset: int, barrier: MBarrier) -> bool:
        place = cta * self._stride + offset
        return self._memory[place : place + 8] == barrier.stored

    def _store(self, cta: int, offset: int, data: bytes, warp: int | None) -> None:
        access = None if warp is None else self.machine.access(warp)
        self.machine.shared.write_range(cta, offset, np.frombuffer(data, np.uint8), access)

    def _at_end(self) -> None:
        """Raises BarrierError for a barrier to which other bytes have come than were announced.

        To announce some and copy none is allowed: producers take a last buffer so, to see that it is free.
        """
        if "barriers" not in self.machine.checks:
            return
        for (cta, offset), barrier in self._barriers.items():
            if barrier.tx and barrier.some_came and self._intact(cta, offset, barrier):
                error = BarrierError(
                    f"wrong transaction count: the kernel ends and {self.describe(cta, offset)} "
                    "still has bytes outstanding"
                )
                raise self.machine.blamed(error, cta, *barrier.expecting)


def _check_count(count: int, what: Callable[[], str]) -> None:
    if not 1 <= count <= MAX_COUNT:
        raise BarrierError(f"{what()} with a count of {count}, which must be 1 to {MAX_COUNT}")


def _key(cta: int, offset: int) -> Hashable:
    return ("mbarrier", cta, offset)
