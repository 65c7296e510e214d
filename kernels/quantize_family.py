"""The operations of the quantize family by name, each in the form that fills given tensors."""

from __future__ import annotations

from collections.abc import Callable

from dsv4lab.kernels.dequantize import dequantize
from dsv4lab.kernels.quantize import global_scale, quantize
from dsv4lab.kernels.quantize_fused import mhc_rmsnorm_quantize, rmsnorm_quantize, swiglu_quantize
from dsv4lab.kernels.swizzle import swizzle_scales, unswizzle_scales

# They run on Hopper and on Blackwell.
IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "dequantize": dequantize,
    "global_scale": global_scale,
    "mhc_rmsnorm_quantize": mhc_rmsnorm_quantize,
    "quantize": quantize,
    "rmsnorm_quantize": rmsnorm_quantize,
    "swiglu_quantize": swiglu_quantize,
    "swizzle_scales": swizzle_scales,
    "unswizzle_scales": unswizzle_scales,
}
