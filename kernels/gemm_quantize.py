"""Activations of the grouped GEMM as NVFP4, so that the next GEMM takes them as they are.

A slice of sums is two blocks of a row: 16 bytes of codes and two block scales, written by its thread.
Block scales of padding rows are zero, also of those 128 rows at a time of which no tile has any.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint8, Uint16, Uint32, cute
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels.gemm_form import CTA_ROWS, STORE_ROWS, Form
from dsv4lab.kernels.gemm_tiles import WARP, Tile, Work
from dsv4lab.kernels.rows import swizzled_offset

from dsv4lab.formats import BLOCK

WARPS = CTA_ROWS // STORE_ROWS
_WORDS = BLOCK // 2  # of a block of bf16
_BYTES = BLOCK // 2  # of a block's codes
_VECTOR = 16  # bytes


@dataclass(frozen=True)
class Quantized:
    """Where quantized activations go.

    Attributes:
        codes: (rows, 8 columns) bytes.
        scales: (rows, columns) bytes, or padded and swizzled.
        g: the global scale, one number.
        columns: blocks of a row.
    """

    codes: cute.Pointer
    scales: cute.Pointer
    g: cute.Tensor
    columns: Int32


def scale_columns(form: Form, columns: Int32) -> Int32:
    """Columns of the block scales as they are stored."""
    return (columns + 3) // 4 * 4 if form.swizzled else columns


@cute.jit
def quantize_slice(
    form: cutlass.Constexpr[Form], out: Quantized, row_scale: block.RowScale, r_out: cute.Tensor, rows: Int32,
    tile: Tile, row: Int32, column: Int32, has_e2m1: cutlass.Constexpr[bool] = True,
):  # fmt: skip
    """Write two blocks of a row.

    Args:
        row_scale: of the global scale.
        r_out: their 32 values in bf16.
        rows: of the output.
        row: of the tile.
        column: of the first block, even.
        has_e2m1: whether the architecture converts to E2M1.
    """
    r_words = cute.recast_tensor(r_out, Uint32)
    r_codes = cute.make_rmem_tensor(4, Uint32)
    scales, real = [Uint32(0), Uint32(0)], row < tile.left
    for i in cutlass.range_constexpr(2):
        words = [r_words[i * _WORDS + j] for j in range(_WORDS)]
        scale, step = block.block_scale(block.amax(words), row_scale)
        r_codes[2 * i], r_codes[2 * i + 1] = block.encode(words, step, has_e2m1)
        scales[i] = scale if real and column + i < out.columns else Uint32(0)
    at = Int64(tile.row + row)
    if real:
        _write_codes(form, out, r_codes, at * out.columns + column, column)
    if cutlass.const_expr(form.swizzled):
        _write_swizzled(out, scales, tile.row + row, column)
    elif at < rows:
        for i in cutlass.range_constexpr(2):
            if column + i < out.columns:
                _write(out.scales, at * out.columns + column + i, scales[i].to(Uint8))


@cute.jit
def _write_codes(
    form: cutlass.Constexpr[Form], out: Quantized, r_codes: cute.Tensor, number: Int64, column: Int32
):
    """Codes of one block, or of two where the row has both, from that number on."""
    if cutlass.const_expr(form.wide):
        # Rows have an even number of blocks.
        if column < out.columns:
            _write_words(out.codes, number * _BYTES, r_codes, 16)
    else:
        halves = cute.logical_divide(r_codes, cute.make_layout(2))
        for i in cutlass.range_constexpr(2):
            if column + i < out.columns:
                _write_words(out.codes, (number + i) * _BYTES, halves[None, i], 8)


@cute.jit
def _write_swizzled(out: Quantized, scales: list, row: Int32, column: Int32):
    """Two scales, and zeros for those behind the row's end that no slice has."""
    columns = (out.columns + 3) // 4 * 4
    # Of the first and only matrix, whose rows do not matter.
    at = swizzled_offset(Int32(0), row, column, Int32(0), out.columns)
    pair = (scales[0] | (scales[1] << 8)).to(Uint16)
    if column < columns:
        _write(out.scales, at, pair)
    if column % 4 == 0 and column + 2 >= out.columns and column < columns:
        _write(out.scales, at + 2, Uint16(0))


@cute.jit
def _write(pointer: cute.Pointer, at: Int64, value):
    """A value at a multiple of its size, counted in bytes."""
    size = cutlass.const_expr(type(value).width // 8)
    there = cute.recast_ptr(pointer, dtype=type(value)) + at // size
    cute.make_tensor(there, cute.make_layout(1))[0] = value


@cute.jit
def _write_words(pointer: cute.Pointer, at: Int64, r_words: cute.Tensor, alignment: cutlass.Constexpr[int]):
    """Words at a byte that is a multiple of `alignment`, all at once."""
    there = cute.recast_ptr((pointer + at).align(alignment), dtype=Uint32)
    cute.autovec_copy(r_words, cute.make_tensor(there, r_words.layout))


@cute.jit
def clear_padding(form: cutlass.Constexpr[Form], work: Work, out: Quantized):
    """Zero the block scales of every 128 rows among which no group has a real one; all storing warps come."""
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    blocks, _, _ = cute.arch.grid_dim()
    block_number, _, _ = cute.arch.block_idx()
    nbytes = CTA_ROWS * scale_columns(form, out.columns)
    for number in cutlass.range(block_number * WARPS + warp, work.rows // CTA_ROWS, blocks * WARPS, unroll=1):
        if not _has_rows(work, number * CTA_ROWS):
            start = (out.scales + Int64(number) * nbytes).align(_VECTOR)
            vectors = cute.make_layout((_VECTOR // 4, nbytes // _VECTOR))
            m_scales = cute.make_tensor(cute.recast_ptr(start, dtype=Uint32), vectors)
            r_zeros = cute.make_rmem_tensor(_VECTOR // 4, Uint32)
            r_zeros.fill(0)
            for i in cutlass.range(cute.arch.lane_idx(), nbytes // _VECTOR, WARP, unroll=1):
                cute.autovec_copy(r_zeros, m_scales[None, i])


@cute.jit
def _has_rows(work: Work, row: Int32):
    """Whether the row, a multiple of 128, is one of a group's real rows; a warp comes here together."""
    found, first = cutlass.Boolean(False), Int32(0)
    while not found and first < work.groups:
        group = first + cute.arch.lane_idx()
        inside = cutlass.Boolean(False)
        if group < work.groups:
            start = Int32(0)
            if group > 0:
                start = work.offsets[group - 1]
            inside = row >= start and row < start + work.sizes[group]
        found = cute.arch.vote_any_sync(inside)
        first += WARP
    return found
