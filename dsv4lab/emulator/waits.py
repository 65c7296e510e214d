"""Rows that wait for a barrier: counted, and traced from when they were parked until they go on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from dsv4lab.emulator.ptx import Instruction

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine


class Reason:
    """Says what a row waits for at the moment when somebody asks: the barrier's counts as they are then.

    Args:
        describe: says it.
        give_up: for an instruction that waits only for a time: lets the row go on without what it waits for.
    """

    def __init__(self, describe: Callable[[], str], give_up: Callable[[], None] | None = None) -> None:
        self._describe = describe
        self.give_up = give_up

    def __str__(self) -> str:
        return self._describe()


class Waits:
    """The rows of a wave that wait for barriers; `machine.state(Waits)` is the one of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._since: dict[tuple[int, int], int] = {}

    def park(
        self,
        batch: Batch,
        row: int,
        ins: Instruction,
        key: Hashable,
        describe: Callable[[], str],
        give_up: Callable[[], None] | None = None,
    ) -> None:
        """Park a row at an instruction; `describe` and `give_up` are as of Reason."""
        warp = int(batch.warps[row])
        if (warp, ins.line) not in self._since:
            self._since[warp, ins.line] = int(self.machine.time[warp])
            self.machine.counters["barrier.parked"] += 1
        batch.park(row, key, Reason(describe, give_up))

    def done(self, warp: int, ins: Instruction, asked: int, until: int, **detail: Any) -> None:
        """A warp that asked at model time `asked` goes on at `until` or before: count and trace its wait.

        Whether it was parked is chance: also without that it has waited if `until` is later than `asked`.
        """
        machine = self.machine
        machine.time[warp] = end = max(int(machine.time[warp]), until)
        machine.counters["barrier.waits"] += 1
        start = self._since.pop((warp, ins.line), asked)
        if end > start and machine.trace is not None:
            cta, inside = divmod(warp, machine.warps_per_cta)
            machine.trace.add("wait", cta, inside, start, end, ins.line, ins.text.strip(), **detail)
