"""Atomic operations of lanes on global and shared memory: atom and red."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4lab.emulator.batch import Batch
from dsv4lab.emulator.isa.loadstore import join, split
from dsv4lab.emulator.isa.registry import Effect, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES, bit_width
from dsv4lab.emulator.ptx import Instruction, Operand, Vector
from dsv4lab.emulator.windows import LOCAL_WINDOW, SHARED_WINDOW

_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_PACKED = {"f16x2": np.float16}


def _bf16_add(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """bf16 (in the upper half of float32) sums, rounded to nearest even; a NaN stays one."""
    wide = [np.left_shift(x.astype(np.uint32), 16).view(np.float32) for x in (old, new)]
    total = (wide[0] + wide[1]).view(np.uint32)
    rounded = (total + 0x7FFF + (total >> 16 & 1)) >> 16
    return np.where(np.isnan(total.view(np.float32)), 0x7FFF, rounded).astype(np.uint16)


def _operation(ins: Instruction, op: str, type_: str) -> Callable[..., np.ndarray]:
    """The new value from the old one and the operands, on arrays."""
    if type_ in ("bf16", "bf16x2"):
        if op != "add":
            raise unsupported(ins)
        return _bf16_add
    table = {
        "add": np.add,
        "min": np.fmin,
        "max": np.fmax,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, new: new,
        "cas": lambda old, compare, new: np.where(old == compare, new, old),
        "inc": lambda old, most: np.where(old >= most, 0, old + 1).astype(old.dtype),
        "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1).astype(old.dtype),
    }
    return table[op]


def _lane_dtype(type_: str) -> np.dtype:
    if type_ in ("bf16x2", "bf16"):
        return np.dtype(np.uint16)
    return np.dtype(_PACKED.get(type_, DTYPES[type_]))


@instruction("atom", "red")
def atom(ins: Instruction) -> Effect:
    """atom.space.op.type d, [a], b (, c); red without d. Lanes take their turn in an order of chance."""
    op = next((m for m in ins.modifiers if m in _OPERATIONS), None)
    type_ = ins.modifiers[-1] if ins.modifiers[-1] != "noftz" else ins.modifiers[-2]
    if op is None:
        raise unsupported(ins)
    count = next((int(m[1:]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    nbytes = bit_width(type_) // 8 * count
    space = next(
        (m.partition("::")[0] for m in ins.modifiers if m.startswith(("global", "shared"))), "generic"
    )
    returns = ins.op == "atom"
    operands = list(ins.operands)
    target = operands.pop(0) if returns else None
    memory, values = operands[0], operands[1 : 3 if op == "cas" else 2]
    change, dtype = _operation(ins, op, type_), _lane_dtype(type_)

    def run(batch: Batch, mask: np.ndarray, address: np.ndarray, *reads: np.ndarray):
        data = tuple(join(reads[i : i + count], nbytes) for i in range(0, len(reads), count))
        old = _perform(batch, mask, space, address, nbytes, data, change, dtype)
        return split(old, type_, count) if returns else None

    run.shared_bytes = min(nbytes, 16) if space != "global" else 16
    each = [pair for value in values for pair in _each(value, type_)]
    return Effect(run, ((memory, "address"), *each), tuple(_each(target, type_)) if returns else ())


def _each(operand: Operand, type_: str) -> list[tuple[Operand, str]]:
    return [(element, type_) for element in operand] if isinstance(operand, Vector) else [(operand, type_)]


def _perform(
    batch: Batch,
    mask: np.ndarray,
    space: str,
    address: np.ndarray,
    nbytes: int,
    data: tuple[np.ndarray, ...],
    change: Callable[..., np.ndarray],
    dtype: np.dtype,
) -> np.ndarray:
    """Read, change and write, in rounds in which every address occurs once; returns the old values."""
    machine = batch.machine
    if space == "generic":
        shared = bool((mask & (address >= SHARED_WINDOW) & (address < LOCAL_WINDOW)).any())
        space, address = ("shared", address - SHARED_WINDOW) if shared else ("global", address)
    result = np.zeros(mask.shape, data[0].dtype)
    for part in rounds(batch, mask, address, space):
        if space == "shared":
            old = machine.shared.gather(batch, part, address, nbytes, atomic=True)
        else:
            old = machine.memory.gather(part, address, nbytes)
        shape = (*old.shape, nbytes // dtype.itemsize)
        fields = [np.ascontiguousarray(x).view(dtype).reshape(shape) for x in (old, *data)]
        new = np.ascontiguousarray(change(*fields), dtype).view(old.dtype).reshape(old.shape)
        if space == "shared":
            machine.shared.scatter(batch, part, address, new, nbytes, atomic=True)
        else:
            machine.memory.scatter(part, address, new, nbytes)
        result = np.where(part, old, result)
    machine.counters[f"{space}.atomics"] += int(np.count_nonzero(mask))
    return result


def rounds(batch: Batch, mask: np.ndarray, address: np.ndarray, space: str):
    """Masks that part the lanes so that no address occurs twice in one, lanes of equal address by chance."""
    row, lane = np.nonzero(mask)
    if len(row) == 0:
        return
    order = batch.machine.random.permutation(len(row))
    row, lane = row[order], lane[order]
    # The same shared offset means another word in another CTA.
    place = address[row, lane] + (batch.ctas[row] << 40 if space == "shared" else 0)
    sorting = np.argsort(place, kind="stable")
    place = place[sorting]
    starts = np.concatenate([[True], place[1:] != place[:-1]])
    first = np.maximum.accumulate(np.where(starts, np.arange(len(place)), 0))
    turn = np.arange(len(place)) - first
    row, lane = row[sorting], lane[sorting]
    for i in range(int(turn.max()) + 1):
        part = np.zeros_like(mask)
        part[row[turn == i], lane[turn == i]] = True
        yield part
