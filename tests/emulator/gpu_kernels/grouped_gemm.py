"""A grouped GEMM for Blackwell: products of any sizes, TMA descriptors changed on the device for each."""

# No annotations from __future__: cute.struct reads them as types.
import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.tensor_utils import LayoutEnum, TensorMapManager, TensorMapUpdateMode
from cutlass.utils import blackwell_helpers

from .case import BLACKWELL, Buffer, Case, gemm_operands, gemm_output

TILE = (128, 64, 64)
STAGES, ACCUMULATORS, STORES, SLICE = 3, 2, 2, 32
MULTIPLIER, LOADER = 4, 5
DESCRIPTOR_BYTES = 128


@cute.struct
class _Storage:
    descriptors: cute.struct.Align[cute.struct.MemRange[cutlass.Int64, 3 * DESCRIPTOR_BYTES // 8], 128]
    ring: cute.struct.MemRange[cutlass.Int64, 2 * STAGES]
    accumulators: cute.struct.MemRange[cutlass.Int64, 2 * ACCUMULATORS]
    tensor_memory: cutlass.Int32


@cute.jit
def _find(at: cutlass.Int32, sizes: cute.Tensor):
    """Of a tile: its group, its row and column in the product of that group, and the steps along K."""
    group, start = cutlass.Int32(0), cutlass.Int32(0)
    for i in cutlass.range(sizes.shape[0], unroll=1):
        count = cute.ceil_div(sizes[i, 0], TILE[0]) * cute.ceil_div(sizes[i, 1], TILE[1])
        if group == i and at >= start + count:
            start += count
            group += 1
    rows = cute.ceil_div(sizes[group, 0], TILE[0])
    inside = at - start
    return group, inside % rows, inside // rows, cute.ceil_div(sizes[group, 2], TILE[2])


@cute.jit
def _matrix(pointer: cute.Pointer, offset: cutlass.Int32, rows: cutlass.Int32, columns: cutlass.Int32):
    """A row-major (rows, columns, 1) that begins `offset` elements on; all are whole 16 bytes."""
    unit = 128 // pointer.dtype.width
    columns = cute.assume(columns, unit)
    there = (pointer + cute.assume(offset, unit)).align(16)
    return cute.make_tensor(there, cute.make_layout((rows, columns, 1), stride=(columns, 1, 0)))


@cute.kernel
def _gemm(
    mma: cute.TiledMma, load_a: cute.CopyAtom, a: cute.Tensor, load_b: cute.CopyAtom, b: cute.Tensor,
    store: cute.CopyAtom, c: cute.Tensor, pointers: list, offsets: cute.Tensor, sizes: cute.Tensor,
    workspace: cute.Tensor, tiles: cutlass.Int32, layouts: list, mode: cutlass.Constexpr,
    mutation: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    first, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    pa, pb, pc = pointers
    layout_a, layout_b, layout_c = layouts
    element, target = pa.dtype, pc.dtype
    smem = memory.SmemAllocator()
    storage = smem.allocate(_Storage)
    sa = smem.allocate_tensor(element, layout_a.outer, 1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(element, layout_b.outer, 1024, swizzle=layout_b.inner)
    sc = smem.allocate_tensor(target, layout_c.outer, 1024, swizzle=layout_c.inner)
    one_thread = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    ring = pipeline.PipelineTmaUmma.create(
        num_stages=STAGES, producer_group=one_thread, consumer_group=one_thread,
        tx_count=(TILE[0] + TILE[1]) * TILE[2] * element.width // 8, barrier_storage=storage.ring.data_ptr(),
    )  # fmt: skip
    results = pipeline.PipelineUmmaAsync.create(
        num_stages=ACCUMULATORS, producer_group=one_thread,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 128),
        barrier_storage=storage.accumulators.data_ptr(),
    )  # fmt: skip
    tmem = memory.TmemAllocator(
        storage.tensor_memory.ptr, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=192)
    )
    pool = tmem.reserve(128)
    shape = cute.append(mma.partition_shape_C((TILE[0], TILE[1])), ACCUMULATORS)
    sums = pool.allocate_tensor(mma.make_fragment_C(shape).layout, cutlass.Float32)

    manager = TensorMapManager(mode, DESCRIPTOR_BYTES)
    in_shared, in_global = [], []
    for i in cutlass.range_constexpr(3):
        place = workspace[first, i, None].iterator
        in_global.append(manager.get_tensormap_ptr(place))
        in_shared.append(storage.descriptors.data_ptr() + i * (DESCRIPTOR_BYTES // 8))
    used = in_shared if mode == TensorMapUpdateMode.SMEM else in_global
    part = mma.get_slice(0)
    # The sizes of these are of no group: only coordinates come of them.
    ga = part.partition_A(cute.local_tile(a, (TILE[0], TILE[2]), (None, None, 0)))
    gb = part.partition_B(cute.local_tile(b, (TILE[1], TILE[2]), (None, None, 0)))
    gc = part.partition_C(cute.local_tile(c, (TILE[0], TILE[1]), (None, None, 0)))
    one = cute.make_layout(1)

    if warp == LOADER:
        smem_a, gmem_a = cpasync.tma_partition(
            load_a, 0, one, cute.group_modes(sa, 0, 3), cute.group_modes(ga, 0, 3)
        )
        smem_b, gmem_b = cpasync.tma_partition(
            load_b, 0, one, cute.group_modes(sb, 0, 3), cute.group_modes(gb, 0, 3)
        )
        manager.init_tensormap_from_atom(load_a, used[0], LOADER)
        manager.init_tensormap_from_atom(load_b, used[1], LOADER)
        manager.fence_tensormap_initialization()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STAGES)
        last = cutlass.Int32(-1)
        for at in cutlass.range(first, tiles, blocks, unroll=1):
            group, m, n, steps = _find(at, sizes)
            if group != last:
                # The descriptors may change when no load that uses them is on its way.
                drained = state.clone()
                for _ in cutlass.range_constexpr(STAGES):
                    ring.sync_object_empty.wait(drained.index, drained.phase)
                    drained.advance()
                manager.update_tensormap(
                    (
                        _matrix(pa, offsets[group, 0], sizes[group, 0], sizes[group, 2]),
                        _matrix(pb, offsets[group, 1], sizes[group, 1], sizes[group, 2]),
                    ),
                    (load_a, load_b), (in_global[0], in_global[1]), LOADER, (in_shared[0], in_shared[1]),
                )  # fmt: skip
                if cutlass.const_expr(mutation != "descriptor fence"):
                    manager.fence_tensormap_update(in_global[0])
                    manager.fence_tensormap_update(in_global[1])
                last = group
            for k in cutlass.range(steps, unroll=1):
                ring.producer_acquire(state)
                full = ring.producer_get_barrier(state)
                cute.copy(
                    load_a, gmem_a[None, m, k], smem_a[None, state.index], tma_bar_ptr=full,
                    tma_desc_ptr=manager.get_tensormap_ptr(in_global[0], cute.AddressSpace.generic),
                )  # fmt: skip
                cute.copy(
                    load_b, gmem_b[None, n, k], smem_b[None, state.index], tma_bar_ptr=full,
                    tma_desc_ptr=manager.get_tensormap_ptr(in_global[1], cute.AddressSpace.generic),
                )  # fmt: skip
                state.advance()
        ring.producer_tail(state)

    elif warp == MULTIPLIER:
        ra, rb = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        write = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, ACCUMULATORS)
        for at in cutlass.range(first, tiles, blocks, unroll=1):
            _, _, _, steps = _find(at, sizes)
            results.producer_acquire(write)
            mma.set(tcgen05.Field.ACCUMULATE, False)
            for _ in cutlass.range(steps, unroll=1):
                ring.consumer_wait(read)
                for k in cutlass.range_constexpr(cute.size(ra, mode=[2])):
                    operands = (None, None, k, read.index)
                    into = sums[None, None, None, write.index]
                    cute.gemm(mma, into, ra[operands], rb[operands], into)
                    mma.set(tcgen05.Field.ACCUMULATE, True)
                ring.consumer_release(read)
                read.advance()
            results.producer_commit(write)
            write.advance()
        results.producer_tail(write)

    else:
        together = pipeline.NamedBarrier(barrier_id=2, num_threads=128)
        done = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, ACCUMULATORS)
        slices = cute.flat_divide(sums[((None, None), 0, 0, None)], (TILE[0], SLICE))[
            None, None, 0, None, None
        ]
        load = tcgen05.make_tmem_copy(
            cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x32), cutlass.Float32),
            slices[None, None, 0, 0],
        )
        source = load.get_slice(thread).partition_S(slices)
        mover = cute.make_tiled_copy_D(
            blackwell_helpers.get_smem_store_op(LayoutEnum.ROW_MAJOR, target, cutlass.Float32, load), load
        )
        part_c = mover.get_slice(thread).partition_D(sc)
        registers = cute.make_rmem_tensor(
            load.get_slice(thread).partition_D(sc[None, None, 0]).shape, cutlass.Float32
        )
        out = cute.make_rmem_tensor(mover.retile(registers).shape, target)
        boxes = cute.flat_divide(gc[((None, None), 0, 0, None, None)], (TILE[0], SLICE))[
            None, None, 0, None, None, None
        ]
        smem_c, gmem_c = cpasync.tma_partition(
            store, 0, one, cute.group_modes(sc, 0, 2), cute.group_modes(boxes, 0, 2)
        )
        manager.init_tensormap_from_atom(store, used[2], 0)
        manager.fence_tensormap_initialization()
        last = cutlass.Int32(-1)
        for at in cutlass.range(first, tiles, blocks, unroll=1):
            group, m, n, _ = _find(at, sizes)
            if group != last:
                if warp == 0:
                    manager.update_tensormap(
                        (_matrix(pc, offsets[group, 2], sizes[group, 0], sizes[group, 1]),),
                        (store,), (in_global[2],), 0, (in_shared[2],),
                    )  # fmt: skip
                    manager.fence_tensormap_update(in_global[2])
                last = group
            results.consumer_wait(done)
            for i in cutlass.range(TILE[1] // SLICE, unroll=1):
                cute.copy(load, source[None, None, None, i, done.index], registers)
                out.store(mover.retile(registers).load().to(target))
                cute.copy(mover, out, part_c[None, None, None, i % STORES])
                cute.arch.fence_view_async_shared()
                together.arrive_and_wait()
                if warp == 0:
                    cute.copy(
                        store, smem_c[None, i % STORES], gmem_c[None, i, m, n],
                        tma_desc_ptr=manager.get_tensormap_ptr(in_global[2], cute.AddressSpace.generic),
                    )  # fmt: skip
                    cute.arch.cp_async_bulk_commit_group()
                    cute.arch.cp_async_bulk_wait_group(STORES - 1, read=True)
                together.arrive_and_wait()
            cute.arch.fence_view_async_tmem_load()
            results.consumer_release(done)
            done.advance()
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(pool.base_ptr)


@cute.jit
def gemm(
    a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, offsets: cute.Tensor, sizes: cute.Tensor,
    workspace: cute.Tensor, largest: tuple, tiles: cutlass.Int32, mode: cutlass.Constexpr,
    mutation: cutlass.Constexpr = None,
):  # fmt: skip
    """c_g (m, n) = a_g (m, k) @ b_g (n, k).T for each group g; k and n are whole 16 bytes.

    Args:
        offsets: (groups, 3), where a_g, b_g and c_g begin, in elements, whole 16 bytes.
        sizes: (groups, 3), m, n and k.
        workspace: (blocks, 3, 16) int64, for the descriptors of each block.
        largest: any sizes at least those of a tile.
    """
    m, n, k = largest
    element, target = a.dtype, c.dtype
    ta, tb, tc = _matrix(a, 0, m, k), _matrix(b, 0, n, k), _matrix(c, 0, m, n)
    mma = blackwell_helpers.make_trivial_tiled_mma(
        element, element, OperandMajorMode.K, OperandMajorMode.K, cutlass.Float32, tcgen05.CtaGroup.ONE,
        (TILE[0], TILE[1]),
    )  # fmt: skip
    layout_a = blackwell_helpers.make_smem_layout_a(mma, TILE, element, STAGES)
    layout_b = blackwell_helpers.make_smem_layout_b(mma, TILE, element, STAGES)
    layout_c = blackwell_helpers.make_smem_layout_epi(target, LayoutEnum.ROW_MAJOR, (TILE[0], SLICE), STORES)
    op = cpasync.CopyBulkTensorTileG2SOp()
    load_a = cute.nvgpu.make_tiled_tma_atom_A(op, ta, cute.select(layout_a, mode=[0, 1, 2]), TILE, mma)
    load_b = cute.nvgpu.make_tiled_tma_atom_B(op, tb, cute.select(layout_b, mode=[0, 1, 2]), TILE, mma)
    store = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), tc, cute.select(layout_c, mode=[0, 1]), (TILE[0], SLICE)
    )
    _gemm(
        mma, load_a.atom, load_a.tma_tensor, load_b.atom, load_b.tma_tensor, store.atom, store.tma_tensor,
        [a, b, c], offsets, sizes, workspace, tiles, [layout_a, layout_b, layout_c], mode, mutation,
    ).launch(grid=(workspace.shape[0], 1, 1), block=(192, 1, 1))  # fmt: skip


def case(
    dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...], exact: bool, blocks: int = 2,
    in_shared: bool = True, mutation: str | None = None,
) -> Case:  # fmt: skip
    """shapes (M, N, K) of the groups; in_shared: descriptors are changed in shared memory, else in global."""
    parts, offsets, expected, bounds = [[], [], []], [], [], []
    for m, n, k in shapes:
        a, b = gemm_operands(m, n, k, dtype, exact)
        c = gemm_output(a, b, dtype, exact)
        offsets.append([sum(t.numel() for t in kind) for kind in parts])
        for kind, t in zip(parts, (a, b, c.expected), strict=True):
            # Every matrix begins at 128 bytes; what lies between is no group's.
            kind.append(torch.nn.functional.pad(t.flatten(), (0, -t.numel() % 64)))
        size = parts[2][-1].numel()
        bounds.append(
            torch.zeros(size) if exact else torch.nn.functional.pad(c.bound.flatten(), (0, size - m * n))
        )
        expected.append(m * n)
    a, b, c = (torch.cat(kind) for kind in parts)
    begin = torch.full_like(c, float("nan"))
    after = begin.clone()
    for (_, _, start), count in zip(offsets, expected, strict=True):
        after[start : start + count] = c[start : start + count]
    holds = ~after.isnan()
    # Bits between the products must stay: a bound of zero would call NaN wrong, so those are whole numbers.
    begin, after = torch.where(holds, begin, 77), torch.where(holds, after, 77)
    tiles = sum(-(-m // TILE[0]) * -(-n // TILE[1]) for m, n, _ in shapes)
    largest = tuple(cutlass.Int32(max(*sizes, 128)) for sizes in zip(*shapes, strict=True))
    table = {"passed": "dynamic", "align": 4}
    workspace = Buffer(
        torch.zeros(blocks, 3, 16, dtype=torch.int64), changes=True, passed="tensor", align=128
    )
    arguments = (
        Buffer(a, align=128), Buffer(b, align=128),
        Buffer(begin, after, None if exact else torch.cat(bounds), align=128),
        Buffer(torch.tensor(offsets, dtype=torch.int32), **table),
        Buffer(torch.tensor(shapes, dtype=torch.int32), **table), workspace, largest, cutlass.Int32(tiles),
    )  # fmt: skip
    mode = TensorMapUpdateMode.SMEM if in_shared else TensorMapUpdateMode.GMEM
    return Case(gemm, arguments, {"mode": mode, "mutation": mutation}, (BLACKWELL,))
