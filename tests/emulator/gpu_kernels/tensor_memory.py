"""Tensor memory: written in one shape and read in another, and as the A operand of a product."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers

from .case import BLACKWELL, Case, gemm_buffers, output

THREADS, ROWS, COLUMNS, DEPTH = 128, 128, 32, 64
STORES = {
    "32x32b": tcgen05.St32x32bOp, "16x64b": tcgen05.St16x64bOp, "16x128b": tcgen05.St16x128bOp,
    "16x256b": tcgen05.St16x256bOp,
}  # fmt: skip
LOADS = {
    "32x32b": tcgen05.Ld32x32bOp, "16x64b": tcgen05.Ld16x64bOp, "16x128b": tcgen05.Ld16x128bOp,
    "16x256b": tcgen05.Ld16x256bOp,
}  # fmt: skip


@cute.jit
def _allocator(columns: cutlass.Constexpr):
    """A pool of tensor memory, which all warps of the CTA ask for."""
    cell = memory.SmemAllocator().allocate_array(cutlass.Int32, 1)
    tmem = memory.TmemAllocator(
        cell, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS)
    )
    pool = tmem.reserve(columns)
    return tmem, pool


@cute.kernel
def _rewrite(mma: cute.TiledMma, y: cute.Tensor, store: cutlass.Constexpr, load: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    tmem, pool = _allocator(COLUMNS)
    shape = mma.partition_shape_C((ROWS, COLUMNS))
    cells = pool.allocate_tensor(mma.make_fragment_C(shape).layout, cutlass.Float32)[((None, None), 0, 0)]
    places = cute.make_identity_tensor((ROWS, COLUMNS))
    into = tcgen05.make_tmem_copy(cute.make_copy_atom(store, cutlass.Float32), cells)
    mine = into.get_slice(thread)
    where = mine.partition_S(places)
    values = cute.make_rmem_tensor(where.shape, cutlass.Float32)
    for i in cutlass.range_constexpr(cute.size(values)):
        values[i] = cutlass.Float32(1000 * where[i][0] + where[i][1])
    cute.copy(into, values, mine.partition_D(cells))
    cute.arch.fence_view_async_tmem_store()
    cute.arch.sync_threads()
    out_of = tcgen05.make_tmem_copy(cute.make_copy_atom(load, cutlass.Float32), cells)
    mine = out_of.get_slice(thread)
    where = mine.partition_D(places)
    values = cute.make_rmem_tensor(where.shape, cutlass.Float32)
    cute.copy(out_of, mine.partition_S(cells), values)
    cute.arch.fence_view_async_tmem_load()
    for i in cutlass.range_constexpr(cute.size(values)):
        y[where[i]] = values[i]
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(pool.base_ptr)


@cute.jit
def rewrite(y: cute.Tensor, store: cutlass.Constexpr, load: cutlass.Constexpr):
    """y (128, 32) = 1000 * row + column, by way of tensor memory."""
    mma = blackwell_helpers.make_trivial_tiled_mma(
        cutlass.BFloat16, cutlass.BFloat16, OperandMajorMode.K, OperandMajorMode.K, cutlass.Float32,
        tcgen05.CtaGroup.ONE, (ROWS, COLUMNS),
    )  # fmt: skip
    _rewrite(mma, y, store, load).launch(grid=(1, 1, 1), block=(THREADS, 1, 1))


def case(store: str, load: str) -> Case:
    """store, load: shapes of tcgen05.st and tcgen05.ld."""
    # Bits of a row of tensor memory that one repetition covers, of 32 per column.
    bits = {"32x32b": 32, "16x64b": 64, "16x128b": 128, "16x256b": 256}
    repeat = [tcgen05.Repetition(32 * COLUMNS // bits[name]) for name in (store, load)]
    expected = (1000 * torch.arange(ROWS)[:, None] + torch.arange(COLUMNS)).float()
    options = {"store": STORES[store](repeat[0]), "load": LOADS[load](repeat[1])}
    return Case(rewrite, (output(expected, passed="tensor", align=4),), options, (BLACKWELL,))


@cute.kernel
def _gemm(
    mma: cute.TiledMma, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor, c: cute.Tensor,
    layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout, columns: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    element = a.element_type
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 2)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    if thread == 0:
        for i in cutlass.range_constexpr(2):
            cute.arch.mbarrier_init(barrier + i, 1)
        cute.arch.mbarrier_init_fence()
    tmem, pool = _allocator(256)
    part = mma.get_slice(0)
    sums = pool.allocate_tensor(
        mma.make_fragment_C(mma.partition_shape_C((ROWS, columns))).layout, cutlass.Float32
    )
    # Two elements of A in each 32-bit cell, a row of A in each lane.
    cells = cute.make_tensor(
        pool.allocate(DEPTH // 2, cutlass.Float32), cute.make_layout((ROWS, DEPTH // 2), stride=(65536, 1))
    )
    pointer = cute.recast_ptr(cells.iterator, dtype=element)
    # A fragment begins at column 0, wherever the tensor that it is made of lies.
    fragment = mma.make_fragment_A(cute.make_tensor(pointer, layout_a.outer))
    ra, rb = cute.make_tensor(pointer, fragment.layout), mma.make_fragment_B(sb)
    if warp == 0:
        one = cute.make_layout(1)
        gb = part.partition_B(cute.local_tile(b, (columns, DEPTH), (0, 0)))
        smem_b, gmem_b = cpasync.tma_partition(
            load_b, 0, one, cute.group_modes(sb, 0, 3), cute.group_modes(gb, 0, 3)
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, columns * DEPTH * element.width // 8)
        cute.copy(load_b, gmem_b, smem_b[None, 0], tma_bar_ptr=barrier)
    into = tcgen05.make_tmem_copy(
        cute.make_copy_atom(tcgen05.St32x32bOp(tcgen05.Repetition(DEPTH // 2)), cutlass.Float32), cells
    )
    mine = into.get_slice(thread)
    row = cute.make_rmem_tensor(mine.partition_S(cells).shape, cutlass.Float32)
    pairs = cute.recast_tensor(row, element)
    for i in cutlass.range_constexpr(DEPTH):
        pairs[i] = a[thread, i]
    cute.copy(into, row, mine.partition_D(cells))
    cute.arch.fence_view_async_tmem_store()
    cute.arch.sync_threads()
    if warp == 0:
        cute.arch.mbarrier_wait(barrier, 0)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
            cute.gemm(mma, sums, ra[None, None, k, 0], rb[None, None, k, 0], sums)
            mma.set(tcgen05.Field.ACCUMULATE, True)
        with cute.arch.elect_one():
            tcgen05.commit(barrier + 1)
    cute.arch.mbarrier_wait(barrier + 1, 0)
    inner = sums[((None, None), 0, 0)]
    out_of = tcgen05.make_tmem_copy(
        cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(columns)), cutlass.Float32), inner
    )
    mine = out_of.get_slice(thread)
    where = mine.partition_D(cute.make_identity_tensor((ROWS, columns)))
    values = cute.make_rmem_tensor(where.shape, cutlass.Float32)
    cute.copy(out_of, mine.partition_S(inner), values)
    for i in cutlass.range_constexpr(cute.size(values)):
        c[where[i]] = values[i].to(c.element_type)
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(pool.base_ptr)


@cute.jit
def gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """c (128, n) = a (128, 64) @ b (n, 64).T, a by way of registers and tensor memory."""
    element, columns = a.element_type, c.shape[1]
    mma = blackwell_helpers.make_trivial_tiled_mma(
        element, element, OperandMajorMode.K, OperandMajorMode.K, cutlass.Float32, tcgen05.CtaGroup.ONE,
        (ROWS, columns), tcgen05.OperandSource.TMEM,
    )  # fmt: skip
    tile = (ROWS, columns, DEPTH)
    layout_a = blackwell_helpers.make_smem_layout_a(mma, tile, element, 1)
    layout_b = blackwell_helpers.make_smem_layout_b(mma, tile, element, 1)
    load_b = cute.nvgpu.make_tiled_tma_atom_B(
        cpasync.CopyBulkTensorTileG2SOp(), b, cute.select(layout_b, mode=[0, 1, 2]), tile, mma
    )
    _gemm(mma, a, load_b.atom, load_b.tma_tensor, c, layout_a, layout_b, columns).launch(
        grid=(1, 1, 1), block=(THREADS, 1, 1)
    )


def gemm_case(dtype: torch.dtype, columns: int, exact: bool) -> Case:
    """A product of shape (128, columns, 64)."""
    buffers = gemm_buffers(ROWS, columns, DEPTH, dtype, torch.float32, exact, passed="tensor", align=128)
    return Case(gemm, buffers, architectures=(BLACKWELL,))
