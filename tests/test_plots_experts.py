"""Figures of the notebook on the mixture of experts draw at their sliders' ends and say what is true."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from dsv4lab import plots
from dsv4lab.layers.dispatch import dispatch
from dsv4lab.model import ModelConfig

MODELS = {"Flash": ModelConfig.flash(), "Pro": ModelConfig.pro()}


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


@pytest.mark.parametrize("experts, k", [(8, 4), (384, 6), (4, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_routing_marks_the_chosen(experts, k, biased):
    r = torch.Generator().manual_seed(0)
    scores, bias = torch.rand(experts, generator=r), torch.randn(experts, generator=r) if biased else None
    chosen = (scores + bias if biased else scores).topk(k).indices
    score, weight = drawn(plots.routing(scores, bias, chosen, scores[chosen])).axes
    bars = [patch for patch in score.patches if patch.get_height() in scores.tolist()]
    assert [i for i, bar in enumerate(bars) if bar.get_hatch()] == sorted(chosen.tolist())
    assert [label.get_text() for label in weight.get_xticklabels()] == [str(e) for e in chosen.tolist()]


def test_load_says_how_busy_the_busiest_is():
    sizes = {"a": torch.tensor([1, 1, 2, 0]), "b": torch.tensor([4, 0, 0, 0])}
    picture = drawn(plots.expert_load(sizes))
    assert "2 times the mean (a), 4 times the mean (b)" in picture.caption
    assert [patch.get_height() for patch in picture.axes[0].patches] == [1, 1, 2, 0, 4, 0, 0, 0]


@pytest.mark.parametrize("tokens, experts, k", [(1, 2, 1), (120, 8, 4), (300, 64, 6)])
def test_every_copy_has_a_row_of_its_own(tokens, experts, k):
    chosen = plots.random_routing(tokens, experts, k, skew=1.0)
    (axes,) = drawn(plots.dispatch_rows(chosen, experts)).axes
    marks = [line for line in axes.lines if line.get_linestyle() == "None"]
    rows = [row for line in marks for row in line.get_xdata()]
    assert sorted(rows) == sorted(dispatch(chosen, experts).slot.tolist()) and len(set(rows)) == tokens * k
    for e, line in enumerate(marks):
        assert list(line.get_ydata()) == (chosen == e).any(1).nonzero()[:, 0].tolist()


def test_random_routing_is_even_or_skewed():
    for skew, low, high in ((0.0, 1.0, 1.3), (2.0, 3.0, 99.0)):
        chosen = plots.random_routing(4096, 16, 4, skew)
        assert all(len(set(row)) == 4 for row in chosen.tolist())
        load = torch.bincount(chosen.flatten(), minlength=16).float()
        assert low <= load.max() / load.mean() < high
    with pytest.raises(ValueError, match="top_k must lie within 1 and experts = 4, got 5"):
        plots.random_routing(1, 4, 5)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_expected_touched_is_what_happens(tokens):
    seen = [len(plots.random_routing(tokens, 64, 6, seed=s).unique()) for s in range(200)]
    assert sum(seen) / 200 == pytest.approx(plots.expected_touched(tokens, 64, 6), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("experts, k", [(8, 1), (8, 8), (384, 8)])
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_padding_at_the_sliders_ends(tokens, experts, k, skew):
    picture = drawn(plots.moe_padding(tokens, experts, k, skew))
    _, rows, _ = picture.axes
    buffer, wide, narrow, real = rows.lines[0].get_xdata()
    assert real == tokens * k <= narrow <= wide <= buffer
    assert narrow % 8 == wide % 128 == buffer % 128 == 0
    touched = int(re.search(r"(\d+) experts are touched", picture.caption)[1])
    assert wide >= 128 * touched and touched <= min(experts, tokens * k)


def test_more_experts_a_token_than_there_are_is_all_of_them():
    assert "2 of 2 experts" in plots.moe_padding(3, 2, 8).caption


def test_work_by_hand():
    pro = plots.moe_work(MODELS["Pro"], 1)
    assert pro["touched"] == pytest.approx(6)
    assert pro["weights"] == pytest.approx(61 * 6 * 3 * 7168 * 3072 * 4.5 / 8)  # 13.6 GB
    assert pro["flops"] == 61 * 6 * 2 * 3 * 7168 * 3072
    assert pro["activations"] == 61 * 6 * ((7168 + 2 * 3072) * 4.5 / 8 + 2 * 7168 * 2)
    assert plots.moe_work(MODELS["Flash"], 10**6)["weights"] == pytest.approx(155.8e9, rel=1e-3)


@pytest.mark.parametrize("device", ["NVIDIA B200", "NVIDIA H200"])
def test_expert_bytes_and_costs_draw(device):
    size, work = drawn(plots.expert_bytes(MODELS, device=device)).axes
    for axes in (size, work):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Flash", "Pro"]
    for line in size.lines[::2]:
        assert list(line.get_ydata()) == sorted(line.get_ydata())
    rows = plots.decode_costs(MODELS, (1, 512), device).rows
    assert [row[:2] for row in rows] == [("Flash", 1), ("Flash", 512), ("Pro", 1), ("Pro", 512)]
    assert rows[0][2] == "6.0 of 256" and rows[2][3] == pytest.approx(13.6, abs=0.05)
    assert rows[2][5] == pytest.approx(
        1e3 * 13.6e9 / (8e12 if device == "NVIDIA B200" else 4.27e12), rel=0.01
    )
