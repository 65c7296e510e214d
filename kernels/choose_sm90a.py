"""Which Hopper kernel multiplies and how, from the sizes that the host knows: one rule for all.

The host knows how many rows and groups there are, not how the rows are spread: it takes them as spread
evenly. Costs are in cycles of an H200, from counts of bytes and instructions.
"""

from __future__ import annotations

from dsv4lab.kernels import decode_sm90a_choice, gemm_sm90a_choice
from dsv4lab.kernels.decode_sm90a_choice import Decode
from dsv4lab.kernels.gemm_sm90a_choice import Many


def choose(
    rows: int, n: int, k: int, groups: int | None, sm_count: int, quantized: bool, even: bool
) -> Decode | Many:
    """The kernel for (rows, K) x (groups, N, K).

    Args:
        rows: of the activations; with groups, of the buffer that has them all, each padded to 128.
        groups: how many; None where offsets are not given and all rows are one group.
        sm_count: streaming multiprocessors of the GPU.
        quantized: whether activations are NVFP4.
        even: whether tiles must have whole 32 rows of weights.
    """
    few, few_cycles = decode_sm90a_choice.best(rows, n, k, groups, sm_count, quantized, even)
    many, many_cycles = gemm_sm90a_choice.best(rows, n, k, groups, sm_count, quantized)
    # Tiles of 64 tokens took the kernel for few 28.2, 14.5 and 20.5 us, and the other one 21.5, 10.1, 14.8.
    return few if few.tokens <= 32 and few_cycles < many_cycles else many
