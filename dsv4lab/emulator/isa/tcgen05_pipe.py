"""The queue in which a CTA's tcgen05 operations are performed, their model time, commit and fences.

Operations of a CTA (of a pair of CTAs with .cta_group::2) are performed in the order in which they were
issued, some time later; the race check takes those of one warp to be in order, those of several not.
tcgen05.commit stands in the same queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import AddressError, at
from dsv4lab.emulator.isa.registry import Action, Effect, unsupported
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.tensor_memory import TensorMemoryError

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine


class TensorPipes:
    """Order and model time of the tensor cores of a wave.

    Attributes:
        free: model time from which each CTA's tensor core is free, int64 (ctas,).
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.free = np.zeros(machine.ctas, np.int64)
        self._group: int | None = None
        self._done: dict[int, int] = {}

    def use(self, cta: int, group: int) -> tuple[int, ...]:
        """The CTAs that an instruction with this .cta_group works on.

        Raises:
            TensorMemoryError: if other instructions of the kernel had another .cta_group, or the CTA has no
                peer in its cluster.
        """
        if self._group not in (None, group):
            raise TensorMemoryError(
                f"a tcgen05 instruction with .cta_group::{group} in a kernel that has others with "
                f".cta_group::{self._group}"
            )
        self._group = group
        if group == 1:
            return (cta,)
        if self.machine.cluster_size % 2:
            raise TensorMemoryError(
                f"a tcgen05 instruction with .cta_group::2 in a cluster of {self.machine.cluster_size} CTA(s)"
            )
        return (cta & ~1, cta | 1)

    def occupy(self, ctas: tuple[int, ...], warp: int, cycles: int) -> tuple[int, int]:
        """Model time from which and until which the tensor cores work on something issued now."""
        start = max(int(self.machine.time[warp]), *(int(self.free[cta]) for cta in ctas))
        end = start + cycles
        self.free[list(ctas)] = end
        self._done[warp] = max(self._done.get(warp, 0), end)
        return start, end

    def done(self, warp: int) -> int:
        """Model time at which all that a warp has issued is done."""
        return max(self._done.get(warp, 0), int(self.machine.time[warp]))

    def later(self, ctas: tuple[int, ...], function: Callable[[], None], warp: int) -> None:
        """Perform what a warp has issued, behind the earlier operations of these CTAs."""
        self.machine.later(("tcgen05", ctas[0]), function, warp)

    def access(self, warp: int) -> Access | None:
        """Token of an operation that a warp issues now."""
        return self.machine.access_async(warp, ("tcgen05", warp), in_order=True)


def cta_group(ins: Instruction) -> int:
    """1 or 2, of .cta_group. Raises UnsupportedInstruction without it."""
    for group in (1, 2):
        if f"cta_group::{group}" in ins.modifiers:
            return group
    raise unsupported(ins, "it has no .cta_group")


def fence(ins: Instruction) -> Action:
    """tcgen05.fence::before_thread_sync and ::after_thread_sync: everything is in that order anyway."""
    return Effect(lambda batch, mask: None)


def commit(ins: Instruction) -> Action:
    """tcgen05.commit [mbarrier]{, CTA mask}: an arrival when the thread's earlier operations are done."""
    group = cta_group(ins)
    multicast = "multicast::cluster" in ins.modifiers
    in_shared = "shared::cluster" in ins.modifiers
    address, *cta_mask = ins.operands
    if "mbarrier::arrive::one" not in ins.modifiers or len(cta_mask) != multicast:
        raise unsupported(ins)

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, *cta_masks: np.ndarray) -> None:
        for row, lane in batch.lanes(mask):
            chosen = int(cta_masks[0][row, lane]) if multicast else None
            _commit(batch, (row, lane), group, int(addresses[row, lane]), in_shared, chosen)

    return Effect(function, reads=((address, "address"), *((m, "u16") for m in cta_mask)))


def _commit(
    batch: Batch, place: tuple[int, int], group: int, address: int, in_shared: bool, chosen: int | None
) -> None:
    machine, row = batch.machine, place[0]
    warp, cta = int(batch.warps[row]), int(batch.ctas[row])
    pipes = machine.state(TensorPipes)
    try:
        ctas = pipes.use(cta, group)
        targets = _targets(machine, cta, address, in_shared, chosen)
    except (TensorMemoryError, AddressError) as error:
        raise at(error, *place) from None
    access, time = pipes.access(warp), pipes.done(warp)

    def perform() -> None:
        for owner, offset in targets:
            machine.state(Barriers).arrive(owner, offset, 1, None, time, access)

    pipes.later(ctas, perform, warp)


def in_shared_memory(machine: Machine, cta: int, address: int, in_shared: bool) -> tuple[int, int]:
    """CTA and offset of a shared address, or of a generic one. Raises AddressError for another space."""
    if in_shared:
        owner, offset = machine.shared.locate(cta, address)
        return int(owner), int(offset)
    space, *place = machine.generic(cta, address)
    if space != "shared":
        raise AddressError(f"the generic address {address:#x} is not in shared memory")
    return place[0], place[1]


def _targets(
    machine: Machine, cta: int, address: int, in_shared: bool, chosen: int | None
) -> list[tuple[int, int]]:
    """(CTA, offset) of the mbarriers that a commit arrives at."""
    owner, offset = in_shared_memory(machine, cta, address, in_shared)
    if chosen is None:
        return [(owner, offset)]
    if not chosen or chosen >> machine.cluster_size:
        raise AddressError(
            f"tcgen05.commit with the CTA mask {chosen:#x} in a cluster of {machine.cluster_size} CTA(s)"
        )
    first = cta - cta % machine.cluster_size
    return [(first + rank, offset) for rank in range(machine.cluster_size) if chosen >> rank & 1]
