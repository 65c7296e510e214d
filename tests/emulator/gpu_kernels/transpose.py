"""A transpose: TMA loads a tile into swizzled shared memory, threads turn it, TMA stores it."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import cpasync

from .case import Buffer, Case, integers, output

THREADS = 128


@cute.kernel
def _transpose(
    load: cute.CopyAtom, source: cute.Tensor, store: cute.CopyAtom, target: cute.Tensor,
    layout: cute.ComposedLayout, element: cutlass.Constexpr, mutation: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    row, column, batch = cute.arch.block_idx()
    edge = layout.outer.shape[0]
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    seen = cute.make_swizzle(1, 4, 3) if mutation == "swizzle" else layout.inner
    before = smem.allocate_tensor(element, layout.outer, 1024, swizzle=seen)
    after = smem.allocate_tensor(element, layout.outer, 1024, swizzle=layout.inner)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    one = cute.make_layout(1)
    box_in = cute.local_tile(source, (edge, edge, 1), (row, column, batch))
    box_out = cute.local_tile(target, (edge, edge, 1), (column, row, batch))
    smem_in, gmem_in = cpasync.tma_partition(
        load, 0, one, cute.group_modes(before, 0, 3), cute.group_modes(box_in, 0, 3)
    )
    smem_out, gmem_out = cpasync.tma_partition(
        store, 0, one, cute.group_modes(after, 0, 3), cute.group_modes(box_out, 0, 3)
    )
    nbytes = edge * edge * element.width // 8
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        with cute.arch.elect_one():
            if cutlass.const_expr(mutation == "bytes"):
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, nbytes + 16)
            elif cutlass.const_expr(mutation == "few bytes"):
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, nbytes - 16)
            elif cutlass.const_expr(mutation == "arrive"):
                cute.arch.mbarrier_expect_tx(barrier, nbytes)
            else:
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, nbytes)
        cute.copy(load, gmem_in, smem_in, tma_bar_ptr=barrier)
    if cutlass.const_expr(mutation != "wait"):
        cute.arch.mbarrier_wait(barrier, 0)
    for i in cutlass.range(thread, edge * edge, THREADS, unroll=1):
        after[i // edge, i % edge, 0] = before[i % edge, i // edge, 0]
    if cutlass.const_expr(mutation != "fence"):
        cute.arch.fence_view_async_shared()
    if cutlass.const_expr(mutation != "barrier"):
        cute.arch.sync_threads()
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        cute.copy(store, smem_out, gmem_out)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0)


@cute.jit
def transpose(
    x: cute.Pointer, y: cute.Pointer, rows: cutlass.Int32, columns: cutlass.Int32, batches: cutlass.Int32,
    bits: cutlass.Constexpr, mutation: cutlass.Constexpr = None,
):  # fmt: skip
    """y (batches, columns, rows) = x (batches, rows, columns), by square tiles as wide as the swizzle."""
    unit = 128 // x.dtype.width
    rows, columns = cute.assume(rows, unit), cute.assume(columns, unit)
    source = cute.make_tensor(
        x, cute.make_layout((rows, columns, batches), stride=(columns, 1, rows * columns))
    )
    target = cute.make_tensor(y, cute.make_layout((columns, rows, batches), stride=(rows, 1, rows * columns)))
    edge = unit << bits
    layout = cute.make_composed_layout(
        cute.make_swizzle(bits, 4, 3), 0, cute.make_layout((edge, edge, 1), stride=(edge, 1, 0))
    )
    tile = (edge, edge, 1)
    load = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, tile)
    store = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), target, layout, tile)
    grid = (cute.ceil_div(rows, edge), cute.ceil_div(columns, edge), batches)
    _transpose(load.atom, load.tma_tensor, store.atom, store.tma_tensor, layout, x.dtype, mutation).launch(
        grid=grid, block=(THREADS, 1, 1)
    )


def case(
    dtype: torch.dtype, rows: int, columns: int, batches: int = 1, bits: int = 3, mutation: str | None = None
) -> Case:
    """Rows and columns of whole 16 bytes; `bits`: a swizzle of 16 << bits bytes."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        x = integers((batches, rows, columns), -(2**15), 2**15, torch.int32).to(torch.int16)
        x = x.view(dtype) if dtype.itemsize == 2 else x.to(dtype)
    else:
        x = integers((batches, rows, columns), 0, 100, dtype)
    sizes = cutlass.Int32(rows), cutlass.Int32(columns), cutlass.Int32(batches)
    expected = x.transpose(1, 2).contiguous()
    arguments = (Buffer(x, align=128), output(expected, align=128), *sizes)
    return Case(transpose, arguments, {"bits": bits, "mutation": mutation})
