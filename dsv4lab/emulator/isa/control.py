"""Instructions about running itself: fences, calls, hints to the SM, sleeping."""

from __future__ import annotations

import sys

import numpy as np

from dsv4lab.emulator.batch import Batch
from dsv4lab.emulator.errors import KernelTrap, at
from dsv4lab.emulator.isa.registry import Effect, instruction, unsupported
from dsv4lab.emulator.printf import formatted, text_at
from dsv4lab.emulator.ptx import Group, Instruction, Symbol


def _nothing(batch: Batch, mask: np.ndarray) -> None:
    """Without effect here: memory is seen by all in the order in which it is written."""


@instruction("setmaxnreg", "griddepcontrol", "pmevent", "brkpt")
def no_effect(ins: Instruction) -> Effect:
    """Register budgets and programmatic launch: kernels of a stream run one after the other."""
    return Effect(_nothing)


@instruction("nanosleep")
def nanosleep(ins: Instruction) -> Effect:
    """nanosleep.u32 t: the model's time goes on by t."""

    def run(batch: Batch, mask: np.ndarray, nanoseconds: np.ndarray) -> None:
        longest = np.where(mask, nanoseconds, 0).max(1)
        batch.machine.time[batch.warps] += longest

    return Effect(run, ((ins.operands[0], "u32"),))


@instruction("fence", "membar")
def fence(ins: Instruction) -> Effect:
    """fence.*: of all fences only those between proxies are told apart, by the checks."""
    if "proxy" not in ins.modifiers:
        return Effect(_nothing)
    if any(m.startswith("tensormap") for m in ins.modifiers):
        from dsv4lab.emulator.isa.tensormap import fence_tensormap

        return fence_tensormap(ins)

    spaces = {m.partition("::")[0] for m in ins.modifiers}
    if not any(m.startswith("async") for m in ins.modifiers) or "global" in spaces:
        # Only shared memory is watched.
        return Effect(_nothing)
    return Effect(_fence_async)


def _fence_async(batch: Batch, mask: np.ndarray) -> None:
    order = batch.machine.order
    if order is not None:
        batch.machine.note_line()
        order.fence_async(batch.warps[mask.any(1)])


@instruction("call")
def call(ins: Instruction) -> Effect:
    """call (result), function, (arguments): the system's functions; others are not emulated."""
    name = next((o.name for o in ins.operands if isinstance(o, Symbol) and o.space == "func"), None)
    groups = [o for o in ins.operands if isinstance(o, Group)]
    if name == "vprintf":
        result, arguments = groups
        reads = tuple((argument, "address") for argument in (*arguments.elements, *result.elements))
        return Effect(_vprintf, reads)
    if name == "__assertfail":
        return Effect(_assertfail, tuple((argument, "address") for argument in groups[-1].elements))
    raise unsupported(
        ins, f"it calls {name or 'through a pointer'}, and only vprintf and __assertfail are known"
    )


def _argument(batch: Batch, row: int, lane: int, offset: int, size: int = 8) -> int:
    """A parameter of a call, which lies in the lane's local memory."""
    raw = batch.machine.local[batch.warps[row], lane, offset : offset + size]
    return int.from_bytes(raw.tobytes(), "little")


def _vprintf(
    batch: Batch, mask: np.ndarray, form: np.ndarray, values: np.ndarray, result: np.ndarray
) -> None:
    """Print for each lane in turn; the result is the number of arguments on a GPU, and here always 0."""
    for row, lane in batch.lanes(mask):
        text = text_at(batch, row, lane, _argument(batch, row, lane, int(form[row, lane])))
        sys.stdout.write(
            formatted(batch, row, lane, text, _argument(batch, row, lane, int(values[row, lane])))
        )
        offset = int(result[row, lane])
        batch.machine.local[batch.warps[row], lane, offset : offset + 4] = 0


def _assertfail(
    batch: Batch, mask: np.ndarray, message: np.ndarray, file: np.ndarray, line: np.ndarray, *_: np.ndarray
) -> None:
    for row, lane in batch.lanes(mask):
        said = text_at(batch, row, lane, _argument(batch, row, lane, int(message[row, lane])))
        where = text_at(batch, row, lane, _argument(batch, row, lane, int(file[row, lane])))
        number = _argument(batch, row, lane, int(line[row, lane]), 4)
        raise at(KernelTrap(f"assertion failed: {said} ({where}:{number})"), row, lane)
