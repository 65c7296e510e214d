"""RMSNorm, mHC mix and SwiGLU that quantize their result at once.

Each rounds its result to bf16 first and quantizes that, so the bits equal those of the two steps.
"""

from __future__ import annotations

from torch import Tensor

from dsv4lab import quantize_ops, reference
from dsv4lab.formats import GLOBAL_DIVISOR, NVFP4Tensor
from dsv4lab.policies import Policy, check_limit
from dsv4lab.quantize_arguments import check_data, check_weight, run_quantize


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
    check_data("x", x, check_finite)
    check_weight(weight, x)
    if callable(global_scale):
        global_scale = global_scale(reference.rmsnorm(x, weight, eps)[0])
    args = (x, weight, float(eps))
    return run_quantize(
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
    check_data("streams", streams, check_finite)
    if streams.dim() < 2 or not 1 <= streams.shape[-2] <= 4:
        raise ValueError(f"streams must be (..., n_hc, H) with n_hc in 1..4, got {tuple(streams.shape)}")
    if not isinstance(mix, Tensor):
        raise TypeError(f"mix must be a tensor, got {type(mix).__name__}")
    if mix.shape != streams.shape[:-1] or mix.device != streams.device or not mix.is_floating_point():
        raise ValueError(
            f"mix must be floating {tuple(streams.shape[:-1])} on {streams.device}, "
            f"got {mix.dtype} {tuple(mix.shape)} on {mix.device}"
        )
    check_weight(weight, streams)
    shape = (*streams.shape[:-2], streams.shape[-1])
    if callable(global_scale):
        x = reference.mhc_mix(streams, mix)
        global_scale = global_scale(reference.rmsnorm(x, weight, eps)[0])
    args = (streams, mix, weight, float(eps))
    return run_quantize(
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
    check_data("gate_up", gate_up, check_finite)
    if gate_up.shape[-1] % 32:
        raise ValueError(f"gate_up must be (..., 2 I) with I % 16 == 0, got {tuple(gate_up.shape)}")
    limit = None if limit is None else check_limit(limit)
    if callable(global_scale):
        gate, up = reference.split_gate_up(gate_up, interleaved)
        global_scale = global_scale(reference.swiglu(gate, up, limit))
    args = (gate_up, limit, bool(interleaved))
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return run_quantize(
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
