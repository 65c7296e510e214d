"""TMA descriptors in use: read where they lie, and stale if changed without the fence of their proxy.

The TMA unit reads descriptors through the tensormap proxy. A CTA that uses one after it was changed needs a
fence.proxy.tensormap::generic.acquire of it in between. Noticed are changes by tensormap.replace and
tensormap.cp_fenceproxy, and any others of a descriptor that the CTA has used before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4lab.emulator.errors import AddressError
from dsv4lab.emulator.happens_before import ProxyError
from dsv4lab.emulator.tma import Box, box_of

if TYPE_CHECKING:
    from dsv4lab.emulator.machine import Machine

NBYTES = 128
ALIGNMENT = 64


class TensorMaps:
    """The descriptors that a wave uses; `machine.state(TensorMaps)` is the one object of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._watch = "proxy" in machine.checks
        self._changes = 0
        self._changed: dict[int, int] = {}
        self._fenced: dict[tuple[int, int], int] = {}
        self._used: dict[tuple[int, int], bytes] = {}

    def box(self, cta: int, address: int) -> Box:
        """What the descriptor at a generic address copies, for an instruction of a CTA.

        Raises:
            AddressError: it is not in global memory or a parameter.
            TensorMapError: it is no descriptor.
            ProxyError: it may be stale.
        """
        found = self.machine.generic(cta, address)
        if found[0] != "global":
            raise AddressError(f"operand tensorMap: {address:#x} is not in global memory or a parameter")
        if address % ALIGNMENT:
            raise AddressError(f"operand tensorMap: {address:#x} is not a multiple of {ALIGNMENT}")
        descriptor = self.machine.memory.view(address, NBYTES).tobytes()
        if self._watch:
            self._check(cta, address, descriptor)
        return box_of(descriptor)

    def _check(self, cta: int, address: int, descriptor: bytes) -> None:
        changed = self._changed.get(address, 0) > self._fenced.get((cta, address), 0)
        if changed or self._used.setdefault((cta, address), descriptor) != descriptor:
            raise ProxyError(
                f"the tensormap at {address:#x} was changed since this CTA last fenced it: "
                "a fence.proxy.tensormap::generic.acquire is missing"
            )

    def change(self, address: int) -> None:
        """The descriptor in global memory was changed through the generic proxy."""
        self._changes += 1
        self._changed[address] = self._changes

    def acquire(self, cta: int, address: int) -> None:
        """A fence.proxy.tensormap::generic.acquire by a CTA."""
        self._fenced[cta, address] = self._changes
        self._used.pop((cta, address), None)
