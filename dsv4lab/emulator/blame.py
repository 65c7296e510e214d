"""Who is to blame: where in a kernel an error happened, and who waits for what when no warp can go on."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import (
    DeadlockError,
    EmulatorError,
    InstructionLimitError,
    at_instruction,
    in_kernel,
)

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch, Frames
    from dsv4lab.emulator.machine import Machine
    from dsv4lab.emulator.program import Program
    from dsv4lab.emulator.ptx import Instruction
    from dsv4lab.emulator.waits import Reason

# A row that waits: the block it stands at, itself, what for.
Parked = tuple[int, "Batch", "Reason | str"]
# Of those that wait in a deadlock, how many are named.
_NAMED = 12


def located(error: EmulatorError, machine: Machine) -> EmulatorError:
    """Add to an error where in the kernel it happened."""
    program, batch = machine.program, machine.current
    instruction = instruction_of(error, program)
    if instruction is not None:
        at_instruction(error, instruction)
    if isinstance(error, (DeadlockError, InstructionLimitError)) or batch is None:
        return in_kernel(error, program.kernel, error.cta, error.warp)
    row = 0 if len(batch) == 1 else None
    if error.row is not None and error.row < len(batch):
        row = error.row
    cta, warp = _place(machine, batch, row) if row is not None else (None, None)
    return in_kernel(error, program.kernel, cta, warp)


def instruction_of(error: BaseException, program: Program) -> Instruction | None:
    """The instruction whose function raised, found by the line of the block's Python function."""
    found, step = None, error.__traceback__
    while step is not None:
        origin = program.lines.get(step.tb_frame.f_code)
        if origin is not None:
            found = origin[step.tb_lineno - 1]
        step = step.tb_next
    return found


def deadlock(machine: Machine, parked: dict[Hashable, list[Parked]], frames: Frames) -> DeadlockError:
    """No warp can go on: which one waits at which PTX line for what."""
    waiting = list(chain.from_iterable(parked.values()))
    lines = []
    for number, batch, reason in waiting[:_NAMED]:
        cta, warp = _place(machine, batch, 0)
        ins = machine.program.blocks[number].first
        lines.append(f"CTA {cta} warp {warp} waits at PTX line {ins.line} ({ins.text.strip()}) for {reason}")
    meeting = np.nonzero((frames.expected != 0) & (frames.arrived != 0))[0]
    for frame in meeting[: _NAMED - len(lines)].tolist():
        here, all_ = int(frames.arrived[frame]), int(frames.expected[frame])
        cta, warp = divmod(int(frames.warp[frame]), machine.warps_per_cta)
        index = tuple(machine.cta_index[cta].tolist())
        lines.append(f"CTA {index} warp {warp}: lanes {here:#x} wait for the others of {all_:#x}")
    more = f"; and {len(waiting) - _NAMED} more" if len(waiting) > _NAMED else ""
    return DeadlockError("no warp can go on: " + "; ".join(lines) + more)


def _place(machine: Machine, batch: Batch, row: int) -> tuple[tuple[int, int, int], int]:
    cta, warp = divmod(int(batch.warps[row]), machine.warps_per_cta)
    return tuple(machine.cta_index[cta].tolist()), warp
