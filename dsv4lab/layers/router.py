"""Which experts a token visits, and with what weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import NVFP4Tensor
from ..gemm import grouped_mm
from .activation import QuantizedInput
from .dispatch import check_ids
from .weights import check_activation


class Router(QuantizedInput):
    """Scores sqrt(softplus(W x)) in float32; a bias or the token's id chooses, the scores alone weigh.

    Args:
        hidden: H.
        experts: E.
        top_k: k, experts a token visits.
        route_scale: factor on the weights, which sum to one before it.
        vocab_size: given for a hash layer, whose table `tid2eid` (V, k) int64 chooses by token id; such a
            layer has no bias.
        nvfp4: whether the gate becomes NVFP4 when its model is quantized; by default it stays as it is.
        dtype, device: of the weight (E, H). The bias (E,) is a float32 buffer: no gradient reaches it.
    """

    float32_names = (*QuantizedInput.float32_names, "bias")

    def __init__(self, hidden: int, experts: int, top_k: int, *, route_scale: float = 1.0,
                 vocab_size: int | None = None, nvfp4: bool = False, dtype=None, device=None):  # fmt: skip
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must lie within 1 and experts = {experts}, got {top_k}")
        super().__init__(experts, hidden, nvfp4=nvfp4, dtype=dtype, device=device)
        self.hidden, self.experts, self.top_k, self.route_scale = hidden, experts, top_k, route_scale
        hashed = vocab_size is not None
        bias = None if hashed else torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("bias", bias)
        self.register_buffer("tid2eid", self._hash_table(vocab_size, device) if hashed else None)

    def _hash_table(self, vocab_size: int, device) -> Tensor:
        """A starting table: token t visits experts t, t + 1, ..., so that all are used alike."""
        first = torch.arange(vocab_size, device=device)[:, None]
        return (first + torch.arange(self.top_k, device=device)) % self.experts

    def forward(self, x: Tensor | NVFP4Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route each token.

        Args:
            x: (T, H) bf16, float32 or NVFP4.
            token_ids: (T,) int32 or int64, needed by a hash layer, unused by others.

        Returns:
            Weights (T, k) float32 and expert ids (T, k) int64.

        Raises:
            ValueError: x is not (T, H); a hash layer has no token ids, a count of them other than T, or one
                outside its table (seen on the CPU only).
            TypeError: x or the token ids have another dtype.
        """
        check_activation("x", x, self.hidden)
        if len(x.shape) != 2:
            raise ValueError(f"x must be (T, {self.hidden}), got {tuple(x.shape)}")
        scores = F.softplus(self._logits(x)).sqrt()
        if self.tid2eid is None:
            chosen = torch.topk(scores + self.bias, self.top_k, dim=-1).indices
        else:
            chosen = self._by_token(token_ids, x.shape[0])
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all scores can underflow to zero
        return weights * self.route_scale, chosen

    def _logits(self, x: Tensor | NVFP4Tensor) -> Tensor:
        if not self.quantized:
            return F.linear(self.operand(x).float(), self.matrix(torch.float32))
        return grouped_mm(self.quantize_input(x), self.product_weight(), backend=self.backend).float()

    def _by_token(self, token_ids: Tensor | None, tokens: int) -> Tensor:
        if token_ids is None:
            raise ValueError("token_ids is needed: this layer routes by token id")
        check_ids("token_ids", token_ids, self.tid2eid.shape[0])
        if token_ids.device != self.tid2eid.device:
            raise ValueError(f"token_ids is on {token_ids.device}, but the layer is on {self.tid2eid.device}")
        if token_ids.numel() != tokens:
            raise ValueError(f"token_ids must hold {tokens} ids, one a token, got {tuple(token_ids.shape)}")
        return self.tid2eid[token_ids.reshape(-1)]
