"""The explorer draws plainly before it wires, redraws when a control moves, and has a picture to stand in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dsv4lab import plots, widgets


def table(n: int) -> plots.Table:
    return plots.Table(["n"], [[n]])


def test_a_failing_draw_fails_at_once():
    def broken(n):
        raise RuntimeError("cannot draw")

    with pytest.raises(RuntimeError, match="cannot draw"):
        widgets.explore(broken, n=widgets.slider("n", 1, 0, 3, 1))


def test_redraws_when_a_control_moves_and_keeps_the_default():
    drawn = []

    def draw(n):
        drawn.append(n)
        return table(n)

    explorer = widgets.explore(draw, n=widgets.choice("n", [1, 2, 3]))
    assert drawn == [1]  # once, plainly; showing the default again costs nothing
    explorer.controls["n"].value = 3
    assert drawn == [1, 3]
    explorer.controls["n"].value = 1
    assert drawn == [1, 3]


def test_two_arguments_come_by_name():
    drawn = []
    explorer = widgets.explore(
        lambda low, high: drawn.append((low, high)) or table(low),
        high=widgets.slider("high", 5, 0, 9, 1),
        low=widgets.menu("low", [("one", 1), ("two", 2)], 2),
    )
    explorer.controls["low"].value = 1
    assert drawn == [(2, 5), (1, 5)]


def test_shows_the_default_drawing_where_widgets_cannot_run():
    figure = plots.number_lines()
    bundle = widgets.explore(lambda n: figure, n=widgets.choice("n", [1]))._repr_mimebundle_()
    assert bundle["image/png"] == figure._repr_mimebundle_()["image/png"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
    bundle = widgets.explore(table, n=widgets.choice("n", [7]))._repr_mimebundle_()
    assert "7" in bundle["text/html"]


def test_height_is_fixed():
    explorer = widgets.explore(table, height=200, n=widgets.choice("n", [1]))
    assert explorer.children[-1].layout.height == "200px"


@pytest.mark.parametrize("make", [widgets.choice, widgets.menu])
def test_named_and_plain_options_mix(make):
    control = make("x", [("1/4", 0.25), 1, 4])
    assert control.value == 0.25
    assert control.options == (("1/4", 0.25), ("1", 1), ("4", 4))
    assert make("x", [("none", 0), 1], 1).value == 1


@pytest.mark.parametrize("control", [widgets.slider("x", 1, 0, 2, 0.5), widgets.choice("x", [1, 2])])
def test_sliders_redraw_when_let_go(control):
    assert control.continuous_update is False


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one control"):
        widgets.explore(table)
    with pytest.raises(ValueError, match="height must be a positive number of pixels, got 0"):
        widgets.explore(table, height=0, n=widgets.choice("n", [1]))


def event(kind, start, end, line, cta=0):
    return SimpleNamespace(kind=kind, cta=cta, warp=0, start=start, end=end, line=line, text=kind)


class Trace(list):
    launch = SimpleNamespace(module=SimpleNamespace(ptx="\n".join(f"line {i};" for i in range(1, 31))))


TRACE = Trace(
    [event("tma", 0, 9, 3), event("mma", 9, 20, 5), event("mma", 20, 30, 6), event("mma", 0, 5, 9, 1)]
)


def test_following_a_trace_goes_through_its_events_in_time(monkeypatch):
    seen = []
    monkeypatch.setattr(
        plots, "trace_step", lambda trace, step, **more: seen.append((step, more)) or table(step)
    )
    sums = [np.full((2, 2), 1.0), np.full((2, 2), -3.0)]
    explorer = widgets.follow(TRACE, sums)
    step = explorer.controls["step"]
    assert (step.value, step.min, step.max) == (1, 0, 2), "begins with the first MMA of CTA 0"
    step.value = 0
    step.value = 2
    assert [s for s, _ in seen] == [1, 0, 2]
    assert [more["tile"].flat[0] for _, more in seen] == [1, 0, -3], "sums after the MMAs that have ended"
    assert {more["limit"] for _, more in seen} == {3.0}, "one colour scale for all steps"


@pytest.mark.parametrize("sums", [(), [np.eye(2), np.zeros((2, 2))]])
def test_following_draws_at_both_ends(sums):
    explorer = widgets.follow(TRACE, sums)
    for step in (explorer.controls["step"].min, explorer.controls["step"].max):
        assert explorer.draw(step).png.startswith(b"\x89PNG")
    assert "image/png" in explorer._repr_mimebundle_()


def test_following_needs_events():
    with pytest.raises(ValueError, match="must have events of CTA 7"):
        widgets.follow(TRACE, cta=7)
