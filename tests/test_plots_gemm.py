"""Figures of the GEMM notebook draw at their sliders' ends, and the bounds they show hold."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4lab import error_bound, grouped_mm, plots, quantize_nvfp4


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


def e4m3(t) -> np.ndarray:
    return t.block_scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(float)


@pytest.mark.parametrize("distribution", error_bound.DISTRIBUTIONS)
@pytest.mark.parametrize("rows, k", [(8, 64), (64, 4096)])
def test_sum_errors_at_the_sliders_ends(distribution, rows, k):
    curve, spread = drawn(plots.sum_errors(distribution, rows, k, seed=3)).axes
    assert {line.get_label() for line in curve.lines} >= {"bound", "to nearest", "tensor core"}
    edges = [float(x) for patch in spread.patches for x, _ in patch.get_xy()]
    assert max(map(abs, edges)) <= 1.05  # no error exceeds its bound


@pytest.mark.parametrize("distribution", error_bound.DISTRIBUTIONS)
def test_sums_lie_within_the_bound_and_the_bound_is_nearly_reached(distribution):
    a, b = error_bound.operands(distribution, 16, 1024)
    exact = error_bound.running_sums(a, b, "float64")[-1]
    bound = error_bound.accumulation_bound(a, b)
    for mode, share in (("exact", 0.5), ("hardware", 1.0)):
        off = (error_bound.running_sums(a, b, mode)[-1] - exact).abs()
        assert (off <= share * bound).all()
        if distribution == "large block first":
            assert (off / bound).max() > share / 4


def test_running_sums_by_hand():
    """Codes 1 and -2, scales 2 and 0.5: 32 x 1 x 4 in two blocks, then 32 x 2 x 0.25 in the other two."""
    a = quantize_nvfp4(torch.cat((torch.full((32,), 12.0), torch.full((32,), 3.0)))[None], 1.0)
    assert e4m3(a).tolist() == [[2, 2, 0.5, 0.5]]
    assert error_bound.parts(a)[0].tolist() == [[6.0] * 64]
    sums = error_bound.running_sums(a, a, "hardware")
    assert sums.shape == (1, 1, 1) and sums.item() == 36 * (32 * 4 + 32 * 0.25)
    assert error_bound.accumulation_bound(a, a).item() == pytest.approx(1.01 * 2.0**-23 * 4896)


def test_output_bound_holds_for_the_reference_and_not_for_a_lost_block():
    a, b = error_bound.operands("normal", 24, 256)
    g = a.global_scale.double() * b.global_scale.double()
    exact = error_bound.values(a) @ error_bound.values(b).T * g
    bound = error_bound.output_bound(a, b, exact)
    assert ((grouped_mm(a, b).double() - exact).abs() <= bound).all()
    scales = a.block_scales.view(torch.uint8).clone()
    scales[:, -1] = 0
    lost = a.with_(block_scales=scales.view(torch.float8_e4m3fn))
    assert ((grouped_mm(lost, b).double() - exact).abs() > bound).double().mean() > 0.9


@pytest.mark.parametrize(
    "change, words",
    [({"distribution": "uniform"}, "got 'uniform'"), ({"k": 96}, "got 96"), ({"k": 0}, "got 0")],
)
def test_bad_operands(change, words):
    with pytest.raises(ValueError, match=words):
        error_bound.operands(**{"distribution": "normal", "rows": 4, "k": 64} | change)


def test_mma_step_shows_each_block():
    a, b = error_bound.operands("normal", 1, 64)
    upper, lower = drawn(plots.mma_step(a, b)).axes
    assert len(upper.patches) == 64
    shown = [float(text.get_text().split("= ")[1]) for text in lower.texts if "=" in text.get_text()]
    assert sum(shown) == pytest.approx(error_bound.running_sums(a, b, "exact").item(), rel=1e-4)


def test_mma_step_of_zeros():
    drawn(plots.mma_step(*[quantize_nvfp4(torch.zeros(64), 1.0)] * 2))


@pytest.mark.parametrize(
    "sizes, offsets",
    [([5, 0, 130, 64], [128, 128, 384, 512]), ([0], [0]), ([128] * 16, range(128, 2049, 128))],
)
def test_group_rows(sizes, offsets):
    (axes,) = drawn(plots.group_rows(sizes, list(offsets))).axes
    bars = [patch.get_width() for patch in axes.patches]
    assert bars[0::2] == sizes and sum(bars) == list(offsets)[-1]


def test_error_table_agrees_with_its_parts():
    table = plots.error_table(["normal", "large block first"], rows=8, k=128)
    assert [row[0] for row in table.rows] == ["normal", "large block first"]
    assert table.rows[1][1:] == tuple(plots.error_shares("large block first", 8, 128).values())
    exact, worst = table.rows[0][2:4]
    assert exact == 100 and worst == 0
