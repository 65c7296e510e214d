"""Figures about mHC: Sinkhorn's iterations, what doubly stochastic mixing bounds, the residual streams."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dsv4lab.model import DeepseekV4, transformer
from dsv4lab.model.hyper_connections import open_streams, sinkhorn

from .style import BLUE, CARD, INK, MUTED, RED, SERIES, Picture, new, styled

EPS = 1e-6
_MANY = 64  # random matrices of which the slowest is shown


class Mixing(NamedTuple):
    """What one sublayer does with the streams of a text.

    Attributes:
        streams: (T, n, H) before it.
        post: (T, n), how much of its result goes to each stream.
        mix: (T, n, n), old stream, new stream.
    """

    streams: Tensor
    post: Tensor
    mix: Tensor


def mixing_calls(model: DeepseekV4, ids: Tensor) -> list[Mixing]:
    """How each sublayer, attention and experts in turn, mixes the streams while the model reads ids (T,)."""
    calls = []

    def note(streams: Tensor, *weights, **settings):
        x, post, mix = open_streams(streams, *weights, **settings)
        calls.append(Mixing(streams[0], post[0], mix[0]))
        return x, post, mix

    with mock.patch.object(transformer, "open_streams", note), torch.no_grad():
        model(ids[None])
    return calls


def mixing_logits(spread: float, count: int = 1, n: int = 4, seed: int = 0) -> Tensor:
    """Random logits (count, n, n) of mixing matrices: 3 on the diagonal, as mHC starts, and normal noise."""
    r = torch.Generator().manual_seed(seed)
    return 3 * torch.eye(n) + spread * torch.randn(count, n, n, generator=r)


def imbalance(logits: Tensor, iterations: int) -> tuple[float, float]:
    """How far the sums of the rows and of the columns are from 1 after some iterations, at most."""
    with torch.no_grad():
        matrix = sinkhorn(logits, iterations, EPS)
    return tuple(float((matrix.sum(dim) - 1).abs().max()) for dim in (-1, -2))


@styled
def sinkhorn_steps(iterations: int = 20, spread: float = 2.0, seed: int = 0, n: int = 4) -> Picture:
    """Draws a matrix that Sinkhorn's iteration balances, and how fast.

    Args:
        iterations: of rows and columns.
        spread: standard deviation of the noise on the logits.
        seed: of the noise.
        n: streams.
    """
    logits = mixing_logits(spread, n=n, seed=seed)
    with torch.no_grad():
        matrix = sinkhorn(logits, iterations, EPS)[0]
    off, columns = imbalance(logits, iterations)
    picture, (before, after, curve) = new(
        f"Left: softmax over each row of the logits. Middle: after Sinkhorn (iterations: {iterations}), with "
        f"sums; rows are off by {off:.1g} at most, columns, which come last, by {columns:.0e}. Right: the "
        f"slowest of {_MANY} random matrices; the circle is the one in the middle.",
        columns=3,
        size=(9.2, 3.5),
        width_ratios=(1, 1, 1.15),
    )
    _matrix(before, logits[0].softmax(-1), "softmax of rows")
    _matrix(after, matrix, f"Sinkhorn, iterations: {iterations}")
    steps = [1, 2, 3, 5, 8, 13, 20, 32, 64]
    spreads = sorted({0.5, 2.0, 4.0, spread})
    for s, (colour, marker, line) in zip(spreads, SERIES, strict=False):
        worst = [max(imbalance(mixing_logits(s, _MANY, n, seed), i)[0], 1e-7) for i in steps]
        curve.plot(steps, worst, color=colour, marker=marker, linestyle=line, label=f"spread {s:g}")
    curve.plot([iterations], [max(off, 1e-7)], "o", markersize=12, markerfacecolor="none", color=INK)
    curve.set_xscale("log", base=2)
    curve.set_yscale("log")
    curve.set_xticks([1, 2, 5, 20, 64], ["1", "2", "5", "20", "64"])
    curve.set(xlabel="iterations", ylabel="largest |row sum − 1|", ylim=(5e-8, 5), title="how fast")
    curve.legend(loc="lower left", fontsize=8.5)
    return picture


def _matrix(axes, matrix: Tensor, title: str) -> None:
    """A matrix as shades with its numbers, and the sums of its rows and columns at the margins."""
    n = len(matrix)
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1.3)
    rows, columns = matrix.sum(1), matrix.sum(0)
    cells = [(j, k, matrix[j, k], INK) for j in range(n) for k in range(n)]
    cells += [(j, n, rows[j], RED) for j in range(n)] + [(n, k, columns[k], RED) for k in range(n)]
    for j, k, value, colour in cells:
        style = {"fontweight": "bold"} if colour == RED else {}
        axes.text(k, j, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=colour, **style)
    axes.set(xlim=(-0.5, n + 0.5), ylim=(n + 0.5, -0.5), xlabel="new stream k (Σ below)", title=title)
    axes.set_ylabel("old stream j (Σ at the right)", fontsize=9)
    axes.set_xticks(range(n))
    axes.set_yticks(range(n))
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)


def mixing_gains(
    spread: float, layers: int = 122, iterations: int = 20, n: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Largest factor by which products of 1, 2, ... mixing matrices can stretch the streams, by their kind.

    Args:
        spread: of the logits' noise; a free matrix is the identity and a tenth of that noise.
        layers: matrices, two for each of Pro's 61 layers.
        iterations: of Sinkhorn's.
        n: streams.
        seed: of the noise.

    Returns:
        spectral norms (layers,) of the products, for "free", "softmax of rows" and "Sinkhorn".
    """
    logits = mixing_logits(spread, layers, n, seed)
    with torch.no_grad():
        kinds = {
            "free": torch.eye(n) + (logits - 3 * torch.eye(n)) / 10,
            "softmax of rows": logits.softmax(-1),
            "Sinkhorn": sinkhorn(logits, iterations, EPS),
        }
    found = {}
    for name, matrices in kinds.items():
        product, norms = torch.eye(n, dtype=torch.float64), []
        for matrix in matrices.double():
            product = matrix.T @ product
            norms.append(torch.linalg.matrix_norm(product, 2))
        found[name] = torch.stack(norms)
    return found


@styled
def stream_gains(spread: float = 2.0, iterations: int = 20, layers: int = 122, seed: int = 0) -> Picture:
    """Draws how far products of mixing matrices can stretch the streams, against depth.

    Args:
        spread, iterations, layers, seed: as for `mixing_gains`.
    """
    found = mixing_gains(spread, layers, iterations, seed=seed)
    most = {name: float(norms.max()) for name, norms in found.items()}
    picture, axes = new(
        f"Random mixing matrices, {layers} one after the other: how much longer mixing alone can make the "
        f"streams. Free matrices (identity and noise of {spread / 10:g}): {most['free']:.2g} times at most; "
        f"softmax of rows: {most['softmax of rows']:.2f}; Sinkhorn (iterations: {iterations}): "
        f"{most['Sinkhorn']:.2f}.",
        size=(8.4, 3.4),
    )
    for (name, norms), (colour, marker, line) in zip(found.items(), SERIES, strict=False):
        depth = np.arange(1, len(norms) + 1)
        axes.plot(
            depth, norms, color=colour, marker=marker, linestyle=line, markevery=layers // 10, label=name
        )
    axes.axhline(1, color=MUTED, linewidth=0.9)
    axes.set_yscale("log")
    axes.set(xlabel="sublayers", ylabel="largest gain (factor)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


@styled
def stream_mixing(calls: list[Mixing], sublayer: int = 4) -> Picture:
    """Draws how large each stream is before each sublayer, and how one sublayer mixes them.

    Args:
        calls: from `mixing_calls`.
        sublayer: 0 for the first layer's attention, 1 for its experts, and so on.
    """
    call = calls[sublayer]
    n = call.post.shape[-1]
    part = f"{('attention', 'experts')[sublayer % 2]} of layer {sublayer // 2}"
    picture, (sizes, mixed) = new(
        f"Left: size of the {n} streams before each sublayer. Right: what each new stream is made of after "
        f"the {part}, mean over the text. The old streams' weights sum to 1; the weight of y, the sublayer's "
        "result, is between 0 and 2.",
        columns=2,
        size=(8.8, 3.7),
        width_ratios=(1.3, 1),
    )
    level = torch.stack([c.streams.float().square().mean((0, 2)).sqrt() for c in calls])
    for k, (colour, marker, line) in zip(range(n), SERIES, strict=False):
        sizes.plot(level[:, k], color=colour, marker=marker, linestyle=line, label=f"stream {k}")
    sizes.axvline(sublayer, color=INK, linestyle=":", linewidth=1.2)
    sizes.set_xticks(range(0, len(calls), 2), [str(i) for i in range(len(calls) // 2)])
    sizes.set(xlabel="layer (attention, then experts)", ylabel="root mean square", title="streams")
    sizes.set_ylim(0, None)
    sizes.legend(loc="upper left", fontsize=9)
    _made_of(mixed, torch.cat((call.mix.mean(0).T, call.post.mean(0)[:, None]), 1), part)
    return picture


def _made_of(axes, weights: Tensor, title: str) -> None:
    n = len(weights)
    axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=2.6)
    for k in range(n):
        for j in range(n + 1):
            axes.text(j, k, f"{weights[k, j]:.2f}", ha="center", va="center", fontsize=9, color=INK)
    axes.axvline(n - 0.5, color=BLUE, linewidth=2)
    axes.set_xticks(range(n + 1), [*(f"old {j}" for j in range(n)), "y"])
    axes.set_yticks(range(n), [f"new {k}" for k in range(n)])
    axes.set(xlabel="weight of", title=title, facecolor=CARD)
    axes.grid(False)
