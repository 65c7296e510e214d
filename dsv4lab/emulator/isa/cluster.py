"""Addresses in a cluster, and taking clusters that have not begun: mapa, getctarank, clusterlaunchcontrol.

The 16-byte response to clusterlaunchcontrol.try_cancel holds %ctaid x, y and z of the cluster's first CTA in
32 bits each and a word that says whether one was taken. A kernel may ask for the %ctaid of a response that
took none, as CuTe's schedulers do before they look whether it did; it is (0, 0, 0) then.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import AddressError, EmulatorError, at
from dsv4lab.emulator.isa.registry import Action, Effect, Pure, instruction, unsupported
from dsv4lab.emulator.ptx import Instruction, Sink
from dsv4lab.emulator.shared import RANK_SHIFT
from dsv4lab.emulator.shared_address import locate, space_of

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine

# A rank that does not fit its 8 bits must not reach another CTA: this one is in no cluster.
_NO_RANK = 0xFF
_TAKEN, _NONE_LEFT = 0xC1C5_0001, 0xC1C5_0000


class ClusterLaunchError(EmulatorError):
    """A use of clusterlaunchcontrol whose result is undefined."""


@instruction("mapa")
def mapa(ins: Instruction) -> Pure:
    """mapa{.shared::cluster}.type d, a, b: the address in the CTA of rank b that corresponds to a."""
    type_ = _address_type(ins)

    def function(address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        rank = np.minimum(rank, np.uint32(_NO_RANK)).astype(address.dtype) << RANK_SHIFT
        return address & ~address.dtype.type(_NO_RANK << RANK_SHIFT) | rank

    target, address, rank = ins.operands
    return Pure(function, ((address, type_), (rank, "u32")), ((target, type_),))


@instruction("getctarank")
def getctarank(ins: Instruction) -> Pure:
    """getctarank{.shared::cluster}.type d, a: the rank of the CTA that an address is in."""
    type_ = _address_type(ins)

    def function(address: np.ndarray) -> np.ndarray:
        return (address >> RANK_SHIFT & _NO_RANK).astype(np.uint32)

    target, address = ins.operands
    return Pure(function, ((address, type_),), ((target, "u32"),))


def _address_type(ins: Instruction) -> str:
    *space, type_ = ins.modifiers
    if space not in ([], ["shared::cluster"]) or type_ not in ("u32", "u64"):
        raise unsupported(ins)
    return type_


# Taking clusters -------------------------------------------------------------------------------------------


@instruction("clusterlaunchcontrol")
def clusterlaunchcontrol(ins: Instruction) -> Action:
    """clusterlaunchcontrol.try_cancel and clusterlaunchcontrol.query_cancel."""
    if ins.modifiers[:2] == ("try_cancel", "async"):
        return _try_cancel(ins)
    if ins.modifiers[:2] == ("query_cancel", "is_canceled"):
        return _is_canceled(ins)
    if ins.modifiers[0] == "query_cancel" and ins.modifiers[1].startswith("get_first_ctaid"):
        return _first_ctaid(ins)
    raise unsupported(ins)


class _Requests:
    """CTAs of a wave that have seen that no cluster is left."""

    def __init__(self, machine: Machine) -> None:
        self.failed: set[int] = set()


def _try_cancel(ins: Instruction) -> Effect:
    """[addr], [mbar]: where the response goes, and the mbarrier that counts its 16 bytes."""
    space, everywhere = space_of(ins), "multicast::cluster::all" in ins.modifiers

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, barriers: np.ndarray) -> None:
        machine = batch.machine
        for row, lane in batch.lanes(mask):
            cta = int(batch.ctas[row])
            try:
                response, barrier = (
                    locate(machine, cta, int(where[row, lane]), space)[1] for where in (addresses, barriers)
                )
                _check_request(machine, cta, response)
            except EmulatorError as error:
                at(error, row, lane)
                raise
            first = cta - cta % machine.cluster_size
            ctas = range(first, first + machine.cluster_size) if everywhere else (cta,)
            warp = int(batch.warps[row])
            targets = [(each, machine.access_async(warp, ("mbarrier", each, barrier))) for each in ctas]
            time = int(machine.time[warp])
            queue = ("clusterlaunchcontrol", first)
            machine.later(queue, partial(_respond, machine, targets, response, barrier, time), warp)

    return Effect(function, tuple((operand, "address") for operand in ins.operands))


def _check_request(machine: Machine, cta: int, response: int) -> None:
    if response % 16:
        raise AddressError(f"the response's address {response:#x} is not aligned to 16 bytes")
    if cta in machine.state(_Requests).failed and "barriers" in machine.checks:
        raise ClusterLaunchError("the CTA has seen that no cluster is left, and must not ask again")


def _respond(machine: Machine, targets: list, response: int, barrier: int, time: int) -> None:
    """Take a cluster if there is one, and write the response to each CTA."""
    taken = machine.cancel_cluster()
    words = (0, 0, 0, _NONE_LEFT) if taken is None else (*taken, _TAKEN)
    machine.counters["clusters_taken"] += taken is not None
    data = np.array(words, np.uint32).view(np.uint8)
    for cta, access in targets:
        machine.shared.write_range(cta, response, data, access)
        machine.state(Barriers).complete_tx(cta, barrier, 16, access, time)


def _is_canceled(ins: Instruction) -> Effect:
    """pred, response."""

    def function(batch: Batch, mask: np.ndarray, response: np.ndarray) -> np.ndarray:
        taken = _status(mask, response) == _TAKEN
        failed = (mask & ~taken).any(1)
        if failed.any():
            batch.machine.state(_Requests).failed.update(batch.ctas[failed].tolist())
        return taken

    target, response = ins.operands
    return Effect(function, ((response, "b128"),), ((target, "pred"),))


def _first_ctaid(ins: Instruction) -> Effect:
    """get_first_ctaid::x, ::y or ::z of one register; get_first_ctaid{.v4} of {x, y, z, _}; the response."""
    target, response = ins.operands
    axis = ins.modifiers[1].partition("::")[2]
    if axis:
        writes, wanted = [target], ["xyz".index(axis)]
    else:
        kept = [(i, element) for i, element in enumerate(target) if not isinstance(element, Sink)]
        writes, wanted = [element for _, element in kept], [i for i, _ in kept]

    def function(batch: Batch, mask: np.ndarray, response: np.ndarray):
        _status(mask, response)
        words = np.ascontiguousarray(response).view(np.uint32)
        found = tuple(words[..., i] for i in wanted)
        return found[0] if len(found) == 1 else found

    return Effect(function, ((response, "b128"),), tuple((write, "u32") for write in writes))


def _status(mask: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The last word (n, 32) of responses (n, 32, 2)."""
    status = (response[..., 1] >> np.uint64(32)).astype(np.uint32)
    wrong = mask & (status != _TAKEN) & (status != _NONE_LEFT)
    if wrong.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
        low, high = response[row, lane].tolist()
        raise at(
            ClusterLaunchError(f"{high << 64 | low:#034x} is no response of clusterlaunchcontrol.try_cancel"),
            row,
            lane,
        )
    return status
