"""Small kernels whose PTX is parsed: element by element, a TMA copy, and GEMMs for both architectures."""

# No annotations from __future__: cute.struct reads them as types.
import cutlass
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05, warpgroup
from cutlass.cute.runtime import make_ptr
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers, hopper_helpers

from dsv4lab.emulator import device

HALF, SINGLE = cutlass.Float16, cutlass.Float32
STAGES = 2


@cute.kernel
def _scale_kernel(x: cute.Tensor, y: cute.Tensor, n: cutlass.Int32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + thread
    if i < n:
        total = SINGLE(0)
        for j in cutlass.range(i % 7, unroll=1):
            total += x[i] * SINGLE(j)
        if total > 1.5:
            y[i] = total / x[i]
        else:
            cute.printf("small: %f\n", total)
            y[i] = cute.math.exp2(total, fastmath=True)


@cute.jit
def scale(x: cute.Pointer, y: cute.Pointer, n: cutlass.Int32):
    """A branch, a loop, a call of vprintf."""
    layout = cute.make_layout(n)
    _scale_kernel(cute.make_tensor(x, layout), cute.make_tensor(y, layout), n).launch(
        grid=(4, 1, 1), block=(128, 1, 1)
    )


@cute.struct
class _Barriers:
    ab: cute.struct.MemRange[cutlass.Int64, 2 * STAGES]
    accumulator: cute.struct.MemRange[cutlass.Int64, 2]
    tensor_memory: cutlass.Int32


@cute.kernel
def _blackwell_kernel(
    mma: cute.TiledMma, atom_a: cute.CopyAtom, ma: cute.Tensor, atom_b: cute.CopyAtom, mb: cute.Tensor,
    mc: cute.Tensor, layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    m, n, _ = cute.arch.block_idx()
    smem = memory.SmemAllocator()
    storage = smem.allocate(_Barriers)
    sa = smem.allocate_tensor(HALF, layout_a.outer, byte_alignment=128, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(HALF, layout_b.outer, byte_alignment=128, swizzle=layout_b.inner)
    barrier = pipeline.NamedBarrier(barrier_id=1, num_threads=128)
    tmem = memory.TmemAllocator(storage.tensor_memory, barrier_for_retrieve=barrier)
    tmem.allocate(512)
    group = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    size = cute.size_in_bytes(HALF, cute.select(layout_a, mode=[0, 1, 2])) + cute.size_in_bytes(
        HALF, cute.select(layout_b, mode=[0, 1, 2])
    )
    producer, consumer = pipeline.PipelineTmaUmma.create(
        num_stages=STAGES, producer_group=group, consumer_group=group, tx_count=size,
        barrier_storage=storage.ab.data_ptr(),
    ).make_participants()  # fmt: skip
    acc_producer, acc_consumer = pipeline.PipelineUmmaAsync.create(
        num_stages=1, producer_group=group,
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 128),
        barrier_storage=storage.accumulator.data_ptr(),
    ).make_participants()  # fmt: skip
    tiler, place = (128, 64, 64), (m, n, None)
    ga = cute.local_tile(ma, tiler, place, proj=(1, None, 1))
    gb = cute.local_tile(mb, tiler, place, proj=(None, 1, 1))
    gc = cute.local_tile(mc, tiler, place, proj=(1, 1, None))
    part = mma.get_slice(0)
    cga, cgb, cgc = part.partition_A(ga), part.partition_B(gb), part.partition_C(gc)
    cra, crb = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
    acc = mma.make_fragment_C(mma.partition_shape_C(tiler[:2]))
    one = cute.make_layout(1)
    tsa, tga = cpasync.tma_partition(atom_a, 0, one, cute.group_modes(sa, 0, 3), cute.group_modes(cga, 0, 3))
    tsb, tgb = cpasync.tma_partition(atom_b, 0, one, cute.group_modes(sb, 0, 3), cute.group_modes(cgb, 0, 3))
    tmem.wait_for_alloc()
    pointer = tmem.retrieve_ptr(SINGLE)
    acc = cute.make_tensor(pointer, acc.layout)
    if warp == 0:
        slot = acc_producer.acquire_and_advance()
        for _ in cutlass.range(cute.size(ga, mode=[2]), unroll=1):
            stage = producer.acquire_and_advance()
            cute.copy(atom_a, tga[(None, stage.count)], tsa[(None, stage.index)], tma_bar_ptr=stage.barrier)
            cute.copy(atom_b, tgb[(None, stage.count)], tsb[(None, stage.index)], tma_bar_ptr=stage.barrier)
            full = consumer.wait_and_advance()
            for k in cutlass.range_constexpr(cute.size(cra, mode=[2])):
                here = (None, None, k, full.index)
                cute.gemm(mma, acc, cra[here], crb[here], acc)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            full.release()
        slot.commit()
    tmem.relinquish_alloc_permit()
    done = acc_consumer.wait_and_advance()
    atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x32, tcgen05.Pack.NONE), SINGLE)
    copy = tcgen05.make_tmem_copy(atom, acc[((None, None), 0, 0)])
    mine = copy.get_slice(thread)
    source, target = mine.partition_S(acc[((None, None), 0, 0)]), mine.partition_D(cgc[((None, None), 0, 0)])
    registers = cute.make_rmem_tensor(target[None, None, 0].shape, SINGLE)
    for i in cutlass.range(cute.size(source, mode=[2])):
        cute.copy(copy, source[None, None, i], registers)
        cute.autovec_copy(registers, target[None, None, i])
    done.release()
    tmem.free(pointer)


@cute.jit
def blackwell_gemm(a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, k: cutlass.Int32):
    """fp16 (128, k) by (64, k) with tcgen05, TMA, mbarriers and tensor memory."""
    ta = cute.make_tensor(a, cute.make_ordered_layout((128, cute.assume(k, 64)), order=(1, 0)))
    tb = cute.make_tensor(b, cute.make_ordered_layout((64, cute.assume(k, 64)), order=(1, 0)))
    tc = cute.make_tensor(c, cute.make_layout((128, 64), stride=(64, 1)))
    op = tcgen05.MmaF16BF16Op(
        HALF, SINGLE, (128, 64, 16), tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM,
        OperandMajorMode.K, OperandMajorMode.K,
    )  # fmt: skip
    mma = cute.make_tiled_mma(op)
    tiler = (128, 64, 64)
    la = blackwell_helpers.make_smem_layout_a(mma, tiler, HALF, STAGES)
    lb = blackwell_helpers.make_smem_layout_b(mma, tiler, HALF, STAGES)
    load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
    one_a, one_b = cute.select(la, mode=[0, 1, 2]), cute.select(lb, mode=[0, 1, 2])
    info_a = cute.nvgpu.make_tiled_tma_atom_A(load, ta, one_a, tiler, mma)
    info_b = cute.nvgpu.make_tiled_tma_atom_B(load, tb, one_b, tiler, mma)
    _blackwell_kernel(mma, info_a.atom, info_a.tma_tensor, info_b.atom, info_b.tma_tensor, tc, la, lb).launch(
        grid=(1, 1, 1), block=(128, 1, 1)
    )


@cute.kernel
def _hopper_kernel(
    mma: cute.TiledMma, atom_a: cute.CopyAtom, ma: cute.Tensor, atom_b: cute.CopyAtom, mb: cute.Tensor,
    mc: cute.Tensor, layout_a: cute.ComposedLayout, layout_b: cute.ComposedLayout,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    smem = memory.SmemAllocator()
    barrier = smem.allocate_array(cutlass.Int64, 1)
    sa = smem.allocate_tensor(HALF, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(HALF, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    ga = cute.local_tile(ma, (64, 64), (0, None))
    gb = cute.local_tile(mb, (64, 64), (0, None))
    one = cute.make_layout(1)
    tsa, tga = cpasync.tma_partition(atom_a, 0, one, cute.group_modes(sa, 0, 2), cute.group_modes(ga, 0, 2))
    tsb, tgb = cpasync.tma_partition(atom_b, 0, one, cute.group_modes(sb, 0, 2), cute.group_modes(gb, 0, 2))
    part = mma.get_slice(thread)
    cra = mma.make_fragment_A(part.partition_A(sa))
    crb = mma.make_fragment_B(part.partition_B(sb))
    target = part.partition_C(mc)
    acc = cute.make_rmem_tensor(target.shape, SINGLE)
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for tile in cutlass.range(cute.size(ga, mode=[2]), unroll=1):
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, 2 * 64 * 64 * 2)
            cute.copy(atom_a, tga[(None, tile)], tsa[(None, 0)], tma_bar_ptr=barrier)
            cute.copy(atom_b, tgb[(None, tile)], tsb[(None, 0)], tma_bar_ptr=barrier)
        cute.arch.mbarrier_wait(barrier, tile % 2)
        warpgroup.fence()
        for k in cutlass.range_constexpr(cute.size(cra, mode=[2])):
            cute.gemm(mma, acc, cra[(None, None, k, 0)], crb[(None, None, k, 0)], acc)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        cute.arch.sync_threads()
    cute.autovec_copy(acc, target)


@cute.jit
def hopper_gemm(a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, k: cutlass.Int32):
    """fp16 (64, k) by (64, k) with wgmma, TMA and one mbarrier."""
    ta = cute.make_tensor(a, cute.make_ordered_layout((64, cute.assume(k, 64)), order=(1, 0)))
    tb = cute.make_tensor(b, cute.make_ordered_layout((64, cute.assume(k, 64)), order=(1, 0)))
    tc = cute.make_tensor(c, cute.make_layout((64, 64), stride=(64, 1)))
    mma = hopper_helpers.make_trivial_tiled_mma(
        HALF, HALF, OperandMajorMode.K, OperandMajorMode.K, SINGLE, (1, 1, 1), (64, 64)
    )
    la = hopper_helpers.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (64, 64, 64), HALF, 1)
    lb = hopper_helpers.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (64, 64, 64), HALF, 1)
    load = cpasync.CopyBulkTensorTileG2SOp()
    info_a = cpasync.make_tiled_tma_atom(load, ta, cute.select(la, mode=[0, 1]), (64, 64))
    info_b = cpasync.make_tiled_tma_atom(load, tb, cute.select(lb, mode=[0, 1]), (64, 64))
    _hopper_kernel(mma, info_a.atom, info_a.tma_tensor, info_b.atom, info_b.tma_tensor, tc, la, lb).launch(
        grid=(1, 1, 1), block=(128, 1, 1)
    )


@cute.kernel
def _describe_kernel(atom: cute.CopyAtom, coordinates: cute.Tensor):
    cpasync.prefetch_descriptor(atom)


def describe(element, shape, stride, box, swizzle=None, internal=None, store=False):
    """A host function that makes one TMA descriptor, of a tile with the first dimension contiguous."""
    op = cpasync.CopyBulkTensorTileS2GOp() if store else cpasync.CopyBulkTensorTileG2SOp()

    @cute.jit
    def host(pointer: cute.Pointer):
        tensor = cute.make_tensor(pointer, cute.make_layout(shape, stride=stride))
        layout = cute.make_layout(box)
        if cutlass.const_expr(swizzle is not None):
            layout = cute.make_composed_layout(cute.make_swizzle(*swizzle), 0, layout)
        info = cpasync.make_tiled_tma_atom(op, tensor, layout, box, internal_type=internal)
        _describe_kernel(info.atom, info.tma_tensor).launch(grid=(1, 1, 1), block=(32, 1, 1))

    return host


def pointer(element, address=0x7F0000001000):
    """A pointer to memory that nothing touches."""
    return make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=128)


def launched(arch, function, *arguments):
    """The last launch of a host function compiled for an architecture."""
    with device(arch, executor=lambda launch: None) as gpu:
        cute.compile(function, *arguments)(*arguments)
        return gpu.launches[-1]


def ptx_of(arch, name):
    """The PTX of `scale`, `blackwell_gemm` or `hopper_gemm`."""
    if name == "scale":
        return launched(arch, scale, pointer(SINGLE), pointer(SINGLE), cutlass.Int32(300)).module.ptx
    gemm = {"blackwell_gemm": blackwell_gemm, "hopper_gemm": hopper_gemm}[name]
    return launched(arch, gemm, pointer(HALF), pointer(HALF), pointer(SINGLE), cutlass.Int32(256)).module.ptx
