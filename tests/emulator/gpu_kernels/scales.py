"""Operands of block-scaled products: packed 4-bit numbers, and scales as the tensor cores want them."""

from __future__ import annotations

import torch

E2M1 = torch.float4_e2m1fn_x2
_E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def random_e2m1(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """(M, K / 2) bytes of two numbers each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator, dtype=torch.uint8).view(E2M1)


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """float64 (..., 2 n) of n bytes, the low four bits first."""
    codes = packed.view(torch.uint8).long()
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return _E2M1_VALUES[codes & 7] * torch.where(codes > 7, -1.0, 1.0)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """Bytes of scales (M, blocks) in chunks of 128 rows by 4: 32 rows of 16 bytes, 4 of each of 4 row groups.

    Rows and columns are filled up with zero bytes to whole chunks; chunks of the same rows are neighbours.
    """
    rows, columns = scales.shape
    whole = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
    whole[:rows, :columns] = scales.view(torch.uint8)
    chunks = whole.view(whole.shape[0] // 128, 4, 32, whole.shape[1] // 4, 4)
    return chunks.permute(0, 3, 2, 1, 4).contiguous().flatten().view(scales.dtype)
