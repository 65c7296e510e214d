"""Which addresses of the process belong to which tensor."""

from __future__ import annotations

import bisect
import itertools
import threading
from dataclasses import dataclass

from dsv4lab.emulator.errors import AddressError


@dataclass(frozen=True)
class Extent:
    """The bytes [start, end) that one tensor spans."""

    label: str
    start: int
    nbytes: int
    description: str

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def __str__(self) -> str:
        return f"{self.label} ({self.description}, {self.nbytes} bytes at {self.start:#x})"


@dataclass(frozen=True)
class Location:
    """Where an address lies: `offset` bytes into `extent`."""

    extent: Extent
    offset: int


def strided_nbytes(shape: tuple[int, ...], strides: tuple[int, ...], itembits: int) -> int:
    """Bytes from the first to the last element of a strided tensor, gaps included."""
    if any(stride < 0 for stride in strides):
        raise ValueError(f"strides must not be negative, got {strides}")
    if any(size == 0 for size in shape):
        return 0
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return -(-(last + 1) * itembits // 8)


class Registry:
    """Which addresses belong to which tensor: overlapping extents allowed, each key registered once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._extents: dict[int, Extent] = {}
        self._keys = itertools.count()
        self._sorted: list[Extent] | None = None
        # Changes whenever the extents do.
        self.generation = 0
        self._furthest: list[int] = []

    def add(self, extent: Extent) -> int:
        """Add an extent; returns the key that `remove` takes."""
        with self._lock:
            key = next(self._keys)
            self._extents[key] = extent
            self._changed()
            return key

    def remove(self, key: int) -> None:
        with self._lock:
            if self._extents.pop(key, None) is not None:
                self._changed()

    def clear(self) -> None:
        with self._lock:
            self._extents.clear()
            self._changed()

    def _changed(self) -> None:
        self._sorted = None
        self.generation += 1

    def extents(self) -> list[Extent]:
        """All extents by their start; a copy."""
        with self._lock:
            return list(self._ordered())

    def _ordered(self) -> list[Extent]:
        if self._sorted is None:
            self._sorted = sorted(self._extents.values(), key=lambda extent: (extent.start, -extent.nbytes))
            self._furthest = list(itertools.accumulate((e.end for e in self._sorted), max))
        return self._sorted

    def lookup(self, address: int, nbytes: int = 1) -> Location:
        """The tensor that holds the bytes [address, address + nbytes), the smallest if several do.

        Raises:
            AddressError: no registered tensor holds all of them; the message names the nearest one.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes must be at least 1, got {nbytes}")
        with self._lock:
            found = min(self._holders(address, nbytes), key=lambda e: e.nbytes, default=None)
            if found is None:
                raise AddressError(self._stray(address, nbytes))
            return Location(found, address - found.start)

    def _holders(self, address: int, nbytes: int) -> list[Extent]:
        ordered, holders = self._ordered(), []
        index = bisect.bisect_right(ordered, address, key=lambda extent: extent.start) - 1
        # Extents before `index` start earlier; once none of them reaches this far, the search is over.
        while index >= 0 and self._furthest[index] >= address + nbytes:
            if ordered[index].end >= address + nbytes:
                holders.append(ordered[index])
            index -= 1
        # Of equal extents, the one registered first is the one that was given a name.
        return holders[::-1]

    def _stray(self, address: int, nbytes: int) -> str:
        what = f"the {nbytes} byte(s) at {address:#x}"
        nearest = min(
            self._ordered(), key=lambda e: max(e.start - address, address + nbytes - e.end), default=None
        )
        if nearest is None:
            return f"{what} belong to no tensor: none is registered"
        if address < nearest.start:
            where = f"start {nearest.start - address} bytes before"
        else:
            where = f"end {address + nbytes - nearest.end} bytes after the end of"
        return f"{what} belong to no registered tensor: they {where} the nearest, {nearest}"
