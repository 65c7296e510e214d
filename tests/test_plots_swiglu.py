"""Figures of the SwiGLU notebook draw at their sliders' ends and say what is true."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from dsv4lab import interleave_gate_up, plots


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


@pytest.mark.parametrize("limit", [0.5, 20, None])
@pytest.mark.parametrize("spread", [0.1, 100])
def test_clamped_at_the_sliders_ends(limit, spread):
    curve, spreads = drawn(plots.clamped(limit, spread)).axes
    named = {line.get_label(): line for line in curve.lines if not line.get_label().startswith("_")}
    assert any(name.startswith("bound") for name in named) == (limit is not None)
    if limit:
        bound = max(float(y) for name, line in named.items() if "bound" in name for y in line.get_ydata())
        assert max(map(float, named[f"up = {limit:g}"].get_ydata())) <= bound <= limit**2 * (1 + 2**-7)
        largest = next(line.get_xdata()[0] for line in spreads.lines if line.get_label() == "max |h|")
        assert largest <= math.log10(bound) + 1e-6
    assert spreads.patches


@pytest.mark.parametrize("run", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("width", [64, 128])
def test_granularity_is_right_for_runs_of_eight_alone(run, width):
    level = plots.granularity_error(run, width=width)[-1]
    assert (level == math.inf) is (run == 8)
    picture = drawn(plots.granularity(run, width))
    assert ("every h is right" in picture.caption) is (run == 8)
    points = sum(len(line.get_xdata()) for axes in picture.axes for line in axes.lines[1:])
    assert points == 2 * width


def test_interleaved_by_eight_is_the_librarys():
    rows = torch.arange(64)[:, None]
    assert torch.equal(plots.interleaved_by(rows, 8), interleave_gate_up(rows))
    assert plots.interleaved_by(rows, 32).equal(rows)
    assert plots.interleaved_by(rows, 1)[:4, 0].tolist() == [0, 32, 1, 33]
    with pytest.raises(ValueError, match="got 5"):
        plots.interleaved_by(rows, 5)


@pytest.mark.parametrize("run, met", [(8, "100 %"), (64, "0 %"), (1, "100 %")])
def test_gate_up_rows_counts_pairs(run, met):
    assert f"interleaved by {run}, {met} do" in drawn(plots.gate_up_rows(64, 64, run)).caption


@pytest.mark.parametrize("tokens, width, hidden", [(1, 2048, 4096), (16384, 3072, 7168)])
def test_fusion_bytes_at_the_sliders_ends(tokens, width, hidden):
    assert "13 times less" in drawn(plots.fusion_bytes(tokens, width, hidden)).caption


def test_traffic_by_hand():
    ways = plots.swiglu_traffic(tokens=2, width=32, hidden=64)
    weights = 3 * 64 * 32 * 4.5 / 8
    assert sum(ways["nothing fused"].values()) == 2 * 256 + 3 * 128 + 2 * 36 + weights
    assert sum(ways["SwiGLU fused"].values()) == 3 * 128 + 2 * 36 + weights
    assert sum(ways["SwiGLU and quantize fused"].values()) == 2 * 36 + weights
