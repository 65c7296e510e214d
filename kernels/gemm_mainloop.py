"""The two warps that multiply tiles: one brings operands to shared memory, the other multiplies them.

Operands are NVFP4: codes (rows, K) of the activations and (N, K) of each group's weights, block scales of
both in chunks of 128 rows by 4, see dsv4lab.layouts. A stage holds 256 of K. Where codes or scales end within
a tile, TMA fills in zeros.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout
from dsv4lab.kernels.gemm_form import CTA_ROWS, DEPTH, SCALE_ROWS, Form
from dsv4lab.kernels.gemm_tiles import Work, begin, find

from dsv4lab.formats import BLOCK

CODE, SCALE, SUM = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32
_CHUNK = (SCALE_ROWS, DEPTH)  # of a copy of block scales


@dataclass(frozen=True)
class Operands:
    """Codes and block scales, of activations and weights, in this order.

    Attributes:
        loads: copies by TMA.
        tensors: what they read, as coordinates.
        layouts: of all stages in shared memory; those of scales as copies write them, chunk after chunk.
    """

    loads: list
    tensors: list
    layouts: list


def group_of(form: Form) -> tcgen05.CtaGroup:
    return tcgen05.CtaGroup.TWO if form.ctas == 2 else tcgen05.CtaGroup.ONE


def tiled_mma(form: Form) -> cute.TiledMma:
    """The MMA of a tile."""
    major = OperandMajorMode.K
    return blackwell_helpers.make_blockscaled_trivial_tiled_mma(
        CODE, CODE, major, major, SCALE, BLOCK, group_of(form), form.tile[:2]
    )


def cluster_layout(form: Form, mma: cute.TiledMma) -> cute.Layout:
    """Of the CTAs that multiply together, as the helpers of CuTe DSL ask for it."""
    return cute.tiled_divide(cute.make_layout((form.ctas, 1, 1)), (mma.thr_id.shape,))


@cute.jit
def operands(
    form: cutlass.Constexpr[Form], mma: cute.TiledMma, pointers: list, rows: Int32, n: Int32, k: Int32,
    groups: Int32,
):  # fmt: skip
    """Descriptors for TMA; rows of codes are whole 16 bytes, and n is a multiple of 8."""
    a, b, sfa, sfb = pointers
    k, n = cute.assume(k, 32), cute.assume(n, 8)
    matrix = cute.assume(Int64(n) * k, 256)
    m_a = cute.make_tensor(a, cute.make_layout((rows, k, 1), stride=(k, 1, 0)))
    m_b = cute.make_tensor(b, cute.make_layout((n, k, groups), stride=(k, 1, matrix)))
    # Without a dimension of groups, whose step might not be an int32.
    chunk = blockscaled_layout.BlockScaledBasicChunk(BLOCK).layout
    m_sfa = cute.make_tensor(sfa, cute.tile_to_shape(chunk, (rows, k), (2, 1)))
    m_sfb = cute.make_tensor(sfb, blockscaled_layout.tile_atom_to_shape_SF((n, k, groups), BLOCK))

    chunks = form.scale_chunks * form.stages
    s_a = blackwell_helpers.make_smem_layout_a(mma, form.tile, CODE, form.stages)
    s_b = blackwell_helpers.make_smem_layout_b(mma, form.tile, CODE, form.stages)
    s_sfa = blockscaled_layout.make_smem_layout_sf(_CHUNK, BLOCK, form.stages)
    s_sfb = blockscaled_layout.make_smem_layout_sf(_CHUNK, BLOCK, chunks)

    one = cpasync.CopyBulkTensorTileG2SOp(group_of(form))
    # Every CTA of a tile multiplies with all of its weights, and so has all of their scales.
    shared = cpasync.CopyBulkTensorTileG2SMulticastOp(group_of(form)) if form.ctas > 1 else one
    stage = [cute.slice_(layout, (None, None, None, 0)) for layout in (s_a, s_b)]
    chunk = cute.slice_(s_sfa, (None, None, 0))
    # Scales travel as 16-bit words: of bytes a box would be too wide.
    words = {"internal_type": cutlass.Int16}
    cluster = cluster_layout(form, mma).shape
    infos = [
        cute.nvgpu.make_tiled_tma_atom_A(one, m_a, stage[0], form.tile, mma, cluster),
        cute.nvgpu.make_tiled_tma_atom_B(one, m_b, stage[1], form.tile, mma, cluster),
        cpasync.make_tiled_tma_atom(one, m_sfa, chunk, _CHUNK, **words),
        cpasync.make_tiled_tma_atom(shared, m_sfb, chunk, _CHUNK, num_multicast=form.ctas, **words),
    ]
    loads, tensors = [info.atom for info in infos], [info.tma_tensor for info in infos]
    return Operands(loads, tensors, [s_a, s_b, s_sfa, s_sfb])


@cute.jit
def load_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, half: Int32, mma: cute.TiledMma,
    given: Operands, s_tensors: list, ring: pipeline.PipelineTmaUmma, k: Int32,
):  # fmt: skip
    """Bring the operands of every tile, stage after stage.

    Args:
        first, step: numbers of the tiles.
        half: which CTA of the tile this one is.
    """
    for load in given.loads:
        cpasync.prefetch_descriptor(load)
    part, alone, both = mma.get_slice(half), cute.make_layout(1), cute.make_layout(form.ctas)
    m_a, m_b, m_sfa, m_sfb = given.tensors
    g_b = part.partition_B(cute.local_tile(m_b, (form.columns, DEPTH), (None, None, None)))
    g_sfa = cute.local_tile(m_sfa, _CHUNK, (None, None))
    g_sfb = cute.local_tile(m_sfb, _CHUNK, (None, None, None))
    s_a, s_b, s_sfa, s_sfb = s_tensors
    s_b, g_b = _partition(given.loads[1], 0, alone, s_b, g_b, 3)
    s_sfa, g_sfa = _partition(given.loads[2], 0, alone, s_sfa, g_sfa, 2)
    s_sfb, g_sfb = _partition(given.loads[3], half, both, s_sfb, g_sfb, 2)
    mask = Int32((1 << form.ctas) - 1).to(cutlass.Int16) if cutlass.const_expr(form.ctas > 1) else None

    state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, form.stages)
    tile, seen = find(work, form, begin(work, form), first)
    number, steps = first, cute.ceil_div(k, DEPTH)
    while tile.here:
        # Tiles of two CTAs may begin at any multiple of 128 rows.
        g_a = cute.local_tile(cute.domain_offset((tile.row, 0, 0), m_a), (form.rows, DEPTH), (0, None, 0))
        s_a_part, g_a = _partition(given.loads[0], 0, alone, s_a, part.partition_A(g_a), 3)
        chunk_a = tile.row // CTA_ROWS + half
        chunk_b = tile.column * form.columns // SCALE_ROWS
        for i in cutlass.range(steps, unroll=1):
            ring.producer_acquire(state)
            full = ring.producer_get_barrier(state)
            at = state.index
            cute.copy(given.loads[0], g_a[None, i], s_a_part[None, at], tma_bar_ptr=full)
            b_at = (None, tile.column, i, tile.group)
            cute.copy(given.loads[1], g_b[b_at], s_b[None, at], tma_bar_ptr=full)
            cute.copy(given.loads[2], g_sfa[None, chunk_a, i], s_sfa[None, at], tma_bar_ptr=full)
            for j in cutlass.range_constexpr(form.scale_chunks):
                cute.copy(
                    given.loads[3], g_sfb[None, chunk_b + j, i, tile.group],
                    s_sfb[None, at * form.scale_chunks + j], tma_bar_ptr=full, mcast_mask=mask,
                )  # fmt: skip
            state.advance()
        number += step
        tile, seen = find(work, form, seen, number)
    ring.producer_tail(state)


def _partition(load, cta, ctas, s_tensor, g_tensor, modes: int):
    """Boxes in shared and in global memory: (box, ...), without what has stride 0, which no copy follows."""
    pair = cpasync.tma_partition(
        load, cta, ctas, cute.group_modes(s_tensor, 0, modes), cute.group_modes(g_tensor, 0, modes)
    )
    return cute.filter_zeros(pair[0]), cute.filter_zeros(pair[1])


@cute.jit
def multiply_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, mma: cute.TiledMma,
    s_tensors: list, t_sums: cute.Tensor, t_base: cute.Pointer, ring: pipeline.PipelineTmaUmma,
    results: pipeline.PipelineUmmaAsync, k: Int32,
):  # fmt: skip
    """Multiply every tile, in one accumulator and the other in turn.

    Args:
        t_sums: both accumulators (..., 2).
        t_base: where tensor memory begins.
    """
    s_a, s_b, s_sfa, s_sfb = s_tensors
    r_a, r_b = mma.make_fragment_A(s_a), mma.make_fragment_B(s_b)
    layouts = (
        blockscaled_layout.make_smem_layout_sfa(mma, form.tile, BLOCK, form.stages),
        blockscaled_layout.make_smem_layout_sfb(mma, form.tile, BLOCK, form.stages),
    )
    stage = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
    t_layouts = (
        blockscaled_layout.make_tmem_layout_sfa(mma, form.tile, BLOCK, stage[0]),
        blockscaled_layout.make_tmem_layout_sfb(mma, form.tile, BLOCK, stage[1]),
    )
    t_sfa = _scales(t_base, form.sfa_column, t_layouts[0])
    t_sfb = _scales(t_base, form.sfb_column, t_layouts[1])
    copy_a, from_a, to_a = _to_tensor_memory(form, cute.make_tensor(s_sfa.iterator, layouts[0]), t_sfa)
    copy_b, from_b, to_b = _to_tensor_memory(form, cute.make_tensor(s_sfb.iterator, layouts[1]), t_sfb)

    read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, form.stages)
    write = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1 if form.overlaps else 2)
    tile, seen = find(work, form, begin(work, form), first)
    number, turn, steps = first, Int32(0), cute.ceil_div(k, DEPTH)
    while tile.here:
        into = t_sums[None, None, None, turn]
        # A tile may begin in the middle of a chunk of scales: 64 of its rows are 2 columns.
        shift = tile.column * form.columns // 64 % 2 * 2
        t_sfb_tile = _scales(t_base, form.sfb_column + shift, t_layouts[1])
        results.producer_acquire(write)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for _ in cutlass.range(steps, unroll=1):
            ring.consumer_wait(read)
            slot = (None, None, None, None, read.index)
            cute.copy(copy_a, from_a[slot], to_a)
            cute.copy(copy_b, from_b[slot], to_b)
            for i in cutlass.range_constexpr(cute.size(r_a, mode=[2])):
                mma.set(tcgen05.Field.SFA, t_sfa[None, None, i].iterator)
                mma.set(tcgen05.Field.SFB, t_sfb_tile[None, None, i].iterator)
                at = (None, None, i, read.index)
                cute.gemm(mma, into, r_a[at], r_b[at], into)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            ring.consumer_release(read)
            read.advance()
        results.producer_commit(write)
        write.advance()
        turn = 1 - turn
        number += step
        tile, seen = find(work, form, seen, number)
    results.producer_tail(write)


def _scales(t_base: cute.Pointer, column, layout: cute.Layout) -> cute.Tensor:
    return cute.make_tensor(cute.recast_ptr(t_base + column, dtype=SCALE), layout)


def _to_tensor_memory(form: Form, s_scales: cute.Tensor, t_scales: cute.Tensor):
    """A `tcgen05.cp` of a stage's scales, with its sources (..., stages) and its target."""
    # That 16 values share a scale is a stride of 0 in these layouts, which a copy must not follow.
    s_scales, t_scales = cute.filter_zeros(s_scales), cute.filter_zeros(t_scales)
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(group_of(form)), SCALE)
    copy = tcgen05.make_s2t_copy(atom, t_scales)
    source = tcgen05.get_s2t_smem_desc_tensor(copy, copy.get_slice(0).partition_S(s_scales))
    return copy, source, copy.get_slice(0).partition_D(t_scales)
