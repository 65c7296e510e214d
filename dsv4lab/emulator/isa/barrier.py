"""Barriers of CTAs and clusters: bar.*, barrier.{cta.}sync/arrive/red, bar.warp.sync, barrier.cluster.*.

Lanes of the `.aligned` forms, bar.* among them, first wait for each other at the instruction; those of the
other forms may come to the barrier by different ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import BarrierError, Barriers
from dsv4lab.emulator.cluster_barriers import ClusterBarriers
from dsv4lab.emulator.convergence import Convergence
from dsv4lab.emulator.errors import at
from dsv4lab.emulator.isa.registry import Effect, Wait, instruction, unsupported
from dsv4lab.emulator.isa.warp import warp_sync
from dsv4lab.emulator.named_barriers import ALL, COUNT, NamedBarriers
from dsv4lab.emulator.ptx import Immediate, Instruction
from dsv4lab.emulator.waits import Waits

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_ALL_LANES = np.uint32(0xFFFFFFFF)
_REDUCTIONS = {"and": 0, "or": 1, "popc": 2}


@instruction("bar", "barrier")
def barrier(ins: Instruction) -> Effect:
    """All barriers but mbarriers."""
    if ins.modifiers[:2] == ("warp", "sync"):
        return warp_sync(ins)
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
        here = mask.any(1)
        if self.aligned:
            needed = np.full(len(batch), _ALL_LANES)
            here &= batch.machine.state(Convergence).gather(batch, mask, needed, self.ins)
        rows = np.flatnonzero(here)
        if not len(rows):
            return
        number, count = self._uniform(mask, numbers, rows), self._uniform(mask, counts, rows)
        wrong = (number < 0) | (number >= COUNT)
        if wrong.any():
            i = int(wrong.argmax())
            raise at(
                BarrierError(f"barrier {number[i]} is none of the barriers 0 to {COUNT - 1}"), int(rows[i])
            )
        for barrier in np.unique(number).tolist():
            those = number == barrier
            self._at(batch, mask, barrier, rows[those], count[those], values)

    def _uniform(self, mask: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The value of each row, which its lanes must agree on."""
        first = values[rows, mask[rows].argmax(1)]
        differ = ((values[rows] != first[:, None]) & mask[rows]).any(1)
        if differ.any():
            row = int(rows[differ.argmax()])
            what = f"the lanes of a warp do not agree on the barrier and thread count of {self.ins.opcode}"
            raise at(BarrierError(what), row)
        return first.astype(np.int64)

    def _at(
        self,
        batch: Batch,
        mask: np.ndarray,
        barrier: int,
        rows: np.ndarray,
        count: np.ndarray,
        values: np.ndarray | None,
    ) -> None:
        """Rows come to one barrier, or back to it."""
        machine = batch.machine
        barriers, warps = machine.state(NamedBarriers), batch.warps[rows]
        lanes = mask[rows]
        if machine.order is not None:
            self._publish(barriers, barrier, warps, lanes, batch)
        try:
            barriers.come(barrier, warps, lanes, count, None if values is None else values[rows])
        except BarrierError as error:
            error.row = int(rows[error.row])
            raise
        passed = barriers.passes(barrier, warps, lanes, self.wait)
        for row in rows[passed].tolist() if self.wait else ():
            self._go_on(batch, barriers, barrier, row)
        for row in rows[~passed].tolist():
            cta = int(batch.ctas[row])
            machine.state(Waits).park(
                batch, row, self.ins, ("bar", cta, barrier), lambda c=cta: barriers.describe(barrier, c)
            )

    def _publish(
        self, barriers: NamedBarriers, barrier: int, warps: np.ndarray, lanes: np.ndarray, batch: Batch
    ) -> None:
        """What warps did before they come is for all who wait."""
        new = warps[barriers.fresh(warps, lanes)]
        for cta in np.unique(new // batch.machine.warps_per_cta).tolist():
            mine = np.unique(new[new // batch.machine.warps_per_cta == cta])
            batch.machine.order.release(mine, ("bar", cta, barrier))

    def _go_on(self, batch: Batch, barriers: NamedBarriers, barrier: int, row: int) -> None:
        machine, cta, warp = batch.machine, int(batch.ctas[row]), int(batch.warps[row])
        if machine.order is not None:
            machine.order.acquire(warp, ("bar", cta, barrier))
        asked, until = int(machine.time[warp]), int(barriers.completed_at[barrier, cta])
        machine.state(Waits).done(warp, self.ins, asked, until, barrier=barrier)


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
