"""What Hopper's GEMM kernel for few tokens is compiled for, and what follows for its shared memory."""

from __future__ import annotations

from dataclasses import dataclass

MMA_ROWS = 16  # rows of weights of one MMA
DEPTH = 128  # K of a step: 64 bytes of codes of a row, 16 for each of the four threads that have the row
CHUNK_ROWS, CHUNK_BYTES = 128, 512  # of 4 columns of block scales, see dsv4lab.layouts
CHUNKS = DEPTH // 64  # chunks of block scales in a step
SHARED_BYTES = 232448  # that a CTA may have
_BARRIER_BYTES = 2048  # barriers, and what aligning buffers costs
_MOST_STAGES = 64


@dataclass(frozen=True)
class Form:
    """A kernel of the grouped GEMM that multiplies with `mma.sync`, rows of weights being M and tokens N.

    Attributes:
        mmas: MMAs of 16 rows of weights one above the other, 1 to 16: all of them each warp multiplies.
        tokens: of a tile: 8, 16 or 32.
        split: CTAs of a cluster that share the K of a tile: 1, 2, 4 or 8.
        warps: of a CTA, which share its K in turn.
        grouped: whether offsets and sizes are given; otherwise there is one group of all rows.
        activations: "bf16", or NVFP4 whose block scales are "linear" or "swizzled".
        output: "bf16"; "swiglu", the activation in bf16; "nvfp4", the activation quantized, mmas % 2 == 0.
        column_scale: the weights' global scale: "one" for a group; "interleaved", gate and up rows in runs of
            8; "halves", gate rows, then up rows.
        clamped: the activation has a limit.
        swizzled: of "nvfp4", the layout of block scales.
        early: begin to load weights while the kernel before still runs.
    """

    mmas: int = 4
    tokens: int = 8
    split: int = 1
    warps: int = 8
    grouped: bool = False
    activations: str = "bf16"
    output: str = "bf16"
    column_scale: str = "one"
    clamped: bool = False
    swizzled: bool = True
    early: bool = False

    @property
    def rows(self) -> int:
        """Of activations in a tile, as gemm_tiles counts them."""
        return self.tokens

    @property
    def features(self) -> int:
        """Rows of weights in a tile."""
        return MMA_ROWS * self.mmas

    @property
    def threads(self) -> int:
        """Of a CTA: those that multiply, and a warp that loads."""
        return 32 * (self.warps + 1)

    @property
    def scale_chunks(self) -> int:
        """Chunks of 128 rows with the block scales of a tile, which may begin anywhere in the first one."""
        each = CHUNK_ROWS // MMA_ROWS
        if each % self.mmas == 0 or self.mmas % each == 0:
            return -(-self.mmas // each)
        return (self.mmas - 2) // each + 2

    @property
    def stage_bytes(self) -> int:
        """Of a step: codes and block scales of weights."""
        return self.features * DEPTH // 2 + self.scale_chunks * CHUNKS * CHUNK_BYTES

    @property
    def pitch(self) -> int:
        """Floats from one token's sums of a warp to the next one's, so that banks differ."""
        return self.features + 4

    @property
    def unit(self) -> int:
        """Rows of weights of a token that are stored by the same CTA of a cluster."""
        return 2 * MMA_ROWS if self.output == "nvfp4" else MMA_ROWS

    @property
    def units(self) -> int:
        """Of a token in a tile."""
        return self.features // self.unit

    @property
    def slots(self) -> int:
        """Units of a tile that each CTA of a cluster stores, at most."""
        return -(-self.tokens * self.units // self.split)

    @property
    def part_bytes(self) -> int:
        """Of the sums of all warps, and of those that the CTAs of a cluster give to one of them."""
        exchanged = self.split * self.slots * self.unit if self.split > 1 else 0
        return 4 * (self.warps * self.tokens * self.pitch + exchanged)

    @property
    def stages(self) -> int:
        """As many as there is shared memory for: so much is on its way from memory at any time."""
        room = SHARED_BYTES - _BARRIER_BYTES - self.part_bytes
        return min(room // self.stage_bytes, _MOST_STAGES)
