"""Quantize to NVFP4 on a GPU: the host wrappers of the operations on plain data."""

from __future__ import annotations

from dsv4lab.kernels.quantize_run import Source, quantize_source, write_scale
from torch import Tensor


def quantize(
    x: Tensor,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
    codes: Tensor,
    scales: Tensor,
    g: Tensor,
) -> None:
    """See `reference.quantize`, whose bits these are; codes, scales and g may have more rows."""
    source = Source("plain", x, tuple(x.shape))
    quantize_source(source, global_scale, granularity, divisor, swizzled, codes, scales, g)


def global_scale(x: Tensor, granularity: str, divisor: float, g: Tensor) -> None:
    """See `reference.global_scale`."""
    write_scale(Source("plain", x, tuple(x.shape)), granularity, divisor, g)
