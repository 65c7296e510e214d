"""From sums in registers to what is stored: scaled, perhaps activated and quantized.

A thread has sums of two features, 8 apart, and of two of every 8 tokens. Matrices of 8 by 8 are transposed on
their way to shared memory, so that a token's features stand side by side; from there TMA stores 32 tokens at
a time. Rows behind the last real one of a group are padding: of them up to 31 are written, whatever they
hold.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.gemm_epilogue import Factors, swiglu
from dsv4lab.kernels.gemm_quantize import Quantized, quantize_slice
from dsv4lab.kernels.gemm_sm90a_dequantize import FACTOR
from dsv4lab.kernels.gemm_sm90a_exchange import VECTOR
from dsv4lab.kernels.gemm_sm90a_form import STORES, Form
from dsv4lab.kernels.gemm_tiles import Tile

OUT = cutlass.BFloat16
_KINDS = {64: warpgroup.SmemLayoutAtomKind.K_SW128, 32: warpgroup.SmemLayoutAtomKind.K_SW64}
_FIRST_BARRIER = 2  # of those of one warpgroup; 1 is that of all which multiply


@dataclass(frozen=True)
class Stored:
    """How TMA stores bf16.

    Attributes:
        copy: of some tokens and one warpgroup's columns.
        out: where to, as coordinates.
        layout: of all buffers of a CTA, (tokens, columns, buffers).
    """

    copy: cute.CopyAtom
    out: cute.Tensor
    layout: cute.ComposedLayout


@cute.jit
def stored(form: cutlass.Constexpr[Form], out: cute.Pointer, rows: Int32, columns: Int32) -> Stored:
    """The output as bf16 (rows, columns), columns % 8 == 0."""
    m_out = cute.make_tensor(out, cute.make_layout((rows, columns), stride=(cute.assume(columns, 8), 1)))
    box = (form.store_rows, form.store_columns)
    layout = buffers_layout(form)
    stage = cute.slice_(layout, (None, None, 0))
    info = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), m_out, stage, box)
    return Stored(info.atom, info.tma_tensor, layout)


def buffers_layout(form: Form) -> cute.ComposedLayout:
    atom = warpgroup.make_smem_layout_atom(_KINDS[form.store_columns], OUT)
    shape = (form.store_rows, form.store_columns, STORES * form.all_warpgroups)
    return cute.tile_to_shape(atom, shape, order=(0, 1, 2))


@cute.jit
def load_factors(
    form: cutlass.Constexpr[Form], factors: Factors, tile: Tile, first: Int32, s_factors: cute.Tensor
):
    """The activations' global scales of the tokens that this CTA stores.

    Args:
        first: of them, in the tile.
        s_factors: where all that multiply find them.
    """
    thread, _, _ = cute.arch.thread_idx()
    threads = cutlass.const_expr(128 * form.all_warpgroups)
    count = cutlass.const_expr(cute.size(s_factors))
    cute.arch.barrier(barrier_id=1, number_of_threads=threads)
    for i in cutlass.range_constexpr(-(-count // threads)):
        token = thread + i * threads
        if token < count:
            factor = Float32(0.0)
            if first + token < tile.left:
                at = (tile.row + first + token) * factors.a_row + tile.group * factors.a_group
                factor = factors.a[at]
            s_factors[token] = factor
    cute.arch.barrier(barrier_id=1, number_of_threads=threads)


@cute.jit
def weight_factors(form: cutlass.Constexpr[Form], factors: Factors, tile: Tile, feature: Int32, n: Int32):
    """The weights' global scales of a thread's two features, 8 apart, or those of gate and up.

    Args:
        feature: the first one.
    """
    at = tile.group * factors.b_group
    first = factors.b[at]
    second = first
    if cutlass.const_expr(form.column_scale == "interleaved"):
        second = factors.b[at + 1]
    elif cutlass.const_expr(form.column_scale == "halves"):
        up = factors.b[at + 1]
        second = up if 2 * (feature + 8) >= n else first
        first = up if 2 * feature >= n else first
    return first, second


@cute.jit
def store_tile(
    form: cutlass.Constexpr[Form], factors: Factors, out: Stored | Quantized, tile: Tile,
    first: Int32, r_sums: cute.Tensor, s_factors: cute.Tensor, s_out: cute.Tensor, rows: Int32, n: Int32,
):  # fmt: skip
    """Store a warpgroup's part of a tile.

    Args:
        first: token of the tile that is stored first.
        s_factors: of the tokens that are stored.
        r_sums: (4 stored / 8,).
        s_out: buffers of `buffers_layout`.
        rows: of the output.
        n: rows of the weights.
    """
    thread, _, _ = cute.arch.thread_idx()
    group = cute.arch.make_warp_uniform(thread // 128)
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
    lane = cute.arch.lane_idx()
    column = tile.column * form.warpgroups + group % form.warpgroups
    feature = column * 64 + warp * 16 + lane // 4
    scales = weight_factors(form, factors, tile, feature, n)
    blocks = cutlass.const_expr(form.store_rows // 8)
    nbytes = cutlass.const_expr(form.store_rows * form.store_columns * 2)
    for part in cutlass.range_constexpr(form.stored // form.store_rows):
        begin = first + part * form.store_rows
        if begin < tile.left:
            buffer = group * STORES + part % STORES
            words = _finish(form, factors, r_sums, s_factors, scales, part * blocks, lane)
            if cutlass.const_expr(form.output != "nvfp4") and warp == 0:
                with cute.arch.elect_one():
                    # The tile before may have stored fewer parts than there are buffers.
                    cute.arch.cp_async_bulk_wait_group(STORES - 1 if part else 0, read=True)
            _sync(group)
            place = s_out.iterator.toint() + buffer * nbytes
            _transpose(form, words, place, warp, lane)
            if cutlass.const_expr(form.output == "nvfp4"):
                _sync(group)
                _quantize(form, out, rows, tile, place, begin, thread % 128, 2 * column)
            else:
                cute.arch.fence_view_async_shared()
                _sync(group)
                if warp == 0:
                    _store(form, out, s_out, buffer, tile.row + begin, column)


@cute.jit
def _store(
    form: cutlass.Constexpr[Form], out: Stored, s_out: cute.Tensor, buffer: Int32, row: Int32, column: Int32
):
    """Have TMA store a buffer; a warp comes here."""
    g_out = cute.local_tile(
        cute.domain_offset((row, 0), out.out), (form.store_rows, form.store_columns), (0, column)
    )
    s_box, g_box = cpasync.tma_partition(
        out.copy, 0, cute.make_layout(1), cute.group_modes(s_out, 0, 2), cute.group_modes(g_out, 0, 2)
    )
    cute.copy(out.copy, s_box[None, buffer], g_box)
    with cute.arch.elect_one():
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def _quantize(
    form: cutlass.Constexpr[Form], out: Quantized, rows: Int32, tile: Tile, place: Int32, begin: Int32,
    token: Int32, column: Int32,
):  # fmt: skip
    """Write a token's 32 activations as codes and block scales.

    Args:
        place: address of the buffer.
        begin: first token of the buffer.
        token: of it, this thread's.
        column: of the first of the two blocks.
    """
    if token < form.store_rows and begin + token < tile.left:
        r_words = cute.make_rmem_tensor((4, 4), Uint32)
        for chunk in cutlass.range_constexpr(4):
            address = _swizzled(form, place, token, Int32(chunk))
            source = cute.make_ptr(Uint32, address, cute.AddressSpace.smem, assumed_align=16)
            cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), r_words[None, chunk])
        row_scale = block.row_scale(block.checked_scale(out.g[0]))
        r_out = cute.recast_tensor(cute.make_tensor(r_words.iterator, cute.make_layout(16)), OUT)
        quantize_slice(form, out, row_scale, r_out, rows, tile, begin + token, column, False)


@cute.jit
def _sync(group: Int32):
    """The threads of a warpgroup wait for one another."""
    cute.arch.barrier(barrier_id=_FIRST_BARRIER + group, number_of_threads=128)


def _finish(
    form: Form, factors: Factors, r_sums: cute.Tensor, s_factors: cute.Tensor, scales: tuple, first: int,
    lane: Int32,
) -> list[Uint32]:  # fmt: skip
    """What is stored of the sums of some tokens, as words of two tokens' values of one feature.

    Args:
        scales: see weight_factors.
        first: of the 8 tokens at a time.
    """
    words = []
    for i in range(first, first + form.store_rows // 8):
        values = [[], []]
        for token in range(2):
            pair = [ptx.mul(r_sums[i * VECTOR + 2 * row + token], FACTOR) for row in range(2)]
            factors_of_rows = scales
            if form.scaled:
                g = s_factors[8 * i + lane % 4 * 2 + token]
                factors_of_rows = [ptx.mul(g, scale) for scale in scales]
            pair = [ptx.mul(x, factor) for x, factor in zip(pair, factors_of_rows, strict=True)]
            if form.output != "bf16":
                pair = [swiglu(form, *pair, factors.limit)]
            for row, value in enumerate(pair):
                values[row].append(value)
        words += [ptx.to_bf16x2(high, low) for low, high in (x for x in values if x)]
    return words


@cute.jit
def _transpose(form: cutlass.Constexpr[Form], words: list, base: Int32, warp: Int32, lane: Int32):
    """Write matrices of 8 tokens by 8 features, up to four at once, a token's features side by side."""
    side = cutlass.const_expr(2 if form.output == "bf16" else 1)  # matrices of the same tokens
    at_once = cutlass.const_expr(min(len(words), 4))
    for first in cutlass.range_constexpr(0, len(words), at_once):
        matrix = first + lane // 8 % at_once
        token = matrix // side * 8 + lane % 8
        chunk = warp * side + matrix % side
        target = _swizzled(form, base, token, chunk)
        registers = ", ".join(f"{{$r{i + 1}}}" for i in range(at_once))
        cute.arch.inline_ptx(
            f"stmatrix.sync.aligned.m8n8.x{at_once}.trans.shared.b16 [{{$r0}}], {{{registers}}};",
            read_only_args=[target, *words[first : first + at_once]],
        )


def _swizzled(form: Form, base: Int32, token: Int32, chunk: Int32) -> Int32:
    """Address of 8 values: those of a row of 128 bytes are swizzled over 8 rows, of 64 over pairs of them."""
    row_bytes = form.store_columns * 2
    return base + token * row_bytes + (chunk ^ (token % 8 * row_bytes // 128)) * 16
