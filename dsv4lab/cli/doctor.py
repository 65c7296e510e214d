"""`dsv4lab doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse

from .common import add_json, command, print_json


def add_parser(commands) -> argparse.ArgumentParser:
    parser = command(commands, "doctor", "Say what this machine can run, and why not the rest.")
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from dsv4lab import device

    report = device.report()
    if args.json:
        print_json(report)
        return
    width = max(map(len, [*report["machine"], *report["backends"]])) + 2
    for name, value in report["machine"].items():
        print(f"{name:{width}}{value}")
    print()
    for name, backend in report["backends"].items():
        print(f"{name:{width}}{'available' if backend['available'] else 'no: ' + backend['reason']}")
