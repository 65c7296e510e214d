"""What the compiler made of kernels: machine instructions by purpose, registers, and models of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from .style import INK, MUTED, SERIES, Picture, Table, new, styled

PURPOSES: dict[str, tuple[str, ...]] = {
    "tensor cores": ("UTCOMMA", "UTCQMMA", "UTCHMMA", "UTCIMMA", "HGMMA", "QGMMA"),
    "scales to tensor memory": ("UTCCP",),
    "TMA": ("UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UTMACCTL", "UBLKCP", "UBLKPF"),
    "sums from tensor memory": ("LDTM",),
    "barriers and waits": (
        "BAR", "BSSY", "BSYNC", "DEPBAR", "ELECT", "ERRBAR", "FENCE", "MEMBAR", "NANOSLEEP", "SYNCS",
        "UCGABAR_ARV", "UCGABAR_WAIT", "UTCBAR", "WARPSYNC",
    ),
    "conversions": ("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP"),
    "floating point": (
        "FADD", "FADD2", "FFMA", "FFMA2", "FMNMX", "FMNMX3", "FMUL", "FMUL2", "FSEL", "FSETP", "HADD2",
        "HFMA2", "HMNMX2", "HMUL2", "HSETP2", "MUFU",
    ),
    "loads and stores": (
        "ATOMS", "LD", "LDC", "LDCU", "LDG", "LDL", "LDS", "ST", "STAS", "STG", "STL", "STS", "UTCATOMSWS",
    ),
}  # fmt: skip
"""Opcodes by what they are for; all others compute addresses, move data or branch."""

REST = "addresses, moves, branches"
MEANING = {
    "UTCOMMA": "multiply 64 of K: codes from shared memory, scales and sums in tensor memory",
    "UTCCP": "copy scales of 64 of K from shared to tensor memory",
    "UTCBAR": "arrive at a barrier when all products so far are done",
    "UTMALDG": "TMA: a box from global to shared memory",
    "UTMASTG": "TMA: a box from shared to global memory",
    "LDTM": "sums from tensor memory to registers",
    "F2FP": "convert, two values at once",
    "STL": "store to local memory",
    "LDL": "load from local memory",
    "ELECT": "choose one lane",
}
_REGISTERS = 65536  # of an SM


class Instruction(Protocol):
    """As of dsv4lab.kernels.sass."""

    address: int
    guard: str
    opcode: str
    operands: str
    name: str


class Row(Protocol):
    """As of dsv4lab.kernels.table."""

    kernel: str
    threads: int
    registers: int
    shared_bytes: int
    stages: int | None
    spills: int
    instructions: int


class Cost(Protocol):
    """As of dsv4lab.kernels.cost."""

    case: object
    memory_seconds: float
    tensor_seconds: float


def purpose(name: str) -> str:
    """What an opcode is for.

    Args:
        name: without modifiers.
    """
    return next((what for what, names in PURPOSES.items() if name in names), REST)


def by_purpose(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many instructions there are for each purpose, NOP left out."""
    found = Counter(purpose(i.name) for i in instructions if i.name != "NOP")
    return {what: found[what] for what in (*PURPOSES, REST)}


@styled
def instruction_mix(codes: Mapping[str, Sequence[Instruction]]) -> Picture:
    """Draws what the instructions of each piece of code are for, one bar a piece.

    Args:
        codes: instructions by the name of the piece.
    """
    counts = {name: by_purpose(instructions) for name, instructions in codes.items()}
    picture, axes = new(
        "Machine instructions by what they are for. What a kernel is about, its products and copies, is a "
        "few instructions; most of the others say where.",
        size=(8.4, 1.6 + 0.5 * len(codes)),
    )
    left = np.zeros(len(codes))
    colours = (*(colour for colour, *_ in SERIES[:5]), "#7f9fb5", "#b5907f", "#90b57f", "#d5d5cf")
    for what, colour in zip((*PURPOSES, REST), colours, strict=True):
        widths = np.array([count[what] for count in counts.values()])
        if widths.any():
            axes.barh(range(len(codes)), widths, left=left, color=colour, edgecolor="white", label=what)
        left += widths
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.0f}", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(codes)), list(codes))
    axes.invert_yaxis()
    axes.set(xlabel="instructions", xlim=(0, 1.12 * left.max()))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return picture


def listing(instructions: Sequence[Instruction], only: Sequence[str] = (), caption: str = "") -> Table:
    """Returns a listing of machine instructions, each with what it is for.

    Args:
        instructions: in their order.
        only: opcodes without modifiers; the others are left out. All if there are none.
        caption: one sentence.
    """
    rows = [
        (
            f"{i.address:#06x}",
            i.guard,
            i.opcode,
            i.operands.replace(",", ", "),
            MEANING.get(i.name, purpose(i.name)),
        )
        for i in instructions
        if not only or i.name in only
    ]
    return Table(["address", "if", "opcode", "operands", "what for"], rows, caption)


def kernel_summary(rows: Sequence[Row]) -> Table:
    """Returns for each kernel how many configurations there are and the ranges of what they take.

    Args:
        rows: of the table of kernels, for one architecture.
    """
    lines = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel]
        ranges = [
            _range(getattr(row, name) for row in mine)
            for name in ("threads", "registers", "shared_bytes", "stages", "instructions")
        ]
        lines.append((kernel, len(mine), *ranges, sum(row.spills for row in mine)))
    columns = ["kernel", "configurations", "threads", "registers", "shared bytes", "stages", "instructions"]
    return Table([*columns, "spills"], lines, "Smallest to largest of all configurations.")


def _range(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    least, most = min(known), max(known)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


@styled
def registers(rows: Sequence[Row]) -> Picture:
    """Draws registers of a thread against threads of a CTA, and the lines up to which so many CTAs fit an SM.

    Args:
        rows: of the table of kernels, for one architecture.
    """
    picture, axes = new(
        "Each point is a configuration of a kernel. Below a line, the registers of an SM are enough for as "
        "many CTAs as it says; above the highest one, a kernel could not start.",
        size=(8.4, 3.8),
    )
    threads = np.linspace(32, 1024, 200)
    for ctas in (1, 2, 4):
        axes.plot(threads, _REGISTERS / ctas / threads, color=MUTED, linewidth=1)
        axes.text(1030, _REGISTERS / ctas / 1024, f"{ctas} CTA{'s' * (ctas > 1)}", va="center", fontsize=9)
    for i, kernel in enumerate(dict.fromkeys(row.kernel for row in rows)):
        colour, marker, _ = SERIES[i % len(SERIES)]
        points = [(row.threads, row.registers) for row in rows if row.kernel == kernel]
        axes.plot(*zip(*points, strict=True), marker, color=colour, alpha=0.6, label=kernel)
    axes.set(xlabel="threads of a CTA", ylabel="registers of a thread", xlim=(0, 1130), ylim=(0, 260))
    axes.legend(loc="upper right", fontsize=9)
    return picture


@styled
def model_times(costs: Sequence[Cost]) -> Picture:
    """Draws the two times that bound each product in the model of a B200.

    Args:
        costs: of products, as counted in the emulator.
    """
    picture, axes = new(
        "A model, not a measurement: the time that a B200's memory needs for each byte once, and its tensor "
        "cores for all products, by its product data. The longer bar is the bound.",
        size=(8.4, 1.4 + 0.55 * len(costs)),
    )
    places = np.arange(len(costs))
    for shift, name, values in (
        (-0.2, "memory", [cost.memory_seconds for cost in costs]),
        (0.2, "tensor cores", [cost.tensor_seconds for cost in costs]),
    ):
        colour = SERIES[0 if name == "memory" else 1][0]
        axes.barh(places + shift, np.array(values) * 1e6, 0.38, color=colour, label=name)
    axes.set_yticks(places, [f"{cost.case.kind} {cost.case.size}" for cost in costs])
    axes.invert_yaxis()
    axes.set(xlabel="modelled time (µs)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture
