"""The kernel that quantizes rows: one body for all sources of values and all policies of global scales.

Each thread of a row's team has whole blocks of 16 values, and keeps them in registers from the reading to the
codes wherever a row fits. What stands between is one exchange among the team for a norm, and one among those
who share a global scale: a team, or all CTAs of a cluster; or none, where the scale is known.
"""

# No annotations from __future__: the DSL reads them as types.
import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute, memory
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.quantize_form import Form
from dsv4lab.kernels.quantize_registers import Blocks, encode, finish, read_blocks, square_sum
from dsv4lab.kernels.quantize_scales import copy_known, largest_part, scale_of_row
from dsv4lab.kernels.quantize_sources import reciprocal_root
from dsv4lab.kernels.rows import cells, cluster_max, pad_swizzled, padded_columns, team_max, team_sum


@cute.kernel
def _quantize_rows(
    form: cutlass.Constexpr[Form],
    m_x: cute.Pointer,
    m_mix: cute.Pointer,
    m_weight: cute.Pointer,
    m_known: cute.Pointer,
    m_codes: cute.Pointer,
    m_scales: cute.Pointer,
    m_g: cute.Pointer,
    m_rrms: cute.Pointer,
    m_kept: cute.Pointer,
    matrices: Int32,
    rows: Int32,
    columns: Int32,
    tiles: Int32,
    known: Int32,
    pads: Int32,
    divisor: Float32,
    eps: Float32,
    limit: Float32,
):
    thread, _, _ = cute.arch.thread_idx()
    (x, y, _), (step_x, step_y, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    lane, mine = thread, Int32(0)
    if cutlass.const_expr(form.teams > 1):
        lane, mine = thread % form.team, thread // form.team
    warps = cutlass.const_expr(form.threads // 32)
    smem = memory.SmemAllocator()
    s_cells = smem.allocate_tensor(Uint32, cells(warps), 16)
    s_ranks = smem.allocate_tensor(Uint32, cells(form.cluster), 16)
    turn = Int32(0)

    # Passes over a row: for a norm, for the row's amax, for the codes. `chunks` is 1 where it is read once.
    resident = cutlass.const_expr(form.resident)
    needs_amax = cutlass.const_expr(form.output != "codes" or form.scale in ("row", "cluster"))
    chunks = 1
    if cutlass.const_expr(not resident):
        at_once = cutlass.const_expr(form.team * form.blocks)
        chunks = (padded_columns(form.swizzled, columns) + at_once - 1) // at_once
    blocks = Blocks(form, m_x, m_mix, m_weight, columns, limit, lane)
    rrms = Float32(0)
    if cutlass.const_expr(form.scale == "known"):
        copy_known(form.threads, m_known, m_g, known)

    # Where there is one matrix, or each CTA has but one tile of it, the loops are none.
    y, matrices, step_y = (y, matrices, step_y) if cutlass.const_expr(form.matrices) else (0, 1, 1)
    start, stop, step = (x, tiles, step_x) if cutlass.const_expr(form.loops) else (0, 1, 1)
    for matrix in cutlass.range(y, matrices, step_y, unroll=1):
        if cutlass.const_expr(form.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        matrix_high = Uint32(0)
        for number in cutlass.range(start, stop, step, unroll=1):
            tile = number if cutlass.const_expr(form.loops) else x
            r = tile * form.teams + mine
            if cutlass.const_expr(form.scale == "cluster"):
                r = mine * form.cluster + x  # few rows are one for each CTA
            if cutlass.const_expr(form.scale == "partials" and not form.loops):
                # The launch before went the other way: what it read last may still be in the L2 cache.
                r = (step_x - 1 - x) * form.teams + mine
            here = r < rows
            row = Int64(matrix) * rows + r

            if cutlass.const_expr(form.norm):
                total = Float32(0)
                for chunk in cutlass.range(chunks, unroll=1):
                    read_blocks(blocks, row, here, chunk)
                    total = square_sum(blocks, total)
                total = team_sum(total, form.team, s_cells, turn)
                turn = 1 - turn
                rrms = reciprocal_root(total, columns * 16, eps)
                if here & (lane == 0):
                    cute.make_tensor(m_rrms + row, cute.make_layout(1))[0] = rrms

            high = Uint32(0)
            if cutlass.const_expr(needs_amax):
                for chunk in cutlass.range(chunks, unroll=1):
                    if cutlass.const_expr(not (resident and form.norm)):
                        read_blocks(blocks, row, here, chunk)
                    high = ptx.umax(high, finish(blocks, rrms, here, chunk))
                if cutlass.const_expr(form.scale == "row"):
                    high = team_max(high, form.team, s_cells, turn)
                    turn = 1 - turn
                matrix_high = ptx.umax(matrix_high, high)

            g = Float32(0)
            first = (x == 0) & (thread == 0)
            if cutlass.const_expr(form.scale == "row"):
                g = block.runtime_scale(high, divisor)
                if here & (lane == 0):
                    cute.make_tensor(m_g + row, cute.make_layout(1))[0] = g
            if cutlass.const_expr(form.scale == "cluster"):
                high = cluster_max(high, warps, form.cluster, s_cells, s_ranks, turn)
                turn = 1 - turn
                g = block.runtime_scale(high, divisor)
                if first:
                    cute.make_tensor(m_g + matrix, cute.make_layout(1))[0] = g

            if cutlass.const_expr(form.output == "codes"):
                for chunk in cutlass.range(chunks, unroll=1):
                    if cutlass.const_expr(not resident or not (form.norm or needs_amax)):
                        read_blocks(blocks, row, here, chunk)
                    if cutlass.const_expr(not (resident and needs_amax)):
                        finish(blocks, rrms, here, chunk)
                    if cutlass.const_expr(form.scale == "known"):
                        g = scale_of_row(form.of, False, m_known, matrix, row, r, rows)
                        g = block.checked_scale(g)
                    if cutlass.const_expr(form.scale == "partials"):
                        unit = matrix if cutlass.const_expr(form.of == "group") else Int32(0)
                        g = block.runtime_scale(largest_part(m_known + Int64(unit) * known, known), divisor)
                        if first & (tile == x) & (unit == matrix):
                            cute.make_tensor(m_g + unit, cute.make_layout(1))[0] = g
                    encode(blocks, m_codes, m_scales, m_kept, matrix, row, r, rows, here, chunk, g)

        if cutlass.const_expr(form.output == "partials"):
            matrix_high = cluster_max(matrix_high, warps, 1, s_cells, s_ranks, turn)
            turn = 1 - turn
            if thread == 0:
                part = Int64(matrix) * step_x + x
                cute.make_tensor(m_codes + part, cute.make_layout(1))[0] = matrix_high
        if cutlass.const_expr(form.output == "codes" and form.swizzled):
            pad_swizzled(form.threads, cute.recast_ptr(m_scales, dtype=Uint32), matrix, rows, columns, pads)


_quantize_rows.set_name_prefix("quantize_rows", remove_cutlass_symbol=True, keep_mangled_name=False)


def make_quantize_rows(form: Form):
    """The host function of a kernel; a pointer that its form does not use may be null.

    Its arguments: words of the rows; weights of the streams; words of the norm's weight; known scales or
    parts of an amax; words of codes (or parts, to be written); scales; global scales; 1 / rms; words of the
    bf16 values; matrices, rows of each, blocks of a row, tiles of teams, how many are known (or parts),
    chunks of padding of swizzled scales, CTAs of a matrix, matrices at a time; divisor, eps and limit.
    """

    @cute.jit
    def quantize_rows(
        m_x: cute.Pointer,
        m_mix: cute.Pointer,
        m_weight: cute.Pointer,
        m_known: cute.Pointer,
        m_codes: cute.Pointer,
        m_scales: cute.Pointer,
        m_g: cute.Pointer,
        m_rrms: cute.Pointer,
        m_kept: cute.Pointer,
        matrices: Int32,
        rows: Int32,
        columns: Int32,
        tiles: Int32,
        known: Int32,
        pads: Int32,
        grid_x: Int32,
        grid_y: Int32,
        divisor: Float32,
        eps: Float32,
        limit: Float32,
        stream: cuda.CUstream,
    ):
        _quantize_rows(
            form, m_x, m_mix, m_weight, m_known, m_codes, m_scales, m_g, m_rrms, m_kept,
            matrices, rows, columns, tiles, known, pads, divisor, eps, limit,
        ).launch(
            grid=(grid_x, grid_y, 1),
            block=(form.threads, 1, 1),
            cluster=(form.cluster, 1, 1) if form.cluster > 1 else None,
            stream=stream,
        )  # fmt: skip

    return quantize_rows
