"""What decoding keeps: a window of recent keys, compressed entries, and blocks not yet complete.

Every buffer has its final size from the start and is written in place, in a step of one token at positions
that live on the device, so that such a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import CSA, SLIDING, ModelConfig


class CompressorState:
    """Raw projections of the newest tokens in a ring, and every entry made so far.

    Args:
        batch: B.
        ratio: tokens in a block; the ring holds one block, or two where entries overlap.
        dim: D of an entry; the projections are twice as wide where entries overlap.
        overlap: whether an entry also sees the block before its own.
        max_tokens: longest sequence.
        dtype, device: of the buffers.
    """

    def __init__(self, batch: int, ratio: int, dim: int, overlap: bool, max_tokens: int, *, dtype, device):
        made = {"dtype": dtype, "device": device}
        self.rows, width = (2 * ratio, 2 * dim) if overlap else (ratio, dim)
        self.kv = torch.zeros(batch, self.rows, width, **made)
        self.gate = torch.empty(batch, self.rows, width, **made)
        # One more than can be complete: a fixed step writes the entry of the block it stands in.
        self.entries = torch.zeros(batch, max_tokens // ratio + 1, dim, **made)
        self.reset()

    def reset(self) -> None:
        """Forget the sequence; tokens before its start weigh nothing in the first overlapping entry."""
        self.kv.zero_(), self.gate.fill_(float("-inf")), self.entries.zero_()


class LayerCache:
    """One layer's keys: `window` (B, W, D), and its compressor's and indexer's states where it has them."""

    def __init__(self, config: ModelConfig, layer: int, batch: int, max_tokens: int, *, dtype, device):
        made = {"dtype": dtype, "device": device}
        self.window = torch.zeros(batch, config.sliding_window, config.head_dim, **made)
        self.compressor = self.indexer = None
        kind, ratio = config.layer_types[layer], config.ratio(layer)
        if kind != SLIDING:
            self.compressor = CompressorState(batch, ratio, config.head_dim, kind == CSA, max_tokens, **made)
        if kind == CSA and max_tokens // ratio > config.index_topk:  # else every entry is chosen
            self.indexer = CompressorState(batch, ratio, config.index_head_dim, True, max_tokens, **made)

    def tensors(self) -> list[Tensor]:
        """Every buffer of the layer."""
        states = [s for s in (self.compressor, self.indexer) if s is not None]
        return [self.window, *(t for s in states for t in (s.kv, s.gate, s.entries))]

    def reset(self) -> None:
        """Forget the sequence."""
        self.window.zero_()
        for state in (self.compressor, self.indexer):
            if state is not None:
                state.reset()


class Cache:
    """Keys of a batch of sequences of one length.

    Args:
        config: the model's.
        batch: B, at least 1.
        max_tokens: longest sequence, at most config.max_position_embeddings.
        dtype, device: of the buffers.

    Attributes:
        length: tokens in it, as the host knows it; `position` (1,) int64 is the same on the device.
        fixed: makes a one-token step's work independent of `length`, for capture as a CUDA graph. Replays
            advance `position` alone, so the caller counts `length`.

    Raises:
        ValueError: batch or max_tokens out of range.
    """

    def __init__(
        self, config: ModelConfig, batch: int, max_tokens: int, *, dtype=torch.bfloat16, device=None
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= max_tokens <= config.max_position_embeddings:
            raise ValueError(
                f"max_tokens must lie within 1 and the model's {config.max_position_embeddings} positions, "
                f"got {max_tokens}"
            )
        self.batch, self.max_tokens, self.length, self.fixed = batch, max_tokens, 0, False
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers = [
            LayerCache(config, i, batch, max_tokens, dtype=dtype, device=device)
            for i in range(config.num_hidden_layers)
        ]

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError unless a (batch, tokens) input still fits."""
        if batch != self.batch:
            raise ValueError(f"input_ids hold {batch} sequences, but the cache was made for {self.batch}")
        if self.length + tokens > self.max_tokens:
            raise ValueError(
                f"input_ids are too long: {self.length} tokens in the cache and {tokens} new ones exceed its "
                f"max_tokens = {self.max_tokens}"
            )

    def advance(self, tokens: int) -> None:
        """Count tokens whose keys have been written."""
        self.length += tokens
        self.position.add_(tokens)

    def reset(self) -> None:
        """Start over with an empty sequence in the same buffers."""
        self.length = 0
        self.position.zero_()
        for layer in self.layers:
            layer.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors())
