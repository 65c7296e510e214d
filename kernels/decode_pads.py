"""Zeros in block scales where a buffer has no token, written while the first weights are on their way.

The next GEMM reads block scales of 128 rows at a time, and its padding must not turn into NaN.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Int32, Int64, Uint8, Uint32, cute
from dsv4lab.kernels.decode_form import Form
from dsv4lab.kernels.gemm_tiles import WARP, Work
from dsv4lab.kernels.rows import swizzled_offset

_ROWS, _COLUMNS = 128, 4  # of a chunk of block scales


@cute.jit
def clear_pads(
    form: cutlass.Constexpr[Form], work: Work, scales: cute.Pointer, columns: Int32, first: Int32, step: Int32
):
    """Zero the scales of all rows that no group has.

    Args:
        scales: bytes of (rows, columns) scales, or those padded and swizzled.
        first, step: this warp's number and how many there are; all its lanes come here.
    """
    lane, across = cute.arch.lane_idx(), cute.ceil_div(columns, _COLUMNS)
    for number in cutlass.range(first, cute.ceil_div(work.rows, _ROWS) * across, step, unroll=1):
        start, column = number // across * _ROWS, number % across * _COLUMNS
        real = _real_rows(form, work, start)
        for i in cutlass.range_constexpr(_ROWS // WARP):
            row = lane + i * WARP
            if row >= real:
                if cutlass.const_expr(form.swizzled):
                    at = swizzled_offset(Int32(0), start + row, column, work.rows, columns)
                    words = cute.recast_ptr((scales + at).align(4), dtype=Uint32)
                    cute.make_tensor(words, cute.make_layout(1))[0] = Uint32(0)
                else:
                    for j in cutlass.range_constexpr(_COLUMNS):
                        if start + row < work.rows and column + j < columns:
                            place = scales + (Int64(start + row) * columns + column + j)
                            cute.make_tensor(place, cute.make_layout(1))[0] = Uint8(0)


@cute.jit
def _real_rows(form: cutlass.Constexpr[Form], work: Work, row: Int32) -> Int32:
    """How many of the 128 rows from that one on are a group's real ones; they are the first of them."""
    if cutlass.const_expr(not form.grouped):
        return work.rows - row
    group = Int32(0)
    for first in cutlass.range(0, work.groups, WARP, unroll=1):
        at, before = first + cute.arch.lane_idx(), cutlass.Boolean(False)
        if at < work.groups:
            before = work.offsets[at] <= row
        group += cute.arch.popc(cute.arch.vote_ballot_sync(before))
    real = Int32(0)
    if group < work.groups:
        start = Int32(0)
        if group > 0:
            start = work.offsets[group - 1]
        real = start + work.sizes[group] - row
    return real
