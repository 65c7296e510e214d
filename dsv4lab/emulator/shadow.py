"""Shadow of a memory space: who last touched each cell, and when.

The last plain write of each cell is one int64, the writer's actor above its stamp. Reads, and accesses that
may meet each other (atomics), are kept for every actor, as `Marks`. All of it is in lazily zeroed pages, so
that only cells that are touched cost memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv4lab.emulator.marks import Cells, Marks, Window
from dsv4lab.emulator.vector_clocks import LINE_BITS, STAMP_BITS, STAMPS

# From so many byte offsets on it pays to leave out those that share a cell.
_MANY = 256


class Kind(NamedTuple):
    """How a cell is accessed."""

    write: bool
    atomic: bool


_PLAIN_WRITE = Kind(True, False)
# What an access must be ordered behind, besides the last plain write.
_BEHIND = {
    Kind(False, False): ("atomic write",),
    _PLAIN_WRITE: ("read", "atomic read", "atomic write"),
    Kind(False, True): (),
    Kind(True, True): ("read",),
}
_NOTED = {
    Kind(False, False): "read",
    Kind(False, True): "atomic read",
    Kind(True, True): "atomic write",
}


class Earlier(NamedTuple):
    """An access that another one is not ordered behind.

    Attributes:
        kind: "read", "write", "atomic read" or "atomic write".
        actor, stamp: whose, and when.
        cell: flat index of the first cell on which they meet.
        count: cells on which they meet.
        position: of that cell among those of the later access.
    """

    kind: str
    actor: int
    stamp: int
    cell: int
    count: int
    position: int


class Shadow:
    """The cells of one space of all CTAs of a wave.

    Args:
        ctas: how many there are.
        cluster_size: CTAs of a cluster.
        shape: cells of one CTA: (cells,), given as byte offsets, or (rows, columns), given as cells.
        unit: bytes of a cell where offsets are given, a power of two.
        rows: about how many actors touch the cells of one CTA.
    """

    def __init__(
        self, ctas: int, cluster_size: int, shape: tuple[int, ...], unit: int = 1, rows: int = 8
    ) -> None:
        self.shape = shape
        # At least 16 cells, so that groups of them do not straddle CTAs.
        self.bits = max(int(np.prod(shape)) - 1, 15).bit_length()
        self.shift = unit.bit_length() - 1
        self._cluster_size = cluster_size
        self._last = np.zeros(ctas << self.bits, np.int64)
        self._marks = {kind: Marks(ctas, cluster_size, self.bits, rows + 1) for kind in _NOTED.values()}

    def window(self, cta: int, cells: Cells, size: int) -> Window:
        """The cells of an access: a slice, or offsets with `size` bytes each, or a pair of slices."""
        if isinstance(cells, slice):
            stop = -(-cells.stop >> self.shift)
            cells = slice(cells.start >> self.shift, stop)
        elif not isinstance(cells, tuple):
            cells = np.asarray(cells, np.int64).reshape(-1) >> self.shift
            if (each := size >> self.shift) > 1:
                cells = (cells[:, None] + np.arange(each)).reshape(-1)
            if len(self.shape) == 1 and cells.size >= _MANY:
                cells = _distinct(cells)
        return Window(cta << self.bits, self.shape, cells)

    # One actor, cells of one CTA.

    def conflict(
        self,
        cta: int,
        window: Window,
        kind: Kind,
        ordered: np.ndarray,
        visible: np.ndarray,
        own: tuple[int, int],
    ) -> Earlier | None:
        """An earlier access that one to these cells conflicts with.

        Args:
            ordered, visible: (actors,) of Clocks: reads must be ordered before, writes visible.
            own: actor and stamp of the access, which does not conflict with itself.
        """
        # Readers first: who waits for the reader of a value has waited for its writer.
        for name in _BEHIND[kind]:
            bounds = visible if name == "atomic write" else ordered
            for actor in self._marks[name].unseen(cta // self._cluster_size, bounds).tolist():
                marks = self._marks[name].of(cta, actor)
                stamps = None if marks is None else window.of(marks)
                if stamps is None or stamps.max(initial=0) <= bounds[actor]:
                    continue
                bad = stamps > bounds[actor]
                if actor == own[0]:
                    bad &= stamps >> LINE_BITS != own[1] >> LINE_BITS
                if bad.any():
                    position = int(bad.argmax())
                    stamp = int(stamps.flat[position])
                    return Earlier(name, actor, stamp, window.cell(position), int(bad.sum()), position)
        entries = window.of(self._last)
        return _unseen_write(window, entries, visible, own) if entries.size else None

    def note(self, cta: int, window: Window, kind: Kind, own: tuple[int, int], room: int) -> None:
        """An access by actor and stamp `own`, of `room` actors at present, has happened."""
        if kind == _PLAIN_WRITE:
            window.set(self._last, own[0] << STAMP_BITS | own[1])
        else:
            self._marks[_NOTED[kind]].note(cta, window, *own, room)

    # Many warps at once.

    def conflict_each(
        self,
        groups: np.ndarray,
        each: int,
        rows: np.ndarray,
        kind: Kind,
        clusters: np.ndarray,
        known: np.ndarray,
    ) -> Earlier | None:
        """An earlier access that some of these conflicts with.

        Args:
            groups: (m,) int64, each access's cells as the number of a group of `each`.
            rows: (m,) int64, whose each is.
            clusters, known: (n,) and (n, actors), the cluster of each row and what is ordered before it.
        """
        for name in _BEHIND[kind]:
            actors = self._marks[name].unseen(clusters, known)
            if not actors.size:
                continue
            stamps = self._marks[name].latest(groups, each, actors)
            bad = stamps > known[rows, actors[:, None]][..., None]
            if bad.any():
                which = int(bad.any(axis=(1, 2)).argmax())
                return _earlier(name, int(actors[which]), stamps[which], bad[which], groups)
        entries = self._last.reshape(-1, each).take(groups, axis=0)
        behind = (rows * known.shape[1])[:, None] + (entries >> STAMP_BITS)
        bad = entries & STAMPS > known.take(behind)
        return _earlier("write", None, entries, bad, groups) if bad.any() else None

    def note_each(
        self, groups: np.ndarray, each: int, kind: Kind, actors: np.ndarray, stamps: np.ndarray, room: int
    ) -> Earlier | None:
        """Accesses of actors (m,) at stamps (m,) to groups (m,) of `each` cells have happened.

        Returns:
            A write by one to a cell that another one writes as well; none is noted then.
        """
        if kind != _PLAIN_WRITE:
            self._marks[_NOTED[kind]].note_each(groups, each, actors, stamps, room)
            return None
        entries = (actors << STAMP_BITS | stamps)[:, None]
        last = self._last.reshape(-1, each)
        before = last.take(groups, axis=0)
        last[groups] = entries
        other = last.take(groups, axis=0)
        bad = other != entries
        if not bad.any():
            return None
        last[groups] = before
        return _earlier("write", None, other, bad, groups)


def _earlier(kind: str, actor: int | None, found: np.ndarray, bad: np.ndarray, groups: np.ndarray) -> Earlier:
    """The first of found (m, each) that is bad; with no actor, found is entries of writes."""
    position, inside = divmod(int(bad.argmax()), bad.shape[1])
    stamp = int(found[position, inside])
    if actor is None:
        actor, stamp = stamp >> STAMP_BITS, stamp & STAMPS
    cell = int(groups[position]) * bad.shape[1] + inside
    return Earlier(kind, actor, stamp, cell, int(bad.sum()), position)


def _unseen_write(
    window: Window, entries: np.ndarray, visible: np.ndarray, own: tuple[int, int]
) -> Earlier | None:
    first = int(entries.flat[0])
    # Big ranges were mostly written by one operation.
    if first & STAMPS <= visible[first >> STAMP_BITS] and (entries == first).all():
        return None
    bad = entries & STAMPS > visible.take(entries >> STAMP_BITS)
    if bad.any():
        bad &= entries >> LINE_BITS != (own[0] << STAMP_BITS | own[1]) >> LINE_BITS
    if not bad.any():
        return None
    position = int(bad.argmax())
    entry = int(entries.flat[position])
    actor, stamp = entry >> STAMP_BITS, entry & STAMPS
    return Earlier("write", actor, stamp, window.cell(position), int(bad.sum()), position)


def _distinct(cells: np.ndarray) -> slice | np.ndarray:
    low, high = int(cells.min()), int(cells.max()) + 1
    if high - low > 64 * cells.size:
        return cells
    there = np.zeros(high - low, np.bool_)
    there[cells - low] = True
    return slice(low, high) if there.all() else np.flatnonzero(there) + low
