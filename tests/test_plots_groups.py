"""Figures of the notebook on wo_a draw at their sliders' ends and say what is true."""

from __future__ import annotations

import warnings

import pytest
import torch

from dsv4lab import plots

ALL, MIDDLE = "one for all, max |x| / 2688", "the middle group's for all"


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


@pytest.mark.parametrize("groups, tokens", [(2, 1), (16, 128)])
@pytest.mark.parametrize("decades", [0, 8])
def test_group_spread_at_the_sliders_ends(groups, tokens, decades):
    picture = drawn(plots.group_spread(groups, decades, tokens, seed=3))
    (axes,) = picture.axes
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [len(line.get_xdata()) for line in named] == [groups] * 4
    assert ("dashed" in picture.caption) is (decades == 8)


def test_one_scale_loses_the_quiet_group_and_anothers_scale_the_loud_one():
    levels = plots.group_levels(plots.spread_groups(5, 7.0))
    assert levels[ALL][0] == 0 and levels[ALL][-1] > 19
    assert levels[MIDDLE][0] > 19 and levels[MIDDLE][-1] < 1
    assert all(level > 19 for name in ("each group its own", "each token its own") for level in levels[name])


def test_groups_spread_by_the_decades_asked_for():
    x = plots.spread_groups(3, 4.0, tokens=64)
    spread = x.square().mean((1, 2)).sqrt()
    assert torch.allclose(spread / spread[-1], torch.tensor([1e-4, 1e-2, 1.0]), rtol=0.05)


@pytest.mark.parametrize("groups", [2, 16])
def test_block_diagonal_has_as_many_blocks(groups):
    whole, packed = drawn(plots.block_diagonal(groups, 64, 256)).axes
    corners = [patch.get_xy() for patch in whole.patches]
    assert corners == [(256 * g, 64 * g) for g in range(groups)]
    assert {patch.get_x() for patch in packed.patches} == {0}


def test_output_turned_back_does_not_depend_on_the_shift():
    here, there = (plots.attention_output(shift) for shift in (0, 300))
    assert (here - there).abs().max() < 1e-3
    here, there = (plots.attention_output(shift, inverse=False).view(-1, 512) for shift in (0, 300))
    assert torch.equal(here[:, :448], there[:, :448])  # which do not rotate
    assert (here[:, 448:] - there[:, 448:]).abs().max() > 0.1


def test_position_shift_separates_both():
    def apply(o):
        return o.flatten()

    (axes,) = drawn(plots.position_shift([1, 4096], apply)).axes
    level = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert min(level["with inverse RoPE"]) > 80 and max(level["left out"]) < 30
    assert plots.shift_levels([0], apply, True, plots.attention_output(0).flatten()) == [150.0]
