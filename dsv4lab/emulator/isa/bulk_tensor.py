"""cp.async.bulk.tensor, cp.reduce.async.bulk.tensor and the tensor prefetch: copies through a tensormap.

A load's transaction bytes are those of the whole box, whether inside the tensor or not. The descriptor is
read when the copy is issued. The im2col modes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator import reductions, tma
from dsv4lab.emulator.bulk_groups import BulkGroups
from dsv4lab.emulator.copy_engine import CopyEngines, Issue
from dsv4lab.emulator.delivery import deliver, receivers
from dsv4lab.emulator.isa.bulk import effect
from dsv4lab.emulator.isa.registry import Effect, unsupported
from dsv4lab.emulator.ptx import Instruction, Memory, Operand
from dsv4lab.emulator.tensormap import TensorMapError
from dsv4lab.emulator.tensormap_use import TensorMaps
from dsv4lab.emulator.tma import Box
from dsv4lab.emulator.tma_shared import read_shared, write_shared

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access

_RANKS = {f"{rank}d": rank for rank in range(1, 6)}
_KNOWN = {
    "async", "bulk", "tensor", "reduce", "prefetch", "L2", "global", "shared::cta", "shared::cluster", "tile",
    "tile::gather4", "tile::scatter4", "mbarrier::complete_tx::bytes", "bulk_group", "multicast::cluster",
    "L2::cache_hint", "cta_group::1", "cta_group::2", *_RANKS,
}  # fmt: skip
_FOUR = ("tile::gather4", "tile::scatter4")
_ONE_WAY = {"b4x16_p64": "loaded", "128B_atom32B_flip8B": "loaded"}


@dataclass(frozen=True)
class _Form:
    """What the modifiers say: rank, rows named one by one, reduction; the operand with the coordinates."""

    rank: int
    four: bool
    reduction: str
    tensor: Memory

    @property
    def reads(self) -> list[tuple[Operand, str]]:
        """The tensormap and the coordinates, as many as `count` says."""
        return [(self.tensor, "address"), *((c, "s32") for c in self.tensor.coordinates)]

    @property
    def count(self) -> int:
        """Coordinates of the instruction."""
        return 5 if self.four else self.rank

    def boxes(self, box: Box, coordinates: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The coordinates of each box that is copied: one, or four of a row each."""
        return [(coordinates[0], row) for row in coordinates[1:]] if self.four else [coordinates]


def build(ins: Instruction) -> Effect:
    """A load, store, reduction or prefetch of a box."""
    operation = next((m for m in ins.modifiers if m in reductions.TYPES), "")
    if set(ins.modifiers) - _KNOWN - {operation}:
        raise unsupported(ins)
    tensor = next((o for o in ins.operands if isinstance(o, Memory) and o.coordinates is not None), None)
    rank = next((_RANKS[m] for m in ins.modifiers if m in _RANKS), 0)
    four = any(m in ins.modifiers for m in _FOUR)
    form = _Form(rank, four, operation, tensor)
    if tensor is None or len(tensor.coordinates) != form.count or (four and (rank != 2 or operation)):
        raise unsupported(ins)
    if "prefetch" in ins.modifiers:
        return _prefetch(ins, form)
    if "mbarrier::complete_tx::bytes" in ins.modifiers:
        return _load(ins, form)
    return _store(ins, form)


def _box(issue: Issue, form: _Form, address: int, coordinates: tuple[int, ...], store: bool) -> Box:
    """The box of the descriptor at a generic address, which must suit the instruction."""
    box = issue.machine.state(TensorMaps).box(issue.cta, address)
    if box.map.rank != form.rank:
        raise TensorMapError(
            f"operand tensorMap describes a tensor of rank {box.map.rank}, the instruction one of {form.rank}"
        )
    tma.check_coordinates(box, coordinates[:1] if form.four else coordinates, store)
    for name in (box.map.element, box.map.swizzle) if store else ():
        if name in _ONE_WAY:
            raise TensorMapError(f"operand tensorMap: {name} can be {_ONE_WAY[name]} only, not stored")
    return box


def _prefetch(ins: Instruction, form: _Form) -> Effect:
    def act(issue: Issue, address: int, *coordinates: int) -> None:
        _box(issue, form, address, coordinates, False)

    return effect(ins, act, form.reads)


# Loads -----------------------------------------------------------------------------------------------------


def _load(ins: Instruction, form: _Form) -> Effect:
    """[dstMem], [tensorMap, coordinates], [mbar] {, ctaMask} {, policy}."""
    space = "shared::cta" if "shared::cta" in ins.modifiers else "shared::cluster"
    target, _, barrier, *rest = ins.operands
    multicast, pair = "multicast::cluster" in ins.modifiers, "cta_group::2" in ins.modifiers
    if form.reduction:
        raise unsupported(ins)

    def act(issue: Issue, target: int, barrier: int, *values: int) -> None:
        *mask, address = values[: 1 + multicast]
        coordinates = values[1 + multicast :]
        machine = issue.machine
        box = _box(issue, form, address, coordinates, False)
        whole = tma.rows_of(box, 4) if form.four else box
        place = issue.shared("dstMem", target, whole.shared_bytes, tma.ALIGNMENT, space)
        # A pair of CTAs may signal each other although the data stays in the issuing one.
        signal = issue.shared("mbar", barrier, 8, 8, "shared::cluster" if pair else space)
        where = receivers(issue, place, signal, mask[0] if mask else None, pair)
        end = machine.state(CopyEngines).occupy(issue.cta, issue.time, whole.nbytes)

        def fetch() -> np.ndarray:
            tiles = [tma.load(box, machine.memory, at) for at in form.boxes(box, coordinates)]
            return tiles[0] if len(tiles) == 1 else np.concatenate(tiles)

        def put(cta: int, tile: np.ndarray, access: Access | None) -> None:
            write_shared(whole, machine.shared, cta, place[1], tile, access)

        deliver(issue, where, signal[1], whole.nbytes, end, fetch, put)
        _count(issue, "load", whole, coordinates, end, place[1])

    reads = [
        (target, "address"),
        (barrier, "address"),
        *([(rest[0], "u16")] if multicast else []),
        *form.reads,
    ]
    return effect(ins, act, reads)


# Stores and reductions -------------------------------------------------------------------------------------


def _store(ins: Instruction, form: _Form) -> Effect:
    """[tensorMap, coordinates], [srcMem] {, policy}."""

    def act(issue: Issue, source: int, address: int, *coordinates: int) -> None:
        machine = issue.machine
        box = _box(issue, form, address, coordinates, True)
        if form.reduction:
            reductions.check(form.reduction, box.map.element)
        whole = tma.rows_of(box, 4) if form.four else box
        cta, offset = issue.shared("srcMem", source, whole.shared_bytes, tma.ALIGNMENT, "shared::cta")
        groups = machine.state(BulkGroups)
        access = groups.access(issue.warp)
        end = machine.state(CopyEngines).occupy(issue.cta, issue.time, whole.nbytes * len(issue.lanes))

        def write(tile: np.ndarray) -> None:
            boxes = form.boxes(box, coordinates)
            for at, part in zip(boxes, np.split(tile, len(boxes)), strict=True):
                if form.reduction:
                    tma.reduce(box, machine.memory, at, part, form.reduction)
                else:
                    tma.store(box, machine.memory, at, part)

        groups.add(
            issue, partial(read_shared, whole, machine.shared, cta, offset, access), write, access, end
        )
        _count(issue, "store", whole, coordinates, end, offset)

    # A store that all lanes issue with the same operands is issued 32 times on a GPU too, to the same effect.
    reads = [(ins.operands[1], "address"), *form.reads]
    return effect(ins, act, reads, together=not form.reduction)


def _count(issue: Issue, kind: str, box: Box, coordinates: tuple[int, ...], end: int, offset: int) -> None:
    counters = issue.machine.counters
    counters[f"tma.{kind}s"] += len(issue.lanes)
    counters[f"tma.{kind}_bytes"] += box.nbytes * len(issue.lanes)
    if issue.machine.trace is not None:
        size = " x ".join(map(str, box.counts[::-1]))
        text = f"{kind} of {size} {box.map.element} at {coordinates}"
        text += f", by {len(issue.lanes)} lanes" if len(issue.lanes) > 1 else ""
        issue.trace(end, text, bytes=box.nbytes, map=box.map, at=coordinates, shared=offset)
