"""The feed-forward half of a block: router, routed experts, and the shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats import NVFP4Tensor
from .activation import as_rows
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
        nvfp4_gate: whether the router's gate becomes NVFP4 when the model is quantized.
        dtype, device: of the parameters.
    """

    def __init__(self, hidden: int, intermediate: int, experts: int, top_k: int, *, route_scale: float = 1.0,
                 limit: float | None = 10.0, vocab_size: int | None = None,
                 shared_intermediate: int | None = None, route_weight: str = "after",
                 nvfp4_gate: bool = False, dtype=None, device=None):  # fmt: skip
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.hidden = hidden
        self.gate = Router(hidden, experts, top_k, route_scale=route_scale, vocab_size=vocab_size,
                           nvfp4=nvfp4_gate, **made)  # fmt: skip
        self.experts = Experts(experts, hidden, intermediate, limit=limit, route_weight=route_weight,
                               weight_max=route_scale, **made)  # fmt: skip
        self.shared_experts = SharedExpert(hidden, shared_intermediate or intermediate, limit=limit, **made)

    def forward(self, x: Tensor | NVFP4Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the block's experts.

        Args:
            x: (..., H) bf16, float32 or NVFP4 with a global scale for the tensor or each token.
            token_ids: (...) integer, needed where the layer routes by token id.

        Returns:
            (..., H) in x's dtype, bf16 for NVFP4.
        """
        check_activation("x", x, self.hidden)
        rows = as_rows(x)
        weights, chosen = self.gate(rows, token_ids)
        a = self.shared_experts.w13.quantize_input(rows) if self._share_input() else rows
        y = self.experts(a, weights, chosen) + self.shared_experts(a).float()
        return y.to(x.dtype if isinstance(x, Tensor) else torch.bfloat16).view(x.shape)

    def _share_input(self) -> bool:
        """Whether routed and shared experts would quantize the same input to the same codes.

        Known scales are each layer's own. A callable is shared where it is the same.
        """
        routed, shared = self.experts.w13, self.shared_experts.w13
        same = (routed.activation_scale, routed.activation_dtype) == (
            shared.activation_scale,
            shared.activation_dtype,
        )
        known = routed.activation_scale in ("static", "bound") and routed.activation_dtype == "nvfp4"
        observed = routed.observer is not None or shared.observer is not None
        return routed.quantized and shared.quantized and same and not known and not observed
