"""TMA boxes of one to five dimensions: prefetched, loaded, and stored or reduced into global memory."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import cpasync

from .case import Buffer, Case, integers

THREADS = 64
KINDS = {"add": cute.ReductionKind.ADD, "min": cute.ReductionKind.MIN, "max": cute.ReductionKind.MAX}


@cute.kernel
def _boxes(
    load: cute.CopyAtom, source: cute.Tensor, store: cute.CopyAtom, target: cute.Tensor,
    element: cutlass.Constexpr, box: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    tile = smem.allocate_tensor(element, cute.make_layout(box), 128)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    rank, one = len(box), cute.make_layout(1)
    shared = cute.group_modes(tile, 0, rank)
    # ((box), boxes): the second mode counts boxes in all dimensions.
    from_global = cute.zipped_divide(source, box)
    to_global = cute.zipped_divide(target, box)
    smem_in, gmem_in = cpasync.tma_partition(load, 0, one, shared, from_global)
    smem_out, gmem_out = cpasync.tma_partition(store, 0, one, shared, to_global)
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        cute.prefetch(load, gmem_in[None, block])
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, cute.size(tile) * element.width // 8)
        cute.copy(load, gmem_in[None, block], smem_in, tma_bar_ptr=barrier)
    cute.arch.mbarrier_wait(barrier, 0)
    for i in cutlass.range(thread, cute.size(tile), THREADS, unroll=1):
        tile[i] = tile[i] + tile[i]
    cute.arch.fence_view_async_shared()
    cute.arch.sync_threads()
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        cute.copy(store, smem_out, gmem_out[None, block])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def boxes(
    x: cute.Pointer,
    y: cute.Pointer,
    shape: cutlass.Constexpr,
    box: cutlass.Constexpr,
    kind: cutlass.Constexpr,
):
    """y = 2 x, or combined with it; x and y are of `shape`, its first dimension contiguous."""
    layout = cute.make_layout(shape)
    op = cpasync.CopyBulkTensorTileS2GOp()
    if cutlass.const_expr(kind is not None):
        op = cpasync.CopyReduceBulkTensorTileS2GOp(KINDS[kind])
    source, target, tile = cute.make_tensor(x, layout), cute.make_tensor(y, layout), cute.make_layout(box)
    load = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, tile, box)
    store = cpasync.make_tiled_tma_atom(op, target, tile, box)
    blocks = cute.size(cute.zipped_divide(layout, box), mode=[1])
    _boxes(load.atom, load.tma_tensor, store.atom, store.tma_tensor, x.dtype, box).launch(
        grid=(blocks, 1, 1), block=(THREADS, 1, 1)
    )


def case(dtype: torch.dtype, shape: tuple[int, ...], box: tuple[int, ...], kind: str | None = None) -> Case:
    """shape and box have their contiguous dimension first, of whole 16 bytes."""
    sizes = tuple(reversed(shape))
    # Whole numbers that are not negative: the descriptors call them all unsigned.
    low = 0 if kind in ("min", "max") else -50
    x, before = integers(sizes, low, 50, dtype), integers(sizes, low, 100, dtype, seed=1)
    new = 2 * x
    combined = {None: new, "add": before + new, "min": before.minimum(new), "max": before.maximum(new)}
    arguments = Buffer(x, align=128), Buffer(before, combined[kind], align=128)
    return Case(boxes, arguments, {"shape": shape, "box": box, "kind": kind})
