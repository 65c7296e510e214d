"""Barriers of CTAs and clusters: bar.*, barrier.{cta.}sync/arrive/red, barrier.cluster.*.

Lanes of the `.aligned` forms, bar.* among them, first wait for each other at the instruction; those of the
other forms may come to the barrier by different ones.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import BarrierError, Barriers
from dsv4lab.emulator.batch import bits_of
from dsv4lab.emulator.cluster_barriers import ClusterBarriers
from dsv4lab.emulator.convergence import Convergence
from dsv4lab.emulator.errors import at
from dsv4lab.emulator.isa.registry import Effect, Wait, instruction, unsupported
from dsv4lab.emulator.named_barriers import ALL, COUNT, NamedBarriers
from dsv4lab.emulator.ptx import Immediate, Instruction
from dsv4lab.emulator.waits import Waits

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_ALL_LANES = np.uint32(0xFFFFFFFF)
_REDUCTIONS = {"and": 0, "or": 1, "popc": 2}


@instruction("bar", "barrier")
def barrier(ins: Instruction) -> Effect:
    """All barriers of CTAs and clusters but mbarriers."""
    if ins.modifiers[:1] == ("cluster",):
        return _cluster(ins)
    kind, *rest = [m for m in ins.modifiers if m not in ("cta", "aligned")]
    aligned = ins.op == "bar" or "aligned" in ins.modifiers
    if kind == "sync" and not rest:
        return _plain(ins, True, aligned)
    if kind == "arrive" and not rest and len(ins.operands) == 2:
        return _plain(ins, False, aligned)
    if kind == "red" and len(rest) == 2 and rest[0] in _REDUCTIONS:
        return _reduction(ins, rest[0], aligned)
    raise unsupported(ins)


# Barriers of a CTA -----------------------------------------------------------------------------------------


def _plain(ins: Instruction, wait: bool, aligned: bool) -> Wait:
    """a {, b}: barrier and thread count."""
    number, count = (*ins.operands, Immediate(ALL))[:2]
    visit = _Visit(ins, wait, aligned)
    return Wait(visit, ((number, "s32"), (count, "s32")))


def _reduction(ins: Instruction, operation: str, aligned: bool) -> Wait:
    """d, a {, b}, c: result, barrier, thread count, predicate."""
    result, number, *count, value = ins.operands
    visit = _Visit(ins, True, aligned)
    which, popc = _REDUCTIONS[operation], operation == "popc"

    def function(batch: Batch, mask: np.ndarray, *reads: np.ndarray) -> np.ndarray:
        visit(batch, mask, *reads)
        found = batch.machine.state(NamedBarriers).reduced[which, batch.warps][:, None]
        return found.astype(np.uint32) if popc else found != 0

    reads = ((number, "s32"), (count[0] if count else Immediate(ALL), "s32"), (value, "pred"))
    return Wait(function, reads, ((result, "u32" if popc else "pred"),))


class _Visit:
    """What lanes do at one barrier instruction: gather, arrive, wait."""

    def __init__(self, ins: Instruction, wait: bool, aligned: bool) -> None:
        self.ins, self.wait, self.aligned = ins, wait, aligned

    def __call__(
        self,
        batch: Batch,
        mask: np.ndarray,
        numbers: np.ndarray,
        counts: np.ndarray,
        values: np.ndarray | None = None,
    ) -> None:
        machine = batch.machine
        here = mask.any(1)
        if self.aligned and not mask.all():
            here &= machine.state(Convergence).gather(batch, mask, np.full(len(batch), _ALL_LANES), self.ins)
        rows = np.flatnonzero(here)
        if not len(rows):
            return
        number, count = self._uniform(mask, numbers, rows), self._uniform(mask, counts, rows)
        lanes = bits_of(mask)[rows].tolist()
        true = [None] * len(rows) if values is None else bits_of(values & mask)[rows].tolist()
        barriers = machine.state(NamedBarriers)
        if machine.order is not None:
            self._publish(batch, barriers, rows, number, lanes)
        for row, barrier, bits, threads, yes in zip(rows.tolist(), number, lanes, count, true, strict=True):
            try:
                if not 0 <= barrier < COUNT:
                    raise BarrierError(f"barrier {barrier} is none of the barriers 0 to {COUNT - 1}")
                barriers.come(barrier, int(batch.warps[row]), bits, threads, yes, self.wait)
            except BarrierError as error:
                error.row = row
                raise
        self._leave(batch, barriers, rows.tolist(), number, lanes)

    def _uniform(self, mask: np.ndarray, values: np.ndarray, rows: np.ndarray) -> list[int]:
        """The value of each row, which its lanes must agree on."""
        if not any(values.strides):
            return [int(values[0, 0])] * len(rows)
        first = values[rows, mask[rows].argmax(1)]
        differ = ((values[rows] != first[:, None]) & mask[rows]).any(1)
        if differ.any():
            row = int(rows[differ.argmax()])
            what = f"the lanes of a warp do not agree on the barrier and thread count of {self.ins.opcode}"
            raise at(BarrierError(what), row)
        return first.tolist()

    def _publish(
        self, batch: Batch, barriers: NamedBarriers, rows: np.ndarray, number: list[int], lanes: list[int]
    ) -> None:
        """What warps did before they come is for all who wait."""
        coming = defaultdict(set)
        for row, barrier, bits in zip(rows.tolist(), number, lanes, strict=True):
            warp = int(batch.warps[row])
            if barriers.is_new(barrier, warp, bits):
                coming["bar", int(batch.ctas[row]), barrier].add(warp)
        for key, warps in coming.items():
            batch.machine.order.release(np.array(sorted(warps)), key)

    def _leave(
        self, batch: Batch, barriers: NamedBarriers, rows: list[int], number: list[int], lanes: list[int]
    ) -> None:
        """Rows go on, or wait."""
        machine, leaving = batch.machine, defaultdict(set)
        waits = machine.state(Waits)
        for row, barrier, bits in zip(rows, number, lanes, strict=True):
            cta, warp = int(batch.ctas[row]), int(batch.warps[row])
            key = ("bar", cta, barrier)
            if not barriers.passes(barrier, warp, bits, self.wait):
                waits.park(batch, row, self.ins, key, partial(barriers.describe, barrier, cta))
            elif self.wait:
                asked, until = int(machine.time[warp]), barriers.completed_at(barrier, warp)
                waits.done(warp, self.ins, asked, until, barrier=barrier)
                leaving[key].add(warp)
        if machine.order is not None:
            for key, warps in leaving.items():
                machine.order.acquire(np.array(sorted(warps)), key)


# The barrier of a cluster ----------------------------------------------------------------------------------


def _cluster(ins: Instruction) -> Effect:
    """barrier.cluster.arrive{.release, .relaxed}{.aligned} and barrier.cluster.wait{.acquire}{.aligned}."""
    kind, *rest = ins.modifiers[1:]
    aligned = "aligned" in rest
    if kind == "arrive" and {"release", "relaxed", "aligned"}.issuperset(rest):
        function = _cluster_arrive(ins, "relaxed" not in rest)
    elif kind == "wait" and {"acquire", "aligned"}.issuperset(rest):
        function = _cluster_wait(ins)
    else:
        raise unsupported(ins)

    def gathered(batch: Batch, mask: np.ndarray) -> None:
        if aligned:
            needed = np.full(len(batch), _ALL_LANES)
            whole = batch.machine.state(Convergence).gather(batch, mask, needed, ins)
            mask = mask & whole[:, None]
        if mask.any():
            function(batch, mask)

    return Wait(gathered) if aligned or kind == "wait" else Effect(gathered)


def _cluster_arrive(ins: Instruction, release: bool):
    def arrive(batch: Batch, mask: np.ndarray) -> None:
        machine = batch.machine
        barriers = machine.state(ClusterBarriers)
        if machine.order is not None:
            if release:
                for row in np.flatnonzero(mask.any(1)).tolist():
                    warp = int(batch.warps[row])
                    machine.order.release(warp, ("cluster", warp // barriers.width))
            else:
                machine.state(Barriers).orders_unseen()
        barriers.arrive(batch.warps, mask)

    return arrive


def _cluster_wait(ins: Instruction):
    def wait(batch: Batch, mask: np.ndarray) -> None:
        machine = batch.machine
        barriers = machine.state(ClusterBarriers)
        complete = barriers.complete(batch.warps, mask)
        for row in np.flatnonzero(mask.any(1)).tolist():
            warp = int(batch.warps[row])
            cluster = warp // barriers.width
            if complete[row]:
                if machine.order is not None:
                    machine.order.acquire(warp, ("cluster", cluster))
                asked, until = int(machine.time[warp]), int(barriers.completed_at[cluster])
                machine.state(Waits).done(warp, ins, asked, until, barrier="cluster")
            else:
                machine.state(Waits).park(
                    batch, row, ins, ("cluster", cluster), lambda c=cluster: barriers.describe(c)
                )

    return wait
