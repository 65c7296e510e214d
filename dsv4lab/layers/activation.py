"""How a linear quantizes its input: the global-scale policy, and who looks on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import GLOBAL_DIVISOR, NVFP4Tensor
from ..quantize import dequantize_nvfp4, quantize_nvfp4
from .weights import Weight

POLICIES = ("token", "tensor", "static", "bound", "group")
Observer = Callable[["QuantizedInput", Tensor, "NVFP4Tensor | None"], None]


class QuantizedInput(Weight):
    """A weight together with the policy by which its layer quantizes the input.

    Attributes:
        activation_scale: "token", "tensor" or "group" made from the data; "static", the calibrated
            `input_scale`; "bound", a proven limit; or a callable from the input to a global scale.
        activation_dtype: "nvfp4", or "bf16" for weight-only quantization.
        activation_bound: the largest magnitude of the layer's input, None where nothing proves one.
        observer: called with (layer, input, quantized input or None) before each product, None by default.
        backend: of the GEMM, None for the device's default.
    """

    policies = ("token", "tensor", "static", "bound")

    def __init__(self, *shape: int, **kwargs):
        super().__init__(*shape, **kwargs)
        self._activation_scale: str | Callable = "token"
        self._activation_dtype = "nvfp4"
        self.activation_bound: float | None = None
        self.observer: Observer | None = None
        self.backend: str | None = None

    @property
    def activation_scale(self) -> str | Callable:
        return self._activation_scale

    @activation_scale.setter
    def activation_scale(self, policy: str | Callable) -> None:
        if not callable(policy) and policy not in self.policies:
            raise ValueError(f"activation_scale must be one of {self.policies} or a callable, got {policy!r}")
        self._activation_scale = policy

    @property
    def activation_dtype(self) -> str:
        return self._activation_dtype

    @activation_dtype.setter
    def activation_dtype(self, dtype: str) -> None:
        if dtype not in ("nvfp4", "bf16"):
            raise ValueError(f'activation_dtype must be "nvfp4" or "bf16", got {dtype!r}')
        self._activation_dtype = dtype

    def operand(self, x: Tensor | NVFP4Tensor) -> Tensor:
        """The input that the high-precision product sees, observed, and through the training hook."""
        if isinstance(x, NVFP4Tensor):
            x = dequantize_nvfp4(x, self.weight.dtype)
        if self.observer is not None:
            self.observer(self, x, None)
        return x if self.activation_transform is None else self.activation_transform(x)

    def quantize_input(self, x: Tensor | NVFP4Tensor) -> Tensor | NVFP4Tensor:
        """What the layer's product takes: x in NVFP4 under the layer's policy.

        Layers that read the same activation can share the result; its global scale travels with it.

        Args:
            x: (..., K) floating, or NVFP4, which passes as it is.

        Returns:
            (..., K) NVFP4 with linear block scales, or bf16 for weight-only quantization. A layer in high
            precision hands x back.

        Raises:
            ValueError: the policy is static without an input_scale, or bound without a bound.
        """
        if not self.quantized or isinstance(x, NVFP4Tensor):
            return x
        if self._activation_dtype == "bf16":
            quantized = x.to(torch.bfloat16)
        else:
            quantized = quantize_nvfp4(x, self.global_scale_of(), backend=self.backend)
        if self.observer is not None:
            self.observer(self, x, quantized if isinstance(quantized, NVFP4Tensor) else None)
        return quantized

    def global_scale_of(self) -> str | float | Tensor | Callable:
        """The policy as `quantize_nvfp4` takes it: a name, or the scale where it is known beforehand."""
        if self._activation_scale == "static":
            return self.static_scale()
        if self._activation_scale == "bound":
            return self.bound_scale()
        return self._activation_scale

    def static_scale(self) -> Tensor:
        """The calibrated scale, (); the largest where there are several, since a larger one never clips."""
        if self.input_scale is None:
            raise ValueError(
                "activation_scale is 'static', but this layer has no input_scale: calibrate first or load one"
            )
        return self.input_scale.amax() if self.input_scale.dim() else self.input_scale

    def bound_scale(self) -> float:
        """The scale under which an input within its bound cannot saturate."""
        if self.activation_bound is None:
            raise ValueError("activation_scale is 'bound', but nothing bounds this layer's input")
        return self.activation_bound / GLOBAL_DIVISOR

    def known_scale(self) -> Tensor | float | None:
        """The one scale that is known before the data, None for policies that look at it."""
        return self.global_scale_of() if self._activation_scale in ("static", "bound") else None

    def amax(self, x: Tensor) -> Tensor:
        """What calibration records of an input: max|x|, float32 ()."""
        return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
