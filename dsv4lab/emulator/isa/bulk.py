"""cp.async.bulk and cp.reduce.async.bulk of plain bytes, and the bulk async-groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator import reductions
from dsv4lab.emulator.bulk_groups import BulkGroups
from dsv4lab.emulator.copy_engine import CopyEngines, Issue, each
from dsv4lab.emulator.delivery import deliver, receivers
from dsv4lab.emulator.errors import AddressError
from dsv4lab.emulator.isa.registry import Action, Effect, Wait, unsupported
from dsv4lab.emulator.lane_types import bit_width
from dsv4lab.emulator.ptx import Immediate, Instruction, Operand

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access

_UNIT = 16  # bytes that sizes and addresses are multiples of
_SPACES = ("global", "shared::cta", "shared::cluster")
_KNOWN = {
    "async", "bulk", "reduce", "prefetch", "L2", *_SPACES, "bulk_group", "mbarrier::complete_tx::bytes",
    "multicast::cluster", "L2::cache_hint", "cp_mask", "noftz",
}  # fmt: skip
# Reductions into shared memory. Those into global memory are the ones of `reductions`, of these types.
_IN_SHARED = {
    ("add", "u32"), ("add", "s32"), ("add", "u64"), ("min", "u32"), ("min", "s32"), ("max", "u32"),
    ("max", "s32"), ("inc", "u32"), ("dec", "u32"), ("and", "b32"), ("or", "b32"), ("xor", "b32"),
}  # fmt: skip
_IN_GLOBAL = ("f16", "bf16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64")


def build(ins: Instruction) -> Action:
    """A copy, reduction or prefetch without a tensormap."""
    reduction = ()
    if "reduce" in ins.modifiers:
        operation = next((m for m in ins.modifiers if m in reductions.TYPES), "")
        reduction = (operation, ins.modifiers[-1])
    if set(ins.modifiers) - _KNOWN - set(reduction):
        raise unsupported(ins)
    if "prefetch" in ins.modifiers:
        return _prefetch(ins)
    match [m for m in ins.modifiers if m in _SPACES]:
        case [("shared::cta" | "shared::cluster") as space, "global"] if not reduction:
            return _load(ins, space)
        case ["shared::cluster", "shared::cta"] if not reduction or reduction in _IN_SHARED:
            return _send(ins, reduction)
        case ["global", "shared::cta"] if not reduction or reduction[1] in _IN_GLOBAL:
            return _store(ins, reduction)
    raise unsupported(ins)


def effect(
    ins: Instruction, act: Callable[..., None], reads: Iterable[tuple[Operand, str]], together: bool = False
) -> Effect:
    """An effect of each lane by itself, act(Issue, *ints), or together as `each` has it."""

    def function(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> None:
        each(batch, mask, ins, act, *values, together=together)

    return Effect(function, tuple(reads))


def groups(ins: Instruction) -> Action:
    """cp.async.bulk.commit_group and cp.async.bulk.wait_group{.read} N."""
    if "commit_group" in ins.modifiers:
        return Effect(lambda batch, mask: batch.machine.state(BulkGroups).commit(batch, mask))
    (count,) = ins.operands
    if not isinstance(count, Immediate):
        raise unsupported(ins, "its operand is no constant")

    def wait(batch: Batch, mask: np.ndarray) -> None:
        batch.machine.state(BulkGroups).wait(batch, mask, ins, count.value, "read" in ins.modifiers)

    return Wait(wait)


def _check(size: int, **addresses: int) -> None:
    """Raise AddressError unless the size, and each global address, is a multiple of 16."""
    if size % _UNIT:
        raise AddressError(f"operand size must be a multiple of {_UNIT} bytes, got {size}")
    for name, address in addresses.items():
        if address % _UNIT:
            raise AddressError(
                f"operand {name}: the global address {address:#x} is not a multiple of {_UNIT}"
            )


def _prefetch(ins: Instruction) -> Effect:
    """[srcMem], size {, policy}: nothing but its operands is checked."""
    source, size = ins.operands[:2]
    return effect(
        ins, lambda _, source, size: _check(size, srcMem=source), ((source, "address"), (size, "u32"))
    )


def _load(ins: Instruction, space: str) -> Effect:
    """global -> shared::cta or shared::cluster: [dstMem], [srcMem], size, [mbar] {, ctaMask} {, policy}."""

    def act(issue: Issue, target: int, source: int, size: int, barrier: int, mask: int | None = None) -> None:
        machine = issue.machine
        _check(size, srcMem=source)
        place = issue.shared("dstMem", target, size, _UNIT, space)
        signal = issue.shared("mbar", barrier, 8, 8, space)
        where = receivers(issue, place, signal, mask)
        end = machine.state(CopyEngines).occupy(issue.cta, issue.time, size)

        def fetch() -> np.ndarray:
            return machine.memory.view(source, size).copy() if size else np.zeros(0, np.uint8)

        def put(cta: int, data: np.ndarray, access: Access | None) -> None:
            machine.shared.write_range(cta, place[1], data, access)

        deliver(issue, where, signal[1], size, end, fetch, put)
        machine.counters["bulk.bytes"] += size
        issue.trace(end, f"bulk load of {size} bytes", bytes=size)

    types = ("address", "address", "u32", "address", "u16")
    count = 5 if "multicast::cluster" in ins.modifiers else 4
    return effect(ins, act, zip(ins.operands[:count], types[:count], strict=True))


def _send(ins: Instruction, reduction: tuple[str, ...]) -> Effect:
    """shared::cta -> shared::cluster: [dstMem], [srcMem], size, [mbar]."""

    def act(issue: Issue, target: int, source: int, size: int, barrier: int) -> None:
        machine = issue.machine
        _check(size)
        place = issue.shared("dstMem", target, size, _UNIT, "shared::cluster")
        origin = issue.shared("srcMem", source, size, _UNIT, "shared::cta")
        signal = issue.shared("mbar", barrier, 8, 8, "shared::cluster")
        where = receivers(issue, place, signal)
        end = machine.state(CopyEngines).occupy(issue.cta, issue.time, size)

        def put(cta: int, _: None, access: Access | None) -> None:
            data = machine.shared.read_range(*origin, size, access)
            if reduction:
                _reduce_shared(issue, (cta, place[1]), data, reduction, access)
            else:
                machine.shared.write_range(cta, place[1], data, access)

        deliver(issue, where, signal[1], size, end, lambda: None, put)
        machine.counters["bulk.bytes"] += size
        issue.trace(end, f"bulk copy of {size} bytes within the cluster", bytes=size)

    types = ("address", "address", "u32", "address")
    return effect(ins, act, zip(ins.operands, types, strict=True))


def _reduce_shared(
    issue: Issue, place: tuple[int, int], data: np.ndarray, reduction: tuple[str, str], access: Access | None
) -> None:
    """Each element is reduced atomically, so that reductions into the same place do not race."""
    (cta, start), width, machine = place, bit_width(reduction[1]) // 8, issue.machine
    if access is not None:
        elements = np.arange(start, start + len(data), width)
        machine.order.write("shared", cta, elements, access, size=width, atomic=True)
    old = machine.shared.read_range(cta, start, len(data), None)
    machine.shared.write_range(cta, start, reductions.combine(*reduction, old, data), None)


def _store(ins: Instruction, reduction: tuple[str, ...]) -> Effect:
    """shared::cta -> global: [dstMem], [srcMem], size {, policy} {, byteMask}."""
    if reduction:
        reductions.check(*reduction)
    masked = "cp_mask" in ins.modifiers

    def act(issue: Issue, target: int, source: int, size: int, chosen: int = 0xFFFF) -> None:
        machine = issue.machine
        _check(size, dstMem=target)
        cta, offset = issue.shared("srcMem", source, size, _UNIT, "shared::cta")
        pending = machine.state(BulkGroups)
        access = pending.access(issue.warp)
        end = machine.state(CopyEngines).occupy(issue.cta, issue.time, size * len(issue.lanes))

        def write(data: np.ndarray) -> None:
            if not size:
                return
            memory = machine.memory.view(target, size)
            data = reductions.combine(*reduction, memory, data) if reduction else data
            memory[:] = np.where(chosen >> np.arange(size) % 16 & 1, data, memory) if masked else data

        pending.add(issue, partial(machine.shared.read_range, cta, offset, size, access), write, access, end)
        machine.counters["bulk.bytes"] += size * len(issue.lanes)
        issue.trace(end, f"bulk {'reduction' if reduction else 'store'} of {size} bytes", bytes=size)

    operands = [*zip(ins.operands[:3], ("address", "address", "u32"), strict=True)]
    operands += [(ins.operands[-1], "u16")] if masked else []
    return effect(ins, act, operands, together=not reduction)
