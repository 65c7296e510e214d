"""Where in the sequence a forward pass stands, and what all its layers derive from that."""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import Rotation, rotation


class Step:
    """T consecutive positions, shared by every sequence of the batch.

    Args:
        positions: (T,) int64 on the device.
        start: the first of them, as the host knows it.
        token_ids: (B, T), for hash layers.
        angles: frequencies of the layers "sliding" and "compressed", each (rope_dim / 2,) float32.
        dtype: of the model.
        fixed: shapes and work of a one-token step may not depend on `start`, which is then ignored.
    """

    def __init__(self, positions: Tensor, start: int, token_ids: Tensor, angles: dict[str, Tensor],
                 dtype: torch.dtype, *, fixed: bool = False):  # fmt: skip
        self.positions, self.start, self.token_ids, self.dtype = positions, start, token_ids, dtype
        self.angles, self.fixed = angles, fixed
        self._known: dict[tuple, object] = {}

    def once(self, key: tuple, make):
        """`make()`, kept for the layers that ask next."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions.shape[0]

    def rotation(self, kind: str) -> Rotation:
        """Cosines and sines at the T positions for a layer "sliding" or "compressed"."""
        return self.once((kind,), lambda: rotation(self.positions, self.angles[kind]))

    def slots(self, rows: int) -> Tensor:
        """Rows of a ring buffer at which the T tokens stand: (T,) int64."""
        return self.once(("slots", rows), lambda: self.positions % rows)

    def block(self, ratio: int) -> Tensor:
        """Index of the first token's block: (1,) int64."""
        return self.once(("block", ratio), lambda: self.positions[:1] // ratio)

    def block_slots(self, ratio: int, rows: int) -> Tensor:
        """Ring rows, in order, of the `rows` positions that end with the first token's block."""
        ahead = torch.arange(ratio - rows, ratio, device=self.positions.device)
        return self.once(("order", ratio, rows), lambda: (self.block(ratio) * ratio + ahead) % rows)

    def visible(self, ratio: int, entries: int) -> Tensor:
        """Whether the block of entry i ends at or before position t: (T, entries) bool."""

        def make() -> Tensor:
            complete = (self.positions + 1) // ratio
            return torch.arange(entries, device=self.positions.device) < complete[:, None]

        return self.once(("visible", ratio, entries), make)
