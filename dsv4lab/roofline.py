"""The least time of work on a GPU: its bytes at memory bandwidth, or its arithmetic at full speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one GPU sustains.

    Args:
        copy: bytes a second, read and written ones counted.
        bf16: floating-point operations a second of a large bf16 matrix product on random data.
        fp4: the same of block-scaled FP4 operands; None for a GPU that multiplies them in bf16.
        source: measured on what and when, or who says so.
    """

    copy: float
    bf16: float
    fp4: float | None
    source: str


# By torch's name of the device. Others have no floor.
RATES = {
    "NVIDIA H200": Rates(
        4.27e12, 790e12, None, "measured: driver 580.159.04, torch 2.11.0+cu130, November 2026"
    ),
    "NVIDIA B200": Rates(
        8e12, 2.25e15, 9e15, "NVIDIA's product data, without sparsity; nothing was measured"
    ),
}


def floor_seconds(device: str, work_bytes: int, flops: int, fp4: bool = False) -> float | None:
    """The larger of both times; None for a device whose rates are not known.

    Args:
        device: torch's name of it.
        work_bytes: bytes that must move through memory.
        flops: additions and multiplications, 2 N K for each row of a GEMM.
        fp4: both operands of the GEMM are FP4.
    """
    rates = RATES.get(device)
    if rates is None:
        return None
    rate = rates.fp4 if fp4 and rates.fp4 else rates.bf16
    return max(work_bytes / rates.copy, flops / rate)
