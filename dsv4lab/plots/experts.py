"""Figures about a mixture of experts: routing, load, padded groups, and bytes of the experts touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.patches import Patch
from torch import Tensor

from dsv4lab.formats import ceil_to
from dsv4lab.layers.dispatch import dispatch
from dsv4lab.layouts import GROUP_ROWS, max_group_rows
from dsv4lab.model import ModelConfig
from dsv4lab.roofline import RATES, Rates

from .style import BLUE, CARD, INK, MUTED, RED, SERIES, Picture, Table, new, styled

CODE_BYTES, BF16_BYTES = 4.5 / 8, 2
_PADDING = {"facecolor": "#e4e4e0", "edgecolor": MUTED, "hatch": "//", "linewidth": 0.5}
_CHOSEN = "#e8a35c"


@styled
def routing(scores: Tensor, bias: Tensor | None, chosen: Tensor, weights: Tensor) -> Picture:
    """Draws how one token comes to its experts and to their weights.

    Args:
        scores: (E,) of the experts.
        bias: (E,) added for the choice, or None.
        chosen: (k,) expert ids.
        weights: (k,) routing weights.
    """
    experts, k = len(scores), len(chosen)
    picture, (score, weight) = new(
        f"One token and {experts} experts. Left: scores, and where the bias moves them for the choice; the "
        f"{k} highest are taken. Right: weights of those, in proportion to their scores without the bias; "
        f"they sum to {float(weights.sum()):.3g}.",
        columns=2,
        size=(8.4, 3.3),
        width_ratios=(1.6, 1),
    )
    taken = set(chosen.tolist())
    colours = [_CHOSEN if e in taken else "#d9d9d4" for e in range(experts)]
    hatches = ["//" if e in taken else "" for e in range(experts)]
    score.bar(range(experts), scores.tolist(), color=colours, hatch=hatches, edgecolor=MUTED, width=0.8)
    moved = scores if bias is None else scores + bias
    score.plot(range(experts), moved.tolist(), "_", color=INK, markersize=16, markeredgewidth=2.2)
    least = float(moved[chosen].min())
    score.axhline(least, color=RED, linestyle="--", linewidth=1.1)
    handles = [
        Patch(facecolor=_CHOSEN, edgecolor=MUTED, hatch="//", label="chosen"),
        Patch(facecolor="#d9d9d4", edgecolor=MUTED, label="not chosen"),
    ]
    marks = score.plot([], [], "_", color=INK, markersize=12, markeredgewidth=2.2, label="with bias")
    marks += score.plot([], [], "--", color=RED, label="lowest chosen")
    score.set_ylim(min(0.0, float(moved.min())), 1.35 * float(max(moved.max(), scores.max())))
    score.legend(handles=[*handles, *marks], loc="upper center", ncols=4, fontsize=8, columnspacing=1.0)
    score.set(xlabel="expert", ylabel="sqrt(softplus(W x))", title="choice")
    weight.bar(
        [str(e) for e in chosen.tolist()], weights.tolist(), color=_CHOSEN, hatch="//", edgecolor=MUTED
    )
    for i, value in enumerate(weights.tolist()):
        weight.annotate(f"{value:.2f}", (i, value), (0, 3), textcoords="offset points", ha="center")
    weight.set(xlabel="expert, in the order of choice", ylabel="routing weight", title="weights")
    weight.margins(y=0.15)
    for axes in (score, weight):
        axes.grid(False, axis="x")
    if experts <= 16:
        score.set_xticks(range(experts))
    return picture


@styled
def expert_load(sizes: dict[str, Tensor]) -> Picture:
    """Draws how many copies of tokens each expert gets.

    Args:
        sizes: name of a layer to (E,) copies for each expert.
    """
    worst = {name: float(s.max() / s.float().mean()) for name, s in sizes.items()}
    picture, axes = new(
        "Copies of tokens that each expert gets. The busiest has "
        + ", ".join(f"{value:.2g} times the mean ({name})" for name, value in worst.items())
        + ".",
        size=(8.4, 3.1),
    )
    experts, count = len(next(iter(sizes.values()))), len(sizes)
    for i, ((name, s), (colour, *_)) in enumerate(zip(sizes.items(), SERIES, strict=False)):
        places = [e + (i + 0.5) / (count + 0.5) - 0.5 for e in range(experts)]
        hatch = ("", "//", "..", "xx")[i % 4]
        axes.bar(
            places, s.tolist(), 0.9 / (count + 0.5), color=colour, hatch=hatch, edgecolor=CARD, label=name
        )
    mean = float(next(iter(sizes.values())).float().mean())
    axes.axhline(mean, color=INK, linestyle="--", linewidth=1.1, label="all alike")
    axes.set(xlabel="expert", ylabel="copies of tokens")
    if experts <= 16:
        axes.set_xticks(range(experts))
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


@styled
def dispatch_rows(chosen: Tensor, experts: int) -> Picture:
    """Draws which row of the padded buffer each copy of each token goes to.

    Args:
        chosen: (T, k) expert ids.
        experts: E.
    """
    tokens, k = chosen.shape
    route = dispatch(chosen, experts)
    ends, sizes = route.offsets.tolist(), route.sizes.tolist()
    used = ends[-1]
    picture, axes = new(
        f"{tokens} tokens × {k} copies = {tokens * k} rows, in {used} rows with the padding of {experts} "
        f"experts, in a buffer of {route.rows}, which is enough for any routing. Each mark is a copy; within "
        "an expert's group tokens keep their order.",
        size=(8.4, 3.7),
    )
    start = 0
    for e, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        colour, marker, _ = SERIES[e % len(SERIES)]
        mine = (chosen.flatten() == e).nonzero()[:, 0]
        token = (mine // k).tolist()
        axes.plot(route.slot[mine].tolist(), token, marker, color=colour, markersize=3.5)
        if end > start:
            axes.axvspan(start + size, end, **_PADDING)
            axes.annotate(f"{e}", ((start + end) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center",
                          color=colour, weight="bold")  # fmt: skip
        axes.axvline(end, color=INK, linewidth=0.8)
        start = end
    axes.axvspan(used, route.rows, facecolor="#f1f1ec", edgecolor=MUTED, linewidth=0.5)
    axes.set(xlim=(0, route.rows), ylim=(tokens, -1), xlabel="row of the buffer", ylabel="token")
    axes.annotate("expert", (-0.01, 1.02), xycoords="axes fraction", ha="right")
    axes.set_xticks(range(0, route.rows + 1, GROUP_ROWS * max(1, round(route.rows / 12 / GROUP_ROWS))))
    axes.grid(False)
    handles = [
        Patch(**_PADDING, label="padding to 128"),
        Patch(facecolor="#f1f1ec", edgecolor=MUTED, label="rest of the buffer"),
    ]
    picture.figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return picture


def random_routing(tokens: int, experts: int, top_k: int, skew: float = 0.0, seed: int = 0) -> Tensor:
    """Random experts for each token, (T, k) int64, k different ones.

    Args:
        tokens, experts, top_k: T, E and k.
        skew: standard deviation of the logarithm of the experts' popularity; 0 makes all alike.
        seed: of the random numbers.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must lie within 1 and experts = {experts}, got {top_k}")
    r = torch.Generator().manual_seed(seed)
    popularity = skew * torch.randn(experts, generator=r)
    luck = -torch.rand(tokens, experts, generator=r).clamp_min(1e-12).log()
    return (popularity - luck.clamp_min(1e-12).log()).topk(top_k, dim=-1).indices


def expected_touched(tokens: int, experts: int, top_k: int) -> float:
    """How many experts T tokens visit on average, each of them k different ones, all equally likely."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@styled
def moe_padding(tokens: int = 64, experts: int = 256, top_k: int = 6, skew: float = 0.0, hidden: int = 4096,
                width: int = 2048) -> Picture:  # fmt: skip
    """Draws what groups of a random routing take: rows, rows multiplied for nothing, and bytes.

    Args:
        tokens, experts, top_k: T, E and k <= E.
        skew: see `random_routing`.
        hidden, width: H and I, which decide about the bytes.
    """
    top_k = min(top_k, experts)
    sizes = torch.bincount(random_routing(tokens, experts, top_k, skew).flatten(), minlength=experts)
    sizes = sizes.sort(descending=True).values
    rows = {"real": tokens * top_k}
    rows |= {f"tiles of {n}": int(sum(ceil_to(s, n) for s in sizes.tolist())) for n in (8, GROUP_ROWS)}
    rows["buffer"] = max_group_rows(tokens, top_k, experts)
    touched, expert = int((sizes > 0).sum()), 3 * hidden * width * CODE_BYTES
    act = tokens * top_k * ((hidden + 2 * width) * CODE_BYTES + 2 * hidden * BF16_BYTES)
    size = {"activations": act, "experts touched": touched * expert, "all experts": experts * expert}
    waste = 1 - rows["real"] / rows[f"tiles of {GROUP_ROWS}"]
    picture, (groups, left, right) = new(
        f"{tokens:,} tokens × {top_k} of {experts} experts. {touched} experts are touched, "
        f"{_short(touched * expert / 1e6)} MB of weights or {_short(touched * expert / tokens / 1e6)} MB a "
        f"token. {100 * waste:.3g} % of the rows in tiles of 128 are padding. H = {hidden}, I = {width}; "
        "counted from the shapes.",
        columns=3,
        size=(8.4, 3.5),
        width_ratios=(1.3, 1, 1),
    )
    padded = [ceil_to(s, GROUP_ROWS) for s in sizes.tolist()]
    edges = range(experts + 1)
    groups.stairs(padded, edges, fill=True, **_PADDING)
    groups.stairs(sizes.tolist(), edges, fill=True, color=BLUE)
    groups.set(xlabel="expert, busiest first", ylabel="rows of its group", title="groups")
    groups.set_ylim(0, max(max(padded), 1) * 1.08)
    for axes, values, unit, title in (
        (left, rows, "rows", "rows"),
        (right, {n: v / 1e6 for n, v in size.items()}, "size (MB)", "bytes"),
    ):
        names = list(values)[::-1]
        axes.plot([values[n] for n in names], names, "o", color=BLUE, markersize=8)
        for name in names:
            axes.annotate(
                _short(values[name]), (values[name], name), (7, 0), textcoords="offset points", va="center",
                fontsize=8.5,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(min(values.values()) / 3, max(values.values()) * 20)
        axes.set_ylim(-0.5, len(names) - 0.5)
        axes.set(xlabel=f"{unit}, log scale", title=title)
        axes.tick_params(axis="y", labelsize=8.5)
    return picture


def _peak(rates: Rates) -> float:
    return rates.fp4 or rates.bf16


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def moe_work(config: ModelConfig, tokens: int) -> dict[str, float]:
    """What the routed experts of all layers cost in one step, if experts are equally likely.

    Args:
        config: of the model.
        tokens: T of the step.

    Returns:
        "touched": experts a layer; "weights" and "activations": bytes; "flops".
    """
    c, layers = config, config.num_hidden_layers
    touched = expected_touched(tokens, c.n_routed_experts, c.num_experts_per_tok)
    weights = 3 * c.hidden_size * c.moe_intermediate_size
    copies = tokens * c.num_experts_per_tok
    row = (c.hidden_size + 2 * c.moe_intermediate_size) * CODE_BYTES + 2 * c.hidden_size * BF16_BYTES
    return {
        "touched": touched,
        "weights": layers * touched * weights * CODE_BYTES,
        "activations": layers * copies * row,
        "flops": layers * copies * 2 * weights,
    }


@styled
def expert_bytes(models: dict[str, ModelConfig], most: int = 65536, device: str = "NVIDIA B200") -> Picture:
    """Draws the bytes of touched experts and the flops for each byte over the tokens of a step.

    Args:
        models: name to config.
        most: tokens, a power of two.
        device: whose rates to compare with, see `roofline.RATES`.
    """
    rates = RATES[device]
    ridge = _peak(rates) / rates.copy
    picture, (size, work) = new(
        "Left: weights of the routed experts that a step reads in all layers; dashed, all there are. Right: "
        f"flops for each byte, activations counted too; above the line, {ridge:,.0f}, tensor cores would "
        f"bound an {device}, below it memory. Counted from the shapes for equally likely experts. Rates: "
        f"{rates.source}.",
        columns=2,
        size=(8.4, 3.7),
    )
    tokens = [2**i for i in range(most.bit_length())]
    for (name, config), (colour, marker, line) in zip(models.items(), SERIES, strict=False):
        found = [moe_work(config, t) for t in tokens]
        style = {"color": colour, "marker": marker, "linestyle": line, "markevery": 2, "label": name}
        size.plot(tokens, [f["weights"] / 1e9 for f in found], **style)
        everything = moe_work(config, 1)["weights"] / config.num_experts_per_tok * config.n_routed_experts
        size.axhline(everything / 1e9, color=colour, linewidth=0.9, linestyle="--")
        work.plot(tokens, [f["flops"] / (f["weights"] + f["activations"]) for f in found], **style)
    work.axhline(ridge, color=INK, linewidth=1.2, linestyle="--")
    for axes in (size, work):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of the step")
        axes.legend(loc="lower right")
    size.set(ylabel="weights read (GB)", title="bytes of the experts touched")
    work.set(ylabel="flops for each byte", title="what a byte is good for")
    return picture


def decode_costs(models: dict[str, ModelConfig], tokens: Sequence[int], device: str = "NVIDIA B200") -> Table:
    """Returns what routed experts cost a step of decoding.

    Args:
        models: name to config.
        tokens: T of the steps.
        device: whose rates give the least time, see `roofline.RATES`.
    """
    rates, rows = RATES[device], []
    for name, config in models.items():
        for t in tokens:
            w = moe_work(config, t)
            seconds = max((w["weights"] + w["activations"]) / rates.copy, w["flops"] / _peak(rates))
            share = f"{w['touched']:.1f} of {config.n_routed_experts}"
            gb = w["weights"] / 1e9
            rows.append((name, t, share, gb, gb / t, 1e3 * seconds, t / seconds))
    return Table(
        [
            "model",
            "tokens",
            "experts touched",
            "weights read (GB)",
            "a token (GB)",
            "least time (ms)",
            "tokens / s, most",
        ],
        rows,
        f"Routed experts of all layers alone, equally likely, on one {device} that had room for them. "
        f"Counted from the shapes; rates: {rates.source}.",
    )
