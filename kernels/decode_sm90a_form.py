"""What Hopper's GEMM kernel for few tokens is compiled for, and what follows for its shared memory."""

from __future__ import annotations

from dataclasses import dataclass

MMA_ROWS = 16  # rows of weights of one MMA
DEPTH = 128  # K of a step: 64 bytes of codes of a row, 16 for each of the four threads that have the row
CHUNK_ROWS, CHUNK_BYTES = 128, 512  # of 4 columns of block scales, see dsv4lab.layouts
CHUNKS = DEPTH // 64  # chunks of block scales in a step
TOKEN_DEPTH = 64  # K of bf16 activations that are copied at a time
SM_BYTES, CTA_BYTES = 233472, 1024  # shared memory of an SM, and what of it the system takes for each CTA
_BARRIER_BYTES = 2048  # barriers, and what aligning buffers costs
_MOST_STAGES = 64


@dataclass(frozen=True)
class Form:
    """A kernel of the grouped GEMM that multiplies with `mma.sync`, rows of weights being M and tokens N.

    Attributes:
        mmas: MMAs of 16 rows of weights one above the other that a warp has.
        across: warps that have the rows of a tile together: mmas * across is 1 to 16.
        along: warps that share its K in turn.
        tokens: of a tile: 8, 16, 32 or 64.
        split: CTAs of a cluster that share the K of a tile: 1, 2, 4 or 8.
        grouped: whether offsets and sizes are given; otherwise there is one group of all rows.
        activations: "bf16", or NVFP4 whose block scales are "linear" or "swizzled".
        output: "bf16"; "swiglu", the activation in bf16; "nvfp4", the activation quantized, of whole 32 rows.
        column_scale: the weights' global scale: "one" for a group; "interleaved", gate and up rows in runs of
            8; "halves", gate rows, then up rows.
        clamped: the activation has a limit.
        swizzled: of "nvfp4", the layout of block scales.
        single: a CTA has one tile at most, so that its sums may stand where weights stood.
        ctas: that there is room for on an SM: with two, those of the next kernel begin while these still run.
    """

    mmas: int = 2
    across: int = 4
    along: int = 2
    tokens: int = 8
    split: int = 1
    grouped: bool = False
    activations: str = "bf16"
    output: str = "bf16"
    column_scale: str = "one"
    clamped: bool = False
    swizzled: bool = True
    single: bool = False
    ctas: int = 1

    @property
    def rows(self) -> int:
        """Of activations in a tile, as gemm_tiles counts them."""
        return self.tokens

    @property
    def features(self) -> int:
        """Rows of weights in a tile."""
        return MMA_ROWS * self.mmas * self.across

    @property
    def warps(self) -> int:
        """That multiply."""
        return self.across * self.along

    @property
    def threads(self) -> int:
        """Of a CTA: those that multiply, and a warp that loads."""
        return 32 * (self.warps + 1)

    @property
    def scale_chunks(self) -> int:
        """Chunks of 128 rows with the block scales of a tile, which may begin anywhere in the first one."""
        if CHUNK_ROWS % self.features == 0 or self.features % CHUNK_ROWS == 0:
            return -(-self.features // CHUNK_ROWS)
        return (self.features - 2 * MMA_ROWS) // CHUNK_ROWS + 2

    @property
    def token_boxes(self) -> int:
        """Copies that bring a step's activations: 64 bf16 values are as much as TMA swizzles."""
        return DEPTH // TOKEN_DEPTH if self.activations == "bf16" else 1

    @property
    def token_bytes(self) -> int:
        """Of a step's activations."""
        return self.tokens * DEPTH * (16 if self.activations == "bf16" else 4) // 8

    @property
    def stage_bytes(self) -> int:
        """Of a step: codes and block scales of weights, and activations."""
        weights = self.features * DEPTH // 2 + self.scale_chunks * CHUNKS * CHUNK_BYTES
        return weights + self.token_bytes

    @property
    def pitch(self) -> int:
        """Floats from one token's sums to the next one's, so that banks differ."""
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
    def sum_bytes(self) -> int:
        """Of the sums of all warps along K."""
        return 4 * self.along * self.tokens * self.pitch

    @property
    def given_bytes(self) -> int:
        """Of the sums that CTAs of a cluster give to one of them."""
        return 4 * self.split * self.slots * self.unit if self.split > 1 else 0

    @property
    def overlays(self) -> bool:
        """Whether sums of warps stand where codes of weights stood."""
        return self.single and self.sum_bytes <= self._depth(0) * self.along * self.features * DEPTH // 2

    @property
    def depth(self) -> int:
        """Stages of each turn: warps along K have rings of their own."""
        return self._depth(0 if self.overlays else self.sum_bytes)

    def _depth(self, others: int) -> int:
        room = SM_BYTES // self.ctas - CTA_BYTES - _BARRIER_BYTES - self.given_bytes - others
        return min(room // self.stage_bytes, _MOST_STAGES) // self.along

    @property
    def stages(self) -> int:
        """As many as there is shared memory for: so much is on its way from memory at any time."""
        return self.depth * self.along
