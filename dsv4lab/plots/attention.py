"""Figures about attention: which tokens a query reaches, where its mass goes, sinks, the inverse RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from dsv4lab.model import CSA, HCA, SLIDING, DeepseekV4, ModelConfig, attention
from dsv4lab.model.attention import Attention, Part, attend
from dsv4lab.model.rope import layer_frequencies, rotate, rotation
from dsv4lab.model.step import Step

from .style import BLUE, CARD, INK, MUTED, SERIES, Picture, new, styled

_LATER, _LOST, _ENTRY, _WINDOW = CARD, "#dcdcd6", "#e8a35c", BLUE  # apart in lightness too
_TARGETS = (("window", BLUE, ""), ("entries", "#e8a35c", "//"), ("sink", "#8a8a84", ".."))
_NUDGE, _NOTICED = 0.01, 1e-6


def reach(kind: str, window: int, ratio: int, tokens: int = 64, topk: int | None = None) -> Tensor:
    """Which tokens change a query's result in a layer with random weights, found by changing each in turn.

    Args:
        kind: of the layer, one of `dsv4lab.model`'s SLIDING, CSA and HCA.
        window: keys seen as they are, the query's own included.
        ratio: tokens in a block that becomes one entry; a sliding layer has none.
        tokens: T.
        topk: entries that a query of a CSA layer attends to; None for all.

    Returns:
        (T, T) bool: query, token.
    """
    config = ModelConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=16, rope_dim=4,
        q_lora_rank=32, o_groups=1, o_lora_rank=32, moe_intermediate_size=16, n_routed_experts=1,
        num_experts_per_tok=1, index_n_heads=4, index_head_dim=8, index_topk=topk or tokens,
        layer_types=(kind,), mlp_layer_types=("moe",), sliding_window=window, csa_ratio=ratio,
        hca_ratio=ratio, yarn=None, max_position_embeddings=tokens,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer = Attention(config, 0, dtype=torch.float32)
        for weight in (p for p in layer.parameters() if p.dim() > 1):
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        x = torch.randn(tokens, config.hidden_size)
        angles = {"sliding": layer_frequencies(config, SLIDING), "compressed": layer_frequencies(config, CSA)}
        step = Step(torch.arange(tokens), 0, torch.zeros(1, tokens), angles, torch.float32)
        texts = x.repeat(tokens + 1, 1, 1)  # the last one as it is
        texts[torch.arange(tokens), torch.arange(tokens)] += _NUDGE * torch.randn(tokens, config.hidden_size)
        out = layer(texts, step)
    return ((out[:-1] - out[-1]).abs().amax(-1) > _NOTICED).T


@styled
def reached(window: int = 8, ratio: int = 8, topk: int | None = 2, tokens: int = 64) -> Picture:
    """Draws which tokens each query reaches, and whether as they are or through an entry.

    Args:
        window, ratio, topk: as for `reach`.
        tokens: T.
    """
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = (column <= row) & (column > row - window)
    kinds = {
        "sliding: the window alone": SLIDING,
        f"HCA: all entries of {ratio}": HCA,
        f"CSA: {f'the best {topk}' if topk else 'all'}, overlapping": CSA,
    }
    found = {title: reach(kind, window, ratio, tokens, topk) for title, kind in kinds.items()}
    blind = int((~list(found.values())[1] & (column <= row)).sum())
    picture, panels = new(
        f"Measured: each of {tokens} tokens is changed a little, and each query whose result changes reaches "
        f"it. Of keys the last query reads a window of {min(window, tokens)} and, with all entries of "
        f"{ratio}, {tokens // ratio} more, in place of {tokens}. "
        + (f"HCA misses {blind} pairs, between window and entries." if blind else "HCA misses nothing.")
        + " CSA's entries each see the block before, too.",
        columns=3,
        size=(8.8, 3.7),
        sharey=True,
    )
    looks = ListedColormap([_LATER, _LOST, _ENTRY, _WINDOW])
    for axes, (title, seen) in zip(panels, found.items(), strict=True):
        image = (column <= row).int() + (seen & ~near) + 2 * (seen & near)
        axes.imshow(image.numpy(), cmap=looks, vmin=0, vmax=3, interpolation="nearest")
        axes.set(xlabel="token")
        axes.set_title(title, fontsize=9.5)
        axes.grid(False)
    panels[0].set_ylabel("query")
    names = {"as it is, in the window": _WINDOW, "within an entry": _ENTRY, "not at all": _LOST}
    handles = [Patch(facecolor=colour, edgecolor=MUTED, label=name) for name, colour in names.items()]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return picture


def attention_calls(model: DeepseekV4, ids: Tensor) -> list[tuple[Tensor, list[Part], Tensor]]:
    """What each layer hands to `attend` while the model reads ids (T,): queries, parts and sink."""
    calls = []

    def note(q: Tensor, parts: list[Part], sink: Tensor) -> Tensor:
        calls.append((q, parts, sink.detach()))
        return attend(q, parts, sink)

    with mock.patch.object(attention, "attend", note), torch.no_grad():
        model(ids[None])
    return calls


def attention_mass(q: Tensor, parts: list[Part], sink: Tensor) -> Tensor:
    """How the softmax is shared out between the parts and the sink.

    One more channel for each part, 1 in its keys and 0 in all queries, comes out of `attend` as its mass.

    Args:
        q, parts, sink: as for `dsv4lab.model.attention.attend`.

    Returns:
        (B, T, heads, parts + 1) float32, the sink last; they sum to one.
    """
    marks = torch.eye(len(parts))
    keys = [(k.float(), mark.expand(*k.shape[:2], -1)) for (k, _), mark in zip(parts, marks, strict=True)]
    marked = [(torch.cat(both, -1), mask) for both, (_, mask) in zip(keys, parts, strict=True)]
    mass = attend(F.pad(q.float(), (0, len(parts))), marked, sink)[..., q.shape[-1] :]
    return torch.cat((mass, 1 - mass.sum(-1, keepdim=True)), -1)


@styled
def mass_by_layer(masses: Sequence[Tensor], kinds: Sequence[str]) -> Picture:
    """Draws what share of each head's attention goes to the window, to entries and to the sink.

    Args:
        masses: from `attention_mass`, one for each layer.
        kinds: of attention, for the axis.
    """
    shares = [mass[0].mean(0) for mass in masses]  # (heads, parts + 1)
    shares = [
        s if s.shape[1] == 3 else torch.stack((s[:, 0], torch.zeros(len(s)), s[:, 1]), 1) for s in shares
    ]
    most = max((float(s[h, 2]), layer, h) for layer, s in enumerate(shares) for h in range(len(s)))
    picture, axes = new(
        "Mean over the text of the softmax's weights, summed over the window's keys, over the compressed "
        f"entries, and the sink's. The largest sink is in layer {most[1]}, head {most[2]}: "
        f"{100 * most[0]:.0f} %; its output is that much smaller than without.",
        size=(8.4, 3.8),
    )
    heads = len(shares[0])
    places = np.concatenate([layer * (heads + 1) + np.arange(heads) for layer in range(len(shares))])
    bottom = np.zeros(len(places))
    for i, (name, colour, hatch) in enumerate(_TARGETS):
        values = 100 * torch.cat([s[:, i] for s in shares]).numpy()
        axes.bar(
            places, values, bottom=bottom, color=colour, hatch=hatch, edgecolor=CARD, width=0.9, label=name
        )
        bottom += values
    middle = [layer * (heads + 1) + (heads - 1) / 2 for layer in range(len(shares))]
    axes.set_xticks(middle, [f"{i}\n{kind}" for i, kind in enumerate(kinds)])
    axes.set(
        xlabel=f"layer and its attention, {heads} heads each", ylabel="share of attention (%)", ylim=(0, 100)
    )
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def sink_weights(scores: Tensor, sink: float) -> Tensor:
    """The softmax over scores (heads, n) and a sink: (heads, n + 1), the sink's last.

    Keys are the unit vectors, so that a query's scores are its channels and its output is its weights.
    """
    n = scores.shape[-1]
    out = attend(scores[None, None], [(torch.eye(n)[None], None)], torch.full((len(scores),), sink))[0, 0]
    return torch.cat((out, 1 - out.sum(-1, keepdim=True)), -1)


@styled
def sinks(sink: float = 3.0, match: float = 6.0, keys: int = 12) -> Picture:
    """Draws the weights of a head that finds its key and of one that finds none, with a sink.

    Args:
        sink: its logit.
        match: score of the key that the first head finds; the others score about 0.
        keys: n.
    """
    scores = 0.5 * torch.randn(2, keys, generator=torch.Generator().manual_seed(2))
    scores[0, keys // 2] = match
    weights = sink_weights(scores, sink)
    picture, (bars, curve) = new(
        f"Two heads over the same {keys} keys. With a sink of logit {sink:g}, the head that has found a key "
        f"(score {match:g}) leaves {100 * weights[0, -1]:.0f} % to the sink, the one that finds nothing "
        f"{100 * weights[1, -1]:.0f} %. Without a sink both must share out 100 % among the keys.",
        columns=2,
        size=(8.4, 3.5),
        width_ratios=(1.5, 1),
    )
    logits = torch.linspace(-6, 12, 73)
    for i, name in enumerate(("finds a key", "finds nothing")):
        colour, _, line = SERIES[i]
        place = np.arange(keys + 1) + 0.4 * i - 0.2
        look = {"hatch": "//" * i, "edgecolor": CARD, "color": colour}
        bars.bar(place, 100 * weights[i].numpy(), width=0.4, label=name, **look)
        share = [100 * float(sink_weights(scores, float(s))[i, -1]) for s in logits]
        curve.plot(logits, share, color=colour, linestyle=line, label=name)
    bars.set_xticks([*range(0, keys, 2), keys], [*map(str, range(0, keys, 2)), "sink"])
    bars.set(xlabel="key", ylabel="weight (%)", ylim=(0, 105), title="weights")
    bars.grid(False, axis="x")
    bars.legend(loc="upper left", fontsize=9)
    curve.axvline(sink, color=INK, linestyle=":", linewidth=1.2)
    curve.set(
        xlabel="logit of the sink", ylabel="weight of the sink (%)", ylim=(-3, 103), title="the sink's share"
    )
    return picture


@styled
def rope_arrows(shift: int = 0, angle: float = 0.3, keys: int = 5) -> Picture:
    """Draws one rotating pair of channels of an attention output, before and after it is turned back.

    Args:
        shift: positions by which the whole text is moved.
        angle: that a position turns the pair by, in radians.
        keys: attended to, at positions 0, 1, ...; the query stands at the last one.
    """
    turned = {s: _turned(s, angle, keys) for s in (0, shift)}
    weights = torch.linspace(0.5, 1.5, keys) / keys
    means = {s: [weights @ values for values in both] for s, both in turned.items()}
    moved = [float((there - here).norm()) for here, there in zip(means[0], means[shift], strict=True)]
    picture, panels = new(
        f"Values of {keys} tokens, alike, each turned by its position, and their weighted mean (thick). The "
        f"text stands {shift} positions further on than for the dashed mean. As summed, the mean has moved "
        f"by {moved[0]:.2g}; turned back by the query's position, by {moved[1]:.1g}.",
        columns=2,
        size=(8.4, 3.9),
        sharey=True,
        subplot_kw={"aspect": "equal"},
    )
    for i, (axes, title) in enumerate(zip(panels, ("as summed", "turned back"), strict=True)):
        for j, value in enumerate(turned[shift][i]):
            colour, *_ = SERIES[j % len(SERIES)]
            axes.annotate("", value.tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": colour})
            axes.annotate(f"{j + shift}", (1.13 * value).tolist(), ha="center", va="center", color=colour)
        axes.plot(*zip((0, 0), means[0][i].tolist(), strict=True), color=MUTED, linestyle="--", linewidth=2.5)
        thick = {"arrowstyle": "-|>", "color": INK, "linewidth": 2.5, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", means[shift][i].tolist(), (0, 0), arrowprops=thick)
        axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xlabel="channel 2 i", title=title)
        axes.set_xticks([-1, 0, 1])
        axes.set_yticks([-1, 0, 1])
    panels[0].set_ylabel("channel 2 i + 1")
    return picture


def _turned(shift: int, angle: float, keys: int) -> tuple[Tensor, Tensor]:
    """Like values (keys, 2) at positions from `shift` on, and the same turned back at the last one."""
    by = torch.tensor([angle])
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, keys, 2), rotation(torch.arange(keys) + shift, by))
    query = rotation(torch.full((keys,), keys - 1 + shift), by)
    return turned[0], rotate(turned, query, inverse=True)[0]
