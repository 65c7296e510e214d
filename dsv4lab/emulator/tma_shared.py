"""Where the rows of a TMA tile lie in shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.swizzle import PATTERNS, swizzle
from dsv4lab.emulator.tma import Box

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.shared import SharedMemory


@lru_cache(maxsize=256)
def _order(mode: str, phase: int, nbytes: int) -> tuple[np.ndarray, type]:
    """Which chunk lies where in a tile without gaps, and the type that carries a chunk."""
    size = min(16, PATTERNS[mode].atom)
    offsets = phase + np.arange(0, nbytes, size)
    return (swizzle(mode, offsets) - phase) // size, {8: np.uint64, 16: np.complex128}[size]


@lru_cache(maxsize=64)
def _offsets(mode: str, phase: int, rows: int, row_bytes: int, pitch: int) -> np.ndarray:
    """Where each byte of a tile with gaps lies, from its start."""
    linear = phase + np.arange(rows)[:, None] * pitch + np.arange(row_bytes)
    return (swizzle(mode, linear) - phase).reshape(-1)


def _swizzled(box: Box, start: int, data: np.ndarray) -> np.ndarray:
    mode = box.map.swizzle
    if mode == "none":
        return data
    order, carrier = _order(mode, start % PATTERNS[mode].period, len(data))
    return data.view(carrier).take(order).view(np.uint8)


def _places(box: Box, start: int) -> np.ndarray:
    mode = box.map.swizzle
    phase = start % PATTERNS[mode].period
    return start + _offsets(mode, phase, box.rows, box.shared_row_bytes, box.pitch)


def write_shared(
    box: Box, shared: SharedMemory, cta: int, start: int, tile: np.ndarray, by: Access | None
) -> None:
    """Put a tile (rows, shared_row_bytes) at an offset, a multiple of ALIGNMENT, of a CTA's shared memory."""
    data = np.ascontiguousarray(tile).reshape(-1)
    if box.scattered:
        shared.write(cta, _places(box, start), data, by)
    else:
        shared.write_range(cta, start, _swizzled(box, start, data), by)


def read_shared(box: Box, shared: SharedMemory, cta: int, start: int, by: Access | None) -> np.ndarray:
    """The tile (rows, shared_row_bytes) uint8 that lies at an offset of a CTA's shared memory."""
    if box.scattered:
        data = shared.read(cta, _places(box, start), by)
    else:
        data = _swizzled(box, start, shared.read_range(cta, start, box.rows * box.pitch, by))
    return data.reshape(box.rows, box.shared_row_bytes)
