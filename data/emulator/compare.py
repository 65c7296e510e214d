"""Hold the emulator against a Hopper GPU: instructions and whole kernels, bit for bit or within bounds.

    python data/emulator/compare.py [--out data/emulator/h200.csv]

Needs a GPU of compute capability 9.0 and nvidia-cutlass-dsl. Ends with 1 if anything disagrees.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import instructions
import whole_kernels

# Error bounds of the PTX ISA for the approximate functions, for results that are finite and normal, in units
# in the last place where `relative`, otherwise absolute. ex2: 2 + rounding; tanh: relative 2**-11.
ULPS = {"ex2": 2, "rcp": 1, "rsqrt": 2, "sqrt": 2, "div.approx": 2, "div.full": 2}
ABSOLUTE = {"lg2": 2.0**-22, "sin": 2.0**-20.5, "cos": 2.0**-20.5, "tanh": 2.0**-10.987}
FIELDS = (
    "what",
    "kind",
    "elements",
    "differing",
    "worst",
    "passed",
    "gpu",
    "driver",
    "torch",
    "cutlass",
    "date",
)


def instruction_rows(seed: int) -> list[dict[str, object]]:
    """One row for each instruction form."""
    trials = instructions.trials()
    emulated = instructions.emulate(trials, whole_kernels.ARCHITECTURE, seed)
    real = instructions.execute(trials, whole_kernels.ARCHITECTURE, seed)
    operands = [instructions.inputs(trial, seed + i)[0] for i, trial in enumerate(trials)]
    return [_row(*four) for four in zip(trials, operands, emulated, real, strict=True)]


def _row(
    trial: instructions.Trial, operand: np.ndarray, emulated: np.ndarray, real: np.ndarray
) -> dict[str, object]:
    differing = int((emulated != real).sum())
    name = trial.text.split()[0]
    row = {"what": name, "kind": trial.kind, "elements": len(real), "differing": differing, "worst": 0.0}
    if trial.kind == "bits":
        return row | {"passed": differing == 0}
    if name.startswith(("sin", "cos")):
        # The error is given for |x| within 2 pi.
        near = np.abs(operand.view(np.float32)) <= 2 * np.pi
        emulated, real = emulated[near], real[near]
    worst = _share(name, emulated.view(np.float32), real.view(np.float32))
    return row | {"worst": worst, "passed": worst <= 1}


def _share(name: str, emulated: np.ndarray, real: np.ndarray) -> float:
    """The largest difference as a share of the documented error plus our own rounding."""
    if not (np.isfinite(emulated) == np.isfinite(real)).all():
        return float("inf")
    finite = np.isfinite(emulated)
    a, b = emulated[finite].astype(np.float64), real[finite].astype(np.float64)
    kind = next(k for k in (*ULPS, *ABSOLUTE) if name.startswith(k))
    if kind in ULPS:
        bound = (ULPS[kind] + 0.5) * np.spacing(np.maximum(np.abs(emulated[finite]), np.float32(2.0**-126)))
    elif kind == "tanh":
        bound = ABSOLUTE[kind] * np.abs(a) + 2.0**-126
    else:
        bound = ABSOLUTE[kind] + np.spacing(np.abs(emulated[finite]))
    return float((np.abs(a - b) / bound).max())


def kernel_rows() -> list[dict[str, object]]:
    """One row for each buffer of each kernel."""
    return [
        {
            "what": c.what,
            "kind": c.kind,
            "elements": c.elements,
            "differing": c.differing,
            "worst": c.worst,
            "passed": c.passed,
        }
        for c in whole_kernels.compare()
    ]


def driver_version() -> str:
    """The NVIDIA driver's own version."""
    text = Path("/proc/driver/nvidia/version")
    return (
        next((w for w in text.read_text().split() if w[0].isdigit() and "." in w), "")
        if text.exists()
        else ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("h200.csv"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("this needs a GPU of compute capability 9.0", file=sys.stderr)
        return 2
    rows = instruction_rows(options.seed) + kernel_rows()
    about = {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cutlass": version("nvidia-cutlass-dsl"),
        "date": datetime.date.today().isoformat(),
    }
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({**row, "worst": f"{row['worst']:.3g}", **about} for row in rows)
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print(f"{row['what']}: {row['differing']} of {row['elements']} differ, worst {row['worst']:.3g}")
    print(f"{len(rows) - len(failed)} of {len(rows)} agree; written to {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
