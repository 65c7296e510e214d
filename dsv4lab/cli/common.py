"""What several commands share: arguments, the model they name, text to calibrate on, output."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from .progress import Progress

POLICIES = ("tensor", "token", "static", "bound")


def command(commands, name: str, about: str, epilog: str = "") -> argparse.ArgumentParser:
    """Add a command whose help begins with `about`."""
    return commands.add_parser(name, help=about, description=about, epilog=epilog)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model and --device."""
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder (default: the nano model shipped with dsv4lab)"
    )
    parser.add_argument("--device", default="cpu", help="torch device to run on (default: cpu)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """An argument that starts a random generator: torch takes 64 bits, signed or not."""
    try:
        value = int(text)
    except ValueError:
        value = 2**64
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number of at most 64 bits, got {text!r}")
    return value


def say(message: str) -> None:
    """A remark for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(value) -> None:
    """One JSON object, in which what is no number is null."""

    def plain(item):
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [plain(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table in plain text, the first column left and the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        print("  ".join(cells).rstrip())


def load_model(args: argparse.Namespace):
    """The model that --model names, on --device."""
    import torch

    from dsv4lab.checkpoint import NANO, load_model

    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("--device meta: holds no values to compute with")
    if args.model is None and not NANO.is_dir():
        raise ValueError(
            f"{NANO}: no such folder; nano comes with the repository, not with a wheel: give --model"
        )
    folder = NANO if args.model is None else args.model
    with Progress("reading") as progress:
        return load_model(folder, device=device, progress=progress)


def read_text(argument: str) -> bytes:
    """A text to calibrate on: the file of that name, or the words themselves."""
    if not argument:
        raise ValueError("text to calibrate on is empty")
    file = Path(argument)
    if len(argument) < 4096 and "\n" not in argument and file.exists():
        return file.read_bytes()
    if not any(c.isspace() for c in argument):
        raise ValueError(f"{argument}: no such file (and no text: one has spaces)")
    return argument.encode("utf-8", "surrogateescape")
