"""A GEMM with tcgen05: of every plain operand kind, by one CTA or by two, with multicast in a cluster."""

# No annotations from __future__: cute.struct reads them as types.
import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers

from .case import BLACKWELL, ELEMENTS, Buffer, Case, gemm_buffers, integers, output

STAGES = 3
_MAJORS = {"k": OperandMajorMode.K, "m": OperandMajorMode.MN}


@cute.struct
class _Storage:
    ring: cute.struct.MemRange[cutlass.Int64, 2 * STAGES]
    accumulator: cute.struct.MemRange[cutlass.Int64, 2]
    free: cutlass.Int64
    tensor_memory: cutlass.Int32


@cute.jit
def store_tile(
    accumulator: cute.Tensor, c: cute.Tensor, mine: cute.Tensor, places: cute.Tensor, op: cutlass.Constexpr
):
    """Tensor memory to global memory, what lies outside c (M, N) left out; by the four warps of a CTA.

    Args:
        accumulator: (M, N) of tensor memory.
        c: all of the output.
        mine: (M, N) of c, and places its coordinates.
        op: how tensor memory is read.
    """
    thread, _, _ = cute.arch.thread_idx()
    copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, accumulator.element_type), accumulator)
    part = copy.get_slice(thread % 128)
    source, target, where = part.partition_S(accumulator), part.partition_D(mine), part.partition_D(places)
    registers = cute.make_rmem_tensor(target[None, None, 0].shape, accumulator.element_type)
    for i in cutlass.range(cute.size(source, mode=[2]), unroll=1):
        cute.copy(copy, source[None, None, i], registers)
        place, out = where[None, None, i], target[None, None, i]
        for j in cutlass.range_constexpr(cute.size(registers)):
            if cute.elem_less(place[j], c.shape):
                out[j] = registers[j].to(c.element_type)


@cute.kernel
def _gemm(
    mma: cute.TiledMma, load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor,
    c: cute.Tensor, layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout, seen: cute.ComposedLayout,
    cluster: cute.Layout, element: cutlass.Constexpr, sums: cutlass.Constexpr, tile: cutlass.Constexpr,
    op: cutlass.Constexpr, mutation: cutlass.Constexpr,
):  # fmt: skip
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    x, n, _ = cute.arch.block_idx()
    pair = cute.size(cluster, mode=[0])
    m, half = x // pair, x % pair
    here = cluster.get_flat_coord(cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster()))
    smem = memory.SmemAllocator()
    storage = smem.allocate(_Storage)
    sa = smem.allocate_tensor(element, layout_a.outer, 1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    seen_a = cute.make_tensor(cute.recast_ptr(sa.iterator, seen.inner), seen.outer)
    threads = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    issuers = cute.size(cluster, mode=[1]) + cute.size(cluster, mode=[2]) - 1
    nbytes = cute.size_in_bytes(element, cute.select(layout_a, mode=[0, 1, 2]))
    nbytes += cute.size_in_bytes(element, cute.select(layout_b, mode=[0, 1, 2]))
    producer, consumer = pipeline.PipelineTmaUmma.create(
        num_stages=STAGES, producer_group=threads,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, issuers),
        tx_count=nbytes * pair + (16 if mutation == "bytes" else 0),
        barrier_storage=storage.ring.data_ptr(), cta_layout_vmnk=cluster,
    ).make_participants()  # fmt: skip
    multiplier, reader = pipeline.PipelineUmmaAsync.create(
        num_stages=1, producer_group=threads,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 128 * pair),
        barrier_storage=storage.accumulator.data_ptr(), cta_layout_vmnk=cluster,
    ).make_participants()  # fmt: skip
    tmem = memory.TmemAllocator(
        storage.tensor_memory.ptr, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=128),
        is_two_cta=pair == 2, two_cta_tmem_dealloc_mbar_ptr=storage.free.ptr,
    )  # fmt: skip
    tmem.allocate(512)
    part = mma.get_slice(half)
    ga = part.partition_A(cute.local_tile(a, (tile[0], tile[2]), (m, None)))
    gb = part.partition_B(cute.local_tile(b, (tile[1], tile[2]), (n, None)))
    gc = part.partition_C(cute.local_tile(c, (tile[0], tile[1]), (m, n)))
    places = part.partition_C(cute.local_tile(cute.make_identity_tensor(c.shape), (tile[0], tile[1]), (m, n)))
    ra, rb = mma.make_fragment_A(seen_a), mma.make_fragment_B(sb)
    smem_a, gmem_a = cpasync.tma_partition(
        load_a, here[2], cute.make_layout(cute.size(cluster, mode=[2])), cute.group_modes(sa, 0, 3),
        cute.group_modes(ga, 0, 3),
    )  # fmt: skip
    smem_b, gmem_b = cpasync.tma_partition(
        load_b, here[1], cute.make_layout(cute.size(cluster, mode=[1])), cute.group_modes(sb, 0, 3),
        cute.group_modes(gb, 0, 3),
    )  # fmt: skip
    steps = cute.size(gmem_a, mode=[1])
    tmem.wait_for_alloc()
    pointer = tmem.retrieve_ptr(sums)
    accumulator = cute.make_tensor(
        pointer, mma.make_fragment_C(mma.partition_shape_C((tile[0], tile[1]))).layout
    )
    if warp == 0:
        masks = [None, None]
        if cutlass.const_expr(cute.size(cluster) > 1):
            masks = [cpasync.create_tma_multicast_mask(cluster, here, mcast_mode=mode) for mode in (2, 1)]
        for _ in cutlass.range(steps, unroll=1):
            empty = producer.acquire_and_advance()
            at = (None, empty.count)
            into = (None, empty.index)
            cute.copy(load_a, gmem_a[at], smem_a[into], tma_bar_ptr=empty.barrier, mcast_mask=masks[0])
            cute.copy(load_b, gmem_b[at], smem_b[into], tma_bar_ptr=empty.barrier, mcast_mask=masks[1])
        producer.tail()
    elif warp == 1 and half == 0:
        slot = multiplier.acquire_and_advance()
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for _ in cutlass.range(steps, unroll=1):
            full = consumer.wait_and_advance()
            for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
                block = (None, None, k, full.index)
                cute.gemm(mma, accumulator, ra[block], rb[block], accumulator)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            if cutlass.const_expr(mutation != "arrive"):
                full.release()
        slot.commit()
    tmem.relinquish_alloc_permit()
    inner = ((None, None), 0, 0)
    if cutlass.const_expr(mutation == "early"):
        store_tile(accumulator[inner], c, gc[inner], places[inner], op)
    done = reader.wait_and_advance()
    store_tile(accumulator[inner], c, gc[inner], places[inner], op)
    done.release()
    if cutlass.const_expr(mutation != "leak"):
        # Nobody reads any more what is given back.
        cute.arch.sync_threads()
        tmem.free(pointer)


@cute.jit
def gemm(
    a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32,
    sums: cutlass.Constexpr, tile: cutlass.Constexpr, majors: cutlass.Constexpr, cluster: cutlass.Constexpr,
    two: cutlass.Constexpr, mutation: cutlass.Constexpr = None,
):  # fmt: skip
    """c (m, n) = a (m, k) @ b (n, k).T; what is contiguous in a and in b is whole 16 bytes."""
    element = cutlass.TFloat32 if a.dtype is cutlass.Float32 else a.dtype
    unit = 128 // element.width
    whole_k = cute.assume(k, unit) if "k" in majors else k
    whole_m = cute.assume(m, unit) if majors[0] == "m" else m
    whole_n = cute.assume(n, unit) if majors[1] == "m" else n
    orders = [(1, 0) if major == "k" else (0, 1) for major in majors]
    ta = cute.make_tensor(
        cute.recast_ptr(a, dtype=element), cute.make_ordered_layout((whole_m, whole_k), order=orders[0])
    )
    tb = cute.make_tensor(
        cute.recast_ptr(b, dtype=element), cute.make_ordered_layout((whole_n, whole_k), order=orders[1])
    )
    tc = cute.make_tensor(c, cute.make_ordered_layout((m, n), order=(1, 0)))
    group = tcgen05.CtaGroup.TWO if two else tcgen05.CtaGroup.ONE
    mma = blackwell_helpers.make_trivial_tiled_mma(
        element, element, _MAJORS[majors[0]], _MAJORS[majors[1]], sums, group, (tile[0], tile[1])
    )
    layout_a = blackwell_helpers.make_smem_layout_a(mma, tile, element, STAGES)
    layout_b = blackwell_helpers.make_smem_layout_b(mma, tile, element, STAGES)
    seen = layout_a
    if cutlass.const_expr(mutation == "swizzle"):
        # A is read with another swizzle than TMA writes it with.
        atom = tcgen05.make_smem_layout_atom(tcgen05.SmemLayoutAtomKind.K_SW64, element)
        shape = cute.append(mma.partition_shape_A(cute.dice(tile, (1, None, 1))), STAGES)
        seen = tcgen05.tile_to_mma_shape(atom, shape, order=(1, 2, 3))
    vmnk = cute.tiled_divide(cute.make_layout((*cluster, 1)), (mma.thr_id.shape,))
    op_a = blackwell_helpers.cluster_shape_to_tma_atom_A(cluster, mma.thr_id)
    op_b = blackwell_helpers.cluster_shape_to_tma_atom_B(cluster, mma.thr_id)
    load_a = cute.nvgpu.make_tiled_tma_atom_A(
        op_a, ta, cute.select(layout_a, mode=[0, 1, 2]), tile, mma, vmnk.shape
    )
    load_b = cute.nvgpu.make_tiled_tma_atom_B(
        op_b, tb, cute.select(layout_b, mode=[0, 1, 2]), tile, mma, vmnk.shape
    )
    rows = tile[0] // 2 if two else tile[0]
    pack = tcgen05.Pack.PACK_16b_IN_32b if sums.width == 16 else tcgen05.Pack.NONE
    op = tcgen05.Ld32x32bOp(tcgen05.Repetition.x16, pack)
    if cutlass.const_expr(rows == 64 and not two):
        op = tcgen05.Ld16x256bOp(tcgen05.Repetition.x2)
    grid = cute.round_up((cute.ceil_div(m, rows), cute.ceil_div(n, tile[1]), 1), (*cluster, 1))
    _gemm(
        mma, load_a.atom, load_a.tma_tensor, load_b.atom, load_b.tma_tensor, tc, layout_a, layout_b, seen,
        vmnk, element, sums, tile, op, mutation,
    ).launch(grid=grid, block=(128, 1, 1), cluster=(*cluster, 1))  # fmt: skip


def case(
    dtype: torch.dtype, target: torch.dtype, shape: tuple[int, int, int], exact: bool,
    tile: tuple[int, int, int] = (128, 64, 64), majors: str = "kk", cluster: tuple[int, int] = (1, 1),
    two: bool = False, mutation: str | None = None,
) -> Case:  # fmt: skip
    """shape (M, N, K); tile of the one or two CTAs of an MMA; majors "k" or "m" of a and of b."""
    if dtype.is_floating_point:
        buffers = gemm_buffers(*shape, dtype, target, exact, majors, align=128)
        sums = cutlass.Float16 if target is torch.float16 and exact else cutlass.Float32
    else:
        a, b = (
            integers((shape[0], shape[2]), -128, 128, dtype),
            integers((shape[1], shape[2]), -128, 128, dtype, 1),
        )
        buffers = (
            Buffer(a, align=128),
            Buffer(b, align=128),
            output((a.long() @ b.long().T).to(target), align=128),
        )
        sums = ELEMENTS[target]
    options = {
        "sums": sums, "tile": tile, "majors": majors, "cluster": cluster, "two": two, "mutation": mutation
    }  # fmt: skip
    sizes = tuple(cutlass.Int32(size) for size in shape)
    return Case(gemm, (*buffers, *sizes), options, (BLACKWELL,))
