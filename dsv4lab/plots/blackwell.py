"""Where a Blackwell kernel's data are: TMA's boxes, swizzled shared memory, tensor memory, growing sums.

They draw what the emulator recorded, as plain arrays and trace events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from .style import BLACK, CARD, INK, MUTED, SERIES, Picture, new, styled

# Eight light tones that are told apart by lightness too; black text can be read on all of them.
CHUNKS = ("#0072b2", "#56b4e9", "#a6dcf7", "#e8f4fb", "#fdf0d5", "#f6cf7f", "#e69f00", "#b26a00")


@styled
def tma_boxes(events: Iterable[Any], names: Sequence[str], ctas: Sequence[int] = (0,)) -> Picture:
    """Draws the boxes that TMA copies of each tensor, numbered in the order in which a CTA asks for them.

    Args:
        events: a trace; its "tma" events have `map` (shape, box) and `at` in their detail.
        names: of the tensors, in the order of their first copy.
        ctas: whose boxes to draw.
    """
    mine = [e for e in events if e.kind == "tma" and e.cta in ctas]
    mine.sort(key=lambda e: (e.start, e.line))
    tensors = list(dict.fromkeys(e.detail["map"].address for e in mine))
    picture, panels = new(
        "Boxes in global memory that each CTA asks for, numbered by step. The grey frame is the tensor: what "
        "a box covers outside of it is filled with zeros. Scales lie in chunks of 128 rows by 4 scales, 512 "
        "bytes each.",
        rows=2,
        columns=-(-len(tensors) // 2),
        size=(8.4, 4.9),
        squeeze=False,
    )
    for axes, address, name in zip(panels.T.flat, tensors, names, strict=True):
        _boxes(axes, [e for e in mine if e.detail["map"].address == address], name, list(ctas))
    handles = [
        Patch(facecolor=colour + "22", edgecolor=colour, linestyle=line, label=f"CTA {cta}")
        for cta, (colour, _, line) in zip(ctas, SERIES, strict=False)
    ]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return picture


def _boxes(axes: Axes, events: list[Any], name: str, ctas: list[int]) -> None:
    found = events[0].detail["map"]
    flat = len(found.shape) == 2
    (width, height), (w, h) = (t[-2:] if not flat else t for t in (found.shape, found.box))
    axes.add_patch(Rectangle((0, 0), width, height, facecolor="none", edgecolor=MUTED, linewidth=3))
    seen: dict[int, int] = {}
    for event in events:
        x, y = event.detail["at"][-2:] if not flat else event.detail["at"]
        colour, _, line = SERIES[ctas.index(event.cta)]
        step = seen[event.cta] = seen.get(event.cta, -1) + 1
        style = {"edgecolor": colour, "linestyle": line, "linewidth": 1.5}
        gap_x, gap_y = 0.015 * width, 0.03 * max(height, h)
        axes.add_patch(
            Rectangle((x + gap_x, y + gap_y), w - 2 * gap_x, h - 2 * gap_y, facecolor=colour + "22", **style)
        )
        place = (x + w * (0.3 + 0.4 * (ctas.index(event.cta) % 2)), y + 0.3 * h)
        axes.annotate(f"{step}", place, color=colour, ha="center", va="center", weight="bold")
    top = max(height, max(e.detail["at"][-1] + h for e in events))
    axes.set(xlim=(-0.02 * width, 1.02 * width), ylim=(1.04 * top, -0.04 * top))
    axes.set_title(f"{name}: box of {h} x {w} in {height} x {width}", fontsize=10)
    axes.set(xlabel="k (codes)" if flat else "chunk along K", ylabel="row" if flat else "chunk of rows")
    axes.set_xticks(range(0, width + 1, w))
    axes.set_yticks(range(0, top + 1, h))
    axes.grid(False)


@styled
def shared_lines(places: dict[str, Any], marked: int = 0) -> Picture:
    """Draws which 16-byte chunk of a tile lies in which banks, for each line of 128 bytes.

    Args:
        places: name to (lines, 8) int: the chunk of the row that lies in each eighth of its line.
        marked: a chunk to frame in every row: what a column of the tile needs.
    """
    picture, panels = new(
        "Each cell is 16 bytes, 32 codes, and says which k of its row it holds. The framed cells hold the "
        "same k of different rows. In one column they are in the same four banks, and reading them takes "
        "one turn each; spread over all columns they can be read at once.",
        columns=len(places),
        size=(8.4, 3.9),
        squeeze=False,
    )
    for axes, (name, place) in zip(panels[0], places.items(), strict=True):
        for (line, eighth), chunk in np.ndenumerate(np.asarray(place)):
            axes.add_patch(
                Rectangle((eighth, line), 1, 1, facecolor=CHUNKS[chunk % 8], edgecolor=CARD, linewidth=1)
            )
            colour = "#ffffff" if chunk in (0, 7) else INK
            axes.annotate(
                f"{32 * chunk}",
                (eighth + 0.5, line + 0.5),
                color=colour,
                ha="center",
                va="center",
                fontsize=8,
            )
            if chunk == marked:
                frame = Rectangle((eighth, line), 1, 1, facecolor="none", edgecolor=BLACK, linewidth=2.5)
                axes.add_patch(frame).set_zorder(4)
        axes.set(xlim=(0, 8), ylim=(len(place), 0), xlabel="banks of 4 bytes", title=name)
        axes.set_xticks([i + 0.5 for i in range(8)], [f"{4 * i}–{4 * i + 3}" for i in range(8)], fontsize=8)
        axes.set_yticks([i + 0.5 for i in range(len(place))], range(len(place)))
        axes.grid(False)
    panels[0, 0].set_ylabel("row of the tile")
    return picture


@styled
def tensor_memory(regions: dict[str, tuple[int, int]], scales: Any, columns: int = 256) -> Picture:
    """Draws what lies in tensor memory, and close up the scales that one MMA reads.

    Args:
        regions: name to first column and number of columns.
        scales: (32, 16) values of the bytes in 32 lanes of four columns.
        columns: of the allocation.
    """
    picture, (left, right) = new(
        "Left: tensor memory has 128 lanes, and columns of 4 bytes. Right: the scales of A for one MMA, 32 "
        "lanes of 4 columns; the other three quarters hold copies. Lane l of column c has the scales of row "
        "32 c + l for the four blocks along K.",
        columns=2,
        size=(8.4, 3.8),
        width_ratios=(1.15, 1),
    )
    left.add_patch(Rectangle((0, 0), columns, 128, facecolor="none", edgecolor=MUTED, linewidth=1.5))
    for (name, (first, count)), (colour, *_) in zip(regions.items(), SERIES, strict=False):
        left.add_patch(Rectangle((first, 0), count, 128, facecolor=colour + "66", edgecolor=colour))
        upright = count < 40
        left.annotate(
            name, (first + count / 2, 64), ha="center", va="center", rotation=90 if upright else 0, fontsize=9
        )
    for quarter in (32, 64, 96):
        left.axhline(quarter, color=MUTED, linewidth=0.8, linestyle=":")
    left.set(
        xlim=(-4, columns + 4), ylim=(130, -2), xlabel="column", ylabel="lane", title="one CTA's columns"
    )
    left.set_xticks(sorted({0, columns, *(first for first, _ in regions.values())}))
    left.tick_params(axis="x", labelrotation=45)
    left.set_yticks(range(0, 129, 32))
    left.grid(False)
    image = right.imshow(np.asarray(scales, float), cmap="cividis", aspect="auto", interpolation="nearest")
    for column in (4, 8, 12):
        right.axvline(column - 0.5, color=CARD, linewidth=2)
    right.set_xticks([1.5, 5.5, 9.5, 13.5], [f"column {c}\nrows {32 * c}–{32 * c + 31}" for c in range(4)])
    right.tick_params(axis="x", labelsize=7.5, length=0)
    right.set(ylabel="lane", title="scales, a byte each")
    right.grid(False)
    picture.figure.colorbar(image, ax=right, label="scale (E4M3)", shrink=0.9)
    return picture


@styled
def matrices(states: dict[str, Any], caption: str, unit: str = "sum") -> Picture:
    """Draws matrices side by side, on one colour scale.

    Args:
        states: name to (M, N) values.
        caption: one or more sentences.
        unit: of the values.
    """
    columns = min(len(states), 4)
    lines = -(-len(states) // columns)
    shape = np.shape(next(iter(states.values())))
    size = (8.4, 0.4 + lines * (0.35 + 7.0 / columns * shape[0] / shape[1]))
    picture, panels = new(
        caption, rows=lines, columns=columns, size=size, sharex=True, sharey=True, squeeze=False
    )
    limit = max(max(float(np.abs(np.asarray(s)).max()) for s in states.values()), 1e-30)
    for axes in panels.flat[len(states) :]:
        axes.remove()
    for axes, (name, state) in zip(panels.flat, states.items(), strict=False):
        image = axes.imshow(
            np.asarray(state, float), cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        axes.set_title(name, fontsize=9)
        axes.grid(False)
    for axes in panels[-1]:
        axes.set_xlabel("column")
    for axes in panels[:, 0]:
        axes.set_ylabel("row")
    picture.figure.colorbar(image, ax=picture.axes, label=unit, shrink=0.8)
    return picture
