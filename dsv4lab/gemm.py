"""Grouped block-scaled GEMM: activations of many groups, each with a weight matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference_gemm as ref
from .decoded import Stack
from .formats import BLOCK, SCALE_DTYPE, NVFP4Tensor, scales_shape
from .gemm_arguments import check_out, known_scale, matrix, operands
from .ops import register_op
from .policies import check_limit

_OPERANDS = (
    "Tensor a, Tensor? a_scales, Tensor? a_global, str a_layout, str a_granularity, "
    "Tensor b, Tensor b_scales, Tensor b_global, str b_layout, bool b_interleaved, "
    "Tensor? offsets, Tensor? sizes"
)


def grouped_mm(
    a: NVFP4Tensor | Tensor,
    b: NVFP4Tensor,
    offsets: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each group's rows with its weight: `(g_a g_b) sum_k (code_a s_a)(code_b s_b)`, once rounded.

    Args:
        a: (rows, K) NVFP4, or bf16 for weight-only quantization; with one group also (..., K). K % 16 == 0.
        b: (G, N, K) NVFP4, or (N, K) for one group; its global scale is (), (G,), or (G, 2) where gate and up
            rows share the matrix.
        offsets: (G,) int32 on the device, ends of the groups in a, multiples of 128; None for one group.
        sizes: (G,) int32, real rows of each group; the others are padding.
        backend: None takes the device's default.
        out: (at least rows, N) bf16 to write into.

    Returns:
        (rows, N) bf16, or (..., N); padding rows hold anything.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    flat, lead = operands(a, b, offsets, sizes)
    shape = (flat[0].shape[0], matrix(b)[1])
    if out is None:
        return GROUPED_MM(*flat, backend=backend).view(*lead, shape[1])
    check_out(out, shape, lead, b.device)
    GROUPED_MM.out(*flat, outs=(out,), backend=backend)
    return out[: shape[0]]


def grouped_mm_swiglu(
    a: NVFP4Tensor | Tensor,
    b: NVFP4Tensor,
    offsets: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    limit: float | None = 10.0,
    output: str = "bf16",
    global_scale: float | Tensor | None = None,
    scale_layout: str = "linear",
    backend: str | None = None,
    out: Tensor | NVFP4Tensor | None = None,
) -> Tensor | NVFP4Tensor:
    """The same, followed by clamped SwiGLU in float32: writes the half of width I alone.

    Args:
        a, offsets, sizes, backend: as for grouped_mm.
        b: (G, 2I, K) or (2I, K) NVFP4 with gate and up rows interleaved, I % 8 == 0.
        limit: clamps the gate from above and up on both sides; None clamps nothing.
        output: "bf16", or "nvfp4": the bf16 value is quantized under a known global scale, I % 16 == 0.
        global_scale: of the NVFP4 output, a float or a () float32 tensor; None takes the bound that the clamp
            implies.
        scale_layout: of the NVFP4 output, "linear" or "swizzled".
        out: (at least rows, I) bf16, or an NVFP4Tensor of that shape whose parts are written.

    Returns:
        (rows, I) bf16 or NVFP4; padding rows hold anything, their block scales zero.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; b is not interleaved.
    """
    flat, lead = operands(a, b, offsets, sizes)
    if not b.interleaved:
        raise ValueError("b must be interleaved (see interleave_gate_up), got gate and up rows as halves")
    limit = None if limit is None else check_limit(limit)
    if output not in ("bf16", "nvfp4"):
        raise ValueError(f'output must be "bf16" or "nvfp4", got {output!r}')
    shape = (flat[0].shape[0], matrix(b)[1] // 2)
    if output == "nvfp4":
        g = known_scale(global_scale, limit, b.device)
        return _swiglu_nvfp4(flat, shape, lead, limit, g, scale_layout, backend, out)
    if global_scale is not None:
        raise ValueError('global_scale is for output="nvfp4", got one for "bf16"')
    if out is None:
        return GROUPED_MM_SWIGLU(*flat, limit, backend=backend).view(*lead, shape[1])
    check_out(out, shape, lead, b.device)
    GROUPED_MM_SWIGLU.out(*flat, limit, outs=(out,), backend=backend)
    return out[: shape[0]]


def _swiglu_nvfp4(flat, shape, lead, limit, g, scale_layout, backend, out) -> NVFP4Tensor:
    if shape[1] % 16:
        raise ValueError(f"b must have 2I rows with I % 16 == 0 for NVFP4 output, got I = {shape[1]}")
    if scale_layout == "swizzled" and len(lead) != 1:
        raise ValueError(f"scale_layout='swizzled' needs a of shape (rows, K), got leading dimensions {lead}")
    arguments = (*flat, limit, g, scale_layout)
    if out is None:
        codes, scales = GROUPED_MM_SWIGLU_QUANTIZE(*arguments, backend=backend)
        if scale_layout == "linear":
            codes, scales = codes.view(*lead, shape[1] // 2), scales.view(*lead, shape[1] // BLOCK)
        return NVFP4Tensor(codes, scales, g, scale_layout, "tensor")
    if not isinstance(out, NVFP4Tensor):
        raise TypeError(f"out must be an NVFP4Tensor for output='nvfp4', got {type(out).__name__}")
    if out.device != g.device:
        raise ValueError(f"out is on {out.device}, but b is on {g.device}")
    if out.scale_layout != scale_layout or out.granularity != "tensor":
        raise ValueError(
            f"out must be {scale_layout} with one global scale, got {out.scale_layout}, {out.granularity}"
        )
    GROUPED_MM_SWIGLU_QUANTIZE.out(*arguments, outs=(out.codes, out.block_scales), backend=backend)
    out.global_scale.copy_(g)
    rows = scales_shape(shape, scale_layout)[0]
    return out.with_(codes=out.codes[: shape[0]], block_scales=out.block_scales[:rows])


def _reference(function):
    """Hand an operator's flat arguments on as the two operands that the reference speaks of."""

    def run(*args):
        return function(ref.Rows(*args[:5]), Stack(*args[5:10]), *args[10:])

    return run


def _fake(a: Tensor, b: Tensor, halves: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[-2] // halves), dtype=torch.bfloat16)


def _fake_quantize(a: Tensor, b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    rows, width = a.shape[0], b.shape[-2] // 2
    codes = a.new_empty((rows, width // 2), dtype=torch.uint8)
    return codes, a.new_empty(scales_shape((rows, width), layout), dtype=SCALE_DTYPE)


GROUPED_MM = register_op(
    f"grouped_mm({_OPERANDS}) -> Tensor",
    _reference(ref.grouped_mm),
    lambda *args: _fake(args[0], args[5], 1),
)
GROUPED_MM_SWIGLU = register_op(
    f"grouped_mm_swiglu({_OPERANDS}, float? limit) -> Tensor",
    _reference(ref.grouped_mm_swiglu),
    lambda *args: _fake(args[0], args[5], 2),
)
GROUPED_MM_SWIGLU_QUANTIZE = register_op(
    f"grouped_mm_swiglu_quantize({_OPERANDS}, float? limit, Tensor global_scale, str layout) "
    "-> (Tensor codes, Tensor scales)",
    _reference(ref.grouped_mm_swiglu_quantize),
    lambda *args: _fake_quantize(args[0], args[5], args[-1]),
)
