"""The four warps that store tiles: sums leave tensor memory, are scaled, perhaps activated and quantized.

Each thread has a row of the tile, as tensor memory has it: lane i of warp w holds row 32 w + i. Every warp
stores its 32 rows by itself and waits for no other. Rows behind the last real one of a group are padding: of
them up to 31 are written, whatever they hold.
"""

# No annotations from __future__: the DSL reads them as types.
import math
from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.gemm_form import CTA_ROWS, SLICE, STORE_ROWS, STORES, Form
from dsv4lab.kernels.gemm_quantize import WARPS, Quantized, clear_padding, quantize_slice
from dsv4lab.kernels.gemm_tiles import Tile, Work, begin, find

SUM, OUT = cutlass.Float32, cutlass.BFloat16
_VECTOR = 8  # bf16 values of 16 bytes


@dataclass(frozen=True)
class Factors:
    """Global scales of both operands.

    Attributes:
        a, b: the scales.
        a_row, a_group: from the scale of one row, or of one group, to the next; 0 where they share one.
        b_group: the same of the weights; gate's and up's scales stand side by side.
        limit: of the activation.
    """

    a: cute.Tensor
    b: cute.Tensor
    a_row: Int32
    a_group: Int32
    b_group: Int32
    limit: Float32


def factors_of(
    g_a: cute.Pointer, g_b: cute.Pointer, a_row: Int32, a_group: Int32, b_group: Int32, limit: Float32
) -> Factors:
    """Of what a host function is given."""
    # Their steps say where which scale is; of a layout with one element every place would be the first.
    any_place = cute.make_layout(2**31 - 1)
    a, b = (cute.make_tensor(cute.recast_ptr(g, dtype=Float32), any_place) for g in (g_a, g_b))
    return Factors(a, b, a_row, a_group, b_group, limit)


@dataclass(frozen=True)
class Stored:
    """How TMA stores bf16.

    Attributes:
        copy: of the slice of a warp's rows.
        out: where to, as coordinates.
        layout: of all buffers of a CTA, (rows, columns, buffers).
    """

    copy: cute.CopyAtom
    out: cute.Tensor
    layout: cute.ComposedLayout


@cute.jit
def stored(form: cutlass.Constexpr[Form], out: cute.Pointer, rows: Int32, columns: Int32) -> Stored:
    """The output as bf16 (rows, columns), columns % 8 == 0."""
    m_out = cute.make_tensor(out, cute.make_layout((rows, columns), stride=(cute.assume(columns, 8), 1)))
    box = (STORE_ROWS, form.store_columns)
    layout = blackwell_helpers.make_smem_layout_epi(OUT, LayoutEnum.ROW_MAJOR, box, WARPS * STORES)
    stage = cute.select(layout, mode=[0, 1])
    info = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), m_out, stage, box)
    return Stored(info.atom, info.tma_tensor, layout)


def slices_of(form: Form, t_sums: cute.Tensor, thread: Int32):
    """A copy of a slice of sums to registers, its sources (..., slices, 2) and the registers."""
    t_slices = cute.flat_divide(t_sums[((None, None), 0, 0, None)], (CTA_ROWS, SLICE))
    t_slices = t_slices[None, None, 0, None, None]
    op = tcgen05.Ld32x32bOp(tcgen05.Repetition(SLICE))
    load = tcgen05.make_tmem_copy(cute.make_copy_atom(op, SUM), t_slices[None, None, 0, 0])
    own = load.get_slice(thread)
    places = own.partition_D(cute.make_identity_tensor((CTA_ROWS, SLICE)))
    return load, own.partition_S(t_slices), cute.make_rmem_tensor(places.shape, SUM)


@cute.jit
def row_factors(form: cutlass.Constexpr[Form], factors: Factors, tile: Tile, row: Int32):
    """g_a g_b of a row of the tile: one for all its columns, or one for gate and one for up."""
    first = second = Float32(0.0)
    if row < tile.left:
        a = factors.a[(tile.row + row) * factors.a_row + tile.group * factors.a_group]
        at = tile.group * factors.b_group
        first = ptx.mul(a, factors.b[at])
        second = first
        if cutlass.const_expr(form.column_scale != "one"):
            second = ptx.mul(a, factors.b[at + 1])
    return first, second


@cute.jit
def store_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, half: Int32, t_sums: cute.Tensor,
    results: pipeline.PipelineUmmaAsync, factors: Factors, out: Stored | Quantized, s_out: cute.Tensor | None,
    n: Int32,
):  # fmt: skip
    """Store every tile.

    Args:
        first, step: numbers of the tiles.
        half: which CTA of the tile this one is.
        t_sums: both accumulators (..., 2).
        s_out: buffers of `out.layout`.
        n: columns of the sums.
    """
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    row, strip = half * CTA_ROWS + thread, half * WARPS + warp
    load, t_slices, r_sums = slices_of(form, t_sums, thread)
    r_out = cute.make_rmem_tensor(form.store_columns, OUT)
    if cutlass.const_expr(form.output == "nvfp4"):
        row_scale = block.row_scale(block.checked_scale(out.g[0]))
        if cutlass.const_expr(form.grouped):
            clear_padding(form, work, out)
    else:
        g_out = cute.local_tile(out.out, (STORE_ROWS, form.store_columns), (None, None))
        s_boxes, g_boxes = cpasync.tma_partition(
            out.copy, 0, cute.make_layout(1), cute.group_modes(s_out, 0, 2), cute.group_modes(g_out, 0, 2)
        )
    done = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1 if form.overlaps else 2)
    tile, seen = find(work, form, begin(work, form), first)
    number, turn, buffer = first, Int32(0), warp * STORES
    slices = cutlass.const_expr(form.columns // SLICE)
    while tile.here:
        factor, other = row_factors(form, factors, tile, row)
        begin_slice = tile.column * slices
        used = cutlass.min(cute.ceil_div(n, SLICE) - begin_slice, slices)
        # Warps without a real row have block scales to clear, but not where another group may begin.
        real = strip * STORE_ROWS < tile.left
        if cutlass.const_expr(form.output == "nvfp4"):
            real = half * CTA_ROWS < tile.left
        results.consumer_wait(done)
        for i in cutlass.range(used, unroll=1):
            at, last = i, i == used - 1
            if cutlass.const_expr(form.overlaps):
                # What the other accumulator has of this one comes first; then that may be written.
                at, last = (used - 1 - i if turn == 0 else i), i == 0
            cute.copy(load, t_slices[None, None, None, at, turn], r_sums)
            cute.arch.fence_view_async_tmem_load()
            if last:
                with cute.arch.elect_one():
                    results.consumer_release(done)
            at += begin_slice
            if real:
                finish(form, factors, r_sums, r_out, factor, other, n, at * SLICE)
                if cutlass.const_expr(form.output == "nvfp4"):
                    quantize_slice(form, out, row_scale, r_out, work.rows, tile, row, at * 2)
                else:
                    box = (None, tile.row // STORE_ROWS + strip, at)
                    _store_slice(form, out, r_out, s_out, buffer, s_boxes, g_boxes[box])
                    buffer ^= 1
        done.advance()
        turn = 1 - turn
        number += step
        tile, seen = find(work, form, seen, number)
    if cutlass.const_expr(form.output != "nvfp4"):
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def _store_slice(
    form: cutlass.Constexpr[Form], out: Stored, r_out: cute.Tensor, s_out: cute.Tensor, buffer: Int32,
    s_boxes: cute.Tensor, g_box: cute.Tensor,
):  # fmt: skip
    """Store a warp's rows from one of its buffers, when the copy before the last one has read the other."""
    vector = cute.make_layout(_VECTOR)
    r_vectors = cute.logical_divide(r_out, vector)
    s_vectors = cute.logical_divide(s_out[cute.arch.lane_idx(), None, buffer], vector)
    for i in cutlass.range_constexpr(form.store_columns // _VECTOR):
        cute.autovec_copy(r_vectors[None, i], s_vectors[None, i])
    cute.arch.fence_view_async_shared()
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.copy(out.copy, s_boxes[None, buffer], g_box)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(STORES - 1, read=True)
    cute.arch.sync_warp()


def finish(
    form: Form, factors: Factors, r_sums: cute.Tensor, r_out: cute.Tensor, factor: Float32, other: Float32,
    n: Int32, column: Int32,
) -> None:  # fmt: skip
    """From a row's sums to what is stored of them.

    Args:
        r_out: (form.store_columns,) bf16.
        factor, other: see row_factors.
        column: of the first sum.
    """
    if form.output == "bf16" and form.column_scale == "one":
        r_out.store((r_sums.load() * factor).to(OUT))
        return
    sums = [r_sums[i] for i in range(SLICE)]
    if form.output == "bf16":
        values = [ptx.mul(x, _factor(form, factor, other, column, n, i)) for i, x in enumerate(sums)]
    else:
        gates = [ptx.mul(x, factor) for i, x in enumerate(sums) if i // 8 % 2 == 0]
        ups = [ptx.mul(x, other) for i, x in enumerate(sums) if i // 8 % 2 == 1]
        values = [swiglu(form, gate, up, factors.limit) for gate, up in zip(gates, ups, strict=True)]
    r_values = cute.make_rmem_tensor(form.store_columns, SUM)
    for i, value in enumerate(values):
        r_values[i] = value
    r_out.store(r_values.load().to(OUT))


def _factor(form: Form, factor: Float32, other: Float32, column: Int32, n: Int32, i: int) -> Float32:
    """Of sum i, where gate and up differ."""
    if form.column_scale == "interleaved":
        return other if i // 8 % 2 else factor
    return Float32(cutlass.select_(column + i < n // 2, factor, other))


def swiglu(form: Form, gate: Float32, up: Float32, limit: Float32) -> Float32:
    """silu(min(gate, L)) clip(up, -L, L), NaN where gate or up is NaN or Inf.

    From e = exp(-|gate| / 2), which goes into both factors: exp(-gate) may be Inf where the product is none.
    """
    one = ptx.fma(up, 0.0, ptx.fma(gate, 0.0, 1.0))
    if form.clamped:
        gate, up = ptx.fmin(gate, limit), ptx.fmin(ptx.fmax(up, ptx.negated(limit)), limit)
    # The fast exponential has no subnormal results, so that the root is squared instead.
    root = ptx.exp2_fast(ptx.mul(ptx.absolute(gate), -math.log2(math.e) / 4))
    e = ptx.mul(root, root)
    numerator = ptx.select("lt.f32", gate, 0.0, e, 1.0)
    sigmoid = ptx.mul(numerator, ptx.rcp_fast(ptx.fma(e, e, 1.0)))
    return ptx.mul(ptx.mul(ptx.mul(gate, one), sigmoid), ptx.mul(numerator, up))
