"""Loads and stores of lanes, to every space: ld, st, and what only hints (prefetch policies)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dsv4lab.emulator.batch import Batch
from dsv4lab.emulator.errors import AddressError, at
from dsv4lab.emulator.isa.registry import Effect, Pure, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES, bit_width
from dsv4lab.emulator.ptx import Instruction, Operand, Symbol, Vector
from dsv4lab.emulator.windows import LOCAL_WINDOW, SHARED_WINDOW

_SPACES = ("global", "shared", "local", "param", "const")
_CARRIER = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Access(NamedTuple):
    """The form of an ld or st: space, type of an element, elements of a lane, bytes of a lane."""

    space: str
    type: str
    count: int
    nbytes: int


def access_of(ins: Instruction) -> Access:
    """Read the modifiers of an ld or st. Raises UnsupportedInstruction for a space that is not known."""
    type_ = ins.modifiers[-1]
    count = next((int(m[1:]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    named = [m.partition("::")[0] for m in ins.modifiers]
    space = next((m for m in named if m in _SPACES), "generic")
    return Access(space, type_, count, bit_width(type_) // 8 * count)


def _elements(operand: Operand, type_: str) -> tuple[tuple[Operand, str], ...]:
    if isinstance(operand, Vector):
        return tuple((element, type_) for element in operand)
    return ((operand, type_),)


def split(raw: np.ndarray, type_: str, count: int) -> tuple[np.ndarray, ...] | np.ndarray:
    """What lanes have loaded (n, 32), as the elements of a vector."""
    if type_ == "b128":
        return np.ascontiguousarray(raw).view(np.uint64).reshape(*raw.shape[:2], 2)
    dtype = DTYPES[type_]
    if count == 1:
        return raw.view(dtype)
    parts = np.ascontiguousarray(raw).view(dtype).reshape(*raw.shape[:2], count)
    # Each element's lanes side by side, as instructions that look into the bytes of a value need them.
    return tuple(np.ascontiguousarray(parts.transpose(2, 0, 1)))


def join(values: tuple[np.ndarray, ...], nbytes: int) -> np.ndarray:
    """The elements of a vector as one element of `nbytes` for each lane."""
    if len(values) == 1 and values[0].ndim == 2:
        return values[0].view(_CARRIER[nbytes])
    stacked = values[0] if values[0].ndim == 3 else np.stack(values, -1)
    return np.ascontiguousarray(stacked).view(_CARRIER[nbytes])[..., 0]


def load(batch: Batch, mask: np.ndarray, space: str, address: np.ndarray, nbytes: int) -> np.ndarray:
    """What lanes load from a space: (n, 32) of `nbytes` each, at most 16."""
    if space == "shared":
        return batch.machine.shared.gather(batch, mask, address, nbytes)
    if space == "local":
        return _local(batch, mask, address, nbytes)[0]
    if space == "generic":
        return _generic_load(batch, mask, address, nbytes)
    return batch.machine.memory.gather(mask, address, nbytes)


def store(
    batch: Batch, mask: np.ndarray, space: str, address: np.ndarray, values: np.ndarray, nbytes: int
) -> None:
    """Lanes store to a space: values (n, 32) of `nbytes` each, at most 16."""
    if space == "shared":
        batch.machine.shared.scatter(batch, mask, address, values, nbytes)
    elif space == "local":
        _, flat, place = _local(batch, mask, address, nbytes)
        flat[place[mask]] = values[mask]
    elif space == "generic":
        for space_, part, base in _spaces(mask, address):
            store(batch, part, space_, address - base, values, nbytes)
    else:
        batch.machine.memory.scatter(mask, address, values, nbytes)


def _spaces(mask: np.ndarray, address: np.ndarray) -> list[tuple[str, np.ndarray, int]]:
    """The spaces that generic addresses are of, with the lanes of each and where its window begins."""
    local = mask & (address >= LOCAL_WINDOW)
    shared = mask & (address >= SHARED_WINDOW) & ~local
    rest = mask & (address < SHARED_WINDOW)
    ways = (("global", rest, 0), ("shared", shared, SHARED_WINDOW), ("local", local, LOCAL_WINDOW))
    return [way for way in ways if way[1].any()]


def _generic_load(batch: Batch, mask: np.ndarray, address: np.ndarray, nbytes: int) -> np.ndarray:
    result = None
    for space, part, base in _spaces(mask, address):
        value = load(batch, part, space, address - base, nbytes)
        result = value if result is None else np.where(part, value, result)
    return np.zeros(mask.shape, _CARRIER[nbytes]) if result is None else result


def _local(
    batch: Batch, mask: np.ndarray, address: np.ndarray, nbytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What lanes hold at an offset of their local memory; the flat memory and the places in it."""
    local = batch.machine.local
    size = local.shape[-1]
    offset = np.where(mask, address, 0)
    wrong = mask & ((offset < 0) | (offset + nbytes > size) | (offset % nbytes != 0))
    if wrong.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
        what = f"the {nbytes} byte(s) of local memory at offset {int(offset[row, lane])} of {size}"
        raise at(AddressError(f"{what} lie outside or are not aligned"), row, lane)
    flat = local.reshape(-1).view(_CARRIER[nbytes])
    place = ((batch.warps[:, None] * 32 + np.arange(32)) * size + offset) // nbytes
    return flat[place] if flat.size else np.zeros(mask.shape, _CARRIER[nbytes]), flat, place


def _halves(nbytes: int) -> tuple[tuple[int, int], ...]:
    """(offset, bytes) of the accesses that make one of up to 32 bytes."""
    return ((0, nbytes),) if nbytes <= 16 else ((0, 16), (16, 16))


def _check_wide(mask: np.ndarray, address: np.ndarray) -> None:
    wrong = mask & (address & 31 != 0)
    if wrong.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
        raise at(
            AddressError(f"the address {int(address[row, lane]):#x} is not aligned to 32 bytes"), row, lane
        )


@instruction("ld", "ldu")
def ld(ins: Instruction) -> Effect | Pure:
    """ld.space.vec.type d, [a]: cache hints and orders beyond the space make no difference here."""
    form = access_of(ins)
    target, source = ins.operands[:2]
    writes = _elements(target, form.type)
    if len(writes) != form.count:
        raise unsupported(ins, f"{len(writes)} destinations for {form.count} elements")
    if form.space == "param" and isinstance(source.base, Symbol):
        return _load_parameter(ins, form, writes)
    space = "global" if form.space in ("param", "const") else form.space

    def run(batch: Batch, mask: np.ndarray, address: np.ndarray):
        if form.nbytes > 16:
            _check_wide(mask, address)
        parts = [load(batch, mask, space, address + o, n) for o, n in _halves(form.nbytes)]
        _count(batch, space, "load", mask, form.nbytes)
        if len(parts) == 1:
            return split(parts[0], form.type, form.count)
        return sum((split(part, form.type, form.count // 2) for part in parts), ())

    _shared_bytes(run, space, form.nbytes)
    return Effect(run, ((source, "address"),), writes)


def _load_parameter(ins: Instruction, form: Access, writes: tuple[tuple[Operand, str], ...]) -> Effect | Pure:
    """A parameter of the kernel is the same for all lanes; one of a call lies in local memory."""

    def run(batch: Batch, mask: np.ndarray, address: np.ndarray):
        # The address of a call's parameter is a small offset, that of the kernel's one of the process.
        space = "local" if int(address.flat[0]) < batch.machine.local.shape[-1] else "global"
        return split(load(batch, mask, space, address, form.nbytes), form.type, form.count)

    return Effect(run, ((ins.operands[1], "address"),), writes)


@instruction("st")
def st(ins: Instruction) -> Effect:
    """st.space.vec.type [a], b."""
    form = access_of(ins)
    target, source = ins.operands[:2]
    reads = _elements(source, form.type)
    space = form.space

    def run(batch: Batch, mask: np.ndarray, address: np.ndarray, *values: np.ndarray) -> None:
        if form.nbytes > 16:
            _check_wide(mask, address)
        where = "local" if space == "param" else space
        step = len(values) * min(form.nbytes, 16) // form.nbytes
        for i, (offset, n) in enumerate(_halves(form.nbytes)):
            store(batch, mask, where, address + offset, join(values[i * step : (i + 1) * step], n), n)
        _count(batch, where, "store", mask, form.nbytes)

    _shared_bytes(run, space, form.nbytes)
    return Effect(run, ((target, "address"), *reads))


def _shared_bytes(function: Callable, space: str, nbytes: int) -> None:
    """Note how finely an instruction may access shared memory, for the race checker."""
    if space in ("shared", "generic"):
        function.shared_bytes = min(nbytes, 16)


def _count(batch: Batch, space: str, kind: str, mask: np.ndarray, nbytes: int) -> None:
    space = "global" if space == "generic" else space
    batch.machine.counters[f"{space}.{kind}_bytes"] += int(np.count_nonzero(mask)) * nbytes


@instruction("createpolicy")
def createpolicy(ins: Instruction) -> Pure:
    """A cache policy: there is no cache that could heed it."""
    return Pure(lambda: np.zeros((1, 1), np.uint64), (), ((ins.operands[0], "b64"),))


@instruction("applypriority", "discard")
def hint(ins: Instruction) -> Effect:
    """Hints to the L2 cache. (After `discard` memory is undefined; here it keeps its value.)"""
    return Effect(lambda batch, mask: None)
