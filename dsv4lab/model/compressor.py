"""Compressed entries: a block of tokens pooled into one key and value vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import CompressorState
from .norm import RMSNorm
from .rope import rotate, rotation
from .step import Step


class Compressor(nn.Module):
    """Pools each block of `ratio` tokens with a softmax of its own for every channel.

    Args:
        hidden: H.
        dim: width D of an entry.
        ratio: tokens in a block.
        overlap: an entry also sees the block before its own; the projections are then 2D wide, the first
            half for the next block's entry, the second for the own one.
        eps: of the norm of the entries.
        dtype, device: of the projections; `ape` (ratio, width) and the norm are float32.

    The projections run in the model's dtype, the pooling in float32.
    """

    def __init__(self, hidden: int, dim: int, ratio: int, *, overlap: bool, eps: float, dtype=None,
                 device=None):  # fmt: skip
        super().__init__()
        self.dim, self.ratio, self.overlap = dim, ratio, overlap
        width = 2 * dim if overlap else dim
        self.wkv = nn.Linear(hidden, width, bias=False, dtype=dtype, device=device)
        self.wgate = nn.Linear(hidden, width, bias=False, dtype=dtype, device=device)
        self.ape = nn.Parameter(torch.zeros(ratio, width, dtype=torch.float32, device=device))
        self.norm = RMSNorm(dim, eps, device=device)

    def forward(self, x: Tensor, step: Step, state: CompressorState | None = None) -> Tensor:
        """Compress the complete blocks.

        Args:
            x: (B, T, H), the layer's normalized input.
            step: where in the sequence the T tokens stand.
            state: raw projections of unfinished blocks and entries so far, updated in place; None for a
                sequence that starts at 0 and ends here.

        Returns:
            The entries of the sequence so far (B, n, D); in a fixed step the whole buffer.
        """
        kv, gate = self.wkv(x), self.wgate(x)
        if state is None:
            return self._whole(kv, gate, step)
        return (self._one if step.tokens == 1 else self._chunk)(kv, gate, step, state)

    def _whole(self, kv: Tensor, gate: Tensor, step: Step) -> Tensor:
        tokens = kv.shape[1] // self.ratio * self.ratio
        if not tokens:
            return kv.new_zeros(kv.shape[0], 0, self.dim)
        before = self.ratio if self.overlap else 0
        kv = F.pad(kv[:, :tokens], (0, 0, before, 0))
        gate = F.pad(gate[:, :tokens], (0, 0, before, 0), value=float("-inf"))
        return self._pool(kv, gate, step.positions[: tokens : self.ratio], step)

    def _chunk(self, kv: Tensor, gate: Tensor, step: Step, state: CompressorState) -> Tensor:
        """The ring lends what came before, the chunk completes blocks and then refills the ring."""
        first, end = step.start // self.ratio, (step.start + step.tokens) // self.ratio
        if end > first:
            tokens = end * self.ratio - step.start
            since = (first - 1 if self.overlap else first) * self.ratio
            old = torch.arange(since, step.start, device=kv.device) % state.rows
            kv_rows = torch.cat((state.kv[:, old], kv[:, :tokens]), 1)
            gate_rows = torch.cat((state.gate[:, old], gate[:, :tokens]), 1)
            positions = torch.arange(first, end, device=kv.device) * self.ratio
            state.entries[:, first:end] = self._pool(kv_rows, gate_rows, positions, step)
        slots = step.slots(state.rows)[-state.rows :]
        state.kv[:, slots], state.gate[:, slots] = kv[:, -state.rows :], gate[:, -state.rows :]
        return state.entries[:, :end]

    def _one(self, kv: Tensor, gate: Tensor, step: Step, state: CompressorState) -> Tensor:
        """One token. A fixed step pools even a block that is not complete: no query sees that entry yet."""
        slot, end = step.slots(state.rows), (step.start + 1) // self.ratio
        state.kv.index_copy_(1, slot, kv)
        state.gate.index_copy_(1, slot, gate)
        if step.fixed or (step.start + 1) % self.ratio == 0:
            order = step.block_slots(self.ratio, state.rows)
            block = step.block(self.ratio)
            entry = self._pool(state.kv[:, order], state.gate[:, order], block * self.ratio, step)
            state.entries.index_copy_(1, block, entry)
        return state.entries if step.fixed else state.entries[:, :end]

    def _pool(self, kv: Tensor, gate: Tensor, positions: Tensor, step: Step) -> Tensor:
        """Entries of whole blocks.

        Args:
            kv, gate: (B, rows, width); with overlap the first block lends only its first half.
            positions: (n,), of each entry's first token, at which it is rotated.

        Returns:
            (B, n, D) in the model's dtype.
        """
        kv = kv.float().unflatten(1, (-1, self.ratio))
        gate = gate.float().unflatten(1, (-1, self.ratio)) + self.ape.float()
        if self.overlap:
            kv, gate = (torch.cat((t[:, :-1, :, : self.dim], t[:, 1:, :, self.dim :]), 2) for t in (kv, gate))
        entries = self.norm((gate.softmax(2) * kv).sum(2))
        return rotate(entries, rotation(positions, step.angles["compressed"])).to(step.dtype)
