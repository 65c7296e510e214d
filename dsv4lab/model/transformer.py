"""The DeepSeek-V4 model: blocks over parallel residual streams."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4lab.layers import MoE

from .attention import Attention
from .cache import Cache, LayerCache
from .config import CSA, SLIDING, ModelConfig
from .hyper_connections import close_streams, collapse_head, head_weights, mixing_weights, open_streams
from .norm import RMSNorm
from .rope import layer_frequencies
from .step import Step


class Block(nn.Module):
    """Attention, then experts, each reading from the streams and writing back to them.

    Args:
        config: sizes.
        layer: index.
        dtype, device: of the linears; norms and mHC weights are float32.

    A forward hook on a block sees the streams (B, T, hc_mult, H) after it.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype=None, device=None):
        super().__init__()
        c, made = config, {"dtype": dtype, "device": device}
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, device=device)
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, device=device)
        self.attn = Attention(c, layer, **made)
        self.ffn = MoE(
            c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok,
            route_scale=c.routed_scaling_factor, limit=c.swiglu_limit,
            vocab_size=c.vocab_size if c.hashed(layer) else None, **made,
        )  # fmt: skip
        for part in ("attn", "ffn"):
            for name, tensor in mixing_weights(c.hc_mult, c.hidden_size, device=device).items():
                self.register_parameter(f"hc_{part}_{name}", nn.Parameter(tensor))
        self.mixing = {"iterations": c.hc_sinkhorn_iters, "eps": c.hc_eps, "rms_eps": c.rms_norm_eps}

    def forward(self, streams: Tensor, step: Step, cache: LayerCache | None = None) -> Tensor:
        """Apply the block to streams (B, T, hc_mult, H) at the positions of `step`; the shape stays."""
        x, post, mix = open_streams(
            streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, **self.mixing
        )
        streams = close_streams(streams, self.attn(self.attn_norm(x), step, cache), post, mix)
        x, post, mix = open_streams(
            streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, **self.mixing
        )
        return close_streams(streams, self.ffn(self.ffn_norm(x), step.token_ids), post, mix)


class DeepseekV4(nn.Module):
    """A language model of the DeepSeek-V4 architecture, with random weights until some are loaded.

    Args:
        config: sizes.
        device: of the parameters; "meta" allocates nothing.
        dtype: of the embedding, the linears and the activations between them; norms, mHC, sinks and the
            compressors' position biases are float32.
    """

    def __init__(self, config: ModelConfig, device=None, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
        self.config = config
        made = {"dtype": dtype, "device": device}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, **made)
        self.layers = nn.ModuleList(Block(config, i, **made) for i in range(config.num_hidden_layers))
        for name, tensor in head_weights(config.hc_mult, config.hidden_size, device=device).items():
            self.register_parameter(f"hc_head_{name}", nn.Parameter(tensor))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **made)
        for kind, layer_type in (("sliding", SLIDING), ("compressed", CSA)):
            self.register_buffer(
                f"{kind}_angle", layer_frequencies(config, layer_type, device), persistent=False
            )

    @classmethod
    def from_pretrained(cls, directory, **options) -> DeepseekV4:
        """Load a checkpoint folder; see `dsv4lab.checkpoint.load_model` for the options."""
        from dsv4lab import checkpoint

        return checkpoint.load_model(directory, **options)

    def new_cache(self, batch: int, max_tokens: int) -> Cache:
        """An empty cache for `batch` sequences of at most `max_tokens` tokens, in the model's dtype."""
        weight = self.embed.weight
        return Cache(self.config, batch, max_tokens, dtype=weight.dtype, device=weight.device)

    def forward(self, input_ids: Tensor, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """Predict the token after each one.

        Args:
            input_ids: (B, T) int64 within the vocabulary, T at least 1.
            cache: from `new_cache`; the tokens continue its sequences, and it is updated in place. Without
                one they are whole sequences, and the result is differentiable.
            last_only: only the last position's logits.

        Returns:
            (B, T, V) float32, or (B, 1, V).

        Raises:
            TypeError: input_ids that are not int64.
            ValueError: input_ids of a wrong shape, outside the vocabulary (seen on the CPU only), or more
                than the context or the cache holds.
        """
        self._check(input_ids, cache)
        if cache is None:
            return self._logits(self._streams(input_ids, None), last_only)
        with torch.no_grad():
            streams = self._streams(input_ids, cache)
            cache.advance(input_ids.shape[1])
            return self._logits(streams, last_only)

    def _streams(self, input_ids: Tensor, cache: Cache | None) -> Tensor:
        step = self._step(input_ids, cache)
        x = self.embed(input_ids)
        streams = x[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
        for i, layer in enumerate(self.layers):
            streams = layer(streams, step, None if cache is None else cache.layers[i])
        return streams

    def _step(self, input_ids: Tensor, cache: Cache | None) -> Step:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        start, fixed = 0, False
        if cache is not None:
            positions, start, fixed = positions + cache.position, cache.length, cache.fixed
        angles = {"sliding": self.sliding_angle, "compressed": self.compressed_angle}
        return Step(positions, start, input_ids, angles, self.embed.weight.dtype, fixed=fixed)

    def _logits(self, streams: Tensor, last_only: bool) -> Tensor:
        streams = streams[:, -1:] if last_only else streams
        c = self.config
        x = collapse_head(
            streams,
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            eps=c.hc_eps,
            rms_eps=c.rms_norm_eps,
        )
        return F.linear(self.norm(x).float(), self.head.weight.float())

    def _check(self, input_ids: Tensor, cache: Cache | None) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64:
            got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise TypeError(f"input_ids must be an int64 tensor, got {got}")
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids must have shape (B, T), both at least 1, got {tuple(input_ids.shape)}"
            )
        batch, tokens = input_ids.shape
        if cache is not None:
            cache.check(batch, tokens)
        elif tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids are too long: {tokens} tokens exceed the model's "
                f"{self.config.max_position_embeddings} positions"
            )
        if input_ids.is_cpu and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                worst = low if low < 0 else high
                raise ValueError(f"input_ids must lie within 0 and {self.config.vocab_size - 1}, got {worst}")


def count_parameters(model: DeepseekV4 | ModelConfig) -> tuple[int, int]:
    """Total parameters, and those a token uses: all but the embedding and the experts it does not visit.

    Args:
        model: a model in high precision, or a config, for which nothing is allocated.

    Returns:
        (total, active).
    """
    model = DeepseekV4(model, device="meta") if isinstance(model, ModelConfig) else model
    c = model.config
    total = sum(p.numel() for p in model.parameters())
    total += sum(b.numel() for name, b in model.named_buffers() if name.endswith("gate.bias"))
    routed = 3 * c.hidden_size * c.moe_intermediate_size * c.num_hidden_layers
    idle = routed * (c.n_routed_experts - c.num_experts_per_tok)
    return total, total - idle - c.vocab_size * c.hidden_size
