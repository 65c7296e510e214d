"""How rows are laid out on threads and CTAs: pure functions of sizes, testable without a GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from dsv4lab.emulator import current_device
from dsv4lab.formats import ceil_to

CLUSTER = 8  # the largest cluster that every GPU with clusters runs
MAX_GRID_Y = 65535
# One amax for each CTA of a first launch, which every CTA of the second one reads; a multiple of 4.
MAX_PARTS = 512
_CTA = 128  # threads, where a row has fewer: small CTAs end and begin at different times
# Threads of the largest CTA by blocks of a thread, whose registers have to do: 64 each for 1024 threads, 72
# for 896, 102 for 640, 128 for 512.
_LARGEST = {
    "plain": {1: 1024, 2: 1024, 4: 512},
    "rmsnorm": {1: 896, 2: 640, 4: 512},
    "dequantize": {1: 1024, 4: 1024},
}
_LARGEST_OTHERS = {1: 896, 2: 640}
# Blocks of a thread where there are many: so many that what is done once for a row costs little beside them,
# and so few that there is room for several CTAs on an SM. Others have 2. (Of dequantizing, halves of them.)
_BLOCKS = {"dequantize": 4, "plain": 4, "rmsnorm": 4}
_STREAMING = 768  # threads of a row that does not fit into the registers of a CTA


@dataclass(frozen=True)
class Teams:
    """Threads of rows; the fields are those of Form."""

    team: int
    blocks: int
    teams: int
    resident: bool = True
    cluster: int = 1

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.team * self.teams


def row_teams(source: str, rows: int, columns: int, sm_count: int) -> Teams:
    """For rows of so many blocks of 16, each with a CTA or a part of one.

    Args:
        source: as of Form, or "dequantize".
        columns: blocks of a row; with swizzled scales, their number rounded up to 4. Halves of blocks for
            "dequantize".
    """
    # Where all threads fit on the GPU at once, one block for each ends first; otherwise several hide more
    # latency.
    many = _BLOCKS.get(source, 2)
    few = rows * columns <= sm_count * 1024
    for blocks in (1, many) if few or columns <= 32 else (many,):
        team = _team(columns, blocks)
        if team <= _largest(source, blocks):
            return Teams(team, blocks, max(_CTA // team, 1))
    return Teams(_STREAMING, 1, 1, resident=False)


def cluster_teams(source: str, rows: int, columns: int) -> Teams | None:
    """For a matrix that a CTA, or a cluster of them, holds at one block a thread; None if none can."""
    team = _team(columns, 1)
    most = _largest(source, 1) // team
    # As many teams as there may be, not as few as will do: one kernel then serves all these numbers of rows.
    for cluster in (1, CLUSTER):
        if rows <= cluster * most:
            return Teams(team, 1, most, cluster=cluster)
    return None


def grid(source: str, teams: Teams, rows: int, pad_chunks: int, sm_count: int) -> int:
    """CTAs of a matrix.

    Args:
        pad_chunks: of 16 bytes of zero scales, which all CTAs write together.
    """
    ctas = -(-rows // teams.teams)
    return max(ctas, min(-(-pad_chunks // teams.threads), sm_count), 1)


def amax_teams(source: str, rows: int, columns: int) -> Teams:
    """For the first of two launches, whose CTAs go over many rows each."""
    for blocks in (1, 2) if columns <= 32 else (2,):
        team, largest = _team(columns, blocks), _largest(source, blocks)
        if team <= largest:
            return Teams(team, blocks, max(largest // team, 1))
    return Teams(_STREAMING, 1, 1, resident=False)


def parts(teams: Teams, rows: int, matrices: int, sm_count: int) -> int:
    """CTAs of a matrix in the first of two launches, a multiple of 4."""
    resident = sm_count * max(2048 // teams.threads, 1)
    wanted = min(-(-rows // teams.teams), -(-resident // matrices))
    return min(max(ceil_to(wanted, 4), 4), MAX_PARTS)


def pad_chunks(rows: int, columns: int) -> int:
    """Chunks of 16 bytes in the last 128 rows of swizzled scales; 0 if they are all of real rows."""
    return 32 * (-(-columns // 4)) if rows % 128 else 0


def _largest(source: str, blocks: int) -> int:
    return _LARGEST.get(source, _LARGEST_OTHERS)[blocks]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _team(columns: int, blocks: int) -> int:
    """Threads that have all columns: a power of two in a warp, else 1 to 8 times a power of two of warps."""
    threads = max(-(-columns // blocks), 1)
    if threads <= 32:
        return _power_of_two(threads)
    warps = -(-threads // 32)
    return 32 * ceil_to(warps, _power_of_two(math.ceil(warps / 8)))


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, for CPU tensors of the emulated one in use."""
    if device.type == "cuda":
        return _sm_count_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    return current_device().arch.sm_count


@functools.cache
def _sm_count_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
