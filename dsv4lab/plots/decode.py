"""Figures about a decoding model: errors over layers, tokens that change, logits, one layer's codes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4lab.formats import BLOCK, E2M1_VALUES, E4M3_MAX, NVFP4Tensor

from .style import BLUE, MUTED, RED, SERIES, Picture, new, styled


@styled
def sqnr_by_layer(levels: dict[str, Sequence[float]], kinds: Sequence[str]) -> Picture:
    """Draws the SQNR of the hidden state after each layer.

    Args:
        levels: name to one value in dB a layer.
        kinds: the attention of each layer, for the axis.
    """
    picture, axes = new(
        "SQNR of the residual streams after each layer against the bf16 model. Higher is better; 20 dB "
        "means an error of a tenth of the signal.",
        size=(8.4, 3.9),
    )
    for (name, values), (colour, marker, line) in zip(levels.items(), SERIES, strict=False):
        values = [v if math.isfinite(v) else math.nan for v in values]  # no error yet: no point
        axes.plot(range(len(values)), values, color=colour, marker=marker, linestyle=line, label=name)
    axes.set_xticks(range(len(kinds)), [f"{i}\n{kind}" for i, kind in enumerate(kinds)])
    axes.set(xlabel="layer and its attention", ylabel="SQNR (dB)")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), None)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


@styled
def agreement_by_margin(reference: Tensor, logits: Tensor, bins: int = 8) -> Picture:
    """Draws how often two models choose the same token, against how sure the first one is.

    Args:
        reference, logits: (T, V) logits of both models for the same text.
        bins: groups of equally many tokens.
    """
    picture, axes = new(
        "Tokens sorted by the reference model's margin, its best logit minus its second best, in groups of"
        " equal size. Quantization changes the choice where the choice was close.",
        size=(8.4, 3.4),
    )
    best = reference.topk(2, dim=-1).values
    margin, order = (best[:, 0] - best[:, 1]).float().sort()
    same = (reference.argmax(-1) == logits.argmax(-1))[order].float()
    groups = [g for g in torch.tensor_split(torch.arange(len(margin)), bins) if len(g)]
    heights = [float(same[g].mean()) * 100 for g in groups]
    labels = [f"{float(margin[g[0]]):.1f}–{float(margin[g[-1]]):.1f}" for g in groups]
    axes.bar(range(len(groups)), heights, color=BLUE, width=0.75)
    for i, height in enumerate(heights):
        axes.annotate(f"{height:.0f}", (i, height), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(groups)), labels)
    axes.set(xlabel="margin (logits)", ylabel="same token (%)", ylim=(0, 112))
    axes.grid(False, axis="x")
    return picture


@styled
def logits(reference: Tensor, others: dict[str, Tensor], points: int = 1500) -> Picture:
    """Draws how logits vary over a text, against the reference's, with the slope of each cloud.

    Args:
        reference: (T, V) logits.
        others: name to (T, V) logits.
        points: drawn at most for each.
    """
    picture, panels = new(
        "Each point is one logit less its mean over the text: what the model read out of the text. On the "
        "line it equals the reference. A slope below 1 means that the logits are compressed: less is read,"
        " probabilities flatten, and unlikely tokens get their chance.",
        columns=len(others),
        size=(8.4, 3.3),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    centred = (reference - reference.mean(0)).flatten().float()
    pick = torch.linspace(0, len(centred) - 1, min(points, len(centred))).long()
    limits = [float(centred[pick].min()), float(centred[pick].max())]
    for axes, (name, other), (colour, *_) in zip(panels[0], others.items(), SERIES, strict=False):
        y = (other - other.mean(0)).flatten().float()
        slope = float((centred * y).sum() / centred.square().sum())
        axes.plot(centred[pick], y[pick], ".", color=colour, markersize=3, alpha=0.5)
        axes.plot(limits, limits, color=MUTED, linewidth=1)
        axes.set(title=f"{name}\nslope {slope:.2f}", xlabel="logit of the reference")
    panels[0][0].set_ylabel("logit")
    return picture


@styled
def code_use(q: NVFP4Tensor, name: str = "tensor") -> Picture:
    """Draws how often a quantized tensor uses each magnitude, and where its block scales lie.

    Args:
        q: any shape; its scales may be swizzled, whose padding of zeros is left out.
        name: for the title.
    """
    picture, (left, right) = new(
        "Left: the share of each E2M1 magnitude. Right: block scales; a peak at 448 means blocks that want"
        " a larger scale than there is.",
        columns=2,
        size=(8.4, 3.3),
    )
    codes = torch.stack([q.codes & 7, q.codes >> 4 & 7]).flatten().long()
    share = torch.bincount(codes, minlength=8).float() / max(len(codes), 1) * 100
    left.bar(range(8), share.tolist(), color=BLUE)
    left.set_xticks(range(8), [f"{v:g}" for v in E2M1_VALUES])
    left.set(title=f"{name}: {len(codes):,} codes", xlabel="E2M1 magnitude", ylabel="share (%)")
    left.grid(False, axis="x")
    scales = q.block_scales.float().flatten()
    scales = scales[scales > 0]
    top = math.log2(E4M3_MAX)  # the last bin ends with the largest scale that there is
    right.hist(scales.log2().tolist(), bins=[top - i / 2 + 1e-6 for i in reversed(range(38))], color=BLUE)
    right.set_xlim(-9.75, 9.75)
    right.axvline(top, color=RED, linestyle="--", linewidth=1.2)
    above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    right.annotate("448", (top, 1), (0, 4), **above, color=RED, ha="center")
    right.set_xticks(range(-9, 10, 3))
    right.set(
        title=f"{len(scales):,} block scales of {BLOCK} values", xlabel="log2(block scale)", ylabel="blocks"
    )
    return picture


@styled
def bars(
    values: dict[str, float], unit: str, caption: str, reference: tuple[str, float] | None = None
) -> Picture:
    """Draws one horizontal bar for each named value.

    Args:
        values: name to value, drawn from the top.
        unit: of the values, for the axis.
        caption: one sentence.
        reference: name and value of a line to compare with.
    """
    picture, axes = new(caption, size=(8.4, 0.9 + 0.36 * len(values)))
    names = list(values)[::-1]
    axes.barh(names, [values[n] for n in names], color=BLUE, height=0.65)
    for i, n in enumerate(names):
        text = f"{values[n]:,.0f}" if abs(values[n]) >= 1000 else f"{values[n]:.3g}"
        axes.annotate(text, (values[n], i), (4, 0), textcoords="offset points", va="center")
    if reference:
        axes.axvline(reference[1], color=RED, linestyle="--", label=reference[0])
        axes.legend(loc="lower right")
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    return picture


class Texts:
    """Continuations side by side, each underlined from where it first differs from the first one."""

    def __init__(self, prompt: str, texts: dict[str, str]) -> None:
        self.prompt, self.texts = prompt, dict(texts)

    def same(self, name: str) -> int:
        """Returns how many leading characters of a continuation equal the first one's."""
        first, text = next(iter(self.texts.values())), self.texts[name]
        both = min(len(first), len(text))
        return next((i for i in range(both) if first[i] != text[i]), both)

    def _head(self, name: str) -> str:
        if name == next(iter(self.texts)):
            return name
        return f"{name}: {self.same(name)} of {len(self.texts[name])} characters as the first"

    def __repr__(self) -> str:
        parts = [f"--- {self._head(name)}\n{text}" for name, text in self.texts.items()]
        return "\n".join([f"--- prompt\n{self.prompt}", *parts])

    def _repr_html_(self) -> str:
        cells = []
        for name, text in self.texts.items():
            n = self.same(name)
            head, tail = html.escape(text[:n]), html.escape(text[n:])
            cells.append(
                f'<td style="vertical-align:top;text-align:left">{html.escape(self._head(name))}'
                '<pre style="white-space:pre-wrap">'
                f'<span style="opacity:0.65">{html.escape(self.prompt)}</span>{head}<u>{tail}</u></pre></td>'
            )
        return f'<table style="width:100%"><tr>{"".join(cells)}</tr></table>'
