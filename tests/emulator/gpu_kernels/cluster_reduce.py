"""A sum over the CTAs of a cluster: parts sent with st.async, or read where they lie with mapa."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory

from .case import Buffer, Case, integers, output

THREADS = 32


@cute.jit
def _part(x: cute.Tensor, first: cutlass.Int32, last: cutlass.Int32):
    """The sum of a warp's part of a row, in every lane."""
    total = cutlass.Int32(0)
    for i in cutlass.range(first + cute.arch.lane_idx(), last, THREADS, unroll=1):
        total += x[i]
    return cute.arch.warp_redux_sync(total, "add")


@cute.kernel
def _send(x: cute.Tensor, y: cute.Tensor, size: cutlass.Constexpr):
    lane = cute.arch.lane_idx()
    row, rank = cute.arch.block_idx()[1], cute.arch.block_idx_in_cluster()
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    parts = smem.allocate_tensor(cutlass.Int32, cute.make_layout((2, size)), 16)
    if lane == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, 8 * size)
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    width = cute.ceil_div(x.shape[1], size)
    first = rank * width
    mine = _part(x[row, None], first, cutlass.min(first + width, x.shape[1]))
    if lane < size:
        cell = (parts.iterator + 2 * rank).align(8)
        cute.arch.store_async_dsmem(cell, (mine, rank), barrier, lane)
    cute.arch.mbarrier_wait(barrier, 0)
    if lane == 0:
        total = cutlass.Int32(0)
        for i in cutlass.range_constexpr(size):
            total += parts[0, i] * (parts[1, i] + 1)
        y[row, rank] = total


@cute.kernel
def _fetch(x: cute.Tensor, y: cute.Tensor, size: cutlass.Constexpr):
    lane = cute.arch.lane_idx()
    row, rank = cute.arch.block_idx()[1], cute.arch.block_idx_in_cluster()
    part = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(1), 16)
    width = cute.ceil_div(x.shape[1], size)
    first = rank * width
    mine = _part(x[row, None], first, cutlass.min(first + width, x.shape[1]))
    if lane == 0:
        part[0] = mine
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    theirs = cutlass.Int32(0)
    if lane < size:
        there = cute.arch.map_dsmem_ptr(part.iterator, lane).toint()
        theirs = cute.arch.inline_ptx(
            "ld.shared::cluster.b32 {$w0}, [{$r0}];", write_only_types=[cutlass.Int32], read_only_args=[there]
        )
        theirs = theirs * (lane + 1)
    total = cute.arch.warp_redux_sync(theirs, "add")
    if lane == 0:
        y[row, rank] = total
    # Nobody leaves while another may still read here.
    cute.arch.cluster_arrive_relaxed()
    cute.arch.cluster_wait()


@cute.jit
def cluster_sum(x: cute.Tensor, y: cute.Tensor, size: cutlass.Constexpr, sends: cutlass.Constexpr):
    """y (M, size) = sums of the rows of x (M, N), their parts weighted 1, 2, ... size."""
    grid = (size, x.shape[0], 1)
    if cutlass.const_expr(sends):
        _send(x, y, size).launch(grid=grid, block=(THREADS, 1, 1), cluster=(size, 1, 1))
    else:
        _fetch(x, y, size).launch(grid=grid, block=(THREADS, 1, 1), cluster=(size, 1, 1))


def case(size: int, sends: bool, rows: int = 2, columns: int = 300) -> Case:
    """Clusters of `size` CTAs, each with one warp."""
    x = integers((rows, columns), -1000, 1000, torch.int32)
    parts = x.split(-(-columns // size), 1)
    total = sum((i + 1) * part.sum(1) for i, part in enumerate(parts))
    expected = total.to(torch.int32).view(rows, 1).repeat(1, size)
    how = {"passed": "dynamic", "align": 4}
    options = {"size": size, "sends": sends}
    return Case(cluster_sum, (Buffer(x, **how), output(expected, **how)), options)
