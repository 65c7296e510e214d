"""How TMA and the tensor cores permute shared memory: bits of an address flipped by bits further up.

Each mode keeps chunks ("atoms") whole and permutes them within lines of 128 bytes; which line of a period it
is decides how. Only address bits count, those of the shared window itself, so that a tile that starts in the
middle of a period begins with that line's permutation. PTX ISA, "Swizzling modes", draws the patterns.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

Offsets = TypeVar("Offsets", int, np.ndarray)


class Pattern(NamedTuple):
    """One mode.

    Attributes:
        terms: (right shift, mask) of each group of bits that is flipped: x ^= x >> shift & mask.
        period: bytes after which the pattern repeats.
        atom: bytes that stay together; a tile must start at a multiple of it.
    """

    terms: tuple[tuple[int, int], ...]
    period: int
    atom: int


# The PTX ISA says of the 8-byte flip only "every alternate line": taken as the odd ones.
PATTERNS = {
    "none": Pattern((), 128, 16),
    "32B": Pattern(((3, 0x10),), 256, 16),
    "64B": Pattern(((3, 0x30),), 512, 16),
    "128B": Pattern(((3, 0x70),), 1024, 16),
    "128B_atom32B": Pattern(((2, 0x60),), 512, 32),
    "128B_atom32B_flip8B": Pattern(((2, 0x60), (4, 0x08)), 512, 8),
    "128B_atom64B": Pattern(((1, 0x40),), 256, 64),
}


def swizzle(mode: str, offsets: Offsets) -> Offsets:
    """Where the bytes lie that would lie at `offsets` without swizzle.

    Args:
        mode: a key of PATTERNS, which are the swizzles of `TensorMap`.
        offsets: bytes from the start of a CTA's shared memory, or shared addresses; int or integer array.
    Returns:
        Offsets of the same kind. The function is its own inverse.
    """
    swizzled = offsets
    for shift, mask in PATTERNS[mode].terms:
        swizzled = swizzled ^ (offsets >> shift & mask)
    return swizzled
