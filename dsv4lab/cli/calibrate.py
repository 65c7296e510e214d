"""`dsv4lab calibrate`: the range of every linear's input, and the static scale that follows."""

from __future__ import annotations

import argparse

from .common import add_json, add_model, command, load_model, print_json, print_table, read_text
from .progress import Progress


def add_parser(commands) -> argparse.ArgumentParser:
    about = "Record the largest input of every linear on a text, and print the input scales."
    parser = command(
        commands, "calibrate", about, "`dsv4lab quantize --calibrate` writes them into a checkpoint."
    )
    parser.add_argument(
        "--text",
        metavar="TEXT",
        help="a text file, or the text itself (default: files of the running Python's library)",
    )
    add_model(parser)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    text = None if args.text is None else read_text(args.text)
    scales = input_scales(load_model(args), text)
    if args.json:
        print_json(
            {
                name: {"input_scale": scale.tolist(), "amax": (scale * 2688).tolist()}
                for name, scale in scales.items()
            }
        )
        return
    rows = [[name, f"{scale.max() * 2688:.4g}", f"{scale.max():.4g}"] for name, scale in scales.items()]
    print_table(["linear (largest of its experts or groups)", "amax", "input_scale"], rows)


def input_scales(model, text: bytes | None) -> dict:
    """The input scale of every quantizable linear by name, from a text or the default one, with progress."""
    from dsv4lab.calibration import calibrate
    from dsv4lab.evaluate import calibration_batches

    batches = calibration_batches(model, text)
    with Progress("calibrating") as progress:

        def shown():
            for i, batch in enumerate(batches):
                progress(i, len(batches))
                yield batch

        return calibrate(model, shown())
