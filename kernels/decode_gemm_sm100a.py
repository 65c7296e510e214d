"""The grouped GEMM of NVFP4 tensors for Blackwell where a group has few tokens: bound by reading the weights.

Operands are swapped: an MMA has 128 rows of weights as its M and the tokens as its N, see decode_mainloop.
Where there are fewer tiles than SMs, the CTAs of a cluster share the K of a tile and put their sums together
through shared memory, in a fixed order, see decode_exchange. Results therefore repeat bit for bit.

A persistent kernel of six warps in each CTA: one has operands loaded by TMA into a deep ring of stages, one
copies block scales to tensor memory and multiplies, four store, see decode_epilogue. There are two
accumulators, so that one tile is stored while the next one is multiplied. Which tile is next, each warp finds
for itself from offsets and sizes in global memory, see gemm_tiles.

The first letter of a tensor says where it is: m whole in global memory, g tiles of it, s shared memory, t
tensor memory, r registers.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, cute, memory, pipeline
from dsv4lab.kernels.decode_choice import Decode, fits, most_clusters, most_tiles
from dsv4lab.kernels.decode_epilogue import Outputs, store_tiles
from dsv4lab.kernels.decode_exchange import WARPS, Exchange, arrivals, parts_layout
from dsv4lab.kernels.decode_form import FEATURES, Form
from dsv4lab.kernels.decode_mainloop import (
    CODE,
    SCALE,
    SUM,
    Operands,
    load_tiles,
    multiply_tiles,
    operands,
    tiled_mma,
)
from dsv4lab.kernels.gemm_epilogue import Factors, factors_of
from dsv4lab.kernels.gemm_tiles import Work, work_of
from dsv4lab.kernels.launch import launch
from dsv4lab.kernels.quantize_plan import sm_count

MULTIPLIER, LOADER = WARPS, WARPS + 1
THREADS = 32 * (WARPS + 2)


@cute.kernel
def _kernel(
    form: cutlass.Constexpr[Form], mma: cute.TiledMma, given: Operands, work: Work, factors: Factors,
    out: Outputs, k: Int32,
):  # fmt: skip
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    first, step, rank = block // form.split, blocks // form.split, block % form.split

    smem = memory.SmemAllocator()
    ring_barriers = smem.allocate_array(cutlass.Int64, 2 * form.stages)
    result_barriers = smem.allocate_array(cutlass.Int64, 2 * 2)
    exchange_barriers = smem.allocate_array(cutlass.Int64, 2)
    address = smem.allocate_array(Int32, 1)
    s_weights, s_tokens, s_weight_scales, s_token_scales = given.layouts
    # A swizzle repeats every 1024 bytes, and counts them from address 0.
    s_weights = smem.allocate_tensor(CODE, s_weights.outer, 1024, swizzle=s_weights.inner)
    s_tokens = smem.allocate_tensor(CODE, s_tokens.outer, 1024, swizzle=s_tokens.inner)
    s_weight_scales = smem.allocate_tensor(SCALE, s_weight_scales, 128)
    s_token_scales = smem.allocate_tensor(SCALE, s_token_scales, 128)
    s_tensors = [s_weights, s_tokens, s_weight_scales, s_token_scales]
    s_parts = smem.allocate_tensor(SUM, parts_layout(form), 128)
    exchange = Exchange(s_parts, exchange_barriers, exchange_barriers + 1)

    if warp == 0:
        with cute.arch.elect_one():
            cute.arch.mbarrier_init(exchange.filled, arrivals(form))
            cute.arch.mbarrier_init(exchange.taken, arrivals(form))
    one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    ring = pipeline.PipelineTmaUmma.create(
        num_stages=form.stages, producer_group=one, consumer_group=one, tx_count=form.stage_bytes,
        barrier_storage=ring_barriers, defer_sync=True,
    )  # fmt: skip
    storing = pipeline.CooperativeGroup(pipeline.Agent.Thread, WARPS)
    results = pipeline.PipelineUmmaAsync.create(
        num_stages=2, producer_group=one, consumer_group=storing, barrier_storage=result_barriers,
        defer_sync=True,
    )  # fmt: skip
    cute.arch.mbarrier_init_fence()
    if cutlass.const_expr(form.split > 1):
        # Others may arrive here from now on.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    tmem = memory.TmemAllocator(
        address, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS)
    )
    t_base = tmem.reserve(form.tensor_columns).base_ptr
    layout = mma.make_fragment_C(cute.append(mma.partition_shape_C(form.tile[:2]), 2)).layout
    t_sums = cute.make_tensor(cute.recast_ptr(t_base, dtype=SUM), layout)

    if warp == LOADER:
        load_tiles(form, work, first, step, rank, mma, given, s_tensors, ring, k)
    elif warp == MULTIPLIER:
        multiply_tiles(form, work, first, step, rank, mma, s_tensors, t_sums, t_base, ring, results, k)
    else:
        store_tiles(form, work, first, step, rank, t_sums, results, exchange, factors, out)
    cute.arch.sync_threads()
    tmem.relinquish_alloc_permit()
    tmem.free(t_base)
    if cutlass.const_expr(form.split > 1):
        # Nobody leaves while another one may still arrive here.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


_kernel.set_name_prefix("decode_gemm", remove_cutlass_symbol=True, keep_mangled_name=False)


def make(form: Form):
    """The host function of a kernel."""

    @cute.jit
    def gemm(
        a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer, g_a: cute.Pointer,
        g_b: cute.Pointer, offsets: cute.Pointer, sizes: cute.Pointer, values: cute.Pointer,
        scales: cute.Pointer, g: cute.Pointer, rows: Int32, n: Int32, k: Int32, groups: Int32, a_row: Int32,
        a_group: Int32, b_group: Int32, limit: Float32, clusters: Int32, stream: CUstream,
    ):  # fmt: skip
        mma = tiled_mma(form)
        n = cute.assume(n, 8)
        given = operands(form, mma, [a, b, sfa, sfb], rows, n, k, groups)
        work = work_of(offsets, sizes, rows, groups, cute.ceil_div(n, FEATURES))
        factors = factors_of(g_a, g_b, a_row, a_group, b_group, limit)
        out = Outputs(
            values, cute.recast_ptr(scales, dtype=cutlass.Uint8), cute.recast_ptr(g, dtype=Float32), n
        )
        _kernel(form, mma, given, work, factors, out, k).launch(
            grid=(clusters * form.split, 1, 1), block=(THREADS, 1, 1), cluster=(form.split, 1, 1),
            stream=stream,
        )  # fmt: skip

    return gemm


def run(product, output, choice: Decode) -> None:
    """Launch the kernel.

    Args:
        product, output: operands and what becomes of the sums, see gemm.Product and gemm.Output.

    Raises:
        ValueError: there are fewer steps of K than CTAs to share them.
    """
    if not fits(choice, product.k):
        raise ValueError(f"{choice.split} CTAs cannot share K = {product.k}, which is less than 256 for each")
    form = Form(
        choice.tokens, choice.split, product.offsets is not None, output.kind, product.column_scale,
        output.limit is not None, output.swizzled,
    )  # fmt: skip
    clusters = min(
        most_clusters(choice, sm_count(product.a.device)), most_tiles(choice, product.rows, product.n)
    )
    launch(make, (form,), [*product.arguments, *output.targets, *product.numbers, output.bound, clusters])
