"""The look shared by every figure and table: one card that reads the same in light and dark themes.

A figure is drawn dark on a light card, so its contrast does not depend on the notebook's theme. Captions and
tables are HTML and take the theme's own colours. Series differ in colour, marker and line style at once.
"""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 144  # shown at 96 dots per inch: sharp on dense screens
CARD = "#fbfbf8"
INK = "#222222"
MUTED = "#5f5f5f"
# Okabe and Ito's colour-blind safe set, without yellow and with the light tones darkened to 3:1 on the card.
BLUE, RED, GREEN, PURPLE, ORANGE, BLACK = "#0072b2", "#c44e00", "#00805e", "#a84a86", "#a86f00", "#222222"
SERIES = tuple(
    zip(
        (BLUE, RED, GREEN, PURPLE, ORANGE, BLACK),
        ("o", "s", "^", "D", "v", "x"),
        ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2))),
        strict=True,
    )
)
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": CARD,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.facecolor": CARD,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": CARD,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Picture:
    """A figure with its caption, which a notebook shows as text below the image.

    It never touches pyplot, so drawing leaves no global state behind and shows nothing by itself: a notebook
    shows it when it is a cell's last expression. It is no `Figure`, which notebooks display in their own way.

    Args:
        caption: one or more sentences.
        size: width and height in inches.
    """

    def __init__(self, caption: str, size: tuple[float, float]) -> None:
        self.caption = caption
        self.figure = Figure(figsize=size, layout="constrained")

    @property
    def axes(self) -> list[Axes]:
        """The figure's axes, in the order they were made."""
        return self.figure.axes

    @functools.cached_property
    def png(self) -> bytes:
        """The image as PNG bytes, drawn at the first look."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"[figure] {self.caption}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        image = base64.b64encode(self.png).decode()
        text = html.escape(self.caption)
        width = round(self.figure.get_figwidth() * 96)
        return {
            "text/html": f'<figure style="margin:0"><img alt="{text}" src="data:image/png;base64,{image}" '
            f'style="width:{width}px;max-width:100%"><figcaption><em>{text}</em></figcaption></figure>',
            "image/png": image,
            "text/plain": repr(self),
        }


class Table:
    """A small table for notebooks: HTML in the theme's colours, aligned text elsewhere.

    Args:
        columns: the heads, units included.
        rows: one sequence of values a row; floats are printed with three significant digits.
        caption: one sentence that says what the reader should see.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        self.columns = tuple(columns)
        self.rows = [tuple(row) for row in rows]
        self.caption = caption
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"each row needs {len(self.columns)} values for {self.columns}, got {row}")

    def _cells(self) -> list[tuple[str, ...]]:
        return [tuple(_cell(value) for value in row) for row in self.rows]

    def __repr__(self) -> str:
        lines = [self.columns, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        return f"{text}\n{self.caption}" if self.caption else text

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="text-align:left">{html.escape(c)}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{html.escape(c)}</td>' for c in row) + "</tr>"
            for row in self._cells()
        )
        caption = f"<p><em>{html.escape(self.caption)}</em></p>" if self.caption else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{caption}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)


def styled(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    """Wraps a draw function so that everything in it is made in the shared style."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Picture:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new(caption: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.4, 3.4), **kwargs):
    """Returns a captioned picture and its axes, as `subplots` would."""
    picture = Picture(caption, size)
    return picture, picture.figure.subplots(rows, columns, **kwargs)
