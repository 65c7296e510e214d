"""Rows of data on a grid: which threads have a row, what they tell one another, where a scale goes.

A team of threads has one row; a CTA holds several teams, or a team is all of a CTA. Teams of up to 32 threads
are a power of two, larger ones whole warps.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from dsv4lab.kernels import quantize_ptx as ptx

# Results of consecutive exchanges through shared memory stand in one of two places, so that nobody writes
# where others still read: between them lies a barrier of the other place.
TURNS = 2
ALIGNMENT = 16  # bytes of a vector load or store


def padded_columns(swizzled: bool, columns: Int32) -> Int32:
    """Columns of a row of scales, with those that the swizzled layout adds."""
    return (columns + 3) >> 2 << 2 if swizzled else columns


def swizzled_offset(matrix: Int32, row: Int32, column: Int32, rows: Int32, columns: Int32) -> Int64:
    """Where scale (row, column) of one of several matrices (rows, columns) stands in the 128x4 layout."""
    return swizzled_row(matrix, row, rows, columns) + swizzled_column(column)


def swizzled_row(matrix: Int32, row: Int32, rows: Int32, columns: Int32) -> Int64:
    """Where the first scale of a row stands."""
    row_tiles, tiles = (rows + 127) >> 7, (columns + 3) >> 2
    tile = (Int64(matrix) * row_tiles + (row >> 7)) * tiles
    return tile * 512 + ((row & 31) * 16 + (row >> 5 & 3) * 4)


def swizzled_column(column: Int32) -> Int32:
    """How far behind the first scale of its row another one stands; columns are fewer than 2^24."""
    return (column >> 2) * 512 + (column & 3)


def cells(count: int) -> cute.Layout:
    """Of the words that so many warps or CTAs exchange."""
    return cute.make_layout((TURNS, count), stride=(count, 1))


def _in_warp(value, width: int, combine):
    """The values of `width` neighbouring lanes combined, in each of them the same bits."""
    step = width // 2
    while step:
        value = combine(value, cute.arch.shuffle_sync_bfly(value, step))
        step //= 2
    return value


def warp_max(value: Uint32, width: int = 32) -> Uint32:
    """The largest of `width` neighbouring lanes."""
    if width == 32:
        return cute.arch.warp_redux_sync(value, "umax")
    return _in_warp(value, width, ptx.umax)


@cute.jit
def exchange(
    mine: Uint32, s_cells: cute.Tensor, turn: Int32, first: Int32, count: cutlass.Constexpr
) -> cute.Tensor:
    """What `count` warps from `first` on give, one word each. All threads of the CTA come here.

    Args:
        mine: what this thread's warp gives, in all its lanes.
        s_cells: as `cells` of the CTA's warps.
        turn: another one than at the last exchange.
    """
    warp = cute.arch.warp_idx()
    if cute.arch.lane_idx() == 0:
        s_cells[turn, warp] = mine
    cute.arch.sync_threads()
    r_cells = cute.make_rmem_tensor(count, Uint32)
    for i in cutlass.range_constexpr(count):
        r_cells[i] = s_cells[turn, first + i]
    return r_cells


def _first_warp(team: int) -> Int32:
    """Of this thread's team, which has whole warps."""
    warp = cute.arch.warp_idx()
    return warp // (team // 32) * (team // 32)


@cute.jit
def team_max(value: Uint32, team: cutlass.Constexpr, s_cells: cute.Tensor, turn: Int32) -> Uint32:
    """The largest value of a team."""
    if cutlass.const_expr(team <= 32):
        return warp_max(value, team)
    r_cells = exchange(warp_max(value), s_cells, turn, _first_warp(team), team // 32)
    high = r_cells[0]
    for i in cutlass.range_constexpr(1, team // 32):
        high = ptx.umax(high, r_cells[i])
    return high


@cute.jit
def team_sum(value: Float32, team: cutlass.Constexpr, s_cells: cute.Tensor, turn: Int32) -> Float32:
    """The sum of a team's values, in an order that depends on nothing but its size."""
    if cutlass.const_expr(team <= 32):
        return _in_warp(value, team, ptx.add)
    mine = ptx.bits(_in_warp(value, 32, ptx.add))
    r_cells = exchange(mine, s_cells, turn, _first_warp(team), team // 32)
    total = ptx.single(r_cells[0])
    for i in cutlass.range_constexpr(1, team // 32):
        total = ptx.add(total, ptx.single(r_cells[i]))
    return total


@cute.jit
def cluster_max(
    value: Uint32,
    warps: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
    s_cells: cute.Tensor,
    s_ranks: cute.Tensor,
    turn: Int32,
) -> Uint32:
    """The largest value of all threads of a cluster of `cluster` CTAs, each with `warps` warps.

    Every thread of the cluster has come by `cluster_arrive` before and waits for it here: a CTA must have
    begun before others write to it.

    Args:
        s_ranks: as `cells` of the cluster's CTAs, where the other CTAs leave theirs.
    """
    r_cells = exchange(warp_max(value), s_cells, turn, 0, warps)
    high = r_cells[0]
    for i in cutlass.range_constexpr(1, warps):
        high = ptx.umax(high, r_cells[i])
    if cutlass.const_expr(cluster > 1):
        cute.arch.cluster_wait()
        rank = cute.arch.block_idx_in_cluster()
        thread, _, _ = cute.arch.thread_idx()
        if thread < cluster:
            there = cute.arch.map_dsmem_ptr(s_ranks.iterator + (turn * cluster + rank), thread)
            cute.arch.inline_ptx(
                "st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[there.toint(), high]
            )
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        high = s_ranks[turn, 0]
        for i in cutlass.range_constexpr(1, cluster):
            high = ptx.umax(high, s_ranks[turn, i])
    return high


@cute.jit
def load(m_words: cute.Pointer, offset: Int64, count: cutlass.Constexpr) -> cute.Tensor:
    """`count` words from an offset, which is a multiple of 4 words."""
    source = cute.make_tensor((m_words + offset).align(ALIGNMENT), cute.make_layout(count))
    r_words = cute.make_rmem_tensor(count, Uint32)
    cute.autovec_copy(source, r_words)
    return r_words


@cute.jit
def store(m_words: cute.Pointer, offset: Int64, r_words: cute.Tensor):
    """The words at an offset, which is a multiple of their number or of 4."""
    count = cutlass.const_expr(cute.size(r_words))
    alignment = cutlass.const_expr(min(4 * count, ALIGNMENT))
    target = cute.make_tensor((m_words + offset).align(alignment), cute.make_layout(count))
    cute.autovec_copy(r_words, target)


@cute.jit
def pad_swizzled(
    threads: cutlass.Constexpr[int],
    m_words: cute.Pointer,
    matrix: Int32,
    rows: Int32,
    columns: Int32,
    chunks: Int32,
):
    """Zeros in the rows that fill one of several matrices (rows, columns) of scales up to a multiple of 128.

    A chunk of 16 bytes has the scales of 4 columns in rows i, i + 32, i + 64 and i + 96 of a tile; there are
    `chunks` in a matrix's last 128 rows, or 0 where these are all real. A CTA has so many `threads`.
    """
    thread, _, _ = cute.arch.thread_idx()
    (x, _, _), (step, _, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    tiles = (columns + 3) >> 2
    zeros = cute.make_rmem_tensor(4, Uint32)
    zeros.fill(0)
    for chunk in cutlass.range(x * threads + thread, chunks, step * threads, unroll=1):
        i = chunk & 31
        tile = (Int64(matrix) * ((rows + 127) >> 7) + (rows >> 7)) * tiles + (chunk >> 5)
        filled = ((rows & 127) - i + 31) >> 5
        words = tile * 128 + i * 4
        if filled <= 0:
            store(m_words, words, zeros)
        else:
            target = cute.make_tensor(m_words + words, cute.make_layout(4))
            for part in cutlass.range_constexpr(1, 4):
                if part >= filled:
                    target[part] = Uint32(0)
