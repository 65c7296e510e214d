"""Bulk copies without a tensor map: from global memory, to a neighbour's shared memory, and back."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import cpasync

from .case import Buffer, Case, integers, output

THREADS, WIDTH, SIZE = 64, 96, 2


@cute.kernel
def _exchange(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = memory.SmemAllocator()
    loaded, received = smem.allocate_array(cutlass.Int64, 1), smem.allocate_array(cutlass.Int64, 1)
    layout = cute.make_layout(WIDTH)
    common = smem.allocate_tensor(cutlass.Int32, layout, 128)
    mine = smem.allocate_tensor(cutlass.Int32, layout, 128)
    theirs = smem.allocate_tensor(cutlass.Int32, layout, 128)
    nbytes = 4 * WIDTH
    if thread == 0:
        cute.arch.mbarrier_init(loaded, 1)
        cute.arch.mbarrier_init(received, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.mbarrier_arrive_and_expect_tx(loaded, 2 * nbytes)
        cute.arch.mbarrier_arrive_and_expect_tx(received, nbytes)
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), cutlass.Int32)
    share = cute.make_copy_atom(cpasync.CopyBulkG2SMulticastOp(), cutlass.Int32)
    send = cute.make_copy_atom(cpasync.CopyBulkS2SOp(), cutlass.Int32)
    store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), cutlass.Int32)
    if warp == 0:
        with cute.arch.elect_one():
            cute.copy(load, x[block, None], mine, mbar_ptr=loaded)
            if rank == 0:
                # The first row of the cluster goes to all of its CTAs.
                mask = cutlass.Int16((1 << SIZE) - 1)
                cute.copy(share, x[block, None], common, mbar_ptr=loaded, mcast_mask=mask)
    cute.arch.mbarrier_wait(loaded, 0)
    for i in cutlass.range(thread, WIDTH, THREADS, unroll=1):
        mine[i] = 3 * mine[i] + common[i]
    cute.arch.fence_view_async_shared()
    cute.arch.sync_threads()
    if warp == 0:
        with cute.arch.elect_one():
            # Data and the barrier that counts them are in the same CTA.
            address = cute.arch.map_dsmem_ptr(received, rank ^ 1).toint()
            there = cute.make_ptr(cutlass.Int64, address, cute.AddressSpace.smem, assumed_align=8)
            cute.copy(send, mine, theirs, mbar_ptr=there, cta_rank=rank ^ 1)
    cute.arch.mbarrier_wait(received, 0)
    for i in cutlass.range(thread, WIDTH, THREADS, unroll=1):
        theirs[i] = theirs[i] - i
    cute.arch.fence_view_async_shared()
    cute.arch.sync_threads()
    if warp == 0:
        with cute.arch.elect_one():
            cute.copy(store, theirs, y[block, None])
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0)
    # The neighbour's copy reads here until it is there.
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


@cute.jit
def exchange(x: cute.Pointer, y: cute.Pointer, rows: cutlass.Int32):
    """y (rows, 96): 3 x of the other row of each pair, plus x of the pair's first, minus the column."""
    layout = cute.make_layout((rows, WIDTH), stride=(WIDTH, 1))
    _exchange(cute.make_tensor(x, layout), cute.make_tensor(y, layout)).launch(
        grid=(rows, 1, 1), block=(THREADS, 1, 1), cluster=(SIZE, 1, 1)
    )


def case(pairs: int) -> Case:
    """2 * pairs rows."""
    x = integers((SIZE * pairs, WIDTH), -1000, 1000, torch.int32)
    both = x.view(pairs, SIZE, WIDTH)
    expected = 3 * both.flip(1) + both[:, :1] - torch.arange(WIDTH)
    expected = expected.to(torch.int32).flatten(0, 1).contiguous()
    return Case(exchange, (Buffer(x), output(expected), cutlass.Int32(SIZE * pairs)))
