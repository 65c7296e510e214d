"""Which tile of which group is next, for a grid that does not know the groups' sizes.

Tiles are counted group after group, and in a group column after column, so that tiles which are computed at
the same time share weights. A warp looks at 32 groups at once, each lane at one; groups without rows take no
step of their own.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Int32, cute

WARP = 32


@dataclass(frozen=True)
class Work:
    """All that is to be computed.

    Attributes:
        offsets: (groups,) ends of the groups' rows, multiples of 128; of no use for a single group.
        sizes: (groups,) real rows.
        rows: of a single group.
        groups: how many.
        columns: tiles side by side.
    """

    offsets: cute.Tensor
    sizes: cute.Tensor
    rows: Int32
    groups: Int32
    columns: Int32


def work_of(offsets: cute.Pointer, sizes: cute.Pointer, rows: Int32, groups: Int32, columns: Int32) -> Work:
    """Of what a host function is given."""
    vector = cute.make_layout(groups)
    ends, counts = (cute.make_tensor(cute.recast_ptr(x, dtype=Int32), vector) for x in (offsets, sizes))
    return Work(ends, counts, rows, groups, columns)


@dataclass(frozen=True)
class Window:
    """32 groups, of which this lane has one.

    Attributes:
        first: the first group.
        before: tiles of all groups before it.
        ends: tiles of the window up to the end of this lane's group.
        tiles: of all of the window.
        rows: tiles of this lane's group, one above the other.
        start, size: its first row and its real rows.
    """

    first: Int32
    before: Int32
    ends: Int32
    tiles: Int32
    rows: Int32
    start: Int32
    size: Int32


@dataclass(frozen=True)
class Tile:
    """One tile.

    Attributes:
        here: whether there is one.
        group: that it belongs to.
        row: of the activations where it begins, a multiple of 128.
        left: real rows of the group from there on.
        column: how many tiles stand left of it.
    """

    here: Boolean
    group: Int32
    row: Int32
    left: Int32
    column: Int32


@cute.jit
def window(work: Work, rows: cutlass.Constexpr[int], first: Int32, before: Int32) -> Window:
    """The 32 groups from `first` on, with tiles of so many rows; a warp comes here together."""
    lane = cute.arch.lane_idx()
    group = first + lane
    start, size = Int32(0), Int32(0)
    if group < work.groups:
        size = work.sizes[group]
        if group > 0:
            start = work.offsets[group - 1]
    high = (size + (rows - 1)) // rows
    ends = high * work.columns
    for i in cutlass.range_constexpr(5):
        lower = cute.arch.shuffle_sync_up(ends, 1 << i)
        ends += lower if lane >= 1 << i else 0
    return Window(first, before, ends, cute.arch.shuffle_sync(ends, WARP - 1), high, start, size)


@cute.jit
def begin(work: Work, form: cutlass.Constexpr) -> Window:
    """The first groups."""
    if cutlass.const_expr(form.grouped):
        return window(work, form.rows, Int32(0), Int32(0))
    # One group needs no search.
    high = (work.rows + (form.rows - 1)) // form.rows
    zero = Int32(0)
    return Window(zero, zero, zero, high * work.columns, high, zero, work.rows)


@cute.jit
def find(work: Work, form: cutlass.Constexpr, seen: Window, number: Int32):
    """The tile of that number, not smaller than at the call before, and the groups it is among.

    Args:
        seen: what the call before, or `begin`, gave.
    """
    if cutlass.const_expr(not form.grouped):
        column = number // seen.rows
        row = (number - column * seen.rows) * form.rows
        return Tile(number < seen.tiles, Int32(0), row, work.rows - row, column), seen
    while number >= seen.before + seen.tiles and seen.first + WARP < work.groups:
        seen = window(work, form.rows, seen.first + WARP, seen.before + seen.tiles)
    inside = number - seen.before
    beyond = cute.arch.vote_ballot_sync(seen.ends > inside)
    # The lowest lane whose group ends beyond the tile; any if there is none.
    lane = cute.arch.popc(~beyond & (beyond - 1)) % WARP
    high = cute.arch.shuffle_sync(seen.rows, lane)
    inside -= cute.arch.shuffle_sync(seen.ends, lane) - high * work.columns
    start, size = cute.arch.shuffle_sync(seen.start, lane), cute.arch.shuffle_sync(seen.size, lane)
    column = inside // cutlass.max(high, 1)
    row = (inside - column * high) * form.rows
    return Tile(beyond != 0, seen.first + lane, start + row, size - row, column), seen
