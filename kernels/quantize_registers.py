"""The blocks that a thread has in its registers: read, finished, encoded, written, all of them at each step.

These are plain functions, which the kernel unrolls; a thread's few conditions are in functions of the DSL.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cutlass_dsl import select_
from dsv4lab.kernels import quantize_block as block
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.quantize_form import Form, words_of
from dsv4lab.kernels.quantize_sources import finished, read, singles, squares
from dsv4lab.kernels.rows import load, padded_columns, store, swizzled_offset


class Blocks:
    """The blocks of a thread in its registers, and where they come from."""

    def __init__(self, form: Form, m_x, m_mix, m_weight, columns: Int32, limit: Float32, lane: Int32):
        self.form, self.m_x, self.m_mix, self.m_weight = form, m_x, m_mix, m_weight
        self.columns, self.limit, self.lane = columns, limit, lane
        self.r_read = [cute.make_rmem_tensor(form.read_words, Uint32) for _ in range(form.blocks)]
        self.r_block = [cute.make_rmem_tensor(form.block_words, Uint32) for _ in range(form.blocks)]
        self.r_high = cute.make_rmem_tensor(form.blocks, Uint32)
        words = words_of(form.weight) if form.norm else 1
        self.r_weight = [cute.make_rmem_tensor(words, Uint32) for _ in range(form.blocks)]

    def column(self, chunk: Int32, slot: int) -> Int32:
        """Of a thread's block in a row."""
        return (chunk * self.form.blocks + slot) * self.form.team + self.lane


def read_weights(blocks: Blocks, chunk: Int32) -> None:
    for slot in range(blocks.form.blocks):
        column, r_weight = blocks.column(chunk, slot), blocks.r_weight[slot]
        _read_weight(blocks.form, blocks.m_weight, column, blocks.columns, r_weight)


def read_blocks(blocks: Blocks, row: Int64, here: Boolean, chunk: Int32) -> None:
    for slot in range(blocks.form.blocks):
        column = blocks.column(chunk, slot)
        active = here & (column < blocks.columns)
        pointers = (blocks.m_x, blocks.m_mix)
        read(blocks.form, *pointers, row, column, blocks.columns, active, blocks.r_read[slot])


def square_sum(blocks: Blocks, total: Float32) -> Float32:
    for r_words in blocks.r_read:
        total = squares(blocks.form, _listed(r_words), total)
    return total


def finish(blocks: Blocks, rrms: Float32, here: Boolean, chunk: Int32) -> Uint32:
    """From what was read to what is quantized; bits of the largest amax."""
    form, high = blocks.form, None
    for slot in range(form.blocks):
        weight = singles(_listed(blocks.r_weight[slot]), form.weight) if form.norm else None
        words = finished(form, _listed(blocks.r_read[slot]), rrms, weight, blocks.limit)
        for i, word in enumerate(words):
            blocks.r_block[slot][i] = word
        amax = block.amax(words)
        if form.norm:
            # Where there are no values, a norm makes NaN of 0 and infinity.
            active = here & (blocks.column(chunk, slot) < blocks.columns)
            amax = Uint32(select_(active, amax, Uint32(0)))
        blocks.r_high[slot] = amax
        high = amax if high is None else ptx.umax(high, amax)
    return high


def encode(
    blocks: Blocks, m_codes, m_scales, m_kept, matrix: Int32, row: Int64, r: Int32, rows: Int32,
    here: Boolean, chunk: Int32, g: Float32,
) -> None:  # fmt: skip
    form, columns = blocks.form, blocks.columns
    row_scale = block.row_scale(g)
    for slot in range(form.blocks):
        column = blocks.column(chunk, slot)
        scale, step = block.block_scale(blocks.r_high[slot], row_scale)
        scale = Uint32(select_(column < columns, scale, Uint32(0)))
        r_codes = cute.make_rmem_tensor(2, Uint32)
        r_codes[0], r_codes[1] = block.encode(_listed(blocks.r_block[slot]), step, form.has_e2m1)
        offset = row * columns + column
        if form.swizzled:
            offset = swizzled_offset(matrix, r, column, rows, columns)
        pointers, r_block = (m_codes, m_scales, m_kept), blocks.r_block[slot]
        _write_block(form, *pointers, row, column, columns, here, offset, scale, r_codes, r_block)


def _listed(r_words: cute.Tensor) -> list[Uint32]:
    return [r_words[i] for i in range(cute.size(r_words))]


@cute.jit
def _read_weight(
    form: cutlass.Constexpr[Form],
    m_weight: cute.Pointer,
    column: Int32,
    columns: Int32,
    r_weight: cute.Tensor,
):
    words = cutlass.const_expr(words_of(form.weight))
    r_weight.fill(0)
    if column < columns:
        r_weight.store(load(m_weight, Int64(column) * words, words).load())


@cute.jit
def _write_block(
    form: cutlass.Constexpr[Form],
    m_codes: cute.Pointer,
    m_scales: cute.Pointer,
    m_kept: cute.Pointer,
    row: Int64,
    column: Int32,
    columns: Int32,
    here: Boolean,
    scale_offset: Int64,
    scale: Uint32,
    r_codes: cute.Tensor,
    r_block: cute.Tensor,
):
    """Codes and scale of a block; in the swizzled layout also the zero scales that fill a row up."""
    at = row * columns + column
    if here & (column < columns):
        store(m_codes, at * 2, r_codes)
        if cutlass.const_expr(form.keeps):
            store(m_kept, at * form.block_words, r_block)
    if here & (column < padded_columns(form.swizzled, columns)):
        cute.make_tensor(m_scales + scale_offset, cute.make_layout(1))[0] = scale.to(Uint8)
