"""`dsv4lab evaluate`: bits per byte on held-out text, and what NVFP4 changes."""

from __future__ import annotations

import argparse

from .common import add_json, add_model, command, load_model, positive, print_json, print_table, say
from .progress import Progress

DEFAULT_BYTES = 16384


def add_parser(commands) -> argparse.ArgumentParser:
    about = "Measure bits per byte on held-out text, in bf16 and in NVFP4 under every scale policy."
    epilog = (
        "The text is the running Python's standard library, as far as the model was not trained on it. "
        "SQNR is of the residual streams after a layer, agreement of the most likely byte; both against bf16."
    )
    parser = command(commands, "evaluate", about, epilog)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--max-bytes",
        type=positive,
        default=DEFAULT_BYTES,
        metavar="N",
        help=f"judge the first N bytes (default: {DEFAULT_BYTES})",
    )
    size.add_argument(
        "--all", action="store_true", help="judge the whole text, which takes long without a GPU"
    )
    add_model(parser)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from dsv4lab.corpus import evaluation_text
    from dsv4lab.evaluate import evaluate

    text = evaluation_text()
    model = load_model(args)
    variants = _possible(model)
    with Progress("evaluating") as progress:
        report = evaluate(
            model, text, variants, max_bytes=None if args.all else args.max_bytes, progress=progress
        )
    if args.json:
        print_json(report)
    else:
        print_report(report)


def _possible(model) -> list:
    """The variants a model can run: an NVFP4 one has no bf16 side, and only its own static scales."""
    from dsv4lab.evaluate import VARIANTS, is_quantized
    from dsv4lab.layers import quantizable_layers

    if not is_quantized(model):
        return list(VARIANTS)
    scaled = all(layer.input_scale is not None for _, layer in quantizable_layers(model))
    if not scaled:
        say("evaluate: the checkpoint has no input scales: the static policy is left out")
    return [v for v in VARIANTS if v.precision == "nvfp4" and (scaled or v.activation_scale != "static")]


def print_report(report: dict) -> None:
    """The report of `dsv4lab.evaluate.evaluate` as a table."""
    text = report["text"]
    print(
        f"{text['bytes']:,} bytes of {text['files']} files out of {text['all_bytes']:,} held out, of Python "
        f"{text['python']}'s library; xz -9 takes {text['xz_bits_per_byte']:.3f} bits per byte of them all"
    )
    header = ["", "bits/byte", "of xz", "over bf16", "agreement", "SQNR first", "last layer", "logits"]
    print_table(header, [_row(variant) for variant in report["variants"]])


def _row(v: dict) -> list[str]:
    layers = v["sqnr_db_per_layer"] or [None, None]
    cells = [
        _cell(v["bits_per_byte"], "{:.3f}"),
        _cell(v["ratio_to_xz"], "{:.3f}"),
        _cell(v["over_bf16"], "{:+.2%}"),
        _cell(v["token_agreement"], "{:.2%}"),
        _cell(layers[0], "{:.1f} dB"),
        _cell(layers[-1], "{:.1f} dB"),
        _cell(v["sqnr_db_logits"], "{:.1f} dB"),
    ]
    if v["precision"] == "bf16":
        cells[2] = "-"
    return [v["name"], *cells]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
