"""Four features of a token, from sums to memory: scaled, perhaps activated and quantized."""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.decode_sm90a_form import MMA_ROWS, Form
from dsv4lab.kernels.decode_sm90a_registers import EXPONENT
from dsv4lab.kernels.gemm_epilogue import Factors, swiglu
from dsv4lab.kernels.gemm_tiles import Tile, Work
from dsv4lab.kernels.rows import store, swizzled_offset

from dsv4lab.formats import BLOCK

_QUAD = 4


@dataclass(frozen=True)
class Outputs:
    """Where results go.

    Attributes:
        values: words of bf16, or of codes.
        scales: bytes of block scales.
        g: their known global scale.
        n: rows of the weights.
    """

    values: cute.Pointer
    scales: cute.Pointer
    g: cute.Pointer
    n: Int32


def parts(form: Form) -> int:
    """Threads that store a unit, each four features."""
    return form.unit // (_QUAD if form.output == "bf16" else 2 * _QUAD)


def place_of(form: Form, part: Int32) -> Int32:
    """The first row of a part's features among those of a tile; of activations that of the gate."""
    return part * _QUAD if form.output == "bf16" else (part >> 1) * MMA_ROWS + (part & 1) * _QUAD


@cute.jit
def store_part(
    form: cutlass.Constexpr[Form], work: Work, tile: Tile, factors: Factors, out: Outputs, token: Int32,
    part: Int32, here: Boolean, r_first: cute.Tensor, r_second: cute.Tensor,
):  # fmt: skip
    """Store four features of a token; a warp comes here together.

    Args:
        part: which of the token's in this tile.
        here: whether it is one.
        r_first, r_second: sums, of gates and of ups where they are activated.
    """
    row = tile.row + token
    first, second = _factors(form, factors, tile, row, part, out.n)
    gates = [_scaled(form, r_first[i], first) for i in range(_QUAD)]
    if cutlass.const_expr(form.output == "bf16"):
        feature, width, values = tile.column * form.features + part * _QUAD, out.n, gates
    else:
        feature, width = tile.column * (form.features // 2) + part * _QUAD, out.n // 2
        ups = [_scaled(form, r_second[i], second) for i in range(_QUAD)]
        values = [swiglu(form, gate, up, factors.limit) for gate, up in zip(gates, ups, strict=True)]
    r_words = cute.make_rmem_tensor(2, Uint32)
    for i in cutlass.range_constexpr(2):
        r_words[i] = ptx.to_bf16x2(values[2 * i + 1], values[2 * i])
    if cutlass.const_expr(form.output == "nvfp4"):
        _store_quantized(form, work, out, row, feature, here, r_words)
    else:
        if here and feature < width:
            store(out.values, (Int64(row) * width + feature) // 2, r_words)


def _scaled(form: Form, total: Float32, factor: Float32) -> Float32:
    """A sum of decoded products times a global scale; the powers of two go first, the scale may be large."""
    decoded = 1 if form.activations == "bf16" else 2
    return ptx.mul(ptx.mul(total, 2.0 ** (EXPONENT * decoded)), factor)


def _at(scales: cute.Tensor, index) -> Float32:
    return cute.make_tensor(scales.iterator + index, cute.make_layout(1))[0]


@cute.jit
def _factors(form: cutlass.Constexpr[Form], factors: Factors, tile: Tile, row: Int32, part: Int32, n: Int32):
    """g_a g_b of a part's features, or of its gates and of its ups."""
    at = tile.group * factors.b_group
    if cutlass.const_expr(form.column_scale != "one" and form.output == "bf16"):
        if cutlass.const_expr(form.column_scale == "interleaved"):
            at += part >> 1 & 1
        else:
            at += Int32(2 * (tile.column * form.features + part * _QUAD) >= n)
    first = _at(factors.b, at)
    second = first
    if cutlass.const_expr(form.column_scale != "one" and form.output != "bf16"):
        second = _at(factors.b, at + 1)
    if cutlass.const_expr(form.activations != "bf16"):
        a = _at(factors.a, row * factors.a_row + tile.group * factors.a_group)
        first, second = ptx.mul(a, first), ptx.mul(a, second)
    return first, second


@cute.jit
def _store_quantized(
    form: cutlass.Constexpr[Form], work: Work, out: Outputs, row: Int32, feature: Int32, here: Boolean,
    r_words: cute.Tensor,
):  # fmt: skip
    """Codes and block scale of 16 features, of which four lanes have four each in bf16."""
    lane = cute.arch.lane_idx()
    words = [cute.arch.shuffle_sync(r_words[i], lane // 4 * 4 + j) for j in range(4) for i in range(2)]
    g = block.row_scale(block.checked_scale(cute.make_tensor(out.g, cute.make_layout(1))[0]))
    scale, step = block.block_scale(block.amax(words), g)
    r_codes = cute.make_rmem_tensor(2, Uint32)
    r_codes[0], r_codes[1] = block.encode(words, step, False)
    width = out.n // 2
    columns, column = width // BLOCK, feature // BLOCK
    if here and column < columns:
        if lane % 4 == 0:
            store(out.values, (Int64(row) * width + feature) // 8, r_codes)
            _store_scale(form, work, out, row, column, columns, scale.to(Uint8))
        if cutlass.const_expr(form.swizzled):
            # Columns that fill up the last chunk.
            behind = columns + lane % 4
            if column == columns - 1 and behind < (columns + 3) // 4 * 4:
                _store_scale(form, work, out, row, behind, columns, Uint8(0))


def _store_scale(
    form: Form, work: Work, out: Outputs, row: Int32, column: Int32, columns: Int32, scale: Uint8
) -> None:
    at = Int64(row) * columns + column
    if form.swizzled:
        at = swizzled_offset(Int32(0), row, column, work.rows, columns)
    cute.make_tensor(out.scales + at, cute.make_layout(1))[0] = scale
