"""`dsv4lab notebooks`: copies of the notebooks to hand out, or a book of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import command, say
from .progress import Progress


def add_parser(commands) -> argparse.ArgumentParser:
    about = "Copy the notebooks to a folder, for learners or for teachers, or make HTML pages of them."
    epilog = "Copies run in any folder with dsv4lab's Python. Files that are there already are not replaced."
    parser = command(commands, "notebooks", about, epilog)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write")
    solutions = parser.add_mutually_exclusive_group()
    solutions.add_argument(
        "--hide-solutions", dest="solutions", action="store_const", const="hidden",
        help="leave out the exercises' solutions; their stubs stay",
    )  # fmt: skip
    solutions.add_argument(
        "--show-solutions", dest="solutions", action="store_const", const="shown",
        help="unfold the solutions (default: folded below their stubs)",
    )  # fmt: skip
    parser.add_argument(
        "--html",
        action="store_true",
        help="run the notebooks and write them as pages, which need no server and replace older ones",
    )
    parser.set_defaults(solutions="folded")
    return parser


def run(args: argparse.Namespace) -> None:
    from dsv4lab import course

    if not args.html:
        files = course.copy(args.folder, args.solutions)
    else:
        with Progress("running") as progress:
            files = course.write_book(args.folder, args.solutions, progress)
    say(f"{args.folder}: {len(files)} files written, {files[0].name} to {files[-1].name}")
