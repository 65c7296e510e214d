"""The expert that every token visits: gate and up in one linear, clamped SwiGLU, down."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import GLOBAL_DIVISOR, NVFP4Tensor
from ..gemm import grouped_mm, grouped_mm_swiglu
from ..quantize import bound_global_scale, swiglu_quantize
from .activation import as_rows
from .linear import Linear


def swiglu(gate_up: Tensor, limit: float | None = 10.0) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), computed in float32 and rounded once.

    Args:
        gate_up: (..., 2I), the gate half first.
        limit: where to clamp; the gate only from above, up on both sides; None clamps nothing.

    Returns:
        (..., I) in gate_up's dtype; NaN or Inf in gives NaN out, the clamp does not hide it.
    """
    nan = float("nan")
    gate, up = gate_up.float().nan_to_num(nan, nan, nan).chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_bound(limit: float | None, weight_max: float = 1.0) -> float | None:
    """The largest magnitude of a clamped SwiGLU in bf16, times a routing weight; None without a clamp."""
    return None if limit is None else bound_global_scale(limit, weight_max) * GLOBAL_DIVISOR


class SharedExpert(nn.Module):
    """L1 (gate and up), clamped SwiGLU, L2.

    Args:
        hidden: H.
        intermediate: I.
        limit: SwiGLU clamp, None for none.
        dtype, device: of the parameters.

    The children are `w13`, a Linear (2I, H) with the gate's rows (w1) before up's (w3), and `w2` (H, I).

    `fused` computes SwiGLU inside the first product of quantized weights, in float32, and where w2's global
    scale is known beforehand quantizes there too; otherwise gate and up are rounded to bf16 between the two.
    """

    def __init__(self, hidden: int, intermediate: int, *, limit: float | None = 10.0, dtype=None,
                 device=None):  # fmt: skip
        super().__init__()
        self.limit = limit
        self.w13 = Linear(hidden, 2 * intermediate, parts=2, dtype=dtype, device=device)
        self.w2 = Linear(intermediate, hidden, dtype=dtype, device=device)
        self.w2.activation_bound = swiglu_bound(limit)
        self.fused = intermediate % 8 == 0

    @property
    def fused(self) -> bool:
        return self.w13.interleaved

    @fused.setter
    def fused(self, fused: bool) -> None:
        """Switching lays the weight out anew, so that the two can never disagree."""
        self.w13.set_interleaved(fused)

    def forward(self, x: Tensor | NVFP4Tensor) -> Tensor:
        """Apply the expert.

        Args:
            x: (..., H) bf16, float32 or NVFP4.

        Returns:
            (..., H) in x's dtype, bf16 for NVFP4.
        """
        if not self.w13.quantized:
            return self.w2(swiglu(self.w13(x), self.limit))
        a = self.w13.quantize_input(as_rows(x))
        y = self.w2(swiglu_product(self.w13, self.w2, a, self.limit))
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y.to(x.dtype) if isinstance(x, Tensor) else y


def swiglu_product(
    w13, w2, a: Tensor | NVFP4Tensor, limit: float | None, offsets=None, sizes=None, quantize=True
):
    """The first product and SwiGLU: bf16, or NVFP4 where the second product's input can be made at once.

    Args:
        w13, w2: the layers of both products.
        a, limit, offsets, sizes: as for grouped_mm_swiglu.
        quantize: False keeps bf16 in any case, for callers that change h before it is quantized.
    """
    weight, groups, backend = w13.product_weight(), (offsets, sizes), w13.backend
    quantize = quantize and w2.quantized and w2.activation_dtype == "nvfp4" and w2.observer is None
    layout = w2.product_layout if quantize else "linear"
    if not w13.interleaved:
        gate_up = grouped_mm(a, weight, *groups, backend=backend)
        if layout == "linear":
            return swiglu(gate_up, limit)
        g = w2.global_scale_of()
        return swiglu_quantize(gate_up, limit, g, scale_layout=layout, backend=w2.backend)
    options = {"limit": limit, "backend": backend}
    g = w2.known_scale() if quantize else None
    if g is not None:
        options |= {"output": "nvfp4", "global_scale": g, "scale_layout": layout}
    return grouped_mm_swiglu(a, weight, *groups, **options)
