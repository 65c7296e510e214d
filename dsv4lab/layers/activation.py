"""How a linear quantizes its input: the global-scale policy, and who looks on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import workspace
from ..formats import GLOBAL_DIVISOR, NVFP4Tensor
from ..layouts import with_scale_layout
from ..ops import resolve_backend
from ..quantize import dequantize_nvfp4, quantize_nvfp4
from .weights import Weight

POLICIES = ("token", "tensor", "static", "bound", "group")
Observer = Callable[["QuantizedInput", Tensor, "NVFP4Tensor | None"], None]


@torch.compiler.assume_constant_result
def scale_layout_of(backend: str | None, device: torch.device) -> str:
    """How products on a device read block scales: "swizzled", except for those in plain torch.

    Here alone layers ask what they run on. The values of their results do not depend on the answer, but a
    kernel that is given the other layout first has to swizzle it.
    """
    return "linear" if resolve_backend(backend, device, "grouped_mm") == "reference" else "swizzled"


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
    stacked = False  # inputs are rows (R, K), or with True stacks of them (G, R, K)

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

    @property
    def product_layout(self) -> str:
        """How the layer's product reads block scales."""
        return scale_layout_of(self.backend, self.weight.device)

    def product_weight(self) -> NVFP4Tensor:
        """The quantized weight as the product reads it, which moves its block scales at the first call.

        Raises:
            RuntimeError: they would have to be moved under capture.
        """
        if self.scale_layout != self.product_layout == "swizzled" and not torch.compiler.is_compiling():
            if workspace.is_capturing():
                raise RuntimeError(
                    "the weight's scales would be moved under capture: call warmup(model, max_tokens) first"
                )
            self.set_scale_layout("swizzled")
        return self.nvfp4_weight()

    def quantize_input(
        self, x: Tensor | NVFP4Tensor, scale_layout: str | None = None
    ) -> Tensor | NVFP4Tensor:
        """What the layer's product takes: x in NVFP4 under the layer's policy.

        Layers that read the same activation can share the result; its global scale travels with it.

        Args:
            x: (..., K) floating, or NVFP4, which passes as it is.
            scale_layout: of the result; None takes that of the product where x is (T, K), else "linear".

        Returns:
            (..., K) NVFP4, or bf16 for weight-only quantization. A layer in high precision hands x back.

        Raises:
            ValueError: the policy is static without an input_scale, or bound without a bound.
        """
        if not self.quantized or isinstance(x, NVFP4Tensor):
            return x
        if self._activation_dtype == "bf16":
            quantized = x.to(torch.bfloat16)
        else:
            if scale_layout is None:
                scale_layout = self.product_layout if x.dim() == 2 + self.stacked else "linear"
            quantized = quantize_nvfp4(
                x, self.global_scale_of(), scale_layout=scale_layout, backend=self.backend
            )
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

    def quantizes_rows_alone(self) -> bool:
        """Whether each row is quantized by itself, unseen, so that rows with anything in them do no harm."""
        unseen = self._activation_dtype == "nvfp4" and self.observer is None
        return unseen and self._activation_scale in ("token", "static", "bound")

    def amax(self, x: Tensor) -> Tensor:
        """What calibration records of an input: max|x|, float32 ()."""
        return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def as_rows(x: Tensor | NVFP4Tensor) -> Tensor | NVFP4Tensor:
    """(..., K) as (T, K), which block scales of either layout fit."""
    if isinstance(x, Tensor):
        return x.reshape(-1, x.shape[-1])
    if len(x.shape) == 2:
        return x
    x = with_scale_layout(x, "linear")
    scales = x.block_scales.reshape(-1, x.block_scales.shape[-1])
    g = x.global_scale.reshape(-1) if x.granularity == "token" else x.global_scale
    return NVFP4Tensor(x.codes.reshape(-1, x.codes.shape[-1]), scales, g, "linear", x.granularity)
