"""Figures and tables for the notebooks: pure functions of their arguments that return something to show."""

from dsv4lab.plots.blackwell import matrices, shared_lines, tensor_memory, tma_boxes
from dsv4lab.plots.decode import Texts, agreement_by_margin, bars, code_use, logits, sqnr_by_layer
from dsv4lab.plots.gemm import error_shares, error_table, group_rows, mma_step, sum_errors
from dsv4lab.plots.groups import (
    attention_output,
    block_diagonal,
    group_levels,
    group_spread,
    position_shift,
    shift_levels,
    spread_groups,
)
from dsv4lab.plots.quantization import (
    block,
    block_codes,
    edited_block,
    number_lines,
    policies,
    round_trip,
    saturation,
    sqnr_against_scale,
    sqnr_db,
    staircase,
)
from dsv4lab.plots.style import Picture, Table
from dsv4lab.plots.swiglu import (
    clamped,
    fusion_bytes,
    gate_up_rows,
    granularity,
    granularity_error,
    interleaved_by,
    swiglu_traffic,
)
from dsv4lab.plots.tables import backends, conventions, weight_bytes
from dsv4lab.plots.timeline import busy, timeline, trace_step, trace_steps

__all__ = [
    "Picture",
    "Table",
    "Texts",
    "agreement_by_margin",
    "attention_output",
    "backends",
    "bars",
    "block",
    "block_codes",
    "block_diagonal",
    "busy",
    "clamped",
    "code_use",
    "conventions",
    "edited_block",
    "error_shares",
    "error_table",
    "fusion_bytes",
    "gate_up_rows",
    "granularity",
    "granularity_error",
    "group_levels",
    "group_rows",
    "group_spread",
    "interleaved_by",
    "logits",
    "matrices",
    "mma_step",
    "number_lines",
    "policies",
    "position_shift",
    "round_trip",
    "saturation",
    "shared_lines",
    "shift_levels",
    "spread_groups",
    "sqnr_against_scale",
    "sqnr_by_layer",
    "sqnr_db",
    "staircase",
    "sum_errors",
    "swiglu_traffic",
    "tensor_memory",
    "timeline",
    "tma_boxes",
    "trace_step",
    "trace_steps",
    "weight_bytes",
]
