"""Figures about swizzled block scales: where they lie, which bits move, who reads them, what padding is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from dsv4lab.formats import BLOCK, scales_shape
from dsv4lab.layouts import swizzle_scales

from .style import BLACK, BLUE, CARD, INK, MUTED, ORANGE, PURPLE, RED, SERIES, Picture, Table, new, styled

ROWS, COLUMNS, LINE, CHUNK, SECTOR = 128, 4, 16, 512, 32  # bytes, but for rows and columns of a chunk
QUARTERS = ("#0072b2", "#a6dcf7", "#f6cf7f", "#b26a00")  # rows 0–31, 32–63, ...; apart in lightness too
_PADDING = {"facecolor": "#e4e4e0", "edgecolor": MUTED, "hatch": "//", "linewidth": 0.5}


def scale_order(rows: int, columns: int) -> torch.Tensor:
    """Which scale each byte of a swizzled matrix is: row * columns + column, and -1 for padding.

    The library is asked, not copied: it swizzles the number of each scale, a byte of it at a time.

    Args:
        rows, columns: of the matrix without padding.

    Returns:
        (ceil128(rows) * ceil4(columns),) int64.
    """
    number = torch.arange(1, rows * columns + 1).view(rows, columns)
    parts = [swizzle_scales((number >> 8 * i & 255).to(torch.uint8)).flatten().long() for i in range(4)]
    return sum(part << 8 * i for i, part in enumerate(parts)) - 1


def scale_bits(rows: int, columns: int) -> list[int]:
    """Where each bit of a linear address goes when scales are swizzled, beginning with the lowest one.

    Args:
        rows, columns: powers of two, at least 128 and 4.
    """
    if rows < ROWS or columns < COLUMNS or (rows * columns) & (rows * columns - 1):
        raise ValueError(f"rows and columns must be powers of two of a whole chunk, got {rows} and {columns}")
    place = scale_order(rows, columns).argsort()
    return [int(place[1 << bit]).bit_length() - 1 for bit in range((rows * columns).bit_length() - 1)]


@styled
def scale_tile() -> Picture:
    """Draws one chunk as the part of the matrix that it is, and as its 512 bytes."""
    picture, (tile, memory) = new(
        "Left: 128 rows by 4 columns of scales, of which each stands for 16 codes. Right: the 512 bytes that "
        "they are in memory, 16 in a line. Line l has rows l, 32 + l, 64 + l and 96 + l, and of each of them "
        "the four scales of K = 64.",
        columns=2,
        size=(8.4, 4.0),
        width_ratios=(1, 1.9),
    )
    _tile(tile, 0, 0)
    _memory(memory, 0)
    for line in (0, 31):
        for quarter in range(4):
            colour = "#ffffff" if quarter in (0, 3) else INK
            memory.annotate(
                f"row {32 * quarter + line}",
                (4 * quarter + 2, line + 0.5),
                (0, -2 if line else 2),
                textcoords="offset points",
                color=colour, ha="center", va="bottom" if line else "top", fontsize=8,
            )  # fmt: skip
    memory.set_title("in memory: 16 bytes a line")
    return picture


@styled
def scale_cell(row: int, column: int, rows: int = 300, columns: int = 10) -> Picture:
    """Draws where the scale of a row and column lies.

    Args:
        row, column: of the scale; in the padding too.
        rows, columns: of the matrix without padding.
    """
    high, wide = scales_shape((rows, columns * BLOCK), "swizzled")
    place = scale_order(high, wide).argsort()
    return _located(int(place[row * wide + column]), rows, columns, f"Scale ({row}, {column})")


@styled
def scale_byte(offset: int, rows: int = 300, columns: int = 10) -> Picture:
    """Draws which scale a byte of the swizzled matrix is.

    Args:
        offset: of the byte.
        rows, columns: of the matrix without padding.
    """
    return _located(offset, rows, columns, f"Byte {offset}")


def _located(offset: int, rows: int, columns: int, what: str) -> Picture:
    high, wide = scales_shape((rows, columns * BLOCK), "swizzled")
    number = int(scale_order(high, wide)[offset])
    row, column = divmod(number, wide)
    chunk, inside = divmod(offset, CHUNK)
    line, byte = divmod(inside, LINE)
    padding = " It is padding, and zero." * (row >= rows or column >= columns)
    picture, (matrix, tile, memory) = new(
        f"{what} of a {rows} × {columns} matrix: row {row}, column {column} is byte {chunk} × 512 + {line} × "
        f"16 + {row // 32 % 4} × 4 + {column % 4} = {offset}.{padding} Left: the matrix in chunks, numbered "
        "as they lie in memory. Middle: its chunk. Right: the chunk's bytes.",
        columns=3,
        size=(8.4, 3.9),
        width_ratios=(1.25, 0.7, 1.6),
    )
    matrix.add_patch(Rectangle((0, 0), wide, high, **_PADDING))
    matrix.add_patch(Rectangle((0, 0), columns, rows, facecolor="#dbe9f1"))
    for i in range(high * wide // CHUNK):
        y, x = i // (wide // COLUMNS) * ROWS, i % (wide // COLUMNS) * COLUMNS
        here = {"edgecolor": BLACK, "linewidth": 2.5} if i == chunk else {"edgecolor": INK, "linewidth": 0.7}
        matrix.add_patch(Rectangle((x, y), COLUMNS, ROWS, facecolor="none", zorder=3 + (i == chunk), **here))
        matrix.annotate(f"{i}", (x + 2, y + 64), ha="center", va="center", fontsize=9,
                        bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.0, "alpha": 0.8})  # fmt: skip
    matrix.plot([column + 0.5], [row + 0.5], "o", color=RED, markersize=7, zorder=6, clip_on=False)
    matrix.set(xlim=(0, wide), ylim=(high, 0), xlabel="column (K / 16)", ylabel="row", title="matrix")
    matrix.set_xticks(range(0, wide + 1, COLUMNS))
    matrix.set_yticks(range(0, high + 1, ROWS))
    matrix.grid(False)
    _tile(tile, row // ROWS * ROWS, column // COLUMNS * COLUMNS)
    tile.plot(
        [column % 4 + 0.5],
        [row % ROWS + 0.5],
        "o",
        color=RED,
        markeredgecolor=CARD,
        markersize=8,
        clip_on=False,
    )
    _memory(memory, chunk * CHUNK)
    frame = Rectangle((byte, line), 1, 1, facecolor=RED, edgecolor=BLACK, linewidth=2, zorder=4)
    memory.add_patch(frame)
    memory.annotate(f"{offset}", (byte + 0.5, line + 0.5), (0, 9 if line > 4 else -9),
                    textcoords="offset points", ha="center", va="center", zorder=5, weight="bold",
                    bbox={"facecolor": CARD, "edgecolor": INK, "pad": 1.5})  # fmt: skip
    return picture


def _tile(axes: Axes, row: int, column: int) -> None:
    for quarter, colour in enumerate(QUARTERS):
        axes.add_patch(Rectangle((0, 32 * quarter), COLUMNS, 32, facecolor=colour, edgecolor=CARD))
    for x in range(1, COLUMNS):
        axes.axvline(x, color=CARD, linewidth=0.8)
    axes.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), xlabel="column", ylabel="row", title="chunk")
    axes.set_xticks([x + 0.5 for x in range(COLUMNS)], range(column, column + COLUMNS))
    axes.set_yticks(range(0, ROWS + 1, 32), range(row, row + ROWS + 1, 32))
    axes.grid(False)


def _memory(axes: Axes, start: int) -> None:
    for quarter, colour in enumerate(QUARTERS):
        axes.add_patch(Rectangle((4 * quarter, 0), 4, 32, facecolor=colour, edgecolor=CARD))
    for x in range(1, LINE):
        axes.axvline(x, color=CARD, linewidth=0.8 if x % 4 else 1.8)
    for y in range(1, 32):
        axes.axhline(y, color=CARD, linewidth=0.5)
    axes.set(xlim=(0, LINE), ylim=(32, 0), xlabel="byte in its line", title="in memory")
    axes.set_xticks([x + 0.5 for x in range(0, LINE, 4)], range(0, LINE, 4))
    lines = (0, 8, 16, 24, 31)
    axes.set_yticks([y + 0.5 for y in lines], [f"{start + LINE * y}" for y in lines])
    axes.set_ylabel("first byte of the line")
    axes.grid(False)


_FIELDS = {
    "chunk of rows": PURPLE,
    "chunk of columns": SERIES[2][0],
    "line in the chunk": BLUE,
    "quarter of the rows": ORANGE,
    "column in the chunk": MUTED,
}


@styled
def address_bits(rows: int = 512, columns: int = 64) -> Picture:
    """Draws which bits of an address the swizzle moves, and where to.

    Args:
        rows, columns: of the matrix of scales, powers of two.
    """
    bits = scale_bits(rows, columns)
    low = columns.bit_length() - 1  # so many bits of the column; the row's follow
    picture, axes = new(
        f"Bits of an address in {rows} × {columns} scales, the highest at the left. The swizzle computes "
        "nothing: it moves bits. The quarter of the rows slides under the line, so that 4 × 4 bytes make "
        "one lane's 16; the chunk of columns slides above, so that 512 bytes make a chunk.",
        size=(8.4, 3.2),
    )
    for bit, to in enumerate(bits):
        is_row = bit >= low
        n = bit - low if is_row else bit
        if is_row:
            field = "chunk of rows" if n >= 7 else "quarter of the rows" if n >= 5 else "line in the chunk"
        else:
            field = "chunk of columns" if n >= 2 else "column in the chunk"
        name, colour = f"{'r' if is_row else 'c'}{n}", _FIELDS[field]
        top, bottom = (len(bits) - 1 - i for i in (bit, to))
        for x, y in ((top, 2), (bottom, 0)):
            axes.add_patch(Rectangle((x + 0.05, y), 0.9, 0.7, facecolor=colour, edgecolor=INK, linewidth=0.8))
            axes.annotate(name, (x + 0.5, y + 0.35), ha="center", va="center", color="#ffffff", weight="bold")
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.6}
        axes.annotate("", (bottom + 0.5, 0.72), (top + 0.5, 1.98), arrowprops=arrow)
    axes.set(xlim=(-0.2, len(bits) + 0.2), ylim=(-0.15, 2.85), xlabel="bit of the address")
    axes.set_xticks([i + 0.5 for i in range(len(bits))], range(len(bits) - 1, -1, -1))
    axes.set_yticks([0.35, 2.35], ["swizzled", "linear"])
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    handles = [Patch(facecolor=colour, edgecolor=INK, label=name) for name, colour in _FIELDS.items()]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return picture


@styled
def scale_stations(stations: dict[str, Any], marked: int = 77) -> Picture:
    """Draws the scales of one MMA at each place that they pass.

    Args:
        stations: name to (128, 4), (32, 16) or (128, 16) values: rows of the matrix, lines of memory, or
            lanes of tensor memory.
        marked: a row whose four scales are framed.
    """
    picture, panels = new(
        f"The same 512 scales on their way to one MMA, by value; framed are the four of row {marked}. From "
        "global memory on nothing is moved within a line. Tensor memory holds four copies, one for each "
        "quarter of its lanes.",
        columns=len(stations),
        size=(8.4, 4.1),
        width_ratios=[0.45 if np.shape(s)[1] == COLUMNS else 1 for s in stations.values()],
    )
    limits = [f(np.asarray(s, float)) for f in (np.min, np.max) for s in stations.values()]
    for axes, (name, station) in zip(np.atleast_1d(panels), stations.items(), strict=True):
        values = np.asarray(station, float)
        high, wide = values.shape
        image = axes.imshow(values, cmap="cividis", vmin=min(limits), vmax=max(limits), aspect="auto",
                            interpolation="nearest")  # fmt: skip
        lines = [marked] if wide == COLUMNS else range(marked % 32, high, 32)
        left = 0 if wide == COLUMNS else marked // 32 * 4
        for line in lines:
            for edge, width in ((CARD, 3.6), (BLACK, 1.8)):
                box = Rectangle((left - 0.5, line - 0.5), 4, 1, facecolor="none", edgecolor=edge)
                axes.add_patch(box).set_linewidth(width)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(0, wide, 4))
        axes.set_yticks([*range(0, high, high // 4), high - 1])
        axes.set_xlabel("column" if wide == COLUMNS else "byte")
        axes.set_ylabel({COLUMNS: "row"}.get(wide, "line" if high == 32 else "lane"))
        axes.grid(False)
    picture.figure.colorbar(image, ax=picture.axes, label="scale (E4M3)", shrink=0.9)
    return picture


def scale_reads(columns: int, steps: tuple[int, ...] = (64, 128, 256, 512)) -> Table:
    """Returns what a tile of 128 rows reads of linear and of swizzled scales for a step of K.

    Args:
        columns: of the matrix of scales, K / 16.
        steps: of K, multiples of 64.
    """
    address = torch.arange(ROWS * columns).view(ROWS, columns)
    place = scale_order(ROWS, columns).argsort().view(ROWS, -1)
    rows = []
    for step in steps:
        wide = step // BLOCK
        counts = [_pieces(t[:, :wide].flatten()) for t in (address, place)]
        (linear, fetched), (swizzled, least) = counts
        rows.append((step, ROWS * wide, linear, fetched, swizzled, least))
    heads = ["K of a step", "bytes needed", "linear: pieces", "linear: bytes fetched"]
    return Table(
        [*heads, "swizzled: pieces", "swizzled: bytes fetched"],
        rows,
        f"128 rows of {columns} scales, K = {columns * BLOCK:,}. A piece is a run of bytes; memory hands out "
        f"sectors of {SECTOR} bytes.",
    )


def _pieces(addresses: torch.Tensor) -> tuple[int, int]:
    """Runs of neighbouring bytes, and bytes of all sectors touched."""
    runs = 1 + int((addresses.sort().values.diff() != 1).sum())
    return runs, SECTOR * len(torch.unique(addresses // SECTOR))


@styled
def scale_padding(tokens: int = 1, k: int = 4096) -> Picture:
    """Draws how many bytes the swizzled scales of some tokens take beside their codes.

    Args:
        tokens: rows T, at least 1.
        k: K % 16 == 0.
    """
    codes, real, padded = _scale_bytes(tokens, k)
    picture, (bars, curve) = new(
        f"{tokens:,} × {k:,} values: {codes:,} bytes of codes, {real:,} of scales, {padded:,} with the "
        f"padding to 128 rows and 4 columns, {padded / real:.3g} times as many. Right: bits for each value; "
        "without padding it would be 4.5 bits.",
        columns=2,
        size=(8.4, 3.3),
        width_ratios=(1, 1.2),
    )
    looks = ({"facecolor": BLUE}, {"facecolor": "#e8a35c"}, _PADDING)
    for y, size, look in zip((2, 1, 0), (codes, real, padded - real), looks, strict=True):
        bars.barh(y, size / 1e3, height=0.65, **look)
        bars.annotate(f"{size / 1e3:,.3g}", (size / 1e3, y), (4, 0), textcoords="offset points", va="center")
    bars.set_yticks(range(3), ["padding", "scales", "codes"])
    bars.set(xlabel="size (kB)", title=f"{tokens:,} token{'s' * (tokens > 1)}")
    bars.margins(x=0.22)
    bars.grid(False, axis="y")
    many = sorted({*(2**i for i in range(13)), *(128 * i + j for i in (1, 2, 4, 8, 16) for j in (0, 1))})
    bits = [8 * (c + p) / (t * k) for t in many for c, _, p in [_scale_bytes(t, k)]]
    curve.plot(many, bits, color=BLUE, marker=".")
    curve.plot([tokens], [8 * (codes + padded) / (tokens * k)], "o", color=RED, markersize=9)
    curve.axhline(4.5, color=MUTED, linestyle="--", linewidth=1)
    curve.set_xscale("log", base=2)
    curve.set_yscale("log", base=2)
    curve.set_yticks([4.5, 8, 16, 32, 64], ["4.5", "8", "16", "32", "64"])
    curve.set(xlabel="tokens", ylabel="bits a value", title="codes and padded scales")
    return picture


def _scale_bytes(tokens: int, k: int) -> tuple[int, int, int]:
    """Of codes, of scales, and of scales with padding."""
    high, wide = scales_shape((tokens, k), "swizzled")
    return tokens * k // 2, tokens * k // BLOCK, high * wide
