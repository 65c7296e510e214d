"""RMSNorm, computed in float32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        device: of the float32 weight (size,).
    """

    def __init__(self, size: int, eps: float, *, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., size); returns x's dtype."""
        return (rms_normalize(x, self.eps) * self.weight.float()).to(x.dtype)
