"""Figures about compressed keys: what an entry keeps of a token, which entries are chosen, what they save."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4lab.model import CSA, SLIDING, Cache, ModelConfig
from dsv4lab.model.attention import Attention
from dsv4lab.model.compressor import Compressor
from dsv4lab.model.step import Step

from .style import CARD, INK, MUTED, SERIES, Picture, new, styled

BF16 = 2
GIB = 2**30
V32_LAYERS, V32_WIDTH = 61, 576 + 128  # one MLA vector and one indexer key for each token
_PARTS = ("entries", "indexer keys", "window", "unfinished blocks")


def needle_likeness(ratio: int, gate: float, tokens: int = 256, width: int = 128) -> tuple[Tensor, int]:
    """How alike random tokens' entries are to one of the tokens, the needle.

    The compressor's keys are the tokens themselves. Its gate is what it would be if training had found out
    that needles will be asked for: `gate` for the needle, about 0 for the others.

    Args:
        ratio: tokens in a block.
        gate: logit of the needle in its block's softmax; 0 makes entries means.
        tokens: T, a multiple of the ratio.
        width: D.

    Returns:
        cosines (T / ratio,) between the needle and each entry, and the needle's position.
    """
    r = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, width, generator=r)
    place = tokens * 5 // 8 + 1
    needle = x[0, place]
    pool = Compressor(width, width, ratio, overlap=False, eps=1e-6)
    with torch.no_grad():
        pool.wkv.weight.copy_(torch.eye(width))
        pool.wgate.weight.copy_((gate * needle / needle.square().sum()).expand(width, -1))
        still = {"compressed": torch.zeros(1)}  # nothing turns
        entries = pool(x, Step(torch.arange(tokens), 0, torch.zeros(1, tokens), still, torch.float32))[0]
    return torch.cosine_similarity(entries, needle[None], dim=-1), place


@styled
def needle(ratio: int = 16, gate: float = 2.0, tokens: int = 256) -> Picture:
    """Draws how much of a token is left in its entry.

    Args:
        ratio, gate, tokens: as for `needle_likeness`.
    """
    mean, place = needle_likeness(ratio, 0.0, tokens)
    found, _ = needle_likeness(ratio, gate, tokens)
    entry = place // ratio
    picture, (entries, curve) = new(
        f"Token {place} is asked for. Left: cosine between it and each entry of {ratio} tokens. Right: with "
        f"its own entry, for other ratios; at {ratio} it is {mean[entry]:.2f} for the plain mean, and "
        f"{found[entry]:.2f} where the gate gives this token a logit of {gate:g}.",
        columns=2,
        size=(8.4, 3.5),
        width_ratios=(1.3, 1),
    )
    ratios = [2**i for i in range(8)]
    for name, logit, cosines, (colour, marker, line) in (
        ("mean of the block", 0.0, mean, SERIES[0]),
        (f"gate of {gate:g}", gate, found, SERIES[1]),
    ):
        edges = torch.arange(len(cosines) + 1) * ratio
        entries.stairs(
            cosines.tolist(),
            edges.tolist(),
            color=colour,
            linestyle=line,
            baseline=None,
            linewidth=1.8,
            label=name,
        )
        own = [float(needle_likeness(n, logit, tokens)[0][place // n]) for n in ratios]
        curve.plot(ratios, own, color=colour, marker=marker, linestyle=line, label=name)
    curve.plot(ratios, [n**-0.5 for n in ratios], color=MUTED, linestyle=":", label="1 / √ratio")
    entries.axvline(place + 0.5, color=MUTED, linewidth=0.9, linestyle=":")
    entries.set(
        xlabel="token", ylabel="cosine with the needle", ylim=(-0.4, 1.05), title=f"entries of {ratio}"
    )
    curve.axvline(ratio, color=INK, linestyle=":", linewidth=1.2)
    curve.set_xscale("log", base=2)
    curve.set_xticks(ratios, map(str, ratios))
    curve.set(xlabel="ratio (tokens an entry)", ylim=(-0.4, 1.05), title="the needle's own entry")
    curve.legend(loc="lower left", fontsize=9)
    return picture


def choice_shares(layer: Attention, x: Tensor, step: Step, last: int = 256) -> dict[str, Tensor]:
    """What share of the attention to entries the k best of them get, by whose choice.

    Args:
        layer: a CSA layer.
        x, step: its input (1, T, H), T a multiple of its window, and where it stands.
        last: queries to take the mean over, those that see most.

    Returns:
        for "the most attended", "the indexer's choice" and "chance" the shares (n,) for k = 1 to n entries.
    """
    with torch.no_grad():
        mass, low_rank = layer.entry_shares(x, step)
        scores = layer.indexer.scores(x, low_rank, layer.indexer.compressor(x, step), step)
    entries = mass.shape[-1]
    seen = step.visible(layer.ratio, entries)[-last:]
    mass, scores = mass[0, -last:], scores[0, -last:].masked_fill(~seen, float("-inf"))
    k = torch.arange(1, entries + 1)
    return {
        "the most attended": mass.sort(-1, descending=True).values.cumsum(-1).mean(0),
        "the indexer's choice": mass.gather(-1, scores.argsort(-1, descending=True)).cumsum(-1).mean(0),
        "chance": (k / seen.sum(-1, keepdim=True)).clamp(max=1).mean(0),
    }


@styled
def entry_choices(shares: dict[str, Tensor], topk: int, name: str) -> Picture:
    """Draws how much of the attention a choice of k entries keeps.

    Args:
        shares: from `choice_shares`.
        topk: that the model keeps.
        name: of the layer.
    """
    kept = {who: float(values[topk - 1]) for who, values in shares.items()}
    picture, axes = new(
        f"{name}: share of the attention to compressed entries that the best k of them get, mean over the "
        f"last queries of the text. At k = {topk}, which the model keeps, "
        + ", ".join(f"{who} {100 * value:.0f} %" for who, value in kept.items())
        + ".",
        size=(8.4, 3.5),
    )
    for (who, values), (colour, marker, line) in zip(shares.items(), SERIES, strict=False):
        k = range(1, len(values) + 1)
        marks = [2**i - 1 for i in range(len(values).bit_length())]
        axes.plot(k, 100 * values, color=colour, marker=marker, markevery=marks, linestyle=line, label=who)
    axes.axvline(topk, color=INK, linestyle=":", linewidth=1.2)
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(len(next(iter(shares.values()))).bit_length())]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set(xlabel="k (entries)", ylabel="share of the attention (%)", ylim=(0, 103))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def kept_bytes(config: ModelConfig, tokens: int) -> dict[str, int]:
    """Bytes that a cache in bf16 keeps of one sequence, by what they hold, counted on its real buffers.

    Args:
        config: the model's.
        tokens: of the sequence.
    """
    cache = Cache(config, 1, tokens, device="meta")
    size = dict.fromkeys(_PARTS, 0)
    for layer in cache.layers:
        size["window"] += layer.window.nbytes
        for part, state in (("entries", layer.compressor), ("indexer keys", layer.indexer)):
            if state is not None:
                size[part] += state.entries.nbytes
                size["unfinished blocks"] += state.kv.nbytes + state.gate.nbytes
    return size


def read_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of keys in bf16 that one decode step reads with so many tokens before it."""
    total = 0
    for layer, kind in enumerate(config.layer_types):
        vectors, small = min(tokens, config.sliding_window), 0
        if kind != SLIDING:
            entries = tokens // config.ratio(layer)
            chosen = kind == CSA and entries > config.index_topk
            vectors += config.index_topk if chosen else entries
            small = entries if chosen else 0
        total += BF16 * (vectors * config.head_dim + small * config.index_head_dim)
    return total


def dense_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes in bf16 if every layer kept its one vector of every token; all of them are read, too."""
    return BF16 * config.num_hidden_layers * config.head_dim * tokens


def v32_bytes(tokens: int) -> int:
    """Bytes that DeepSeek-V3.2 keeps in bf16: 61 layers of an MLA vector of 576 and an indexer key of 128."""
    return BF16 * V32_LAYERS * V32_WIDTH * tokens


@styled
def kv_growth(
    name: str = "pro", csa_ratio: int = 4, hca_ratio: int = 128, window: int = 128, topk: int | None = None
) -> Picture:
    """Draws what a sequence's keys take, and what a decode step reads of them, against its length.

    Args:
        name: "flash" or "pro".
        csa_ratio, hca_ratio, window: in place of the model's.
        topk: entries a query of a CSA layer attends to; None for the model's.
    """
    config = getattr(ModelConfig, name)()
    config = replace(config, csa_ratio=csa_ratio, hca_ratio=hca_ratio, sliding_window=window,
                     index_topk=topk or config.index_topk)  # fmt: skip
    contexts = [2**i for i in range(10, 21)]
    kept = [kept_bytes(config, n) for n in contexts]
    full, dense = sum(kept[-1].values()), dense_bytes(config, contexts[-1])
    picture, (left, right) = new(
        f"{name.capitalize()} in bf16. At {contexts[-1]:,} tokens its cache holds {full / GIB:.3g} GiB, "
        f"{full / contexts[-1] / 1000:.3g} kB a token; of it entries {kept[-1]['entries'] / GIB:.3g} GiB and "
        f"indexer keys {kept[-1]['indexer keys'] / GIB:.3g}. Without compression it were {dense / GIB:.3g}, "
        f"and DeepSeek-V3.2's holds {v32_bytes(contexts[-1]) / GIB:.3g}. A step of this "
        f"model reads {read_bytes(config, contexts[-1]) / GIB:.2g} GiB. Counted from the shapes of the "
        "cache; no time was measured.",
        columns=2,
        size=(8.8, 3.8),
        sharey=True,
    )
    series = {
        "all": ([sum(k.values()) for k in kept], SERIES[0]),
        "no compression": ([dense_bytes(config, n) for n in contexts], SERIES[1]),
        "DeepSeek-V3.2": ([v32_bytes(n) for n in contexts], SERIES[2]),
        "indexer keys": ([k["indexer keys"] for k in kept], SERIES[3]),
        "windows": ([k["window"] for k in kept], SERIES[4]),
    }
    for label, (values, (colour, marker, line)) in series.items():
        shown = [v / GIB if v else float("nan") for v in values]
        left.plot(contexts, shown, color=colour, marker=marker, linestyle=line, label=label)
    read = [read_bytes(config, n) / GIB for n in contexts]
    flat = [BF16 * config.num_hidden_layers * config.head_dim * window / GIB] * len(contexts)
    for label, values, (colour, marker, line) in (
        ("read", read, SERIES[0]),
        ("read without compression", [dense_bytes(config, n) / GIB for n in contexts], SERIES[1]),
        ("windows", flat, SERIES[4]),
    ):
        right.plot(contexts, values, color=colour, marker=marker, linestyle=line, label=label)
    ticks = contexts[::2]
    for axes, title in ((left, "kept for a sequence"), (right, "read by one decode step")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{n >> 10}k" if n < 2**20 else "1M" for n in ticks])
        axes.set(xlabel="context (tokens)", title=title)
        axes.legend(loc="upper left", fontsize=8.5, framealpha=0.9, facecolor=CARD, frameon=True)
    left.set_ylabel("keys (GiB)")
    left.set_ylim(None, 8 * max(dense, v32_bytes(contexts[-1])) / GIB * 4)
    return picture
