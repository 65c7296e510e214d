"""Atomic operations in shared and global memory."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory

from .case import Buffer, Case, integers

THREADS, BINS = 128, 40


@cute.kernel
def _histogram(x: cute.Tensor, bins: cute.Tensor, weights: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    mine = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(BINS), 16)
    if thread < BINS:
        mine[thread] = 0
    cute.arch.sync_threads()
    for i in cutlass.range(block * THREADS + thread, cute.size(x), grid * THREADS, unroll=1):
        cute.arch.atomic_add(mine.iterator + x[i], cutlass.Int32(1))
        # Whole numbers of fp32: exact in whatever order.
        cute.arch.atomic_add(weights.iterator + x[i], cutlass.Float32(i % 8))
    cute.arch.sync_threads()
    if thread < BINS:
        cute.arch.atomic_add(bins.iterator + thread, mine[thread])


@cute.jit
def histogram(x: cute.Tensor, bins: cute.Tensor, weights: cute.Tensor, blocks: cutlass.Constexpr):
    """How often each of 40 values comes in x (N,), and the sum of i % 8 where it comes."""
    _histogram(x, bins, weights).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1))


def case(count: int, blocks: int) -> Case:
    x = integers((count,), 0, BINS, torch.int32)
    ones = torch.bincount(x, minlength=BINS)
    sums = torch.bincount(x, weights=(torch.arange(count) % 8).double(), minlength=BINS)
    before, weights = integers((BINS,), 0, 9, torch.int32, seed=1), torch.ones(BINS)
    how = {"passed": "dynamic", "align": 4}
    return Case(histogram, (
        Buffer(x, **how), Buffer(before, (before + ones).to(torch.int32), **how),
        Buffer(weights, (weights + sums).float(), **how),
    ), {"blocks": blocks})  # fmt: skip


@cute.kernel
def _kinds(x: cute.Tensor, out: cute.Tensor, old: cute.Tensor, locked: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    value = x[thread]
    cell = out.iterator
    cute.arch.atomic_max(cell, value)
    cute.arch.atomic_min(cell + 1, value)
    cute.arch.atomic_and(cell + 2, value)
    cute.arch.atomic_or(cell + 3, value)
    cute.arch.atomic_xor(cell + 4, value)
    # Every thread takes a ticket, so that the old values are a permutation.
    old[cute.arch.atomic_add(cell + 5, cutlass.Int32(1))] = 1
    # A sum by compare and swap: those that lost try again.
    seen = locked[0]
    found = cute.arch.atomic_cas(locked.iterator, cmp=seen, val=seen + value)
    while found != seen:
        seen = found
        found = cute.arch.atomic_cas(locked.iterator, cmp=seen, val=seen + value)
    cute.arch.red(cell + 6, value, op="add", dtype="s32", sem="relaxed", scope="gpu")


@cute.jit
def kinds(x: cute.Tensor, out: cute.Tensor, old: cute.Tensor, locked: cute.Tensor):
    """Each atomic operation by all threads on one cell."""
    _kinds(x, out, old, locked).launch(grid=(1, 1, 1), block=(cute.size(x), 1, 1))


def kinds_case() -> Case:
    x = integers((160,), -1000, 1000, torch.int32)
    start = torch.tensor([-5000, 5000, -1, 0, 0, 0, 7], dtype=torch.int32)
    values = x.tolist()
    both, either, parity = -1, 0, 0
    for v in values:
        both, either, parity = both & v, either | v, parity ^ v
    after = [max(values), min(values), both, either, parity, len(values), 7 + sum(values)]
    how = {"passed": "tensor", "align": 4}
    tickets = Buffer(torch.zeros(160, dtype=torch.int32), torch.ones(160, dtype=torch.int32), **how)
    locked = Buffer(
        torch.tensor([3], dtype=torch.int32), torch.tensor([3 + sum(values)], dtype=torch.int32), **how
    )
    out = Buffer(start, torch.tensor(after, dtype=torch.int32), **how)
    return Case(kinds, (Buffer(x, **how), out, tickets, locked))
