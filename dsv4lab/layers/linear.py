"""Linear without bias, and the block-diagonal linear wo_a of DeepSeek-V4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Weight, check_activation


class Linear(Weight):
    """y = x W^T, without bias.

    Args:
        in_features: K.
        out_features: N; the weight is (N, K).
        nvfp4: whether the layer becomes NVFP4 when its model is quantized.
        parts: 2 where gate and up rows share the matrix, else 1.
        dtype, device: of the parameter.
    """

    def __init__(self, in_features: int, out_features: int, *, nvfp4: bool = True, parts: int = 1,
                 dtype=None, device=None):  # fmt: skip
        super().__init__(out_features, in_features, nvfp4=nvfp4, parts=parts, dtype=dtype, device=device)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear.

        Args:
            x: (..., K) bf16 or float32.

        Returns:
            (..., N) in x's dtype.
        """
        check_activation("x", x, self.in_features)
        return F.linear(self.operand(x), self.matrix(x.dtype))


class GroupedLinear(Weight):
    """A linear of its own for each group of the input: `wo_a`, the first half of the output projection.

    Args:
        groups: G.
        in_features_per_group: K.
        out_features_per_group: R; the weight is (G * R, K), as in every checkpoint.
        dtype, device: of the parameter.
    """

    def __init__(self, groups: int, in_features_per_group: int, out_features_per_group: int, *,
                 dtype=None, device=None):  # fmt: skip
        super().__init__(groups * out_features_per_group, in_features_per_group, dtype=dtype, device=device)
        self.groups = groups
        self.in_features, self.out_features = in_features_per_group, out_features_per_group

    def forward(self, x: Tensor) -> Tensor:
        """Apply each group's matrix to its part of the input.

        Args:
            x: (..., G, K) bf16 or float32; for wo_a the heads' outputs, already rotated back.

        Returns:
            (..., G, R) in x's dtype.
        """
        check_activation("x", x, self.in_features)
        if x.dim() < 2 or x.shape[-2] != self.groups:
            raise ValueError(
                f"x must have shape (..., {self.groups}, {self.in_features}), got {tuple(x.shape)}"
            )
        rows = self.operand(x).reshape(-1, self.groups, self.in_features).transpose(0, 1)
        weight = self.matrix(x.dtype).view(self.groups, self.out_features, self.in_features)
        y = torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1)
        return y.reshape(*x.shape[:-1], self.out_features)
