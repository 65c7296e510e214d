"""Linear without bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats import NVFP4Tensor
from ..gemm import grouped_mm
from .activation import QuantizedInput
from .weights import check_activation


class Linear(QuantizedInput):
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

    def forward(self, x: Tensor | NVFP4Tensor) -> Tensor:
        """Apply the linear.

        Args:
            x: (..., K) bf16, float32 or NVFP4; K % 16 == 0 for a quantized layer.

        Returns:
            (..., N) in x's dtype, bf16 for NVFP4; a quantized layer computes bf16 values.
        """
        check_activation("x", x, self.in_features)
        if not self.quantized:
            x = self.operand(x)
            return F.linear(x, self.matrix(x.dtype))
        rows = x.reshape(-1, self.in_features) if isinstance(x, Tensor) else x
        y = grouped_mm(self.quantize_input(rows), self.product_weight(), backend=self.backend)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype) if isinstance(x, Tensor) else y
