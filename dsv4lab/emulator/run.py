"""One launch in execution: its options, its counters, the clusters that are still to come."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsv4lab.emulator.architectures import SHARED_OPTIN, Architecture
from dsv4lab.emulator.global_memory import GlobalMemory
from dsv4lab.emulator.launch import Launch
from dsv4lab.emulator.machine import Machine
from dsv4lab.emulator.memory import Memory
from dsv4lab.emulator.program import Program
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.scheduler import Scheduler
from dsv4lab.emulator.trace import Counters, Trace

CHECKS = ("initialised", "race", "proxy", "barriers", "leaks")
MMA_MODES = ("exact", "hardware")
# More warps at once do not run faster: their registers no longer fit the caches of a CPU.
_WARPS_OF_A_WAVE = 1024
_THREADS_OF_AN_SM, _CTAS_OF_AN_SM, _SHARED_OF_AN_SM = 39, 106, 81

Watch = Callable[[Machine, Instruction | None], None]


@dataclass(frozen=True)
class Options:
    """How launches are executed.

    Args:
        checks: what to watch beyond bounds, which always are: some of CHECKS.
        mma: "exact" sums in float64, or "hardware", the published bit model of the tensor cores.
        seed: of the order in which warps run and asynchronous operations complete.
        limit: warp-instructions that a launch may execute.
        strict: refuse global addresses of no registered tensor, even where the process has memory.
        trace: record events.
        watch: called with the machine and the instruction after each part of an asynchronous operation.
    """

    checks: frozenset[str] = frozenset(CHECKS)
    mma: str = "exact"
    seed: int = 0
    limit: int = 100_000_000
    strict: bool = True
    trace: bool = True
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if unknown := self.checks - set(CHECKS):
            raise ValueError(f"checks must be of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}")
        if self.mma not in MMA_MODES:
            raise ValueError(f"mma must be one of {', '.join(MMA_MODES)}, got {self.mma!r}")
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")


class Parameters:
    """The parameters of a launch in memory of their own, where tensormaps among them can be read."""

    def __init__(self, launch: Launch, program: Program, memory: Memory) -> None:
        declared = program.function.parameters
        size = max(program.function.parameter_bytes, 1)
        buffer = np.zeros(size + 128, np.uint8)
        start = -buffer.ctypes.data % 128
        self.bytes = buffer[start : start + size]
        self.address = self.bytes.ctypes.data
        for parameter, value in zip(declared, launch.parameters, strict=True):
            self.bytes[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(value, np.uint8)
        memory.lend(self, self.address, size, "kernel parameters")


class Run:
    """One launch in execution.

    Attributes:
        pending: %ctaid of the first CTA of each cluster that has not begun.
        executed: warp-instructions so far.
        rows: by block, how many warps (or parts of one) have run it.
    """

    def __init__(
        self,
        launch: Launch,
        program: Program,
        arch: Architecture,
        memory: Memory,
        options: Options,
        number: int,
    ) -> None:
        self.launch, self.program, self.arch = launch, program, arch
        self.options, self.number = options, number
        self.memory = GlobalMemory(memory.registry, options.strict)
        self.random = random.Random(options.seed * 1_000_003 + number)
        self.counters = Counters()
        self.trace = Trace(launch) if options.trace else None
        self.executed = 0
        self.rows = [0] * len(program.blocks)
        self.parameters = Parameters(launch, program, memory)
        (gx, gy, gz), (cx, cy, cz) = launch.grid, launch.cluster
        self.pending = deque(
            (x, y, z) for z in range(0, gz, cz) for y in range(0, gy, cy) for x in range(0, gx, cx)
        )

    def execute(self) -> None:
        """Run all clusters, as many at a time as are resident together."""
        clusters = self._resident()
        try:
            with np.errstate(all="ignore"):
                while self.pending:
                    first = [self.pending.popleft() for _ in range(min(clusters, len(self.pending)))]
                    machine = Machine(self, self.program, first)
                    try:
                        Scheduler(machine).execute()
                    finally:
                        machine.close()
        finally:
            self._count()
            # Its memory is the kernel's no longer.
            del self.parameters

    def _resident(self) -> int:
        """Clusters of a wave: never fewer than a GPU holds with one CTA on each SM."""
        launch, limits = self.launch, self.arch.attributes
        cluster = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        shared = launch.shared_bytes + self.program.static_shared + 1024
        each = min(
            limits[_THREADS_OF_AN_SM] // threads,
            limits[_CTAS_OF_AN_SM],
            max(limits[_SHARED_OF_AN_SM], limits[SHARED_OPTIN]) // shared,
        )
        few = self.arch.sm_count
        ctas = min(max(each, 1) * few, max(few, _WARPS_OF_A_WAVE // max(threads // 32, 1)))
        return max(ctas // cluster, 1)

    def _count(self) -> None:
        self.counters["instructions"] = self.executed
        for block, rows in zip(self.program.blocks, self.rows, strict=True):
            if rows:
                if block.fusable:
                    self.counters["fusable_mul_add"] += block.fusable * rows
                for opcode, count in block.opcodes.items():
                    self.counters[f"instructions.{opcode.partition('.')[0]}"] += count * rows
