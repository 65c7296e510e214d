"""The expert that every token visits: gate and up in one linear, clamped SwiGLU, down."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear


def swiglu(gate_up: Tensor, limit: float | None = 10.0) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), computed in float32 and rounded once.

    Args:
        gate_up: (..., 2I), the gate half first.
        limit: where to clamp; the gate only from above, up on both sides; None clamps nothing.

    Returns:
        (..., I) in gate_up's dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up).to(gate_up.dtype)


class SharedExpert(nn.Module):
    """L1 (gate and up), clamped SwiGLU, L2.

    Args:
        hidden: H.
        intermediate: I.
        limit: SwiGLU clamp, None for none.
        dtype, device: of the parameters.

    The children are `w13`, a Linear (2I, H) with the gate's rows (w1) before up's (w3), and `w2` (H, I).
    """

    def __init__(
        self, hidden: int, intermediate: int, *, limit: float | None = 10.0, dtype=None, device=None
    ):
        super().__init__()
        self.limit = limit
        self.w13 = Linear(hidden, 2 * intermediate, parts=2, dtype=dtype, device=device)
        self.w2 = Linear(intermediate, hidden, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the expert to x (..., H), bf16 or float32; returns the same shape and dtype."""
        return self.w2(swiglu(self.w13(x), self.limit))
