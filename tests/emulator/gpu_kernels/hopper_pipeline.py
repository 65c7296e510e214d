"""A persistent GEMM for Hopper: a warp loads through a ring, two warpgroups multiply, TMA stores."""

# No annotations from __future__: cute.struct reads them as types.
import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from .case import HOPPER, Case, gemm_buffers

TILE = (128, 64, 64)
STAGES, STORES = 3, 2
SLICE = 32
CONSUMERS = 2


@cute.struct
class _Barriers:
    ring: cute.struct.MemRange[cutlass.Int64, 2 * STAGES]


@cute.kernel
def _gemm(
    mma: cute.TiledMma, load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor,
    store: cute.CopyAtom, c: cute.Tensor, layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout,
    layout_c: cute.ComposedLayout, element: cutlass.Constexpr, target: cutlass.Constexpr,
    tiles: cute.Shape, mutation: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    role = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    smem = memory.SmemAllocator()
    storage = smem.allocate(_Barriers)
    sa = smem.allocate_tensor(element, layout_a.outer, 1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    sc = smem.allocate_tensor(target, layout_c.outer, 1024, swizzle=layout_c.inner)
    ring = pipeline.PipelineTmaAsync.create(
        num_stages=STAGES, producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * CONSUMERS),
        tx_count=(TILE[0] + TILE[1]) * TILE[2] * element.width // 8, barrier_storage=storage.ring.data_ptr(),
    )  # fmt: skip
    ga = cute.local_tile(a, (TILE[0], TILE[2]), (None, None))
    gb = cute.local_tile(b, (TILE[1], TILE[2]), (None, None))
    gc = cute.local_tile(c, (TILE[0], SLICE), (None, None))
    one = cute.make_layout(1)
    smem_a, gmem_a = cpasync.tma_partition(
        load_a, 0, one, cute.group_modes(sa, 0, 2), cute.group_modes(ga, 0, 2)
    )
    smem_b, gmem_b = cpasync.tma_partition(
        load_b, 0, one, cute.group_modes(sb, 0, 2), cute.group_modes(gb, 0, 2)
    )
    smem_c, gmem_c = cpasync.tma_partition(
        store, 0, one, cute.group_modes(sc, 0, 2), cute.group_modes(gc, 0, 2)
    )
    depth = cute.size(ga, mode=[3])
    count = tiles[0] * tiles[1]
    if role >= 4 * CONSUMERS:
        cute.arch.setmaxregister_decrease(40)
        if role == 4 * CONSUMERS:
            cpasync.prefetch_descriptor(load_a)
            cpasync.prefetch_descriptor(load_b)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STAGES)
            for tile in cutlass.range(block, count, grid, unroll=1):
                m, n = tile % tiles[0], tile // tiles[0]
                for step in cutlass.range(depth, unroll=1):
                    ring.producer_acquire(state)
                    full = ring.producer_get_barrier(state)
                    cute.copy(load_a, gmem_a[None, m, step], smem_a[None, state.index], tma_bar_ptr=full)
                    cute.copy(load_b, gmem_b[None, n, step], smem_b[None, state.index], tma_bar_ptr=full)
                    ring.producer_commit(state)
                    state.advance()
            ring.producer_tail(state)
    else:
        cute.arch.setmaxregister_increase(232)
        mine = mma.get_slice(thread)
        ra = mma.make_fragment_A(mine.partition_A(sa))
        rb = mma.make_fragment_B(mine.partition_B(sb))
        acc = cute.make_rmem_tensor(mma.partition_shape_C(TILE[:2]), cutlass.Float32)
        together = pipeline.NamedBarrier(barrier_id=1, num_threads=128 * CONSUMERS)
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        done = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), target)
        writer = cute.make_tiled_copy_S(atom, cute.make_tiled_copy_C_atom(atom, mma))
        part_c = writer.get_slice(thread).partition_D(sc)
        sums = writer.retile(acc)
        out = cute.make_rmem_tensor(part_c[None, None, None, 0].shape, target)
        for tile in cutlass.range(block, count, grid, unroll=1):
            m, n = tile % tiles[0], tile // tiles[0]
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for step in cutlass.range(depth, unroll=1):
                ring.consumer_wait(read)
                warpgroup.fence()
                for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
                    here = (None, None, k, read.index)
                    cute.gemm(mma, acc, ra[here], rb[here], acc)
                    mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                read.advance()
                # One group stays in flight; the one before has read its stage.
                warpgroup.wait_group(1)
                if step > 0:
                    ring.consumer_release(done)
                    done.advance()
            warpgroup.wait_group(0)
            if cutlass.const_expr(mutation != "arrive"):
                ring.consumer_release(done)
            done.advance()
            for slice in cutlass.range_constexpr(TILE[1] // SLICE):
                buffer = slice % STORES
                for i in cutlass.range_constexpr(cute.size(out)):
                    out[i] = sums[slice * cute.size(out) + i].to(target)
                cute.copy(writer, out, part_c[None, None, None, buffer])
                if cutlass.const_expr(mutation != "fence"):
                    cute.arch.fence_view_async_shared()
                together.arrive_and_wait()
                if role == 0:
                    cute.copy(store, smem_c[None, buffer], gmem_c[None, m, n * (TILE[1] // SLICE) + slice])
                    cute.arch.cp_async_bulk_commit_group()
                    cute.arch.cp_async_bulk_wait_group(STORES - 1, read=True)
                together.arrive_and_wait()
        if role == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def gemm(
    a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32,
    blocks: cutlass.Constexpr, mutation: cutlass.Constexpr = None,
):  # fmt: skip
    """c (m, n) = a (m, k) @ b (n, k).T by `blocks` CTAs; k and n are whole 16 bytes."""
    element, target = a.dtype, c.dtype
    depth = cute.assume(k, 128 // element.width)
    width = cute.assume(n, 128 // target.width)
    ta = cute.make_tensor(a, cute.make_layout((m, depth), stride=(depth, 1)))
    tb = cute.make_tensor(b, cute.make_layout((n, depth), stride=(depth, 1)))
    tc = cute.make_tensor(c, cute.make_layout((m, width), stride=(width, 1)))
    mma = hopper_helpers.make_trivial_tiled_mma(
        element, element, OperandMajorMode.K, OperandMajorMode.K, cutlass.Float32, (CONSUMERS, 1, 1),
        (64, TILE[1]),
    )  # fmt: skip
    layout_a = hopper_helpers.make_smem_layout_a(LayoutEnum.ROW_MAJOR, TILE, element, STAGES)
    layout_b = hopper_helpers.make_smem_layout_b(LayoutEnum.ROW_MAJOR, TILE, element, STAGES)
    layout_c = hopper_helpers.make_smem_layout_epi(target, LayoutEnum.ROW_MAJOR, (TILE[0], SLICE), STORES)
    op = cpasync.CopyBulkTensorTileG2SOp()
    load_a = cpasync.make_tiled_tma_atom(op, ta, cute.select(layout_a, mode=[0, 1]), (TILE[0], TILE[2]))
    load_b = cpasync.make_tiled_tma_atom(op, tb, cute.select(layout_b, mode=[0, 1]), (TILE[1], TILE[2]))
    store = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), tc, cute.select(layout_c, mode=[0, 1]), (TILE[0], SLICE)
    )
    tiles = (cute.ceil_div(m, TILE[0]), cute.ceil_div(n, TILE[1]))
    _gemm(
        mma, load_a.atom, load_a.tma_tensor, load_b.atom, load_b.tma_tensor, store.atom, store.tma_tensor,
        layout_a, layout_b, layout_c, element, target, tiles, mutation,
    ).launch(grid=(blocks, 1, 1), block=(128 * (CONSUMERS + 1), 1, 1))  # fmt: skip


def case(
    dtype: torch.dtype, target: torch.dtype, shape: tuple[int, int, int], exact: bool, blocks: int = 2,
    mutation: str | None = None,
) -> Case:  # fmt: skip
    """shape (M, N, K)."""
    buffers = gemm_buffers(*shape, dtype, target, exact, align=128)
    sizes = tuple(cutlass.Int32(size) for size in shape)
    return Case(gemm, (*buffers, *sizes), {"blocks": blocks, "mutation": mutation}, (HOPPER,))
