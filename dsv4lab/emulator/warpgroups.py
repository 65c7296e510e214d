"""What warpgroups have under way: who has come to a wgmma.mma_async, its groups, fences and model time.

A warpgroup is four warps of a CTA whose first one's index is a multiple of 4. An mma_async is one operation
of all four: those that come first wait for the others, it reads its operands once when the last has come, and
a warp that has waited for it knows that it is complete for all.

Model time, for the timeline only: the tensor cores of an SM do so many multiply-adds a cycle; 2048 of fp16
are H100's 989 TFLOPS dense with 132 SMs at 1.83 GHz.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.waits import Reason

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine

WARPS = 4
MULTIPLY_ADDS_PER_CYCLE = {"tf32": 1024, "f16": 2048, "f8f6f4": 4096, "i8": 4096}
# Of one operation, as an access of each warp; None without the race check.
Tokens = tuple["Access | None", ...]


class WarpgroupError(EmulatorError):
    """A use of wgmma that its rules forbid."""


class Warpgroups:
    """The warpgroups of a wave; `machine.state(Warpgroups)` is the one of a machine.

    Attributes:
        fenced: bool (warps,), which warps have executed wgmma.fence.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.fenced = np.zeros(machine.warps, np.bool_)
        self._free = np.zeros(machine.ctas, np.int64)
        self._end = np.zeros(machine.warps, np.int64)
        self._come: dict[tuple[int, int], dict[int, tuple]] = {}
        self._may_go: dict[tuple[int, int], Any] = {}
        self._open: dict[int, Tokens] = {}
        self._issued: dict[int, Instruction | None] = {}
        self._groups: dict[int, deque[tuple[Tokens, int]]] = {}
        if "leaks" in machine.checks:
            machine.at_end.append(self._check_end)

    # Coming together ---------------------------------------------------------------------------------------

    def first_warp(self, warp: int) -> int:
        """The first warp of a warp's warpgroup; both are numbers in the wave."""
        return warp - warp % self.machine.warps_per_cta % WARPS

    def gather(
        self,
        batch: Batch,
        rows: np.ndarray,
        same: list[tuple],
        ins: Instruction,
        begin: Callable[[int, tuple], Any],
    ) -> dict[int, tuple[list[int], Any]]:
        """Rows that execute an mma_async now, by the first warp of their warpgroup; the others are parked.

        Args:
            batch: one row a warp.
            rows: those that execute the instruction.
            same: for each row of the batch, what the warps of a warpgroup must agree on.
            ins: the instruction.
            begin: called once for each operation, when its last warp has come, with the first warp and what
                they agree on. What it returns is returned with the rows.
        Raises:
            WarpgroupError: where they do not.
        """
        groups: dict[int, list[int]] = {}
        for row in rows.tolist():
            groups.setdefault(self.first_warp(int(batch.warps[row])), []).append(row)
        found = {}
        for first, those in groups.items():
            go, begun = self._go(batch, first, those, same, ins, begin)
            if go:
                found[first] = go, begun
        return found

    def _go(
        self,
        batch: Batch,
        first: int,
        rows: list[int],
        same: list[tuple],
        ins: Instruction,
        begin: Callable[[int, tuple], Any],
    ) -> tuple[list[int], Any]:
        warps = [int(batch.warps[row]) for row in rows]
        free = [row for row, warp in zip(rows, warps, strict=True) if (warp, ins.line) in self._may_go]
        if free:
            begun = [self._may_go.pop((int(batch.warps[row]), ins.line)) for row in free]
            return free, begun[0]
        come = self._come.setdefault((first, ins.line), {})
        come.update((warp, same[row]) for row, warp in zip(rows, warps, strict=True))
        if len(come) == WARPS:
            return rows, self._begin(rows, warps, first, ins, begin)
        for row in rows:
            batch.park(row, ("wgmma", first, ins.line), Reason(lambda: self._missing(first, come)))
        return [], None

    def _begin(
        self,
        rows: list[int],
        warps: list[int],
        first: int,
        ins: Instruction,
        begin: Callable[[int, tuple], Any],
    ) -> Any:
        """All have come, these last: the operation begins, for those that wait too."""
        come = self._come.pop((first, ins.line))
        if len(set(come.values())) > 1:
            what = f"the warps of a warpgroup do not agree on the operands of {ins.opcode}"
            raise at(WarpgroupError(what), rows[0])
        try:
            begun = begin(first, come[warps[0]])
        except EmulatorError as error:
            raise at(error, rows[0]) from None
        if len(rows) < WARPS:
            self._may_go.update({(warp, ins.line): begun for warp in come if warp not in warps})
            self.machine.wake(("wgmma", first, ins.line))
        return begun

    def _missing(self, first: int, come: dict[int, tuple]) -> str:
        cta = first - first % self.machine.warps_per_cta
        absent = ", ".join(str(warp - cta) for warp in range(first, first + WARPS) if warp not in come)
        return f"the other warps of its warpgroup ({absent} of the CTA) to come there too"

    # Operations, groups, time ------------------------------------------------------------------------------

    def issue(self, first: int) -> Tokens:
        """Tokens of an mma_async that the four warps from `first` on issue now, one for each."""
        warps = range(first, first + WARPS)
        if not self.fenced[first : first + WARPS].all():
            raise WarpgroupError("the warp has executed no wgmma.fence before its first wgmma.mma_async")
        tokens = tuple(self.machine.access_async(warp, ("wgmma", warp), in_order=True) for warp in warps)
        self._open.update(dict.fromkeys(warps, tokens))
        self._issued.update(dict.fromkeys(warps, self.machine.instruction_now()))
        return tokens

    def occupy(self, first: int, kind: str, multiply_adds: int) -> tuple[int, int]:
        """Model time from and until which the tensor cores work on an operation that is issued now."""
        cta, warps = first // self.machine.warps_per_cta, slice(first, first + WARPS)
        start = max(int(self.machine.time[warps].max()), int(self._free[cta]))
        end = start + -(-multiply_adds // MULTIPLY_ADDS_PER_CYCLE[kind])
        self._free[cta] = self._end[warps] = end
        return start, end

    def commit(self, warp: int) -> None:
        """What a warp has issued since the last commit becomes a group, empty or not."""
        groups = self._groups.setdefault(warp, deque())
        groups.append((self._open.pop(warp, ()), int(self._end[warp])))

    def wait(self, warp: int, pending: int) -> int:
        """All but the last `pending` groups of a warp are to be complete; returns the model time of that."""
        groups, order, time = self._groups.get(warp, ()), self.machine.order, 0
        while len(groups) > pending:
            tokens, end = groups.popleft()
            time = max(time, end)
            if order is not None:
                # The operations of a warpgroup are in order: the last one of a group stands for it.
                for token in tokens:
                    order.release_access(token, ("wgmma", warp), alone=token.warp != warp)
                order.complete(("wgmma", warp))
                order.acquire(warp, ("wgmma", warp))
        return time

    def _check_end(self) -> None:
        """Raises WarpgroupError for operations that nobody has waited for when the kernel ends."""
        for warp in sorted({*self._open, *(warp for warp, groups in self._groups.items() if groups)}):
            what = "committed" if warp in self._open else "waited for"
            error = WarpgroupError(f"the warp has ended with wgmma.mma_async operations it has not {what}")
            cta = warp // self.machine.warps_per_cta
            raise self.machine.blamed(error, cta, warp, self._issued.get(warp))
