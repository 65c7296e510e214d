"""Dequantize: a thread makes 8 values at a time, so that those of a warp are stored without gaps."""

# No annotations from __future__: the DSL reads them as types.
import math

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Boolean, Float32, Int32, Int64, Uint32, cute
from dsv4lab.kernels import quantize_plan as plan
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.launch import As, launch
from dsv4lab.kernels.quantize_block import decode
from dsv4lab.kernels.quantize_run import ELEMENTS, Outputs, Rows, kernel_input
from dsv4lab.kernels.quantize_scales import scale_of_row
from dsv4lab.kernels.rows import store, swizzled_offset
from torch import Tensor


def _converted(values: list[Float32], element: str) -> list[Uint32]:
    """Floats as words of an element type."""
    if element == "f32":
        return [ptx.bits(x) for x in values]
    pair = ptx.to_bf16x2 if element == "bf16" else ptx.to_f16x2
    return [pair(high, low) for low, high in zip(values[0::2], values[1::2], strict=True)]


@cute.jit
def _load_unit(
    swizzled: cutlass.Constexpr[bool],
    m_codes: cute.Pointer,
    m_scales: cute.Pointer,
    matrix: Int32,
    row: Int64,
    r: Int32,
    rows: Int32,
    unit: Int32,
    units: Int32,
    here: Boolean,
    r_unit: cute.Tensor,
):
    """The codes of 8 values, and their scale."""
    columns, column = units // 2, unit // 2
    at = row * columns + column
    if cutlass.const_expr(swizzled):
        at = swizzled_offset(matrix, r, column, rows, columns)
    r_unit.fill(0)
    if here:
        r_unit[0] = cute.make_tensor(m_codes + (row * units + unit), cute.make_layout(1))[0]
        r_unit[1] = cute.make_tensor(m_scales + at, cute.make_layout(1))[0].to(Uint32)


@cute.jit
def _store_unit(
    element: cutlass.Constexpr[str],
    m_out: cute.Pointer,
    offset: Int64,
    here: Boolean,
    r_unit: cute.Tensor,
    g: Float32,
):
    values = [ptx.mul(x, g) for x in decode(r_unit[0], ptx.from_e4m3(r_unit[1]))]
    words = _converted(values, element)
    r_words = cute.make_rmem_tensor(len(words), Uint32)
    for i in cutlass.range_constexpr(len(words)):
        r_words[i] = words[i]
    if here:
        store(m_out, offset * len(words), r_words)


@cute.kernel
def _dequantize(
    teams: cutlass.Constexpr[plan.Teams],
    of: cutlass.Constexpr[str],
    swizzled: cutlass.Constexpr[bool],
    interleaved: cutlass.Constexpr[bool],
    element: cutlass.Constexpr[str],
    m_codes: cute.Pointer,
    m_scales: cute.Pointer,
    m_g: cute.Pointer,
    m_out: cute.Pointer,
    matrices: Int32,
    rows: Int32,
    units: Int32,
    tiles: Int32,
):
    thread, _, _ = cute.arch.thread_idx()
    (x, y, _), (step_x, step_y, _) = cute.arch.block_idx(), cute.arch.grid_dim()
    lane, mine = thread % teams.team, thread // teams.team
    for matrix in cutlass.range(y, matrices, step_y, unroll=1):
        for tile in cutlass.range(x, tiles, step_x, unroll=1):
            r = tile * teams.teams + mine
            row = Int64(matrix) * rows + r
            for first in cutlass.range(lane, units, teams.team * teams.blocks, unroll=1):
                r_units = cute.make_rmem_tensor((2, teams.blocks), Uint32)
                for slot in cutlass.range_constexpr(teams.blocks):
                    unit = first + slot * teams.team
                    here, r_unit = (r < rows) & (unit < units), r_units[None, slot]
                    place = (matrix, row, r, rows, unit, units, here)
                    _load_unit(swizzled, m_codes, m_scales, *place, r_unit)
                g = scale_of_row(of, interleaved, m_g, matrix, row, r, rows)
                for slot in cutlass.range_constexpr(teams.blocks):
                    unit = first + slot * teams.team
                    here, r_unit = (r < rows) & (unit < units), r_units[None, slot]
                    _store_unit(element, m_out, row * units + unit, here, r_unit, g)


_dequantize.set_name_prefix("dequantize", remove_cutlass_symbol=True, keep_mangled_name=False)


def make_dequantize(teams: plan.Teams, of: str, swizzled: bool, interleaved: bool, element: str):
    """The host function of: words of codes, scales, global scales, words of the result; matrices, rows of
    each, words of codes in a row, tiles of teams, matrices at a time."""

    @cute.jit
    def dequantize_rows(
        m_codes: cute.Pointer,
        m_scales: cute.Pointer,
        m_g: cute.Pointer,
        m_out: cute.Pointer,
        matrices: Int32,
        rows: Int32,
        units: Int32,
        tiles: Int32,
        grid_y: Int32,
        stream: cuda.CUstream,
    ):
        _dequantize(
            teams,
            of,
            swizzled,
            interleaved,
            element,
            m_codes,
            m_scales,
            m_g,
            m_out,
            matrices,
            rows,
            units,
            tiles,
        ).launch(grid=(tiles, grid_y, 1), block=(teams.threads, 1, 1), stream=stream)

    return dequantize_rows


def dequantize(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    granularity: str,
    swizzled: bool,
    interleaved: bool,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """See `reference.dequantize`; out may have more rows."""
    lead = codes.shape[:-1]
    shape = (*lead, codes.shape[-1] * 2)
    if not math.prod(shape):
        return
    size = Rows.of(shape, granularity == "group" or (swizzled and len(shape) == 3))
    units, device = 2 * size.columns, codes.device
    teams = plan.row_teams("dequantize", size.matrices * size.rows, units, plan.sm_count(device))
    of = "halves" if granularity == "group" and global_scale.dim() == 2 else granularity
    outputs = Outputs()
    target = outputs.take(out, shape)
    g, scales = kernel_input(global_scale), kernel_input(scales)
    launch(make_dequantize, (teams, of, swizzled, interleaved and of == "halves", ELEMENTS[dtype]), [
        As(kernel_input(codes), cutlass.Uint32), As(scales, cutlass.Uint8), g, As(target, cutlass.Uint32),
        size.matrices, size.rows, units, -(-size.rows // teams.teams), min(size.matrices, plan.MAX_GRID_Y),
    ])  # fmt: skip
    outputs.finish()
