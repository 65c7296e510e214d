"""NVFP4's rounding as a differentiable function, for the quantization-aware end of a training."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .weights import Weight

_REDUCED = {"token": (-1,), "matrix": (-2, -1), "tensor": None}


def fake_quantize(x: Tensor, global_scale: str = "token", divisor: float = 2688.0) -> Tensor:
    """x rounded to NVFP4 and back; the gradient passes straight through.

    Plain torch operations, so that a compiler can fuse them into their neighbours. In eager mode the values
    are those of quantizing and dequantizing in float32.

    Args:
        x: (..., K) bf16 or float32, K % 16 == 0.
        global_scale: one for each "token" (row), each "matrix" (last two dimensions) or the whole "tensor".
        divisor: of the amax, 2688 = 6 * 448.

    Returns:
        The same shape and dtype as x.
    """
    if global_scale not in _REDUCED:
        raise ValueError(f"global_scale must be one of {sorted(_REDUCED)}, got {global_scale!r}")
    if x.shape[-1] % 16:
        raise ValueError(f"x must have a last dimension divisible by 16, got {tuple(x.shape)}")
    with torch.no_grad():
        rounded = _round_nvfp4(x.detach().float(), _REDUCED[global_scale], divisor).to(x.dtype)
    return x + (rounded - x).detach() if x.dtype == torch.float32 else _StraightThrough.apply(x, rounded)


class _StraightThrough(torch.autograd.Function):
    """Forward takes the rounded value, backward the gradient as it is.

    In bf16 `x + (rounded - x)` would round once more than wanted.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _round_nvfp4(x: Tensor, dims: tuple[int, ...] | None, divisor: float) -> Tensor:
    dims = tuple(range(-x.dim(), 0)) if dims is None else dims
    amax = x.abs().amax(dims, keepdim=True)
    g = amax.clamp_min(1e-8) / torch.full_like(amax, divisor)
    g = g.expand(*x.shape[:-1], 1)[..., None]
    blocks = x.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / (6.0 * g)).clamp_max(448.0)
    scale = scale.to(torch.float8_e4m3fn).float()
    step = scale * g
    inverse = torch.where(step == 0, torch.zeros_like(step), torch.ones_like(step) / step)
    return ((round_e2m1(blocks * inverse) * scale) * g).flatten(-2)


def round_e2m1(v: Tensor) -> Tensor:
    """The nearest of 0 .5 1 1.5 2 3 4 6 with v's sign, ties to the even code, saturating.

    Each binade has its own step, so one rounding to a multiple of that step is all there is.
    """
    a = v.abs()
    fine, middle, coarse = torch.round(a * 2) * 0.5, torch.round(a), torch.round(a * 0.5) * 2
    magnitude = torch.where(a < 2, fine, torch.where(a < 4, middle, coarse)).clamp_max(6.0)
    return torch.copysign(magnitude, v)


def fake_quantize_model_(model: nn.Module, activation: str | None = "token", weight: bool = True) -> None:
    """Put NVFP4's rounding on weights and inputs of every layer that would be quantized.

    Args:
        model: any module; those of its `Weight` layers with `nvfp4` set are changed.
        activation: "token" or "tensor"; None takes the rounding of inputs off again.
        weight: whether weights are rounded, with the global scales that quantize_ would give them.
    """
    round_activation = None if activation is None else partial(fake_quantize, global_scale=activation)
    for layer in model.modules():
        if isinstance(layer, Weight) and layer.nvfp4:
            layer.activation_transform = round_activation
            layer.weight_transform = partial(_fake_quantize_weight, layer.parts) if weight else None


def _fake_quantize_weight(parts: int, weight: Tensor) -> Tensor:
    """Gate and up, where they share a matrix, have a global scale each."""
    return fake_quantize(weight.unflatten(-2, (parts, -1)), "matrix").flatten(-3, -2)
