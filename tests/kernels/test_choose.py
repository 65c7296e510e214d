"""The choice of tiles as a function of sizes."""

from __future__ import annotations

import pytest
from dsv4lab.kernels import decode_choice
from dsv4lab.kernels.choose import CHOICES, Prefill, choose, most_tiles, tiles
from dsv4lab.kernels.decode_choice import Decode

SMS = 148


def test_few_tokens_are_the_columns_of_the_mma():
    """56 tiles of 128 features leave most SMs idle, so that CTAs share the K of each."""
    for rows in (1, 8, 16, 64, 128):
        choice = choose(rows, 7168, 7168, None, SMS)
        assert isinstance(choice, Decode) and choice.tokens == max(8, rows) and choice.split > 1
    assert isinstance(choose(256 * 128, 4096, 7168, 256, SMS), Decode), "1 token of each expert"


def test_many_rows_are_multiplied_by_two_ctas():
    assert choose(8192, 7168, 7168, None, SMS) == Prefill(256, 256)
    assert choose(65536, 2048, 7168, None, SMS).rows == 256


def test_two_ctas_are_of_no_use_for_groups_of_few_rows():
    groups = 256
    assert choose(groups * 128 + 8192, 4096, 7168, groups, SMS).rows == 128
    assert choose(groups * 4096, 4096, 7168, groups, SMS) == Prefill(256, 256)


@pytest.mark.parametrize("sms", [1, 2, 132, 148])
@pytest.mark.parametrize("groups", [None, 1, 384])
def test_every_size_has_a_choice(groups, sms):
    for rows in (1, 128, 1280, 2**20):
        if groups is None or rows % 128 == 0:
            for n in (8, 64, 200, 8192):
                assert choose(rows, n, 64, groups, sms) in (*CHOICES, *decode_choice.CHOICES)


def test_numbers_of_tiles():
    assert tiles(Prefill(128, 64), 300, 200, None) == most_tiles(Prefill(128, 64), 300, 200, None) == 3 * 4
    assert tiles(Prefill(256, 192), 300, 200, None) == 2 * 2
    # With 127 rows of padding for each of 4 groups, 516 rows are left: 129 each.
    assert tiles(Prefill(128, 128), 1024, 128, 4) == 4 * 2
    assert tiles(Prefill(256, 128), 1024, 128, 4) == 4
    # One row each may have every 128 rows be a tile of their own.
    assert most_tiles(Prefill(256, 128), 1024, 128, 8) == 8
    assert tiles(Prefill(128, 128), 256, 128, 384) == 2
