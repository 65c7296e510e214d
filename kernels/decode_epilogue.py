"""The four warps that store tiles of few tokens: sums are added, scaled, perhaps activated and quantized.

Tensor memory gives each thread a feature with all tokens; what is stored are neighbouring features of one
token. Shared memory stands between, see decode_exchange. A warp stores a token's 128 features, or the 64
activations made of them, by itself. Nothing is written to rows behind a group's real ones but the zeros of
decode_pads.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute, pipeline
from cutlass.cute.nvgpu import tcgen05
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.decode_exchange import WARPS, Exchange, arrive, give, total, wait
from dsv4lab.kernels.decode_form import FEATURES, Form
from dsv4lab.kernels.decode_pads import clear_pads
from dsv4lab.kernels.gemm_epilogue import Factors, swiglu
from dsv4lab.kernels.gemm_tiles import Tile, Work, begin, find
from dsv4lab.kernels.rows import swizzled_offset, warp_max

from dsv4lab.formats import BLOCK

SUM, OUT = cutlass.Float32, cutlass.BFloat16
_SLICE = 32  # tokens that a thread takes from tensor memory at a time, at most
_OUTPUTS = FEATURES // 2  # activations of a tile


@dataclass(frozen=True)
class Outputs:
    """Where results go.

    Attributes:
        values: bf16, or bytes of codes.
        scales: bytes of block scales.
        g: their known global scale.
        n: rows of the weights.
    """

    values: cute.Pointer
    scales: cute.Pointer
    g: cute.Pointer
    n: Int32

    @property
    def width(self) -> Int32:
        """Activations of a token."""
        return self.n // 2


@cute.jit
def store_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, rank: Int32, t_sums: cute.Tensor,
    results: pipeline.PipelineUmmaAsync, exchange: Exchange, factors: Factors, out: Outputs,
):  # fmt: skip
    """Store every tile.

    Args:
        first, step: numbers of the tiles.
        rank: of this CTA among those that share a tile.
        t_sums: both accumulators (..., 2).
    """
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    if cutlass.const_expr(form.output == "nvfp4"):
        (block_number, _, _), (blocks, _, _) = cute.arch.block_idx(), cute.arch.grid_dim()
        columns = out.width // BLOCK
        clear_pads(form, work, out.scales, columns, block_number * WARPS + warp, blocks * WARPS)
    load, t_slices, r_sums = _slices_of(form, t_sums, thread)
    done = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 2)
    tile, seen = find(work, form, begin(work, form), first)
    number, phase = first, Int32(0)
    while tile.here:
        count = cutlass.min(tile.left, form.tokens)
        # Asked for before the sums are there.
        factor = _token_factor(form, factors, tile, count, rank, warp)
        weight_factors = _weight_factors(form, factors, tile, out.n)
        results.consumer_wait(done)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        # Phases of a barrier are 0, 1, 0, ...; before the first one, waiting for 1 does not wait.
        wait(form, exchange.taken, phase ^ 1)
        for i in cutlass.range_constexpr(cute.size(t_slices, mode=[3])):
            cute.copy(load, t_slices[None, None, None, i, done.index], r_sums)
            cute.arch.fence_view_async_tmem_load()
            give(form, exchange, r_sums, i * cute.size(r_sums), count, rank, thread)
        cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
        with cute.arch.elect_one():
            results.consumer_release(done)
        arrive(form, exchange.filled)
        wait(form, exchange.filled, phase)
        for slot in cutlass.range(warp, (count - rank + form.split - 1) // form.split, WARPS, unroll=1):
            token_factor = cute.arch.shuffle_sync(factor, slot // WARPS)
            row = tile.row + slot * form.split + rank
            _store_token(form, exchange, factors, out, work, tile, slot, row, token_factor, weight_factors)
        arrive(form, exchange.taken)
        phase ^= 1
        done.advance()
        number += step
        tile, seen = find(work, form, seen, number)


def _slices_of(form: Form, t_sums: cute.Tensor, thread: Int32):
    """A copy of some tokens' sums to registers, its sources (..., slices, 2) and the registers."""
    width = min(form.tokens, _SLICE)
    t_slices = cute.flat_divide(t_sums[((None, None), 0, 0, None)], (FEATURES, width))
    t_slices = t_slices[None, None, 0, None, None]
    op = tcgen05.Ld32x32bOp(tcgen05.Repetition(width))
    load = tcgen05.make_tmem_copy(cute.make_copy_atom(op, SUM), t_slices[None, None, 0, 0])
    own = load.get_slice(thread)
    places = own.partition_D(cute.make_identity_tensor((FEATURES, width)))
    return load, own.partition_S(t_slices), cute.make_rmem_tensor(places.shape, SUM)


def _at(tensor: cute.Tensor, index) -> Float32:
    return cute.make_tensor(tensor.iterator + index, cute.make_layout(1))[0]


@cute.jit
def _token_factor(
    form: cutlass.Constexpr[Form], factors: Factors, tile: Tile, count: Int32, rank: Int32, warp: Int32
) -> Float32:
    """The activations' global scale: lane i has that of the token in the warp's i-th slot."""
    token = (warp + WARPS * cute.arch.lane_idx()) * form.split + rank
    factor = Float32(0.0)
    if token < count:
        factor = _at(factors.a, (tile.row + token) * factors.a_row + tile.group * factors.a_group)
    return factor


@cute.jit
def _weight_factors(form: cutlass.Constexpr[Form], factors: Factors, tile: Tile, n: Int32):
    """The weights' global scale of this lane's features: of bf16 output all four, else of gate and of up."""
    at = tile.group * factors.b_group
    if cutlass.const_expr(form.column_scale == "one"):
        both = _at(factors.b, at)
        return both, both
    if cutlass.const_expr(form.output != "bf16"):
        return _at(factors.b, at), _at(factors.b, at + 1)
    lane = cute.arch.lane_idx()
    if cutlass.const_expr(form.column_scale == "interleaved"):
        at += lane // 2 % 2
    else:
        at += Int32(2 * (tile.column * FEATURES + 4 * lane) >= n)
    both = _at(factors.b, at)
    return both, both


@cute.jit
def _store_token(
    form: cutlass.Constexpr[Form], exchange: Exchange, factors: Factors, out: Outputs, work: Work, tile: Tile,
    slot: Int32, row: Int32, token_factor: Float32, weight_factors: tuple,
):  # fmt: skip
    """One token's features of a tile, by a warp."""
    lane = cute.arch.lane_idx()
    first, second = (ptx.mul(token_factor, factor) for factor in weight_factors)
    if cutlass.const_expr(form.output == "bf16"):
        feature = tile.column * FEATURES + 4 * lane
        r_sums = cute.make_rmem_tensor(4, Float32)
        total(form, exchange, 4 * lane, slot, r_sums)
        words = _rounded([ptx.mul(r_sums[i], first) for i in range(4)])
        if feature < out.n:
            _store_words(out.values, Int64(row) * out.n + feature, words)
    else:
        # A lane has two activations: 8 gates are followed by their 8 ups.
        r_gate, r_up = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        place = lane // 4 * 16 + lane % 4 * 2
        total(form, exchange, place, slot, r_gate)
        total(form, exchange, place + 8, slot, r_up)
        pairs = [(ptx.mul(r_gate[i], first), ptx.mul(r_up[i], second)) for i in range(2)]
        word = _rounded([swiglu(form, gate, up, factors.limit) for gate, up in pairs])[0]
        feature = tile.column * _OUTPUTS + 2 * lane
        if cutlass.const_expr(form.output == "swiglu"):
            if feature < out.width:
                _store_words(out.values, Int64(row) * out.width + feature, [word])
        else:
            _store_quantized(form, out, work.rows, tile.column, row, feature, word)


def _rounded(values: list[Float32]) -> list[Uint32]:
    """Values as words of two bf16."""
    return [ptx.to_bf16x2(high, low) for low, high in zip(values[0::2], values[1::2], strict=True)]


@cute.jit
def _store_words(out: cute.Pointer, offset: Int64, words: list):
    """Values as words, at an offset in values that is a multiple of their number."""
    r_words = cute.make_rmem_tensor(len(words), Uint32)
    for i in cutlass.range_constexpr(len(words)):
        r_words[i] = words[i]
    target = cute.recast_ptr((out + offset).align(4 * len(words)), dtype=Uint32)
    cute.autovec_copy(r_words, cute.make_tensor(target, cute.make_layout(len(words))))


@cute.jit
def _store_quantized(
    form: cutlass.Constexpr[Form], out: Outputs, rows: Int32, column: Int32, row: Int32, feature: Int32,
    word: Uint32,
):  # fmt: skip
    """Codes and block scales of a warp's activations; eight lanes have a block.

    Args:
        column: of the tile.
        feature: this lane's first activation.
        word: its two, in bf16.
    """
    lane, width = cute.arch.lane_idx(), out.width
    magnitudes = ptx.both(word, 0x7FFF7FFF)
    high = ptx.both(ptx.max_halves(magnitudes, ptx.shift_left(magnitudes, 16)), 0xFFFF0000)
    g = block.row_scale(block.checked_scale(cute.make_tensor(out.g, cute.make_layout(1))[0]))
    scale, step = block.block_scale(warp_max(high, 8), g)
    if feature < width:
        codes = block_pair(word, step)
        cute.make_tensor(out.values + (Int64(row) * width + feature) // 2, cute.make_layout(1))[0] = codes
    if lane % 8 == 0:
        blocks, at = width // BLOCK, column * (_OUTPUTS // BLOCK) + lane // 8
        if cutlass.const_expr(form.swizzled):
            # Of a NaN scale, too, the columns that fill up a chunk stay zero.
            byte = scale.to(cutlass.Uint8) if at < blocks else cutlass.Uint8(0)
            place = swizzled_offset(Int32(0), row, at, rows, blocks)
            cute.make_tensor(out.scales + place, cute.make_layout(1))[0] = byte
        else:
            if at < blocks:
                place = Int64(row) * blocks + at
                cute.make_tensor(out.scales + place, cute.make_layout(1))[0] = scale.to(cutlass.Uint8)


def block_pair(word: Uint32, step: Float32) -> cutlass.Uint8:
    """The codes of two bf16 of a block, the first one in the low bits, from s g, the block's step."""
    r = ptx.select("gt.f32", step, 0.0, ptx.rcp(step), 0.0)
    kept = ptx.select("nan.f32", step, step, 0, 0xFF, "r")
    low, high = (ptx.mul(half(word, "bf16"), r) for half in (ptx.lower_half, ptx.upper_half))
    convert = "cvt.rn.satfinite.e2m1x2.f32 c, $2, $1; mov.b16 h, {c, c}; cvt.u32.u16 $0, h;"
    codes = ptx.assembly(f"{{.reg .b8 c; .reg .b16 h; {convert}}}", "r", low, high)
    return ptx.both(codes, kept).to(cutlass.Uint8)
