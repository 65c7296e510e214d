"""Shared memory as an instruction of one CTA addresses it: its own window, its cluster's, or generic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import AddressError
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.shared import OFFSET_MASK, RANK_SHIFT

if TYPE_CHECKING:
    from dsv4lab.emulator.machine import Machine


def space_of(ins: Instruction) -> str | None:
    """The state space that an instruction names; None for generic addresses."""
    return next((m for m in ins.modifiers if m.startswith("shared")), None)


def locate(machine: Machine, cta: int, address: int, space: str | None) -> tuple[int, int]:
    """CTA and offset of an address of shared memory, as an instruction of `cta` gives it.

    Raises:
        AddressError: it is not in shared memory, or of a CTA outside the cluster; or of another CTA, and the
            instruction does not say shared::cluster.
    """
    if space is None:
        found = machine.generic(cta, address)
        if found[0] != "shared":
            raise AddressError(f"the generic address {address:#x} is not in shared memory")
        return found[1], found[2]
    rank, offset = address >> RANK_SHIFT, address & OFFSET_MASK
    if not 0 <= rank < machine.cluster_size:
        machine.shared.locate(np.array([cta]), np.array([address]))  # says what is wrong
    owner = cta - cta % machine.cluster_size + rank
    if owner != cta and space != "shared::cluster":
        raise AddressError(
            f"the address {address:#x} is in another CTA of the cluster, and the instruction says .{space}"
        )
    return owner, offset
