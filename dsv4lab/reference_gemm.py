"""The grouped block-scaled GEMM in plain torch: exact decoded operands, float32 products, one rounding.

A code times its block scale has at most 6 significant bits. Decoded operands are therefore exact in float32
(and in bf16 and TF32); float32 accumulation is the only source of error before the final rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .decoded import Stack, decoded_weight
from .formats import BLOCK, SWIZZLE_ROWS

_TILE_BYTES = 1 << 28  # of gathered weights at a time, where the host must not know the group sizes


class Rows(NamedTuple):
    """The activations as an operator gets them: codes with scales, or bf16 values with neither."""

    data: Tensor
    scales: Tensor | None
    global_scale: Tensor | None
    layout: str
    granularity: str


class Span(NamedTuple):
    """The real rows start..stop of one group in the padded buffer."""

    group: int
    start: int
    stop: int


def product(
    a: Rows, b: Stack, offsets: Tensor | None, sizes: Tensor | None
) -> tuple[Tensor, list[Span] | None]:
    """Scaled products in float32, for the rows that the spans name, or for all rows where there are none.

    On the CPU the group sizes are read, so that only real rows are computed. Elsewhere nothing is read back:
    the buffer is cut into tiles of 128 rows, each of which belongs to one group.
    """
    if offsets is None:
        return _one_group(a, b), None
    if _host_knows_sizes(offsets):
        spans = read_spans(offsets, sizes, a.data.shape[0])
        return _spans_product(a, b, spans), spans
    return _tiles_product(a, b, offsets), None


def _host_knows_sizes(offsets: Tensor) -> bool:
    return offsets.device.type == "cpu"


def read_spans(offsets: Tensor, sizes: Tensor, rows: int) -> list[Span]:
    """The non-empty groups, on the host.

    Raises:
        ValueError: offsets do not ascend in multiples of 128 within the buffer, or a group outgrows its span.
    """
    spans, start = [], 0
    for group, (end, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        if end < start or end > rows or end % SWIZZLE_ROWS:
            raise ValueError(
                f"offsets must ascend in multiples of {SWIZZLE_ROWS} up to {rows} rows, "
                f"got {end} after {start} for group {group}"
            )
        if not 0 <= size <= end - start:
            raise ValueError(
                f"sizes must lie within 0 and the group's {end - start} rows, got {size} for group {group}"
            )
        if size:
            spans.append(Span(group, start, start + size))
        start = end
    return spans


def scatter(result: Tensor, spans: list[Span] | None, rows: int, fill: bool = False) -> Tensor:
    """Put packed rows to their places in a buffer of `rows` rows; pads are zero with `fill`."""
    if spans is None:
        return result
    shape = (rows, *result.shape[1:])
    out = result.new_zeros(shape) if fill else result.new_empty(shape)
    sizes = [s.stop - s.start for s in spans]
    for span, part in zip(spans, result.split(sizes) if spans else (), strict=True):
        out[span.start : span.stop] = part
    return out


def grouped_mm(a: Rows, b: Stack, offsets: Tensor | None, sizes: Tensor | None) -> Tensor:
    """(rows, N) bf16."""
    values, spans = product(a, b, offsets, sizes)
    return scatter(values.to(torch.bfloat16), spans, a.data.shape[0])


def grouped_mm_swiglu(
    a: Rows, b: Stack, offsets: Tensor | None, sizes: Tensor | None, limit: float | None
) -> Tensor:
    """(rows, I) bf16."""
    values, spans = product(a, b, offsets, sizes)
    return scatter(_swiglu(values, limit), spans, a.data.shape[0])


def grouped_mm_swiglu_quantize(
    a: Rows, b: Stack, offsets: Tensor | None, sizes: Tensor | None,
    limit: float | None, global_scale: Tensor, layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (rows, I/2) and block scales of the bf16 value; those of padding rows are zero."""
    values, spans = product(a, b, offsets, sizes)
    codes, scales, _ = reference.quantize(_swiglu(values, limit), global_scale, "tensor", 1.0, False)
    rows = a.data.shape[0]
    codes, scales = scatter(codes, spans, rows), scatter(scales, spans, rows, fill=True)
    if spans is None and offsets is not None:
        scales.view(torch.uint8).masked_fill_(_padding(offsets, sizes, rows)[:, None], 0)
    return codes, reference.swizzle(scales) if layout == "swizzled" else scales


def _padding(offsets: Tensor, sizes: Tensor, rows: int) -> Tensor:
    """Which rows of the buffer hold no token, (rows,) bool."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    group = torch.searchsorted(offsets, row, right=True)
    starts = torch.cat((offsets.new_zeros(1), offsets))
    ends = starts + torch.cat((sizes, sizes.new_zeros(1)))  # behind the last group all is padding
    return row >= ends[group]


def _swiglu(values: Tensor, limit: float | None) -> Tensor:
    """Clamped SwiGLU in float32, rounded to bf16, of rows of 8 gates, their 8 ups, the next 8 gates, ..."""
    gate, up = values.unflatten(-1, (values.shape[-1] // 16, 2, 8)).unbind(-2)
    return reference.swiglu(gate, up, limit).flatten(-2)


def _one_group(a: Rows, b: Stack) -> Tensor:
    scale, g = _column_scales(b)[0], _row_scale(a, Span(0, 0, a.data.shape[0]))
    return F.linear(_decode(a.data, _linear_scales(a)), decoded_weight(b)[0]) * (
        scale if g is None else g * scale
    )


def _spans_product(a: Rows, b: Stack, spans: list[Span]) -> Tensor:
    weight, columns, scales = decoded_weight(b), _column_scales(b), _linear_scales(a)
    if not spans:
        return weight.new_empty(0, weight.shape[1])
    data = torch.cat([a.data[s.start : s.stop] for s in spans])
    scales = None if scales is None else torch.cat([scales[s.start : s.stop] for s in spans])
    values = _decode(data, scales).split([s.stop - s.start for s in spans])
    parts = []
    for span, rows in zip(spans, values, strict=True):
        scale, g = columns[span.group], _row_scale(a, span)
        parts.append(F.linear(rows, weight[span.group]) * (scale if g is None else g * scale))
    return torch.cat(parts)


def _tiles_product(a: Rows, b: Stack, offsets: Tensor) -> Tensor:
    weight, columns = decoded_weight(b), _column_scales(b)
    rows, (groups, n, k) = a.data.shape[0], weight.shape
    first = torch.arange(0, rows, SWIZZLE_ROWS, device=offsets.device, dtype=offsets.dtype)
    # Tiles behind the last group belong to none; any weight will do for their unspecified rows.
    group = torch.searchsorted(offsets, first, right=True).clamp_(max=groups - 1)
    values = _decode(a.data, _linear_scales(a)).view(-1, SWIZZLE_ROWS, k)
    out = values.new_empty(values.shape[0], SWIZZLE_ROWS, n)
    step = max(1, _TILE_BYTES // (4 * n * k or 1))
    for start in range(0, values.shape[0], step):
        part = slice(start, start + step)
        scale = columns[group[part]][:, None]
        if a.global_scale is not None:
            scale = _tile_scales(a, group)[part] * scale
        out[part] = torch.bmm(values[part], weight[group[part]].transpose(1, 2)) * scale
    return out.view(rows, n)


def _tile_scales(a: Rows, group: Tensor) -> Tensor:
    """The activations' global scale for each tile, (tiles, 1 or 128, 1)."""
    g = a.global_scale
    if a.granularity == "tensor":
        return g.expand(len(group), 1, 1)
    return g[group][:, None, None] if a.granularity == "group" else g.view(-1, SWIZZLE_ROWS, 1)


def _row_scale(a: Rows, span: Span) -> Tensor | None:
    """The activations' global scale for the rows of one group: (), (rows, 1), or None for bf16 rows."""
    g = a.global_scale
    if g is None or a.granularity == "tensor":
        return g
    return g[span.group] if a.granularity == "group" else g.view(-1, 1)[span.start : span.stop]


def _column_scales(b: Stack) -> Tensor:
    """The weights' global scale for each group and output column, (G, N)."""
    g, (groups, n, _) = b.global_scale, b.shape
    if g.dim() < 2:
        return g.view(-1, 1).expand(groups, n)
    return g.repeat_interleave(8, 1).repeat(1, n // 16) if b.interleaved else g.repeat_interleave(n // 2, 1)


def _linear_scales(a: Rows) -> Tensor | None:
    if a.scales is None or a.layout == "linear":
        return a.scales
    return reference.unswizzle(a.scales, a.data.shape[0], a.data.shape[1] * 2 // BLOCK)


def _decode(data: Tensor, scales: Tensor | None) -> Tensor:
    """Values in float32 without the global scale: code times block scale, or bf16 as it is."""
    return data.float() if scales is None else reference.decode(data, scales)
