"""Kernels of CuTe DSL whose launches the tests look at."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

TILE = (64, 32)


@cute.kernel
def _add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + thread
    if i < cute.size(c):
        c[i] = a[i] + b[i]


@cute.jit
def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    """c = a + b, of any length."""
    _add(a, b, c).launch(grid=(cute.ceil_div(cute.size(c), 128), 1, 1), block=(128, 1, 1))


@cute.kernel
def _scale(x: cute.Tensor, factor: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    x[thread] = x[thread] * factor


@cute.kernel
def _shift(x: cute.Tensor, by: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    x[thread] = x[thread] + by


@cute.jit
def scale_then_shift(x: cute.Pointer, factor: cutlass.Float32, by: cutlass.Float32):
    """Two launches in one host call, on 32 numbers that a pointer gives."""
    tensor = cute.make_tensor(x, cute.make_layout(32))
    _scale(tensor, factor).launch(grid=(1, 1, 1), block=(32, 1, 1))
    _shift(tensor, by).launch(grid=(1, 1, 1), block=(32, 1, 1))


@cute.kernel
def _rank(out: cute.Tensor):
    block, _, _ = cute.arch.block_idx()
    out[block] = cute.arch.block_idx_in_cluster()


@cute.jit
def cluster_ranks(out: cute.Tensor, cluster: cutlass.Constexpr, smem: cutlass.Constexpr):
    """Each CTA writes its rank in its cluster."""
    _rank(out).launch(grid=(cute.size(out), 1, 1), block=(32, 1, 1), cluster=(cluster, 1, 1), smem=smem)


@cute.kernel
def _fetch(atom: cute.CopyAtom, source: cute.Tensor, target: cute.Tensor, layout: cute.Layout):
    thread, _, _ = cute.arch.thread_idx()
    smem = cutlass.memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    tile = smem.allocate_tensor(cutlass.Float32, layout, 128)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    group = cute.group_modes(tile, 0, 2)
    block = cute.group_modes(cute.local_tile(source, TILE, (0, 0)), 0, 2)
    shared, globally = cpasync.tma_partition(atom, 0, cute.make_layout(1), group, block)
    if thread < 32:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, TILE[0] * TILE[1] * 4)
        cute.copy(atom, globally, shared, tma_bar_ptr=barrier)
    cute.arch.mbarrier_wait(barrier, 0)
    for column in range(TILE[1]):
        target[thread, column] = tile[thread, column]


@cute.jit
def fetch_tile(source: cute.Tensor, target: cute.Tensor):
    """The first tile of a matrix, through TMA and shared memory."""
    layout = cute.make_layout(TILE, stride=(TILE[1], 1))
    atom, coordinates = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, TILE)
    _fetch(atom, coordinates, target, layout).launch(grid=(1, 1, 1), block=(TILE[0], 1, 1))


@cute.kernel
def _nothing():
    pass


@cute.jit
def nothing():
    """A launch that touches no memory, harmless on a real GPU."""
    _nothing().launch(grid=(1, 1, 1), block=(32, 1, 1))


@cute.jit
def say(number: cutlass.Int32):
    """Host code alone."""
    cute.printf("said %d", number)
