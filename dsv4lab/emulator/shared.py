"""Shared memory: the windows of all CTAs of a wave, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import AddressError, UninitialisedError, at

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access, HappensBefore

# A shared::cluster address is the CTA's rank in its cluster above 24 bits of offset; the own window's
# addresses carry the own rank, as on Hopper and Blackwell, where kernels mask it out to reach their peer.
RANK_SHIFT = 24
OFFSET_MASK = (1 << RANK_SHIFT) - 1
_CARRIER = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class SharedMemory:
    """The shared memory of the CTAs of a wave.

    Args:
        ctas: how many there are; those of a cluster follow one another.
        cluster_size: CTAs of a cluster.
        size: bytes of a CTA's window, the 1024 that the system keeps included.
        track: notice reads of bytes that nobody wrote.
        order: the race checker, or None.
        warps_per_cta: warps of a CTA.

    Attributes:
        bytes: uint8 (ctas, size rounded up).
        written: bool of the same shape, or None.
        ended: bool (ctas,), CTAs whose threads have all ended: others may not reach their memory any more.
        some_ended: whether there are any in clusters.
    """

    def __init__(
        self,
        ctas: int,
        cluster_size: int,
        size: int,
        track: bool,
        order: HappensBefore | None,
        warps_per_cta: int = 1,
    ) -> None:
        self.size = size
        self.stride = -(-size // 1024) * 1024
        self.cluster_size = cluster_size
        self.bytes = np.zeros((ctas, self.stride), np.uint8)
        self.written = np.zeros((ctas, self.stride), np.bool_) if track else None
        self.order = order
        self.ended = np.zeros(ctas, np.bool_)
        self.some_ended = False
        self._warps_per_cta = warps_per_cta
        flat = self.bytes.reshape(-1)
        self._flat = {n: flat.view(carrier) for n, carrier in _CARRIER.items()}

    def locate(self, ctas: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CTA and offset of shared::cluster addresses, as seen from CTAs that broadcast against them."""
        addresses = np.asarray(addresses, np.int64)
        rank = addresses >> RANK_SHIFT
        wrong = (rank < 0) | (rank >= self.cluster_size)
        if wrong.any():
            value = int(addresses[np.nonzero(wrong)].flat[0])
            raise AddressError(
                f"the shared address {value:#x} is of CTA rank {value >> RANK_SHIFT}, "
                f"and the cluster has {self.cluster_size}"
            )
        ctas = np.asarray(ctas, np.int64)
        return ctas - ctas % self.cluster_size + rank, addresses & OFFSET_MASK

    def end(self, ctas: np.ndarray) -> None:
        """The threads of these CTAs (n,) have all ended."""
        self.ended[ctas] = True
        self.some_ended = self.cluster_size > 1

    def check_there(self, cta: int, warp: int) -> None:
        """Raise AddressError if a CTA, whose memory a warp reaches for, is not the warp's and has ended."""
        if self.some_ended and self.ended[cta] and cta != warp // self._warps_per_cta:
            rank = cta % self.cluster_size
            raise AddressError(
                f"the shared memory is that of CTA rank {rank} of the cluster, whose threads have all ended: "
                "it must not end before others have finished with it"
            )

    def _check_all_there(self, batch: Batch, mask: np.ndarray, ctas: np.ndarray) -> None:
        wrong = mask & self.ended[ctas] & (ctas != batch.ctas[:, None])
        if wrong.any():
            row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
            try:
                self.check_there(int(ctas[row, lane]), int(batch.warps[row]))
            except AddressError as error:
                raise at(error, row, lane) from None

    # Accesses of lanes.

    def _flat_offsets(
        self, batch: Batch, mask: np.ndarray, addresses: np.ndarray, nbytes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CTA (n, 32), offset (n, 32) and place in the flat array; 0 for lanes outside the mask."""
        addresses = np.where(mask, addresses, batch.machine.own_shared[batch.index])
        ctas = batch.ctas[:, None]
        if self.cluster_size > 1:
            ctas, addresses = self.locate(ctas, addresses)
            if self.some_ended:
                self._check_all_there(batch, mask, ctas)
        # One unsigned comparison finds negative ones too.
        outside = addresses.view(np.uint64) > np.uint64(self.size - nbytes)
        if outside.any() or (nbytes > 1 and (addresses & (nbytes - 1)).any()):
            self._refuse(mask, addresses, outside, nbytes)
        return ctas, addresses, ctas * self.stride + addresses

    def _refuse(self, mask: np.ndarray, offsets: np.ndarray, outside: np.ndarray, nbytes: int) -> None:
        wrong = mask & (outside | (offsets & (nbytes - 1) != 0))
        if not wrong.any():
            return
        row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
        offset = int(offsets[row, lane])
        if outside[row, lane]:
            what = f"lie outside its CTA's {self.size} bytes"
        else:
            what = f"are not aligned to {nbytes}"
        raise at(
            AddressError(f"the {nbytes} byte(s) of shared memory at offset {offset:#x} {what}"), row, lane
        )

    def gather(
        self, batch: Batch, mask: np.ndarray, addresses: np.ndarray, nbytes: int, atomic: bool = False
    ) -> np.ndarray:
        """What lanes (n, 32) load: `nbytes` each, 1 to 16, as an unsigned (or 16-byte) element."""
        ctas, offsets, flat = self._flat_offsets(batch, mask, addresses, nbytes)
        if self.written is not None:
            self._check_written(mask, flat, offsets, nbytes)
        if self.order is not None:
            self._order(batch, mask, ctas, offsets, nbytes, False, atomic)
        return self._flat[nbytes][flat // nbytes]

    def scatter(
        self,
        batch: Batch,
        mask: np.ndarray,
        addresses: np.ndarray,
        values: np.ndarray,
        nbytes: int,
        atomic: bool = False,
    ) -> None:
        """Lanes (n, 32) store elements of `nbytes`."""
        ctas, offsets, flat = self._flat_offsets(batch, mask, addresses, nbytes)
        if self.order is not None:
            self._order(batch, mask, ctas, offsets, nbytes, True, atomic)
            if not atomic:
                self.order.check_same_instruction(flat[mask], values[mask], mask)
        where = flat[mask]
        self._flat[nbytes][where // nbytes] = values[mask]
        if self.written is not None:
            for i in range(nbytes):
                self.written.reshape(-1)[where + i] = True

    def _order(
        self,
        batch: Batch,
        mask: np.ndarray,
        ctas: np.ndarray,
        offsets: np.ndarray,
        nbytes: int,
        write: bool,
        atomic: bool,
    ) -> None:
        ctas = np.broadcast_to(ctas, mask.shape)
        batch.machine.note_line()
        self.order.access_batch("shared", batch.warps, ctas, offsets, nbytes, mask, write, atomic=atomic)

    def _check_written(self, mask: np.ndarray, flat: np.ndarray, offsets: np.ndarray, nbytes: int) -> None:
        known = self.written.reshape(-1)
        view = known.view({1: np.uint8, 2: np.uint16, 4: np.uint32}.get(nbytes, np.uint64))
        whole = {1: 0x01, 2: 0x0101, 4: 0x01010101}.get(nbytes, 0x0101010101010101)
        width = min(nbytes, 8)
        good = view[flat // width] == whole
        if nbytes == 16:
            good &= view[flat // width + 1] == whole
        if not (good | ~mask).all():
            row, lane = (int(axis[0]) for axis in np.nonzero(mask & ~good))
            raise at(
                UninitialisedError(
                    f"a read of {nbytes} byte(s) of shared memory at offset {int(offsets[row, lane]):#x}, "
                    "which nobody has written"
                ),
                row,
                lane,
            )

    # Accesses of engines: one CTA, any offsets.

    def _check_range(self, cta: int, low: int, high: int, by: Access | None) -> None:
        if by is not None:
            self.check_there(cta, by.warp)
        if low < 0 or high > self.size:
            raise AddressError(
                f"the bytes of shared memory from {low:#x} to {high:#x} lie outside the CTA's {self.size}"
            )

    def read(self, cta: int, offsets: np.ndarray, by: Access | None) -> np.ndarray:
        """Bytes at offsets (int64, any shape) of a CTA's window, as uint8 of that shape."""
        if offsets.size == 0:
            return np.zeros(offsets.shape, np.uint8)
        self._check_range(cta, int(offsets.min()), int(offsets.max()) + 1, by)
        if self.written is not None and not self.written[cta].take(offsets).all():
            bad = offsets[~self.written[cta].take(offsets)]
            self._never_written(int(bad.min()), bad.size)
        if self.order is not None and by is not None:
            self.order.read("shared", cta, offsets.reshape(-1), by)
        return self.bytes[cta].take(offsets)

    def write(self, cta: int, offsets: np.ndarray, data: np.ndarray, by: Access | None) -> None:
        """Set bytes at offsets (int64, any shape) of a CTA's window."""
        if offsets.size == 0:
            return
        self._check_range(cta, int(offsets.min()), int(offsets.max()) + 1, by)
        if self.order is not None and by is not None:
            self.order.write("shared", cta, offsets.reshape(-1), by)
        self.bytes[cta][offsets] = data
        if self.written is not None:
            self.written[cta][offsets] = True

    def read_range(self, cta: int, start: int, nbytes: int, by: Access | None) -> np.ndarray:
        """The bytes [start, start + nbytes) of a CTA's window, a copy."""
        self._check_range(cta, start, start + nbytes, by)
        if self.written is not None and not self.written[cta, start : start + nbytes].all():
            missing = np.nonzero(~self.written[cta, start : start + nbytes])[0]
            self._never_written(start + int(missing[0]), len(missing))
        if self.order is not None and by is not None:
            self.order.read("shared", cta, slice(start, start + nbytes), by)
        return self.bytes[cta, start : start + nbytes].copy()

    def write_range(self, cta: int, start: int, data: np.ndarray, by: Access | None) -> None:
        """Set the bytes from `start` of a CTA's window."""
        self._check_range(cta, start, start + len(data), by)
        if self.order is not None and by is not None:
            self.order.write("shared", cta, slice(start, start + len(data)), by)
        self.bytes[cta, start : start + len(data)] = data
        if self.written is not None:
            self.written[cta, start : start + len(data)] = True

    def _never_written(self, offset: int, count: int) -> None:
        raise UninitialisedError(
            f"a read of {count} byte(s) of shared memory from offset {offset:#x} on, which nobody has written"
        )
