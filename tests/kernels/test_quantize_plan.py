"""How rows are laid out on threads: every row has its threads, and few are idle."""

from __future__ import annotations

import pytest
from dsv4lab.kernels import quantize_plan as plan

SOURCES = ("plain", "rmsnorm", "mhc", "swiglu", "dequantize")
SMS = 132  # of an H200


@pytest.mark.parametrize("source", SOURCES)
def test_teams_have_their_rows(source):
    for columns in range(1, 3000):
        for rows in (1, 16, 8192):
            teams = plan.row_teams(source, rows, columns, SMS)
            assert teams.threads <= 1024 and teams.threads % 32 == 0
            assert teams.team <= 32 or teams.team % 32 == 0
            held = teams.team * teams.blocks
            if not teams.resident:
                assert columns > 2 * 640
                continue
            # A power of two in a warp; an eighth more warps than needed.
            assert columns <= held < max(2 * columns, columns * 9 / 8 + 32 * teams.blocks)


def test_worked_examples():
    row = plan.row_teams("plain", 8192, 7168 // 16, SMS)
    # 448 blocks: 112 threads would do, but warps are whole.
    assert (row.team, row.blocks, row.teams) == (128, 4, 1)
    assert plan.grid("plain", row, 8192, 0, SMS) == 8192
    norm = plan.row_teams("rmsnorm", 8192, 7168 // 16, SMS)
    assert norm == row
    mixed = plan.row_teams("mhc", 8192, 7168 // 16, SMS)
    assert (mixed.team, mixed.blocks, mixed.teams) == (224, 2, 1)
    few = plan.row_teams("plain", 16, 7168 // 16, SMS)
    assert (few.team, few.blocks, few.teams) == (448, 1, 1)
    # 112 chunks of 4 columns in 32 lanes of 16 bytes: 3584, on 448 threads each.
    assert plan.pad_chunks(1, 448) == 3584 and plan.pad_chunks(256, 448) == 0
    assert plan.grid("plain", few, 1, 3584, SMS) == 8


@pytest.mark.parametrize("source", SOURCES[:-1])
def test_sixteen_tokens_share_a_scale_in_one_launch(source):
    for rows in range(17):
        teams = plan.cluster_teams(source, rows, 7168 // 16)
        assert teams.teams * teams.cluster >= rows and teams.threads <= 1024 and teams.threads % 32 == 0
    assert plan.cluster_teams("plain", 17, 7168 // 16) is None


def test_parts_of_an_amax():
    for rows, matrices in ((1, 1), (8192, 1), (100, 16), (7, 1000)):
        teams = plan.amax_teams("plain", rows, 448)
        parts = plan.parts(teams, rows, matrices, SMS)
        assert parts % 4 == 0 and 4 <= parts <= plan.MAX_PARTS
    teams = plan.amax_teams("plain", 8192, 448)
    assert (teams.team, teams.teams) == (224, 4)
    assert plan.parts(teams, 8192, 1, SMS) == 264  # two CTAs of 896 threads an SM
