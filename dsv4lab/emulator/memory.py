"""Global memory: the process's own, and a registry of which addresses of it belong to which tensor."""

from __future__ import annotations

import bisect
import itertools
import threading
import weakref
from dataclasses import dataclass

import torch

from dsv4lab.emulator.errors import AddressError

# cudaMalloc aligns to 256 bytes at least and in practice to 512; kernels that assume 128 must find it here.
ALIGNMENT = 512
# As wide as the largest single access that could start in range and run over it: a row of a 256-byte TMA box.
GUARD_BYTES = 512
GUARD_VALUE = 0xA5
# A NaN in every float format with one, and -1 or the largest integer: memory that nobody wrote shows.
UNWRITTEN_VALUE = 0xFF


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
        self._furthest: list[int] = []

    def add(self, extent: Extent) -> int:
        """Add an extent; returns the key that `remove` takes."""
        with self._lock:
            key = next(self._keys)
            self._extents[key] = extent
            self._sorted = None
            return key

    def remove(self, key: int) -> None:
        with self._lock:
            if self._extents.pop(key, None) is not None:
                self._sorted = None

    def clear(self) -> None:
        with self._lock:
            self._extents.clear()
            self._sorted = None

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


def _description(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class Memory:
    """Aligned, guarded tensors and the registry of everything that a kernel may touch."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._names = itertools.count()
        self._held: dict[int, torch.Tensor] = {}
        self._guards: dict[int, tuple[Extent, torch.Tensor]] = {}

    def empty(
        self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, *, name: str | None = None
    ) -> torch.Tensor:
        """A contiguous CPU tensor at a multiple of 512 bytes, between guard zones, filled with 0xFF bytes.

        Args:
            shape: its sizes.
            dtype: any dtype of torch with whole bytes.
            name: what errors call it.

        Returns:
            A tensor (*shape) on the CPU, registered until the context is left or `release` is called.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape must not be negative, got {shape}")
        strides = torch.empty(shape, device="meta").stride()
        return self._allocate(shape, strides, dtype, name)

    def from_torch(self, tensor: torch.Tensor, *, name: str | None = None) -> torch.Tensor:
        """A copy of a tensor as `empty` allocates it, with the same strides.

        Args:
            tensor: of any device and shape; one that repeats its memory (stride 0) is copied as contiguous.
            name: what errors call it.
        """
        tensor = tensor.detach()
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        tensor = tensor.contiguous() if any(n > 1 and step == 0 for n, step in sizes) else tensor
        copy = self._allocate(tuple(tensor.shape), tensor.stride(), tensor.dtype, name)
        return copy.copy_(tensor)

    def _allocate(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, name: str | None
    ) -> torch.Tensor:
        nbytes = strided_nbytes(shape, strides, 8 * dtype.itemsize)
        padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
        buffer = torch.full((padded + 2 * GUARD_BYTES + ALIGNMENT,), GUARD_VALUE, dtype=torch.uint8)
        first = GUARD_BYTES + -(buffer.data_ptr() + GUARD_BYTES) % ALIGNMENT
        payload = buffer[first : first + padded]
        payload[:nbytes] = UNWRITTEN_VALUE
        tensor = payload.view(dtype).as_strided(shape, strides, first // dtype.itemsize)
        extent = Extent(name or self._name(), payload.data_ptr(), nbytes, _description(tensor))
        self._guards[self._hold(tensor, extent)] = (extent, buffer)
        return tensor

    def register(self, tensor: torch.Tensor, *, name: str | None = None) -> Extent:
        """Let kernels touch a tensor, and keep it alive until the context is left or `release` is called.

        Args:
            tensor: on the CPU; the bytes between its first and its last element count as its own.
            name: what errors call it.
        """
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type != "cpu":
            raise ValueError(f"tensor must be on the CPU, got one on {tensor.device}")
        nbytes = strided_nbytes(tuple(tensor.shape), tensor.stride(), 8 * tensor.dtype.itemsize)
        extent = Extent(name or self._name(), tensor.data_ptr(), nbytes, _description(tensor))
        self._hold(tensor, extent)
        return extent

    def _hold(self, tensor: torch.Tensor, extent: Extent) -> int:
        key = self.registry.add(extent)
        self._held[key] = tensor
        return key

    def release(self, tensor: torch.Tensor) -> None:
        """Take a tensor of `empty`, `from_torch` or `register` back: kernels may no longer touch it."""
        keys = [key for key, held in self._held.items() if held is tensor]
        if not keys:
            raise ValueError("tensor must be one that empty, from_torch or register has seen")
        for key in keys:
            self.registry.remove(key)
            del self._held[key]
            self._guards.pop(key, None)

    def clear(self) -> None:
        """Take everything back."""
        self.registry.clear()
        self._held.clear()
        self._guards.clear()

    def lend(self, owner: object, start: int, nbytes: int, description: str) -> Extent:
        """Register bytes for as long as `owner` lives, which keeps them alive itself."""
        extent = Extent(self._name(), start, nbytes, description)
        weakref.finalize(owner, self.registry.remove, self.registry.add(extent)).atexit = False
        return extent

    def _name(self) -> str:
        return f"tensor {next(self._names)}"

    def check_guards(self) -> None:
        """Raise AddressError if anything has written next to a tensor of `empty` or `from_torch`."""
        for extent, buffer in self._guards.values():
            base = buffer.data_ptr()
            before = buffer[: extent.start - base]
            after = buffer[extent.end - base :]
            for zone, where in ((before, "before"), (after, "after")):
                touched = (zone != GUARD_VALUE).nonzero()
                if len(touched):
                    at = zone.data_ptr() + int(touched[0])
                    raise AddressError(f"{len(touched)} byte(s) {where} {extent} were written, first {at:#x}")
