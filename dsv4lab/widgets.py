"""Sliders for notebooks, wired so that a broken figure fails the notebook's run.

ipywidgets swallows what a callback raises, and a regression run would pass. `explore` therefore draws once,
plainly, before it wires anything; the tests draw at the extremes of each control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from IPython.display import display

from dsv4lab import plots


class Explorer(ipywidgets.VBox):
    """Controls above a live output; where widgets cannot run, the drawing of the defaults stands in."""

    def __init__(self, draw: Callable[..., Any], controls: dict[str, ipywidgets.Widget], height: int) -> None:
        self.draw = draw
        self.controls = controls
        self.defaults = {name: control.value for name, control in controls.items()}
        self.first = draw(**self.defaults)
        output = ipywidgets.interactive_output(self._show, controls)
        output.layout.height = f"{height}px"  # a fixed height keeps the page from jumping at each redraw
        output.layout.overflow = "auto"
        super().__init__([ipywidgets.VBox(list(controls.values())), output])

    def _show(self, **values: Any) -> None:
        display(self.first if values == self.defaults else self.draw(**values))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        bundle = super()._repr_mimebundle_(**kwargs)
        if hasattr(self.first, "_repr_mimebundle_"):
            fallback = self.first._repr_mimebundle_()
        else:
            fallback = {"text/html": self.first._repr_html_()}
        return fallback | bundle


def explore(draw: Callable[..., Any], *, height: int = 460, **controls: ipywidgets.Widget) -> Explorer:
    """Draws once with the controls' values, then redraws whenever one of them changes.

    Args:
        draw: a pure function of the controls' values that returns a figure, a table or HTML.
        height: of the output in pixels.
        controls: one widget for each argument of `draw`, by its name.

    Returns:
        the explorer, to be shown as a cell's last expression.

    Raises:
        ValueError: without a control, or for a height that is not positive.
    """
    if not controls:
        raise ValueError("explore needs at least one control, got none")
    if height <= 0:
        raise ValueError(f"height must be a positive number of pixels, got {height}")
    return Explorer(draw, controls, height)


_WIDE = {"description_width": "210px"}


def _layout() -> ipywidgets.Layout:
    return ipywidgets.Layout(width="620px")


def _pairs(options: list) -> list[tuple[str, Any]]:
    """Label and value of each option; ipywidgets would take a tuple among plain values for a value."""
    return [option if isinstance(option, tuple) else (str(option), option) for option in options]


def slider(description: str, value: float, low: float, high: float, step: float) -> ipywidgets.FloatSlider:
    """A linear slider that redraws when it is let go."""
    return ipywidgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step,
        description=description,
        continuous_update=False,
        style=_WIDE,
        layout=_layout(),
    )


def choice(description: str, options: list, value: Any = None) -> ipywidgets.SelectionSlider:
    """A slider over a few named or numbered choices, the first one unless `value` says otherwise."""
    pairs = _pairs(options)
    return ipywidgets.SelectionSlider(
        options=pairs,
        value=pairs[0][1] if value is None else value,
        description=description,
        continuous_update=False,
        style=_WIDE,
        layout=_layout(),
    )


def menu(description: str, options: list, value: Any = None) -> ipywidgets.Dropdown:
    """A drop-down list, the first entry unless `value` says otherwise."""
    pairs = _pairs(options)
    return ipywidgets.Dropdown(
        options=pairs,
        value=pairs[0][1] if value is None else value,
        description=description,
        style=_WIDE,
        layout=_layout(),
    )


def follow(trace: Any, sums: Sequence[Any] = (), *, cta: int = 0, height: int = 560) -> Explorer:
    """Steps along a trace of the emulator: each event in the timeline, with the PTX line that issued it.

    Args:
        trace: of a launch, see `dsv4lab.emulator.Device.trace`.
        sums: (M, N) values after each MMA of the CTA, to show beside; the number of MMAs that have ended when
            an event ends says which. None are shown if there are none.
        cta: whose events.
        height: of the output in pixels.

    Raises:
        ValueError: the CTA has no events.
    """
    events = plots.trace_steps(trace, cta)
    if not events:
        raise ValueError(f"the trace must have events of CTA {cta}, got none")

    limit = max((float(abs(tile).max()) for tile in sums), default=None)

    def draw(step: int) -> plots.Picture:
        done = sum(e.kind == "mma" and e.end <= events[step].end for e in events)
        tile = None if not len(sums) else sums[done - 1] if done else 0 * sums[0]
        return plots.trace_step(trace, step, cta=cta, tile=tile, limit=limit)

    first = next((i for i, event in enumerate(events) if event.kind == "mma"), 0)
    step = ipywidgets.IntSlider(
        value=first,
        min=0,
        max=len(events) - 1,
        description="step",
        continuous_update=False,
        style=_WIDE,
        layout=_layout(),
    )
    return explore(draw, height=height, step=step)
