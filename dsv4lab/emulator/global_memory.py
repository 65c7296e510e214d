"""Global memory: the process's own, reached only where a tensor is registered."""

from __future__ import annotations

import bisect
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dsv4lab.emulator.errors import AddressError, at
from dsv4lab.emulator.extents import Registry

# NumPy takes no array at address 0; nothing of a process lies in its first page.
_ORIGIN = 4096
_CARRIER = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def _process(dtype: type) -> np.ndarray:
    """All of the process's address space as an array; touching it unchecked may crash."""
    dtype = np.dtype(dtype)
    count = (1 << 47) // dtype.itemsize
    interface = {"data": (_ORIGIN, False), "shape": (count,), "typestr": dtype.str, "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


_PROCESS = {nbytes: _process(carrier) for nbytes, carrier in _CARRIER.items()}


class GlobalMemory:
    """Checked accesses to the process's memory.

    Args:
        registry: what may be touched.
        strict: refuse what is not registered; otherwise memory that the process has mapped is allowed too.
    """

    def __init__(self, registry: Registry, strict: bool = True) -> None:
        self.registry = registry
        self.strict = strict
        self._generation = -1
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._read_only: list[tuple[int, int]] = []

    def _refresh(self) -> None:
        """Take over what is registered, extents that overlap as one interval."""
        generation = self.registry.generation
        if generation == self._generation:
            return
        starts: list[int] = []
        ends: list[int] = []
        for extent in self.registry.extents():
            if ends and extent.start < ends[-1]:
                ends[-1] = max(ends[-1], extent.end)
            elif extent.nbytes:
                starts.append(extent.start)
                ends.append(extent.end)
        self._starts, self._ends, self._generation = starts, ends, generation
        self._arrays = np.array(starts, np.int64), np.array(ends, np.int64)

    def check(self, addresses: np.ndarray, nbytes: int) -> None:
        """Raise AddressError unless each [address, address + nbytes) is registered."""
        self._refresh()
        low, high = int(addresses.min()), int(addresses.max()) + nbytes
        if self._one(low, high):
            return
        starts, ends = self._arrays
        place = np.searchsorted(starts, addresses, "right") - 1
        good = place >= 0
        if len(starts):
            good &= addresses + nbytes <= ends[place]
        if good.all():
            return
        bad = np.nonzero(~good)
        self._missing(int(addresses[bad][0]), nbytes, bad)
        # Allowed after all: some may still not be.
        for address in addresses[bad].tolist():
            self._missing(address, nbytes, bad)

    def _one(self, low: int, high: int) -> bool:
        """Whether one interval holds [low, high)."""
        place = bisect.bisect_right(self._starts, low) - 1
        return place >= 0 and high <= self._ends[place]

    def _missing(self, address: int, nbytes: int, where: tuple[np.ndarray, ...]) -> None:
        if not self.strict and mapped(address, nbytes):
            return
        try:
            self.registry.lookup(address, nbytes)
        except AddressError as error:
            if len(where) == 2:
                raise at(error, int(where[0][0]), int(where[1][0])) from None
            raise
        raise AddressError(f"the {nbytes} byte(s) at {address:#x} belong to several tensors")

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes [address, address + nbytes), uint8, as a view onto them."""
        self._refresh()
        if not self._one(address, address + nbytes):
            self._missing(address, nbytes, ())
        start = address - _ORIGIN
        return _PROCESS[1][start : start + nbytes]

    def gather(self, mask: np.ndarray, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        """What lanes (n, 32) load: `nbytes` each, 1 to 16, as an unsigned (or 16-byte) element."""
        addresses = self._lanes(mask, addresses, nbytes)
        if addresses is None:
            return np.zeros(mask.shape, _CARRIER[nbytes])
        return _PROCESS[nbytes][(addresses - _ORIGIN) // nbytes]

    def scatter(self, mask: np.ndarray, addresses: np.ndarray, values: np.ndarray, nbytes: int) -> None:
        """Lanes (n, 32) store elements of `nbytes`."""
        addresses = self._lanes(mask, addresses, nbytes)
        if addresses is not None:
            _PROCESS[nbytes][(addresses[mask] - _ORIGIN) // nbytes] = values[mask]

    def _lanes(self, mask: np.ndarray, addresses: np.ndarray, nbytes: int) -> np.ndarray | None:
        """Checked addresses, those outside of the mask replaced by one inside; None if there is none."""
        first = int(mask.argmax())
        if not mask.flat[first]:
            return None
        addresses = np.where(mask, addresses, addresses.flat[first])
        try:
            self.check(addresses, nbytes)
        except AddressError as error:
            if error.lane is not None and not mask[error.row, error.lane]:
                # It is the address that stands in for lanes which do not take part.
                error.row, error.lane = divmod(first, mask.shape[1])
            raise
        if nbytes > 1 and (addresses & (nbytes - 1)).any():
            row, lane = (int(axis[0]) for axis in np.nonzero(addresses & (nbytes - 1)))
            address = int(addresses[row, lane])
            raise at(AddressError(f"the address {address:#x} is not aligned to {nbytes} bytes"), row, lane)
        return addresses


def mapped(address: int, nbytes: int) -> bool:
    """Whether the process has mapped the bytes [address, address + nbytes) for reading and writing."""
    if not sys.platform.startswith("linux"):
        raise AddressError(
            f"strict=False needs Linux's list of mapped memory to look up {address:#x}: "
            "register the tensor instead"
        )
    reached = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_ = line.split(maxsplit=2)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= reached < end and rights.startswith("rw"):
            reached = end
            if reached >= address + nbytes:
                return True
    return False
