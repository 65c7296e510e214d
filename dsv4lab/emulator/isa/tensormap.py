"""tensormap.replace, tensormap.cp_fenceproxy and the fence of the tensormap proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.copy_engine import Issue, each
from dsv4lab.emulator.errors import AddressError, EmulatorError
from dsv4lab.emulator.isa.registry import Effect, instruction, unsupported
from dsv4lab.emulator.ptx import Immediate, Instruction
from dsv4lab.emulator.shared_address import locate
from dsv4lab.emulator.tensormap_fields import replace
from dsv4lab.emulator.tensormap_use import ALIGNMENT, NBYTES, TensorMaps

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_COUNTING = 64  # bytes that a descriptor really has
_INDEXED = ("box_dim", "global_dim", "global_stride", "element_stride")
_WIDE = ("global_address", "global_stride")
_CONSTANT = ("elemtype", "interleave_layout", "swizzle_mode", "swizzle_atomicity", "fill_mode")
_FIELDS = (*_INDEXED, *_WIDE, *_CONSTANT, "rank")
_KNOWN = {"replace", "tile", "global", "shared::cta", "b1024", "b32", "b64", *_FIELDS}
_FENCE = {"proxy", "tensormap::generic", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"}


@instruction("tensormap")
def tensormap(ins: Instruction) -> Effect:
    """tensormap.replace and tensormap.cp_fenceproxy."""
    if ins.modifiers[0] == "replace":
        return _replace(ins)
    if ins.modifiers[0] == "cp_fenceproxy":
        return _copy(ins)
    raise unsupported(ins)


def _space(ins: Instruction) -> str:
    return next((m for m in ins.modifiers if m in ("global", "shared::cta")), "generic")


def _find(issue: Issue, name: str, address: int, space: str) -> tuple[str, int, int]:
    """("global", CTA, address) or ("shared", CTA, offset) of a descriptor."""
    machine, cta = issue.machine, issue.cta
    if address % ALIGNMENT:
        raise AddressError(f"operand {name}: {address:#x} is not a multiple of {ALIGNMENT}")
    if space == "shared::cta":
        return "shared", *locate(machine, cta, address, space)
    found = ("global", address) if space == "global" else machine.generic(cta, address)
    return found if len(found) == 3 else (found[0], cta, found[1])


def _read(issue: Issue, place: tuple[str, int, int]) -> bytes:
    """The 128 bytes of a descriptor; kernels write no more than the lower half, which counts."""
    space, cta, at = place
    machine = issue.machine
    if space == "shared":
        counting = machine.shared.read_range(cta, at, _COUNTING, machine.access(issue.warp))
        return counting.tobytes() + machine.shared.bytes[cta, at + _COUNTING : at + NBYTES].tobytes()
    return machine.memory.view(at, NBYTES).tobytes()


def _write(issue: Issue, place: tuple[str, int, int], descriptor: bytes) -> None:
    space, cta, at = place
    machine, data = issue.machine, np.frombuffer(descriptor, np.uint8)
    if space == "shared":
        machine.shared.write_range(cta, at, data, machine.access(issue.warp))
    else:
        machine.memory.view(at, NBYTES)[: len(data)] = data
        machine.state(TensorMaps).change(at)


def _replace(ins: Instruction) -> Effect:
    """tensormap.replace.tile.field{.space}.b1024.type [addr], {ord,} new_val."""
    field = next((m for m in ins.modifiers if m in _FIELDS), None)
    if field is None or set(ins.modifiers) - _KNOWN or "tile" not in ins.modifiers:
        raise unsupported(ins)
    address, *index, value = ins.operands
    if len(index) != (field in _INDEXED) or not all(isinstance(i, Immediate) for i in index):
        raise unsupported(ins)
    number, space = index[0].value if index else 0, _space(ins)

    def act(issue: Issue, address: int, value: int) -> None:
        place = _find(issue, "addr", address, space)
        _write(issue, place, replace(_read(issue, place)[:_COUNTING], field, value, number))

    def run(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> None:
        each(batch, mask, ins, act, *values)

    return Effect(run, ((address, "address"), (value, "u64" if field in _WIDE else "u32")))


def _copy(ins: Instruction) -> Effect:
    """tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.* [dst], [src], 128."""
    target, source, size = ins.operands
    if not isinstance(size, Immediate) or size.value != NBYTES:
        raise unsupported(ins, f"it copies {size}, which must be {NBYTES}")

    def act(issue: Issue, target: int, source: int) -> None:
        origin = _find(issue, "src", source, "shared::cta")
        _write(issue, _find(issue, "dst", target, "global"), _read(issue, origin))

    def run(batch: Batch, mask: np.ndarray, targets: np.ndarray, sources: np.ndarray) -> None:
        # All lanes of a warp execute it together: the first stands for them.
        first = mask & (np.cumsum(mask, 1) == 1)
        for operand in (targets, sources):
            if (mask & (operand != np.take_along_axis(operand, mask.argmax(1)[:, None], 1))).any():
                raise EmulatorError("the lanes of a tensormap.cp_fenceproxy must give the same addresses")
        each(batch, first, ins, act, targets, sources)

    return Effect(run, ((target, "address"), (source, "address")))


def fence_tensormap(ins: Instruction) -> Effect:
    """fence.proxy.tensormap::generic.{release.scope, acquire.scope [addr], 128}.

    A release makes changes visible to whoever acquires; what is checked is that the acquire is there.
    """
    if set(ins.modifiers) - _FENCE:
        raise unsupported(ins)
    if not ins.operands:
        return Effect(lambda batch, mask: None)

    def act(issue: Issue, address: int) -> None:
        issue.machine.state(TensorMaps).acquire(issue.cta, address)

    def run(batch: Batch, mask: np.ndarray, addresses: np.ndarray) -> None:
        each(batch, mask & (np.cumsum(mask, 1) == 1), ins, act, addresses)

    return Effect(run, ((ins.operands[0], "address"),))
