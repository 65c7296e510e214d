"""Block scales into the 128x4 layout and back.

A thread has one chunk of 16 bytes: 4 neighbouring columns in rows i, i + 32, i + 64 and i + 96 of a tile of
128 rows. A warp has 4 such i and 8 neighbouring chunks of each: whole sectors of 32 bytes on both sides.
"""

# No annotations from __future__: the DSL reads them as types.
import math

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Int32, Int64, Uint8, Uint32, cute
from dsv4lab.kernels.launch import As, launch
from dsv4lab.kernels.quantize_run import Outputs, Rows, kernel_input
from dsv4lab.kernels.rows import load, store
from torch import Tensor

_ACROSS = 8  # chunks of a CTA beside one another
_THREADS = 32 * _ACROSS


@cute.jit
def _columns_of_row(
    whole: cutlass.Constexpr[bool], m_linear: cute.Pointer, offset: Int64, left: Int32
) -> Uint32:
    """Four scales of a row from an offset on in a word, of which `left` exist; `whole`: all four, aligned."""
    word = Uint32(0)
    if cutlass.const_expr(whole):
        if left > 0:
            words = cute.recast_ptr(m_linear + offset, dtype=Uint32).align(4)
            word = Uint32(cute.make_tensor(words, cute.make_layout(1))[0])
    else:
        scales = cute.make_tensor(m_linear + offset, cute.make_layout(4))
        for i in cutlass.range_constexpr(4):
            if i < left:
                word = Uint32(word | (scales[i].to(Uint32) << Uint32(8 * i)))
    return word


@cute.jit
def _store_columns(
    whole: cutlass.Constexpr[bool], m_linear: cute.Pointer, offset: Int64, left: Int32, word: Uint32
):
    """The inverse of `_columns_of_row`."""
    if cutlass.const_expr(whole):
        if left > 0:
            words = cute.recast_ptr(m_linear + offset, dtype=Uint32).align(4)
            cute.make_tensor(words, cute.make_layout(1))[0] = word
    else:
        scales = cute.make_tensor(m_linear + offset, cute.make_layout(4))
        for i in cutlass.range_constexpr(4):
            if i < left:
                scales[i] = (word >> Uint32(8 * i)).to(Uint8)


@cute.kernel
def _swizzle(
    whole: cutlass.Constexpr[bool],
    inverse: cutlass.Constexpr[bool],
    m_linear: cute.Pointer,
    m_swizzled: cute.Pointer,
    rows: Int32,
    columns: Int32,
):
    thread, _, _ = cute.arch.thread_idx()
    place, _, _ = cute.arch.block_idx()
    row_tiles, chunks = (rows + 127) // 128, (columns + 3) // 4
    groups = (chunks + _ACROSS - 1) // _ACROSS
    tile, chunk = place // groups, place % groups * _ACROSS + thread % _ACROSS
    matrix, tile_row, i = tile // row_tiles, tile % row_tiles, thread // _ACROSS
    if chunk < chunks:
        swizzled_at = ((Int64(tile) * chunks + chunk) * 32 + i) * 4
        r_words = cute.make_rmem_tensor(4, Uint32)
        if cutlass.const_expr(inverse):
            r_words.store(load(m_swizzled, swizzled_at, 4).load())
        for part in cutlass.range_constexpr(4):
            row = tile_row * 128 + i + 32 * part
            offset = (Int64(matrix) * rows + row) * columns + chunk * 4
            left = columns - chunk * 4
            if row >= rows:
                left = 0
            if cutlass.const_expr(inverse):
                _store_columns(whole, m_linear, offset, left, r_words[part])
            else:
                r_words[part] = _columns_of_row(whole, m_linear, offset, left)
        if cutlass.const_expr(not inverse):
            store(m_swizzled, swizzled_at, r_words)


_swizzle.set_name_prefix("swizzle_scales", remove_cutlass_symbol=True, keep_mangled_name=False)


def make_swizzle(whole: bool, inverse: bool):
    """The host function of: scales (matrices, rows, columns), words of swizzled ones, CTAs, rows, columns.

    Args:
        whole: columns are a multiple of 4.
        inverse: from swizzled to linear.
    """

    @cute.jit
    def swizzle_rows(
        m_linear: cute.Pointer,
        m_swizzled: cute.Pointer,
        ctas: Int32,
        rows: Int32,
        columns: Int32,
        stream: cuda.CUstream,
    ):
        _swizzle(whole, inverse, m_linear, m_swizzled, rows, columns).launch(
            grid=(ctas, 1, 1), block=(_THREADS, 1, 1), stream=stream
        )

    return swizzle_rows


def swizzle_scales(scales: Tensor, out: Tensor) -> None:
    """See `reference.swizzle`; out may have more rows."""
    outputs = Outputs()
    *lead, rows, columns = scales.shape
    target = outputs.take(out, (*lead, -(-rows // 128) * 128, -(-columns // 4) * 4))
    _launch(False, kernel_input(scales), target, math.prod(lead), rows, columns)
    outputs.finish()


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int, out: Tensor) -> None:
    """See `reference.unswizzle`; out may have more rows."""
    outputs = Outputs()
    lead = swizzled.shape[:-2]
    target = outputs.take(out, (*lead, rows, columns))
    _launch(True, target, kernel_input(swizzled), math.prod(lead), rows, columns)
    outputs.finish()


def _launch(inverse: bool, linear: Tensor, swizzled: Tensor, matrices: int, rows: int, columns: int) -> None:
    Rows.of((matrices, rows, columns * 16), True)
    ctas = matrices * -(-rows // 128) * -(-columns // (4 * _ACROSS))
    if ctas:
        pointers = [As(linear, cutlass.Uint8), As(swizzled, cutlass.Uint32)]
        launch(make_swizzle, (columns % 4 == 0, inverse), [*pointers, ctas, rows, columns])
