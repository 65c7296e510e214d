"""What a block-scaled GEMM kernel for few tokens is compiled for, and what follows for its memories."""

from __future__ import annotations

from dataclasses import dataclass

FEATURES = 128  # rows of weights in a tile: all lanes of tensor memory
DEPTH = 256  # K of a stage: codes of 128 bytes, a whole swizzle
CHUNKS = DEPTH // 64  # chunks of 128 rows by 4 block scales in a stage, see dsv4lab.layouts
CHUNK_BYTES = 512
SCALE_COLUMNS = 4 * CHUNKS  # of tensor memory, for the block scales of a stage
SHARED_BYTES = 232448  # that a CTA may have
_BARRIER_BYTES = 2048  # barriers, and what aligning buffers to 1024 bytes costs
_MOST_STAGES = 12


@dataclass(frozen=True)
class Form:
    """A kernel of the grouped GEMM whose tiles are 128 features of few tokens.

    Attributes:
        tokens: of a tile: 8, 16, 32, 64 or 128.
        split: CTAs of a cluster that share the K of a tile: 1, 2, 4 or 8.
        grouped: whether offsets and sizes are given; otherwise there is one group of all rows.
        output: "bf16"; "swiglu", the activation in bf16; "nvfp4", the activation quantized.
        column_scale: the weights' global scale: "one" for a group; "interleaved", gate and up rows in runs of
            8; "halves", gate rows, then up rows.
        clamped: the activation has a limit.
        swizzled: of "nvfp4", the layout of block scales.
    """

    tokens: int = 8
    split: int = 1
    grouped: bool = False
    output: str = "bf16"
    column_scale: str = "one"
    clamped: bool = False
    swizzled: bool = True

    @property
    def rows(self) -> int:
        """Of activations in a tile, as gemm_tiles counts them."""
        return self.tokens

    @property
    def tile(self) -> tuple[int, int, int]:
        """Features, tokens and depth that one MMA tile has."""
        return FEATURES, self.tokens, DEPTH

    @property
    def slots(self) -> int:
        """Tokens of a tile that each CTA of a cluster stores."""
        return self.tokens // self.split

    @property
    def stage_bytes(self) -> int:
        """Of a stage: codes and block scales of weights and tokens."""
        return (FEATURES + self.tokens) * DEPTH // 2 + 2 * CHUNKS * CHUNK_BYTES

    @property
    def part_bytes(self) -> int:
        """Of the sums that all CTAs of a cluster give to one of them."""
        return FEATURES * self.tokens * 4

    @property
    def stages(self) -> int:
        """As many as there is shared memory for: so much is on its way from memory at any time."""
        return min((SHARED_BYTES - _BARRIER_BYTES - self.part_bytes) // self.stage_bytes, _MOST_STAGES)

    @property
    def weight_column(self) -> int:
        """Of tensor memory, where the weights' block scales begin, behind two accumulators."""
        return 2 * self.tokens

    @property
    def token_column(self) -> int:
        """Of tensor memory, where the tokens' block scales begin."""
        return self.weight_column + SCALE_COLUMNS

    @property
    def tensor_columns(self) -> int:
        """Of tensor memory that are allocated, a power of two."""
        return 1 << (self.token_column + SCALE_COLUMNS - 1).bit_length()
