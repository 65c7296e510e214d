"""Tiles handed out while the kernel runs: a CTA takes over the place of one that has not begun."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory

from .case import BLACKWELL, Buffer, Case, integers, output

THREADS = 64


@cute.kernel
def _square(
    x: cute.Tensor, y: cute.Tensor, visits: cute.Tensor, rounds: cute.Tensor, size: cutlass.Constexpr
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    tile, row, _ = cute.arch.block_idx()
    home, count = (row, tile), cutlass.Int32(0)
    rank = cute.arch.block_idx_in_cluster()
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    answer = smem.allocate_array(cutlass.Int32, 4, byte_alignment=16)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    phase, valid = cutlass.Int32(0), cutlass.Int32(1)
    while valid != 0:
        if thread == 0:
            # Every CTA of the cluster gets the answer, and counts its bytes.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, 16)
        if cutlass.const_expr(size > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        if rank == 0 and cute.arch.warp_idx() == 0:
            with cute.arch.elect_one():
                cute.arch.issue_clc_query(barrier, answer, multicast=size > 1)
        i = tile * THREADS + thread
        if i < x.shape[1]:
            y[row, i] = x[row, i] * x[row, i]
        count += 1
        if thread == 0:
            cute.arch.atomic_add(visits[row, None].iterator + tile, cutlass.Int32(1))
        cute.arch.mbarrier_wait(barrier, phase)
        phase ^= 1
        first, second, _, valid = cute.arch.clc_response(answer)
        tile, row = first + rank, second
        # The next answer must not overwrite what somebody still reads.
        cute.arch.fence_proxy("async.shared", space="cta")
        if cutlass.const_expr(size > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
    if thread == 0:
        rounds[home] = count


@cute.jit
def square(
    x: cute.Tensor, y: cute.Tensor, visits: cute.Tensor, rounds: cute.Tensor, size: cutlass.Constexpr
):  # fmt: skip
    """y = x * x (M, N), by clusters of `size` CTAs.

    visits, rounds: (M, tiles), who came to each tile of 64, and to how many tiles each CTA that began came.
    """
    grid = (visits.shape[1], x.shape[0], 1)
    _square(x, y, visits, rounds, size).launch(grid=grid, block=(THREADS, 1, 1), cluster=(size, 1, 1))


def case(rows: int, columns: int, size: int) -> Case:
    """Tiles are filled up to whole clusters."""
    x = integers((rows, columns), -1000, 1000, torch.int32)
    tiles = -(-columns // (THREADS * size)) * size
    none = torch.zeros(rows, tiles, dtype=torch.int32)
    how = {"passed": "dynamic", "align": 4}
    rounds = Buffer(none, changes=True, **how)
    arguments = Buffer(x, **how), output(x * x, **how), Buffer(none, none + 1, **how), rounds
    return Case(square, arguments, {"size": size}, (BLACKWELL,))
