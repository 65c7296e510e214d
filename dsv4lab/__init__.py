"""The NVFP4 inference pipeline of DeepSeek-V4, to explore, test and teach.

Public names are loaded on first use, so that importing the package costs nothing and never pulls in a
compiler, a plotting library or a peer's model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsv4lab import device, layers, model
    from dsv4lab.calibration import calibrate
    from dsv4lab.formats import NVFP4Tensor
    from dsv4lab.gemm import grouped_mm, grouped_mm_swiglu
    from dsv4lab.layouts import deinterleave_gate_up, interleave_gate_up, swizzle_scales, unswizzle_scales
    from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4, quantize_weight

_HOME = {
    "NVFP4Tensor": "formats",
    "quantize_nvfp4": "quantize",
    "quantize_weight": "quantize",
    "dequantize_nvfp4": "quantize",
    "swizzle_scales": "layouts",
    "unswizzle_scales": "layouts",
    "interleave_gate_up": "layouts",
    "deinterleave_gate_up": "layouts",
    "grouped_mm": "gemm",
    "grouped_mm_swiglu": "gemm",
    "calibrate": "calibration",
}
_MODULES = ("device", "layers", "model")

__all__ = [
    "NVFP4Tensor",
    "calibrate",
    "deinterleave_gate_up",
    "dequantize_nvfp4",
    "device",
    "grouped_mm",
    "grouped_mm_swiglu",
    "interleave_gate_up",
    "layers",
    "model",
    "quantize_nvfp4",
    "quantize_weight",
    "swizzle_scales",
    "unswizzle_scales",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
