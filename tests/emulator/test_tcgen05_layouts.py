"""Where tcgen05 puts things in tensor memory, against CuTe's own layouts and worked positions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dsv4lab.emulator.isa.tcgen05_layouts import SHAPES, accumulator, fragment, scale_columns, scales
from dsv4lab.emulator.tensor_memory import COLUMNS

path = Path(__file__).with_name("tcgen05_kernels.py")
spec = importlib.util.spec_from_file_location("tcgen05_kernels", path)
cute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cute)
table = cute.table


def test_the_table_of_a_layout():
    np.testing.assert_array_equal(table("(2,(2,3)):(10,(1,100))")[1], [10, 11, 110, 111, 210, 211])


# Fragments --------------------------------------------------------------------------------------------------


def test_worked_positions_of_registers():
    def place(*form):
        return lambda register, lane: divmod(int(fragment(*form)[register, lane]), COLUMNS)

    at = place("32x32b", 4)
    assert at(3, 17) == (17, 3)
    at = place("16x64b", 2)
    assert [at(0, lane) for lane in (0, 1, 2, 3, 4, 31)] == [(0, 0), (8, 0), (0, 1), (8, 1), (1, 0), (15, 1)]
    assert at(1, 2) == (0, 3)
    at = place("16x128b", 2)
    assert [at(register, 6) for register in range(4)] == [(1, 2), (9, 2), (1, 6), (9, 6)]
    at = place("16x256b", 2)
    assert [at(register, 6) for register in range(5)] == [(1, 4), (1, 5), (9, 4), (9, 5), (1, 12)]
    at = place("16x32bx2", 2, False, 10)
    assert [at(1, lane) for lane in (3, 19)] == [(3, 1), (3, 11)]
    at = place("32x32b", 2, True)
    assert [at(register, 5) for register in range(2)] == [(5, 0), (5, 2)]


def test_fragments_are_cutes():
    for (shape, repeat, packed), text in cute.fragment_layouts().items():
        elements = table(text)
        rows, words = (32 if shape == "32x32b" else 16), fragment(shape, repeat).shape[0]
        width = words * 32 // rows
        halves = elements.reshape(32, words, -1)
        if packed:
            # Two 16-bit elements of neighbouring columns fill a register.
            np.testing.assert_array_equal(halves[..., 1], halves[..., 0] + 1)
            width *= 2
        row, column = halves[..., 0] // width, halves[..., 0] % width
        found = fragment(shape, repeat, packed, width // 2 if shape == "16x32bx2" else 0)
        np.testing.assert_array_equal(found, (row * COLUMNS + column).T, err_msg=f"{shape} {repeat} {packed}")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fragment_has_every_cell_once(shape):
    cells = fragment(shape, 8, False, 8)
    rows = 32 if shape == "32x32b" else 16
    width = cells.size // rows
    assert sorted(cells.reshape(-1)) == sorted(
        (np.arange(rows)[:, None] * COLUMNS + np.arange(width)).reshape(-1)
    )


# Accumulators -----------------------------------------------------------------------------------------------


def test_accumulators_are_cutes():
    for (m, n, ctas), text in cute.accumulator_layouts().items():
        expected = table(text).reshape(n, m // ctas).T
        found = np.full((m // ctas, n), -1)
        for block in accumulator(m, n, ctas):
            first, last = block.columns
            lanes = np.arange(128)[block.lanes]
            found[:, first:last] = lanes[:, None] << 16 | np.arange(last - first)
        np.testing.assert_array_equal(found, expected, err_msg=f"{m} {n} {ctas}")


def test_worked_positions_of_accumulators():
    (block,) = accumulator(64, 32, 1)
    assert block.lanes[[0, 15, 16, 63]].tolist() == [0, 15, 32, 111]
    (block,) = accumulator(64, 32, 1, 16)
    assert block.lanes[[0, 15, 16, 63]].tolist() == [16, 31, 48, 127]
    left, right = accumulator(128, 96, 2)
    assert (left.lanes, left.columns, left.partitions) == (slice(0, 64), (0, 48), (0, 1))
    assert (right.lanes, right.columns, right.partitions) == (slice(64, 128), (48, 96), (2, 3))


# Scale factors ----------------------------------------------------------------------------------------------


def scale_positions(partition, rows, count):
    """Byte of tensor memory, as CuTe counts them (2**18 a lane), of every scale (rows, count)."""
    width, _ = scale_columns(rows, 0, count)
    lane, byte = np.meshgrid(np.arange(32), np.arange(4 * width), indexing="ij")
    marks = (
        scales(mark.astype(np.uint8).view(np.uint32)[..., None], rows, 0, count).astype(int)
        for mark in (lane, byte)
    )
    lane, byte = marks
    return (lane + 32 * partition) * 2**18 + byte


def test_scales_are_cutes():
    for (block, k, m, n, ctas), (a, b) in cute.scale_layouts().items():
        count, left = k // block, accumulator(m, n, ctas)[0]
        # (((32 lanes, rows / 32), 4 copies), (block, count)), others.
        expected = table(a)[:, 0, 0].reshape(count, block, 4, 128)[:, 0]
        rows = m // ctas
        for partition in range(4):
            found = scale_positions(partition, rows, count)
            np.testing.assert_array_equal(found, expected[:, partition, :rows].T)
        # The same of B; where N is split over the lanes, ((32 lanes, rows / 32), 2 halves, 2 copies).
        rows = left.columns[1]
        expected = table(b)[:, 0, 0].reshape(count, block, 4, -1)[:, 0]
        for partition in range(4):
            copy = partition if rows == n else partition % 2 * 2 + partition // 2
            found = scale_positions(partition, rows, count)
            np.testing.assert_array_equal(found, expected[:, copy, :rows].T, err_msg=f"{m} {n} {ctas}")


def test_worked_positions_of_scales():
    cells = np.arange(32 * 8, dtype=np.uint32).reshape(32, 8)
    cells = cells | cells + 100 << 8 & 0xFF00
    low, high = scales(cells[..., None], 256, 0, 1), scales(cells[..., None], 256, 1, 1)
    # Row 70 is in lane 70 % 32 = 6, column 70 // 32 = 2.
    assert low[70, 0] == (6 * 8 + 2) % 256
    assert high[70, 0] == (6 * 8 + 2 + 100) % 256
    assert scales(cells[..., None], 24, 0, 2).shape == (24, 2)


def test_worked_positions_of_six_scales():
    # Of K = 96: the third and fourth byte of a cell and all of the next one.
    assert scale_columns(24, 0, 4) == (1, (0,))
    assert scale_columns(128, 2, 6) == (4, (0, 4))
    assert scale_columns(200, 0, 6) == (7, (0, 8))
    cells = np.array([[[0x44332211, 0x88776655]]] * 32, np.uint32)
    assert scales(cells, 1, 2, 6)[0].tolist() == [0x33, 0x44, 0x55, 0x66, 0x77, 0x88]
    assert scales(cells, 1, 0, 6)[0].tolist() == [0x11, 0x22, 0x33, 0x44, 0x55, 0x66]
    assert scales(cells, 1, 3, 3)[0].tolist() == [0x44, 0x55, 0x66]
