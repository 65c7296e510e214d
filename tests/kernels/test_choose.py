"""The choice of tiles as a function of sizes."""

from __future__ import annotations

import pytest
from dsv4lab.kernels.choose import CHOICES, Prefill, choose, most_tiles, tiles

SMS = 148


def test_few_tiles_are_made_narrow():
    """One row of tiles of 7168 columns: 112 tiles of 64 columns keep more SMs at work than 56 of 128."""
    assert choose(128, 7168, 7168, None, SMS) == Prefill(128, 64)
    assert choose(100, 512, 2048, None, SMS).columns == 64


def test_many_rows_are_multiplied_by_two_ctas():
    assert choose(8192, 7168, 7168, None, SMS) == Prefill(256, 256)
    assert choose(65536, 2048, 7168, None, SMS).rows == 256


def test_two_ctas_are_of_no_use_for_groups_of_few_rows():
    groups = 256
    rows = groups * 128
    assert choose(rows, 4096, 7168, groups, SMS).rows == 128
    assert choose(groups * 4096, 4096, 7168, groups, SMS) == Prefill(256, 256)


@pytest.mark.parametrize("sms", [1, 2, 132, 148])
@pytest.mark.parametrize("groups", [None, 1, 384])
def test_every_size_has_a_choice(groups, sms):
    for rows in (1, 128, 1280, 2**20):
        if groups is None or rows % 128 == 0:
            for n in (8, 64, 200, 8192):
                assert choose(rows, n, 64, groups, sms) in CHOICES


def test_numbers_of_tiles():
    assert tiles(Prefill(128, 64), 300, 200, None) == most_tiles(Prefill(128, 64), 300, 200, None) == 3 * 4
    assert tiles(Prefill(256, 192), 300, 200, None) == 2 * 2
    # 4 groups in 1024 rows: 256 each, of which about 64 are padding.
    assert tiles(Prefill(128, 128), 1024, 128, 4) == 4 * 2
    assert tiles(Prefill(256, 128), 1024, 128, 4) == 4
    # One row each may have every 128 rows be a tile of their own.
    assert most_tiles(Prefill(256, 128), 1024, 128, 8) == 8
    assert tiles(Prefill(128, 128), 256, 128, 384) == 2
