"""Normalize, or apply SwiGLU, and quantize in one kernel: the host wrappers of these operations.

`kept`, where given, gets the bf16 values that are quantized: a form of its own of the kernel, for tests.
"""

from __future__ import annotations

from dsv4lab.kernels.quantize_run import Source, kernel_input, quantize_source
from torch import Tensor


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
    codes: Tensor,
    scales: Tensor,
    g: Tensor,
    rrms: Tensor,
    *,
    kept: Tensor | None = None,
) -> None:
    """See `reference.rmsnorm_quantize`; `kept` (..., H) bf16."""
    source = Source("rmsnorm", x, tuple(x.shape), weight=kernel_input(weight), eps=eps)
    quantize_source(source, global_scale, granularity, divisor, swizzled, codes, scales, g, rrms, kept)


def mhc_rmsnorm_quantize(
    streams: Tensor,
    mix: Tensor,
    weight: Tensor,
    eps: float,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
    codes: Tensor,
    scales: Tensor,
    g: Tensor,
    rrms: Tensor,
    *,
    kept: Tensor | None = None,
) -> None:
    """See `reference.mhc_rmsnorm_quantize`; `kept` (..., H) bf16."""
    shape = (*streams.shape[:-2], streams.shape[-1])
    source = Source("mhc", streams, shape, mix=kernel_input(mix), weight=kernel_input(weight), eps=eps)
    quantize_source(source, global_scale, granularity, divisor, swizzled, codes, scales, g, rrms, kept)


def swiglu_quantize(
    gate_up: Tensor,
    limit: float | None,
    interleaved: bool,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
    codes: Tensor,
    scales: Tensor,
    g: Tensor,
    *,
    kept: Tensor | None = None,
) -> None:
    """See `reference.swiglu_quantize`; `kept` (..., I) bf16."""
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    source = Source("swiglu", gate_up, shape, limit=limit, interleaved=interleaved)
    quantize_source(source, global_scale, granularity, divisor, swizzled, codes, scales, g, kept=kept)
