"""The table of kernels: each configuration that the models' operations take, and what became of it."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cutlass
from dsv4lab.kernels import sass
from dsv4lab.kernels.launch import compiled_for
from dsv4lab.kernels.uses import Use

from dsv4lab.device import ARCHITECTURES
from dsv4lab.emulator import Launch, device

KEPT = Path(__file__).resolve().parents[1] / "data" / "kernels.csv"
"""The table that comes with the repository."""

# Of which a table says how often they occur: block-scaled MMAs, copies to tensor memory, loads from tensor
# memory, MMAs of warpgroups and of warps, loads by TMA, conversions to E2M1.
COUNTED = {
    "utcomma": ("UTCOMMA",),
    "utccp": ("UTCCP",),
    "ldtm": ("LDTM",),
    "hgmma": ("HGMMA",),
    "hmma": ("HMMA",),
    "utmaldg": ("UTMALDG",),
    "to_e2m1": ("F2FP.E2M1",),
}
MMAS = ("UTCOMMA", "HGMMA", "HMMA")


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration for one architecture.

    Attributes:
        kernel: the factory's module.
        configuration: what the factory was given.
        arch: such as "sm_100a".
        threads: of a CTA.
        registers: of a thread when it starts.
        shared_bytes: of a CTA.
        stages: of its pipeline; None without one.
        stack_bytes: of a thread, in local memory.
        spills: instructions that access local memory.
        instructions: without NOP.
        main_loop: instructions of the shortest loop with an MMA; None without one.
        loop_spills: those in it that access local memory.
        utcomma, utccp, ldtm, hgmma, hmma, utmaldg, to_e2m1: how many there are of COUNTED.
        use: the first operation that takes it.
        cutlass_dsl: version of the compiler.
    """

    kernel: str
    configuration: str
    arch: str
    threads: int
    registers: int
    shared_bytes: int
    stages: int | None
    stack_bytes: int
    spills: int
    instructions: int
    main_loop: int | None
    loop_spills: int
    utcomma: int
    utccp: int
    ldtm: int
    hgmma: int
    hmma: int
    utmaldg: int
    to_e2m1: int
    use: str
    cutlass_dsl: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What no other row has."""
        return self.kernel, self.configuration, self.arch


FIELDS = {field.name: field for field in dataclasses.fields(Row)}
Progress = Callable[[int, int, str], None]


def make_rows(
    arch: str, uses: Callable[[], Iterable[Use]], progress: Progress = lambda done, total, what: None
) -> list[Row]:
    """Compile what operations take, and look at it.

    Args:
        arch: "sm_90a", "sm_100a" or "sm_103a".
        uses: makes the operations, one after the other, since all their tensors together are large.
        progress: called with uses or kernels done, those in all, and a name.

    Returns:
        Rows by kernel and configuration.
    """
    backend, total, found = ARCHITECTURES[arch], sum(1 for _ in uses()), {}
    with device(arch, executor=lambda launch: None) as gpu:
        for i, use in enumerate(uses()):
            progress(i, total, use.name)
            if use.weight_only and backend != "hopper":
                continue
            before = len(gpu.launches)
            use.call(backend=backend)
            for launch in gpu.launches[before:]:
                found.setdefault((launch.module.digest, launch.kernel), (launch, use.name))
        configurations = {module.digest: known for known, module in compiled_for(gpu).items()}
    rows = []
    for i, (launch, use) in enumerate(found.values()):
        progress(i, len(found), launch.kernel)
        rows.append(row(launch, *configurations[launch.module.digest], use))
    return sorted(rows, key=lambda r: r.key)


def row(launch: Launch, make: Callable, config: tuple, use: str) -> Row:
    """The row of a kernel that was launched."""
    code = sass.read(launch.module.cubin)[launch.kernel]
    x, y, z = launch.block
    main_loop = min(filter(None, map(code.loop_with, MMAS)), key=len, default=())
    return Row(
        kernel=make.__module__.rpartition(".")[2],
        configuration=configuration(make, config),
        arch=launch.module.arch,
        threads=x * y * z,
        registers=code.registers,
        shared_bytes=launch.shared_bytes + launch.module.static_shared[launch.kernel],
        stages=next((part.stages for part in config if hasattr(part, "stages")), None),
        stack_bytes=code.frame_bytes,
        spills=code.spills,
        instructions=len(code.instructions) - code.count("NOP"),
        main_loop=len(main_loop) or None,
        loop_spills=sum(i.name in sass.LOCAL for i in main_loop),
        **{name: code.count(*opcodes) for name, opcodes in COUNTED.items()},
        use=use,
        cutlass_dsl=cutlass.__version__,
    )


def configuration(make: Callable, config: tuple) -> str:
    """A configuration in words: name=value, names alone of what is true; what is usual is left out."""
    words = []
    for name, value in zip(inspect.signature(make).parameters, config, strict=True):
        if dataclasses.is_dataclass(value):
            fields = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
            words += [_word(field.name, getattr(value, field.name)) for field in fields]
        else:
            words.append(_word(name, value))
    return " ".join(filter(None, words))


def _word(name: str, value: Any) -> str:
    if name == "arch":  # has a column of its own
        return ""
    if isinstance(value, bool):
        return name if value else f"not-{name}"
    return f"{name}={getattr(value, '__name__', value)}"


def as_csv(rows: Iterable[Row]) -> str:
    """A table as the text of a file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(r) for r in rows)
    return text.getvalue()


def from_csv(path: Path) -> list[Row]:
    """The rows of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**{name: _value(FIELDS[name].type, text) for name, text in line.items()})
                for line in csv.DictReader(file)]  # fmt: skip


def _value(annotation: str, text: str) -> int | str | None:
    if annotation == "str":
        return text
    return int(text) if text else None
