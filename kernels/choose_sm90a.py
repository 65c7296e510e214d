"""Which Hopper kernel multiplies and how, from the sizes that the host knows: one rule for all.

The host knows how many rows and groups there are, not how the rows are spread: it takes them as spread
evenly. Costs are in cycles of an H200, from counts of bytes and instructions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dsv4lab.kernels.decode_sm90a_form import DEPTH, MMA_ROWS, Form

GROUP_ROWS = 128  # to which groups are padded
_MEMORY_BYTES = 2400  # from memory in a cycle: 4.3 TB/s at 1.8 GHz
_SM_BYTES = 40  # that an SM takes in a cycle
_TILE_CYCLES = 1500  # from a tile's last product to the next one's first
_EXCHANGE_CYCLES = 1000  # until the sums of a cluster's CTAs have met
_GPC, _GPC_USED = 18, 16
_ISSUED = 0.6  # instructions of a scheduler in a cycle
# Instructions of a warp and step: for each 16 rows, for each 8 tokens of them, for each 8 tokens, once.
_ROWS_COST, _MMA_COST, _TOKENS_COST, _STEP_COST = 150, 8, 60, 50


@dataclass(frozen=True)
class Decode:
    """The kernel for few tokens; the fields are those of decode_sm90a_form.Form."""

    mmas: int
    across: int
    along: int
    tokens: int
    split: int
    ctas: int = 1


CHOICES = tuple(
    Decode(mmas, across, along, tokens, split)
    for tokens in (8, 16, 32)
    for mmas, across in ((2, 4), (2, 2), (2, 3), (1, 7), (2, 1), (4, 1))
    for split in (1, 2, 4, 8)
    for along in (2, 4, 8, 1)
    if 4 <= across * along <= 12
)


def most_clusters(choice: Decode, sm_count: int) -> int:
    """As many as run at the same time; clusters lie within a GPC, of whose SMs, 18 or fewer, 16 have some."""
    if choice.split <= 2:
        return max(1, sm_count * choice.ctas // choice.split)
    return max(1, sm_count // _GPC * (_GPC_USED * choice.ctas // choice.split))


def most_tiles(choice: Decode, rows: int, n: int) -> int:
    """As many as there can be, however rows are spread over groups."""
    return -(-rows // choice.tokens) * -(-n // (MMA_ROWS * choice.mmas * choice.across))


def blocks_of_tokens(choice: Decode, rows: int, groups: int | None) -> int:
    """About how many there are, if tokens are spread evenly over the groups."""
    if groups is None:
        return -(-rows // choice.tokens)
    # So many tokens surely are in a buffer that has room for any routing, see layouts.max_group_rows.
    used = max(1, min(groups, rows // GROUP_ROWS))
    real = max(used, rows - (GROUP_ROWS - 1) * groups)
    return used * -(-real // (used * choice.tokens))


def cycles(choice: Decode, rows: int, n: int, k: int, groups: int | None, sm_count: int) -> float:
    """Of the busiest SM, for (rows, K) x (groups, N, K).

    Args:
        rows: of the activations; with groups, of the buffer that has them all, each padded to 128.
        groups: how many; None where offsets are not given and all rows are one group.
        sm_count: streaming multiprocessors of the GPU.
    """
    form = Form(choice.mmas, choice.across, choice.along, choice.tokens, choice.split)
    blocks = choice.tokens // 8
    step = choice.mmas * (_ROWS_COST + _MMA_COST * blocks) + _TOKENS_COST * blocks + _STEP_COST
    steps = -(-k // (DEPTH * choice.split))
    # Warps take turns on four schedulers; one alone does not fill its scheduler.
    issue = -(-steps // choice.along) * step * max(form.warps / 4, 1.5) / _ISSUED
    taken = steps * (form.stage_bytes + min(rows, choice.tokens) * DEPTH * 2) / _SM_BYTES
    tiles = blocks_of_tokens(choice, rows, groups) * -(-n // form.features)
    turns = -(-tiles // most_clusters(choice, sm_count))
    once = _TILE_CYCLES + (_EXCHANGE_CYCLES if choice.split > 1 else 0)
    memory = tiles * form.features * k * 9 / 16 / _MEMORY_BYTES
    return max(turns * (max(issue, taken) + once), memory + once)


@functools.cache
def choose(rows: int, n: int, k: int, groups: int | None, sm_count: int, even: bool) -> Decode:
    """The kernel for (rows, K) x (groups, N, K).

    Args:
        even: whether tiles must have whole 32 rows of weights.
    """
    most = rows if groups is None else -(-rows // max(1, min(groups, rows // GROUP_ROWS)))
    usable = [choice for choice in CHOICES if choice.tokens in (8, 16, 32)[: -(-most // 8)]]
    usable = [choice for choice in usable if not even or choice.mmas * choice.across % 2 == 0]
    return min(usable, key=lambda choice: cycles(choice, rows, n, k, groups, sm_count))
