"""tcgen05.ld and .st between tensor memory and registers, and .wait.

A load takes place at once, as PTX lets registers depend on it without a wait. So does a store, but for the
race check it counts as under way until tcgen05.wait::st.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.isa.registry import Action, Effect, unsupported
from dsv4lab.emulator.isa.tcgen05_layouts import SHAPES, fragment
from dsv4lab.emulator.ptx import Immediate, Instruction, Operand, Vector
from dsv4lab.emulator.tensor_memory import LANES, TensorMemory, TensorMemoryError

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_CANONICAL_NAN = np.uint32(0x7FFFFFFF)


def load(ins: Instruction) -> Action:
    """tcgen05.ld{.red} registers{, reduced}, [address]{, split}."""
    reduced = "red" in ins.modifiers
    registers, *rest = ins.operands
    reduction = (rest.pop(0),) if reduced else ()
    pattern, packed, lanes = _pattern(ins, rest[1:], registers, "pack::16b")
    reduce = _reduction(ins) if reduced else None

    def function(
        batch: Batch, mask: np.ndarray, addresses: np.ndarray
    ) -> tuple[np.ndarray, ...] | np.ndarray:
        rows = _rows(batch, mask, addresses, lanes, "ld")
        machine = batch.machine
        tensor = machine.state(TensorMemory)
        by = [machine.access(warp) for warp in batch.warps[rows].tolist()]
        where = batch.ctas[rows], addresses[rows, 0]
        words = _at_row(rows, tensor.gather, *where, pattern, by)
        if packed:
            right = _at_row(rows, tensor.gather, *where, pattern + 1, by)
            words = words & np.uint32(0xFFFF) | right << np.uint32(16)
        if len(rows) < len(mask):
            some, words = words, np.zeros((len(words), len(mask), 32), np.uint32)
            words[:, rows] = some
        if reduced:
            return (*words, reduce(words))
        return tuple(words) if len(words) > 1 else words[0]

    writes = tuple((operand, "b32") for operand in (*registers, *reduction))
    return Effect(function, reads=((rest[0], "address"),), writes=writes)


def store(ins: Instruction) -> Action:
    """tcgen05.st [address]{, split}, registers."""
    address, *split, registers = ins.operands
    pattern, packed, lanes = _pattern(ins, split, registers, "unpack::16b")

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, *values: np.ndarray) -> None:
        rows = _rows(batch, mask, addresses, lanes, "st")
        if not len(rows):
            return
        machine = batch.machine
        tensor = machine.state(TensorMemory)
        by = [machine.access_async(warp, _stores(warp)) for warp in batch.warps[rows].tolist()]
        words = np.stack(values)[:, rows]
        ctas, where = batch.ctas[rows], addresses[rows, 0]
        if packed:
            _at_row(rows, tensor.scatter, ctas, where, pattern + 1, words >> np.uint32(16), by)
            words = words & np.uint32(0xFFFF)
        _at_row(rows, tensor.scatter, ctas, where, pattern, words, by)
        if machine.order is not None:
            for warp, access in zip(batch.warps[rows].tolist(), by, strict=True):
                machine.order.release_access(access, _stores(warp))

    return Effect(function, reads=((address, "address"), *((r, "b32") for r in registers)))


def wait(ins: Instruction) -> Action:
    """tcgen05.wait::ld and ::st."""
    stores = ins.modifiers[0] == "wait::st"

    def function(batch: Batch, mask: np.ndarray) -> None:
        order = batch.machine.order
        if stores and order is not None:
            for warp in batch.warps[mask.any(axis=1)].tolist():
                order.complete(_stores(warp))
                order.acquire(warp, _stores(warp))

    return Effect(function)


def _stores(warp: int) -> tuple[str, int]:
    return ("tcgen05.st", warp)


def _pattern(
    ins: Instruction, split: list[Operand], registers: Vector, packing: str
) -> tuple[np.ndarray, bool, int]:
    """Cells of the registers, whether they hold two columns each, and how many lanes of tensor memory."""
    shape = next((m for m in ins.modifiers if m in SHAPES), None)
    repeat = next((int(m[1:]) for m in ins.modifiers if m[0] == "x" and m[1:].isdigit()), 0)
    if shape is None or repeat not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise unsupported(ins, "no such shape")
    if split and not isinstance(split[0], Immediate):
        raise unsupported(ins, "the offset of the second half must be a constant")
    packed = packing in ins.modifiers
    pattern = fragment(shape, repeat, packed, int(split[0].value) if split else 0)
    if len(registers) != len(pattern) or len(pattern) > 128:
        raise unsupported(ins, f"it moves {len(pattern)} registers and names {len(registers)}")
    return pattern, packed, 32 if shape == "32x32b" else 16


def _rows(batch: Batch, mask: np.ndarray, addresses: np.ndarray, lanes: int, name: str) -> np.ndarray:
    """Rows that execute the instruction, checked: all lanes, one address, lanes of the warp's own quarter."""
    rows = np.nonzero(mask.any(axis=1))[0]
    lane = addresses[:, 0] >> 16
    quarter = batch.warps % batch.machine.warps_per_cta % 4 * 32
    inside = (lane >= quarter) & (lane + lanes <= quarter + 32) & (lane % 16 == 0) & (lane < LANES)
    for row in rows.tolist():
        if not mask[row].all():
            what = "is executed by some lanes of a warp, and all must"
        elif (addresses[row] != addresses[row, 0]).any():
            what = "has different addresses in the lanes of a warp"
        elif not inside[row]:
            what = (
                f"at lane {int(lane[row])} is executed by warp {int(quarter[row]) // 32} of its warpgroup, "
                f"which can reach lanes {int(quarter[row])} to {int(quarter[row]) + 31}"
            )
        else:
            continue
        raise at(TensorMemoryError(f"tcgen05.{name} {what}"), row)
    return rows


def _at_row(rows: np.ndarray, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of some rows; an error's row counts those of the whole batch."""
    try:
        return function(*arguments)
    except EmulatorError as error:
        if error.row is not None:
            error.row = int(rows[error.row])
        raise


def _reduction(ins: Instruction) -> Callable[[np.ndarray], np.ndarray]:
    """What .red computes of a lane's registers, uint32 (registers, n, 32) -> (n, 32)."""
    type_ = next((m for m in ins.modifiers if m in ("f32", "u32", "s32")), None)
    smallest = "min" in ins.modifiers
    if type_ is None or not (smallest or "max" in ins.modifiers):
        raise unsupported(ins, "no such reduction")
    pick = np.min if smallest else np.max
    if type_ != "f32":
        integer = np.uint32 if type_ == "u32" else np.int32
        return lambda words: pick(words.view(integer), axis=0).view(np.uint32)
    absolute, keep_nan = "abs" in ins.modifiers, "NaN" in ins.modifiers
    last = np.int32(0x7FFFFFFF if smallest else -0x80000000)

    def reduce(words: np.ndarray) -> np.ndarray:
        words = words & np.uint32(0x7FFFFFFF) if absolute else words
        nan = (words & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        found = _in_order(pick(np.where(nan, last, _in_order(words.view(np.int32))), axis=0))
        bad = nan.any(axis=0) if keep_nan else nan.all(axis=0)
        return np.where(bad, _CANONICAL_NAN, found.view(np.uint32))

    return reduce


def _in_order(bits: np.ndarray) -> np.ndarray:
    """fp32 bits as int32 that compare as the numbers do, -0 below +0; its own inverse."""
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
