"""Vector clocks: what each warp knows of the others, and of the operations that run beside the warps.

Actors are the warps of a cluster, then the slots of its asynchronous channels. Each has a clock, and each
warp a row that says up to which clock of every actor it is ordered behind. A warp's own clock ticks when
others may learn what it did so far: at a release, a proxy fence and the issue of an asynchronous operation.

A stamp is a clock with the PTX line of an access in its low bits, so that a memory cell keeps both in one
int64. A row holds for each actor the largest stamp that is ordered before: the clock with all line bits set,
or 0; `stamp > row[actor]` is "not ordered".
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from dsv4lab.emulator.errors import EmulatorError

LINE_BITS = 22
STAMP_BITS = 50
TICK = 1 << LINE_BITS
LINES = TICK - 1
STAMPS = (1 << STAMP_BITS) - 1
MOST_ACTORS = 1 << (63 - STAMP_BITS)
# Operations that complete in any order have a slot each while they run. Beyond so many they share slots, and
# the completion of one then vouches for another.
MOST_SLOTS = 32

SEEN, FENCED = 0, 1


@dataclass(slots=True, eq=False)
class Slot:
    """An actor that stands for one asynchronous operation after the other."""

    actor: int
    clock: int = 0
    running: int = 0


@dataclass(slots=True, eq=False)
class Access:
    """Who accesses memory, and what is ordered before.

    Attributes:
        warp: the warp in the wave that accesses, or that issued the operation.
        actor: index among its cluster's actors.
        stamp: its clock and PTX line.
        proxy: "generic" or "async".
        known: what was ordered before the operation's issue, int64 (2, actors then); None for a warp's own
            accesses, which use what the warp knows now.
        slot: of an operation that is running.
    """

    warp: int
    actor: int
    stamp: int
    proxy: str = "generic"
    known: np.ndarray | None = None
    slot: Slot | None = None


@dataclass(slots=True, eq=False)
class _Key:
    pending: np.ndarray
    published: np.ndarray


@dataclass(slots=True, eq=False)
class Channel:
    """Asynchronous operations that complete in one way.

    Attributes:
        name: what the issuer calls it.
        proxy: of its accesses.
        in_order: each operation is ordered behind the earlier ones.
        slots: one actor if in order, else as many as operations were running together.
        tail: in order: what is ordered before its last operation, that one included.
        warp, what: who issued the last operation, and which.
    """

    name: Hashable
    proxy: str
    in_order: bool
    slots: list[Slot] = field(default_factory=list)
    tail: np.ndarray | None = None
    warp: int = 0
    what: str = ""


class Clocks:
    """The vector clocks of the clusters of a wave.

    Args:
        clusters: how many there are.
        width: warps of a cluster; warps of the wave are numbered cluster by cluster.

    Attributes:
        known: int64 (warps, 2, actors): what each warp is ordered behind, and which generic accesses it knows
            to be fenced for the async proxy.
        own: int64 (warps,), the actor that each warp is in its cluster.
        generic: bool (clusters, actors), actors that access through the generic proxy.
    """

    def __init__(self, clusters: int, width: int) -> None:
        self.width = width
        self.own = np.arange(clusters * width) % width
        self.known = np.zeros((clusters * width, 2, width + 16), np.int64)
        self.known[np.arange(len(self.own)), SEEN, self.own] = TICK | LINES
        self.generic = np.zeros((clusters, width + 16), np.bool_)
        self.generic[:, :width] = True
        self._channels: dict[tuple, Channel] = {}
        self._owners: list[list[Channel]] = [[] for _ in range(clusters)]
        self._keys: dict[Hashable, _Key] = {}

    @property
    def actors(self) -> int:
        """Actors that a cluster has room for."""
        return self.known.shape[2]

    # What warps do.

    def generic_access(self, warp: int, line: int) -> Access:
        """The accesses of a warp's own instruction."""
        actor = warp % self.width
        return Access(warp, actor, int(self.known[warp, SEEN, actor]) - LINES + line)

    def release(self, warps: int | np.ndarray, key: Hashable) -> None:
        """What the warps did, and know, is published with the key."""
        entry = self._key(key)
        rows = self.known[warps]
        np.maximum(entry.pending, rows if rows.ndim == 2 else rows.max(axis=0), out=entry.pending)
        self._tick(warps)

    def complete(self, key: Hashable) -> None:
        """What was published with the key is to be seen by who acquires it from now on."""
        entry = self._keys.get(key)
        if entry is not None:
            entry.published[:] = entry.pending

    def acquire(self, warps: int | np.ndarray, key: Hashable) -> None:
        """The warps learn what the completed key published."""
        entry = self._keys.get(key)
        if entry is not None:
            self.known[warps] = np.maximum(self.known[warps], entry.published)

    def fence(self, warps: int | np.ndarray) -> None:
        """All that the warps know is fenced for the async proxy."""
        self.known[warps, FENCED] = self.known[warps, SEEN]
        self._tick(warps)

    def _tick(self, warps: int | np.ndarray) -> None:
        self.known[warps, SEEN, self.own[warps]] += TICK

    def _key(self, key: Hashable) -> _Key:
        entry = self._keys.get(key)
        if entry is None:
            shape = self.known.shape[1:]
            entry = self._keys[key] = _Key(np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        return entry

    # What runs beside them.

    def issue(
        self, warp: int, name: Hashable, in_order: bool, proxy: str, line: int, what: str = ""
    ) -> Access:
        """An operation that a warp issues now."""
        cluster = warp // self.width
        channel = self._channels.get((cluster, name, in_order, proxy))
        if channel is None:
            channel = self._channels[cluster, name, in_order, proxy] = Channel(name, proxy, in_order)
        channel.warp, channel.what = warp, what
        slot = self._free_slot(cluster, channel)
        slot.clock += 1
        slot.running += 1
        stamp = slot.clock << LINE_BITS | line
        known = self.known[warp].copy()
        if in_order:
            if channel.tail is not None:
                tail = self._widened(channel.tail)
                np.maximum(known, tail, out=known)
            known[SEEN, slot.actor] = stamp | LINES
            channel.tail = known
        self._tick(warp)
        return Access(warp, slot.actor, stamp, proxy, known, slot)

    def release_access(self, access: Access, key: Hashable, alone: bool = False) -> None:
        """What an operation did and, unless alone, what was ordered before its issue, is published."""
        pending = self._key(key).pending
        if not alone:
            np.maximum(pending, self._widened(access.known), out=pending)
        pending[SEEN, access.actor] = max(int(pending[SEEN, access.actor]), access.stamp | LINES)
        if access.slot is not None:
            access.slot.running -= 1
            access.slot = None

    def _free_slot(self, cluster: int, channel: Channel) -> Slot:
        slots = channel.slots
        if channel.in_order and slots:
            return slots[0]
        least = min(slots, key=lambda slot: slot.running, default=None)
        if least is not None and (least.running == 0 or len(slots) == MOST_SLOTS):
            return least
        owners = self._owners[cluster]
        slots.append(Slot(self.width + len(owners)))
        owners.append(channel)
        while slots[-1].actor >= self.actors:
            self._widen()
        self.generic[cluster, slots[-1].actor] = channel.proxy == "generic"
        return slots[-1]

    def _widen(self) -> None:
        size = min(self.actors * 2, MOST_ACTORS)
        if size == self.actors:
            raise EmulatorError(
                f"the race check follows at most {MOST_ACTORS} warps and channels of a cluster"
            )
        grown = np.zeros((len(self.own), 2, size), np.int64)
        grown[:, :, : self.actors] = self.known
        self.known = grown
        self.generic = np.pad(self.generic, ((0, 0), (0, size - self.generic.shape[1])))
        for entry in self._keys.values():
            entry.pending, entry.published = self._widened(entry.pending), self._widened(entry.published)

    def _widened(self, row: np.ndarray) -> np.ndarray:
        """A row (2, actors) from before there were as many actors as now."""
        missing = self.actors - row.shape[1]
        return np.pad(row, ((0, 0), (0, missing))) if missing else row

    # What the accesses are checked against.

    def ordered(self, access: Access) -> np.ndarray:
        """(actors,) the stamps that are ordered before an access."""
        return self._rows(access)[SEEN]

    def visible(self, access: Access) -> np.ndarray:
        """(actors,) the stamps whose writes an access sees: through the async proxy, fenced ones alone."""
        rows = self._rows(access)
        if access.proxy == "generic":
            return rows[SEEN]
        return np.where(self.generic[access.warp // self.width], rows[FENCED], rows[SEEN])

    def _rows(self, access: Access) -> np.ndarray:
        return self.known[access.warp] if access.known is None else self._widened(access.known)

    def channel_of(self, cluster: int, actor: int) -> Channel | None:
        """The channel of an actor of a cluster; None for a warp."""
        return None if actor < self.width else self._owners[cluster][actor - self.width]
