"""`dsv4lab lab`: JupyterLab on the notebooks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from .common import command

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = command(
        commands, "lab", "Open JupyterLab on the notebooks.", "Other arguments after -- go to JupyterLab."
    )
    parser.add_argument(
        "jupyter", nargs="*", metavar="ARGUMENT", help="passed on to JupyterLab, such as -- --no-browser"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    if not NOTEBOOKS.is_dir():
        raise ValueError(
            f"{NOTEBOOKS}: no such folder; the notebooks come with the repository, not with a wheel"
        )
    if importlib.util.find_spec("jupyterlab") is None:
        raise ValueError("jupyterlab is not installed")
    sys.stdout.flush()
    os.chdir(NOTEBOOKS)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *args.jupyter])
