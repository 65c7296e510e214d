"""The feed-forward half of a block: router, routed experts, and the shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from .experts import Experts
from .router import Router
from .shared_expert import SharedExpert
from .weights import check_activation


class MoE(nn.Module):
    """Routed experts plus the shared one, summed in float32.

    Args:
        hidden: H.
        intermediate: I of each expert.
        experts: E, routed experts.
        top_k: k, routed experts a token visits.
        route_scale: factor on the routing weights.
        limit: SwiGLU clamp, None for none.
        vocab_size: given for a layer that routes by token id.
        shared_intermediate: I of the shared expert, by default the same.
        route_weight: "after" or "before" w2.
        dtype, device: of the parameters.
    """

    def __init__(self, hidden: int, intermediate: int, experts: int, top_k: int, *, route_scale: float = 1.0,
                 limit: float | None = 10.0, vocab_size: int | None = None,
                 shared_intermediate: int | None = None, route_weight: str = "after",
                 dtype=None, device=None):  # fmt: skip
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.hidden = hidden
        self.gate = Router(hidden, experts, top_k, route_scale=route_scale, vocab_size=vocab_size, **made)
        self.experts = Experts(experts, hidden, intermediate, limit=limit, route_weight=route_weight, **made)
        self.shared_experts = SharedExpert(hidden, shared_intermediate or intermediate, limit=limit, **made)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the block's experts.

        Args:
            x: (..., H) bf16 or float32.
            token_ids: (...) integer, needed where the layer routes by token id.

        Returns:
            (..., H) in x's dtype.
        """
        check_activation("x", x, self.hidden)
        rows = x.reshape(-1, self.hidden)
        weights, chosen = self.gate(rows, token_ids)
        y = self.experts(rows, weights, chosen) + self.shared_experts(rows).float()
        return y.to(x.dtype).view(x.shape)
