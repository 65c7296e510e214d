"""Races and missing proxy fences in shared and tensor memory, found in the order that barriers make.

Two accesses to one cell, one of them a write, must be ordered: by the program of one warp, or by releases and
acquires (barriers, completions) that lead from one to the other. What counts is that order and not when the
emulator happened to execute them, so a race is found in schedules in which it does no harm. An access through
the async proxy needs besides that a generic write of the cell was fenced: a fence.proxy.async between the
two, by the writer, by the issuer or by a warp in between. A generic read before it needs no fence.

What is not told apart:
- Lanes: the unit is the warp, whose lanes are ordered by its program. Two that store different values to one
  address in one instruction are found by `check_same_instruction`.
- Phases: what is published with a key accumulates, so that a warp which waited for one phase of a barrier
  knows of all phases that were complete when it went on.
- Cells: bytes that share a cell share its history; no access may be smaller than `granularity`.
- Atomics do not race with each other, and order nothing. Whoever executes some that do order (a flag that
  one warp sets and another spins on) calls release, complete and acquire with a key made of its address.
- Operations of an unordered channel beyond vector_clocks.MOST_SLOTS that run at once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

import numpy as np

from dsv4lab.emulator.errors import at
from dsv4lab.emulator.marks import Cells
from dsv4lab.emulator.race_errors import ProxyError, RaceError, Reporter, check_same_instruction
from dsv4lab.emulator.shadow import Earlier, Kind, Shadow
from dsv4lab.emulator.vector_clocks import LINES, SEEN, Access, Clocks

__all__ = ["Access", "HappensBefore", "ProxyError", "RaceError", "check_same_instruction"]

_TENSOR_COLUMNS = 512
_EVERYTHING = np.iinfo(np.int64).max


class HappensBefore:
    """The order of accesses of a wave of CTAs.

    CTAs and warps are numbered in the wave; those of a cluster follow one another. The 8 bytes of an mbarrier
    are not data: its operations do not come here as accesses.

    Args:
        ctas: CTAs of the wave.
        cluster_size: CTAs of a cluster.
        warps_per_cta: warps of a CTA.
        shared_bytes: bytes of a CTA's shared memory.
        tensor_cells: 32-bit cells of a CTA's tensor memory, in lanes of 512 columns.
        granularity: bytes of a cell of shared memory: 1, 2, 4, 8 or 16.
        checks: what to look for, "race" and "proxy" if among them.
        cta_index: (ctas, 3) %ctaid, to name a CTA in errors; its number in the wave if None.

    Attributes:
        line: PTX line of accesses and operations that do not give their own, below 2**22; 0 is unknown.
    """

    def __init__(
        self,
        ctas: int,
        cluster_size: int,
        warps_per_cta: int,
        shared_bytes: int,
        tensor_cells: int = 128 * _TENSOR_COLUMNS,
        granularity: int = 4,
        checks: Collection[str] = ("race", "proxy"),
        cta_index: np.ndarray | None = None,
    ) -> None:
        if ctas % cluster_size:
            raise ValueError(f"ctas must be a multiple of cluster_size {cluster_size}, got {ctas}")
        if granularity not in (1, 2, 4, 8, 16):
            raise ValueError(f"granularity must be 1, 2, 4, 8 or 16, got {granularity}")
        self.line = 0
        self.clocks = Clocks(ctas // cluster_size, cluster_size * warps_per_cta)
        self._race, self._proxy = "race" in checks, "proxy" in checks
        shared = (-(-shared_bytes // granularity),)
        tensor = (tensor_cells // _TENSOR_COLUMNS, _TENSOR_COLUMNS)
        self._spaces = {
            "shared": Shadow(ctas, cluster_size, shared, granularity, rows=warps_per_cta + 4),
            "tensor": Shadow(ctas, cluster_size, tensor),
        }
        self._lanes = np.zeros(0, np.int64)
        self._report = Reporter(self.clocks, warps_per_cta, cta_index)

    # Who accesses.

    def generic(self, warp: int, line: int | None = None) -> Access:
        """Accesses by the instruction that a warp executes now."""
        return self.clocks.generic_access(warp, self._line(line))

    def asynchronous(
        self,
        warp: int,
        channel: Hashable,
        in_order: bool = False,
        proxy: str = "async",
        what: str = "",
        line: int | None = None,
    ) -> Access:
        """One operation that a warp issues now and that accesses memory later.

        Args:
            warp: who issues it.
            channel: how it completes, such as ("mbarrier", cta, offset) or ("bulk", warp). The operations of
                one channel are released with one key, unless they are in order.
            in_order: each operation of the channel is ordered behind the earlier ones.
            proxy: "async" or "generic".
            what: its name in errors, such as "TMA load".
        """
        if proxy not in ("async", "generic"):
            raise ValueError(f'proxy must be "async" or "generic", got {proxy!r}')
        return self.clocks.issue(warp, channel, in_order, proxy, self._line(line), what)

    def _line(self, line: int | None) -> int:
        return min(self.line if line is None else line, LINES)

    # What orders them; `warp` is one warp or an array of warps.

    def release(self, warp: int | np.ndarray, key: Hashable) -> None:
        """What the warp did is published with the key, which belongs to its cluster: an arrival."""
        self.clocks.release(warp, key)

    def release_access(self, access: Access, key: Hashable, alone: bool = False) -> None:
        """What an asynchronous operation did is published with the key.

        Unless alone, with it all that was ordered before its issue; alone, its own accesses and those of the
        earlier operations of its channel, if that is in order.
        """
        self.clocks.release_access(access, key, alone)

    def complete(self, key: Hashable) -> None:
        """The phase of the key is complete: what was published until now is to be seen."""
        self.clocks.complete(key)

    def acquire(self, warp: int | np.ndarray, key: Hashable) -> None:
        """The warp has waited for a complete phase of the key."""
        self.clocks.acquire(warp, key)

    def fence_async(self, warp: int | np.ndarray) -> None:
        """fence.proxy.async by the warp."""
        self.clocks.fence(warp)

    # What they access.

    def read(
        self, space: str, cta: int, cells: Cells, access: Access, size: int = 1, atomic: bool = False
    ) -> None:
        """Check and note a read of cells of one CTA.

        Args:
            space: "shared" or "tensor".
            cta: whose memory it is.
            cells: "shared": a slice of bytes, or an int array of byte offsets; "tensor": a slice or an int
                array of cells, lane * 512 + column, or a pair of slices, of lanes and of columns.
            access: by whom.
            size: bytes from each offset of an array on, aligned to their number.
            atomic: by an atomic operation.
        Raises:
            RaceError, ProxyError: nothing is noted then.
        """
        self._access(space, cta, cells, access, size, Kind(False, atomic))

    def write(
        self, space: str, cta: int, cells: Cells, access: Access, size: int = 1, atomic: bool = False
    ) -> None:
        """Check and note a write; otherwise as `read`."""
        self._access(space, cta, cells, access, size, Kind(True, atomic))

    def _access(self, space: str, cta: int, cells: Cells, access: Access, size: int, kind: Kind) -> None:
        shadow, clocks = self._spaces[space], self.clocks
        window = shadow.window(cta, cells, size)
        ordered = clocks.ordered(access)
        visible = clocks.visible(access) if self._proxy and space == "shared" else ordered
        if not self._race:
            visible = np.where(visible < ordered, visible, _EVERYTHING)
            ordered = np.full_like(ordered, _EVERYTHING)
        own = (access.actor, access.stamp)
        earlier = shadow.conflict(cta, window, kind, ordered, visible, own)
        if earlier is not None:
            proxy = earlier.stamp <= ordered[earlier.actor]
            raise (self._report.proxy if proxy else self._report.race)(shadow, access, kind, earlier)
        shadow.note(cta, window, kind, own, clocks.actors)

    def access_batch(
        self,
        space: str,
        warps: np.ndarray,
        ctas: np.ndarray,
        offsets: np.ndarray,
        size: int,
        mask: np.ndarray,
        write: bool,
        atomic: bool = False,
        line: int | None = None,
    ) -> None:
        """Check and note the accesses of one instruction by the lanes of several warps.

        Args:
            space: "shared" or "tensor".
            warps: (n,) int64; parts of one warp may be several rows.
            ctas: (n, 32) int64, or what broadcasts to it: whose memory each lane accesses.
            offsets: (n, 32) int64, byte offsets aligned to `size`, or cells of tensor memory.
            size: bytes that each lane accesses, a power of two.
            mask: (n, 32) bool, lanes that do.
            write, atomic: how.
        Raises:
            RaceError: with row and lane; nothing is noted then.
        """
        shadow, clocks, kind = self._spaces[space], self.clocks, Kind(bool(write), bool(atomic))
        wide = max(size.bit_length() - 1, shadow.shift)
        each = 1 << wide - shadow.shift
        groups = ((ctas << shadow.bits + shadow.shift - wide) + (offsets >> wide)).reshape(-1)
        lanes = self._all_lanes(groups.size)
        if not mask.all():
            lanes = np.flatnonzero(mask)
            groups = groups[lanes]
        rows = lanes >> 5
        known = clocks.known[warps, SEEN]
        actors = clocks.own[warps]
        stamps = known[np.arange(actors.size), actors] - (LINES - self._line(line))
        earlier = None
        if self._race:
            earlier = shadow.conflict_each(groups, each, rows, kind, warps // clocks.width, known)
        if earlier is None:
            earlier = shadow.note_each(groups, each, kind, actors[rows], stamps[rows], clocks.actors)
        if earlier is not None and self._race:
            self._refuse_lane(shadow, kind, earlier, int(lanes[earlier.position]), warps, stamps)

    def _refuse_lane(
        self, shadow: Shadow, kind: Kind, earlier: Earlier, lane: int, warps: np.ndarray, stamps: np.ndarray
    ) -> None:
        row, lane = divmod(lane, 32)
        warp = int(warps[row])
        access = Access(warp, warp % self.clocks.width, int(stamps[row]))
        raise at(self._report.race(shadow, access, kind, earlier), row, lane)

    def _all_lanes(self, count: int) -> np.ndarray:
        if self._lanes.size < count:
            self._lanes = np.arange(count)
        return self._lanes[:count]

    check_same_instruction = staticmethod(check_same_instruction)
