"""Keys of the sliding window, in blocks for many tokens and from a ring buffer for one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .step import Step


def block_keys(kv: Tensor, step: Step, window: int, ring: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cut T tokens into blocks; each sees its own keys and the `window` keys before it, not all T.

    Args:
        kv: (B, T, D), the tokens' own keys.
        step: their positions.
        window: W, keys a query sees, its own included; blocks hold W queries, or T if that is less.
        ring: (B, W, D) keys of the tokens before, at row position % W; overwritten by the new ones. None
            where the sequence starts here.

    Returns:
        Keys (B * blocks, W + block, D), and a mask (blocks * block, W + block), true where seen.
    """
    batch, tokens, dim = kv.shape
    block = min(window, tokens)
    blocks = -(-tokens // block)
    if ring is None:
        before = kv.new_zeros(batch, window, dim)
    else:
        before = ring[:, torch.arange(step.start, step.start + window, device=kv.device) % window]
        ring[:, step.slots(window)[-window:]] = kv[:, -window:]
    keys = torch.cat((before, F.pad(kv, (0, 0, 0, blocks * block - tokens))), 1)
    keys = keys.unfold(1, window + block, block).transpose(2, 3)
    mask = step.once(("blocks", window), lambda: _block_mask(step, window, block, blocks))
    return keys.reshape(batch * blocks, window + block, dim), mask


def _block_mask(step: Step, window: int, block: int, blocks: int) -> Tensor:
    """Row i of a block stands at column W + i of its keys and sees the W columns up to there."""
    row = torch.arange(blocks * block, device=step.positions.device)[:, None]
    column = torch.arange(window + block, device=step.positions.device)
    within = row % block
    position = step.start + row - within - window + column
    return (column > within) & (column <= within + window) & (position >= 0)


def window_keys(kv: Tensor, step: Step, ring: Tensor) -> tuple[Tensor, Tensor | None]:
    """Write one token's key into the ring and return what it sees.

    Args:
        kv: (B, 1, D).
        step: its position.
        ring: (B, W, D), updated in place.

    Returns:
        Keys (B, n, D), in no particular order, and None; in a fixed step the whole ring with a mask (1, W).
    """
    window = ring.shape[1]
    ring.index_copy_(1, step.slots(window), kv)
    if step.fixed:
        rows = torch.arange(window, device=ring.device)
        return ring, step.once(("ring", window), lambda: rows <= step.positions[:, None])
    return ring[:, : step.start + 1], None
