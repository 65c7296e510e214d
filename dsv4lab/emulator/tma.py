"""What a TMA copy moves: the box of a tensor at some coordinates, and its bytes in shared memory.

A pure engine: which bytes, not when. Rows (the innermost dimension) are copied whole, 16 bytes at a time
where the swizzle permutes them. Facts that the PTX ISA leaves open were read off an H200 (driver 580,
2026-11):

- Where the innermost dimension of the box is narrower than the swizzle's span, rows still lie a span apart,
  and what is between them is not touched; only the data counts as transaction bytes.
- The NaN that fills what is outside of the tensor has the bits 0x7ff7 in every 16.
- Loads of tf32 round to nearest even at 10 bits of mantissa, any NaN to 0x7fffe000; `.ftz` flushes nothing.
- Stores and reductions work in 16 bytes: where rows of the tensor end within 16, they write to the end of
  those. Loads fill from the very element on.

Padding that a load of b4x16_p64 or b6x16_p32 puts into shared memory is undefined: 0xFF here. It does not
count as transaction bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator import reductions
from dsv4lab.emulator.errors import AddressError
from dsv4lab.emulator.tensormap import TensorMap, TensorMapError, decode
from dsv4lab.emulator.tensormap_fields import ELEMENTS, SWIZZLES

if TYPE_CHECKING:
    from dsv4lab.emulator.global_memory import GlobalMemory

ALIGNMENT = 128  # of a box in shared memory
NAN_FILL = 0x7FF7
PADDING = 0xFF
# Bytes of data and of padding that follow one another in shared memory.
_PADDED = {"b4x16_p64": (8, 8), "b6x16_p32": (12, 4)}
GRANULE = 16  # bytes in global memory that a box starts at a multiple of, and that stores write whole


@dataclass(frozen=True, slots=True)
class Box:
    """The tiles that one descriptor copies.

    Attributes:
        map: the descriptor's content.
        counts: elements copied in each dimension, innermost first.
        steps: elements from one to the next.
        rows: product of the outer counts.
        row_bytes: of a row in global memory.
        shared_row_bytes: of a row in shared memory, with the padding of sub-byte types.
        pitch: bytes from one row to the next in shared memory.
    """

    map: TensorMap
    counts: tuple[int, ...]
    steps: tuple[int, ...]
    rows: int
    row_bytes: int
    shared_row_bytes: int
    pitch: int

    @property
    def nbytes(self) -> int:
        """Transaction bytes of one tile: its data, that outside the tensor included."""
        return self.rows * self.row_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes from the start of a tile in shared memory to its end."""
        return (self.rows - 1) * self.pitch + self.shared_row_bytes

    @property
    def scattered(self) -> bool:
        """Whether a tile leaves bytes between its rows untouched."""
        return self.pitch != self.shared_row_bytes


@lru_cache(maxsize=1024)
def box_of(descriptor: bytes) -> Box:
    """The boxes of a descriptor of 128 bytes. Raises TensorMapError."""
    map_ = decode(descriptor)
    if map_.interleave != "none":
        raise TensorMapError(f"interleave {map_.interleave} is not emulated")
    counts = map_.copied
    element = ELEMENTS[map_.element]
    in_shared = counts[0] * element.shared_bits // 8
    span = SWIZZLES[map_.swizzle][0]
    rows = int(np.prod(counts[1:], dtype=np.int64))
    steps = (1, *map_.element_strides[1:])
    return Box(map_, counts, steps, rows, counts[0] * element.bits // 8, in_shared, span or in_shared)


def rows_of(box: Box, count: int) -> Box:
    """The box of a gather4 or scatter4: `count` rows of a two-dimensional tensor, each named by itself."""
    if box.map.rank != 2 or box.counts[1] != 1:
        raise TensorMapError(
            f"gather4 and scatter4 need a tensor of rank 2 and a box of one row, got rank {box.map.rank} "
            f"and box {box.map.box}"
        )
    return Box(box.map, box.counts, box.steps, count, box.row_bytes, box.shared_row_bytes, box.pitch)


def check_coordinates(box: Box, coordinates: Sequence[int], store: bool = False) -> None:
    """Raise TensorMapError for coordinates at which the TMA unit stops with an illegal instruction."""
    element = box.map.element
    multiple = 128 if element in _PADDED else 8 * GRANULE // box.map.bits
    if coordinates[0] % multiple:
        raise TensorMapError(
            f"coordinate 0 must be a multiple of {multiple} for {element}, got {coordinates[0]}"
        )
    if store and min(coordinates) < 0:
        raise TensorMapError(f"the coordinates of a store must not be negative, got {tuple(coordinates)}")


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of a box that lies in the tensor: bytes from `address`, and where they are in the tile."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: tuple[slice, ...]
    whole: bool

    def view(self, memory: GlobalMemory) -> np.ndarray | None:
        """The bytes (..., rows, bytes) in place; None if what lies between them is not all registered."""
        span = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) + 1
        try:
            flat = memory.view(self.address, span)
        except AddressError:
            return None
        return np.ndarray(self.shape, np.uint8, flat, 0, self.strides)

    def rows(self, memory: GlobalMemory) -> list[np.ndarray]:
        """Each row by itself. Raises AddressError for one that is not registered."""
        starts = np.array(self.address, np.int64)
        for n, stride in zip(self.shape[:-1], self.strides[:-1], strict=True):
            starts = starts[..., None] + np.arange(n) * stride
        memory.check(starts.reshape(-1), self.shape[-1])
        return [memory.view(start, self.shape[-1]) for start in starts.reshape(-1).tolist()]

    def read(self, memory: GlobalMemory) -> np.ndarray:
        """A copy of the bytes."""
        view = self.view(memory)
        return np.stack(self.rows(memory)).reshape(self.shape) if view is None else view.copy()

    def write(self, memory: GlobalMemory, values: np.ndarray) -> None:
        """Set the bytes."""
        view = self.view(memory)
        if view is not None:
            view[...] = values
            return
        for row, value in zip(self.rows(memory), values.reshape(-1, self.shape[-1]), strict=True):
            row[:] = value


def _window(box: Box, coordinates: Sequence[int], store: bool = False) -> _Window | None:
    """What of a box lies in the tensor, for a store with what it writes besides; None if nothing does."""
    map_ = box.map
    address, shape, strides, place = map_.address, [], [], []
    dimensions = zip(coordinates, map_.shape, box.counts, box.steps, (0, *map_.strides), strict=True)
    for at, size, count, step, stride in dimensions:
        first = max(0, -(at // step))
        stop = min(count, -((at - size) // step))
        if stop <= first:
            return None
        if not place:  # in bytes, of which an element may be a part
            first, stop = first * map_.bits // 8, stop * map_.bits // 8
            stop = -(-stop // GRANULE) * GRANULE if store else stop
            address += at * map_.bits // 8 + first
        else:
            address += (at + first * step) * stride
        shape.append(stop - first)
        strides.append(stride * step if place else 1)
        place.append(slice(first, stop))
    whole = tuple(shape) == (box.row_bytes, *box.counts[1:])
    return _Window(address, tuple(shape[::-1]), tuple(strides[::-1]), tuple(place[::-1]), whole)


def load(box: Box, memory: GlobalMemory, coordinates: Sequence[int]) -> np.ndarray:
    """The tile at some coordinates, one of each dimension of the tensor and innermost first.

    Returns:
        (rows, shared_row_bytes) uint8, filled where it is outside the tensor, not swizzled.
    Raises:
        AddressError: a byte inside the tensor is not registered.
    """
    window = _window(box, coordinates)
    if window is None:
        tile = _fill(box)
    else:
        values = window.read(memory)
        if box.map.element in ("tf32", "tf32.ftz"):
            values = _to_tf32(values)
        if window.whole:
            tile = values
        else:
            tile = _fill(box)
            tile[window.place] = values
    tile = tile.reshape(-1, box.row_bytes)
    return _expanded(tile, *_PADDED[box.map.element]) if box.map.element in _PADDED else tile


def store(box: Box, memory: GlobalMemory, coordinates: Sequence[int], tile: np.ndarray) -> int:
    """Write a tile (rows, shared_row_bytes) uint8 where it lies in the tensor; returns the bytes written."""
    window = _window(box, coordinates, store=True)
    if window is None:
        return 0
    if box.map.element == "b6x16_p32":
        tile = _packed(tile)
    return _put(box, memory, window, tile.reshape(*box.counts[:0:-1], box.row_bytes)[window.place])


def reduce(
    box: Box, memory: GlobalMemory, coordinates: Sequence[int], tile: np.ndarray, operation: str
) -> int:
    """Combine a tile with the tensor in place, as `store`."""
    window = _window(box, coordinates, store=True)
    if window is None:
        return 0
    values = tile.reshape(*box.counts[:0:-1], box.row_bytes)[window.place]
    values = reductions.combine(operation, box.map.element, window.read(memory), values)
    return _put(box, memory, window, values)


def _put(box: Box, memory: GlobalMemory, window: _Window, values: np.ndarray) -> int:
    try:
        window.write(memory, values)
    except AddressError as error:
        width = box.map.shape[0] * box.map.bits // 8
        if width % GRANULE == 0:
            raise
        whole = f"a TMA store writes whole {GRANULE} bytes, and rows of {width} bytes end within"
        raise AddressError(f"{error}: {whole}") from None
    return values.size


def _fill(box: Box) -> np.ndarray:
    shape = (*box.counts[:0:-1], box.row_bytes)
    if box.map.fill == "zero":
        return np.zeros(shape, np.uint8)
    return np.full((*shape[:-1], shape[-1] // 2), NAN_FILL, np.uint16).view(np.uint8)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1)) & np.uint32(0xFFFFE000)
    nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(0x7FFFE000), rounded).view(np.uint8)


def _expanded(tile: np.ndarray, data: int, padding: int) -> np.ndarray:
    groups = tile.reshape(len(tile), -1, data)
    wide = np.full((*groups.shape[:2], data + padding), PADDING, np.uint8)
    wide[..., :data] = groups
    return wide.reshape(len(tile), -1)


def _packed(tile: np.ndarray) -> np.ndarray:
    """b6p2x16: the low 6 bits of each byte, packed."""
    bits = np.unpackbits(tile[..., None], axis=-1, bitorder="little")[..., :6]
    return np.packbits(bits.reshape(len(tile), -1), axis=-1, bitorder="little")
