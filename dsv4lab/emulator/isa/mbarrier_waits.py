"""mbarrier.test_wait and mbarrier.try_wait.

A try_wait that finds its phase incomplete answers false the first time a warp asks at that instruction for
that phase, since pipelines peek at stages that only their own later steps fill. Asked again, it parks the row
until the phase is complete, or until no warp can go on: then its time is over and it answers false once more.
test_wait never parks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.isa.registry import Effect, Wait
from dsv4lab.emulator.lane_groups import Group, groups
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.shared_address import locate, space_of
from dsv4lab.emulator.waits import Waits

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine


class _Attempts:
    """What each warp has asked for in vain: (instruction, barrier, phase) by warp."""

    def __init__(self, machine: Machine) -> None:
        self.failed: dict[int, set[tuple]] = {}
        self.given_up: set[tuple[int, int]] = set()

    def again(self, warp: int, question: tuple) -> bool:
        """Whether the warp has asked this before; if not, it has now."""
        asked = self.failed.setdefault(warp, set())
        if question in asked:
            return True
        asked.add(question)
        return False

    def give_up(self, warp: int, line: int) -> None:
        """The warp's time at an instruction is over."""
        self.given_up.add((warp, line))

    def goes_on(self, warp: int, line: int) -> bool:
        """Whether it was, which counts once."""
        place = (warp, line)
        found = place in self.given_up
        self.given_up.discard(place)
        return found

    def forget(self, warp: int, line: int) -> None:
        """The warp goes on from an instruction."""
        asked = self.failed.get(warp)
        if asked:
            self.failed[warp] = {question for question in asked if question[0] != line}


def wait(ins: Instruction, may_park: bool) -> Effect:
    """waitComplete, [addr], state | phaseParity {, suspendTimeHint}."""
    complete, address, wanted, *_ = ins.operands
    parity = "parity" in ins.modifiers
    waiter = _Waiter(ins, parity, may_park)
    reads = ((address, "address"), (wanted, "u32" if parity else "u64"))
    return (Wait if may_park else Effect)(waiter.wait, reads, ((complete, "pred"),))


class _Waiter:
    """One wait instruction."""

    def __init__(self, ins: Instruction, parity: bool, may_park: bool) -> None:
        self.ins, self.may_park = ins, may_park
        self.space = space_of(ins)
        self.acquire = "relaxed" not in ins.modifiers
        self.completed = Barriers.completed if parity else Barriers.completed_token
        self.parity = parity

    def wait(self, batch: Batch, mask: np.ndarray, addresses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Which lanes' phases are complete."""
        answer = np.zeros(mask.shape, np.bool_)
        for row, parts in groups(mask, addresses, wanted):
            try:
                self._row(batch, row, parts, answer)
            except EmulatorError as error:
                at(error, row)
                raise
        return answer

    def _row(self, batch: Batch, row: int, parts: list[Group], answer: np.ndarray) -> None:
        machine, warp, cta = batch.machine, int(batch.warps[row]), int(batch.ctas[row])
        barriers, attempts, open_ = machine.state(Barriers), machine.state(_Attempts), []
        for (address, want), lanes in parts:
            where = locate(machine, cta, address, self.space)
            if self.completed(barriers, *where, want, warp):
                answer[row] |= lanes
                self._go_on(machine, barriers, where, warp)
            else:
                open_.append((where, want))
        if not self.may_park:
            return
        if len(open_) < len(parts):
            attempts.forget(warp, self.ins.line)
        elif self._asked_before(attempts, barriers, warp, open_) and not attempts.goes_on(
            warp, self.ins.line
        ):
            self._park(batch, row, barriers, open_)

    def _go_on(self, machine: Machine, barriers: Barriers, where: tuple[int, int], warp: int) -> None:
        asked = int(machine.time[warp])
        until = barriers.acquire(*where, warp, self.acquire)
        waited = {"barrier": where[1], "phase": barriers.phase(*where) - 1}
        machine.state(Waits).done(warp, self.ins, asked, until, **waited)

    def _asked_before(self, attempts: _Attempts, barriers: Barriers, warp: int, open_: list) -> bool:
        before = True
        for where, want in open_:
            question = (self.ins.line, *where, want, barriers.phase(*where))
            before &= attempts.again(warp, question)
        return before

    def _park(self, batch: Batch, row: int, barriers: Barriers, open_: list) -> None:
        """Until one of the phases is complete."""
        key = ("mbarrier", *open_[0][0])
        if len(open_) > 1:
            key = ("mbarriers", int(batch.warps[row]), self.ins.line)
            for where, _ in open_:
                barriers.also_wake(*where, key)

        def describe() -> str:
            return "; ".join(
                f"parity {want} of {barriers.describe(*where)}" if self.parity else barriers.describe(*where)
                for where, want in open_
            )

        machine, warp = batch.machine, int(batch.warps[row])
        give_up = partial(machine.state(_Attempts).give_up, warp, self.ins.line)
        machine.state(Waits).park(batch, row, self.ins, key, describe, give_up)
