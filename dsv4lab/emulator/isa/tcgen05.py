"""tcgen05, the instructions of Blackwell's tensor memory and tensor core: which file each one is in."""

from __future__ import annotations

from dsv4lab.emulator.isa.registry import Action, instruction, unsupported
from dsv4lab.emulator.isa.tcgen05_allocation import allocate, free, relinquish
from dsv4lab.emulator.isa.tcgen05_copy import copy
from dsv4lab.emulator.isa.tcgen05_mma import mma
from dsv4lab.emulator.isa.tcgen05_pipe import commit, fence
from dsv4lab.emulator.isa.tcgen05_registers import load, store, wait
from dsv4lab.emulator.ptx import Instruction

_BUILDERS = {
    "alloc": allocate,
    "dealloc": free,
    "relinquish_alloc_permit": relinquish,
    "ld": load,
    "st": store,
    "wait::ld": wait,
    "wait::st": wait,
    "cp": copy,
    "mma": mma,
    "commit": commit,
    "fence::before_thread_sync": fence,
    "fence::after_thread_sync": fence,
}


@instruction("tcgen05")
def tcgen05(ins: Instruction) -> Action:
    """The builder of every tcgen05 instruction."""
    builder = _BUILDERS.get(ins.modifiers[0]) if ins.modifiers else None
    if builder is None:
        raise unsupported(ins)
    return builder(ins)
