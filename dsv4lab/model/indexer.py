"""The lightning indexer: which compressed entries a query of a CSA layer attends to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache import CompressorState
from .compressor import Compressor
from .config import ModelConfig
from .rope import rotate
from .step import Step


class Indexer(nn.Module):
    """Scores entries with small queries and keys of its own; the best `topk` are attended to.

    Args:
        config: index_n_heads heads of index_head_dim, index_topk.
        dtype, device: of the projections.
    """

    def __init__(self, config: ModelConfig, *, dtype=None, device=None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.ratio = config.csa_ratio
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False, **made)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, **made)
        self.compressor = Compressor(
            config.hidden_size, self.dim, self.ratio, overlap=True, eps=config.rms_norm_eps, **made
        )

    def forward(self, x: Tensor, qr: Tensor, step: Step, state: CompressorState | None) -> Tensor | None:
        """Choose entries for each query.

        Args:
            x: (B, T, H), the layer's normalized input.
            qr: (B, T, q_lora_rank), the normalized low-rank query.
            step, state: as for the compressor.

        Returns:
            Indices (B, T, topk) int64, -1 where fewer entries are visible; None where every entry is kept.
        """
        keys = self.compressor(x, step, state)
        if keys.shape[1] <= self.topk:
            return None
        scores = self.scores(x, qr, keys, step)
        visible = step.visible(self.ratio, keys.shape[1])
        best = scores.masked_fill(~visible, float("-inf")).topk(self.topk, dim=-1)
        return best.indices.masked_fill(best.values == float("-inf"), -1)

    def scores(self, x: Tensor, qr: Tensor, keys: Tensor, step: Step) -> Tensor:
        """Sum over heads of weight * relu(query . key): (B, T, n) float32, entries (B, n, D) not masked."""
        q = rotate(self.wq_b(qr).unflatten(-1, (self.heads, self.dim)), step.rotation("compressed"))
        weights = self.weights_proj(x).float() * (self.dim * self.heads) ** -0.5
        dots = q.flatten(1, 2) @ keys.float().mT
        return torch.einsum("bthn,bth->btn", dots.unflatten(1, (-1, self.heads)).relu(), weights)
