"""Where tcgen05 puts things in tensor memory: fragments of warps, accumulators and scale factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from dsv4lab.emulator.tensor_memory import COLUMNS

# Registers of a lane for each repetition, and columns that a repetition covers.
SHAPES = {"32x32b": (1, 1), "16x64b": (1, 2), "16x128b": (2, 4), "16x256b": (4, 8), "16x32bx2": (1, 1)}


@cache
def fragment(shape: str, repeat: int, packed: bool = False, split: int = 0) -> np.ndarray:
    """Cells of the registers of tcgen05.ld and .st, relative to the one at the address.

    Args:
        shape: of SHAPES.
        repeat: .num, 1 to 128.
        packed: two columns of 16 bits make up a register (.pack::16b); the cell is that of the low half, its
            right neighbour holds the other.
        split: columns from the first to the second half of 16x32bx2.
    Returns:
        int64 (registers, 32), lane * 512 + column.
    """
    lane, register = np.arange(32), np.arange(SHAPES[shape][0] * repeat)[:, None]
    if shape == "32x32b":
        row, column = lane, register
    elif shape == "16x32bx2":
        row, column = lane % 16, register
    elif shape == "16x64b":
        row, column = lane // 4 + lane % 2 * 8, 2 * register + lane // 2 % 2
    elif shape == "16x128b":
        row, column = lane // 4 + register % 2 * 8, register // 2 * 4 + lane % 4
    else:
        row = lane // 4 + register // 2 % 2 * 8
        column = register // 4 * 8 + lane % 4 * 2 + register % 2
    column = column * 2 if packed else column
    if shape == "16x32bx2":
        column = column + lane // 16 * split
    cells = row * COLUMNS + column
    cells.flags.writeable = False
    return cells


@dataclass(frozen=True)
class Block:
    """A part of an accumulator whose rows and columns lie in one rectangle of a CTA's tensor memory.

    Attributes:
        lanes: those of rows 0, 1, ... of this CTA's part of the accumulator.
        columns: first and last + 1 of N.
        partitions: quarters of the lanes whose copies of the scales it is computed with.
    """

    lanes: slice | np.ndarray
    columns: tuple[int, int]
    partitions: tuple[int, ...]


@cache
def accumulator(m: int, n: int, ctas: int, lane: int = 0) -> tuple[Block, ...]:
    """Blocks of the accumulator in each CTA, the "data path layouts" of the ISA.

    M = 128 of one CTA and M = 256 of two (layouts D and A) lie one row a lane; M = 64 (layout F) fills 16
    lanes of each 32, from lane 0 or 16 on; M = 128 of two CTAs (layout B) has the right half of N below the
    left one.

    Args:
        m, n: shape of the MMA.
        ctas: 1 or 2.
        lane: at which the accumulator begins, 0 or, of M = 64, 16.
    """
    everywhere = (0, 1, 2, 3)
    if m // ctas == 128:
        return (Block(slice(0, 128), (0, n), everywhere),)
    if ctas == 1:
        row = np.arange(64)
        return (Block(row // 16 * 32 + row % 16 + lane, (0, n), everywhere),)
    return (Block(slice(0, 64), (0, n // 2), (0, 1)), Block(slice(64, 128), (n // 2, n), (2, 3)))


def scale_columns(rows: int, first: int, count: int) -> tuple[int, tuple[int, ...]]:
    """Columns that hold scales: of rows of A, or columns of B.

    Args:
        rows: how many rows there are; 32 of them take a column.
        first: byte of a cell at which a row's scales begin (the scale id).
        count: scales of a row. A cell holds four; with K = 96 they go on in the cell after those of 128 rows,
            or of 256 where there are more.
    Returns:
        How many columns the rows take, and from which column on, counted from the address, for each cell of a
        row.
    """
    cells = -(-(first + count) // 4)
    return -(-rows // 32), tuple(4 * -(-rows // 128) * cell for cell in range(cells))


def scales(cells: np.ndarray, rows: int, first: int, count: int) -> np.ndarray:
    """Scale codes of rows, as 32x128b.warpx4 copies lay them out: row r in lane r % 32, column r // 32.

    Args:
        cells: uint32 (32, columns, cells of a row), of one quarter of the lanes; see scale_columns.
        rows, first, count: as of scale_columns.
    Returns:
        uint8 (rows, count).
    """
    codes = np.ascontiguousarray(cells.swapaxes(0, 1)).view(np.uint8)
    return codes.reshape(-1, codes.shape[-1])[:rows, first : first + count]
