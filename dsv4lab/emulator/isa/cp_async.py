"""cp.async: copies of 4, 8 or 16 bytes by each lane, their groups, and mbarriers that wait for them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import AddressError, EmulatorError, at
from dsv4lab.emulator.isa.registry import Effect, unsupported
from dsv4lab.emulator.ptx import Immediate, Instruction, Not, Register
from dsv4lab.emulator.shared_address import locate, space_of
from dsv4lab.emulator.thread_copies import LATENCY, Copy, ThreadCopies

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_HINTS = ("L2::64B", "L2::128B", "L2::256B", "L2::cache_hint")
_SPACES = ("shared", "shared::cta", "global")
_SIZES = {"ca": (4, 8, 16), "cg": (16,)}


def build(ins: Instruction) -> Effect:
    """Everything that begins with cp.async and is no bulk copy."""
    match ins.modifiers[1:]:
        case ("commit_group",):
            return Effect(lambda batch, mask: batch.machine.state(ThreadCopies).commit(batch, mask))
        case ("wait_group",) if isinstance(ins.operands[0], Immediate):
            return Effect(partial(_wait, most=ins.operands[0].value))
        case ("wait_all",):
            return Effect(_wait_all)
        case ("mbarrier", "arrive", *rest) if {"noinc", "b64", "shared", "shared::cta"}.issuperset(rest):
            return _arrive(ins)
        case (("ca" | "cg"), *rest) if {*_SPACES, *_HINTS}.issuperset(rest):
            return _copy(ins)
    raise unsupported(ins)


def _wait(batch: Batch, mask: np.ndarray, most: int) -> None:
    batch.machine.state(ThreadCopies).wait(batch, mask, most)


def _wait_all(batch: Batch, mask: np.ndarray) -> None:
    copies = batch.machine.state(ThreadCopies)
    copies.commit(batch, mask)
    copies.wait(batch, mask, 0)


def _copy(ins: Instruction) -> Effect:
    """[dst], [src], cp-size {, src-size | ignore-src} {, cache-policy}."""
    target, source, size, *rest = ins.operands
    rest = rest[:-1] if "L2::cache_hint" in ins.modifiers else rest
    if not isinstance(size, Immediate) or size.value not in _SIZES[ins.modifiers[1]] or len(rest) > 1:
        raise unsupported(ins)
    nbytes = size.value
    ignored = bool(rest) and (
        isinstance(rest[0], Not) or (isinstance(rest[0], Register) and rest[0].type == "pred")
    )

    def run(
        batch: Batch, mask: np.ndarray, targets: np.ndarray, sources: np.ndarray, *given: np.ndarray
    ) -> None:
        machine = batch.machine
        own = batch.machine.own_shared[batch.index].astype(np.int64)
        offsets = _offsets(mask, targets - own, sources, nbytes, machine.shared.size)
        given = (
            np.full(mask.shape, nbytes)
            if not given
            else np.where(given[0], 0, nbytes)
            if ignored
            else given[0]
        )
        _check_given(mask, given, nbytes)
        copies = machine.state(ThreadCopies)
        for row in np.flatnonzero(mask.any(1)).tolist():
            warp = int(batch.warps[row])
            access = machine.access_async(warp, ("cp.async", warp), proxy="generic")
            end = int(machine.time[warp]) + LATENCY
            lanes = (mask[row], offsets[row], sources[row], nbytes, given[row].astype(np.int64))
            copies.add(warp, Copy(row, int(batch.ctas[row]), *lanes, copies.groups(warp), access, end))
        machine.counters["cp_async.bytes"] += nbytes * int(np.count_nonzero(mask))

    run.shared_bytes = nbytes
    reads = [(target, "address"), (source, "address")]
    reads += [(rest[0], "pred" if ignored else "u32")] if rest else []
    return Effect(run, tuple(reads))


def _offsets(
    mask: np.ndarray, offsets: np.ndarray, sources: np.ndarray, nbytes: int, size: int
) -> np.ndarray:
    """Offsets in the own shared memory. Raises AddressError naming what is outside of it or not aligned."""
    for name, value, wrong in (
        ("dst", offsets, (offsets < 0) | (offsets + nbytes > size)),
        ("dst", offsets, offsets % nbytes != 0),
        ("src", sources, sources % nbytes != 0),
    ):
        wrong &= mask
        if wrong.any():
            row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
            what = f"operand {name}: {int(value[row, lane]):#x}"
            inside = 0 <= int(offsets[row, lane]) <= size - nbytes
            why = (
                f"is not a multiple of {nbytes}"
                if inside
                else f"and {nbytes} bytes lie outside the CTA's {size}"
            )
            raise at(AddressError(f"{what} {why}"), row, lane)
    return offsets


def _check_given(mask: np.ndarray, given: np.ndarray, nbytes: int) -> None:
    wrong = mask & (given > nbytes)
    if wrong.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
        raise at(
            EmulatorError(f"operand src-size must be at most cp-size {nbytes}, got {int(given[row, lane])}"),
            row,
            lane,
        )


def _arrive(ins: Instruction) -> Effect:
    """cp.async.mbarrier.arrive{.noinc}{.shared}.b64 [addr]: when the lane's copies so far are done."""
    space, noinc = space_of(ins), "noinc" in ins.modifiers

    def run(batch: Batch, mask: np.ndarray, addresses: np.ndarray) -> None:
        machine = batch.machine
        copies, barriers = machine.state(ThreadCopies), machine.state(Barriers)
        for row in np.flatnonzero(mask.any(1)).tolist():
            cta, warp = int(batch.ctas[row]), int(batch.warps[row])
            lanes = {}
            try:
                for address in np.unique(addresses[row, mask[row]]).tolist():
                    place = locate(machine, cta, address, space)
                    lanes[place] = mask[row] & (addresses[row] == address)
                    if not noinc:
                        barriers.add_pending(*place, int(np.count_nonzero(lanes[place])), warp)
            except EmulatorError as error:
                raise at(error, row) from None
            copies.arrive(warp, row, lanes, int(machine.time[warp]))

    run.shared_bytes = 8
    return Effect(run, ((ins.operands[0], "address"),))
