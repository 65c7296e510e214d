"""A GEMM by pairs of CTAs that take over the tiles of clusters that have not begun, warps specialised."""

# No annotations from __future__: cute.struct reads them as types.
import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers

from .case import BLACKWELL, Case, gemm_buffers
from .tcgen05_gemm import store_tile

TILE = (256, 64, 64)
STAGES, ACCUMULATORS, PAIR = 3, 2, 2
MULTIPLIER, LOADER, SCHEDULER = 4, 5, 6
# Of everyone who reads an answer: the scheduler's warp, and six warps of each CTA.
READERS = 32 * (1 + 6 * PAIR)


@cute.struct
class _Storage:
    answer: cute.struct.Align[cute.struct.MemRange[cutlass.Int32, 4], 16]
    ring: cute.struct.MemRange[cutlass.Int64, 2 * STAGES]
    accumulators: cute.struct.MemRange[cutlass.Int64, 2 * ACCUMULATORS]
    schedule: cute.struct.MemRange[cutlass.Int64, 2]
    free: cutlass.Int64
    tensor_memory: cutlass.Int32


@cute.jit
def _next(schedule: pipeline.PipelineClcFetchAsync, state: pipeline.PipelineState, answer: cute.Pointer):
    """Row and column of the next tile, and whether there is one."""
    schedule.consumer_wait(state)
    x, n, _, valid = cute.arch.clc_response(answer)
    # The next answer is written through the async proxy.
    cute.arch.fence_proxy("async.shared", space="cta")
    schedule.consumer_release(state)
    state.advance()
    return x // PAIR, n, valid, state


@cute.kernel
def _gemm(
    mma: cute.TiledMma, load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor,
    c: cute.Tensor, layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout, cluster: cute.Layout,
    element: cutlass.Constexpr,
):  # fmt: skip
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    x, n, _ = cute.arch.block_idx()
    m, half, valid = x // PAIR, x % PAIR, cutlass.Int32(1)
    here = cluster.get_flat_coord(cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster()))
    smem = memory.SmemAllocator()
    storage = smem.allocate(_Storage)
    answer = storage.answer.data_ptr()
    sa = smem.allocate_tensor(element, layout_a.outer, 1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    one_thread = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    nbytes = cute.size_in_bytes(element, cute.select(layout_a, mode=[0, 1, 2]))
    nbytes += cute.size_in_bytes(element, cute.select(layout_b, mode=[0, 1, 2]))
    ring = pipeline.PipelineTmaUmma.create(
        num_stages=STAGES, producer_group=one_thread, consumer_group=one_thread, tx_count=nbytes * PAIR,
        barrier_storage=storage.ring.data_ptr(), cta_layout_vmnk=cluster,
    )  # fmt: skip
    results = pipeline.PipelineUmmaAsync.create(
        num_stages=ACCUMULATORS, producer_group=one_thread,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 128 * PAIR),
        barrier_storage=storage.accumulators.data_ptr(), cta_layout_vmnk=cluster,
    )  # fmt: skip
    schedule = pipeline.PipelineClcFetchAsync.create(
        num_stages=1, producer_group=one_thread,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, READERS), tx_count=16,
        barrier_storage=storage.schedule.data_ptr(), cta_layout_vmnk=cluster,
    )  # fmt: skip
    asked = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
    tmem = memory.TmemAllocator(
        storage.tensor_memory.ptr, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=224),
        is_two_cta=True, two_cta_tmem_dealloc_mbar_ptr=storage.free.ptr,
    )  # fmt: skip
    pool = tmem.reserve(128)
    shape = cute.append(mma.partition_shape_C((TILE[0], TILE[1])), ACCUMULATORS)
    sums = pool.allocate_tensor(mma.make_fragment_C(shape).layout, cutlass.Float32)
    part = mma.get_slice(half)
    ga = part.partition_A(cute.local_tile(a, (TILE[0], TILE[2]), (None, None)))
    gb = part.partition_B(cute.local_tile(b, (TILE[1], TILE[2]), (None, None)))
    gc = part.partition_C(cute.local_tile(c, (TILE[0], TILE[1]), (None, None)))
    places = part.partition_C(
        cute.local_tile(cute.make_identity_tensor(c.shape), (TILE[0], TILE[1]), (None, None))
    )
    steps = cute.size(ga, mode=[4])

    if warp == LOADER:
        smem_a, gmem_a = cpasync.tma_partition(
            load_a, here[2], cute.make_layout(1), cute.group_modes(sa, 0, 3), cute.group_modes(ga, 0, 3)
        )
        smem_b, gmem_b = cpasync.tma_partition(
            load_b, here[1], cute.make_layout(1), cute.group_modes(sb, 0, 3), cute.group_modes(gb, 0, 3)
        )
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STAGES)
        while valid != 0:
            for k in cutlass.range(steps, unroll=1):
                ring.producer_acquire(state)
                full = ring.producer_get_barrier(state)
                cute.copy(load_a, gmem_a[None, m, k], smem_a[None, state.index], tma_bar_ptr=full)
                cute.copy(load_b, gmem_b[None, n, k], smem_b[None, state.index], tma_bar_ptr=full)
                state.advance()
            m, n, valid, asked = _next(schedule, asked, answer)
        ring.producer_tail(state)

    elif warp == MULTIPLIER:
        ra, rb = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        write = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, ACCUMULATORS)
        while valid != 0:
            if half == 0:
                results.producer_acquire(write)
                mma.set(tcgen05.Field.ACCUMULATE, False)
                for _ in cutlass.range(steps, unroll=1):
                    ring.consumer_wait(read)
                    for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
                        operands = (None, None, k, read.index)
                        into = sums[None, None, None, write.index]
                        cute.gemm(mma, into, ra[operands], rb[operands], into)
                        mma.set(tcgen05.Field.ACCUMULATE, True)
                    ring.consumer_release(read)
                    read.advance()
                results.producer_commit(write)
                write.advance()
            m, n, valid, asked = _next(schedule, asked, answer)
        results.producer_tail(write)

    elif warp == SCHEDULER:
        if here[0] == 0:
            ask = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
            while valid != 0:
                schedule.producer_acquire(ask)
                with cute.arch.elect_one():
                    cute.arch.issue_clc_query(schedule.producer_get_barrier(ask), answer)
                ask.advance()
                m, n, valid, asked = _next(schedule, asked, answer)
            schedule.producer_tail(ask)

    else:
        done = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, ACCUMULATORS)
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition.x16)
        while valid != 0:
            results.consumer_wait(done)
            inner = ((None, None), 0, 0)
            store_tile(sums[(*inner, done.index)], c, gc[(*inner, m, n)], places[(*inner, m, n)], op)
            cute.arch.fence_view_async_tmem_load()
            results.consumer_release(done)
            done.advance()
            m, n, valid, asked = _next(schedule, asked, answer)
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(pool.base_ptr)


@cute.jit
def gemm(
    a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32
):
    """c (m, n) = a (m, k) @ b (n, k).T; k is whole 16 bytes."""
    element = a.dtype
    depth = cute.assume(k, 128 // element.width)
    ta = cute.make_tensor(a, cute.make_layout((m, depth), stride=(depth, 1)))
    tb = cute.make_tensor(b, cute.make_layout((n, depth), stride=(depth, 1)))
    tc = cute.make_tensor(c, cute.make_layout((m, n), stride=(n, 1)))
    mma = blackwell_helpers.make_trivial_tiled_mma(
        element, element, OperandMajorMode.K, OperandMajorMode.K, cutlass.Float32, tcgen05.CtaGroup.TWO,
        (TILE[0], TILE[1]),
    )  # fmt: skip
    layout_a = blackwell_helpers.make_smem_layout_a(mma, TILE, element, STAGES)
    layout_b = blackwell_helpers.make_smem_layout_b(mma, TILE, element, STAGES)
    vmnk = cute.tiled_divide(cute.make_layout((PAIR, 1, 1)), (mma.thr_id.shape,))
    op = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.TWO)
    one_a, one_b = cute.select(layout_a, mode=[0, 1, 2]), cute.select(layout_b, mode=[0, 1, 2])
    load_a = cute.nvgpu.make_tiled_tma_atom_A(op, ta, one_a, TILE, mma, vmnk.shape)
    load_b = cute.nvgpu.make_tiled_tma_atom_B(op, tb, one_b, TILE, mma, vmnk.shape)
    grid = (PAIR * cute.ceil_div(m, TILE[0]), cute.ceil_div(n, TILE[1]), 1)
    _gemm(
        mma, load_a.atom, load_a.tma_tensor, load_b.atom, load_b.tma_tensor, tc, layout_a, layout_b, vmnk,
        element,
    ).launch(grid=grid, block=(224, 1, 1), cluster=(PAIR, 1, 1))  # fmt: skip


def case(dtype: torch.dtype, target: torch.dtype, shape: tuple[int, int, int], exact: bool) -> Case:
    """shape (M, N, K)."""
    buffers = gemm_buffers(*shape, dtype, target, exact, align=128)
    sizes = tuple(cutlass.Int32(size) for size in shape)
    return Case(gemm, (*buffers, *sizes), architectures=(BLACKWELL,))
