"""One wave of CTAs that are resident together: memories, registers, clocks, and what is under way."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dsv4lab.emulator.architectures import Architecture
from dsv4lab.emulator.errors import AddressError, EmulatorError, at_instruction
from dsv4lab.emulator.global_memory import GlobalMemory
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.launch import Launch
from dsv4lab.emulator.program import RESERVED_SHARED, Program
from dsv4lab.emulator.shared import OFFSET_MASK, RANK_SHIFT, SharedMemory
from dsv4lab.emulator.special_registers import special_registers
from dsv4lab.emulator.windows import LOCAL_WINDOW, SHARED_WINDOW

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access, HappensBefore
    from dsv4lab.emulator.ptx import Instruction
    from dsv4lab.emulator.run import Run

State = TypeVar("State")
# Who issues what is performed later: the batch, the instruction and, if one warp of the batch does, that one.
_Issuer = tuple["Batch | None", "Instruction | None", int | None]


class Machine:
    """The CTAs of a launch that run at the same time, and everything they can reach.

    Args:
        run: the launch in execution, with its options, counters and pending clusters.
        program: the kernel.
        first_ctas: %ctaid of the first CTA of each cluster of this wave.

    Attributes:
        launch, arch, memory, counters, trace, checks, mma_mode: of the run.
        cluster_size, warps_per_cta, threads_per_cta: counts.
        ctas, warps: how many are in the wave; CTAs of a cluster follow one another, as warps of a CTA do.
        cta_index: int64 (ctas, 3), %ctaid.
        registers: arrays (warps, 32) of the registers that live from block to block, by register index.
        shared: shared memory.
        own_shared: uint32 (warps, 1), the shared::cluster address at which each warp's own window begins.
        order: the race checker, or None.
        time: int64 (warps,), model time in cycles; says nothing about correctness.
        at_end: functions to call when all warps have ended.
        alive: uint32 (warps,), lanes of each warp that exist and have not ended.
        on_exit: functions of (warps), called when lanes of these warps have ended.
        random: seeded; decides the order of everything that has none.
    """

    def __init__(self, run: Run, program: Program, first_ctas: list[tuple[int, int, int]]) -> None:
        self.run = run
        self.program = program
        self.launch: Launch = run.launch
        self.arch: Architecture = run.arch
        self.memory: GlobalMemory = run.memory
        self.counters = run.counters
        self.trace = run.trace
        self.checks: frozenset[str] = run.options.checks
        self.mma_mode = run.options.mma
        self.random = np.random.default_rng(run.random.getrandbits(64))
        self.dice: random.Random = run.random
        self._size(first_ctas)
        self.order: HappensBefore | None = None
        self._make_memory()
        self.time = np.zeros(self.warps, np.int64)
        self.alive = np.full(self.warps, 0xFFFFFFFF, np.uint32)
        self.at_end: list[Callable[[], None]] = []
        self.on_exit: list[Callable[[np.ndarray], None]] = [self._end_ctas]
        self._states: dict[type, Any] = {}
        self._later: dict[Hashable, deque[tuple[_Issuer, Callable[[], None]]]] = {}
        self._special = special_registers(self)
        self.current: Batch | None = None
        self._issuer: Instruction | None = None
        self.woken: list[Hashable] = []

    def _size(self, first_ctas: list[tuple[int, int, int]]) -> None:
        cluster = self.launch.cluster
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        x, y, z = self.launch.block
        self.threads_per_cta = x * y * z
        self.warps_per_cta = -(-self.threads_per_cta // 32)
        inside = np.array(
            [(i, j, k) for k in range(cluster[2]) for j in range(cluster[1]) for i in range(cluster[0])]
        )
        self.cta_index = (np.array(first_ctas)[:, None, :] + inside[None]).reshape(-1, 3)
        self.ctas = len(self.cta_index)
        self.warps = self.ctas * self.warps_per_cta
        rank = np.repeat(np.arange(self.ctas) % self.cluster_size, self.warps_per_cta)
        self.own_shared = (rank << RANK_SHIFT).astype(np.uint32)[:, None]

    def _make_memory(self) -> None:
        program = self.program
        align = program.dynamic_align
        start = -(-(RESERVED_SHARED + program.static_shared) // align) * align
        size = start + self.launch.shared_bytes
        track = "initialised" in self.checks
        if self.checks & {"race", "proxy"}:
            from dsv4lab.emulator.happens_before import HappensBefore

            self.order = HappensBefore(
                ctas=self.ctas,
                cluster_size=self.cluster_size,
                warps_per_cta=self.warps_per_cta,
                shared_bytes=-(-size // 1024) * 1024,
                granularity=program.shared_granularity,
                checks=self.checks & {"race", "proxy"},
                cta_index=self.cta_index,
            )
        self.shared = SharedMemory(self.ctas, self.cluster_size, size, track, self.order, self.warps_per_cta)
        self.local = np.zeros((self.warps, 32, program.local_bytes), np.uint8)
        self.registers: list[np.ndarray | None] = [None] * len(program.function.registers)
        for index, storage in program.stored:
            shape = (self.warps, 32, 2) if storage == "b128" else (self.warps, 32)
            self.registers[index] = np.zeros(shape, DTYPES[storage])

    def _end_ctas(self, warps: np.ndarray) -> None:
        """Lanes of these warps have ended, and with the last ones their CTAs."""
        ctas = np.unique(warps // self.warps_per_cta)
        self.shared.end(ctas[~self.alive.reshape(self.ctas, -1)[ctas].any(1)])

    def state(self, cls: type[State]) -> State:
        """The one object of a class for this wave, made at first use as cls(machine)."""
        found = self._states.get(cls)
        if found is None:
            found = self._states[cls] = cls(self)
        return found

    # What instructions read that is not in a register.

    def special(self, name: str, batch: Batch) -> np.ndarray:
        """A special register for a batch: (n, 32), (n, 1) or (1, 1)."""
        value = self._special.get(name)
        if value is None:
            raise EmulatorError(f"the special register {name} is not emulated")
        if callable(value):
            return value(batch)
        return value if len(value) == 1 else value[batch.index]

    def parameter_address(self, offset: int) -> np.ndarray:
        """Address of a byte of the kernel's parameters, (1, 1) uint64."""
        return np.array([[self.run.parameters.address + offset]], np.uint64)

    def generic(self, cta: int, address: int) -> tuple[str, int] | tuple[str, int, int]:
        """What a generic address is: ("global", address) or ("shared", cta, offset)."""
        if address >= LOCAL_WINDOW:
            raise AddressError(
                f"{address:#x} is an address of local memory, which only its own lane can reach"
            )
        if address < SHARED_WINDOW:
            return "global", address
        rank, offset = address - SHARED_WINDOW >> RANK_SHIFT, address & OFFSET_MASK
        if rank >= self.cluster_size:
            raise AddressError(f"{address:#x} is in the shared memory of rank {rank}, outside the cluster")
        return "shared", cta - cta % self.cluster_size + rank, offset

    # Order of accesses.

    def access(self, warp: int) -> Access | None:
        """Who accesses, for instructions of a warp; None if nobody checks."""
        if self.order is None:
            return None
        self.note_line()
        return self.order.generic(warp)

    def access_async(
        self, warp: int, channel: Hashable, in_order: bool = False, proxy: str = "async"
    ) -> Access | None:
        """Who accesses, for an operation that a warp issues now; None if nobody checks."""
        if self.order is None:
            return None
        self.note_line()
        return self.order.asynchronous(warp, channel, in_order, proxy)

    def blamed(
        self, error: EmulatorError, cta: int, warp: int | None, instruction: Instruction | None
    ) -> EmulatorError:
        """An error found when all warps have ended, about what a warp of a CTA had begun."""
        error.cta = tuple(self.cta_index[cta].tolist())
        error.warp = None if warp is None else warp % self.warps_per_cta
        return error if instruction is None else at_instruction(error, instruction)

    def note_line(self) -> None:
        """Tell the race checker which PTX line is being executed."""
        instruction = self.instruction_now()
        self.order.line = instruction.line if instruction else 0

    # What is under way.

    def later(self, queue: Hashable, function: Callable[[], None], warp: int | None = None) -> None:
        """Perform a function some time later, behind what its queue already holds; errors are of the warp."""
        issuer = (self.current, self.instruction_now(), warp)
        self._later.setdefault(queue, deque()).append((issuer, function))

    def instruction_now(self) -> Instruction | None:
        """The instruction that is being executed, or that issued what is being performed."""
        if self._issuer is not None:
            return self._issuer
        frame = sys._getframe(1)
        while frame is not None:
            origin = self.program.lines.get(frame.f_code)
            if origin is not None:
                return origin[frame.f_lineno - 1]
            frame = frame.f_back
        return None

    @property
    def pending(self) -> int:
        """How many functions are under way."""
        return sum(map(len, self._later.values()))

    def perform(self) -> None:
        """Perform the first function of a queue chosen by chance."""
        queues = list(self._later)
        queue = queues[self.dice.randrange(len(queues))] if len(queues) > 1 else queues[0]
        line = self._later[queue]
        issuer, function = line.popleft()
        if not line:
            del self._later[queue]
        self.current, self._issuer, warp = issuer
        try:
            function()
        except EmulatorError as error:
            if self._issuer is not None:
                at_instruction(error, self._issuer)
            if error.row is None and warp is not None:
                error.row = int((self.current.warps == warp).argmax())
            raise
        if self.run.options.watch is not None:
            self.run.options.watch(self, self._issuer)
        self._issuer = None

    def wake(self, key: Hashable) -> None:
        """Rows parked with this key can go on."""
        self.woken.append(key)

    def close(self) -> None:
        """Let go of the wave's memories: what refers to the machine in a circle would keep them for long."""
        self._states.clear()
        self._later.clear()
        self.at_end.clear()
        self.on_exit.clear()
        self.current = self.order = self.shared = self.local = None
        self.registers = []

    # Clusters that have not begun.

    @property
    def pending_clusters(self) -> int:
        """Clusters of the grid that have not begun."""
        return len(self.run.pending)

    def cancel_cluster(self) -> tuple[int, int, int] | None:
        """Take a cluster that has not begun out of the grid: %ctaid of its first CTA, or None."""
        return self.run.pending.popleft() if self.run.pending else None
