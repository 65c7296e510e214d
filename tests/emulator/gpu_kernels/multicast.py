"""A tile that the CTAs of a cluster load together: each a slice, by TMA, into the shared memory of all."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import cpasync

from .case import Buffer, Case, integers, output

THREADS = 64
TILE = (32, 16)


@cute.kernel
def _share(load: cute.CopyAtom, source: cute.Tensor, target: cute.Tensor, size: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    layout = cute.make_layout(TILE, stride=(TILE[1], 1))
    tile = smem.allocate_tensor(cutlass.Int32, layout, 128)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    # No slice may come before the barrier that counts it is there.
    cute.arch.cluster_arrive_relaxed()
    cute.arch.cluster_wait()
    box = cute.local_tile(source, TILE, (block // size, 0))
    smem_part, gmem_part = cpasync.tma_partition(
        load, rank, cute.make_layout(size), cute.group_modes(tile, 0, 2), cute.group_modes(box, 0, 2)
    )
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, 4 * TILE[0] * TILE[1])
        cute.copy(load, gmem_part, smem_part, tma_bar_ptr=barrier, mcast_mask=cutlass.Int16((1 << size) - 1))
    cute.arch.mbarrier_wait(barrier, 0)
    for i in cutlass.range(thread, TILE[0] * TILE[1], THREADS, unroll=1):
        place = (i // TILE[1], i % TILE[1])
        target[place[0], place[1], block] = tile[place] * (rank + 1)


@cute.jit
def share(x: cute.Pointer, y: cute.Pointer, tiles: cutlass.Int32, size: cutlass.Constexpr):
    """y (tiles * size, 32, 16): each tile of x (32 * tiles, 16), times 1, 2, ... size."""
    source = cute.make_tensor(x, cute.make_layout((TILE[0] * tiles, TILE[1]), stride=(TILE[1], 1)))
    target = cute.make_tensor(
        y, cute.make_layout((*TILE, tiles * size), stride=(TILE[1], 1, TILE[0] * TILE[1]))
    )
    layout = cute.make_layout(TILE, stride=(TILE[1], 1))
    load = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SMulticastOp(), source, layout, TILE, num_multicast=size
    )
    _share(load.atom, load.tma_tensor, target, size).launch(
        grid=(tiles * size, 1, 1), block=(THREADS, 1, 1), cluster=(size, 1, 1)
    )


def case(size: int, tiles: int) -> Case:
    """Clusters of `size` CTAs."""
    x = integers((TILE[0] * tiles, TILE[1]), -1000, 1000, torch.int32)
    factors = torch.arange(1, size + 1, dtype=torch.int32)
    expected = (x.view(tiles, 1, *TILE) * factors.view(1, size, 1, 1)).flatten(0, 1).contiguous()
    arguments = Buffer(x, align=128), output(expected), cutlass.Int32(tiles)
    return Case(share, arguments, {"size": size})
