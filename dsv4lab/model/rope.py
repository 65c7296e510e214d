"""Rotary positions on the last channels of a vector, in interleaved pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import SLIDING, ModelConfig, Yarn

Rotation = tuple[Tensor, Tensor]


def frequencies(width: int, theta: float, yarn: Yarn | None = None, device=None) -> Tensor:
    """Angle a position turns each pair by: theta^(-2i/width), stretched by YaRN at the slow end.

    Args:
        width: channels that rotate, even.
        theta: base.
        yarn: pairs that turn more than beta_fast times within the original positions keep their angle,
            those below beta_slow turn `factor` times slower, a linear ramp stands between.

    Returns:
        (width / 2,) float32.

    Source: YaRN, arXiv 2309.00071, without its factor on the attention logits.
    """
    pair = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angle = 1.0 / theta ** (pair / width)
    if yarn is None:
        return angle

    def pair_turning(turns: float) -> float:
        return width * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    ramp = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
    return angle / yarn.factor * ramp + angle * (1 - ramp)


def layer_frequencies(config: ModelConfig, layer_type: str, device=None) -> Tensor:
    """Frequencies of a layer: sliding layers use rope_theta unscaled, the others compress_rope_theta."""
    if layer_type == SLIDING:
        return frequencies(config.rope_dim, config.rope_theta, device=device)
    return frequencies(config.rope_dim, config.compress_rope_theta, config.yarn, device=device)


def rotation(positions: Tensor, angle: Tensor) -> Rotation:
    """Cosines and signed sines at some positions, one for each channel.

    Args:
        positions: (T,) integer.
        angle: (width / 2,) float32 frequencies.

    Returns:
        cos and sin (T, width) float32; sin is negative at even channels, so that
        rotated = x * cos + swap_pairs(x) * sin.
    """
    turned = positions.float()[:, None] * angle
    cos, sin = turned.cos(), turned.sin()
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def rotate(x: Tensor, by: Rotation, *, inverse: bool = False) -> Tensor:
    """Rotate the last channels of a vector, in float32.

    Args:
        x: (B, T, D) or (B, T, heads, D), any floating dtype.
        by: cos and sin (T, width) from `rotation`.
        inverse: turn back instead.

    Returns:
        x's shape, float32.
    """
    cos, sin = by if x.dim() == 3 else (by[0][:, None], by[1][:, None])
    still, turning = x.float().split((x.shape[-1] - cos.shape[-1], cos.shape[-1]), -1)
    swapped = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = torch.addcmul(turning * cos, swapped, sin, value=-1 if inverse else 1)
    return torch.cat((still, turned), -1)
