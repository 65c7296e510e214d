"""Which form of Hopper's kernel for many tokens multiplies, and in about how many cycles.

The counts were fitted to what an H200 took. While tensor cores read and write sums in the registers, other
instructions wait, so that both times add up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dsv4lab.kernels.gemm_sm90a_form import SLICE, Form

GROUP_ROWS = 128  # to which groups are padded
_ISSUE = 200  # cycles in which four schedulers issue what a warpgroup executes for 64 rows by 64 of K
_FOUR = 0.91  # share of it where four warpgroups wait less for one another
_ALONE = 210  # cycles that it takes at least, if nothing else hides how long instructions take
_OVERLAP = 0.52  # share of an MMA's time that adds to that of the other instructions
_L2_BYTES = 5000  # that all SMs together load in a cycle
_LOAD_BYTES = 225  # of an SM's loads, that cost a cycle of everything else
_MEMORY_BYTES = 2400  # from memory in a cycle: 4.3 TB/s at 1.8 GHz
_TILE_CYCLES, _EXCHANGE_CYCLES = 4300, 2600  # around a tile's products; until sums have met
_DEQUANTIZE_CYCLES = 5000  # of NVFP4 activations, at least


@dataclass(frozen=True)
class Many:
    """The kernel for many tokens; the fields are those of Form."""

    rows: int
    warpgroups: int = 2
    depth: int = 128
    halves: int = 1
    split: int = 1

    @property
    def form(self) -> Form:
        return Form(self.rows, self.warpgroups, self.depth, self.halves, self.split)


CHOICES = (
    Many(256, 2, 64),
    Many(256, 2, 64, split=2),
    *(
        choice
        for rows in (128, 64, 32)
        for split in (1, 2)
        for choice in (
            Many(rows, 2, 128, split=split),
            Many(rows, 1, 128, halves=2, split=split),
            *([] if rows == 128 else [Many(rows, 2, 256, halves=2, split=split)]),
        )
    ),
)


def fits(choice: Many, k: int) -> bool:
    """Whether each CTA that shares K has a stage of it."""
    return -(-k // choice.depth) >= choice.split


def blocks_of_tokens(choice: Many, rows: int, groups: int | None) -> int:
    """About how many there are, if tokens are spread evenly over the groups."""
    if groups is None:
        return -(-rows // choice.rows)
    # So many tokens surely are in a buffer that has room for any routing, see layouts.max_group_rows.
    used = max(1, min(groups, rows // GROUP_ROWS))
    real = max(used, rows - (GROUP_ROWS - 1) * groups)
    return used * -(-real // (used * choice.rows))


def most_tiles(choice: Many, rows: int, n: int, groups: int | None) -> int:
    """As many as there can be, however rows are spread over groups."""
    high = -(-rows // choice.rows)
    if groups is not None:
        high = rows // GROUP_ROWS * -(-GROUP_ROWS // choice.rows)
    return max(1, high) * -(-n // choice.form.features)


def cycles(
    choice: Many, rows: int, n: int, k: int, groups: int | None, sm_count: int, dequantizes: bool
) -> float:
    """Of the busiest SM, for (rows, K) x (groups, N, K).

    Args:
        rows: of the activations; with groups, of the buffer that has them all, each padded to 128.
        groups: how many; None where offsets are not given and all rows are one group.
        sm_count: streaming multiprocessors of the GPU.
        dequantizes: whether activations are NVFP4.
    """
    form, side = choice.form, -(-n // choice.form.features)
    tiles = blocks_of_tokens(choice, rows, groups) * side
    clusters = max(1, sm_count // form.split)
    active = min(tiles, clusters) * form.split
    mma = 2 * form.rows * form.all_warpgroups
    issue = _ISSUE * form.all_warpgroups * (_FOUR if form.all_warpgroups > 2 else 1)
    nbytes = form.features * SLICE * 9 // 16 + form.rows * SLICE * 2
    products = max(1.05 * mma, issue + _OVERLAP * mma, _ALONE) / form.halves + nbytes / _LOAD_BYTES
    loads = nbytes * active / _L2_BYTES
    once = _TILE_CYCLES + (_EXCHANGE_CYCLES if form.shares > 1 else 0)
    turn = -(-k // (SLICE * form.split)) * max(products, loads) + once
    memory = min(tiles, side * (groups or 1)) * form.features * k * 9 / 16 / _MEMORY_BYTES
    before = max(_DEQUANTIZE_CYCLES, rows * k * 41 / 16 / _MEMORY_BYTES) if dequantizes else 0
    return max(-(-tiles // clusters) * turn, memory + once) + before


@functools.cache
def best(
    rows: int, n: int, k: int, groups: int | None, sm_count: int, dequantizes: bool
) -> tuple[Many, float]:
    """The choice with the fewest cycles, and these."""
    usable = [choice for choice in CHOICES if fits(choice, k)]
    times = [cycles(choice, rows, n, k, groups, sm_count, dequantizes) for choice in usable]
    least = min(range(len(usable)), key=times.__getitem__)
    return usable[least], times[least]
