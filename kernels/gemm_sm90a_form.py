"""What a Hopper GEMM kernel for many tokens is compiled for, and what of that follows for its memories."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUP_FEATURES = 64  # rows of weights that a warpgroup multiplies: the M of its MMA
SLICE = 64  # of K: what a row of 128 bytes of bf16 holds, and 4 columns of block scales
SCALE_ROWS = 128  # of a chunk of block scales, see dsv4lab.layouts
CHUNK_BYTES = 512  # of block scales of 128 rows and 64 of K
STORE_ROWS = 32  # tokens that are stored at a time
STORES = 2  # buffers of each warpgroup, so that one is filled while TMA reads the other
SHARED_BYTES = 232448  # that a CTA may have
_BARRIER_BYTES = 1024  # what aligning buffers to 1024 bytes costs, barriers among it
_MOST_STAGES = 12


@dataclass(frozen=True)
class Form:
    """A kernel of the grouped GEMM for Hopper.

    Attributes:
        rows: tokens of a tile, a multiple of 16 up to 256: the N of the MMA.
        warpgroups: side by side, each with 64 rows of weights: 1 or 2.
        depth: K of a stage: 64, 128 or 256.
        halves: of a stage along K, which other warpgroups multiply with the same rows: 1 or 2.
        split: CTAs of a cluster that share the K of a tile.
        most_stages: of the ring, or fewer where there is no shared memory for them.
        scaled: whether activations have a global scale.
        grouped: whether offsets and sizes are given; otherwise there is one group of all rows.
        output: "bf16"; "swiglu", the activation in bf16; "nvfp4", the activation quantized.
        column_scale: the weights' global scale: "one" for a group; "interleaved", gate and up rows in runs of
            8; "halves", gate rows, then up rows.
        clamped: the activation has a limit.
        swizzled: of "nvfp4", the layout of block scales.
        wide: of "nvfp4", whether rows of codes are whole 16 bytes.
    """

    rows: int = 128
    warpgroups: int = 2
    depth: int = 128
    halves: int = 1
    split: int = 1
    most_stages: int = _MOST_STAGES
    scaled: bool = False
    grouped: bool = False
    output: str = "bf16"
    column_scale: str = "one"
    clamped: bool = False
    swizzled: bool = True
    wide: bool = True

    @property
    def features(self) -> int:
        """Rows of weights of a CTA's tile."""
        return GROUP_FEATURES * self.warpgroups

    @property
    def slices(self) -> int:
        """Of 64 of K, in a stage."""
        return self.depth // SLICE

    @property
    def all_warpgroups(self) -> int:
        """That multiply."""
        return self.warpgroups * self.halves

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, where an even share of an SM's is too few; else 0."""
        if self.all_warpgroups > 2:
            return 112
        return 240 if self.rows > 160 else 0

    @property
    def own_slices(self) -> int:
        """Of a stage, that a warpgroup multiplies."""
        return self.slices // self.halves

    @property
    def threads(self) -> int:
        """Those that multiply, and a warp that loads; registers are moved between warpgroups only."""
        return 128 * self.all_warpgroups + (128 if self.registers else 32)

    @property
    def code_bytes(self) -> int:
        """Of a stage's weights in a row."""
        return self.depth // 2

    @property
    def stage_bytes(self) -> int:
        """Tokens in bf16, codes and block scales of weights."""
        return self.rows * self.depth * 2 + self.features * self.code_bytes + self.slices * CHUNK_BYTES

    @property
    def store_columns(self) -> int:
        """Columns of the output that a warpgroup's rows of weights become."""
        return GROUP_FEATURES if self.output == "bf16" else GROUP_FEATURES // 2

    @property
    def shares(self) -> int:
        """Parts of a tile's K, each multiplied by other warpgroups, of one CTA or several."""
        return self.split * self.halves

    @property
    def stored(self) -> int:
        """Tokens of a tile whose sums the warpgroups with one share put together and store."""
        return self.rows // self.shares

    @property
    def store_rows(self) -> int:
        """Tokens that a warpgroup stores at a time; a thread quantizes one of them."""
        return math.gcd(self.stored, 128 if self.output == "nvfp4" else STORE_ROWS)

    @property
    def store_bytes(self) -> int:
        """Of the buffers from which tiles are stored."""
        return self.store_rows * self.store_columns * 2 * STORES * self.all_warpgroups

    @property
    def parts_bytes(self) -> int:
        """Of the sums that those who share a tile's K give one another, where the ring of stages was."""
        return self.rows * self.features * 4 * self.halves if self.shares > 1 else 0

    @property
    def stages(self) -> int:
        """As many as there is shared memory for."""
        room = SHARED_BYTES - _BARRIER_BYTES - self.store_bytes - 4 * self.rows
        return min(room // self.stage_bytes, self.most_stages)
