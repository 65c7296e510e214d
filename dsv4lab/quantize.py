"""Quantize, dequantize, and the norm and SwiGLU variants that quantize at once: arguments, then the ops.

The bits are the reference's; a global scale is a policy (see `policies`) and always in decode direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4lab import formats, quantize_ops, reference
from dsv4lab.formats import GLOBAL_DIVISOR, NVFP4Tensor, scales_shape
from dsv4lab.ops import Op, first_rows
from dsv4lab.policies import (
    Policy,
    bound_global_scale,
    check_divisor,
    check_groups,
    check_limit,
    scale_argument,
)

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
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


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
    _check_data("x", x, check_finite)
    if callable(global_scale):
        global_scale = global_scale(x)
    return _run(
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
    _check_data("w", rows_first, check_finite)
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
    _check_out("out", out, dtype, t.device)
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
    _check_data("x", x, check_finite=False)
    g, granularity = scale_argument(policy(x) if callable(policy) else policy, x.shape, x.device)
    if g is not None:
        return reference.checked_scale(g)
    return quantize_ops.global_scale(x, granularity, check_divisor(divisor), backend=backend)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    global_scale: Policy = "tensor",
    *,
    scale_layout: str = "linear",
    divisor: float = GLOBAL_DIVISOR,
    check_finite: bool = False,
    backend: str | None = None,
    out: NVFP4Tensor | None = None,
) -> tuple[NVFP4Tensor, Tensor]:
    """RMSNorm in fp32, rounded to bf16, then quantized: y = x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: (..., H) bf16, fp16 or fp32, H % 16 == 0.
        weight: (H,) floating.
        eps: added to the mean square.
        global_scale: a policy over the bf16 y; a callable takes y.
        scale_layout, divisor, check_finite, backend, out: as in `quantize_nvfp4`.

    Returns:
        (NVFP4Tensor (..., H), 1 / rms float32 (...)).
    """
    _check_data("x", x, check_finite)
    _check_weight(weight, x)
    if callable(global_scale):
        global_scale = global_scale(reference.rmsnorm(x, weight, eps)[0])
    args = (x, weight, float(eps))
    return _run(
        quantize_ops.rmsnorm_quantize,
        args,
        x.shape,
        x.device,
        global_scale,
        scale_layout,
        divisor,
        backend,
        out,
    )


def mhc_rmsnorm_quantize(
    streams: Tensor,
    mix: Tensor,
    weight: Tensor,
    eps: float,
    global_scale: Policy = "tensor",
    *,
    scale_layout: str = "linear",
    divisor: float = GLOBAL_DIVISOR,
    check_finite: bool = False,
    backend: str | None = None,
    out: NVFP4Tensor | None = None,
) -> tuple[NVFP4Tensor, Tensor]:
    """Mix the residual streams by their weights in fp32, then RMSNorm and quantize as `rmsnorm_quantize`.

    Args:
        streams: (..., n_hc, H) bf16, fp16 or fp32, n_hc <= 4, H % 16 == 0.
        mix: (..., n_hc) floating: x = sum_i mix[..., i] * streams[..., i, :].
        weight: (H,) floating.
        eps, global_scale, scale_layout, divisor, check_finite, backend, out: as in `rmsnorm_quantize`.

    Returns:
        (NVFP4Tensor (..., H), 1 / rms of the mixed x, float32 (...)).
    """
    _check_data("streams", streams, check_finite)
    if streams.dim() < 2 or not 1 <= streams.shape[-2] <= 4:
        raise ValueError(f"streams must be (..., n_hc, H) with n_hc in 1..4, got {tuple(streams.shape)}")
    if mix.shape != streams.shape[:-1] or mix.device != streams.device or not mix.is_floating_point():
        raise ValueError(
            f"mix must be floating {tuple(streams.shape[:-1])} on {streams.device}, "
            f"got {mix.dtype} {tuple(mix.shape)} on {mix.device}"
        )
    _check_weight(weight, streams)
    shape = (*streams.shape[:-2], streams.shape[-1])
    if callable(global_scale):
        x = reference.mhc_mix(streams, mix)
        global_scale = global_scale(reference.rmsnorm(x, weight, eps)[0])
    args = (streams, mix, weight, float(eps))
    return _run(
        quantize_ops.mhc_rmsnorm_quantize,
        args,
        shape,
        streams.device,
        global_scale,
        scale_layout,
        divisor,
        backend,
        out,
    )


def swiglu_quantize(
    gate_up: Tensor,
    limit: float | None = 10.0,
    global_scale: Policy = "tensor",
    interleaved: bool = False,
    *,
    scale_layout: str = "linear",
    divisor: float = GLOBAL_DIVISOR,
    check_finite: bool = False,
    backend: str | None = None,
    out: NVFP4Tensor | None = None,
) -> NVFP4Tensor:
    """Clamped SwiGLU in fp32, rounded to bf16, then quantized: silu(min(gate, L)) * clip(up, -L, L).

    Args:
        gate_up: (..., 2 I) bf16, fp16 or fp32, I % 16 == 0: gate then up, or alternating in runs of 8.
        limit: L > 0, or None for no clamp.
        global_scale: a policy over the bf16 h (..., I), such as `bound_global_scale(limit)`.
        interleaved: gate and up alternate in runs of 8.
        scale_layout, divisor, check_finite, backend, out: as in `quantize_nvfp4`.

    Returns:
        NVFP4Tensor (..., I). A NaN or Inf in gate or up makes its block NaN; the clamp does not hide it.
    """
    _check_data("gate_up", gate_up, check_finite)
    if gate_up.shape[-1] % 32:
        raise ValueError(f"gate_up must be (..., 2 I) with I % 16 == 0, got {tuple(gate_up.shape)}")
    limit = None if limit is None else check_limit(limit)
    if callable(global_scale):
        gate, up = reference.split_gate_up(gate_up, interleaved)
        global_scale = global_scale(reference.swiglu(gate, up, limit))
    args = (gate_up, limit, bool(interleaved))
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return _run(
        quantize_ops.swiglu_quantize,
        args,
        shape,
        gate_up.device,
        global_scale,
        scale_layout,
        divisor,
        backend,
        out,
    )[0]


def _run(op: Op, args, shape, device, global_scale, scale_layout, divisor, backend, out):
    """Call an operation that quantizes to a logical shape; returns the NVFP4Tensor, and 1 / rms if any."""
    g, granularity = scale_argument(global_scale, shape, device)
    wanted = scales_shape(shape, scale_layout)
    args = (*args, g, granularity, check_divisor(divisor), scale_layout == "swizzled")
    if out is None:
        codes, scales, g, *rest = op(*args, backend=backend)
    else:
        _check_out_tensor(out, scale_layout, granularity, device)
        rest = [out.codes.new_empty(shape[:-1], dtype=torch.float32)] * (op.returns - 3)
        op.out(*args, outs=(out.codes, out.block_scales, out.global_scale, *rest), backend=backend)
        g_shape = quantize_ops.scale_shape(g, granularity, shape)
        codes = first_rows(out.codes, (*shape[:-1], shape[-1] // 2))
        scales, g = first_rows(out.block_scales, wanted), first_rows(out.global_scale, g_shape)
    return NVFP4Tensor(codes, scales, g, scale_layout, granularity), *rest


def _check_data(name: str, x: Tensor, check_finite: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] % formats.BLOCK:
        raise ValueError(f"{name} must be (..., K) with K % 16 == 0, got shape {tuple(x.shape)}")
    if check_finite and not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf, and check_finite=True forbids it")


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating tensor, got {getattr(weight, 'dtype', type(weight))}")
    if tuple(weight.shape) != (x.shape[-1],) or weight.device != x.device:
        raise ValueError(
            f"weight must be ({x.shape[-1]},) on {x.device}, got {tuple(weight.shape)} on {weight.device}"
        )


def _check_out(name: str, out: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(out, Tensor) or out.dtype != dtype or out.device != device:
        raise TypeError(
            f"{name} must be a {dtype} tensor on {device}, got {getattr(out, 'dtype', type(out))}"
        )


def _check_out_tensor(out: NVFP4Tensor, scale_layout: str, granularity: str, device: torch.device) -> None:
    if not isinstance(out, NVFP4Tensor) or out.device != device:
        raise TypeError(f"out must be an NVFP4Tensor on {device}, got {type(out).__name__}")
    if (out.scale_layout, out.granularity) != (scale_layout, granularity):
        raise ValueError(
            f"out must have {scale_layout} scales and granularity {granularity!r}, "
            f"got {out.scale_layout} and {out.granularity!r}"
        )
