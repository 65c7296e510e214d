"""A persistent GEMM of block-scaled operands for Blackwell, NVFP4, MXFP4 or MXFP8.

A warp loads with TMA through a ring of stages, one copies the scales to tensor memory and multiplies, four
empty the accumulators, of which there may be two so that the next tile is multiplied meanwhile.
"""

# No annotations from __future__: cute.struct reads them as types.
import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers, blockscaled_layout

from .case import BLACKWELL, Buffer, Case, gemm_output, integers
from .scales import decode_e2m1, random_e2m1, swizzle

STORES, SLICE = 2, 32
MULTIPLIER, LOADER = 4, 5


@cute.jit
def scales_to_tensor_memory(group: cutlass.Constexpr, source: cute.Tensor, target: cute.Tensor):
    """A copy for `tcgen05.cp` of scales, with what it reads (..., stages) and writes."""
    source, target = cute.filter_zeros(source), cute.filter_zeros(target)
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(group), source.element_type)
    copy = tcgen05.make_s2t_copy(atom, target)
    mine = copy.get_slice(0)
    descriptors = tcgen05.get_s2t_smem_desc_tensor(copy, mine.partition_S(source))
    return copy, descriptors, mine.partition_D(target)


@cute.kernel
def _gemm(
    mma: cute.TiledMma, mma_sfb: cute.TiledMma, loads: list, sources: list, layouts: list,
    store: cute.CopyAtom, c: cute.Tensor, layout_c: cute.ComposedLayout, cluster: cute.Layout,
    cluster_sfb: cute.Layout, tiles: cute.Shape, tile: cutlass.Constexpr, vector: cutlass.Constexpr,
    elements: cutlass.Constexpr, accumulators: cutlass.Constexpr, stages: cutlass.Constexpr,
    mutation: cutlass.Constexpr,
):  # fmt: skip
    element, scale, target = elements
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    pair = cute.size(cluster, mode=[0])
    first, step, half = block // pair, blocks // pair, block % pair
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    here, here_sfb = cluster.get_flat_coord(rank), cluster_sfb.get_flat_coord(rank)
    layout_a, layout_b, layout_sfa, layout_sfb = layouts
    group = tcgen05.CtaGroup.TWO if pair == 2 else tcgen05.CtaGroup.ONE

    smem = memory.SmemAllocator()
    ring_barriers = smem.allocate_array(cutlass.Int64, 2 * stages)
    accumulator_barriers = smem.allocate_array(cutlass.Int64, 2 * accumulators)
    free_barrier = smem.allocate_array(cutlass.Int64, 1)
    tensor_memory = smem.allocate_array(cutlass.Int32, 1)
    sa = smem.allocate_tensor(element, layout_a.outer, 1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    sc = smem.allocate_tensor(target, layout_c.outer, 1024, swizzle=layout_c.inner)
    ssfa = smem.allocate_tensor(scale, layout_sfa, 128)
    ssfb = smem.allocate_tensor(scale, layout_sfb, 128)

    one_thread = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    nbytes = cute.size_in_bytes(element, cute.select(layout_a, mode=[0, 1, 2]))
    nbytes += cute.size_in_bytes(element, cute.select(layout_b, mode=[0, 1, 2]))
    nbytes += cute.size_in_bytes(scale, cute.slice_(layout_sfa, (None, None, None, 0)))
    nbytes += cute.size_in_bytes(scale, cute.slice_(layout_sfb, (None, None, None, 0)))
    ring = pipeline.PipelineTmaUmma.create(
        num_stages=stages, producer_group=one_thread, consumer_group=one_thread, tx_count=nbytes * pair,
        barrier_storage=ring_barriers, cta_layout_vmnk=cluster,
    )  # fmt: skip
    results = pipeline.PipelineUmmaAsync.create(
        num_stages=accumulators, producer_group=one_thread,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * pair),
        barrier_storage=accumulator_barriers, cta_layout_vmnk=cluster,
    )  # fmt: skip
    tmem = memory.TmemAllocator(
        tensor_memory, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=192),
        is_two_cta=pair == 2, two_cta_tmem_dealloc_mbar_ptr=free_barrier,
    )  # fmt: skip
    pool = tmem.reserve(512)
    shape = cute.append(mma.partition_shape_C((tile[0], tile[1])), accumulators)
    sums = pool.allocate_tensor(mma.make_fragment_C(shape).layout, cutlass.Float32)
    one_stage = cute.slice_(layout_sfa, (None, None, None, 0))
    tsfa = pool.allocate_tensor(blockscaled_layout.make_tmem_layout_sfa(mma, tile, vector, one_stage), scale)
    one_stage = cute.slice_(layout_sfb, (None, None, None, 0))
    tsfb = pool.allocate_tensor(blockscaled_layout.make_tmem_layout_sfb(mma, tile, vector, one_stage), scale)

    part, part_sfb = mma.get_slice(half), mma_sfb.get_slice(0)
    a, b, sfa, sfb = sources
    ga = part.partition_A(cute.local_tile(a, (tile[0], tile[2]), (None, None)))
    gb = part.partition_B(cute.local_tile(b, (tile[1], tile[2]), (None, None)))
    gsfa = part.partition_A(cute.local_tile(sfa, (tile[0], tile[2]), (None, None, 0)))
    gsfb = part_sfb.partition_B(cute.local_tile(sfb, (tile[1], tile[2]), (None, None, 0)))
    gc = part.partition_C(cute.local_tile(c, (tile[0], tile[1]), (None, None)))
    steps = cute.size(ga, mode=[4])

    if warp == LOADER:
        smems, gmems, masks = [], [], []
        for i, (s, g, where, ctas, mode) in enumerate((
            (sa, ga, here, cluster, 2), (sb, gb, here, cluster, 1),
            (ssfa, gsfa, here, cluster, 2), (ssfb, gsfb, here_sfb, cluster_sfb, 1),
        )):  # fmt: skip
            s, g = cpasync.tma_partition(
                loads[i], where[mode], cute.make_layout(cute.size(ctas, mode=[mode])),
                cute.group_modes(s, 0, 3), cute.group_modes(g, 0, 3),
            )  # fmt: skip
            smems.append(cute.filter_zeros(s))
            gmems.append(cute.filter_zeros(g))
            mask = None
            if cutlass.const_expr(pair == 2):
                mask = cpasync.create_tma_multicast_mask(ctas, where, mcast_mode=mode)
            masks.append(mask)
        for load in loads:
            cpasync.prefetch_descriptor(load)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)
        for at in cutlass.range(first, tiles[0] * tiles[1], step, unroll=1):
            m, n = at % tiles[0], at // tiles[0]
            for k in cutlass.range(steps, unroll=1):
                ring.producer_acquire(state)
                full = ring.producer_get_barrier(state)
                for i in cutlass.range_constexpr(4):
                    place = (None, m if i % 2 == 0 else n, k)
                    cute.copy(
                        loads[i], gmems[i][place], smems[i][None, state.index], tma_bar_ptr=full,
                        mcast_mask=masks[i],
                    )  # fmt: skip
                state.advance()
        ring.producer_tail(state)

    elif warp == MULTIPLIER:
        ra, rb = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
        copy_a, from_a, to_a = scales_to_tensor_memory(group, ssfa, tsfa)
        copy_b, from_b, to_b = scales_to_tensor_memory(group, ssfb, tsfb)
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)
        write = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, accumulators)
        if half == 0:
            for _ in cutlass.range(first, tiles[0] * tiles[1], step, unroll=1):
                results.producer_acquire(write)
                mma.set(tcgen05.Field.ACCUMULATE, False)
                for _ in cutlass.range(steps, unroll=1):
                    ring.consumer_wait(read)
                    slot = (None, None, None, None, read.index)
                    if cutlass.const_expr(mutation != "no scales"):
                        cute.copy(copy_a, from_a[slot], to_a)
                    cute.copy(copy_b, from_b[slot], to_b)
                    for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
                        block_a = (None, None, 0 if mutation == "first scales" else k)
                        mma.set(tcgen05.Field.SFA, tsfa[block_a].iterator)
                        mma.set(tcgen05.Field.SFB, tsfb[None, None, k].iterator)
                        operands = (None, None, k, read.index)
                        into = sums[None, None, None, write.index]
                        cute.gemm(mma, into, ra[operands], rb[operands], into)
                        mma.set(tcgen05.Field.ACCUMULATE, True)
                    ring.consumer_release(read)
                    read.advance()
                results.producer_commit(write)
                write.advance()
            results.producer_tail(write)

    else:
        together = pipeline.NamedBarrier(barrier_id=2, num_threads=128)
        done = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, accumulators)
        rows = cute.size(sc, mode=[0])
        slices = cute.flat_divide(sums[((None, None), 0, 0, None)], (rows, SLICE))[None, None, 0, None, None]
        # No fp32 vector wider than the slice, and one shape for all of them.
        load = tcgen05.make_tmem_copy(
            cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x32), cutlass.Float32),
            slices[None, None, 0, 0],
        )
        source = load.get_slice(thread).partition_S(slices)
        write = cute.make_tiled_copy_D(
            blackwell_helpers.get_smem_store_op(LayoutEnum.ROW_MAJOR, target, cutlass.Float32, load), load
        )
        part_c = write.get_slice(thread).partition_D(sc)
        registers = cute.make_rmem_tensor(
            load.get_slice(thread).partition_D(sc[None, None, 0]).shape, cutlass.Float32
        )
        out = cute.make_rmem_tensor(write.retile(registers).shape, target)
        boxes = cute.flat_divide(gc[((None, None), 0, 0, None, None)], (rows, SLICE))[
            None, None, 0, None, None, None
        ]
        smem_c, gmem_c = cpasync.tma_partition(
            store, 0, cute.make_layout(1), cute.group_modes(sc, 0, 2), cute.group_modes(boxes, 0, 2)
        )
        for at in cutlass.range(first, tiles[0] * tiles[1], step, unroll=1):
            m, n = at % tiles[0], at // tiles[0]
            results.consumer_wait(done)
            for i in cutlass.range(tile[1] // SLICE, unroll=1):
                cute.copy(load, source[None, None, None, i, done.index], registers)
                out.store(write.retile(registers).load().to(target))
                cute.copy(write, out, part_c[None, None, None, i % STORES])
                if cutlass.const_expr(mutation != "fence"):
                    cute.arch.fence_view_async_shared()
                together.arrive_and_wait()
                if warp == 0:
                    cute.copy(store, smem_c[None, i % STORES], gmem_c[None, i, m, n])
                    cute.arch.cp_async_bulk_commit_group()
                    cute.arch.cp_async_bulk_wait_group(STORES - 1, read=True)
                together.arrive_and_wait()
            # What has been asked of tensor memory is there before it is given back.
            cute.arch.fence_view_async_tmem_load()
            with cute.arch.elect_one():
                results.consumer_release(done)
            done.advance()
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(pool.base_ptr)


@cute.jit
def gemm(
    a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer, c: cute.Pointer, m: cutlass.Int32,
    n: cutlass.Int32, k: cutlass.Int32, tile: cutlass.Constexpr, vector: cutlass.Constexpr,
    clusters: cutlass.Constexpr, two: cutlass.Constexpr, stages: cutlass.Constexpr,
    mutation: cutlass.Constexpr = None,
):  # fmt: skip
    """c (m, n) = (a * sfa) (m, k) @ (b * sfb) (n, k).T, a scale for each `vector` elements of K.

    Scales are in blocks of 128 rows by 4, rows and columns filled up to those. Rows of a, b and c are whole
    16 bytes.
    """
    element, scale, target = a.dtype, sfa.dtype, c.dtype
    depth, width = cute.assume(k, 128 // element.width), cute.assume(n, 128 // target.width)
    ta = cute.make_tensor(a, cute.make_layout((m, depth), stride=(depth, 1)))
    tb = cute.make_tensor(b, cute.make_layout((n, depth), stride=(depth, 1)))
    tc = cute.make_tensor(c, cute.make_layout((m, width), stride=(width, 1)))
    tsfa = cute.make_tensor(sfa, blockscaled_layout.tile_atom_to_shape_SF((m, k, 1), vector))
    tsfb = cute.make_tensor(sfb, blockscaled_layout.tile_atom_to_shape_SF((n, k, 1), vector))
    if cutlass.const_expr(mutation == "scale layout"):
        # Blocks of scales column by column instead of row by row.
        chunk = blockscaled_layout.BlockScaledBasicChunk(vector).layout
        tsfa = cute.make_tensor(sfa, cute.tile_to_shape(chunk, (m, k, 1), (1, 2, 3)))
    pair = 2 if two else 1
    mmas = []
    for shape, group in (
        ((tile[0], tile[1]), tcgen05.CtaGroup.TWO if two else tcgen05.CtaGroup.ONE),
        ((tile[0] // pair, tile[1]), tcgen05.CtaGroup.ONE),
    ):
        mmas.append(
            blackwell_helpers.make_blockscaled_trivial_tiled_mma(
                element, b.dtype, OperandMajorMode.K, OperandMajorMode.K, scale, vector, group, shape
            )
        )
    mma, mma_sfb = mmas
    tile_sfb = (tile[0] // pair, tile[1], tile[2])
    cluster_shape = (pair, 1, 1)
    cluster = cute.tiled_divide(cute.make_layout(cluster_shape), (mma.thr_id.shape,))
    cluster_sfb = cute.tiled_divide(cute.make_layout(cluster_shape), (mma_sfb.thr_id.shape,))
    layouts = [
        blackwell_helpers.make_smem_layout_a(mma, tile, element, stages),
        blackwell_helpers.make_smem_layout_b(mma, tile, element, stages),
        blockscaled_layout.make_smem_layout_sfa(mma, tile, vector, stages),
        blockscaled_layout.make_smem_layout_sfb(mma, tile, vector, stages),
    ]
    one_stage = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
    op_a = blackwell_helpers.cluster_shape_to_tma_atom_A(cluster_shape[:2], mma.thr_id)
    op_b = blackwell_helpers.cluster_shape_to_tma_atom_B(cluster_shape[:2], mma.thr_id)
    op_sfb = blackwell_helpers.cluster_shape_to_tma_atom_SFB(cluster_shape[:2], mma.thr_id)
    # Scales travel as 16-bit words: the box of a byte would be too wide.
    words = cutlass.Int16
    infos = [
        cute.nvgpu.make_tiled_tma_atom_A(op_a, ta, one_stage[0], tile, mma, cluster.shape),
        cute.nvgpu.make_tiled_tma_atom_B(op_b, tb, one_stage[1], tile, mma, cluster.shape),
        cute.nvgpu.make_tiled_tma_atom_A(
            op_a, tsfa, one_stage[2], tile, mma, cluster.shape, internal_type=words
        ),
        cute.nvgpu.make_tiled_tma_atom_B(
            op_sfb, tsfb, one_stage[3], tile_sfb, mma_sfb, cluster_sfb.shape, internal_type=words
        ),
    ]
    box = (tile[0] // pair, SLICE)
    layout_c = blackwell_helpers.make_smem_layout_epi(target, LayoutEnum.ROW_MAJOR, box, STORES)
    store = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), tc, cute.select(layout_c, mode=[0, 1]), box
    )
    tiles = (cute.ceil_div(m, tile[0]), cute.ceil_div(n, tile[1]))
    accumulators = 2 if tile[1] <= 128 else 1
    if cutlass.const_expr(clusters is None):
        clusters = tiles[0] * tiles[1]
    _gemm(
        mma, mma_sfb, [info.atom for info in infos], [info.tma_tensor for info in infos], layouts, store.atom,
        store.tma_tensor, layout_c, cluster, cluster_sfb, tiles, tile, vector, (element, scale, target),
        accumulators, stages, mutation,
    ).launch(grid=(pair * clusters, 1, 1), block=(192, 1, 1), cluster=cluster_shape)  # fmt: skip


def case(
    kind: str, target: torch.dtype, shape: tuple[int, int, int], exact: bool,
    tile: tuple[int, int, int] = (128, 128, 256), clusters: int | None = None, two: bool = False,
    stages: int = 3, mutation: str | None = None,
) -> Case:  # fmt: skip
    """A product of shape (M, N, K).

    Args:
        kind: "nvfp4", "mxfp4" or "mxfp8".
        exact: operands and scales are such that no sum is rounded.
        tile: of the one or two CTAs of an MMA; K 256 of 4-bit and 128 of 8-bit operands.
        clusters: that share the tiles; None: as many as there are tiles.
    """
    m, n, k = shape
    vector = 16 if kind == "nvfp4" else 32
    operands = []
    for rows, seed in ((m, 0), (n, 1)):
        if kind == "mxfp8":
            data = integers((rows, k), -3, 4, torch.float32, seed).to(torch.float8_e4m3fn)
            values = data.double()
        else:
            data = random_e2m1((rows, k), seed)
            values = decode_e2m1(data)
        if kind == "nvfp4":
            scales = 2.0 ** integers((rows, k // vector), -1, 2, torch.float32, seed + 2) if exact else None
            if scales is None:
                scales = integers((rows, k // vector), 1, 120, torch.float32, seed + 2) / 16
            scales = scales.to(torch.float8_e4m3fn)
        else:
            powers = integers((rows, k // vector), -1, 2, torch.float32, seed + 2) * (1 if exact else 5)
            scales = (2.0**powers).to(torch.float8_e8m0fnu)
        operands.append((data, swizzle(scales), values * scales.double().repeat_interleave(vector, 1)))
    (a, sfa, exact_a), (b, sfb, exact_b) = operands
    c = gemm_output(exact_a, exact_b, target, exact, align=128)
    buffers = [Buffer(t, align=128) for t in (a, b, sfa, sfb)]
    options = {
        "tile": tile, "vector": vector, "clusters": clusters, "two": two, "stages": stages,
        "mutation": mutation,
    }  # fmt: skip
    sizes = tuple(cutlass.Int32(size) for size in shape)
    return Case(gemm, (*buffers, c, *sizes), options, (BLACKWELL,))
