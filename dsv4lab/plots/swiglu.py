"""Figures about the fused SwiGLU: what the clamp bounds, how rows interleave, what a fusion saves."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.patches import Patch, Rectangle

from dsv4lab import reference
from dsv4lab.gemm import grouped_mm_swiglu
from dsv4lab.policies import bound_global_scale
from dsv4lab.quantize import quantize_nvfp4, quantize_weight

from .quantization import round_trip, sqnr_db
from .style import BLUE, CARD, INK, MUTED, RED, SERIES, Picture, new, styled

_GATE, _UP = BLUE, "#e8a35c"  # apart in lightness too
CODE_BYTES, BF16_BYTES = 4.5 / 8, 2


@styled
def clamped(limit: float | None = 10.0, spread: float = 4.0, seed: int = 0) -> Picture:
    """Draws silu(gate) x up with and without a clamp, and where the values of random gates and ups lie.

    Args:
        limit: of the clamp.
        spread: standard deviation of gate and up, which have heavy tails.
        seed: of the random numbers.
    """
    gate, up = spread * _heavy_tails(2, 4096, seed)
    h = reference.swiglu(gate, up, limit).float()
    bound = None if limit is None else bound_global_scale(limit) * 2688
    by_data = float(sqnr_db(h, round_trip(h, "tensor")))
    words = f"Under max |h| / 2688, read from the data, it quantizes with {by_data:.1f} dB"
    if bound is not None:
        by_bound = float(sqnr_db(h, round_trip(h, bound / 2688)))
        words += f", under the bound's scale, known beforehand, with {by_bound:.1f} dB"
    picture, (curve, spreads) = new(
        f"Left: h for up at its largest; what is dashed has no clamp. Right: {h.numel():,} values of gate "
        f"and up with standard deviation {spread:g} and heavy tails. {words}.",
        columns=2,
        size=(8.4, 3.5),
    )
    reach = 15.0 if limit is None else 1.6 * limit
    x = torch.linspace(-reach, reach, 400)
    for top, (colour, _, line) in zip((reach / 1.6, reach / 4), SERIES, strict=False):
        held = reference.swiglu(x, torch.full_like(x, top), limit).float()
        curve.plot(x, held, color=colour, linestyle=line, label=f"up = {top:g}")
        free = reference.swiglu(x, torch.full_like(x, top), None).float()
        curve.plot(x, free, color=colour, linestyle="--", linewidth=0.9, alpha=0.8)
    size = h.flatten().abs()
    spreads.hist(size.clamp_min(1e-3).log10(), 60, color=BLUE, alpha=0.8)
    spreads.axvline(float(size.max().clamp_min(1e-3).log10()), color=INK, linestyle="--", label="max |h|")
    if bound is not None:
        curve.axhline(bound, color=SERIES[3][0], linestyle="-.", label=f"bound {bound:g}")
        spreads.axvline(np.log10(bound), color=SERIES[3][0], linestyle="-.", label=f"bound {bound:g}")
    curve.set(xlabel="gate", ylabel="h = silu(gate) × up", title="clamped" if bound else "no clamp")
    spreads.set(xlabel="log10 |h|, from −3 (0.001 or less)", ylabel="values", title="how large h gets")
    for axes in (curve, spreads):
        axes.legend(loc="upper left", fontsize=9)
    return picture


def _heavy_tails(pairs: int, count: int, seed: int) -> torch.Tensor:
    """Student's t with 3 degrees of freedom, of standard deviation 1."""
    r = torch.Generator().manual_seed(seed)
    x = torch.randn(pairs, 64, count // 64, generator=r)
    chi = torch.randn(3, pairs, 64, count // 64, generator=r).square().mean(0).sqrt()
    return x / chi / 3**0.5


@styled
def gate_up_rows(width: int = 64, columns: int = 64, run: int = 8) -> Picture:
    """Draws which rows of the weight are gates and which are ups, as halves and interleaved, over MMA tiles.

    Args:
        width: I, gates and ups each.
        columns: of D that a thread takes from tensor memory at a time.
        run: rows of gates before as many ups.
    """
    halves = [("gate", i) for i in range(width)] + [("up", i) for i in range(width)]
    runs = [range(first, first + run) for first in range(0, width, run)]
    mixed = [(kind, i) for part in runs for kind in ("gate", "up") for i in part]
    met = sum(_partner_inside(mixed, columns)) / len(mixed)
    picture, panels = new(
        f"Rows of the weight are columns of D. Between two lines, {columns} of them, lie in one thread's "
        f"registers. As halves no gate meets its up there; interleaved by {run}, {100 * met:.0f} % do.",
        rows=2,
        size=(8.4, 2.6),
        sharex=True,
    )
    rows = {"gate, then up": halves, f"interleaved by {run}": mixed}
    for axes, (name, order) in zip(panels, rows.items(), strict=True):
        for x, (kind, _) in enumerate(order):
            colour = _GATE if kind == "gate" else _UP
            axes.add_patch(Rectangle((x, 0), 1, 1, facecolor=colour, edgecolor=CARD, linewidth=0.4))
        for edge in range(0, len(order) + 1, columns):
            axes.axvline(edge, color=INK, linewidth=2.5)
        here = [order.index(("gate", 5)), order.index(("up", 5))]
        axes.annotate(
            "", (here[1] + 0.5, 1.05), (here[0] + 0.5, 1.05), annotation_clip=False,
            arrowprops={"arrowstyle": "<->", "color": INK, "connectionstyle": "arc3,rad=-0.12"},
        )  # fmt: skip
        axes.set(ylim=(0, 1.7), xlim=(-0.5, len(order) + 0.5), yticks=[], title=name)
        axes.spines["left"].set_visible(False)
        axes.grid(False)
    panels[-1].set_xlabel("column of D; the arrow joins the gate and the up of h[5]")
    handles = [Patch(facecolor=_GATE, label="gate"), Patch(facecolor=_UP, label="up")]
    picture.figure.legend(handles=handles, loc="outside right center")
    return picture


def _partner_inside(order: list[tuple[str, int]], columns: int) -> list[bool]:
    """Whether gate and up of one output lie between the same two lines, for each column."""
    place = {entry: x // columns for x, entry in enumerate(order)}
    return [place["gate", i] == place["up", i] for _, i in order]


def interleaved_by(weight: torch.Tensor, run: int) -> torch.Tensor:
    """Rows (2 I, K), gates and then ups, in runs of `run` gates and as many ups; the library's is 8.

    Raises:
        ValueError: I is no multiple of the run.
    """
    width = weight.shape[0] // 2
    if run < 1 or width % run:
        raise ValueError(f"run must divide the {width} gates, got {run}")
    return weight.unflatten(0, (2, width // run, run)).transpose(0, 1).flatten(0, 2)


def granularity_error(run: int, tokens: int = 32, width: int = 64, k: int = 128, seed: int = 0):
    """What a GEMM that expects runs of 8 makes of weights in other runs.

    Args:
        run: of gate rows and of up rows in the weight; I is two halves.
        tokens, width, k: sizes T, I and K.
        seed: of the random operands.

    Returns:
        the right h and the wrong one, (T, I) float32, and the SQNR in dB.
    """
    r = torch.Generator().manual_seed(seed)
    x = quantize_nvfp4(torch.randn(tokens, k, generator=r))
    weight = torch.randn(2 * width, k, generator=r) * 2 / k**0.5
    found = []
    for rows in (8, run):
        w = quantize_weight(interleaved_by(weight, rows)).with_(interleaved=True)
        found.append(grouped_mm_swiglu(x, w).float())
    return *found, float(sqnr_db(*found))


@styled
def granularity(run: int = 16, width: int = 64) -> Picture:
    """Draws which gate and which up a GEMM takes that reads runs of 8 where the weight has others.

    Args:
        run: of gate rows and of up rows in the weight.
        width: I.
    """
    right, wrong, level = granularity_error(run, width=width)
    same = int((right == wrong).all(0).sum())
    words = "every h is right" if level == float("inf") else f"h has an SQNR of {level:.1f} dB"
    order = interleaved_by(torch.arange(2 * width), run).tolist()
    picture, panels = new(
        f"The weight has runs of {run}, the GEMM reads runs of 8: {words}, {same} of {width} columns are "
        "right. A column is right where it reads gate and up of its own number, which are the grey "
        "diagonals. Shapes fit, and nothing complains.",
        columns=2,
        size=(8.4, 3.6),
        sharey=True,
    )
    for axes, (first, name) in zip(panels, ((0, "read as gate"), (8, "read as up")), strict=True):
        read = [(x, order[x // 8 * 16 + first + x % 8]) for x in range(width)]
        axes.plot([0, width - 1], [0, width - 1], color="#cccccc", linewidth=5, zorder=0)
        for kind, colour, marker, low in (("a gate", BLUE, "o", 0), ("an up", RED, "x", width)):
            mine = [(x, row - low) for x, row in read if low <= row < low + width]
            axes.plot(*zip(*mine, strict=True) if mine else ([], []), marker, color=colour, label=kind)
        axes.set(title=name, xlabel="column of h")
    panels[0].set_ylabel("number of what is read")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def swiglu_traffic(tokens: int, width: int, hidden: int) -> dict[str, dict[str, float]]:
    """Bytes that move between the first GEMM's sums and the second GEMM's operand, and those of both weights.

    Args:
        tokens: T.
        width: I, of h.
        hidden: K of the first GEMM and N of the second one.

    Returns:
        for each way to do it, the bytes of each step in order.
    """
    full, half = 2 * tokens * width * BF16_BYTES, tokens * width * BF16_BYTES
    codes, weights = tokens * width * CODE_BYTES, 3 * hidden * width * CODE_BYTES
    quantize = {"amax reads h": half, "quantize reads h": half, "quantize writes codes": codes}
    last = {"next GEMM reads codes": codes, "weights of both GEMMs": weights}
    return {
        "nothing fused": {"GEMM writes gate, up": full, "SwiGLU reads gate, up": full, "h written": half,
                          **quantize, **last},
        "SwiGLU fused": {"h written": half, **quantize, **last},
        "SwiGLU and quantize fused": {"quantize writes codes": codes, **last},
    }  # fmt: skip


@styled
def fusion_bytes(tokens: int = 4096, width: int = 2048, hidden: int = 4096) -> Picture:
    """Draws the bytes that move for three ways from the first GEMM of an expert to its second one.

    Args:
        tokens: T.
        width: I.
        hidden: of the model.
    """
    ways = swiglu_traffic(tokens, width, hidden)
    weights = ways["nothing fused"]["weights of both GEMMs"]
    first, last = (sum(ways[w].values()) - weights for w in ("nothing fused", "SwiGLU and quantize fused"))
    picture, axes = new(
        f"{tokens:,} tokens, I = {width}, hidden size {hidden}: activations move {first / 1e6:,.3g} MB, or "
        f"{last / 1e6:,.3g} MB, {first / last:.0f} times less, beside {weights / 1e6:.3g} MB of weights. "
        "Counted from the shapes, if nothing stays in a cache; no time was measured.",
        size=(8.4, 3.6),
    )
    steps = list(dict.fromkeys(step for way in ways.values() for step in way))
    looks = [BLUE, "#56b4e9", "#009e73", "#e69f00", "#f6cf7f", RED, "#cc79a7", "#d9d9d4"]
    hatches = ["", "//", "", "..", "\\\\", "", "xx", "--"]
    for y, (_, way) in enumerate(reversed(ways.items())):
        start = 0.0
        for step, size in way.items():
            i = steps.index(step)
            axes.barh(y, size / 1e6, left=start, color=looks[i], hatch=hatches[i], edgecolor=CARD, height=0.6)
            start += size / 1e6
        axes.annotate(f"{start:,.3g}", (start, y), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(3), list(ways)[::-1])
    axes.set(xlabel="bytes through memory (MB)")
    axes.margins(x=0.1)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", colors=INK)
    handles = [
        Patch(facecolor=looks[i], hatch=hatches[i], edgecolor=MUTED, label=s) for i, s in enumerate(steps)
    ]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return picture
