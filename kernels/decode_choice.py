"""How many tokens a tile of few tokens has, and how many CTAs share its K, from sizes that the host knows.

The cost is counted as in `choose`, in cycles of the SM that has most to do, so that both kinds of kernels can
be compared. Reading the weights from memory takes all of them the same time, which is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels.decode_form import DEPTH, FEATURES, Form

GROUP_ROWS = 128  # to which groups are padded
_BYTES = 64  # that an SM has from L2 in a cycle
_TILE_CYCLES = 1500  # before a tile's first product and after its last one
_EXCHANGE_CYCLES = 1000  # until the sums of a cluster's CTAs have met
# Clusters lie within a GPC: of its SMs, 18 or more, two or four clusters of 8 or 4 CTAs have 16.
_GPC, _GPC_USED = 18, 16


@dataclass(frozen=True)
class Decode:
    """Tiles of 128 columns of the output for 8, 16, 32, 64 or 128 tokens, K shared by 1, 2, 4 or 8 CTAs."""

    tokens: int
    split: int


CHOICES = tuple(Decode(tokens, split) for tokens in (8, 16, 32, 64, 128) for split in (1, 2, 4, 8))


def fits(choice: Decode, k: int) -> bool:
    """Whether every CTA has at least one stage."""
    return choice.split <= -(-k // DEPTH)


def most_clusters(choice: Decode, sm_count: int) -> int:
    """As many as run at the same time: one that has to wait would take as long as all the others together."""
    if choice.split <= 2:
        return max(1, sm_count // choice.split)
    return max(1, sm_count // _GPC * (_GPC_USED // choice.split))


def most_tiles(choice: Decode, rows: int, n: int) -> int:
    """As many as there can be, however rows are spread over groups."""
    return -(-rows // choice.tokens) * -(-n // FEATURES)


def tiles(choice: Decode, rows: int, n: int, groups: int | None) -> int:
    """About how many there are, if tokens are spread evenly over the groups."""
    blocks = -(-rows // choice.tokens)
    if groups is not None:
        # So many tokens surely are in a buffer that has room for any routing, see layouts.max_group_rows.
        used = min(groups, rows // GROUP_ROWS)
        real = max(used, rows - (GROUP_ROWS - 1) * groups)
        blocks = used * -(-real // (used * choice.tokens))
    return blocks * -(-n // FEATURES)


def cycles(choice: Decode, rows: int, n: int, k: int, groups: int | None, sm_count: int) -> int:
    """Of the busiest SM, for (rows, K) x (groups, N, K).

    Args:
        rows: of the activations; with groups, of the buffer that has them all, each padded to 128.
        groups: how many; None where offsets are not given and all rows are one group.
        sm_count: streaming multiprocessors of the GPU.
    """
    form = Form(choice.tokens, choice.split)
    turns = -(-tiles(choice, rows, n, groups) // most_clusters(choice, sm_count))
    stages = -(-k // (DEPTH * choice.split))
    once = _TILE_CYCLES + (_EXCHANGE_CYCLES if choice.split > 1 else 0)
    return turns * (once + stages * form.stage_bytes // _BYTES)


def best(rows: int, n: int, k: int, groups: int | None, sm_count: int) -> Decode:
    """The choice with the fewest cycles, of equal ones the smaller tile and the fewer CTAs."""
    usable = [choice for choice in CHOICES if fits(choice, k)]
    return min(usable, key=lambda choice: cycles(choice, rows, n, k, groups, sm_count))
