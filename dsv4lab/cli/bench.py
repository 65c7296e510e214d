"""`dsv4lab bench`: how fast the operations run here, each checked before it is timed."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_json, command, positive, print_json, print_table, say
from .progress import Progress

HEADER = ("op", "shape", "backend")
NUMBERS = (
    ("p20_us", "p20 us", "{:.1f}"),
    ("p50_us", "p50", "{:.1f}"),
    ("p80_us", "p80", "{:.1f}"),
    ("tb_per_s", "TB/s", "{:.3g}"),
    ("tflops", "TFLOPS", "{:.3g}"),
    ("share_of_floor", "of floor", "{:.0%}"),
    ("baseline", "baseline", "{}"),
    ("baseline_us", "us", "{:.1f}"),
    ("speedup", "speed-up", "{:.2f}x"),
)
"""Columns of the table: key, title, form."""


def add_parser(commands) -> argparse.ArgumentParser:
    about = "Time the operations beside a copy or bf16 GEMMs; a wrong result is refused, not timed."
    epilog = (
        "TB/s and TFLOPS count what an operation needs: each byte once a pass, only experts with tokens. "
        "The floor is the larger of both times: on an H200 at rates measured there, on a B200 at its "
        "data sheet's, 8 TB/s and 9 PFLOPS of FP4; others have none. linear and grouped_mm have NVFP4 "
        "activations, with _w4a16 bf16 ones. Each _swiglu_quantize is also timed as a GEMM and a SwiGLU in a "
        "kernel of its own (unfused)."
    )
    parser = command(commands, "bench", about, epilog)
    parser.add_argument(
        "--backend", metavar="NAME", help="what runs the operations (default: the device's default)"
    )
    parser.add_argument("--op", metavar="NAME[,...]", type=_names, help="some operations (default: all)")
    parser.add_argument(
        "--shapes",
        metavar="SPEC[,...]",
        type=_names,
        default=["nano"],
        help="nano, flash or pro for the model's own K and N, flash:16 for 16 tokens; deepseek-v4 for all of "
        "data/benchmarks.csv; or TxK of quantizing, TxKxN of linear, TxKxNxGxk of G groups of which each "
        "token takes k (default: nano)",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME[,...]",
        type=_names,
        default=[],
        help="measure quack, humming too where they have the operation (pip install 'dsv4lab[peers]')",
    )
    parser.add_argument("--repeats", metavar="N", type=positive, default=25, help="default: 25")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="append the rows to a file")
    parser.add_argument("--commit", metavar="ID", help="for the rows, where the sources are no git checkout")
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from dsv4lab.bench import compiling, measure, rows
    from dsv4lab.bench.rivals import check_peers
    from dsv4lab.bench.shapes import select

    device, peers = _device(args.device), check_peers(args.peers)
    cases = select(args.op, args.shapes, args.backend, device)
    if args.csv:
        rows.check_file(args.csv)  # known before a measurement that may take long
    where = rows.provenance(device, args.commit)
    with Progress("compiling") as progress:
        compiling.compile_first(cases, args.backend, device, progress, args.peers)
    added = []

    def keep(m) -> None:
        if args.csv:  # at once, so that an interrupted run keeps what it has
            added.append(rows.append(args.csv, [m], where, peers))

    with Progress("measuring") as progress:
        found = measure.bench(cases, args.backend, device, args.repeats, progress, args.peers, keep)
    if args.json:
        results = [m.as_dict() for m in found]
        print_json({**where, "repeats": args.repeats, "peers": peers, "results": results})
    else:
        print_report(found, where)
    if args.csv:
        say(f"{args.csv}: {sum(added)} rows added")
    if refused := [m for m in found if m.refused]:
        first = refused[0]
        raise ValueError(
            f"{len(refused)} of {len(found)} refused, the first {first.case.kind} {first.case.size} "
            f"on {first.backend}: {first.refused}"
        )


def print_report(found: list, where: dict) -> None:
    """Measurements as a table, with a column for each rival that not all have."""
    versions = ", ".join(f"{name} {where[name]}" for name in ("driver", "torch", "dsv4lab") if where[name])
    print(f"{where['device']}, {versions}, {where['date']}")
    results = [m.as_dict() for m in found]
    others = list(dict.fromkeys(name for d in results for name in d["others"]))
    titles = [*HEADER, *(title for _, title, _ in NUMBERS), *(f"over {name}" for name in others)]
    print_table(titles, [_row(d) + [_over(d, name) for name in others] for d in results])


def _row(d: dict) -> list[str]:
    cells = ["" if d[name] is None else form.format(d[name]) for name, _, form in NUMBERS]
    if d["refused"]:
        cells = ["", "refused", *[""] * (len(NUMBERS) - 2)]
    return [*(d[name] for name in HEADER), *cells]


def _over(d: dict, name: str) -> str:
    """How many times as fast as another it is."""
    if name not in d["others"]:
        return ""
    speedup = d["others"][name]["speedup"]
    return "wrong" if speedup is None else f"{speedup:.2f}x"


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return names


def _device(name: str | None):
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: times can be taken on cpu and cuda alone")
    return device
