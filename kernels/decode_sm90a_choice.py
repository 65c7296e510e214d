"""Which form of Hopper's kernel for few tokens multiplies, and in about how many cycles.

Counts of instructions are the compiler's; the other numbers were fitted to what an H200 took. Reading weights
from memory and multiplying overlap, so that the slower of the two counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dsv4lab.kernels.decode_sm90a_form import DEPTH, MMA_ROWS, Form

GROUP_ROWS = 128  # to which groups are padded
_MEMORY_BYTES = 2400  # from memory in a cycle: 4.3 TB/s at 1.8 GHz
# Before the first product and after the last one. Where there is room for two CTAs on an SM, those of this
# kernel stand ready when the one before ends.
_ONCE_CYCLES = {1: 9000, 2: 5800}
_TILE_CYCLES = 1700  # from a tile's last product to the next one's first
_EXCHANGE_CYCLES = {1: 0, 2: 1300, 4: 5000, 8: 8000}  # until sums of a cluster's CTAs have met
_ISSUED = 0.66  # instructions of a scheduler in a cycle
_ALONE_CYCLES = 1.65  # of an instruction, if a scheduler has no other warp
_STARVED = 1.3  # how much longer a step takes where a warp's next one is not asked for before it
_SHARED = 1.2  # cycles in which shared memory reads or takes 128 bytes
# Instructions of a warp and step: for 16 rows, for 8 tokens of them, for 8 tokens' fragments, once.
_ROWS, _MMA, _VALUES, _CODES, _STEP = 150, 8, 22, 60, 55
# Clusters of 4 and of 8 lie within a GPC, of whose SMs, 18 or fewer, 16 have some.
_GPC, _GPC_USED = 18, 16


@dataclass(frozen=True)
class Decode:
    """The kernel for few tokens; the fields are those of decode_sm90a_form.Form."""

    mmas: int
    across: int
    along: int
    tokens: int
    split: int
    ctas: int = 1


# By tokens: MMAs, warps across and along, and CTAs on an SM, for two of which registers must suffice.
_LARGE = ((8, 1, 8, 1), (7, 1, 8, 1), (6, 1, 8, 1), (4, 2, 4, 1))
_SMALL = ((4, 1, 7, 2), (3, 1, 4, 2), (2, 2, 4, 2), (1, 1, 8, 2))
_SHAPES = {
    8: (*_LARGE, *_SMALL, (7, 1, 4, 2), (3, 1, 7, 2)),
    16: (*_LARGE, *_SMALL),
    32: ((4, 2, 3, 1), (2, 4, 2, 1), (2, 3, 2, 1), (2, 2, 3, 1), (1, 7, 1, 1), (1, 1, 7, 1)),
}
CHOICES = tuple(
    Decode(mmas, across, along, tokens, split, ctas)
    for tokens, shapes in _SHAPES.items()
    for mmas, across, along, ctas in shapes
    for split in (1, 2, 4, 8)
)


def most_clusters(choice: Decode, sm_count: int) -> int:
    """As many as run at the same time, of a CTA on each SM."""
    if choice.split <= 2:
        return max(1, sm_count // choice.split)
    return max(1, sm_count // _GPC * (_GPC_USED // choice.split))


def most_tiles(choice: Decode, rows: int, n: int) -> int:
    """As many as there can be, however rows are spread over groups."""
    return -(-rows // choice.tokens) * -(-n // (MMA_ROWS * choice.mmas * choice.across))


def blocks_of_tokens(choice: Decode, rows: int, groups: int | None) -> int:
    """About how many there are, if tokens are spread evenly over the groups."""
    if groups is None:
        return -(-rows // choice.tokens)
    # So many tokens surely are in a buffer that has room for any routing, see layouts.max_group_rows.
    used, real = _spread(rows, groups)
    return used * -(-real // (used * choice.tokens))


def _spread(rows: int, groups: int) -> tuple[int, int]:
    """Groups that have tokens, and how many these are at least."""
    used = max(1, min(groups, rows // GROUP_ROWS))
    return used, max(used, rows - (GROUP_ROWS - 1) * groups)


def _least_tokens(rows: int, groups: int | None) -> int:
    """Of a tile, 8 or 16, so that weights are decoded once; some groups have twice as many as the mean."""
    if groups is None:
        return 8 if rows <= 8 else 16
    used, real = _spread(rows, groups)
    # Where every group has 128 rows, it may have any number of tokens.
    return 8 if rows != groups * GROUP_ROWS and 2 * real <= 8 * used else 16


def cycles(
    choice: Decode, rows: int, n: int, k: int, groups: int | None, sm_count: int, quantized: bool
) -> float:
    """Of the busiest SM, for (rows, K) x (groups, N, K).

    Args:
        rows: of the activations; with groups, of the buffer that has them all, each padded to 128.
        groups: how many; None where offsets are not given and all rows are one group.
        sm_count: streaming multiprocessors of the GPU.
        quantized: whether activations are NVFP4.
    """
    features = MMA_ROWS * choice.mmas * choice.across
    tiles = blocks_of_tokens(choice, rows, groups) * -(-n // features)
    clusters = most_clusters(choice, sm_count)
    turns = -(-tiles // clusters)
    form = _form(choice, quantized, groups is None and turns == 1)
    blocks, pairs = choice.tokens // 8, 1 if choice.tokens <= 16 else -(-choice.mmas // 2)
    step = choice.mmas * (_ROWS + _MMA * blocks) + (_CODES if quantized else _VALUES) * blocks * pairs + _STEP
    rounds = -(-k // (DEPTH * choice.split * choice.along))
    products = rounds * step * max(form.warps / 4 / _ISSUED, _ALONE_CYCLES)
    # Accesses of 128 bytes to shared memory: tokens, two for each as banks collide, weights, what is loaded.
    shared = form.warps * (32 * blocks * pairs + 12 * choice.mmas) + choice.along * form.stage_bytes / 128
    products = max(products, _SHARED * rounds * shared)
    if form.depth == 1 and rounds > 1:
        products *= _STARVED
    around = turns * _EXCHANGE_CYCLES[choice.split] + (turns - 1) * _TILE_CYCLES
    memory = min(tiles, -(-n // features) * (groups or 1)) * features * k * 9 / 16 / _MEMORY_BYTES
    return max(turns * products, memory) + around + _ONCE_CYCLES[choice.ctas]


def _form(choice: Decode, quantized: bool, single: bool = False) -> Form:
    return Form(
        choice.mmas, choice.across, choice.along, choice.tokens, choice.split,
        activations="linear" if quantized else "bf16", single=single, ctas=choice.ctas,
    )  # fmt: skip


@functools.cache
def best(
    rows: int, n: int, k: int, groups: int | None, sm_count: int, quantized: bool, even: bool
) -> tuple[Decode, float]:
    """The choice with the fewest cycles, and these.

    Args:
        even: whether tiles must have whole 32 rows of weights.
    """
    usable = [
        choice
        for choice in CHOICES
        if choice.tokens >= _least_tokens(rows, groups)
        and _form(choice, quantized).depth
        and not (even and choice.mmas * choice.across % 2)
    ]
    times = [cycles(choice, rows, n, k, groups, sm_count, quantized) for choice in usable]
    least = min(range(len(usable)), key=times.__getitem__)
    return usable[least], times[least]
