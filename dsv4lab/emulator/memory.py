"""Global memory, which is the process's own: aligned and guarded tensors, and what kernels may touch."""

from __future__ import annotations

import itertools
import weakref

import torch

from dsv4lab.emulator.errors import AddressError
from dsv4lab.emulator.extents import Extent, Registry, strided_nbytes

# cudaMalloc aligns to 256 bytes at least and in practice to 512; kernels that assume 128 must find it here.
ALIGNMENT = 512
# As wide as the largest single access that could start in range and run over it: a row of a 256-byte TMA box.
GUARD_BYTES = 512
GUARD_VALUE = 0xA5
# A NaN in every float format with one, and -1 or the largest integer: memory that nobody wrote shows.
UNWRITTEN_VALUE = 0xFF


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
