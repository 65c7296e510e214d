"""Figures about the grouped wo_a: a block-diagonal matrix, groups of different spread, the inverse RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from dsv4lab.formats import E4M3_MAX, E4M3_MIN_NORMAL
from dsv4lab.model.rope import frequencies, rotate, rotation

from .quantization import round_trip, sqnr_db
from .style import INK, MUTED, SERIES, Picture, new, styled

NORMAL = round(E4M3_MAX / E4M3_MIN_NORMAL)  # how far apart scales can be that E4M3 holds with full precision


@styled
def block_diagonal(groups: int = 8, rows: int = 1024, columns: int = 4096) -> Picture:
    """Draws wo_a as the block-diagonal matrix that it is, and as it is stored.

    Args:
        groups: G.
        rows, columns: of a group's matrix, R and K.
    """
    stored, dense = groups * rows * columns, groups**2 * rows * columns
    picture, (whole, packed) = new(
        f"Left: all heads' outputs in, {groups} × {columns} = {groups * columns:,}, and {groups} × {rows} = "
        f"{groups * rows:,} out, but group g's rows read only group g's columns. Right: what is stored and "
        f"multiplied, {stored / 1e6:,.3g} million weights instead of {dense / 1e6:,.4g}; the groups of the "
        "input stand below each other.",
        columns=2,
        size=(8.4, 3.3),
        width_ratios=(groups, max(1, groups / 3)),
        sharey=True,
    )
    for g in range(groups):
        colour, *_ = SERIES[g % len(SERIES)]
        for axes, x in ((whole, g * columns), (packed, 0)):
            axes.add_patch(
                Rectangle((x, g * rows), columns, rows, facecolor=colour + "77", edgecolor=INK, linewidth=0.7)
            )
            axes.annotate(f"{g}", (x + columns / 2, (g + 0.5) * rows), ha="center", va="center", fontsize=9)
    whole.set(xlim=(0, groups * columns), ylim=(groups * rows, 0), title="as one matrix: the rest is zero")
    packed.set(xlim=(0, columns), title="as stored")
    for axes, width in ((whole, groups * columns), (packed, columns)):
        axes.set_xticks([0, width])
        axes.set_xlabel("input (k)")
        axes.grid(False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
    whole.set_yticks([0, groups * rows])
    whole.set_ylabel("output row")
    return picture


def spread_groups(groups: int, decades: float, tokens: int = 16, k: int = 256, seed: int = 0) -> Tensor:
    """Random input of a grouped linear, each group louder than the one before.

    Args:
        groups: G, at least 2.
        decades: from the quietest group to the loudest one, as a power of ten.
        tokens: T.
        k: K.
        seed: of the random numbers.

    Returns:
        (G, T, K) float32.
    """
    x = torch.randn(groups, tokens, k, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-decades, 0, groups)[:, None, None]


def group_policies(x: Tensor) -> dict[str, object]:
    """What `quantize_nvfp4` takes as global scale for x (G, T, K), by name."""
    middle = x[len(x) // 2].abs().amax().float() / 2688
    return {
        "each group its own": "group",
        "each token its own": "token",
        "one for all, max |x| / 2688": "tensor",
        "the middle group's for all": float(middle),
    }


def group_levels(x: Tensor) -> dict[str, list[float]]:
    """The SQNR in dB of each group of x (G, T, K), for each policy."""
    return {
        name: sqnr_db(x.flatten(1), round_trip(x, scale).flatten(1), dim=-1).tolist()
        for name, scale in group_policies(x).items()
    }


@styled
def group_spread(groups: int = 8, decades: float = 6.0, tokens: int = 16, seed: int = 0) -> Picture:
    """Draws how well each group is quantized under four policies for the global scale.

    Args:
        groups: G.
        decades: from the quietest group to the loudest one.
        tokens: T.
        seed: of the input.
    """
    x = spread_groups(groups, decades, tokens, seed=seed)
    levels = group_levels(x)
    least = {name: min(values) for name, values in levels.items()}
    size = x.abs().amax((1, 2)) / x.abs().amax()
    far = float(size.min()) < 1 / NORMAL
    picture, axes = new(
        f"{groups} groups, the loudest 10^{decades:g} times the quietest. The worst group has "
        + ", ".join(f"{value:.1f} dB ({name})" for name, value in least.items())
        + "."
        + f" Left of the dashed line one scale for all runs out of E4M3's normal numbers, 1 / {NORMAL}."
        * far,
        size=(8.4, 3.9),
    )
    for (name, values), (colour, marker, line) in zip(levels.items(), SERIES, strict=False):
        axes.plot(size, values, color=colour, marker=marker, linestyle=line, label=name, markersize=7)
    axes.set_xscale("log")
    if far:
        axes.axvline(1 / NORMAL, color=MUTED, linewidth=0.9, linestyle="--")
    axes.set(xlabel="max |x| of the group / max |x| of all groups", ylabel="SQNR of the group (dB)")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return picture


def attention_output(
    shift: int, heads: int = 8, width: int = 512, turning: int = 64, inverse: bool = True, seed: int = 0
) -> Tensor:
    """The heads' output of one token that attends to 32 others, all `shift` positions further on.

    Keys are values here, as in DeepSeek-V4, so values carry the rotation of their position.

    Args:
        shift: added to every position, also to the token's own.
        heads, width: of the output.
        turning: channels that rotate, the last ones.
        inverse: whether the output is turned back by the token's own position.
        seed: of values and weights.

    Returns:
        (1, heads * width) float32.
    """
    r = torch.Generator().manual_seed(seed)
    values = torch.randn(1, 32, width, generator=r)
    weights = torch.softmax(2 * torch.randn(heads, 32, generator=r), -1)
    angle = frequencies(turning, 10000.0)
    turned = rotate(values, rotation(torch.arange(32) + shift, angle))[0]
    o = (weights @ turned)[None, None]
    if inverse:
        o = rotate(o, rotation(torch.tensor([31 + shift]), angle), inverse=True)
    return o.reshape(1, -1)


@styled
def position_shift(shifts: Sequence[int], apply, **sizes) -> Picture:
    """Draws how much a layer's output depends on where in the text the same words stand.

    Args:
        shifts: positions by which everything moves.
        apply: the layer, from (1, heads * width) to its output.
        sizes: for `attention_output`.
    """
    picture, axes = new(
        "The same tokens, moved to later positions. With the inverse RoPE the output does not change but for "
        "rounding; without it the layer gets other input at every position, and wo_a has never seen it.",
        size=(8.4, 3.3),
    )
    for inverse, name, (colour, marker, line) in (
        (True, "with inverse RoPE", SERIES[0]),
        (False, "left out", SERIES[1]),
    ):
        here = apply(attention_output(0, inverse=inverse, **sizes))
        levels = shift_levels(shifts, apply, inverse, here, **sizes)
        axes.plot(shifts, levels, color=colour, marker=marker, linestyle=line, label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="shift (positions)", ylabel="SQNR against no shift (dB)")
    axes.set_ylim(0, None)
    axes.legend(loc="center right")
    return picture


def shift_levels(shifts: Sequence[int], apply, inverse: bool, here: Tensor, **sizes) -> list[float]:
    """The SQNR in dB of the layer's output at each shift against its output `here`, at most 150."""
    moved = [apply(attention_output(shift, inverse=inverse, **sizes)) for shift in shifts]
    return [float(np.minimum(sqnr_db(here, y).item(), 150.0)) for y in moved]
