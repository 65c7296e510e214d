"""The routed experts, all in two stacks of matrices, each token visiting k of them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shared_expert import swiglu
from .weights import Weight, check_activation


class Experts(nn.Module):
    """E SwiGLU experts; a token's result is the weighted sum over the k it visits, in float32.

    Args:
        experts: E.
        hidden: H.
        intermediate: I.
        limit: SwiGLU clamp, None for none.
        route_weight: "after" puts the routing weight on w2's output, "before" on its input.
        dtype, device: of the parameters.

    The children are `w13` (E, 2I, H), the gate's rows (w1) before up's (w3), and `w2` (E, H, I).

    `algorithm` chooses how high precision is computed: "loop" over the experts in use, reading their sizes
    on the host; "grouped", one grouped product each on bf16 CUDA tensors; "dense", every expert for every
    token with weight zero where it was not chosen, which is the fastest where a token visits half of them;
    "auto" takes the loop on the CPU in eager mode, else dense for E <= 2k, else grouped.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int, *, limit: float | None = 10.0,
                 route_weight: str = "after", dtype=None, device=None):  # fmt: skip
        super().__init__()
        if route_weight not in ("after", "before"):
            raise ValueError(f'route_weight must be "after" or "before", got {route_weight!r}')
        self.experts, self.hidden, self.intermediate = experts, hidden, intermediate
        self.limit, self.route_weight, self.algorithm = limit, route_weight, "auto"
        self.w13 = Weight(experts, 2 * intermediate, hidden, parts=2, dtype=dtype, device=device)
        self.w2 = Weight(experts, hidden, intermediate, dtype=dtype, device=device)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Send each token to its experts and sum what comes back.

        Args:
            x: (T, H) bf16 or float32.
            weights: (T, k) float32.
            chosen: (T, k) int64, expert ids.

        Returns:
            (T, H) float32, as accumulated.
        """
        check_activation("x", x, self.hidden)
        if weights.shape != chosen.shape or chosen.shape[0] != x.shape[0]:
            raise ValueError(f"weights and chosen must be ({x.shape[0]}, k) both, got {tuple(weights.shape)} "
                             f"and {tuple(chosen.shape)}")  # fmt: skip
        algorithm = self._algorithm(x, chosen.shape[1])
        if algorithm == "dense":
            return self._dense(x, weights, chosen)
        return self._sorted(x, weights, chosen, _grouped if algorithm == "grouped" else _loop)

    def _algorithm(self, x: Tensor, k: int) -> str:
        if self.algorithm != "auto":
            return self.algorithm
        if not x.is_cuda and not torch.compiler.is_compiling():
            return "loop"
        grouped = x.is_cuda and x.dtype == torch.bfloat16 and self.experts > 2 * k
        return "grouped" if grouped else "dense"

    def _dense(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The routing weight is put on h in both placements: w2 is linear, so only the rounding differs."""
        per_expert = weights.new_zeros(x.shape[0], self.experts).scatter_add(1, chosen, weights)
        gate_up = F.linear(self.w13.operand(x), self.w13.matrix(x.dtype).flatten(0, 1))
        h = swiglu(gate_up.unflatten(-1, (self.experts, -1)), self.limit)
        h = self.w2.operand(h) if self.route_weight == "after" else h
        h = (h.float() * per_expert[..., None]).to(x.dtype)
        h = self.w2.operand(h) if self.route_weight == "before" else h
        return (h.flatten(1) @ self.w2.matrix(x.dtype).transpose(1, 2).flatten(0, 1)).float()

    def _sorted(self, x: Tensor, weights: Tensor, chosen: Tensor, matmul) -> Tensor:
        """Copies of the tokens stand sorted by expert, so that each expert works on one run of rows."""
        tokens, k = chosen.shape
        by_expert, order = torch.sort(chosen.flatten(), stable=True)
        experts = torch.arange(self.experts, device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True).int()
        rows = self.w13.operand(x)[order // k]
        h = swiglu(matmul(rows, self.w13.matrix(x.dtype), ends), self.limit)
        if self.route_weight == "before":
            h = (h.float() * weights.flatten()[order][:, None]).to(h.dtype)
        y = matmul(self.w2.operand(h), self.w2.matrix(x.dtype), ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        y = y[back].view(tokens, k, self.hidden).float()
        return (y * weights[..., None]).sum(1) if self.route_weight == "after" else y.sum(1)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (R, K) times weight (E, N, K), group e ending at row ends[e], in one kernel."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same, one product for each expert in use."""
    bounds = [0, *ends.tolist()]
    spans = [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]
    parts = [F.linear(rows[a:b], weight[e]) for e, a, b in spans]
    return torch.cat(parts) if parts else rows.new_zeros(0, weight.shape[1])
