"""A GEMM of NVFP4 tensors for Blackwell (sm_100a), as short as an honest one can be: for reading.

Each CTA of four warps computes a 128 x 128 tile of C and goes through K in steps of 256:

- warp 0 asks TMA for four boxes a step: codes and block scales of A and of B. They land in shared memory, in
  one of a few buffers or stages, and `full[stage]` counts their bytes;
- warp 1 waits for `full`, copies the scales on to tensor memory, where MMAs want them, and issues four MMAs
  of K = 64. `empty[stage]` hears when the buffer has been read, `done` when all has been multiplied;
- all four warps wait for `done` and carry the sums from tensor memory through registers to C.

The first letter of a tensor says where it is: m whole in global memory, g this CTA's tiles of it, s shared
memory, t tensor memory, r registers. A fast kernel has tiles of two CTAs, and a loop over them in which the
stores of one overlap the MMAs of the next.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
import torch
from cuda.bindings.driver import CUstream
from cutlass import cute, memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout

from dsv4lab.formats import BLOCK, NVFP4Tensor
from dsv4lab.layouts import with_scale_layout

from .launch import As, launch

TILE = (128, 128, 256)  # rows and columns of C, and K of a stage
COLUMNS, SFA_COLUMN, SFB_COLUMN = 256, 128, 144  # of tensor memory: 128 of sums, 16 and 16 of scales
CODE, SCALE, SUM, OUT = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32, cutlass.BFloat16


@cute.jit
def scales_copy(s_scales: cute.Tensor, t_scales: cute.Tensor):
    """A `tcgen05.cp` of scales to all four quarters of tensor memory's lanes, its source and its target."""
    # That 16 values share a scale is a stride of 0 in these layouts, which a copy must not follow.
    s_scales, t_scales = cute.filter_zeros(s_scales), cute.filter_zeros(t_scales)
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), SCALE)
    copy = tcgen05.make_s2t_copy(atom, t_scales)
    source = tcgen05.get_s2t_smem_desc_tensor(copy, copy.get_slice(0).partition_S(s_scales))
    return copy, source, copy.get_slice(0).partition_D(t_scales)


@cute.kernel
def _kernel(
    mma: cute.TiledMma, loads: list, sources: list, layouts: list, m_c: cute.Tensor, m_scale: cute.Tensor
):
    (thread, _, _), (m, n, _) = cute.arch.thread_idx(), cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    boxes = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
    nbytes = sum(cute.size_in_bytes(CODE if i < 2 else SCALE, box) for i, box in enumerate(boxes))
    stages, smem = layouts[2].shape[3], memory.SmemAllocator()
    full = smem.allocate_array(cutlass.Int64, stages)
    empty = smem.allocate_array(cutlass.Int64, stages)
    done = smem.allocate_array(cutlass.Int64, 1)
    address = smem.allocate_array(cutlass.Int32, 1)
    # A swizzle repeats every 1024 bytes, and counts them from address 0.
    s_a = smem.allocate_tensor(CODE, layouts[0].outer, 1024, swizzle=layouts[0].inner)
    s_b = smem.allocate_tensor(CODE, layouts[1].outer, 1024, swizzle=layouts[1].inner)
    s_sfa = smem.allocate_tensor(SCALE, layouts[2], 128)
    s_sfb = smem.allocate_tensor(SCALE, layouts[3], 128)

    if warp == 0:
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + stage, 1)
                cute.arch.mbarrier_init(empty + stage, 1)
            cute.arch.mbarrier_init(done, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.alloc_tmem(COLUMNS, address)
        cute.arch.relinquish_tmem_alloc_permit()
    cute.arch.sync_threads()

    t_pointer = cute.arch.retrieve_tmem_ptr(SUM, 16, address)
    t_sums = cute.make_tensor(t_pointer, mma.make_fragment_C(mma.partition_shape_C(TILE[:2])).layout)
    layout = blockscaled_layout.make_tmem_layout_sfa(mma, TILE, BLOCK, boxes[2])
    t_sfa = cute.make_tensor(cute.recast_ptr(t_pointer + SFA_COLUMN, dtype=SCALE), layout)
    layout = blockscaled_layout.make_tmem_layout_sfb(mma, TILE, BLOCK, boxes[3])
    t_sfb = cute.make_tensor(cute.recast_ptr(t_pointer + SFB_COLUMN, dtype=SCALE), layout)
    # This CTA's boxes (box, step of K) and the buffers for them (box, stage).
    mine, buffers = [], []
    for i, s_tensor in enumerate((s_a, s_b, s_sfa, s_sfb)):
        place = (n if i % 2 else m, None, *(() if i < 2 else (0,)))
        g_tiles = cute.local_tile(sources[i], (TILE[i % 2], TILE[2]), place)
        g_tiles = mma.get_slice(0).partition_B(g_tiles) if i % 2 else mma.get_slice(0).partition_A(g_tiles)
        pair = cute.group_modes(s_tensor, 0, 3), cute.group_modes(g_tiles, 0, 3)
        pair = cpasync.tma_partition(loads[i], 0, cute.make_layout(1), *pair)
        buffers.append(cute.filter_zeros(pair[0]))
        mine.append(cute.filter_zeros(pair[1]))
    steps = cute.size(mine[0], mode=[1])

    if warp == 0:
        for k in cutlass.range(steps, unroll=1):
            stage, lap = k % stages, k // stages
            # Phases of a barrier are 0, 1, 0, ...; before the first one, waiting for 1 does not wait.
            cute.arch.mbarrier_wait(empty + stage, (lap + 1) % 2)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, nbytes)
            for i in cutlass.range_constexpr(4):
                cute.copy(loads[i], mine[i][None, k], buffers[i][None, stage], tma_bar_ptr=full + stage)

    if warp == 1:
        # No data in these "registers": descriptors of what is where in shared memory.
        r_a, r_b = mma.make_fragment_A(s_a), mma.make_fragment_B(s_b)
        copy_sfa, from_sfa, to_sfa = scales_copy(s_sfa, t_sfa)
        copy_sfb, from_sfb, to_sfb = scales_copy(s_sfb, t_sfb)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for k in cutlass.range(steps, unroll=1):
            stage, lap = k % stages, k // stages
            cute.arch.mbarrier_wait(full + stage, lap % 2)
            cute.copy(copy_sfa, from_sfa[None, None, None, None, stage], to_sfa)
            cute.copy(copy_sfb, from_sfb[None, None, None, None, stage], to_sfb)
            for i in cutlass.range_constexpr(cute.size(r_a, mode=[2])):
                mma.set(tcgen05.Field.SFA, t_sfa[None, None, i].iterator)
                mma.set(tcgen05.Field.SFB, t_sfb[None, None, i].iterator)
                cute.gemm(mma, t_sums, r_a[None, None, i, stage], r_b[None, None, i, stage], t_sums)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            with cute.arch.elect_one():
                tcgen05.commit(empty + stage)
        with cute.arch.elect_one():
            tcgen05.commit(done)

    # Lane i of tensor memory holds row i of the tile, and each warp can read 32 lanes: those of its threads.
    cute.arch.mbarrier_wait(done, 0)
    sums, op = t_sums[(None, None), 0, 0], tcgen05.Ld32x32bOp(tcgen05.Repetition.x32)
    load = tcgen05.make_tmem_copy(cute.make_copy_atom(op, SUM), sums)
    own, g_c = load.get_slice(thread), cute.local_tile(m_c, TILE[:2], (m, n))
    t_part, g_part = own.partition_S(sums), own.partition_D(g_c)
    r_sums = cute.make_rmem_tensor(g_part[None, None, 0].shape, SUM)
    r_c = cute.make_rmem_tensor(r_sums.shape, OUT)
    for i in cutlass.range(cute.size(t_part, mode=[2]), unroll=1):
        cute.copy(load, t_part[None, None, i], r_sums)
        cute.arch.fence_view_async_tmem_load()
        r_c.store((r_sums.load() * m_scale[0]).to(OUT))
        if m * TILE[0] + thread < m_c.shape[0]:
            cute.autovec_copy(r_c, g_part[None, None, i])
    # Nobody reads any more what is given back.
    cute.arch.sync_threads()
    if warp == 0:
        cute.arch.dealloc_tmem(t_pointer, COLUMNS)


_kernel.set_name_prefix("nvfp4_tile_gemm", remove_cutlass_symbol=True, keep_mangled_name=False)


def make(stages: int):
    """The host function of a kernel with so many stages."""

    @cute.jit
    def gemm(
        a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer, scale: cute.Pointer,
        c: cute.Pointer, rows: cutlass.Int32, columns: cutlass.Int32, depth: cutlass.Int32, stream: CUstream,
    ):  # fmt: skip
        # TMA wants rows of whole 16 bytes, which are 32 codes.
        columns, depth = cute.assume(columns, TILE[1]), cute.assume(depth, 32)
        mma = blackwell_helpers.make_blockscaled_trivial_tiled_mma(
            CODE, CODE, OperandMajorMode.K, OperandMajorMode.K, SCALE, BLOCK, tcgen05.CtaGroup.ONE, TILE[:2]
        )
        codes = (blackwell_helpers.make_smem_layout_a, blackwell_helpers.make_smem_layout_b)
        scales = (blockscaled_layout.make_smem_layout_sfa, blockscaled_layout.make_smem_layout_sfb)
        layouts = [layout(mma, TILE, CODE, stages) for layout in codes]
        layouts += [layout(mma, TILE, BLOCK, stages) for layout in scales]
        # Scales lie in chunks of 128 rows by 4, see dsv4lab.layouts. TMA takes them for 16-bit words, since
        # of single bytes its box would be too long.
        load_op = cpasync.CopyBulkTensorTileG2SOp()
        loads, sources, shapes = [], [], [(size, depth, 1) for size in (rows, columns)]
        flat = [cute.make_layout(shape[:2], stride=(depth, 1)) for shape in shapes]
        flat += [blockscaled_layout.tile_atom_to_shape_SF(shape, BLOCK) for shape in shapes]
        for i, (pointer, layout) in enumerate(zip((a, b, sfa, sfb), flat, strict=True)):
            box = cute.slice_(layouts[i], (None, None, None, 0))
            make_load = cute.nvgpu.make_tiled_tma_atom_B if i % 2 else cute.nvgpu.make_tiled_tma_atom_A
            m_tensor, words = cute.make_tensor(pointer, layout), cutlass.Int16 if i >= 2 else None
            load = make_load(load_op, m_tensor, box, TILE, mma, (1, 1, 1, 1), internal_type=words)
            loads.append(load.atom)
            sources.append(load.tma_tensor)
        m_c = cute.make_tensor(c, cute.make_layout((rows, columns), stride=(columns, 1)))
        kernel = _kernel(mma, loads, sources, layouts, m_c, cute.make_tensor(scale, cute.make_layout(1)))
        grid = cute.ceil_div((rows, columns, 1), (*TILE[:2], 1))
        kernel.launch(grid=grid, block=(128, 1, 1), stream=stream)

    return gemm


def nvfp4_tile_gemm(a: NVFP4Tensor, b: NVFP4Tensor, stages: int = 2) -> torch.Tensor:
    """The product a b^T as (M, N) bf16, rounded once.

    Args:
        a, b: (M, K) and (N, K) with one global scale each; K % 32 == 0, N % 128 == 0.
        stages: buffers in shared memory, 1 to 6.
    """
    shapes = len(a.shape) == len(b.shape) == 2 and a.K == b.K and a.K % 32 == b.rows % TILE[1] == 0
    if not (shapes and a.granularity == b.granularity == "tensor"):
        raise ValueError(f"a and b do not fit, or have several global scales: {a.shape}, {b.shape}")
    c = torch.empty(a.rows, b.rows, dtype=torch.bfloat16, device=a.device)
    scales = [with_scale_layout(t, "swizzled").block_scales for t in (a, b)]
    tensors = (As(a.codes, CODE), As(b.codes, CODE), *scales, (a.global_scale * b.global_scale).view(1), c)
    launch(make, (stages,), (*tensors, a.rows, b.rows, a.K))
    return c
