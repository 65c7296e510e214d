"""What the race check says: which two accesses met where, and what would have ordered them."""

from __future__ import annotations

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.shadow import Earlier, Kind, Shadow
from dsv4lab.emulator.vector_clocks import LINES, Access, Clocks


class RaceError(EmulatorError):
    """Two accesses to one address that nothing orders."""


class ProxyError(EmulatorError):
    """An access through the async proxy that may miss a generic write: a fence.proxy.async is missing."""


class Reporter:
    """Puts conflicts of a wave into words.

    Args:
        clocks: who acts.
        warps_per_cta: warps of a CTA.
        cta_index: (ctas, 3) %ctaid, to name a CTA; its number in the wave if None.
    """

    def __init__(self, clocks: Clocks, warps_per_cta: int, cta_index: np.ndarray | None) -> None:
        self.clocks = clocks
        self.warps_per_cta = warps_per_cta
        self.cta_index = cta_index

    def race(self, shadow: Shadow, access: Access, kind: Kind, earlier: Earlier) -> RaceError:
        """The error for two accesses without order."""
        one, other = self._both(access, kind, earlier)
        return RaceError(
            f"race: {self._place(shadow, earlier)}: {one} and {other} are not ordered: "
            f"{self._missing(access, earlier)}"
        )

    def proxy(self, shadow: Shadow, access: Access, kind: Kind, earlier: Earlier) -> ProxyError:
        """The error for a generic write that was not fenced."""
        one, other = self._both(access, kind, earlier)
        return ProxyError(
            f"{self._place(shadow, earlier)}: {one} goes through the async proxy and may not see {other}, "
            "which went through the generic proxy: a fence.proxy.async is missing between them"
        )

    def _both(self, access: Access, kind: Kind, earlier: Earlier) -> tuple[str, str]:
        cluster = access.warp // self.clocks.width
        verb = ("atomic " if kind[1] else "") + ("write" if kind[0] else "read")
        return (
            f"the {verb} by {self._actor(cluster, access.actor)}{_line(access.stamp)}",
            f"the {earlier.kind} by {self._actor(cluster, earlier.actor)}{_line(earlier.stamp)}",
        )

    def _missing(self, access: Access, earlier: Earlier) -> str:
        warp, width = self._warp(access.warp), self.clocks.width
        cluster = access.warp // width
        issuing = " before issuing its operation" if access.actor >= width else ""
        if earlier.actor >= width:
            return f"{warp} has not waited for the completion of the earlier operation{issuing}"
        if cluster * width + earlier.actor == access.warp:
            return f"{warp} did the {earlier.kind} after issuing the operation, whose end it did not wait for"
        other = self._actor(cluster, earlier.actor)
        return (
            f"{warp} has not waited{issuing} for a barrier at which {other} arrived after its {earlier.kind}"
        )

    def _place(self, shadow: Shadow, earlier: Earlier) -> str:
        cta, cell = earlier.cell >> shadow.bits, earlier.cell & ((1 << shadow.bits) - 1)
        if len(shadow.shape) == 2:
            lane, column = divmod(cell, shadow.shape[1])
            place = f"tensor memory of {self._cta(cta)} at lane {lane}, column {column}"
        else:
            place = f"shared memory of {self._cta(cta)} at offset {cell << shadow.shift:#x}"
        more = earlier.count - 1
        return f"{place} and {more} more cell{'s' if more > 1 else ''}" if more else place

    def _actor(self, cluster: int, actor: int) -> str:
        channel = self.clocks.channel_of(cluster, actor)
        if channel is None:
            return self._warp(cluster * self.clocks.width + actor)
        name = channel.name if isinstance(channel.name, tuple) else (channel.name,)
        if name[0] == "mbarrier" and len(name) == 3:
            what = channel.what or "asynchronous copy"
            return f"the {what} signalling the mbarrier at {name[2]:#x} of {self._cta(name[1])}"
        return f"the {channel.what or f'{name[0]} operation'} issued by {self._warp(channel.warp)}"

    def _warp(self, warp: int) -> str:
        return f"warp {warp % self.warps_per_cta} of {self._cta(warp // self.warps_per_cta)}"

    def _cta(self, cta: int) -> str:
        if self.cta_index is None:
            return f"CTA {cta}"
        return f"CTA {tuple(int(i) for i in self.cta_index[cta])}"


def _line(stamp: int) -> str:
    line = stamp & LINES
    return f" (PTX line {line})" if line else ""


def check_same_instruction(cells: np.ndarray, values: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Check that lanes of one instruction that store to one cell store the same bits.

    Args:
        cells: (m,) int64, where each lane stores: any number that tells addresses apart.
        values: (m,) or (m, k), what it stores.
        mask: (n, 32) bool, the m lanes in their order, to name one in the error.
    Raises:
        RaceError: two lanes store different values to one address.
    """
    if cells.size < 2 or (cells[1:] > cells[:-1]).all():
        return
    by_cell = np.argsort(cells, kind="stable")
    cells = cells[by_cell]
    same = cells[1:] == cells[:-1]
    if not same.any():
        return
    # Bytes, because a NaN is equal to itself here.
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(len(by_cell), -1)[by_cell]
    differ = same & (octets[1:] != octets[:-1]).any(axis=1)
    if differ.any():
        first = int(differ.argmax())
        one, two = (octets[i].tobytes()[::-1].hex() for i in (first, first + 1))
        error = RaceError(
            f"race: two lanes store different values, 0x{one} and 0x{two}, to one address in one "
            "instruction: which of them stays is undefined"
        )
        if mask is not None:
            at(error, *divmod(int(np.flatnonzero(mask)[by_cell[first + 1]]), mask.shape[1]))
        raise error
