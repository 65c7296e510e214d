"""Swizzles: the tables of the PTX ISA written out, and what every mode must keep."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4lab.emulator.swizzle import PATTERNS, swizzle
from dsv4lab.emulator.tensormap_fields import SWIZZLES

# Per 128-byte line: which 16-byte chunk of the unswizzled line each place holds (PTX ISA, "Swizzling modes").
TABLES = {
    "none": ["01234567"],
    "32B": ["01234567", "10325476"],
    "64B": ["01234567", "10325476", "23016745", "32107654"],
    "128B": [
        "01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210",
    ],
    "128B_atom32B": ["01234567", "23016745", "45670123", "67452301"],
    "128B_atom64B": ["01234567", "45670123"],
}  # fmt: skip


@pytest.mark.parametrize("mode", TABLES)
def test_tables(mode):
    table = TABLES[mode]
    assert PATTERNS[mode].period == max(128, 128 * len(table))
    for line in range(3 * len(table)):
        for chunk in range(8):
            place = swizzle(mode, 128 * line + 16 * chunk)
            assert place // 128 == line
            assert table[line % len(table)][place % 128 // 16] == str(chunk)


def test_row_r_of_128B_holds_chunk_c_at_c_xor_r():
    rows, chunks = np.divmod(np.arange(64), 8)
    expected = 128 * rows + 16 * (chunks ^ rows) + 5
    np.testing.assert_array_equal(swizzle("128B", 128 * rows + 16 * chunks + 5), expected)
    # A tile that starts three lines into a period continues that period's pattern.
    assert swizzle("128B", 3 * 128 + 0) == 3 * 128 + 48


def test_flip_swaps_eight_bytes_in_odd_lines():
    mode = "128B_atom32B_flip8B"
    assert [swizzle(mode, x) for x in (0, 8, 127)] == [0, 8, 127]
    # Line 1: atom 0 goes to atom 1, and the halves of each 16 bytes change places.
    assert [swizzle(mode, 128 + x) for x in (0, 8, 16, 24, 32)] == [128 + x for x in (40, 32, 56, 48, 8)]
    assert [swizzle(mode, 256 + x) for x in (0, 8, 64)] == [256 + x for x in (64, 72, 0)]


@pytest.mark.parametrize("mode", SWIZZLES)
def test_every_mode_is_its_own_inverse_and_keeps_atoms(mode):
    pattern = PATTERNS[mode]
    offsets = np.arange(4 * pattern.period)
    swizzled = swizzle(mode, offsets)
    np.testing.assert_array_equal(swizzle(mode, swizzled), offsets)
    np.testing.assert_array_equal(np.sort(swizzled), offsets)
    np.testing.assert_array_equal(swizzled - offsets, np.tile((swizzled - offsets)[: pattern.period], 4))
    atoms = swizzled.reshape(-1, pattern.atom)
    np.testing.assert_array_equal(atoms - atoms[:, :1], np.broadcast_to(np.arange(pattern.atom), atoms.shape))
