"""A GEMM with wgmma: operands of both majors from shared memory, or A from registers, one tile at a time."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from .case import HOPPER, Case, gemm_bound, gemm_buffers, hopper_fp8_bound

_LAYOUTS = {"k": LayoutEnum.ROW_MAJOR, "m": LayoutEnum.COL_MAJOR}
_MAJORS = {"k": OperandMajorMode.K, "m": OperandMajorMode.MN}


@cute.kernel
def _gemm(
    mma: cute.TiledMma, load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor,
    c: cute.Tensor, layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout, element: cutlass.Constexpr,
    tile: cutlass.Constexpr, from_registers: cutlass.Constexpr, mutation: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    m, n, _ = cute.arch.block_idx()
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    sa = smem.allocate_tensor(element, layout_a.outer, 1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    ga = cute.local_tile(a, (tile[0], tile[2]), (m, None))
    gb = cute.local_tile(b, (tile[1], tile[2]), (n, None))
    one = cute.make_layout(1)
    smem_a, gmem_a = cpasync.tma_partition(
        load_a, 0, one, cute.group_modes(sa, 0, 2), cute.group_modes(ga, 0, 2)
    )
    smem_b, gmem_b = cpasync.tma_partition(
        load_b, 0, one, cute.group_modes(sb, 0, 2), cute.group_modes(gb, 0, 2)
    )
    mine = mma.get_slice(thread)
    part_a = mine.partition_A(sa)
    ra = mma.make_fragment_A(part_a[None, None, None, 0] if from_registers else part_a)
    rb = mma.make_fragment_B(mine.partition_B(sb))
    acc = cute.make_rmem_tensor(mma.partition_shape_C(tile[:2]), cutlass.Float32)
    nbytes = (tile[0] + tile[1]) * tile[2] * element.width // 8
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for step in cutlass.range(cute.size(ga, mode=[2]), unroll=1):
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, nbytes)
            cute.copy(load_a, gmem_a[None, step], smem_a[None, 0], tma_bar_ptr=barrier)
            cute.copy(load_b, gmem_b[None, step], smem_b[None, 0], tma_bar_ptr=barrier)
        cute.arch.mbarrier_wait(barrier, step % 2)
        if cutlass.const_expr(from_registers):
            cute.autovec_copy(part_a[None, None, None, 0], ra)
        warpgroup.fence()
        for k in cutlass.range_constexpr(cute.size(rb, mode=[2])):
            here = ra[None, None, k] if from_registers else ra[None, None, k, 0]
            cute.gemm(mma, acc, here, rb[None, None, k, 0], acc)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        if cutlass.const_expr(mutation != "barrier"):
            # The next tile must not come before every warp has read this one.
            cute.arch.sync_threads()
    places = mine.partition_C(cute.local_tile(cute.make_identity_tensor(c.shape), tile[:2], (m, n)))
    for i in cutlass.range_constexpr(cute.size(acc)):
        if cute.elem_less(places[i], c.shape):
            c[places[i]] = acc[i].to(c.element_type)


@cute.jit
def gemm(
    a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32,
    tile: cutlass.Constexpr, majors: cutlass.Constexpr, from_registers: cutlass.Constexpr,
    mutation: cutlass.Constexpr = None,
):  # fmt: skip
    """c (m, n) = a (m, k) @ b (n, k).T; what is contiguous in a and in b is whole 16 bytes."""
    element = a.dtype
    unit = 128 // element.width
    whole_k = cute.assume(k, unit) if "k" in majors else k
    whole_m = cute.assume(m, unit) if majors[0] == "m" else m
    whole_n = cute.assume(n, unit) if majors[1] == "m" else n
    ta = cute.make_tensor(
        a, cute.make_ordered_layout((whole_m, whole_k), order=(1, 0) if majors[0] == "k" else (0, 1))
    )
    tb = cute.make_tensor(
        b, cute.make_ordered_layout((whole_n, whole_k), order=(1, 0) if majors[1] == "k" else (0, 1))
    )
    tc = cute.make_tensor(c, cute.make_ordered_layout((m, n), order=(1, 0)))
    source = warpgroup.OperandSource.RMEM if from_registers else warpgroup.OperandSource.SMEM
    mma = hopper_helpers.make_trivial_tiled_mma(
        element, element, _MAJORS[majors[0]], _MAJORS[majors[1]], cutlass.Float32, (tile[0] // 64, 1, 1),
        (64, tile[1]), source,
    )  # fmt: skip
    layout_a = hopper_helpers.make_smem_layout_a(_LAYOUTS[majors[0]], tile, element, 1)
    layout_b = hopper_helpers.make_smem_layout_b(_LAYOUTS[majors[1]], tile, element, 1)
    op = cpasync.CopyBulkTensorTileG2SOp()
    load_a = cpasync.make_tiled_tma_atom(op, ta, cute.select(layout_a, mode=[0, 1]), (tile[0], tile[2]))
    load_b = cpasync.make_tiled_tma_atom(op, tb, cute.select(layout_b, mode=[0, 1]), (tile[1], tile[2]))
    _gemm(
        mma, load_a.atom, load_a.tma_tensor, load_b.atom, load_b.tma_tensor, tc, layout_a, layout_b, element,
        tile, from_registers, mutation,
    ).launch(
        grid=(cute.ceil_div(m, tile[0]), cute.ceil_div(n, tile[1]), 1), block=(2 * tile[0], 1, 1)
    )  # fmt: skip


def case(
    dtype: torch.dtype, target: torch.dtype, shape: tuple[int, int, int], exact: bool,
    tile: tuple[int, int, int] = (64, 64, 64), majors: str = "kk", from_registers: bool = False,
    mutation: str | None = None,
) -> Case:  # fmt: skip
    """shape (M, N, K); tile of one or two warpgroups; majors "k" or "m" of a and of b."""
    bound = hopper_fp8_bound if dtype.itemsize == 1 else gemm_bound
    buffers = gemm_buffers(*shape, dtype, target, exact, majors, bound, align=128)
    options = {"tile": tile, "majors": majors, "from_registers": from_registers, "mutation": mutation}
    sizes = tuple(cutlass.Int32(size) for size in shape)
    return Case(gemm, (*buffers, *sizes), options, (HOPPER,))
