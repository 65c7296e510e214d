"""Figures about the number formats, one block, and the global scale."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4lab.formats import (
    BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN_NORMAL,
    GLOBAL_DIVISOR,
    NVFP4Tensor,
)
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4

from .style import BLACK, BLUE, MUTED, RED, SERIES, Picture, new, styled


def sqnr_db(x: Tensor, decoded: Tensor, dim: int | None = None) -> Tensor:
    """The signal-to-noise ratio `10 log10(sum x^2 / sum (x - decoded)^2)` in dB, over `dim` or all."""
    x, decoded = x.double(), decoded.double()
    return 10 * torch.log10(x.square().sum(dim) / (x - decoded).square().sum(dim))


def round_trip(x: Tensor, global_scale: Any) -> Tensor:
    """Quantizes x (..., K) under a global-scale policy and decodes it to float32."""
    return dequantize_nvfp4(quantize_nvfp4(x, global_scale), torch.float32)


def block_codes(q: NVFP4Tensor) -> list[int]:
    """The 4-bit codes of the first 16 values of q, in order of k."""
    codes = q.codes.reshape(-1)[: BLOCK // 2].tolist()
    return [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]


@styled
def number_lines() -> Picture:
    """Draws every value of E2M1 and every positive value of E4M3, with the rounding boundaries of E2M1."""
    picture, (codes, scales) = new(
        "E2M1 holds 15 different values, evenly spaced at first and then ever wider apart; dashed lines "
        "mark where rounding changes its mind. E4M3 keeps 8 values in each factor of two, down to 2⁻⁶; "
        "below that only its 7 subnormal values remain.",
        rows=2,
        size=(8.4, 3.9),
    )
    for sign, first in ((1, 0), (-1, 8)):
        codes.plot([sign * v for v in E2M1_VALUES], [0] * 8, "o", color=BLUE, markersize=8)
        for code, v in enumerate(E2M1_VALUES):
            if v or sign > 0:
                codes.annotate(
                    f"{first + code:X}", (sign * v, 0), (0, 9), textcoords="offset points", ha="center"
                )
    for low, high in itertools.pairwise(E2M1_VALUES):
        for sign in (1, -1):
            codes.axvline(
                sign * (low + high) / 2, ymin=0.08, ymax=0.42, color=MUTED, linestyle="--", linewidth=0.9
            )
    codes.set(
        title="E2M1: one value, 4 bits (hexadecimal code above each value)", xlabel="value", ylim=(-1, 1)
    )
    codes.set_xticks([-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6])

    values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    small = values < E4M3_MIN_NORMAL
    scales.plot(
        values[~small], torch.zeros(int((~small).sum())), "|", color=BLUE, markersize=16, label="normal"
    )
    scales.plot(values[small], torch.zeros(7), "x", color=RED, markersize=8, label="subnormal")
    scales.set_xscale("log", base=2)
    for v, text in ((2.0**-9, "2⁻⁹ smallest"), (2.0**-6, "2⁻⁶"), (1.0, "1"), (448.0, "448 largest")):
        scales.annotate(text, (v, 0), (0, 12), textcoords="offset points", ha="center")
    scales.set(title="E4M3: one scale for 16 values, 8 bits (positive half)", xlabel="value", ylim=(-1, 1))
    scales.legend(loc="lower right", ncols=2)
    for axes in (codes, scales):
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
    return picture


@styled
def block(x: Tensor, global_scale: Any = "tensor") -> Picture:
    """Draws the 16 values of one block, what they decode to, and the grid they were rounded to.

    Args:
        x: (16,) finite values.
        global_scale: any policy `quantize_nvfp4` takes.
    """
    x = x.float()
    q = quantize_nvfp4(x, global_scale)
    decoded = dequantize_nvfp4(q, torch.float32)
    scale, g = float(q.block_scales.float()), float(q.global_scale)
    error = float(sqnr_db(x, decoded))
    picture, axes = new(
        f"One block. Lines are the 15 values that block scale × global scale = {scale:g} × {g:.4g} can "
        f"reach; largest |x| is {float(x.abs().max()):.4g}, SQNR {error:.1f} dB.",
        size=(8.4, 4.0),
    )
    for v in E2M1_VALUES:
        for sign in (1, -1):
            axes.axhline(sign * v * scale * g, color="#c9c9c9", linewidth=0.8, zorder=0)
    k = range(BLOCK)
    axes.vlines(k, x, decoded, color=RED, linewidth=2.5, label="error")
    axes.plot(k, x, "o", color=BLUE, markersize=8, markerfacecolor="none", markeredgewidth=1.8, label="value")
    axes.plot(k, decoded, "x", color=BLACK, markersize=7, markeredgewidth=1.8, label="decoded")
    axes.set_xticks(list(k), [f"{i}\n{code:X}" for i, code in enumerate(block_codes(q))])
    axes.set(xlabel="k, and below it the code in hexadecimal", ylabel="value", xlim=(-0.6, 15.6))
    zeros = sum(code & 7 == 0 for code in block_codes(q))
    axes.set_title(f"block scale {scale:g}, {zeros} of 16 codes are zero, SQNR {error:.1f} dB")
    axes.grid(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def edited_block(x: Tensor, value: float, outlier: float, scale: float) -> Picture:
    """Draws `block` for x with x[3] and x[9] replaced, under the static scale `scale` * amax / 2688."""
    x = x.float().clone()
    x[3], x[9] = value, outlier
    return block(x, float(x.abs().max() / GLOBAL_DIVISOR * scale))


@styled
def sqnr_against_scale(inputs: dict[str, Tensor], decades: tuple[float, float] = (-2, 7)) -> Picture:
    """Draws the SQNR over the global scale, from far too small to far too large.

    Args:
        inputs: name to x (R, K); one line each.
        decades: log10 of the first and last ratio of g to amax / 2688.
    """
    picture, axes = new(
        "SQNR against the global scale g, in units of amax / 2688. Left of 1 the largest values clip. To "
        "the right the block scales absorb g until they become subnormal and then zero: at 28672 (448 / "
        "2⁻⁶, 4.5 decades) for the largest block, and n times earlier for a block n times smaller.",
        size=(8.4, 4.0),
    )
    ratios = torch.logspace(*decades, 61)
    for (name, x), (colour, marker, line) in zip(inputs.items(), SERIES, strict=False):
        unit = x.abs().max().float() / GLOBAL_DIVISOR
        levels = [float(sqnr_db(x, round_trip(x, float(unit * r)))) for r in ratios]
        axes.plot(ratios, levels, color=colour, marker=marker, linestyle=line, markevery=5, label=name)
    axes.set_xscale("log")
    axes.axvspan(10.0 ** decades[0], 1, color=RED, alpha=0.10, linewidth=0)
    axes.axvspan(E4M3_MAX / E4M3_MIN_NORMAL, 10.0 ** decades[1], color=MUTED, alpha=0.14, linewidth=0)
    top = axes.get_ylim()[1] + 4
    axes.set(xlabel="g / (amax / 2688)", ylabel="SQNR (dB)", ylim=(-1, top), xlim=[10.0**d for d in decades])
    for at, text in ((0.1, "clips"), (170, "well conditioned"), (5e5, "underflows")):
        axes.text(at, top - 0.6, text, ha="center", va="top", color=BLACK)
    axes.legend(loc="lower center")
    return picture


@styled
def saturation(x: Tensor, factors: Sequence[float] = (1.0, 0.25, 0.0625)) -> Picture:
    """Draws decoded against true magnitudes for an `input_scale` wrong by each factor, and the SQNR.

    Args:
        x: (R, K) values.
        factors: input_scale as a multiple of amax / 2688.
    """
    picture, (curve, bars) = new(
        "An input_scale that is too small cuts off every value above 2688 × input_scale: the largest "
        "values, which carry most of the signal, all come out the same.",
        columns=2,
        size=(8.4, 3.8),
        width_ratios=(3, 1.4),
    )
    amax = x.abs().max().float()
    edges = torch.linspace(0, float(amax), 40)
    levels = []
    for factor, (colour, marker, line) in zip(factors, SERIES, strict=False):
        decoded = round_trip(x, float(amax / GLOBAL_DIVISOR * factor))
        levels.append(float(sqnr_db(x, decoded)))
        which = torch.bucketize(x.abs().float(), edges)
        centres = [
            (float(x[which == i].abs().mean()), float(decoded[which == i].abs().mean()))
            for i in which.unique()
        ]
        curve.plot(
            *zip(*centres, strict=True), color=colour, marker=marker, linestyle=line, label=_times(factor)
        )
    curve.plot([0, float(amax)], [0, float(amax)], color=MUTED, linewidth=0.8)
    curve.set(xlabel="true |x|", ylabel="decoded |x|, mean of a bin")
    curve.legend(title="input_scale / (amax / 2688)")
    for i, (level, (colour, *_)) in enumerate(zip(levels, SERIES, strict=False)):
        bars.bar(i, level, color=colour, width=0.6)
        bars.annotate(f"{level:.1f}", (i, level), (0, 3), textcoords="offset points", ha="center")
    bars.set_xticks(range(len(levels)), [_times(f) for f in factors])
    bars.set(xlabel="input_scale / (amax / 2688)", ylabel="SQNR (dB)", ylim=(0, max(levels) * 1.15))
    bars.grid(False, axis="x")
    return picture


def _times(factor: float) -> str:
    return f"1/{1 / factor:g}" if factor < 1 else f"{factor:g}×"


@styled
def policies(x: Tensor, scales: dict[str, Any]) -> Picture:
    """Draws the SQNR of each row under each policy against the size of the row.

    Args:
        x: (T, K) rows of different size.
        scales: name to what `quantize_nvfp4` takes as global scale.
    """
    picture, axes = new(
        "One line for each policy, one point for each token. Tokens up to 28672 times smaller than the "
        "largest one lose nothing by sharing its scale; a static scale fails only for tokens larger than "
        "those it was calibrated on.",
        size=(8.4, 4.0),
    )
    size = x.abs().amax(-1).float()
    for (name, scale), (colour, marker, line) in zip(scales.items(), SERIES, strict=False):
        levels = sqnr_db(x, round_trip(x, scale), dim=-1)
        axes.plot(
            size / size.max(), levels, color=colour, marker=marker, linestyle=line, markevery=4, label=name
        )
    axes.set_xscale("log")
    axes.axvline(1 / 28672, color=MUTED, linewidth=0.9, linestyle="--")
    axes.text(1 / 28672, axes.get_ylim()[0] + 0.5, " 1 / 28672", color=MUTED)
    axes.set(xlabel="largest |x| of the token / largest |x| of all tokens", ylabel="SQNR of the token (dB)")
    axes.legend(loc="lower right")
    return picture


@styled
def staircase(rounding: dict[str, Callable[[Tensor], Tensor]]) -> Picture:
    """Draws roundings to E2M1 over 0 to 6 and shades where the second differs from the first.

    Args:
        rounding: two names to functions on float32 tensors; the first one is right.
    """
    picture, axes = new(
        "Rounding to E2M1. Shaded: values that the second rule sends to the wrong neighbour.",
        size=(8.4, 3.6),
    )
    x = torch.linspace(0, 6, 12001)
    outcomes = {name: rule(x) for name, rule in rounding.items()}
    for (name, y), (colour, _, line) in zip(outcomes.items(), SERIES, strict=False):
        axes.plot(x, y, color=colour, linestyle=line, label=name, drawstyle="steps-post")
    right, wrong = outcomes.values()
    axes.fill_between(x, 0, 6, where=(right != wrong).numpy(), color=RED, alpha=0.18, linewidth=0)
    axes.set(xlabel="x / (block scale × global scale)", ylabel="E2M1 value", yticks=E2M1_VALUES, xlim=(0, 6))
    axes.set_ylim(0, E2M1_MAX + 0.3)
    axes.legend(loc="upper left")
    return picture
