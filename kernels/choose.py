"""Which kernel multiplies, from the sizes that the host knows: one rule for all.

The host knows how many rows and groups there are, not how the rows are spread. It takes them as spread
evenly, and for each kernel adds up the time of the tiles that one SM computes one after the other. The rates
are a B200's by its data sheet; nothing was measured on one.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels import decode_choice
from dsv4lab.kernels.decode_choice import Decode
from dsv4lab.kernels.gemm_form import DEPTH, Form

GROUP_ROWS = 128  # to which groups are padded
_MACS = 16384  # of an SM and cycle: 9 PFLOPS of FP4 by 148 SMs at 1.85 GHz
_BYTES = 64  # that an SM has from L2 in a cycle
_TILE_CYCLES = 1500  # before a tile's first product and after its last one


@dataclass(frozen=True)
class Prefill:
    """Tiles of many rows: 128, or 256 of two CTAs, and 64, 128, 192 or 256 columns."""

    rows: int
    columns: int

    @property
    def ctas(self) -> int:
        """That multiply a tile together."""
        return self.rows // GROUP_ROWS


# In order of preference where nothing else decides. Two CTAs save loads of weights, which narrow tiles do not
# have.
CHOICES = tuple(
    Prefill(*shape) for shape in ((128, 128), (128, 256), (128, 64), (128, 192), (256, 256), (256, 128))
)


def choose(rows: int, n: int, k: int, groups: int | None, sm_count: int) -> Prefill | Decode:
    """The kernel for (rows, K) x (groups, N, K).

    Args:
        rows: of the activations; with groups, of the buffer that has them all, each padded to 128.
        groups: how many; None where offsets are not given and all rows are one group.
        sm_count: streaming multiprocessors of the GPU.
    """
    sizes = (rows, n, k, groups, sm_count)
    many = min((choice for choice in CHOICES if choice.ctas <= sm_count), key=lambda c: cycles(c, *sizes))
    few = decode_choice.best(*sizes)
    return few if decode_choice.cycles(few, *sizes) < cycles(many, *sizes) else many


def tiles(choice: Prefill, rows: int, n: int, groups: int | None) -> int:
    """About how many there are, if rows are spread evenly over the groups."""
    high = -(-rows // choice.rows)
    if groups is not None:
        # So many tokens surely are in a buffer that has room for any routing, see layouts.max_group_rows.
        used = min(groups, rows // GROUP_ROWS)
        real = max(used, rows - (GROUP_ROWS - 1) * groups)
        high = used * -(-real // (used * choice.rows))
    return high * -(-n // choice.columns)


def most_tiles(choice: Prefill, rows: int, n: int, groups: int | None) -> int:
    """As many as there can be, however rows are spread."""
    high = rows // GROUP_ROWS if groups is not None else -(-rows // choice.rows)
    return high * -(-n // choice.columns)


def cycles(choice: Prefill, rows: int, n: int, k: int, groups: int | None, sm_count: int) -> int:
    """Of the busiest SM."""
    form = Form(choice.rows, choice.columns)
    products = choice.rows * choice.columns * DEPTH // (choice.ctas * _MACS)
    stage = max(products, form.stage_bytes // _BYTES)
    at_once = sm_count // choice.ctas
    turns = -(-tiles(choice, rows, n, groups) // at_once)
    return turns * (_TILE_CYCLES + stage * -(-k // DEPTH))
