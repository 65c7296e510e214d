"""Checks of the arguments that the quantizing functions share, and the call of their operations."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4lab import formats, quantize_ops
from dsv4lab.formats import NVFP4Tensor, scales_shape
from dsv4lab.ops import Op, first_rows
from dsv4lab.policies import check_divisor, scale_argument

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def run_quantize(op: Op, args, shape, device, global_scale, scale_layout, divisor, backend, out):
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


def check_data(name: str, x: Tensor, check_finite: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] % formats.BLOCK:
        raise ValueError(f"{name} must be (..., K) with K % 16 == 0, got shape {tuple(x.shape)}")
    if check_finite and not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf, and check_finite=True forbids it")


def check_weight(weight: Tensor, x: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating tensor, got {getattr(weight, 'dtype', type(weight))}")
    if tuple(weight.shape) != (x.shape[-1],) or weight.device != x.device:
        raise ValueError(
            f"weight must be ({x.shape[-1]},) on {x.device}, got {tuple(weight.shape)} on {weight.device}"
        )


def check_out(name: str, out: Tensor, dtype: torch.dtype, device: torch.device) -> None:
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
