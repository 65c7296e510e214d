"""Kernels that do one block of MMAs on operands that lie in shared memory as the test has laid them there."""

# No annotations from __future__: cute.struct reads them as types.
import ast
from dataclasses import dataclass, field
from typing import Any

import cutlass
import numpy as np
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05
from cutlass.cute.runtime import make_ptr
from cutlass.utils import blackwell_helpers, blockscaled_layout

from dsv4lab.emulator import device

K, MN = OperandMajorMode.K, OperandMajorMode.MN
GROUPS = {1: tcgen05.CtaGroup.ONE, 2: tcgen05.CtaGroup.TWO}
WORDS = 32768  # of 32 bits, room for one operand of one CTA
ONE_STAGE = (None, None, None, 0)


@cute.struct
class _Storage:
    done: cute.struct.MemRange[cutlass.Int64, 1]


@dataclass
class Case:
    """D = A B^T over a few steps of K, by CuTe's own descriptors.

    Attributes:
        a, b, d: element types.
        shape: (M, N) of the MMA.
        steps: MMAs along K.
        group: CTAs of an MMA.
        majors: of A and B.
        scale: type of the scales, None for a kind without.
        block: values that share a scale.
        layouts: CuTe's layouts of "a", "b", "sfa", "sfb" as text, once the kernel has been traced.
    """

    a: Any
    b: Any
    d: Any
    shape: tuple[int, int]
    steps: int = 2
    group: int = 1
    majors: tuple[Any, Any] = (K, K)
    scale: Any = None
    block: int = 0
    layouts: dict[str, str] = field(default_factory=dict)

    def mma(self):
        """The tiled MMA."""
        group = GROUPS[self.group]
        if self.scale is None:
            return blackwell_helpers.make_trivial_tiled_mma(
                self.a, self.b, *self.majors, self.d, group, self.shape
            )
        return blackwell_helpers.make_blockscaled_trivial_tiled_mma(
            self.a, self.b, *self.majors, self.scale, self.block, group, self.shape
        )

    def kernel(self):
        """The kernel: copies operands to shared memory word by word, multiplies, stores tensor memory."""
        case = self

        @cute.jit
        def fill(target: cute.Tensor, source: cute.Tensor, size: cutlass.Constexpr, thread, rank):
            words = cute.make_tensor(
                cute.recast_ptr(target.iterator, dtype=cutlass.Int32), cute.make_layout(size // 4)
            )
            for i in cutlass.range(thread, size // 4, 128, unroll=1):
                words[i] = source[i, rank]

        @cute.jit
        def copy_scales(source: cute.Tensor, target: cute.Tensor):
            compact, tensor = cute.filter_zeros(source), cute.filter_zeros(target)
            atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(GROUPS[case.group]), case.scale)
            copy = tcgen05.make_s2t_copy(atom, tensor)
            mine = copy.get_slice(0)
            from_shared = tcgen05.get_s2t_smem_desc_tensor(copy, mine.partition_S(compact))
            cute.copy(copy, from_shared[(None, None, None, None, 0)], mine.partition_D(tensor))

        @cute.kernel
        def kernel(
            mma: cute.TiledMma, ga: cute.Tensor, gb: cute.Tensor, gsa: cute.Tensor, gsb: cute.Tensor,
            gd: cute.Tensor, la: cute.ComposedLayout, lb: cute.ComposedLayout, lsa: cute.Layout,
            lsb: cute.Layout, lta: cute.Layout, ltb: cute.Layout,
        ):  # fmt: skip
            thread, _, _ = cute.arch.thread_idx()
            warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
            smem = memory.SmemAllocator()
            storage = smem.allocate(_Storage)
            sa = smem.allocate_tensor(case.a, la.outer, byte_alignment=1024, swizzle=la.inner)
            sb = smem.allocate_tensor(case.b, lb.outer, byte_alignment=1024, swizzle=lb.inner)
            barrier = pipeline.NamedBarrier(barrier_id=1, num_threads=128)
            tmem = memory.TmemAllocator(barrier_for_retrieve=barrier, is_two_cta=case.group == 2)
            tmem.allocate(512)
            tmem.wait_for_alloc()
            pointer = tmem.retrieve_ptr(case.d)
            acc = mma.make_fragment_C(mma.partition_shape_C(case.shape))
            acc = cute.make_tensor(pointer, acc.layout)
            cra, crb = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
            if thread == 0:
                cute.arch.mbarrier_init(storage.done.data_ptr(), 1)
                cute.arch.mbarrier_init_fence()
            fill(sa, ga, cute.size_in_bytes(case.a, la), thread, rank)
            fill(sb, gb, cute.size_in_bytes(case.b, lb), thread, rank)
            if cutlass.const_expr(case.scale is not None):
                ssa = smem.allocate_tensor(case.scale, lsa, byte_alignment=128)
                ssb = smem.allocate_tensor(case.scale, lsb, byte_alignment=128)
                fill(ssa, gsa, cute.cosize(lsa), thread, rank)
                fill(ssb, gsb, cute.cosize(lsb), thread, rank)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_threads()
            if cutlass.const_expr(case.group == 2):
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()
            if warp == 0 and rank == 0:
                if cutlass.const_expr(case.scale is not None):
                    ta = cute.make_tensor(cute.recast_ptr(pointer + 256, dtype=case.scale), lta)
                    tb = cute.make_tensor(cute.recast_ptr(pointer + 320, dtype=case.scale), ltb)
                    copy_scales(ssa, ta)
                    copy_scales(ssb, tb)
                mma.set(tcgen05.Field.ACCUMULATE, False)
                for k in cutlass.range_constexpr(cute.size(cra, mode=[2])):
                    if cutlass.const_expr(case.scale is not None):
                        mma.set(tcgen05.Field.SFA, ta[(None, None, k)].iterator)
                        mma.set(tcgen05.Field.SFB, tb[(None, None, k)].iterator)
                    cute.gemm(mma, acc, cra[(None, None, k, 0)], crb[(None, None, k, 0)], acc)
                    mma.set(tcgen05.Field.ACCUMULATE, True)
                with cute.arch.elect_one():
                    if cutlass.const_expr(case.group == 2):
                        tcgen05.commit(storage.done.data_ptr(), 3, GROUPS[2])
                    else:
                        tcgen05.commit(storage.done.data_ptr(), None, GROUPS[1])
            tmem.relinquish_alloc_permit()
            cute.arch.mbarrier_wait(storage.done.data_ptr(), 0)
            columns = case.shape[1]
            if cutlass.const_expr(case.group == 2 and case.shape[0] == 128):
                columns = columns // 2
            layout = cute.make_layout((128, columns), stride=(65536, 1))
            if cutlass.const_expr(case.shape[0] // case.group == 64 and case.group == 1):
                # Only 16 lanes of each 32 hold a row.
                layout = acc[((None, None), 0, 0)].layout
                op = tcgen05.Ld16x256bOp(tcgen05.Repetition.x1, tcgen05.Pack.NONE)
            else:
                op = tcgen05.Ld32x32bOp(tcgen05.Repetition.x8, tcgen05.Pack.NONE)
            lanes = cute.make_tensor(cute.recast_ptr(pointer, dtype=cutlass.Int32), layout)
            copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, cutlass.Int32), lanes)
            mine = copy.get_slice(thread)
            source, target = mine.partition_S(lanes), mine.partition_D(gd[(None, None, rank)])
            registers = cute.make_rmem_tensor(target[None, None, 0].shape, cutlass.Int32)
            for i in cutlass.range_constexpr(cute.size(source, mode=[2])):
                cute.copy(copy, source[None, None, i], registers)
                cute.autovec_copy(registers, target[None, None, i])
            if cutlass.const_expr(case.group == 2):
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()
            tmem.free(pointer)

        return kernel

    def host(self):
        """The host function of (A, B, scales of A, scales of B, D), pointers to int32 words."""
        case, kernel = self, self.kernel()

        @cute.jit
        def host(a: cute.Pointer, b: cute.Pointer, sa: cute.Pointer, sb: cute.Pointer, d: cute.Pointer):
            mma = case.mma()
            tiler = (*case.shape, mma.shape_mnk[2] * case.steps)
            la = blackwell_helpers.make_smem_layout_a(mma, tiler, case.a, 1)
            lb = blackwell_helpers.make_smem_layout_b(mma, tiler, case.b, 1)
            lsa = lsb = lta = ltb = cute.make_layout(1)
            if cutlass.const_expr(case.scale is not None):
                lsa = blockscaled_layout.make_smem_layout_sfa(mma, tiler, case.block, 1)
                lsb = blockscaled_layout.make_smem_layout_sfb(mma, tiler, case.block, 1)
                lta = blockscaled_layout.make_tmem_layout_sfa(
                    mma, tiler, case.block, cute.slice_(lsa, ONE_STAGE)
                )
                ltb = blockscaled_layout.make_tmem_layout_sfb(
                    mma, tiler, case.block, cute.slice_(lsb, ONE_STAGE)
                )
            case.layouts.update(a=str(la), b=str(lb), sfa=str(lsa), sfb=str(lsb))
            rows, columns = case.shape[0] if case.shape[0] == 64 else 128, case.shape[1]
            if cutlass.const_expr(case.group == 2 and case.shape[0] == 128):
                columns = columns // 2
            gd = cute.make_tensor(
                d, cute.make_layout((rows, columns, 2), stride=(columns, 1, 128 * case.shape[1]))
            )
            words = cute.make_layout((WORDS, 2))
            kernel(
                mma, *(cute.make_tensor(p, words) for p in (a, b, sa, sb)), gd, la, lb, lsa, lsb, lta, ltb
            ).launch(grid=(case.group, 1, 1), block=(128, 1, 1), cluster=(case.group, 1, 1))  # fmt: skip

        return host


def pointer(element, address):
    """A pointer to global memory."""
    return make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=128)


def accumulator_layouts():
    """CuTe's layouts of accumulators and of A in tensor memory as text, by (M, N, CTAs)."""
    found = {}

    @cute.jit
    def trace(unused: cutlass.Int32):
        for group, m in ((1, 64), (1, 128), (2, 128), (2, 256)):
            for n in (32, 256):
                op = tcgen05.MmaF16BF16Op(
                    cutlass.Float16, cutlass.Float32, (m, n, 16), GROUPS[group],
                    tcgen05.OperandSource.TMEM, K, K,
                )  # fmt: skip
                mma = cute.make_tiled_mma(op)
                acc = mma.make_fragment_C(mma.partition_shape_C((m, n)))
                found[m, n, group] = str(acc.layout)

    with device("sm_100a", executor=lambda launch: None):
        cute.compile(trace, cutlass.Int32(1))
    return found


def scale_layouts():
    """CuTe's layouts of the scales of A and B in tensor memory as text, by (block, K, M, N, CTAs)."""
    found = {}
    kinds = (
        (cutlass.Float8E4M3FN, 16, cutlass.Float4E2M1FN),
        (cutlass.Float8E8M0FNU, 32, cutlass.Float4E2M1FN),
        (cutlass.Float8E8M0FNU, 32, cutlass.Float8E4M3FN),
    )

    @cute.jit
    def trace(unused: cutlass.Int32):
        for scale, block, element in kinds:
            for group, m in ((1, 128), (2, 128), (2, 256)):
                for n in (64, 256):
                    mma = blackwell_helpers.make_blockscaled_trivial_tiled_mma(
                        element, element, K, K, scale, block, GROUPS[group], (m, n)
                    )
                    k = mma.shape_mnk[2]
                    rest = (mma, (m, n, 4 * k), block)
                    sa = blockscaled_layout.make_smem_layout_sfa(*rest, 1)
                    sb = blockscaled_layout.make_smem_layout_sfb(*rest, 1)
                    ta = blockscaled_layout.make_tmem_layout_sfa(*rest, cute.slice_(sa, ONE_STAGE))
                    tb = blockscaled_layout.make_tmem_layout_sfb(*rest, cute.slice_(sb, ONE_STAGE))
                    found[block, k, m, n, group] = str(ta), str(tb)

    with device("sm_100a", executor=lambda launch: None):
        cute.compile(trace, cutlass.Int32(1))
    return found


def fragment_layouts():
    """CuTe's layouts (lane, value) of tcgen05.ld as text, by (shape, repeat, packed)."""
    ops = {"16x64b": "Ld16x64bOp", "16x128b": "Ld16x128bOp", "16x256b": "Ld16x256bOp",
           "16x32bx2": "Ld16x32bx2Op", "32x32b": "Ld32x32bOp"}  # fmt: skip
    found = {}

    @cute.jit
    def trace(unused: cutlass.Int32):
        for shape, name in ops.items():
            for repeat in (1, 4, 16):
                for packed in (False, True):
                    pack = tcgen05.Pack.PACK_16b_IN_32b if packed else tcgen05.Pack.NONE
                    op = getattr(tcgen05, name)(tcgen05.Repetition(repeat), pack)
                    element = cutlass.Float16 if packed else cutlass.Float32
                    atom = cute.make_copy_atom(op, element)
                    found[shape, repeat, packed] = str(atom.layout_dst_tv)

    with device("sm_100a", executor=lambda launch: None):
        cute.compile(trace, cutlass.Int32(1))
    return found


def table(text):
    """Offsets of a CuTe layout given as text, an array with one axis for each of its modes."""
    shape, stride = (ast.literal_eval(part) for part in text.split(":"))
    offsets = np.zeros((), np.int64)
    for mode in zip(shape, stride, strict=True):
        offsets = offsets[..., None] + _mode(*mode)
    return offsets


def _mode(shape, stride):
    if isinstance(shape, int):
        return np.arange(shape) * stride
    offsets = np.zeros(1, np.int64)
    for part in zip(shape, stride, strict=True):
        # The first of nested modes runs fastest.
        offsets = (offsets[None, :] + _mode(*part)[:, None]).reshape(-1)
    return offsets
