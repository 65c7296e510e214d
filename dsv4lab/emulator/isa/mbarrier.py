"""mbarrier instructions: init, inval, expect_tx, complete_tx, arrive, arrive_drop, pending_count; waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.isa.mbarrier_waits import wait
from dsv4lab.emulator.isa.registry import Action, Effect, Pure, instruction, unsupported
from dsv4lab.emulator.lane_groups import groups
from dsv4lab.emulator.mbarrier_state import MAX_COUNT
from dsv4lab.emulator.ptx import Immediate, Instruction, Memory, Operand, Sink
from dsv4lab.emulator.shared_address import locate, space_of

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_SPACES = ("shared::cluster", "shared::cta", "shared")
_MODIFIERS = {"b64", "release", "relaxed", "acquire", "cta", "cluster", *_SPACES}


@instruction("mbarrier")
def mbarrier(ins: Instruction) -> Action:
    """All of mbarrier.*."""
    kind, *rest = ins.modifiers
    build = _BUILDERS.get(kind)
    known = _MODIFIERS | _EXTRA.get(kind, set())
    if build is None or not known.issuperset(rest):
        raise unsupported(ins)
    return build(ins)


# Lane by lane --------------------------------------------------------------------------------------------


def _each(ins: Instruction, act: Callable[..., int | None], *counts: Operand, state: bool = False) -> Effect:
    """An effect that acts lane by lane: act(barriers, cta, offset, *counts, warp), the state it returns."""
    space = space_of(ins)
    address = next(operand for operand in ins.operands if isinstance(operand, Memory))

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, *counts: np.ndarray):
        barriers = batch.machine.state(Barriers)
        tokens = np.zeros(mask.shape, np.uint64) if state else None
        for row, lane in batch.lanes(mask):
            values = (int(count[row, lane]) for count in counts)
            try:
                where = locate(batch.machine, int(batch.ctas[row]), int(addresses[row, lane]), space)
                token = act(barriers, *where, *values, int(batch.warps[row]))
            except EmulatorError as error:
                at(error, row, lane)
                raise
            if state:
                tokens[row, lane] = token
        return tokens

    function.shared_bytes = 8  # bytes that the race checker must tell from their neighbours
    writes = ((ins.operands[0], "b64"),) if state else ()
    return Effect(function, ((address, "address"), *((count, "u32") for count in counts)), writes)


# Operations without a result -------------------------------------------------------------------------------


def _init(ins: Instruction) -> Effect:
    return _each(ins, Barriers.init, ins.operands[1])


def _inval(ins: Instruction) -> Effect:
    return _each(ins, Barriers.inval)


def _expect_tx(ins: Instruction) -> Effect:
    return _each(ins, Barriers.expect_tx, ins.operands[1])


def _complete_tx(ins: Instruction) -> Effect:
    def complete(barriers: Barriers, cta: int, offset: int, nbytes: int, warp: int) -> None:
        barriers.complete_tx(cta, offset, nbytes, time=int(barriers.machine.time[warp]))

    return _each(ins, complete, ins.operands[1])


# Arrivals --------------------------------------------------------------------------------------------------


def _arrive(ins: Instruction, drop: bool = False) -> Effect:
    """[state | _,] [addr] {, count | txCount}."""
    state, _, *counts = ins.operands
    sink = isinstance(state, Sink)
    if not sink and "shared::cluster" in ins.modifiers:
        raise unsupported(ins, "an arrival at shared::cluster returns no state")
    options = {
        "release": "relaxed" not in ins.modifiers,
        "complete": "noComplete" not in ins.modifiers,
        "drop": drop,
    }
    if "expect_tx" in ins.modifiers:
        return _each(ins, partial(_expect_and_arrive, options), counts[0], state=not sink)
    count = counts[0] if counts else Immediate(1)
    if sink and options["complete"]:
        return _arrive_together(ins, count, options)
    return _each(ins, partial(_arrive_once, options), count, state=not sink)


def _expect_and_arrive(
    options: dict, barriers: Barriers, cta: int, offset: int, nbytes: int, warp: int
) -> int:
    barriers.expect_tx(cta, offset, nbytes, warp)
    return _arrive_once(options, barriers, cta, offset, 1, warp)


def _arrive_once(options: dict, barriers: Barriers, cta: int, offset: int, count: int, warp: int) -> int:
    return barriers.arrive(cta, offset, count, warp, int(barriers.machine.time[warp]), **options)


def _arrive_together(ins: Instruction, count: Operand, options: dict) -> Effect:
    """Arrivals whose state nobody wants: those of a row at one barrier are counted at once."""
    space = space_of(ins)

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, counts: np.ndarray) -> None:
        barriers = batch.machine.state(Barriers)
        for row, parts in groups(mask, addresses, counts):
            cta, warp = int(batch.ctas[row]), int(batch.warps[row])
            try:
                for (address, each), lanes in parts:
                    where = locate(batch.machine, cta, address, space)
                    _arrive_times(options, barriers, where, each, int(np.count_nonzero(lanes)), warp)
            except EmulatorError as error:
                at(error, row)
                raise

    return Effect(function, ((ins.operands[1], "address"), (count, "u32")))


def _arrive_times(
    options: dict, barriers: Barriers, where: tuple[int, int], count: int, times: int, warp: int
) -> None:
    """`times` arrivals with a count; at once unless the phase would be complete before the last."""
    if count <= MAX_COUNT and times * count <= barriers.pending(*where):
        count, times = times * count, 1
    for _ in range(times):
        _arrive_once(options, barriers, *where, count, warp)


def _pending_count(ins: Instruction) -> Pure:
    def pending(state: np.ndarray) -> np.ndarray:
        return (state & np.uint64(MAX_COUNT)).astype(np.uint32)

    count, state = ins.operands
    return Pure(pending, ((state, "u64"),), ((count, "u32"),))


_BUILDERS: dict[str, Callable[[Instruction], Action]] = {
    "init": _init,
    "inval": _inval,
    "expect_tx": _expect_tx,
    "complete_tx": _complete_tx,
    "arrive": _arrive,
    "arrive_drop": partial(_arrive, drop=True),
    "pending_count": _pending_count,
    "test_wait": partial(wait, may_park=False),
    "try_wait": partial(wait, may_park=True),
}
_EXTRA = {
    "arrive": {"expect_tx", "noComplete"},
    "arrive_drop": {"expect_tx", "noComplete"},
    "test_wait": {"parity"},
    "try_wait": {"parity"},
}
