"""What a block-scaled GEMM kernel is compiled for, and what of that follows for its memories."""

from __future__ import annotations

from dataclasses import dataclass

CTA_ROWS = 128  # that one CTA multiplies at a time, of the activations: all lanes of tensor memory
DEPTH = 256  # K of a stage: codes of 128 bytes, a whole swizzle
SCALE_ROWS = 128  # of a chunk of block scales, see dsv4lab.layouts
SLICE = 64  # columns of sums that a thread takes from tensor memory at a time
STORES = 2  # buffers of each storing warp, so that one is filled while TMA reads the other
STORE_ROWS = 32  # of a warp
TENSOR_COLUMNS = 512  # of tensor memory, all of it: there is one CTA on an SM
SHARED_BYTES = 232448  # that a CTA may have
_BARRIER_BYTES = 2048  # barriers, and what aligning buffers to 1024 bytes costs
_MOST_STAGES = 8


@dataclass(frozen=True)
class Form:
    """A kernel of the grouped GEMM.

    Attributes:
        rows: of a tile: 128, or 256, which two CTAs multiply together.
        columns: of a tile: 64, 128, 192 or 256.
        grouped: whether offsets and sizes are given; otherwise there is one group of all rows.
        output: "bf16"; "swiglu", the activation in bf16; "nvfp4", the activation quantized.
        column_scale: the weights' global scale: "one" for a group; "interleaved", gate and up rows in runs of
            8; "halves", gate rows, then up rows.
        clamped: the activation has a limit.
        swizzled: of "nvfp4", the layout of block scales.
        wide: of "nvfp4", whether rows of codes are whole 16 bytes.
    """

    rows: int = 128
    columns: int = 128
    grouped: bool = False
    output: str = "bf16"
    column_scale: str = "one"
    clamped: bool = False
    swizzled: bool = True
    wide: bool = True

    @property
    def tile(self) -> tuple[int, int, int]:
        """Rows, columns and depth that one MMA tile has."""
        return self.rows, self.columns, DEPTH

    @property
    def ctas(self) -> int:
        """That multiply a tile together."""
        return self.rows // CTA_ROWS

    @property
    def scale_chunks(self) -> int:
        """Chunks of 128 rows that hold the block scales of a tile's weights."""
        return -(-self.columns // SCALE_ROWS)

    @property
    def stage_bytes(self) -> int:
        """Of a stage in each CTA: codes, which CTAs share, and block scales, of which each has its own."""
        codes = (CTA_ROWS + self.columns // self.ctas) * DEPTH // 2
        return codes + (1 + self.scale_chunks) * SCALE_ROWS * DEPTH // 16

    @property
    def store_columns(self) -> int:
        """Columns of the output that a slice of sums becomes."""
        return SLICE if self.output == "bf16" else SLICE // 2

    @property
    def store_bytes(self) -> int:
        """Of the buffers from which TMA stores; quantized rows go straight from registers."""
        return 0 if self.output == "nvfp4" else CTA_ROWS * self.store_columns * 2 * STORES

    @property
    def stages(self) -> int:
        """As many as there is shared memory for."""
        room = SHARED_BYTES - _BARRIER_BYTES - self.store_bytes
        return min(room // self.stage_bytes, _MOST_STAGES)

    @property
    def sfa_column(self) -> int:
        """Of tensor memory, where the activations' block scales begin: those of a stage have 16 columns."""
        return self.sfb_column - 16

    @property
    def sfb_column(self) -> int:
        """Of tensor memory, where the weights' block scales begin."""
        return TENSOR_COLUMNS - 16 * self.scale_chunks

    @property
    def overlaps(self) -> bool:
        """Whether both accumulators have columns in common, because tensor memory is too small for two."""
        return 2 * self.columns > self.sfa_column

    @property
    def accumulator_columns(self) -> int:
        """From the begin of one accumulator to that of the other."""
        return self.sfa_column - self.columns if self.overlaps else self.columns
