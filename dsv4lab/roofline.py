"""The least time that work can take on a GPU: its bytes at copy bandwidth, or its arithmetic in bf16."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one GPU was measured to sustain.

    Args:
        copy: bytes a second, read and written ones counted.
        bf16: floating-point operations a second of a large bf16 matrix product on random data.
        measured: on what and when.
    """

    copy: float
    bf16: float
    measured: str


# By torch's name of the device. One that nobody has measured has no floor.
RATES = {
    "NVIDIA H200": Rates(4.27e12, 790e12, "driver 580.159.04, torch 2.11.0+cu130, November 2026"),
}


def floor_seconds(device: str, work_bytes: int, flops: int) -> float | None:
    """The larger of both times; None for a device whose rates are not known.

    Args:
        device: torch's name of it.
        work_bytes: bytes that must move through memory.
        flops: additions and multiplications, 2 N K for each row of a GEMM.
    """
    rates = RATES.get(device)
    return None if rates is None else max(work_bytes / rates.copy, flops / rates.bf16)
