"""Figures about the block-scaled GEMM: one step of it, groups in their buffer, errors of its sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.patches import Patch

from dsv4lab import error_bound
from dsv4lab.formats import BLOCK, NVFP4Tensor

from .style import INK, MUTED, SERIES, Picture, Table, new, styled

_LOOK = {"to nearest": SERIES[0], "tensor core": SERIES[1]}


@styled
def mma_step(a: NVFP4Tensor, b: NVFP4Tensor) -> Picture:
    """Draws one element's step of K = 64: products of codes, and the sum as block after block is added.

    Args:
        a, b: (64,) or (1, 64) NVFP4, linear.
    """
    picture, (upper, lower) = new(
        "One step of K = 64 for one element of D. Above: 64 products of codes, all multiples of 1/4. Below: "
        "each block's sum of products, times both block scales, moves the running sum from one line to the "
        "next.",
        rows=2,
        size=(8.4, 4.7),
        sharex=True,
    )
    (x, x_scales), (w, w_scales) = (error_bound.parts(t) for t in (a, b))
    products = (x * w).reshape(-1, BLOCK)
    scales = list(zip(x_scales.flatten().tolist(), w_scales.flatten().tolist(), strict=True))
    total = 0.0
    for i, row in enumerate(products):
        colour, *_ = SERIES[i]
        first, middle = BLOCK * i, BLOCK * i + (BLOCK - 1) / 2
        upper.bar(range(first, first + BLOCK), row, color=colour, width=0.8)
        s, t = scales[i]
        after = total + sum(row) * s * t
        lower.hlines(total, first - 0.5, first + BLOCK - 0.5, color=MUTED, linewidth=1)
        lower.annotate("", (middle, after), (middle, total), arrowprops={"arrowstyle": "->", "color": colour})
        lower.annotate(
            f"{sum(row):g} × {s:g} × {t:g}\n= {sum(row) * s * t:g}",
            (middle, 0.03),
            xycoords=("data", "axes fraction"),
            color=colour,
            fontsize=8.5,
            ha="center",
        )
        total = after
    lower.hlines(total, 4 * BLOCK - 0.5, 4 * BLOCK + 3, color=INK, linewidth=1.8)
    for axes in (upper, lower):
        for edge in range(0, 4 * BLOCK + 1, BLOCK):
            axes.axvline(edge - 0.5, color=MUTED, linewidth=0.7, linestyle=":")
        axes.grid(False, axis="x")
    upper.set(ylabel="code × code", title="products within each block of 16")
    lower.set(ylabel="running sum", xlabel="k", title=f"blocks added up: {total:g}")
    lower.set_xticks(range(0, 4 * BLOCK + 1, BLOCK))
    low, high = lower.get_ylim()
    lower.set_ylim(low - 0.35 * (high - low), high)
    return picture


@styled
def group_rows(sizes: Sequence[int], offsets: Sequence[int], names: Sequence[str] | None = None) -> Picture:
    """Draws where the rows of each group stand in the padded buffer.

    Args:
        sizes: real rows of each group.
        offsets: ends of the groups, multiples of 128.
        names: of the groups; their numbers otherwise.
    """
    rows = max(offsets[-1], 1) if len(offsets) else 1
    used = sum(sizes)
    empty = " An empty group takes no rows at all, and is marked at its place." * (0 in sizes)
    picture, axes = new(
        f"The buffer of {offsets[-1] if len(offsets) else 0} rows, {used} of them real. Each group starts at "
        f"a multiple of 128, a whole tile.{empty}",
        size=(8.4, 1.9),
    )
    start = 0
    names = names or [f"group {i}" for i in range(len(sizes))]
    for i, (size, end) in enumerate(zip(sizes, offsets, strict=True)):
        colour = SERIES[i % len(SERIES)][0]
        axes.barh(0, size, left=start, color=colour, height=0.8)
        axes.barh(0, end - start - size, left=start + size, color="#e4e4e0", edgecolor=MUTED, hatch="//",
                  linewidth=0.5, height=0.8)  # fmt: skip
        axes.annotate(
            f"{names[i]}\n{size} rows",
            (start + max(end - start, 0) / 2, 0.45 if end > start else -0.45),
            (0, 4 if end > start else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if end > start else "top",
            fontsize=8,
            color=colour,
        )
        start = end
    axes.set(xlim=(0, rows), ylim=(-1.1, 1.3), xlabel="row of the buffer", yticks=[])
    axes.set_xticks([0, *dict.fromkeys(offsets)] if len(offsets) <= 12 else range(0, rows + 1, rows // 8))
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    padding = Patch(facecolor="#e4e4e0", edgecolor=MUTED, hatch="//", label="padding")
    axes.legend(handles=[padding], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


@styled
def sum_errors(distribution: str = "normal", rows: int = 32, k: int = 1024, seed: int = 0) -> Picture:
    """Draws how far the running sums of a GEMM are from the exact ones, and the derived bound.

    Args:
        distribution: a name in `error_bound.DISTRIBUTIONS`.
        rows: M and N.
        k: K % 64 == 0.
        seed: of the operands.
    """
    a, b = error_bound.operands(distribution, rows, k, seed)
    exact = error_bound.running_sums(a, b, "float64")
    size = error_bound.values(a).abs() @ error_bound.values(b).abs().T
    bound = error_bound.accumulation_bound(a, b)
    modes = {"to nearest": "exact", "tensor core": "hardware"}
    errors = {name: error_bound.running_sums(a, b, mode) - exact for name, mode in modes.items()}
    worst = float((errors["tensor core"][-1].abs() / bound).nan_to_num().max())
    picture, (curve, spread) = new(
        f"{rows} × {rows} sums over K = {k}, {distribution}. Left: the largest error of all elements as K "
        "goes on, as a share of Σ|ab| over all of K. Right: each element's error at the end over its bound; "
        f"the tensor core's largest is {100 * worst:.2g} % of it. Cuts toward zero pull all one way where "
        "the sums have one sign.",
        columns=2,
        size=(8.4, 3.9),
        width_ratios=(1.25, 1),
    )
    steps = np.arange(1, len(exact) + 1)
    curve.plot(error_bound.STEP * steps, 1.01 * steps * error_bound.ULP, ".-", color=INK, label="bound")
    for name, error in errors.items():
        colour, marker, line = _LOOK[name]
        largest = (error.abs() / size).nan_to_num().amax((1, 2)).numpy()
        shown = np.where(largest > 0, largest, np.nan)  # no error at all has no place on a log scale
        every = max(1, len(steps) // 12)
        curve.plot(
            error_bound.STEP * steps, shown, color=colour, marker=marker, linestyle=line, markevery=every,
            label=name,
        )  # fmt: skip
    if not any(float(error.abs().max()) for error in errors.values()):
        curve.text(0.05, 0.5, "no error at all:\nevery sum fits fp32", transform=curve.transAxes)
    curve.set_xscale("log", base=2)
    curve.set_yscale("log", base=2)
    curve.set(xlabel="K so far", ylabel="largest |error| / Σ|ab|", title="errors grow with K")
    curve.legend(loc="lower right", fontsize=9)
    _histograms(spread, errors, bound)
    return picture


def _histograms(axes, errors: dict[str, torch.Tensor], bound: torch.Tensor) -> None:
    shares = {name: (error[-1] / bound).nan_to_num().flatten().numpy() for name, error in errors.items()}
    limit = max(max(float(np.abs(s).max()) for s in shares.values()), 1e-3) * 1.05
    edges = np.linspace(-limit, limit, 42)
    for name, share in shares.items():
        colour, _, line = _LOOK[name]
        axes.hist(share, edges, histtype="step", color=colour, linestyle=line, linewidth=1.8, label=name)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    axes.set(xlabel="error / bound", ylabel="elements", title="at the end")
    axes.tick_params(axis="x", labelrotation=30)
    axes.legend(loc="upper right", fontsize=9)


def error_table(names: Sequence[str], rows: int = 32, k: int = 1024) -> Table:
    """Returns what each source of error costs for several distributions.

    Args:
        names: in `error_bound.DISTRIBUTIONS`.
        rows: M and N.
        k: K % 64 == 0.
    """
    found = [error_shares(name, rows, k) for name in names]
    rows_ = [(name, *shares.values()) for name, shares in zip(names, found, strict=True)]
    return Table(
        ["distribution", *found[0]],
        rows_,
        f"{rows} × {rows} elements, K = {k}. The last two columns are median |error| / |result|.",
    )


def error_shares(distribution: str, rows: int = 32, k: int = 1024, seed: int = 0) -> dict[str, float]:
    """How much terms cancel, how far sums are off, and median |error| / |result| of what is before and after.

    Args:
        distribution: a name in `error_bound.DISTRIBUTIONS`.
        rows: M and N.
        k: K % 64 == 0.
        seed: of the operands.
    """
    r = torch.Generator().manual_seed(seed)
    x, w = (t.double() for t in error_bound.DISTRIBUTIONS[distribution](rows, k, r))
    a, b = error_bound.operands(distribution, rows, k, seed)
    exact = error_bound.running_sums(a, b, "float64")[-1]
    sums = error_bound.running_sums(a, b, "hardware")[-1]
    g = a.global_scale.double() * b.global_scale.double()
    stored = (sums * g).to(torch.bfloat16).double()

    error, size = sums - exact, error_bound.values(a).abs() @ error_bound.values(b).abs().T

    def share(error: torch.Tensor) -> float:
        return float((error / exact).abs().nan_to_num().median())

    return {
        "Σ|ab| / |Σab|, median": share(size),
        "sums exact (%)": float((error == 0).double().mean() * 100),
        "largest error of sums / bound": float(
            (error.abs() / error_bound.accumulation_bound(a, b)).nan_to_num().max()
        ),
        "rounding to bf16": share(stored / g - sums),
        "quantization before": share(x @ w.T / g - exact),
    }
