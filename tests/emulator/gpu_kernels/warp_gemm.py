"""A GEMM with mma.sync: ldmatrix from swizzled shared memory, plain or transposed."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import warp

from .case import Case, gemm_buffers

THREADS = 128
TILE = (64, 64, 32)


@cute.jit
def _fill(source: cute.Tensor, tile: cute.Tensor, first: cutlass.Int32, depth: cutlass.Int32):
    """A tile of source (rows, K) from row `first` and column `depth` on, zero where there is none."""
    thread, _, _ = cute.arch.thread_idx()
    for i in cutlass.range(thread, cute.size(tile), THREADS, unroll=1):
        row, column = i % tile.shape[0], i // tile.shape[0]
        value = source.element_type(0)
        if first + row < source.shape[0] and depth + column < source.shape[1]:
            value = source[first + row, depth + column]
        tile[row, column] = value


@cute.kernel
def _gemm(
    mma: cute.TiledMma, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout, a_transposed: cutlass.Constexpr, b_transposed: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    m, n, _ = cute.arch.block_idx()
    smem = memory.SmemAllocator()
    sa = smem.allocate_tensor(a.element_type, layout_a.outer, 128, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(b.element_type, layout_b.outer, 128, swizzle=layout_b.inner)
    mine = mma.get_slice(thread)
    ra = mma.make_fragment_A(mine.partition_A(sa))
    rb = mma.make_fragment_B(mine.partition_B(sb))
    acc = cute.make_rmem_tensor(mma.partition_shape_C(TILE[:2]), cutlass.Float32)
    acc.fill(0.0)
    atom_a = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(a_transposed, 4), a.element_type)
    atom_b = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(b_transposed, 4), b.element_type)
    copy_a, copy_b = cute.make_tiled_copy_A(atom_a, mma), cute.make_tiled_copy_B(atom_b, mma)
    source_a = copy_a.get_slice(thread).partition_S(sa)
    source_b = copy_b.get_slice(thread).partition_S(sb)
    target_a, target_b = copy_a.retile(ra), copy_b.retile(rb)
    for depth in cutlass.range(0, a.shape[1], TILE[2], unroll=1):
        _fill(a, sa, m * TILE[0], depth)
        _fill(b, sb, n * TILE[1], depth)
        cute.arch.sync_threads()
        for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
            cute.copy(copy_a, source_a[None, None, k], target_a[None, None, k])
            cute.copy(copy_b, source_b[None, None, k], target_b[None, None, k])
            cute.gemm(mma, acc, ra[None, None, k], rb[None, None, k], acc)
        cute.arch.sync_threads()
    places = mine.partition_C(cute.local_tile(cute.make_identity_tensor(c.shape), TILE[:2], (m, n)))
    for i in cutlass.range_constexpr(cute.size(acc)):
        if cute.elem_less(places[i], c.shape):
            c[places[i]] = acc[i].to(c.element_type)


@cute.jit
def gemm(
    a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, a_transposed: cutlass.Constexpr,
    b_transposed: cutlass.Constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) @ b (N, K).T; *_transposed: in shared memory, K is not the contiguous dimension."""
    op = warp.MmaF16BF16Op(a.element_type, cutlass.Float32, (16, 8, 16))
    mma = cute.make_tiled_mma(op, (2, 2, 1), permutation_mnk=(32, 32, 16))
    swizzle = cute.make_swizzle(2, 4, 3)

    layouts = []
    for rows, transposed in ((TILE[0], a_transposed), (TILE[1], b_transposed)):
        order = (0, 1) if transposed else (1, 0)
        layouts.append(
            cute.make_composed_layout(swizzle, 0, cute.make_ordered_layout((rows, TILE[2]), order=order))
        )
    grid = (cute.ceil_div(c.shape[0], TILE[0]), cute.ceil_div(c.shape[1], TILE[1]), 1)
    _gemm(mma, a, b, c, layouts[0], layouts[1], a_transposed, b_transposed).launch(
        grid=grid, block=(THREADS, 1, 1)
    )


def case(
    dtype: torch.dtype, target: torch.dtype, shape: tuple[int, int, int], exact: bool,
    a_transposed: bool = False, b_transposed: bool = False,
) -> Case:  # fmt: skip
    """shape (M, N, K), none of which need be a multiple of anything."""
    how = {"passed": "dynamic", "align": 2}
    buffers = gemm_buffers(*shape, dtype, target, exact, **how)
    return Case(gemm, buffers, {"a_transposed": a_transposed, "b_transposed": b_transposed})
