"""Attention of DeepSeek-V4: one key vector for all heads, a sliding window, sinks, compressed entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4lab.layers import GroupedLinear, Linear

from .cache import LayerCache
from .compressor import Compressor
from .config import CSA, SLIDING, ModelConfig
from .indexer import Indexer
from .norm import RMSNorm, rms_normalize
from .rope import rotate
from .step import Step
from .window import block_keys, window_keys

Part = tuple[Tensor, Tensor | None]


def attend(q: Tensor, parts: list[Part], sink: Tensor) -> Tensor:
    """Softmax attention over several sets of keys that are their own values, with a sink in the denominator.

    Args:
        q: (B, T, heads, D), already scaled.
        parts: of (keys, mask) each. Keys (B * blocks, n, D): block i serves the i-th of `blocks` equal
            runs of queries. Mask (T, n) or (B, T, n) bool, true where a key is seen; None for all.
        sink: (heads,), a logit without a value.

    Returns:
        (B, T, heads, D) float32.
    """
    if q.is_cpu:  # where products of bf16 are several times slower than those of float32
        q, parts = q.float(), [(keys.float(), mask) for keys, mask in parts]
    weights, total = _numerators(q, parts, sink)
    out = 0.0
    for w, (keys, _) in zip(weights, parts, strict=True):
        mixed = w.to(keys.dtype).reshape(keys.shape[0], -1, keys.shape[1]) @ keys
        out = out + mixed.view(q.shape).float()
    return out / total


def _numerators(q: Tensor, parts: list[Part], sink: Tensor) -> tuple[list[Tensor], Tensor]:
    """The softmax before its division: (B, T, heads, n) for each part, and the sum of all and of the sink."""
    scores = [_scores(q, keys, mask) for keys, mask in parts]
    sink = sink.float()[:, None]
    top = torch.stack([s.detach().amax(-1) for s in scores], -1).amax(-1, keepdim=True)
    top = torch.maximum(
        top, sink.detach()
    )  # cancels, so it needs no gradient; finite even where all is masked
    weights, total = [(s - top).exp() for s in scores], (sink - top).exp()
    for w in weights:
        total = total + w.sum(-1, keepdim=True)
    return weights, total


def _scores(q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q.reshape(keys.shape[0], -1, q.shape[-1]) @ keys.mT).view(*q.shape[:-1], -1).float()
    return scores if mask is None else scores.masked_fill(~mask[..., None, :], float("-inf"))


class Attention(nn.Module):
    """One layer's attention.

    Args:
        config: sizes.
        layer: index, which decides between sliding, CSA and HCA.
        dtype, device: of the linears; norms and sinks are float32.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype=None, device=None):
        super().__init__()
        c, made, kind = config, {"dtype": dtype, "device": device}, config.layer_types[layer]
        self.heads, self.head_dim, self.groups, self.eps = (
            c.num_attention_heads, c.head_dim, c.o_groups, c.rms_norm_eps,
        )  # fmt: skip
        self.window, self.ratio = c.sliding_window, c.ratio(layer)
        self.rotation = "sliding" if kind == SLIDING else "compressed"
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, **made)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps, device=device)
        self.wq_b = Linear(c.q_lora_rank, c.num_attention_heads * c.head_dim, **made)
        self.wkv = Linear(c.hidden_size, c.head_dim, **made)
        self.kv_norm = RMSNorm(c.head_dim, c.rms_norm_eps, device=device)
        self.wo_a = GroupedLinear(
            c.o_groups, c.num_attention_heads * c.head_dim // c.o_groups, c.o_lora_rank, **made
        )
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size, **made)
        self.attn_sink = nn.Parameter(torch.zeros(c.num_attention_heads, dtype=torch.float32, device=device))
        self.compressor = self.indexer = None
        if self.ratio:
            self.compressor = Compressor(
                c.hidden_size, c.head_dim, self.ratio, overlap=kind == CSA, eps=c.rms_norm_eps, **made
            )
        if kind == CSA:
            self.indexer = Indexer(c, **made)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None = None) -> Tensor:
        """Attend from T tokens to themselves and to what the cache holds, which is updated in place.

        Args:
            x: (B, T, H), normalized.
            step: their positions.
            cache: of this layer; None for whole sequences.

        Returns:
            (B, T, H).
        """
        qr, q, kv = self._project(x, step)
        if cache is not None and step.tokens == 1:
            parts = [window_keys(kv, step, cache.window)]
        else:
            parts = [block_keys(kv, step, self.window, None if cache is None else cache.window)]
        if self.ratio:
            parts += self._compressed(x, qr, step, cache)
        o = self._attend_padded(q, parts)
        o = rotate(o, step.rotation(self.rotation), inverse=True).to(x.dtype)  # values carry their key's
        return self.wo_b(self.wo_a(o.unflatten(2, (self.groups, -1)).flatten(3)).flatten(2))

    def entry_shares(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """How attention to compressed entries is shared out among them, which is what an indexer predicts.

        Args:
            x: (B, T, H), normalized, of whole sequences; T a multiple of the window.
            step: their positions, from 0 on.

        Returns:
            (B, T, n) float32, softmax weights over window, entries and sink, summed over the heads and scaled
            to sum to one where an entry is visible; and the low-rank query (B, T, q_lora_rank).

        Raises:
            ValueError: the layer has no compressed entries, or T is not a multiple of the window.

        Source: the indexer's training target in DeepSeek-V3.2's report.
        """
        if not self.ratio:
            raise ValueError("a sliding layer has no compressed entries")
        if x.shape[1] % self.window:
            raise ValueError(f"x must hold a multiple of {self.window} tokens, got {x.shape[1]}")
        qr, q, kv = self._project(x, step)
        entries = self.compressor(x, step)
        seen = step.visible(self.ratio, entries.shape[1])
        parts = [block_keys(kv, step, self.window, None), (entries, seen)]
        weights, total = _numerators(q, parts, self.attn_sink)
        mass = (weights[1] / total).sum(2)
        return mass / mass.sum(-1, keepdim=True).clamp(min=1e-30), qr

    def _project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Low-rank query (B, T, q_lora_rank), queries (B, T, heads, D) scaled and turned, keys (B, T, D)."""
        turn = step.rotation(self.rotation)
        shared = self.wq_a.quantize_input(x.flatten(0, 1)) if self._share_input() else x
        qr = self.q_norm(self.wq_a(shared).view(*x.shape[:2], -1).to(x.dtype))
        q = rms_normalize(self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim)), self.eps)
        q = rotate(q * self.head_dim**-0.5, turn).to(x.dtype)
        kv = self.kv_norm(self.wkv(shared).view(*x.shape[:2], -1).to(x.dtype))
        kv = rotate(kv, turn).to(x.dtype)
        return qr, q, kv

    def _share_input(self) -> bool:
        """Whether wq_a and wkv would quantize their one input to the same codes, with nobody looking on."""
        a, b = self.wq_a, self.wkv
        same = (a.activation_scale, a.activation_dtype) == (b.activation_scale, b.activation_dtype)
        own = a.activation_scale in ("static", "bound") and a.activation_dtype == "nvfp4"
        return a.quantized and b.quantized and same and not own and a.observer is None and b.observer is None

    def _attend_padded(self, q: Tensor, parts: list[Part]) -> Tensor:
        """Blocks are equal runs of queries: fill the last one up, and drop what it yields."""
        tokens, rows = q.shape[1], parts[0][1].shape[0] if parts[0][1] is not None else q.shape[1]
        if rows == tokens:
            return attend(q, parts, self.attn_sink)
        more = rows - tokens
        parts = [parts[0]] + [(keys, F.pad(mask, (0, 0, 0, more))) for keys, mask in parts[1:]]
        return attend(F.pad(q, (0, 0, 0, 0, 0, more)), parts, self.attn_sink)[:, :tokens]

    def _compressed(self, x: Tensor, qr: Tensor, step: Step, cache: LayerCache | None) -> list[Part]:
        """Entries and who sees them; none before the first block is complete."""
        entries = self.compressor(x, step, None if cache is None else cache.compressor)
        chosen = self._chosen(x, qr, entries, step, cache)
        if not entries.shape[1]:
            return []
        if chosen is None:
            whole = step.tokens == 1 and cache is not None and not step.fixed  # only entries it may see
            return [(entries, None if whole else step.visible(self.ratio, entries.shape[1]))]
        kept = chosen >= 0
        if step.tokens == 1:
            rows = chosen[:, 0, :, None].clamp(min=0).expand(-1, -1, self.head_dim)
            return [(entries.gather(1, rows), kept)]
        # One column more, for the picks that count for nothing.
        seen = kept.new_zeros(*chosen.shape[:2], entries.shape[1] + 1)
        seen.scatter_(-1, chosen.masked_fill(~kept, entries.shape[1]), True)
        return [(entries, seen[..., :-1])]

    def _chosen(self, x: Tensor, qr: Tensor, entries: Tensor, step: Step, cache: LayerCache | None):
        """The indexer's choice (B, T, topk), or None where nothing can be left out."""
        if self.indexer is None:
            return None
        if cache is None:
            never = entries.shape[1] <= self.indexer.topk
            return None if never else self.indexer(x, qr, step, None)
        return None if cache.indexer is None else self.indexer(x, qr, step, cache.indexer)
