"""Measured rows in a CSV file, each with where, with what and when it was measured."""

from __future__ import annotations

import csv
import datetime
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from dsv4lab import __version__

from ..device import cutlass_dsl_version
from .measure import Measurement, device_name

MEASURED = (
    "op", "shape", "backend", "p20_us", "p50_us", "p80_us", "tb_per_s", "tflops", "share_of_floor",
    "baseline", "baseline_us", "bytes", "flops", "rotated_bytes",
)  # fmt: skip
PROVENANCE = ("device", "driver", "torch", "dsv4lab", "cutlass_dsl", "peer", "commit", "date")
HEADER = (*MEASURED, *PROVENANCE)


def provenance(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Where, with what and when: PROVENANCE as text, empty where it does not apply or cannot be known."""
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "dsv4lab": __version__,
        "cutlass_dsl": cutlass_dsl_version() or "",
        "peer": "",  # a peer's own rows name its package
        "commit": _commit() if commit is None else commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _commit() -> str:
    """The commit of the sources, marked where files differ from it; empty outside a checkout of them."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    return _output("git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return run.stdout.strip() if run.returncode == 0 else ""


def check_file(file: Path) -> str:
    """What the file holds so far, nothing if there is none.

    Raises:
        ValueError: it has another header, or there is no folder for it.
    """
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent}: no such folder")
    if not file.exists():
        return ""
    with file.open(encoding="utf-8", newline="") as stream:
        text = stream.read()
    header = next(csv.reader(io.StringIO(text)), [])
    if text and tuple(header) != HEADER:
        raise ValueError(f"{file}: its first line must be {','.join(HEADER)}")
    return text


def append(
    file: Path, found: Sequence[Measurement], where: dict[str, str], peers: dict[str, str] | None = None
) -> int:
    """Add what was measured; the file is replaced at once, so that it is never half a file.

    Args:
        file: made if it is not there.
        found: refused cases are left out.
        where: see `provenance`.
        peers: packages and versions of the peers, see `rivals.check_peers`.

    Returns:
        The number of rows added.

    Raises:
        ValueError: the file is not one of ours.
    """
    file = file.resolve()
    old, new = check_file(file), io.StringIO(newline="")
    writer = csv.DictWriter(new, HEADER, extrasaction="ignore", lineterminator="\n")
    if not old:
        writer.writeheader()
    rows = [{**row, **where} for m in found if not m.refused for row in m.rows()]
    writer.writerows({**row, "peer": (peers or {}).get(row["backend"], row["peer"])} for row in rows)
    _replace(file, old + "\n" * (old != "" and not old.endswith("\n")) + new.getvalue())
    return len(rows)


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
