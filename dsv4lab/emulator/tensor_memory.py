"""Tensor memory: 128 lanes by 512 columns of 32-bit cells for each CTA, allocated by columns, checked.

An address is lane << 16 | column. Each CTA has its tensor memory to itself, as if it were alone on its SM, so
that an allocation waits only for those of its own CTA. PTX does not say where an allocation lies; here it is
the lowest free place that its size divides. For the race check cell number lane * 512 + column counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, UninitialisedError, at

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine
    from dsv4lab.emulator.ptx import Instruction

LANES, COLUMNS = 128, 512
_NEVER, _LIVE, _FREED = 0, 1, 2


class TensorMemoryError(EmulatorError):
    """A use of tensor memory that PTX does not allow."""


class TensorMemory:
    """The tensor memory of the CTAs of a wave.

    Attributes:
        cells: uint32 (ctas, 128, 512).
        written: bool of the same shape, or None when reads of unwritten cells are not looked for.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        shape = (machine.ctas, LANES, COLUMNS)
        self.cells = np.zeros(shape, np.uint32)
        self.written = np.zeros(shape, np.bool_) if "initialised" in machine.checks else None
        self._state = np.zeros((machine.ctas, COLUMNS), np.int8)
        self._live: list[dict[int, int]] = [{} for _ in range(machine.ctas)]
        self._last_size = [COLUMNS] * machine.ctas
        self._relinquished: set[int] = set()
        # The warp and instruction that allocated last in a CTA.
        self._allocating: dict[int, tuple[int, Instruction | None]] = {}
        machine.at_end.append(self._at_end)

    # Allocation --------------------------------------------------------------------------------------------

    def allocate(self, ctas: Sequence[int], columns: int, warp: int = 0) -> int | None:
        """Address of columns that are from now on allocated in all of these CTAs; None if not free now.

        Raises:
            TensorMemoryError: for a size that is not a power of two from 32 to 512 or that is larger than
                the CTA's last one, or after the right to allocate was given up.
        """
        for cta in ctas:
            self._check_size(cta, columns)
        free = (self._state[list(ctas)] != _LIVE).all(axis=0).reshape(-1, columns).all(axis=1)
        if not free.any():
            return None
        start = int(free.argmax()) * columns
        for cta in ctas:
            self._state[cta, start : start + columns] = _LIVE
            self._live[cta][start] = columns
            self._last_size[cta] = columns
            self._allocating[cta] = warp, self.machine.instruction_now()
            if self.written is not None:
                self.written[cta, :, start : start + columns] = False
        return start

    def _check_size(self, cta: int, columns: int) -> None:
        if columns not in (32, 64, 128, 256, 512):
            raise TensorMemoryError(
                f"an allocation of {columns} columns of tensor memory: must be a power of two from 32 to 512"
            )
        if cta in self._relinquished:
            raise TensorMemoryError(
                "an allocation of tensor memory after tcgen05.relinquish_alloc_permit in the same CTA"
            )
        if columns > self._last_size[cta]:
            raise TensorMemoryError(
                f"an allocation of {columns} columns of tensor memory after one of {self._last_size[cta]}: "
                "sizes must not increase"
            )

    def free(self, ctas: Sequence[int], address: int, columns: int) -> None:
        """Give an allocation back, named by its address and size. Raises TensorMemoryError for another."""
        for cta in ctas:
            self.check_allocation(cta, address, columns)
        for cta in ctas:
            del self._live[cta][address]
            self._state[cta, address : address + columns] = _FREED

    def check_allocation(self, cta: int, address: int, columns: int) -> None:
        """Raises TensorMemoryError unless a CTA has an allocation of this address and size."""
        if self._live[cta].get(address) != columns:
            raise TensorMemoryError(
                f"tcgen05.dealloc of {columns} columns at {address:#x}: allocated are {self.describe(cta)}"
            )

    def relinquish(self, cta: int) -> None:
        """Give up a CTA's right to allocate."""
        self._relinquished.add(cta)

    def describe(self, cta: int) -> str:
        """The allocations of a CTA, for messages."""
        parts = [f"{columns} columns at {start:#x}" for start, columns in sorted(self._live[cta].items())]
        return ", ".join(parts) or "none"

    def _at_end(self) -> None:
        for cta, live in enumerate(self._live):
            if live and "leaks" in self.machine.checks:
                what = f"the CTA ends without freeing its tensor memory: {self.describe(cta)}"
                raise self.machine.blamed(TensorMemoryError(what), cta, *self._allocating[cta])

    # Blocks of one CTA -------------------------------------------------------------------------------------

    def read(
        self, cta: int, lanes: slice | np.ndarray, column: int, width: int, by: Access | None
    ) -> np.ndarray:
        """Cells uint32 (lanes, width) of a CTA from a column on; not to be written into.

        Raises:
            TensorMemoryError: for columns that are not allocated.
            UninitialisedError: for a cell that nobody wrote.
        """
        self._check_columns(cta, column, width)
        block = (cta, lanes, slice(column, column + width))
        if self.written is not None and not self.written[block].all():
            self._unwritten(cta, lanes, column, width)
        if by is not None and self.machine.order is not None:
            self.machine.order.read("tensor", cta, _cells(lanes, column, width), by)
        return self.cells[block]

    def write(
        self, cta: int, lanes: slice | np.ndarray, column: int, values: np.ndarray, by: Access | None
    ) -> None:
        """Set cells (lanes, width) of a CTA from a column on. Raises as `read`."""
        width = values.shape[1]
        self._check_columns(cta, column, width)
        if by is not None and self.machine.order is not None:
            self.machine.order.write("tensor", cta, _cells(lanes, column, width), by)
        block = (cta, lanes, slice(column, column + width))
        self.cells[block] = values
        if self.written is not None:
            self.written[block] = True

    def _check_columns(self, cta: int, column: int, width: int) -> None:
        if column < 0 or column + width > COLUMNS:
            raise TensorMemoryError(
                f"columns {column} to {column + width} of tensor memory: a CTA has {COLUMNS}"
            )
        states = self._state[cta, column : column + width]
        if (states != _LIVE).any():
            self._not_allocated(cta, column + int((states != _LIVE).argmax()))

    def _not_allocated(self, cta: int, column: int) -> None:
        how = "freed" if self._state[cta, column] == _FREED else "never allocated"
        raise TensorMemoryError(
            f"column {column} of tensor memory was {how}; allocated are {self.describe(cta)}"
        )

    def _unwritten(self, cta: int, lanes: slice | np.ndarray, column: int, width: int) -> None:
        numbers = np.arange(LANES)[lanes]
        bad = np.argwhere(~self.written[cta, numbers, column : column + width])
        lane, offset = bad[0].tolist()
        raise UninitialisedError(
            f"a read of {len(bad)} cell(s) of tensor memory that nobody has written, "
            f"the first in lane {int(numbers[lane])}, column {column + offset}"
        )

    # Fragments of warps ------------------------------------------------------------------------------------

    def gather(
        self, ctas: np.ndarray, addresses: np.ndarray, pattern: np.ndarray, by: Sequence[Access | None]
    ) -> np.ndarray:
        """What warps load.

        Args:
            ctas: (n,) int64 of n warps.
            addresses: (n,) int64.
            pattern: (registers, 32) int64, cell numbers relative to the one at the address.
            by: n tokens.
        Returns:
            uint32 (registers, n, 32).
        Raises:
            TensorMemoryError: for columns that are not allocated.
            UninitialisedError: for a cell that nobody wrote.
        """
        index = self._index(ctas, addresses, pattern, by, False)
        if self.written is not None:
            self._check_written(index)
        return self.cells.reshape(-1).take(index)

    def scatter(
        self,
        ctas: np.ndarray,
        addresses: np.ndarray,
        pattern: np.ndarray,
        values: np.ndarray,
        by: Sequence[Access | None],
    ) -> None:
        """What warps store: values uint32 (registers, n, 32); otherwise as `gather`."""
        index = self._index(ctas, addresses, pattern, by, True)
        self.cells.reshape(-1)[index] = values
        if self.written is not None:
            self.written.reshape(-1)[index] = True

    def _index(self, ctas, addresses, pattern, by, write: bool) -> np.ndarray:
        column = addresses & 0xFFFF
        columns = np.unique(pattern % COLUMNS)
        outside = column + columns[-1] >= COLUMNS
        if outside.any():
            row = int(outside.argmax())
            raise at(
                TensorMemoryError(
                    f"column {int(column[row] + columns[-1])} of tensor memory: a CTA has {COLUMNS}"
                ),
                row,
            )
        live = self._state[ctas[:, None], column[:, None] + columns] == _LIVE
        if not live.all():
            row, i = np.argwhere(~live)[0].tolist()
            try:
                self._not_allocated(int(ctas[row]), int(column[row] + columns[i]))
            except TensorMemoryError as error:
                raise at(error, row) from None
        start = (addresses >> 16) * COLUMNS + column
        if self.machine.order is not None:
            check = self.machine.order.write if write else self.machine.order.read
            for cta, first, access in zip(ctas.tolist(), start.tolist(), by, strict=True):
                if access is not None:
                    check("tensor", cta, pattern.reshape(-1) + first, access)
        return (ctas * (LANES * COLUMNS) + start)[:, None] + pattern[:, None, :]

    def _check_written(self, index: np.ndarray) -> None:
        known = self.written.reshape(-1).take(index)
        if known.all():
            return
        register, row, lane = np.argwhere(~known)[0].tolist()
        place, column = divmod(int(index[register, row, lane]) % (LANES * COLUMNS), COLUMNS)
        raise at(
            UninitialisedError(
                f"a read of {int((~known).sum())} cell(s) of tensor memory that nobody has written, "
                f"the first in lane {place}, column {column}"
            ),
            row,
            lane,
        )


def _cells(lanes: slice | np.ndarray, column: int, width: int) -> tuple[slice, slice] | np.ndarray:
    """Cells of a block as the race check takes them."""
    columns = slice(column, column + width)
    if isinstance(lanes, slice):
        return lanes, columns
    return (lanes[:, None] * COLUMNS + np.arange(column, column + width)).reshape(-1)
