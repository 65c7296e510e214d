"""A copy through shared memory with cp.async, several stages in flight."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import cpasync

from .case import Buffer, Case, integers, output

THREADS, STAGES, VECTOR = 64, 3, 4


@cute.kernel
def _reverse(
    x: cute.Tensor, y: cute.Tensor, tiles: cutlass.Int32, count: cutlass.Int32, forget: cutlass.Constexpr
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    width = THREADS * VECTOR
    stages = memory.SmemAllocator().allocate_tensor(
        cutlass.Int32, cute.make_layout(((VECTOR, 1), THREADS, STAGES)), 16
    )
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL), cutlass.Int32, num_bits_per_copy=128
    )
    # ((4, 1), vectors): the copy takes a vector in one piece, and a predicate for each piece.
    source = cute.make_tensor(x.iterator, cute.make_layout(((VECTOR, 1), count // VECTOR)))
    inside = cute.make_rmem_tensor((1,), cutlass.Boolean)
    for stage in cutlass.range_constexpr(STAGES - 1):
        tile = block + stage * grid
        vector = tile * THREADS + thread
        inside[0] = vector * VECTOR < count
        cute.copy(atom, source[None, vector], stages[None, thread, stage], pred=inside)
        cute.arch.cp_async_commit_group()
    stage = cutlass.Int32(0)
    for tile in cutlass.range(block, tiles, grid, unroll=1):
        if cutlass.const_expr(not forget):
            cute.arch.cp_async_wait_group(STAGES - 2)
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(VECTOR):
            # Of another thread's vector, back to front.
            place = tile * width + VECTOR * thread + i
            if place < count:
                y[place] = stages[VECTOR - 1 - i, thread ^ 1, stage] + tile
        ahead = (tile + (STAGES - 1) * grid) * THREADS + thread
        slot = (stage + STAGES - 1) % STAGES
        inside[0] = ahead * VECTOR < count
        cute.copy(atom, source[None, ahead], stages[None, thread, slot], pred=inside)
        cute.arch.cp_async_commit_group()
        stage = (stage + 1) % STAGES


@cute.jit
def reverse(
    x: cute.Pointer, y: cute.Pointer, count: cutlass.Int32, blocks: cutlass.Constexpr,
    forget: cutlass.Constexpr,
):  # fmt: skip
    """Swap neighbouring vectors of four and turn each round, adding the number of the tile of 256."""
    layout = cute.make_layout(cute.assume(count, VECTOR))
    tiles = cute.ceil_div(count, THREADS * VECTOR)
    _reverse(cute.make_tensor(x, layout), cute.make_tensor(y, layout), tiles, count, forget).launch(
        grid=(blocks, 1, 1), block=(THREADS, 1, 1)
    )


def case(count: int, blocks: int, forget: bool = False) -> Case:
    """count is a multiple of 8."""
    x = integers((count,), -1000, 1000, torch.int32)
    expected = x.view(-1, 2, VECTOR).flip(1, 2).flatten() + torch.arange(count) // (THREADS * VECTOR)
    arguments = Buffer(x), output(expected.to(torch.int32)), cutlass.Int32(count)
    return Case(reverse, arguments, {"blocks": blocks, "forget": forget})
