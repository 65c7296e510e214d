"""Instructions that begin with cp, copies of threads, bulk copies and tensor copies; and prefetches."""

from __future__ import annotations

from dsv4lab.emulator.isa import bulk, bulk_tensor, cp_async
from dsv4lab.emulator.isa.registry import Action, Effect, instruction, unsupported
from dsv4lab.emulator.ptx import Instruction


@instruction("cp")
def cp(ins: Instruction) -> Action:
    """cp.async.*, cp.async.bulk.*, cp.reduce.async.bulk.*"""
    modifiers = ins.modifiers
    if modifiers[:2] == ("async", "bulk") or modifiers[:3] == ("reduce", "async", "bulk"):
        if "commit_group" in modifiers or "wait_group" in modifiers:
            return bulk.groups(ins)
        return bulk_tensor.build(ins) if "tensor" in modifiers else bulk.build(ins)
    if modifiers[:1] == ("async",):
        return cp_async.build(ins)
    raise unsupported(ins)


@instruction("prefetch", "prefetchu")
def prefetch(ins: Instruction) -> Effect:
    """Hints to caches, prefetch.tensormap among them: there is no cache that could heed them."""
    return Effect(lambda batch, mask: None)
