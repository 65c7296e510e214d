"""A trace of the emulator over the model's time: what overlaps with what, and one event with its PTX.

Events are objects with kind, cta, warp, start, end, line and text, as `dsv4lab.emulator.trace.Event`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .style import BLACK, BLUE, CARD, GREEN, INK, MUTED, PURPLE, RED, Picture, new, styled

# Kind of event: what the legend calls it, colour, hatch. Any other kind looks like OTHER.
KINDS = {
    "tma": ("copy (TMA)", BLUE, ""),
    "cp": ("scales to tensor memory", GREEN, "...."),
    "mma": ("MMA", RED, "////"),
    "wait": ("a warp waits", MUTED, None),
}
OTHER = ("other", PURPLE, "\\\\")
_COPIES, _CORE = "copies", "tensor core"
_WIDTH = 140  # characters of a PTX line that fit
_CAPTION = (
    "Time is the emulator's model, in cycles: what can overlap, not how long a GPU takes. Copies that are "
    "under way at once are stacked."
)


def busy(events: Iterable[Any], *groups: Sequence[str]) -> int:
    """Returns the cycles in which at least one event of every group of kinds is under way.

    Args:
        events: of one CTA, or of several together.
        groups: kinds, such as ("tma",), ("mma", "cp").
    """
    events = list(events)
    edges = sorted(
        (time, change, i)
        for i, kinds in enumerate(groups)
        for event in events
        if event.kind in kinds
        for time, change in ((event.start, 1), (event.end, -1))
    )
    open_now, total, since = [0] * len(groups), 0, 0
    for time, change, i in edges:
        if all(open_now):
            total += time - since
        open_now[i] += change
        since = time
    return total


@styled
def timeline(trace: Iterable[Any], *, ctas: Sequence[int] = (0,), highlight: Any = None) -> Picture:
    """Draws what each CTA's copies, tensor core and warps do over time.

    Args:
        trace: events.
        ctas: which CTAs to draw.
        highlight: an event to mark.
    """
    events = [event for event in trace if event.cta in ctas]
    rows = [(cta, _rows([e for e in events if e.cta == cta])) for cta in ctas]
    height = 0.9 + sum(0.6 + _inches(found) for _, found in rows)
    picture, panels = new(_CAPTION, rows=len(rows), size=(8.4, height), sharex=True, squeeze=False)
    for axes, (cta, found) in zip(panels[:, 0], rows, strict=True):
        _draw(axes, found, highlight)
        axes.set_title(_summary(cta, [e for e in events if e.cta == cta]))
    panels[-1, 0].set_xlabel("model time (cycles)")
    kinds = {event.kind for event in events}
    handles = [_patch(look) for kind, look in KINDS.items() if kind in kinds]
    handles += [_patch(OTHER)] if kinds - KINDS.keys() else []
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1))
    return picture


@styled
def trace_step(
    trace: Any, step: int, *, cta: int = 0, tile: Any = None, limit: float | None = None, lines: int = 9
) -> Picture:
    """Draws one event of a CTA: its place in the timeline, the PTX around it, and a matrix if there is one.

    Args:
        trace: events, with `launch.module.ptx`.
        step: number of the event, by start.
        cta: whose events.
        tile: (M, N) sums to show beside the timeline.
        limit: value at the end of the sums' colours, by default their largest.
        lines: of PTX.
    """
    events = trace_steps(trace, cta)
    event = events[step]
    caption = f"Step {step} of {len(events) - 1}: {_name(event)}, issued by warp {event.warp}: {event.text}."
    rows = _rows(events)
    heights = (0.7 + max(_inches(rows), 1.3 if tile is not None else 0), 0.17 * lines)
    picture = Picture(caption, (8.4, sum(heights)))
    above, below = picture.figure.subfigures(2, 1, height_ratios=heights)
    if tile is None:
        axes = above.subplots()
    else:
        axes, beside = above.subplots(1, 2, width_ratios=(3, 1))
        _tile(beside, tile, limit)
    _draw(axes, rows, event)
    axes.set_xlabel("model time (cycles)")
    _listing(below.add_axes((0, 0, 1, 1)), trace.launch.module.ptx, event.line, lines)
    return picture


def trace_steps(trace: Iterable[Any], cta: int = 0) -> list[Any]:
    """Returns the events of a CTA by their start, which is the order that `trace_step` numbers them in."""
    return sorted((event for event in trace if event.cta == cta), key=lambda e: (e.start, e.end, e.line))


def _rows(events: list[Any]) -> list[tuple[str, list[list[Any]]]]:
    """Name of each row of a CTA from the top, and its events packed in lanes where they do not overlap."""
    rows: dict[str, list[Any]] = {_COPIES: [], _CORE: []}
    for warp in sorted({e.warp for e in events if e.kind not in ("tma", "mma", "cp")}):
        rows[f"warp {warp}"] = []
    for event in sorted(events, key=lambda e: (e.start, e.end)):
        own = f"warp {event.warp}"
        rows[{"tma": _COPIES, "mma": _CORE, "cp": _CORE}.get(event.kind, own)].append(event)
    return [(name, _packed(found)) for name, found in rows.items() if found]


def _packed(events: list[Any]) -> list[list[Any]]:
    lanes: list[list[Any]] = []
    for event in events:
        free = next((lane for lane in lanes if lane[-1].end <= event.start), None)
        if free is None:
            lanes.append(free := [])
        free.append(event)
    return lanes


def _height(lanes: list[Any]) -> float:
    """Of a row, in units of a row with one lane."""
    return max(1.0, 0.4 * len(lanes))


def _inches(rows: list[tuple[str, list[list[Any]]]]) -> float:
    return 0.24 * sum(_height(lanes) for _, lanes in rows)


def _draw(axes: Axes, rows: list[tuple[str, list[list[Any]]]], highlight: Any) -> None:
    y, ticks = 0.0, []
    events = [event for _, lanes in rows for lane in lanes for event in lane]
    thin = max((e.end for e in events), default=0) / 250  # about three pixels
    for name, lanes in rows:
        height = _height(lanes)
        ticks.append((y + height / 2, name))
        for i, lane in enumerate(lanes):
            for event in lane:
                _bar(axes, event, y + (i + 0.5) * height / len(lanes), 0.75 * height / len(lanes), thin)
        y += height
        axes.axhline(y, color="#cccccc", linewidth=0.8)
    if highlight is not None:
        middle = (highlight.start + highlight.end) / 2
        axes.axvline(middle, color=BLACK, linewidth=1, linestyle=":")
        axes.plot([middle], [0], marker="v", color=BLACK, clip_on=False, markersize=7)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(max(y, 1.0), 0)
    axes.grid(False, axis="y")
    axes.margins(x=0.01)


def _bar(axes: Axes, event: Any, y: float, height: float, thin: float) -> None:
    _, colour, hatch = KINDS.get(event.kind, OTHER)
    hollow = hatch is None
    edge = colour if hollow or event.end - event.start < thin else CARD
    axes.barh(
        y,
        max(event.end - event.start, 1),
        left=event.start,
        height=0.6 * height if hollow else height,
        facecolor="none" if hollow else colour,
        edgecolor=edge,
        hatch=hatch,
        linewidth=0.5 if edge is CARD else 1,
        zorder=3,
    )


def _patch(look: tuple[str, str, str | None]) -> Patch:
    name, colour, hatch = look
    hollow = hatch is None
    return Patch(
        facecolor="none" if hollow else colour,
        edgecolor=colour if hollow else CARD,
        hatch=hatch,
        label=name,
    )


def _summary(cta: int, events: list[Any]) -> str:
    if not events:
        return f"CTA {cta}: no events"
    span = max(max(e.end for e in events) - min(e.start for e in events), 1)
    copies, core = ("tma",), ("mma", "cp")
    share = [f"{100 * busy(events, *g) / span:.0f} %" for g in ((copies,), (core,), (copies, core))]
    return f"CTA {cta}, {span:,} cycles: copies {share[0]} of them, tensor core {share[1]}, both {share[2]}"


def _name(event: Any) -> str:
    return KINDS.get(event.kind, (event.kind,))[0]


def _tile(axes: Axes, tile: Any, limit: float | None) -> None:
    limit = limit or max(float(abs(tile).max()), 1e-30)
    axes.imshow(tile, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_title("sums", fontsize=10)
    axes.set(xlabel="column", ylabel="row")
    axes.grid(False)


def _listing(axes: Axes, ptx: str, line: int, count: int) -> None:
    """Lines of PTX around one, which is marked."""
    source = ptx.splitlines()
    first = max(min(line - 1 - count // 2, len(source) - count), 0)
    axes.set(xlim=(-0.01, 1), ylim=(count, 0), xlabel="PTX")
    axes.axis("off")
    for i, text in enumerate(source[first : first + count]):
        number, here = first + i + 1, first + i + 1 == line
        text = f"{number:5d}  " + " ".join(text.split())
        text = text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
        if here:
            axes.axhspan(i, i + 1, color="#d7e6f2", zorder=0)
        look = {"color": INK, "weight": "bold"} if here else {"color": MUTED}
        look |= {"family": "DejaVu Sans Mono", "fontsize": 7, "va": "center"}
        axes.text(0, i + 0.5, text, parse_math=False, **look)  # `$` is part of PTX's labels
