"""What every linear of the model shares: a weight, in high precision or NVFP4, and hooks around it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module whose named tensors stay float32 when the module is moved to another dtype.

    Global scales and the router's bias lose their meaning in half precision: 2^-20 is zero there.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {n: self._buffers[n] for n in self.float32_names if self._buffers.get(n) is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class Weight(KeepsFloat32):
    """A matrix (N, K), or a stack (G, N, K) of matrices, that a linear multiplies activations with.

    Args:
        shape: (N, K) or (G, N, K); K is the contraction and stands last.
        nvfp4: whether the layer becomes NVFP4 when its model is quantized.
        parts: 2 where gate and up rows share the matrix and have a global scale each, else 1.
        dtype, device: of the high-precision parameter.

    Attributes:
        weight_transform, activation_transform: differentiable functions put on the weight and on the
            input of the high-precision product, None by default; quantization-aware training sets them.
    """

    def __init__(self, *shape: int, nvfp4: bool = True, parts: int = 1, dtype=None, device=None):
        super().__init__()
        self.nvfp4, self.parts = nvfp4, parts
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
        self.weight_transform: Callable[[Tensor], Tensor] | None = None
        self.activation_transform: Callable[[Tensor], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight uniformly within 1/sqrt(K), as torch's own linear does."""
        bound = 1.0 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The high-precision weight in `dtype`, through the training hook where there is one."""
        weight = self.weight.to(dtype)
        return weight if self.weight_transform is None else self.weight_transform(weight)

    def operand(self, x: Tensor) -> Tensor:
        """The activation that the high-precision product sees."""
        return x if self.activation_transform is None else self.activation_transform(x)

    def extra_repr(self) -> str:
        return "x".join(str(n) for n in self.weight.shape)


def check_activation(name: str, x: Tensor, features: int) -> None:
    """Raise unless `x` is a floating tensor (..., features)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}), got {tuple(x.shape)}")
