"""`dsv4lab kernels`: what the compiler made of the kernels, and what products cost in the emulator."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_json, command, print_json, print_table
from .progress import Progress

ARCHITECTURES = ("sm_100a", "sm_103a", "sm_90a")
COLUMNS = (
    ("name", "kernel"), ("registers", "regs"), ("shared_bytes", "shared"), ("stages", "stages"),
    ("stack_bytes", "stack"), ("spills", "spills"), ("instructions", "instr"), ("main_loop", "loop"),
    ("utcomma", "UTCOMMA"), ("hgmma", "HGMMA"), ("hmma", "HMMA"), ("to_e2m1", "E2M1"),
)  # fmt: skip
"""Of the table: key, title."""
COSTS = (
    ("op", "op"), ("shape", "shape"), ("ctas", "CTAs"), ("instructions", "instr"),
    ("fetched_bytes", "fetched"), ("needed_bytes", "bytes"), ("multiplied_flops", "multiplied"),
    ("needed_flops", "flops"), ("model_b200_us", "model us"), ("bound_by", "bound by"),
)  # fmt: skip
PRODUCTS = ("linear", "grouped_mm", "grouped_mm_swiglu")
SHAPES = ("1x4096x1024", "16x4096x1024", "256x1024x512", "32x512x256x8x2")


def add_parser(commands) -> argparse.ArgumentParser:
    about = "Compile every kernel that the models' operations take, and print what the compiler made of it."
    epilog = (
        "Registers are those of a thread at its start, shared memory is a CTA's in bytes, loop the "
        "instructions of a product's main loop; UTCOMMA are block-scaled MMAs, HGMMA those of a warpgroup, "
        "HMMA of a warp, E2M1 conversions to FP4. This takes minutes, and no GPU. The table kept in the "
        "repository is made by --arch sm_100a,sm_103a,sm_90a --csv data/kernels.csv."
    )
    parser = command(commands, "kernels", about, epilog)
    parser.add_argument(
        "--arch", metavar="NAME[,...]", type=_architectures, default=["sm_100a"],
        help="sm_100a, sm_103a or sm_90a (default: sm_100a)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes",
        metavar="MODEL:T[,...]",
        type=_sizes,
        help="such as flash:16,nano:1 (default: what is kept)",
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the table to a file")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="instead, run some products in the emulator and count what they do",
    )
    parser.add_argument(
        "--shapes", metavar="SPEC[,...]", type=lambda text: text.split(","), default=list(SHAPES),
        help="of --cost: TxKxN, or TxKxNxGxk of G groups of which each token takes k",
    )  # fmt: skip
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.csv and not args.csv.parent.is_dir():
        raise ValueError(f"{args.csv.parent}: no such folder")
    if args.cost:
        print_costs(args)
        return
    from functools import partial

    from dsv4lab.kernels import table, uses

    sizes, rows = args.sizes or uses.SIZES, []
    for arch in args.arch:
        with Progress(arch) as progress:
            rows += table.make_rows(arch, partial(uses.uses, sizes), progress)
    if args.csv:
        args.csv.write_text(table.as_csv(rows), encoding="utf-8")
    if args.json:
        print_json({"rows": [vars(row) for row in rows]})
        return
    for arch in args.arch:
        mine = [
            {**vars(row), "name": f"{row.kernel} {row.configuration}"} for row in rows if row.arch == arch
        ]
        print(f"{arch}: {len(mine)} kernels, nvidia-cutlass-dsl {mine[0]['cutlass_dsl']}")
        _print(COLUMNS, mine)


def print_costs(args: argparse.Namespace) -> None:
    """What products cost, and the model of their time."""
    from dsv4lab.bench.shapes import select
    from dsv4lab.kernels import cost

    cases = [case for case in select(None, args.shapes, "reference", "cpu") if case.kind in PRODUCTS]
    if not cases:
        raise ValueError("--shapes names no product: they need TxKxN or TxKxNxGxk")
    with Progress("running") as progress:
        found = []
        for i, case in enumerate(cases):
            progress(i, len(cases), f"{case.kind} {case.size}")
            found.append(cost.count(case).as_dict())
    if args.json:
        print_json({"model": cost.B200.source, "results": found})
        return
    print(
        "Counted in the emulator. The time is a model of a B200 by its product data, 8 TB/s and 9 PFLOPS of "
        "FP4; nothing was measured."
    )
    _print(COSTS, found)


def _print(columns: tuple[tuple[str, str], ...], rows: list[dict]) -> None:
    cells = [["" if row[name] is None else str(row[name]) for name, _ in columns] for row in rows]
    print_table([title for _, title in columns], cells)


def _architectures(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(ARCHITECTURES)}, got {wrong[0]!r}")
    return names


def _sizes(text: str) -> list[tuple[str, int]]:
    found = []
    for part in text.split(","):
        model, _, tokens = part.partition(":")
        if model not in ("nano", "flash", "pro") or not tokens.isdecimal() or int(tokens) < 1:
            raise argparse.ArgumentTypeError(
                f"must be such as flash:16, with nano, flash or pro, got {part!r}"
            )
        found.append((model, int(tokens)))
    return found
