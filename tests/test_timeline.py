"""Timelines: overlap is measured right, bars lie where events do, and a step shows its PTX line."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from dsv4lab import plots

PTX = "\n".join(f"\tadd.s32 \t%r{i}, $L__BB0_{i};" for i in range(1, 41))


def event(kind, start, end, line=1, cta=0, warp=0):
    return SimpleNamespace(kind=kind, cta=cta, warp=warp, start=start, end=end, line=line, text=f"{kind}!")


class Trace(list):
    launch = SimpleNamespace(module=SimpleNamespace(ptx=PTX))


@pytest.fixture
def trace():
    """Two copies at once, a third behind, an MMA that the third overlaps, waits of two warps, another CTA."""
    return Trace(
        [
            event("tma", 0, 10, 5),
            event("tma", 2, 14, 6),
            event("tma", 12, 30, 7),
            event("wait", 1, 14, 9, warp=1),
            event("cp", 14, 16, 11, warp=1),
            event("mma", 16, 24, 12, warp=1),
            event("wait", 0, 40, 30, warp=3),
            event("sneeze", 3, 4, 31, warp=3),
            event("mma", 0, 100, 12, cta=1),
        ]
    )


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


def bars(axes) -> list[tuple[float, float]]:
    """Start and end of each bar."""
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]


def test_busy_counts_each_cycle_once(trace):
    mine = [e for e in trace if e.cta == 0]
    assert plots.busy(mine, ("tma",)) == 30
    assert plots.busy(mine, ("mma",)) == 8
    assert plots.busy(mine, ("mma", "cp")) == 10
    assert plots.busy(mine, ("tma",), ("mma", "cp")) == 10
    assert plots.busy(mine, ("tma",), ("mma",), ("wait",)) == 8
    assert plots.busy(mine, ("nothing",)) == plots.busy([], ("tma",)) == 0
    assert plots.busy([event("tma", 0, 4), event("mma", 4, 9)], ("tma",), ("mma",)) == 0


def test_busy_against_counting_cycle_by_cycle():
    random = np.random.default_rng(0)
    kinds = ("tma", "mma", "wait")
    for _ in range(30):
        starts, lengths = random.integers(0, 40, 12), random.integers(0, 12, 12)
        events = [
            event(kinds[i % 3], int(s), int(s + n))
            for i, (s, n) in enumerate(zip(starts, lengths, strict=True))
        ]

        def on(t, *names, events=events):
            return any(e.kind in names and e.start <= t < e.end for e in events)

        assert plots.busy(events, ("tma",), ("mma", "wait")) == sum(
            on(t, "tma") and on(t, "mma", "wait") for t in range(60)
        )


def test_bars_lie_where_the_events_are(trace):
    (axes,) = drawn(plots.timeline(trace)).axes
    assert sorted(bars(axes)) == sorted((e.start, e.end) for e in trace if e.cta == 0)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["copies", "tensor core", "warp 1", "warp 3"]
    assert axes.get_title("left") == "CTA 0, 40 cycles: copies 75 % of them, tensor core 25 %, both 25 %"
    legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert legend == ["copy (TMA)", "scales to tensor memory", "MMA", "a warp waits", "other"]


def test_events_at_the_same_time_do_not_hide_one_another(trace):
    (axes,) = plots.timeline(trace).axes
    boxes = [
        (b.get_x(), b.get_x() + b.get_width(), b.get_y(), b.get_y() + b.get_height()) for b in axes.patches
    ]
    for i, (a, b, low, high) in enumerate(boxes):
        for c, d, below, above in boxes[:i]:
            assert b <= c or d <= a or high <= below or above <= low


def test_several_ctas_share_one_axis_of_time(trace):
    first, second = drawn(plots.timeline(trace, ctas=(0, 1))).axes
    assert first.get_xlim() == second.get_xlim()
    assert bars(second) == [(0, 100)]


def test_nothing_to_draw():
    (axes,) = drawn(plots.timeline([], ctas=(3,))).axes
    assert axes.get_title("left") == "CTA 3: no events"


@pytest.mark.parametrize("tile", [None, np.zeros((4, 4)), np.arange(12.0).reshape(3, 4) - 5])
def test_a_step_at_both_ends(trace, tile):
    count = len(plots.trace_steps(trace))
    assert count == 8
    for step in (0, count - 1):
        picture = drawn(plots.trace_step(trace, step, tile=tile))
        assert picture.caption.startswith(f"Step {step} of 7: ")
        assert len(picture.axes) == (2 if tile is None else 3)


def test_a_step_shows_its_line_and_its_neighbours(trace):
    step = [e.kind for e in plots.trace_steps(trace)].index("mma")
    picture = drawn(plots.trace_step(trace, step, lines=5))
    assert picture.caption == f"Step {step} of 7: MMA, issued by warp 1: mma!."
    listing = picture.axes[-1]
    assert [t.get_text().split()[0] for t in listing.texts] == ["10", "11", "12", "13", "14"]
    (marked,) = [t for t in listing.texts if t.get_weight() == "bold"]
    assert marked.get_text() == "   12  add.s32 %r12, $L__BB0_12;"
    lines = picture.axes[0].lines
    assert any(20 in line.get_xdata() for line in lines), "the middle of the MMA is marked"


@pytest.mark.parametrize(("line", "shown"), [(1, "1"), (2, "1"), (40, "32")])
def test_lines_at_the_ends_of_the_file(line, shown):
    picture = drawn(plots.trace_step(Trace([event("tma", 0, 5, line)]), 0))
    listing = picture.axes[-1]
    assert len(listing.texts) == 9 and listing.texts[0].get_text().split()[0] == shown
    assert any(t.get_weight() == "bold" for t in listing.texts)


def test_a_very_long_line_is_cut():
    trace = Trace([event("tma", 0, 5, 1)])
    trace.launch = SimpleNamespace(module=SimpleNamespace(ptx="x" * 500))
    (text,) = drawn(plots.trace_step(trace, 0)).axes[-1].texts
    assert len(text.get_text()) == 140 and text.get_text().endswith("…")
