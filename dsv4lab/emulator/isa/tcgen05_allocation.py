"""tcgen05.alloc, .dealloc and .relinquish_alloc_permit.

With .cta_group::2 one warp of each CTA of the pair takes part in alloc and dealloc, and whoever comes first
waits for the other: PTX allows dealloc to wait, so a kernel must not hang when it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.errors import AddressError, at
from dsv4lab.emulator.isa.registry import Action, Effect, Wait
from dsv4lab.emulator.isa.tcgen05_pipe import TensorPipes, cta_group, in_shared_memory
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.tensor_memory import TensorMemory, TensorMemoryError

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine


class Pairs:
    """What the CTAs of pairs have asked for and been given, until both have."""

    def __init__(self, machine: Machine) -> None:
        self.asked: dict[tuple[str, int], Any] = {}
        self.given: dict[tuple[str, int], Any] = {}


def allocate(ins: Instruction) -> Action:
    """tcgen05.alloc [shared address], columns."""
    group = cta_group(ins)
    in_shared = "shared::cta" in ins.modifiers
    destination, columns = ins.operands

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, columns: np.ndarray) -> None:
        machine = batch.machine
        tensor = machine.state(TensorMemory)
        for row in _rows(batch, mask, "alloc"):
            warp, cta, count = int(batch.warps[row]), int(batch.ctas[row]), int(columns[row, 0])
            machine.state(TensorPipes).use(cta, group)
            try:
                place = _allocated(batch, row, tensor, group, count)
            except TensorMemoryError as error:
                raise at(error, row) from None
            if place is not None:
                where = _own_shared(machine, cta, int(addresses[row, 0]), in_shared)
                data = np.array([place], np.uint32).view(np.uint8)
                machine.shared.write_range(cta, where, data, machine.access(warp))

    return Wait(function, reads=((destination, "address"), (columns, "u32")))


def free(ins: Instruction) -> Action:
    """tcgen05.dealloc address, columns."""
    group = cta_group(ins)
    address, columns = ins.operands

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, columns: np.ndarray) -> None:
        machine = batch.machine
        tensor = machine.state(TensorMemory)
        for row in _rows(batch, mask, "dealloc"):
            cta, where, count = int(batch.ctas[row]), int(addresses[row, 0]), int(columns[row, 0])
            machine.state(TensorPipes).use(cta, group)
            try:
                _freed(batch, row, tensor, group, (where, count))
            except TensorMemoryError as error:
                raise at(error, row) from None
            machine.wake(("tensor memory", cta))

    return Wait(function, reads=((address, "u32"), (columns, "u32")))


def relinquish(ins: Instruction) -> Action:
    """tcgen05.relinquish_alloc_permit."""
    group = cta_group(ins)

    def function(batch: Batch, mask: np.ndarray) -> None:
        for row in _rows(batch, mask, "relinquish_alloc_permit"):
            cta = int(batch.ctas[row])
            batch.machine.state(TensorPipes).use(cta, group)
            batch.machine.state(TensorMemory).relinquish(cta)

    return Effect(function)


def _rows(batch: Batch, mask: np.ndarray, name: str) -> list[int]:
    """Rows that execute the instruction. All lanes of a warp must (.sync.aligned)."""
    some = mask.any(axis=1)
    partial = some & ~mask.all(axis=1)
    if partial.any():
        raise at(
            TensorMemoryError(f"tcgen05.{name} is executed by some lanes of a warp, and all must"),
            int(partial.argmax()),
        )
    return np.nonzero(some)[0].tolist()


def _own_shared(machine: Machine, cta: int, address: int, in_shared: bool) -> int:
    """Offset in a CTA's own shared memory."""
    owner, offset = in_shared_memory(machine, cta, address, in_shared)
    if owner != cta:
        raise AddressError(f"tcgen05.alloc writes to {address:#x}, which is another CTA's shared memory")
    if offset % 4:
        raise AddressError(f"tcgen05.alloc writes to {address:#x}, which is not aligned to 4 bytes")
    return offset


def _allocated(batch: Batch, row: int, tensor: TensorMemory, group: int, columns: int) -> int | None:
    """Address that a row's CTA gets; None if the row has to wait."""
    cta = int(batch.ctas[row])
    if group == 1:
        place = tensor.allocate((cta,), columns, int(batch.warps[row]))
        if place is None:
            _park_for_columns(batch, row, tensor, columns)
        return place
    pairs = batch.machine.state(Pairs)
    if ("alloc", cta) in pairs.given:
        return pairs.given.pop(("alloc", cta))
    peer = cta ^ 1
    other = pairs.asked.get(("alloc", peer))
    pairs.asked["alloc", cta] = columns
    if other is None:
        batch.park(row, ("tensor memory pair", cta), f"tcgen05.alloc of {columns} columns in the peer CTA")
        return None
    if other != columns:
        raise TensorMemoryError(f"the CTAs of a pair allocate {columns} and {other} columns together")
    place = tensor.allocate((cta, peer), columns, int(batch.warps[row]))
    if place is None:
        _park_for_columns(batch, row, tensor, columns)
        return None
    del pairs.asked["alloc", cta], pairs.asked["alloc", peer]
    pairs.given["alloc", peer] = place
    batch.machine.wake(("tensor memory pair", peer))
    return place


def _park_for_columns(batch: Batch, row: int, tensor: TensorMemory, columns: int) -> None:
    cta = int(batch.ctas[row])
    reason = f"{columns} free columns of tensor memory; allocated are {tensor.describe(cta)}"
    batch.park(row, ("tensor memory", cta), reason)


def _freed(batch: Batch, row: int, tensor: TensorMemory, group: int, what: tuple[int, int]) -> None:
    cta = int(batch.ctas[row])
    if group == 1:
        tensor.free((cta,), *what)
        return
    pairs = batch.machine.state(Pairs)
    if pairs.given.pop(("free", cta), None) is not None:
        return
    tensor.check_allocation(cta, *what)
    peer = cta ^ 1
    other = pairs.asked.pop(("free", peer), None)
    if other is None:
        pairs.asked["free", cta] = what
        batch.park(row, ("tensor memory pair", cta), f"tcgen05.dealloc of {what[1]} columns in the peer CTA")
        return
    if other != what:
        raise TensorMemoryError(f"the CTAs of a pair free {what} and {other} (address, columns) together")
    tensor.free((cta, peer), *what)
    pairs.given["free", peer] = what
    batch.machine.wake(("tensor memory pair", peer))
    batch.machine.wake(("tensor memory", peer))
