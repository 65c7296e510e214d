"""How fast the emulator is on this machine: warps in lock step, and a whole NVFP4 GEMM.

OMP_NUM_THREADS=1 python data/emulator/speed.py [--csv data/emulator/speed.csv]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dsv4lab.emulator import device

TESTS = Path(__file__).resolve().parents[2] / "tests" / "emulator"
FIELDS = ("what", "seconds", "warp_instructions", "million_per_second", "cpu", "cores", "python", "date")
STEPS = 2000

# Integer arithmetic in a loop of ten instructions, none of which touches memory.
LOOP = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry k(.param .u64 y, .param .u32 n)
{
 .reg .b32 %r<20>; .reg .b64 %rd<4>; .reg .pred %p<2>;
 ld.param.u64 %rd1, [y];
 ld.param.u32 %r1, [n];
 mov.u32 %r2, %tid.x;
 mov.u32 %r3, 0;
 mov.u32 %r4, 0;
LOOP:
 add.s32 %r4, %r4, %r2;
 shl.b32 %r5, %r4, 2;
 and.b32 %r6, %r5, 1023;
 add.s32 %r7, %r6, %r2;
 xor.b32 %r8, %r7, %r4;
 or.b32 %r9, %r8, 7;
 sub.s32 %r4, %r9, %r3;
 add.s32 %r3, %r3, 1;
 setp.lt.s32 %p1, %r3, %r1;
 @%p1 bra LOOP;
 mul.wide.u32 %rd2, %r2, 4;
 add.s64 %rd3, %rd1, %rd2;
 st.global.b32 [%rd3], %r4;
 ret;
}
"""


def lock_step() -> Iterator[dict[str, object]]:
    """Warps that run the same loop."""
    for ctas, threads in ((1, 32), (1, 128), (8, 128), (148, 256)):
        gpu = device("sm_100a")
        y = gpu.empty(threads, torch.int32)
        gpu.run_ptx(LOOP, y, 1, grid=(ctas, 1, 1), block=(threads, 1, 1))
        start = time.perf_counter()
        run = gpu.run_ptx(LOOP, y, STEPS, grid=(ctas, 1, 1), block=(threads, 1, 1))
        seconds = time.perf_counter() - start
        yield row(f"loop, {ctas * threads // 32} warps", seconds, run.counters["instructions"])


def gemm() -> Iterator[dict[str, object]]:
    """1024 x 1024 x 1024 NVFP4 with CTA tiles of 128 x 256 x 256; execution alone, compiled before."""
    sys.path.insert(0, str(TESTS))
    module = importlib.import_module("gpu_kernels.scaled_gemm")
    case = module.case("nvfp4", torch.bfloat16, (1024, 1024, 1024), False, tile=(128, 256, 256), stages=2)
    for checks in ("none", "all"):
        with device("sm_100a", checks=checks) as gpu:
            execute, seconds = gpu.executor, []

            def timed(launch, execute=execute, seconds=seconds) -> None:
                for _ in range(3):
                    start = time.perf_counter()
                    execute(launch)
                    seconds.append(time.perf_counter() - start)

            gpu.executor = timed
            placed = case.run(gpu.from_torch)
        case.check(placed)
        instructions = gpu.runs[-1].counters["instructions"]
        yield row(f"NVFP4 GEMM 1024^3, checks={checks}", sorted(seconds)[1], instructions)


def row(what: str, seconds: float, instructions: int) -> dict[str, object]:
    """One line of the table."""
    return {
        "what": what,
        "seconds": round(seconds, 4),
        "warp_instructions": instructions,
        "million_per_second": round(instructions / seconds / 1e6, 2),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table there")
    options = parser.parse_args()
    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for line in (*lock_step(), *gemm()):
        print(
            f"{line['what']:40} {line['seconds']:8.3f} s "
            f"{line['million_per_second']:8.2f} M warp-instructions/s"
        )
        rows.append(line | about)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
