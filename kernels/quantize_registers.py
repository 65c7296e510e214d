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
from dsv4lab.kernels.quantize_sources import finished, read, squares
from dsv4lab.kernels.rows import load, padded_columns, store, swizzled_column, swizzled_row


class Blocks:
    """The blocks of a thread in its registers, and where they come from.

    A norm's weight is read when it is needed: it is in a cache, and registers are few. Where a thread has one
    block, rows are few and the weight is in no cache yet, so it is read first.
    """

    def __init__(self, form: Form, m_x, m_mix, m_weight, columns: Int32, limit: Float32, lane: Int32):
        self.form, self.m_x, self.m_mix, self.m_weight = form, m_x, m_mix, m_weight
        self.columns, self.limit, self.lane = columns, limit, lane
        self.r_read = [cute.make_rmem_tensor(form.read_words, Uint32) for _ in range(form.blocks)]
        self.r_block = [cute.make_rmem_tensor(form.block_words, Uint32) for _ in range(form.blocks)]
        self.r_high = cute.make_rmem_tensor(form.blocks, Uint32)
        self.r_weight = cute.make_rmem_tensor(words_of(form.weight) if form.weight_first else 1, Uint32)
        if form.weight_first:
            _read_weight(form, m_weight, lane, columns, self.r_weight)

    def column(self, chunk: Int32, slot: int) -> Int32:
        """Of a thread's block in a row."""
        return (chunk * self.form.blocks + slot) * self.form.team + self.lane


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
    high = None
    for slot in range(blocks.form.blocks):
        column, r_block = blocks.column(chunk, slot), blocks.r_block[slot]
        active = here & (column < blocks.columns)
        given = (blocks.r_read[slot], blocks.m_weight, blocks.r_weight, column)
        _finish_block(blocks.form, *given, rrms, blocks.limit, active, r_block)
        amax = block.amax(_listed(r_block))
        blocks.r_high[slot] = amax
        high = amax if high is None else ptx.umax(high, amax)
    return high


def encode(
    blocks: Blocks, m_codes, m_scales, m_kept, matrix: Int32, row: Int64, r: Int32, rows: Int32,
    here: Boolean, chunk: Int32, g: Float32,
) -> None:  # fmt: skip
    """Scales and codes of the blocks, written."""
    form, columns = blocks.form, blocks.columns
    row_scale = block.row_scale(g)
    scales_at = swizzled_row(matrix, r, rows, columns) if form.swizzled else row * columns
    for slot in range(form.blocks):
        column = blocks.column(chunk, slot)
        scale_at = column
        if form.swizzled:
            # Said so, because the compiler does not find that slots are a constant apart.
            apart = form.team % 4 == 0
            scale_at = swizzled_column(blocks.column(chunk, 0) if apart else column)
            scale_at += slot * form.team * 128 if apart else 0
        _encode_block(
            form, m_codes, m_scales, m_kept, row * columns + column, column, columns, here,
            scales_at + scale_at, row_scale.g, row_scale.unit, row_scale.divisor, row_scale.reciprocal,
            row_scale.saturates, blocks.r_high[slot], blocks.r_block[slot],
        )  # fmt: skip


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
        _fill(r_weight, _listed(load(m_weight, Int64(column) * words, words)))


@cute.jit
def _finish_block(
    form: cutlass.Constexpr[Form],
    r_read: cute.Tensor,
    m_weight: cute.Pointer,
    r_weight: cute.Tensor,
    column: Int32,
    rrms: Float32,
    limit: Float32,
    active: Boolean,
    r_block: cute.Tensor,
):
    """A block as it is quantized, 0 where there is none: a norm would make NaN of 0 and infinity."""
    if cutlass.const_expr(form.source == "plain"):
        _fill(r_block, finished(form, _listed(r_read), rrms, None, limit))
    else:
        r_block.fill(0)
        if active:
            words = cutlass.const_expr(words_of(form.weight))
            weight = _listed(r_weight)
            if cutlass.const_expr(form.norm and not form.weight_first):
                weight = _listed(load(m_weight, Int64(column) * words, words))
            _fill(r_block, finished(form, _listed(r_read), rrms, weight, limit))


def _fill(r_words: cute.Tensor, words: list[Uint32]) -> None:
    for i, word in enumerate(words):
        r_words[i] = word


@cute.jit
def _encode_block(
    form: cutlass.Constexpr[Form],
    m_codes: cute.Pointer,
    m_scales: cute.Pointer,
    m_kept: cute.Pointer,
    at: Int64,
    column: Int32,
    columns: Int32,
    here: Boolean,
    scale_at: Int64,
    g: Float32,
    unit: Float32,
    divisor: Float32,
    reciprocal: Float32,
    saturates: Float32,
    high: Uint32,
    r_block: cute.Tensor,
):
    """Codes and scale of a block; in the swizzled layout also the zero scales that fill a row up."""
    if here & (column < padded_columns(form.swizzled, columns)):
        scale, step = block.block_scale(high, block.RowScale(g, unit, divisor, reciprocal, saturates))
        if cutlass.const_expr(form.swizzled):
            scale = Uint32(select_(column < columns, scale, Uint32(0)))
        cute.make_tensor(m_scales + scale_at, cute.make_layout(1))[0] = scale.to(Uint8)
        if column < columns:
            r_codes = cute.make_rmem_tensor(2, Uint32)
            r_codes[0], r_codes[1] = block.encode(_listed(r_block), step, form.has_e2m1)
            store(m_codes, at * 2, r_codes)
            if cutlass.const_expr(form.keeps):
                store(m_kept, at * form.block_words, r_block)
