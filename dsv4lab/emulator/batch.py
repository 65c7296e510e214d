"""Warps that run together, and the frames in which lanes that a branch has parted wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dsv4lab.emulator.machine import Machine

ALL_LANES = np.uint32(0xFFFFFFFF)


def bits_of(mask: np.ndarray) -> np.ndarray:
    """Lane masks (n, 32) bool as uint32 (n,), lane 0 in bit 0."""
    return np.packbits(mask, axis=1, bitorder="little").view(np.uint32).reshape(-1)


def mask_of(bits: np.ndarray) -> np.ndarray:
    """Lane masks uint32 (n,) as (n, 32) bool."""
    octets = np.ascontiguousarray(bits, np.uint32).view(np.uint8).reshape(-1, 4)
    return np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)


def _index(warps: np.ndarray) -> slice | np.ndarray:
    """The rows of a register file: a slice, read without a copy, where warps are evenly spaced."""
    if len(warps) == 1:
        return slice(int(warps[0]), int(warps[0]) + 1)
    step = int(warps[1]) - int(warps[0])
    if step > 0 and (np.diff(warps) == step).all():
        return slice(int(warps[0]), int(warps[-1]) + 1, step)
    return warps


class Batch:
    """Rows of lanes that stand at one basic block; a row is a warp, or the part of one that took a branch.

    Attributes:
        machine: what they run on.
        warps: (n,) int64, index of each row's warp in the wave.
        mask: (n, 32) bool, the lanes that are here.
        frames: (n,) int64, the frame that each row is to meet others in, -1 for none.
        full: all lanes of all rows are here.
        clock: model time at which the earliest of them came here.
        index: the warps as an index into register arrays.
        ctas: (n,) int64, the CTA of each row.
        parked: rows that the current instruction has parked, with key and reason.
    """

    __slots__ = (
        "_lanes",
        "clock",
        "ctas",
        "frames",
        "full",
        "index",
        "machine",
        "mask",
        "parked",
        "warps",
    )

    def __init__(
        self,
        machine: Machine,
        warps: np.ndarray,
        mask: np.ndarray,
        frames: np.ndarray,
        full: bool,
        clock: int,
    ) -> None:
        self.machine = machine
        self.warps = warps
        self.mask = mask
        self.frames = frames
        self.full = full
        self.clock = clock
        self.index = _index(warps)
        self.ctas = warps // machine.warps_per_cta
        self.parked: dict[int, tuple[object, str]] = {}
        self._lanes: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.warps)

    def park(self, row: int, key: object, reason: str) -> None:
        """Let a row wait until `machine.wake(key)`; it then executes the same instruction again."""
        self.parked[row] = (key, reason)

    def lanes(self, mask: np.ndarray) -> list[tuple[int, int]]:
        """(row, lane) of the lanes in a mask (n, 32), in order."""
        return list(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))

    def put(self, register: np.ndarray, value: np.ndarray) -> None:
        """Store a value into a register array (warps, 32), for the lanes that are here."""
        if isinstance(self.index, slice):
            target = register[self.index]
            where = self.mask if target.ndim == 2 else self.mask[..., None]
            np.copyto(target, value, where=where)
            return
        # Two rows may be parts of one warp: lanes are stored one by one, so that neither undoes the other.
        if self._lanes is None:
            self._lanes = np.nonzero(self.mask)
        row, lane = self._lanes
        register[self.warps[row], lane] = np.broadcast_to(value, (len(self), 32, *value.shape[2:]))[row, lane]

    def put_rest(self, register: np.ndarray, value: np.ndarray) -> None:
        """Store a value for the lanes of the rows that are not parked."""
        mask = self.mask.copy()
        mask[list(self.parked)] = False
        row, lane = np.nonzero(mask)
        register[self.warps[row], lane] = np.broadcast_to(value, (len(self), 32, *value.shape[2:]))[row, lane]

    def take(self, rows: np.ndarray) -> Batch:
        """Some of its rows."""
        return Batch(
            self.machine, self.warps[rows], self.mask[rows], self.frames[rows], self.full, self.clock
        )

    def with_mask(self, rows: np.ndarray, mask: np.ndarray, frames: np.ndarray) -> Batch:
        """Some of its rows with fewer lanes."""
        return Batch(self.machine, self.warps[rows], mask, frames, False, self.clock)


class Frames:
    """Where the parts of a warp meet again after a branch.

    A frame is opened when the lanes of a row part. It knows the block at which they meet, the lanes that are
    still to come there, those that have come, and the frame around it. Lanes that end are no longer expected.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.block = np.zeros(capacity, np.int64)
        self.parent = np.zeros(capacity, np.int64)
        self.warp = np.zeros(capacity, np.int64)
        self.expected = np.zeros(capacity, np.uint32)
        self.arrived = np.zeros(capacity, np.uint32)
        self._free = list(range(capacity - 1, -1, -1))

    def open(self, warps: np.ndarray, block: int, parents: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """A frame for each row (n,), in which `bits` are to meet at `block`; returns their numbers."""
        while len(self._free) < len(warps):
            self._grow()
        frames = np.array([self._free.pop() for _ in range(len(warps))], np.int64)
        self.block[frames], self.parent[frames], self.warp[frames] = block, parents, warps
        self.expected[frames], self.arrived[frames] = bits, 0
        return frames

    def _grow(self) -> None:
        size = len(self.block)
        for name in ("block", "parent", "warp", "expected", "arrived"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._free.extend(range(2 * size - 1, size - 1, -1))

    def arrive(self, frames: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Lanes have come to the meeting block; returns the frames that are complete with them."""
        np.bitwise_or.at(self.arrived, frames, bits)
        return self._complete(np.unique(frames))

    def leave(self, frames: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Lanes have ended: no frame waits for them; returns those that are complete without them."""
        complete = []
        while len(frames):
            np.bitwise_and.at(self.expected, frames, ~bits)
            complete.append(self._complete(np.unique(frames)))
            frames = self.parent[frames]
            bits, frames = bits[frames >= 0], frames[frames >= 0]
        return np.concatenate(complete) if complete else np.zeros(0, np.int64)

    def _complete(self, frames: np.ndarray) -> np.ndarray:
        return frames[(self.arrived[frames] == self.expected[frames]) & (self.expected[frames] != 0)]

    def close(self, frames: np.ndarray) -> None:
        """Give complete frames back."""
        # A frame whose lanes have all ended is not given back: nobody is left to notice, and it is small.
        self.expected[frames] = 0
        self._free.extend(frames.tolist())
