"""The grouped GEMM for Hopper where a group has few tokens: bound by reading the weights.

Weights stay NVFP4 in memory and become bf16 in registers, exactly, see decode_sm90a_registers; rows of them
are the M of `mma.sync` and tokens its N. One warp of a CTA has weights brought by TMA into a ring of stages
that fills shared memory, the others multiply, each other steps of K, see decode_sm90a_mainloop. Sums of
warps, and of the CTAs of a cluster that share the K of a tile, are put together in a fixed order, see
decode_sm90a_epilogue. The grid is persistent: which tile is next, each warp finds for itself from offsets and
sizes in global memory, see gemm_tiles.

The first letter of a tensor says where it is: m whole in global memory, g tiles of it, s shared memory, r
registers.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, Uint32, cute, memory
from cutlass.cute.nvgpu import cpasync
from dsv4lab.kernels.decode_pads import clear_pads
from dsv4lab.kernels.decode_sm90a_choice import Decode, most_clusters, most_tiles
from dsv4lab.kernels.decode_sm90a_epilogue import Exchange, finish_tile
from dsv4lab.kernels.decode_sm90a_form import Form
from dsv4lab.kernels.decode_sm90a_mainloop import (
    Ring,
    Weights,
    load_tiles,
    multiply_tile,
    ring_layouts,
    share,
    weights_of,
)
from dsv4lab.kernels.decode_sm90a_store import Outputs
from dsv4lab.kernels.decode_sm90a_tokens import Tokens, token_tensor, tokens_of
from dsv4lab.kernels.gemm_epilogue import Factors, factors_of
from dsv4lab.kernels.gemm_tiles import Work, begin, find, work_of
from dsv4lab.kernels.launch import launch
from dsv4lab.kernels.quantize_plan import sm_count

from dsv4lab.formats import BLOCK


@cute.kernel
def _kernel(
    form: cutlass.Constexpr[Form], weights: Weights, tokens: Tokens, work: Work, factors: Factors,
    out: Outputs,
):  # fmt: skip
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    first, step, rank = block // form.split, blocks // form.split, block % form.split

    smem = memory.SmemAllocator()
    full = smem.allocate_array(cutlass.Int64, form.stages)
    empty = smem.allocate_array(cutlass.Int64, form.stages)
    filled, taken = smem.allocate_array(cutlass.Int64, 1), smem.allocate_array(cutlass.Int64, 1)
    # A swizzle repeats every 1024 bytes, and counts them from address 0.
    s_tokens = smem.allocate_tensor(Uint32, cute.make_layout(form.stages * form.token_bytes // 4), 1024)
    s_codes, s_scales = (smem.allocate_tensor(Uint32, layout, 128) for layout in ring_layouts(form))
    ring = Ring(s_codes, s_scales, token_tensor(form, s_tokens.iterator), s_tokens.iterator, full, empty)
    if cutlass.const_expr(form.overlays):
        sums = cute.recast_ptr(s_codes.iterator, dtype=Float32)
    else:
        sums = smem.allocate_array(Float32, form.sum_bytes // 4, byte_alignment=128)
    given = smem.allocate_array(Float32, max(form.given_bytes // 4, 1), byte_alignment=128)
    exchange = Exchange(sums, given, filled, taken)

    if warp == form.warps:
        for load in (weights.load_codes, weights.load_scales, tokens.load):
            cpasync.prefetch_descriptor(load)
        for i in cutlass.range(cute.arch.lane_idx(), form.stages, 32, unroll=1):
            cute.arch.mbarrier_init(full + i, 1)
            cute.arch.mbarrier_init(empty + i, form.across)
        with cute.arch.elect_one():
            cute.arch.mbarrier_init(filled, form.warps * form.split)
            cute.arch.mbarrier_init(taken, form.warps * form.split)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if cutlass.const_expr(form.split > 1):
        # Others may arrive here from now on.
        cute.arch.cluster_arrive()

    # What is above runs while the kernel before still does; nothing is read or written before that has ended.
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()
    if warp == form.warps:
        load_tiles(form, work, first, step, rank, weights, tokens, ring, out.n)
        if cutlass.const_expr(form.split > 1):
            cute.arch.cluster_wait()
    else:
        if cutlass.const_expr(form.split > 1):
            cute.arch.cluster_wait()
        if cutlass.const_expr(form.output == "nvfp4"):
            columns = out.n // 2 // BLOCK
            clear_pads(form, work, out.scales, columns, block * form.warps + warp, blocks * form.warps)
        begins, ends = share(form, rank, tokens.k)
        r_sums = cute.make_rmem_tensor((4, form.tokens // 8, form.mmas), Float32)
        tile, seen = find(work, form, begin(work, form), first)
        number, count = first, Int32(0)
        while tile.here:
            multiply_tile(form, tile, ring, tokens, begins, ends, count, r_sums)
            finish_tile(form, work, tile, rank, count % 2, r_sums, exchange, factors, out)
            count += 1
            number += step
            tile, seen = find(work, form, seen, number)
    if cutlass.const_expr(form.split > 1):
        # Nobody leaves while another one may still write or arrive here.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


_kernel.set_name_prefix("decode_gemm_sm90a", remove_cutlass_symbol=True, keep_mangled_name=False)


def make(form: Form):
    """The host function of a kernel."""

    @cute.jit
    def gemm(
        a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer, g_a: cute.Pointer,
        g_b: cute.Pointer, offsets: cute.Pointer, sizes: cute.Pointer, values: cute.Pointer,
        scales: cute.Pointer, g: cute.Pointer, rows: Int32, n: Int32, k: Int32, groups: Int32, a_row: Int32,
        a_group: Int32, b_group: Int32, limit: Float32, clusters: Int32, stream: CUstream,
    ):  # fmt: skip
        weights = weights_of(form, b, sfb, cute.assume(n, 8), k, groups)
        tokens = tokens_of(form, a, sfa, rows, k)
        work = work_of(offsets, sizes, rows, groups, cute.ceil_div(n, form.features))
        factors = factors_of(g_a, g_b, a_row, a_group, b_group, limit)
        out = Outputs(
            cute.recast_ptr(values, dtype=Uint32), cute.recast_ptr(scales, dtype=cutlass.Uint8),
            cute.recast_ptr(g, dtype=Float32), n,
        )  # fmt: skip
        _kernel(form, weights, tokens, work, factors, out).launch(
            grid=(clusters * form.split, 1, 1), block=(form.threads, 1, 1), cluster=(form.split, 1, 1),
            stream=stream, use_pdl=True,
        )  # fmt: skip

    return gemm


def run(product, output, choice: Decode) -> None:
    """Launch the kernel.

    Args:
        product, output: operands and what becomes of the sums, see hopper_gemm.Product and gemm.Output.
    """
    most = most_clusters(choice, sm_count(product.a.device))
    tiles = most_tiles(choice, product.rows, product.n)
    form = Form(
        choice.mmas, choice.across, choice.along, choice.tokens, choice.split, product.offsets is not None,
        product.activations, output.kind, product.column_scale, output.limit is not None, output.swizzled,
        tiles <= most, choice.ctas,
    )  # fmt: skip
    launch(
        make, (form,), [*product.arguments, *output.targets, *product.numbers, output.bound, min(most, tiles)]
    )
