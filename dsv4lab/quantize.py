"""Quantize and dequantize: arguments are checked here, the operations underneath do the work.

The bits are the reference's; a global scale is a policy (see `policies`) and always in decode direction. The
norm and SwiGLU variants that quantize at once stand in `fused` and are offered here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4lab import quantize_ops, reference
from dsv4lab.formats import GLOBAL_DIVISOR, NVFP4Tensor
from dsv4lab.fused import mhc_rmsnorm_quantize, rmsnorm_quantize, swiglu_quantize
from dsv4lab.ops import first_rows
from dsv4lab.policies import Policy, bound_global_scale, check_divisor, check_groups, scale_argument
from dsv4lab.quantize_arguments import FLOATS, check_data, check_out, run_quantize

__all__ = [
    "bound_global_scale",
    "dequantize_nvfp4",
    "global_scale",
    "mhc_rmsnorm_quantize",
    "quantize_nvfp4",
    "quantize_weight",
    "rmsnorm_quantize",
    "swiglu_quantize",
]


def quantize_nvfp4(
    x: Tensor,
    global_scale: Policy = "tensor",
    *,
    scale_layout: str = "linear",
    divisor: float = GLOBAL_DIVISOR,
    check_finite: bool = False,
    backend: str | None = None,
    out: NVFP4Tensor | None = None,
) -> NVFP4Tensor:
    """Quantize to NVFP4 along the last dimension.

    Args:
        x: (..., K) bf16, fp16 or fp32, K % 16 == 0.
        global_scale: "tensor" | "token" | "group" (x (G, R, K), over each x[i]) for a scale made from data;
            a float or a float32 tensor (), (...), (..., 1) or (G,) in decode direction, amax / 2688; or a
            callable that takes x and returns one of these.
        scale_layout: "linear", or "swizzled" for x (R, K) or (G, R, K).
        divisor: g = max(amax, 1e-8) / divisor for the scales made from data.
        check_finite: raise on NaN or Inf, which costs a synchronisation; otherwise they decode to NaN.
        backend: see `ops.resolve_backend`.
        out: filled in place when given; may have more rows than x.

    Returns:
        NVFP4Tensor of shape (..., K); `out[:rows]` when out is given.

    Raises:
        TypeError, ValueError: an argument does not fit. A known scale outside 0 and 2^-100 .. 2^115 raises
            where the host can see it, and decodes to NaN otherwise.
    """
    check_data("x", x, check_finite)
    if callable(global_scale):
        global_scale = global_scale(x)
    return run_quantize(
        quantize_ops.quantize, (x,), x.shape, x.device, global_scale, scale_layout, divisor, backend, out
    )[0]


def quantize_weight(
    w: Tensor,
    layout: str = "nk",
    global_scale: Policy = "tensor",
    *,
    scale_layout: str = "linear",
    divisor: float = GLOBAL_DIVISOR,
    check_finite: bool = False,
    backend: str | None = None,
) -> NVFP4Tensor:
    """Quantize a weight along K and store it K-major.

    Args:
        w: bf16, fp16 or fp32, K % 16 == 0; (N, K) or (G, N, K) for layout "nk", (K, N) or (G, K, N) for "kn".
        layout: "nk" or "kn".
        global_scale: "tensor" | "group" | float | float32 tensor (), (G,), or (G, 2) for gate and up halves.
        scale_layout, divisor, check_finite, backend: as in `quantize_nvfp4`.

    Returns:
        NVFP4Tensor (N, K) or (G, N, K).
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a tensor, got {type(w).__name__}")
    if layout not in ("nk", "kn"):
        raise ValueError(f"layout must be 'nk' or 'kn', got {layout!r}")
    if w.dim() not in (2, 3):
        raise ValueError(f"w must have 2 or 3 dimensions, got shape {tuple(w.shape)}")
    if isinstance(global_scale, str) and global_scale == "token":
        raise ValueError("global_scale of a weight must be 'tensor', 'group' or a known scale, got 'token'")
    rows_first = w if layout == "nk" else w.transpose(-1, -2)
    check_data("w", rows_first, check_finite)
    return quantize_nvfp4(
        rows_first, global_scale, scale_layout=scale_layout, divisor=divisor, backend=backend
    )


def dequantize_nvfp4(
    t: NVFP4Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """code * block_scale * global_scale: exact product of the first two, one fp32 rounding, one to dtype.

    Args:
        t: NVFP4Tensor (..., K), linear or swizzled; groups must be a dimension of their own.
        dtype: torch.bfloat16, float16 or float32.
        backend: see `ops.resolve_backend`.
        out: (..., K) of dtype, filled in place when given; may have more rows.

    Returns:
        (..., K) in dtype; a block whose scale is NaN is NaN throughout.
    """
    if not isinstance(t, NVFP4Tensor):
        raise TypeError(f"t must be an NVFP4Tensor, got {type(t).__name__}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    check_groups(t.granularity, t.global_scale, t.shape)
    swizzled = t.scale_layout == "swizzled"
    args = (t.codes, t.block_scales, t.global_scale, t.granularity, swizzled, t.interleaved, dtype)
    if out is None:
        return quantize_ops.dequantize(*args, backend=backend)
    check_out("out", out, dtype, t.device)
    result = first_rows(out, t.shape)
    quantize_ops.dequantize.out(*args, outs=(out,), backend=backend)
    return result


def global_scale(
    x: Tensor, policy: Policy = "tensor", divisor: float = GLOBAL_DIVISOR, *, backend: str | None = None
) -> Tensor:
    """The global scale that a policy gives for x, in decode direction: max(amax, 1e-8) / divisor.

    Args:
        x: (..., K) bf16, fp16 or fp32, K % 16 == 0; (G, R, K) for "group".
        policy: "tensor" | "token" | "group", a known scale, or a callable.
        divisor: 2688 = 6 * 448, or 6 * 256 for four-over-six.

    Returns:
        float32 (), (...) or (G,), on the device of x and without waiting for it; NaN for data that holds
        NaN or Inf or whose scale exceeds 2^115.
    """
    check_data("x", x, check_finite=False)
    g, granularity = scale_argument(policy(x) if callable(policy) else policy, x.shape, x.device)
    if g is not None:
        return reference.checked_scale(g)
    return quantize_ops.global_scale(x, granularity, check_divisor(divisor), backend=backend)
