"""The grouped GEMM of NVFP4 weights for Hopper, for many tokens: activations of many groups in bf16.

A persistent kernel of one or two warpgroups that multiply and a warp that loads, see gemm_sm90a_mainloop.
Weights stay 4-bit until they are in registers. Where there are fewer tiles than SMs, the CTAs of a cluster
share the K of a tile, see gemm_sm90a_exchange; results repeat bit for bit. Which tile is next, each warp
finds for itself from offsets and sizes in global memory, see gemm_tiles.

The first letter of a tensor says where it is: m whole in global memory, g tiles of it, s shared memory, r
registers.
"""

# No annotations from __future__: the DSL reads them as types.
from functools import cache

import cutlass
import torch
from cuda.bindings.driver import CUstream
from cutlass import Float32, Int32, cute, memory
from dsv4lab.kernels.decode_pads import clear_pads
from dsv4lab.kernels.dequantize import dequantize
from dsv4lab.kernels.gemm_epilogue import Factors, factors_of
from dsv4lab.kernels.gemm_quantize import Quantized
from dsv4lab.kernels.gemm_sm90a_choice import Many, fits, most_tiles
from dsv4lab.kernels.gemm_sm90a_dequantize import place
from dsv4lab.kernels.gemm_sm90a_epilogue import OUT, Stored, buffers_layout, load_factors, store_tile, stored
from dsv4lab.kernels.gemm_sm90a_exchange import give, meet, parts_layout, total
from dsv4lab.kernels.gemm_sm90a_form import SCALE_ROWS, Form
from dsv4lab.kernels.gemm_sm90a_mainloop import (
    CODES,
    SUM,
    TOKEN,
    Operands,
    Ring,
    arrivals,
    load_tile,
    multiply_tile,
    operands,
    stages_of,
    tiled_mma,
)
from dsv4lab.kernels.gemm_tiles import Work, begin, find, work_of
from dsv4lab.kernels.launch import As, launch
from dsv4lab.kernels.quantize_plan import sm_count

from dsv4lab.formats import BLOCK


@cute.jit
def _load_tiles(
    form: cutlass.Constexpr[Form], work: Work, given: Operands, ring: Ring, first: Int32, step: Int32,
    rank: Int32, n: Int32, k: Int32,
):  # fmt: skip
    """Bring the operands of every tile; of the warps that come here, the first one.

    Args:
        first, step: numbers of the tiles.
        rank: of this CTA among those that share a tile.
    """
    loads = cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4 * form.all_warpgroups
    begins, ends = stages_of(form, rank, k)
    tile, seen = find(work, form, begin(work, form), first)
    number, stage, phase = first, Int32(0), Int32(0)
    while tile.here:
        if loads:
            columns = cute.ceil_div(n, SCALE_ROWS)
            stage, phase = load_tile(form, given, ring, tile, columns, begins, ends, stage, phase)
        number += step
        tile, seen = find(work, form, seen, number)
        if cutlass.const_expr(form.shares > 1):
            # The ring gives way to sums, and may be filled again when those have been added up.
            meet(form)
            meet(form)
            if tile.here:
                meet(form)


@cute.jit
def _multiply_tiles(
    form: cutlass.Constexpr[Form], work: Work, mma: cute.TiledMma, ring: Ring, factors: Factors,
    out: Stored | Quantized, s_factors: cute.Tensor, s_out: cute.Tensor, first: Int32, step: Int32,
    rank: Int32, n: Int32, k: Int32,
):  # fmt: skip
    """Multiply every tile and store it.

    Args:
        s_factors: room for global scales of the tokens that this CTA stores.
        s_out: buffers from which tiles are stored.
        first, step, rank: see _load_tiles.
    """
    taker = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // (4 * form.warpgroups)
    share = rank * form.halves + taker
    parts = cute.make_ptr(SUM, ring.s_tokens.iterator.toint(), cute.AddressSpace.smem, assumed_align=16)
    s_parts = cute.make_tensor(parts, parts_layout(form))
    s_own = cute.make_tensor(s_factors.iterator + taker * form.stored, cute.make_layout(form.stored))
    begins, ends = stages_of(form, rank, k)
    tile, seen = find(work, form, begin(work, form), first)
    number, stage, phase = first, Int32(0), Int32(0)
    while tile.here:
        if cutlass.const_expr(form.scaled):
            load_factors(form, factors, tile, (share - taker) * form.stored, s_factors)
        half = tile.column % 2 if cutlass.const_expr(form.warpgroups == 1) else Int32(0)
        at = place(form, ring.s_codes.iterator.toint(), ring.s_scales.iterator.toint(), taker, half)
        r_sums = cute.make_rmem_tensor(mma.partition_shape_C((64, form.rows)), SUM)
        never = cutlass.min(k, 0)
        stage, phase = multiply_tile(form, mma, ring, at, r_sums, taker, ends - begins, stage, phase, never)
        number += step
        following, seen = find(work, form, seen, number)
        r_total = r_sums
        if cutlass.const_expr(form.shares > 1):
            r_total = cute.make_rmem_tensor(form.stored // 2, SUM)
            meet(form)
            give(form, s_parts, r_sums, share)
            meet(form)
            total(form, s_parts, taker, r_total)
        store_tile(form, factors, out, tile, share * form.stored, r_total, s_own, s_out, work.rows, n)
        if cutlass.const_expr(form.shares > 1) and following.here:
            cute.arch.fence_view_async_shared()
            meet(form)
        tile = following


@cute.kernel
def _kernel(
    form: cutlass.Constexpr[Form], mma: cute.TiledMma, given: Operands, work: Work, factors: Factors,
    out: Stored | Quantized, n: Int32, k: Int32,
):  # fmt: skip
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    first, step, rank = block // form.split, blocks // form.split, block % form.split

    smem = memory.SmemAllocator()
    barriers = smem.allocate_array(cutlass.Int64, 2 * form.stages)
    s_factors = smem.allocate_tensor(Float32, cute.make_layout(form.rows // form.split), 16)
    s_tokens, s_codes, s_scales = given.layouts
    # A swizzle repeats every 1024 bytes, and counts them from address 0.
    s_tokens = smem.allocate_tensor(TOKEN, s_tokens.outer, 1024, swizzle=s_tokens.inner)
    s_codes = smem.allocate_tensor(CODES, s_codes.outer, 1024, swizzle=s_codes.inner)
    s_scales = smem.allocate_tensor(Int32, s_scales, 128)
    s_out = buffers_layout(form)
    s_out = smem.allocate_tensor(OUT, s_out.outer, 1024, swizzle=s_out.inner)
    ring = Ring(s_tokens, s_codes, s_scales, barriers, barriers + form.stages)

    if warp == 0:
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(form.stages):
                cute.arch.mbarrier_init(ring.full + stage, 1)
                cute.arch.mbarrier_init(ring.free + stage, arrivals(form))
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    # What reads and writes global memory waits until the kernel before this one is done. The next one may
    # be sent to SMs that have no tile.
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()
    if warp >= 4 * form.all_warpgroups:
        if cutlass.const_expr(form.registers):
            cute.arch.setmaxregister_decrease(24)
        _load_tiles(form, work, given, ring, first, step, rank, n, k)
    else:
        if cutlass.const_expr(form.registers):
            cute.arch.setmaxregister_increase(form.registers)
        if cutlass.const_expr(form.output == "nvfp4"):
            warps = cutlass.const_expr(4 * form.all_warpgroups)
            clear_pads(form, work, out.scales, out.columns, block * warps + warp, blocks * warps)
        _multiply_tiles(form, work, mma, ring, factors, out, s_factors, s_out, first, step, rank, n, k)
        if warp % 4 == 0:
            with cute.arch.elect_one():
                cute.arch.cp_async_bulk_wait_group(0, read=True)


_kernel.set_name_prefix("grouped_gemm", remove_cutlass_symbol=True, keep_mangled_name=False)


def make(form: Form):
    """The host function of a kernel; it takes no block scales of activations."""

    @cute.jit
    def gemm(
        a: cute.Pointer, b: cute.Pointer, sfa: cute.Pointer, sfb: cute.Pointer, g_a: cute.Pointer,
        g_b: cute.Pointer, offsets: cute.Pointer, sizes: cute.Pointer, out: cute.Pointer,
        out_scales: cute.Pointer, g_out: cute.Pointer, rows: Int32, n: Int32, k: Int32, groups: Int32,
        a_row: Int32, a_group: Int32, b_group: Int32, limit: Float32, clusters: Int32, stream: CUstream,
    ):  # fmt: skip
        given = operands(form, [a, b, sfb], rows, n, k, groups)
        work = work_of(offsets, sizes, rows, groups, cute.ceil_div(n, form.features))
        factors = factors_of(g_a, g_b, a_row, a_group, b_group, limit)
        if cutlass.const_expr(form.output == "nvfp4"):
            g = cute.make_tensor(cute.recast_ptr(g_out, dtype=Float32), cute.make_layout(1))
            target = Quantized(
                cute.recast_ptr(out, dtype=cutlass.Uint8), cute.recast_ptr(out_scales, dtype=cutlass.Uint8),
                g, n // 2 // BLOCK,
            )  # fmt: skip
        else:
            target = stored(form, out, rows, n if cutlass.const_expr(form.output == "bf16") else n // 2)
        _kernel(form, tiled_mma(form), given, work, factors, target, n, k).launch(
            grid=(clusters * form.split, 1, 1), block=(form.threads, 1, 1), cluster=(form.split, 1, 1),
            stream=stream, use_pdl=True,
        )  # fmt: skip

    return gemm


def run(product, output, choice: Many) -> None:
    """Launch the kernel; NVFP4 activations are dequantized before, but for their global scale.

    Args:
        product, output: operands and what becomes of the sums, see hopper_gemm.Product and gemm.Output.

    Raises:
        ValueError: there are fewer stages of K than CTAs to share them.
    """
    n, tokens = product.n, product.a
    if not fits(choice, product.k):
        raise ValueError(
            f"{choice.split} CTAs cannot share K = {product.k}, which is less than {choice.depth} for each"
        )
    if product.activations != "bf16":
        tokens = torch.empty((product.rows, product.k), dtype=torch.bfloat16, device=tokens.device)
        one, swizzled = _one(tokens.device), product.activations == "swizzled"
        dequantize(product.a, product.a_scales, one, "tensor", swizzled, False, tokens.dtype, tokens)
    form = Form(
        choice.rows, choice.warpgroups, choice.depth, choice.halves, choice.split,

        scaled=product.g_a is not None, grouped=product.offsets is not None, output=output.kind,
        column_scale=product.column_scale, clamped=output.limit is not None, swizzled=output.swizzled,
        wide=n // 2 % 32 == 0,
    )  # fmt: skip
    most = most_tiles(choice, product.rows, n, product.groups if form.grouped else None)
    clusters = min(sm_count(product.a.device) // form.split, most)
    operands = [As(tokens, TOKEN), *product.arguments[1:]]
    launch(make, (form,), [*operands, *output.targets, *product.numbers, output.bound, clusters])


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)
