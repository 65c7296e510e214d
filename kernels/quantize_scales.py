"""Global scales in kernels: known ones, and the amax that another launch found."""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cutlass_dsl import select_
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.quantize_plan import MAX_PARTS
from dsv4lab.kernels.rows import load, warp_max

_OF_A_LANE = MAX_PARTS // 128


@cute.jit
def largest_part(m_parts: cute.Pointer, parts: Int32) -> Uint32:
    """The largest of so many words, a multiple of 4 and at most MAX_PARTS, in all lanes."""
    r_parts = cute.make_rmem_tensor((4, _OF_A_LANE), Uint32)
    r_parts.fill(0)
    for i in cutlass.range_constexpr(_OF_A_LANE):
        first = 4 * (cute.arch.lane_idx() + 32 * i)
        if first < parts:
            r_parts[None, i].store(load(m_parts, Int64(first), 4).load())
    high = r_parts[0]
    for i in cutlass.range_constexpr(1, cute.size(r_parts)):
        high = ptx.umax(high, r_parts[i])
    return warp_max(high)


@cute.jit
def scale_of_row(
    of: cutlass.Constexpr[str],
    interleaved: cutlass.Constexpr[bool],
    m_g: cute.Pointer,
    matrix: Int32,
    row: Int64,
    r: Int32,
    rows: Int32,
) -> Float32:
    """The global scale of row r of a matrix, `row` of all; some other one where there is no such row.

    Args:
        of: whose the scales are, as of Form.
        interleaved: for "halves": gate and up rows alternate in runs of 8.
    """
    index = Int64(0)
    if cutlass.const_expr(of == "token"):
        index = Int64(select_(r < rows, row, Int64(0)))
    if cutlass.const_expr(of == "group"):
        index = Int64(matrix)
    if cutlass.const_expr(of == "halves"):
        is_up = r // 8 % 2 if cutlass.const_expr(interleaved) else Int32(r >= rows // 2)
        index = Int64(2) * matrix + is_up
    return cute.make_tensor(m_g + index, cute.make_layout(1))[0]


@cute.jit
def copy_known(threads: cutlass.Constexpr[int], m_known: cute.Pointer, m_g: cute.Pointer, count: Int32):
    """The known scales, checked, as the operation's third result.

    `threads` of a CTA are a constant: where they are 1024, the compiler takes block_dim for impossible, and
    makes an endless loop of steps by it.
    """
    thread, _, _ = cute.arch.thread_idx()
    (x, y, _), (step_x, step_y, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    g_in = cute.make_tensor(m_known, cute.make_layout(count))
    g_out = cute.make_tensor(m_g, cute.make_layout(count))
    first = (y * step_x + x) * threads + thread
    for i in cutlass.range(first, count, step_x * step_y * threads, unroll=1):
        g_out[i] = block.checked_scale(g_in[i])
