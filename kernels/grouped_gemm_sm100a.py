"""The grouped GEMM of NVFP4 tensors for Blackwell: activations of many groups, each with weights of its own.

A persistent kernel of six warps in each CTA. One has operands loaded by TMA into a ring of stages, one copies
block scales to tensor memory and multiplies, four store: see gemm_mainloop and gemm_epilogue. There are two
accumulators, so that one tile is stored while the next one is multiplied. Which tile is next, each warp finds
for itself from offsets and sizes in global memory: see gemm_tiles.

The first letter of a tensor says where it is: m whole in global memory, g tiles of it, s shared memory, t
tensor memory, r registers.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, cute, memory, pipeline
from dsv4lab.kernels.gemm_epilogue import OUT, Factors, Stored, factors_of, store_tiles, stored
from dsv4lab.kernels.gemm_form import TENSOR_COLUMNS, Form
from dsv4lab.kernels.gemm_mainloop import (
    CODE,
    SCALE,
    SUM,
    Operands,
    cluster_layout,
    load_tiles,
    multiply_tiles,
    operands,
    tiled_mma,
)
from dsv4lab.kernels.gemm_quantize import WARPS, Quantized
from dsv4lab.kernels.gemm_tiles import Work, work_of

from dsv4lab.formats import BLOCK

MULTIPLIER, LOADER = WARPS, WARPS + 1
THREADS = 32 * (WARPS + 2)


@cute.kernel
def _kernel(
    form: cutlass.Constexpr[Form], mma: cute.TiledMma, given: Operands, work: Work, factors: Factors,
    out: Stored | Quantized, n: Int32, k: Int32,
):  # fmt: skip
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    first, step, half = block // form.ctas, blocks // form.ctas, block % form.ctas

    smem = memory.SmemAllocator()
    ring_barriers = smem.allocate_array(cutlass.Int64, 2 * form.stages)
    result_barriers = smem.allocate_array(cutlass.Int64, 2 * 2)
    free_barrier = smem.allocate_array(cutlass.Int64, 1)
    address = smem.allocate_array(Int32, 1)
    s_a, s_b, s_sfa, s_sfb = given.layouts
    # A swizzle repeats every 1024 bytes, and counts them from address 0.
    s_a = smem.allocate_tensor(CODE, s_a.outer, 1024, swizzle=s_a.inner)
    s_b = smem.allocate_tensor(CODE, s_b.outer, 1024, swizzle=s_b.inner)
    s_out = None
    if cutlass.const_expr(form.output != "nvfp4"):
        s_out = smem.allocate_tensor(OUT, out.layout.outer, 1024, swizzle=out.layout.inner)
    s_sfa = smem.allocate_tensor(SCALE, s_sfa, 128)
    s_sfb = smem.allocate_tensor(SCALE, s_sfb, 128)
    s_tensors = [s_a, s_b, s_sfa, s_sfb]

    # Before the pipelines, which wait for the other CTA: its barrier must be there when that one leaves.
    tmem = memory.TmemAllocator(
        address, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS),
        is_two_cta=form.ctas == 2, two_cta_tmem_dealloc_mbar_ptr=free_barrier,
    )  # fmt: skip
    cluster = cluster_layout(form, mma)
    one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    ring = pipeline.PipelineTmaUmma.create(
        num_stages=form.stages, producer_group=one, consumer_group=one,
        tx_count=form.stage_bytes * form.ctas, barrier_storage=ring_barriers, cta_layout_vmnk=cluster,
    )  # fmt: skip
    storing = pipeline.CooperativeGroup(pipeline.Agent.Thread, WARPS * form.ctas)
    results = pipeline.PipelineUmmaAsync.create(
        num_stages=1 if form.overlaps else 2, producer_group=one, consumer_group=storing,
        barrier_storage=result_barriers, cta_layout_vmnk=cluster,
    )  # fmt: skip
    t_base = tmem.reserve(TENSOR_COLUMNS).base_ptr
    layout = mma.make_fragment_C(mma.partition_shape_C((form.rows, form.columns))).layout
    layout = cute.append(layout, cute.make_layout(2, stride=form.accumulator_columns))
    t_sums = cute.make_tensor(cute.recast_ptr(t_base, dtype=SUM), layout)

    if warp == LOADER:
        load_tiles(form, work, first, step, half, mma, given, s_tensors, ring, k)
    elif warp == MULTIPLIER:
        if half == 0:
            multiply_tiles(form, work, first, step, mma, s_tensors, t_sums, t_base, ring, results, k)
    else:
        store_tiles(form, work, first, step, half, t_sums, results, factors, out, s_out, n)
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(t_base)


_kernel.set_name_prefix("grouped_gemm", remove_cutlass_symbol=True, keep_mangled_name=False)


def make(form: Form):
    """The host function of a kernel."""

    @cute.jit
    def gemm(
        a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer, g_a: cute.Pointer,
        g_b: cute.Pointer, offsets: cute.Pointer, sizes: cute.Pointer, out: cute.Pointer,
        out_scales: cute.Pointer, g_out: cute.Pointer, rows: Int32, n: Int32, k: Int32, groups: Int32,
        a_row: Int32, a_group: Int32, b_group: Int32, limit: Float32, clusters: Int32, stream: CUstream,
    ):  # fmt: skip
        mma = tiled_mma(form)
        given = operands(form, mma, [a, b, sfa, sfb], rows, n, k, groups)
        work = work_of(offsets, sizes, rows, groups, cute.ceil_div(n, form.columns))
        factors = factors_of(g_a, g_b, a_row, a_group, b_group, limit)
        if cutlass.const_expr(form.output == "nvfp4"):
            columns = n // 2 // BLOCK
            target = Quantized(out, out_scales, cute.make_tensor(g_out, cute.make_layout(1)), columns)
        else:
            target = stored(form, out, rows, n if cutlass.const_expr(form.output == "bf16") else n // 2)
        kernel = _kernel(form, mma, given, work, factors, target, n, k)
        kernel.launch(
            grid=(clusters * form.ctas, 1, 1), block=(THREADS, 1, 1), cluster=(form.ctas, 1, 1), stream=stream
        )

    return gemm
