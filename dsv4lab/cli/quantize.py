"""`dsv4lab quantize`: an NVFP4 copy of a checkpoint."""

from __future__ import annotations

import argparse

from .common import add_json, command, print_json, read_text
from .progress import Progress


def add_parser(commands) -> argparse.ArgumentParser:
    about = "Write an NVFP4 copy of a bf16 checkpoint in ModelOpt's form."
    epilog = "Tensors go through one by one. The copy takes its name when it is complete; DST must not exist."
    parser = command(commands, "quantize", about, epilog)
    parser.add_argument("source", metavar="SRC", help="checkpoint folder in bf16 or float32")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="also write input scales, from running the model on a text file or the text given",
    )
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    import os

    from dsv4lab.checkpoint import CheckpointError, load_model, quantize_checkpoint

    if os.path.lexists(args.destination):  # known before a calibration that may take long
        raise CheckpointError(f"{args.destination}: exists already")
    scales = None
    if args.calibrate is not None:
        from .calibrate import input_scales

        scales = input_scales(load_model(args.source), read_text(args.calibrate))
    with Progress("quantizing") as progress:
        report = quantize_checkpoint(args.source, args.destination, input_scales=scales, progress=progress)
    if args.json:
        print_json({"destination": args.destination, "calibrated": scales is not None, **report})
        return
    print(
        f"{args.destination}: {report['quantized']} of {report['tensors']} tensors in NVFP4, "
        f"{report['bytes_out'] / 1e6:.2f} MB, was {report['bytes_in'] / 1e6:.2f} MB"
    )
