"""Measured times: the roofline, time against tokens, speed-ups and the parts of a layer, beside models.

What was measured is drawn with marks, from rows that say on what and when. Floors and GPUs that nobody has
measured are lines without marks, and their captions say so.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsv4lab.roofline import RATES, Rates

from .style import BLACK, INK, MUTED, SERIES, Picture, Table, new, styled

DATA = Path(__file__).resolve().parents[2] / "data"
H200, B200 = "NVIDIA H200", "NVIDIA B200"
RUNS = ("hopper", "blackwell")
"""Backends of the package, drawn first."""
BF16 = "bf16"
"""The series of torch's own product in bf16, the baseline of every GEMM's row."""
_TEXT = ("op", "shape", "backend", "baseline", "model", "part", "device", "driver", "torch", "dsv4lab",
         "cutlass_dsl", "peer", "commit", "date")  # fmt: skip


def benchmark_rows(file: Path = DATA / "benchmarks.csv") -> list[dict]:
    """Rows of a CSV file that `dsv4lab bench` or `dsv4lab.bench.layer` wrote, numbers as numbers.

    Of rows about the same thing on the same GPU the last one counts. What a row leaves open is None.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [
            {name: text if name in _TEXT else float(text) if text else None for name, text in row.items()}
            for row in csv.DictReader(stream)
        ]
    keys = ("op", "shape", "backend", "model", "tokens", "part", "device")
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def measured_on(rows: Iterable[dict]) -> str:
    """On what and when rows were measured, for a caption."""
    rows = list(rows)
    devices = sorted({f"{row['device']} (driver {row['driver']})" for row in rows})
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
    return f"Measured on {' and '.join(devices)}, {when}." if rows else "Nothing was measured yet."


def of_linear(rows: Iterable[dict], k: int, n: int, op: str = "linear_w4a16") -> list[dict]:
    """The rows of (T, K) x (N, K), with `t`, by tokens."""
    found = [{**row, "t": int(row["shape"].split("x")[0])} for row in rows if row["op"] == op]
    found = [row for row in found if row["shape"].split("x")[1:] == [str(k), str(n)]]
    return sorted(found, key=lambda row: row["t"])


def linear_series(
    rows: Iterable[dict], k: int, n: int, op: str = "linear_w4a16"
) -> dict[str, dict[int, float]]:
    """Microseconds by tokens, {name: {T: us}}, of each backend and of bf16."""
    series: dict[str, dict[int, float]] = {}
    for row in of_linear(rows, k, n, op):
        series.setdefault(row["backend"], {})[row["t"]] = row["p50_us"]
        if row["baseline_us"]:
            series.setdefault(BF16, {})[row["t"]] = row["baseline_us"]
    return series


def _ours_first(names: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(names), key=lambda name: (name not in RUNS, name))


def linear_work(tokens: int, k: int, n: int, weight_bits: float = 4.5, activation_bits: float = 16):
    """(bytes, flops) of (T, K) x (N, K): weights, activations and a bf16 result, each once."""
    moved = (n * k * weight_bits + tokens * k * activation_bits) / 8 + 2 * tokens * n
    return moved, 2 * tokens * k * n


def limits(tokens: int, k: int, n: int, device: str = H200, fp4: bool = False) -> tuple[float, float]:
    """Microseconds that the bytes of an NVFP4 linear need, and that its arithmetic does. A model."""
    rates = RATES[device]
    moved, flops = linear_work(tokens, k, n, activation_bits=4.5 if fp4 else 16)
    return moved / rates.copy * 1e6, flops / _rate(rates, fp4) * 1e6


def _rate(rates: Rates, fp4: bool) -> float:
    return rates.fp4 if fp4 and rates.fp4 else rates.bf16


def ridge(device: str = H200, fp4: bool = False) -> float:
    """Flops a byte from which arithmetic and not memory sets the time. A model."""
    return _rate(RATES[device], fp4) / RATES[device].copy


@styled
def roofline(rows: Sequence[dict], device: str = H200, models: Sequence[str] = (B200,)) -> Picture:
    """Draws TFLOPS against flops a byte: the roof of a GPU, measured products under it, roofs of models.

    Args:
        rows: of `benchmark_rows`; those with flops are drawn.
        device: whose rows they are.
        models: GPUs whose roofs are drawn without a measurement.
    """
    found = [row for row in rows if row["device"] == device and row["tflops"] and row["bytes"]]
    names = " and ".join(name.removeprefix("NVIDIA ") for name in models)
    caption = f"{measured_on(found)} The roof's rates: {RATES[device].source}."
    if models:
        caption += f" {names}: a model from {RATES[models[0]].source}."
    picture, axes = new(caption, size=(8.4, 4.6))
    bends = [ridge(name, name != device) for name in (device, *models)]
    intensity = sorted([0.5, 8192.0, *bends])
    for name, fp4, style in ((device, False, "-"), *((name, True, ":") for name in models)):
        rate = _rate(RATES[name], fp4)
        roof = [min(x * RATES[name].copy, rate) / 1e12 for x in intensity]
        label = name.removeprefix("NVIDIA ") + (", FP4, model" if fp4 else "")
        axes.plot(intensity, roof, color=INK if name == device else MUTED, linestyle=style, label=label)
    backends = _ours_first(row["backend"] for row in found)
    for name, (color, marker, _) in zip(backends, SERIES, strict=False):
        points = [(row["flops"] / row["bytes"], row["tflops"]) for row in found if row["backend"] == name]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle="", label=name)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="TFLOPS")
    axes.legend(loc="lower right")
    return picture


@styled
def time_against_tokens(rows: Sequence[dict], k: int, n: int, device: str = H200) -> Picture:
    """Draws microseconds of one linear against tokens: what was measured, and the floor of bytes and flops.

    Args:
        rows: of `benchmark_rows`.
        k, n: of the weight.
        device: whose rates the floor takes.
    """
    series = linear_series(rows, k, n)
    caption = f"K = {k}, N = {n}, weights NVFP4 and activations bf16. {measured_on(of_linear(rows, k, n))}"
    picture, axes = new(f"{caption} The floor is a model.", size=(8.4, 4.2))
    for name, (color, marker, style) in zip(_ours_first(series), SERIES, strict=False):
        label = "torch in bf16" if name == BF16 else name
        points = sorted(series[name].items())
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=style, label=label)
    tokens = [2**i for i in range(13)]
    floor = [max(limits(t, k, n, device)) for t in tokens]
    axes.plot(tokens, floor, color=MUTED, linestyle=":", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
    axes.legend()
    return picture


def speedup_table(rows: Sequence[dict], tokens: int) -> list[tuple[str, float | None, float | None]]:
    """(K x N, times as fast as bf16, times as fast as the best peer) of the hopper kernels for T tokens."""
    shapes = dict.fromkeys(
        tuple(map(int, row["shape"].split("x")[1:])) for row in rows if row["op"] == "linear_w4a16"
    )
    table = []
    for k, n in shapes:
        times = {name: by_t[tokens] for name, by_t in linear_series(rows, k, n).items() if tokens in by_t}
        ours = times.pop("hopper", None)
        if ours:
            bf16 = times.pop(BF16, None)
            peers = min(times.values(), default=None)
            table.append((f"{k} x {n}", bf16 and bf16 / ours, peers and peers / ours))
    return table


@styled
def speedups(rows: Sequence[dict], tokens: int) -> Picture:
    """Draws how many times as fast as bf16, and as the best peer, the hopper kernels are.

    Args:
        rows: of `benchmark_rows`.
        tokens: T.
    """
    table = speedup_table(rows, tokens)
    found = [row for row in rows if row["op"] == "linear_w4a16" and row["shape"].startswith(f"{tokens}x")]
    caption = f"{tokens} tokens, weights NVFP4 and activations bf16. {measured_on(found)}"
    picture, axes = new(caption, size=(8.4, 1.2 + 0.5 * len(table)))
    for i, (name, shift) in enumerate((("over torch in bf16", 0.2), ("over the best peer", -0.2))):
        values = [row[1 + i] or 0 for row in table]
        places = [len(table) - 1 - j + shift for j in range(len(table))]
        axes.barh(places, values, height=0.36, color=SERIES[i][0], label=name)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.2f}" if value else "not measured", (value, place), (3, 0),
                          textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.axvline(1, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(table)), [row[0] for row in table][::-1])
    axes.set(xlabel="times as fast")
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def best_of_quantizing(rows: Sequence[dict]) -> Table:
    """The quantize family: microseconds, and the share of the floor, for few rows and for many."""
    found = [row for row in rows if row["shape"].count("x") == 1 and row["backend"] == "hopper"]
    table = [
        (row["op"], row["shape"], row["p50_us"], row["tb_per_s"], f"{row['share_of_floor']:.0%}")
        for row in found
    ]
    heads = ["operation", "rows x columns", "time (us)", "TB/s", "of the floor"]
    return Table(heads, table, measured_on(found))


@styled
def bound_by(tokens: int = 16, k: int = 7168, n: int = 6144, device: str = H200) -> Picture:
    """Draws what bounds an NVFP4 linear: the time of its bytes and of its arithmetic, against tokens.

    Args:
        tokens: marked in the figure.
        k, n: of the weight.
        device: whose rates are taken; on a B200 both operands are FP4.
    """
    fp4 = RATES[device].fp4 is not None
    by_bytes, by_flops = limits(tokens, k, n, device, fp4)
    bound = "bytes" if by_bytes > by_flops else "flops"
    picture, axes = new(
        f"A model, not a measurement: {device}, {RATES[device].source}. {tokens} tokens are bound by "
        f"{bound}: {by_bytes:.1f} us to move the bytes, {by_flops:.1f} us to compute.",
        size=(8.4, 3.8),
    )
    axis = [2**i for i in range(13)]
    for i, name in enumerate(("bytes", "flops")):
        color, _, style = SERIES[i]
        times = [limits(t, k, n, device, fp4)[i] for t in axis]
        axes.plot(axis, times, color=color, linestyle=style, label=name)
    axes.plot([tokens], [max(by_bytes, by_flops)], "o", color=INK)
    axes.axvline(tokens, color=MUTED, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds at least")
    axes.legend()
    return picture


def layer_parts(rows: Sequence[dict], model: str) -> dict[int, dict[str, tuple[float, float]]]:
    """(microseconds, floor) of each part of a layer's step, by tokens; without the step as a whole."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row["model"] == model and row["part"] != "step":
            found.setdefault(int(row["tokens"]), {})[row["part"]] = (row["p50_us"], row["floor_us"] or 0.0)
    return dict(sorted(found.items()))


@styled
def layer_bars(rows: Sequence[dict], model: str) -> Picture:
    """Draws the parts of a layer's decode step on top of each other, beside the sum of their floors.

    Args:
        rows: of `benchmark_rows(DATA / "layers.csv")`.
        model: "flash" or "pro".

    Raises:
        ValueError: no row is of that model.
    """
    parts = layer_parts(rows, model)
    if not parts:
        raise ValueError(f"rows must hold parts of {model!r}, got {sorted({row['model'] for row in rows})}")
    mine = [row for row in rows if row["model"] == model]
    caption = f"One layer of {model} with random weights, a decode step in a CUDA graph. {measured_on(mine)} "
    picture, axes = new(
        caption + "The floor is a model: the bytes of the weights that are read.", size=(8.4, 4.6)
    )
    names = list(dict.fromkeys(name for by_name in parts.values() for name in by_name))
    bottoms = [0.0] * len(parts)
    for i, name in enumerate(names):
        heights = [by_name.get(name, (0.0, 0.0))[0] for by_name in parts.values()]
        hatch = ("", "//", "..")[i // len(SERIES)]
        axes.bar(range(len(parts)), heights, 0.62, bottoms, color=SERIES[i % len(SERIES)][0], label=name,
                 hatch=hatch, edgecolor="white", linewidth=0.5)  # fmt: skip
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for i, by_name in enumerate(parts.values()):
        floor = sum(value for _, value in by_name.values())
        axes.plot([i - 0.42, i + 0.42], [floor, floor], color=INK, label="sum of floors" if i == 0 else None)
    axes.set_xticks(range(len(parts)), [str(tokens) for tokens in parts])
    axes.set(xlabel="sequences, one token each", ylabel="microseconds")
    axes.grid(False, axis="x")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture
