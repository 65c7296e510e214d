"""The command line: one module a command, each with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsv4lab import __version__

from . import bench, calibrate, decode, doctor, evaluate, kernels, lab, notebooks, quantize

COMMANDS = (doctor, decode, evaluate, calibrate, quantize, bench, kernels, notebooks, lab)
BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse with one line, not the whole usage, for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="dsv4lab", description="The NVFP4 inference pipeline of DeepSeek-V4.")
    top.add_argument("--version", action="version", version=f"dsv4lab {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Returns:
        0; 2 for bad input, after one line on stderr; 130 when interrupted.
    """
    # Threads that spin while they wait keep the cores from those they wait for: on a busy machine that slowed
    # the nano model down more than tenfold. OpenMP reads this when torch is imported, which the commands do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller: nobody reads it
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # after --help, --version or a wrong argument
        return stop.code if isinstance(stop.code, int) else 0
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"\ndsv4lab {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FloatingPointError, OSError) as error:
        known = isinstance(error, OSError) and error.filename and error.strerror
        message = f"{error.filename}: {error.strerror}" if known else " ".join(str(error).split())
        print(f"dsv4lab {args.command}: {message}", file=sys.stderr)
        return BAD_INPUT
    return 0
