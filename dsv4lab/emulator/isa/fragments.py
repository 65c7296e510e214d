"""Fragments of matrices in the registers of a warp, as mma.sync and wgmma have them.

One rule covers every type (PTX ISA, "Matrix fragments for mma"): lane 4 g + t holds, in a register of e
elements, the columns e t to e t + e - 1 of row g; the next register of A is eight rows down, the one after 4
e columns on. B is the same with its columns as rows. The accumulator has columns 2 t and 2 t + 1.
"""

from __future__ import annotations

import numpy as np

from dsv4lab.emulator.matrix_descriptor import decode_bytes


def rows_of(registers: tuple[np.ndarray, ...], type_: str, tall: int) -> np.ndarray:
    """The matrix A, or B transposed, that warps hold.

    Args:
        registers: uint32 (n, 32) each.
        type_: of the elements, as of matrix_descriptor.decode_bytes.
        tall: how often eight rows are repeated: 2 for A of 16 rows, 1 for B.
    Returns:
        (n, 8 * tall, K) float32, or int8 or uint8.
    """
    values = decode_bytes(_octets(registers), type_)
    n, each = len(values), values.shape[2] // len(registers)
    # (warp, g, t, step along K, eight rows, element)
    values = values.reshape(n, 8, 4, -1, tall, each)
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(n, 8 * tall, -1)


def accumulator_of(registers: tuple[np.ndarray, ...], dtype: type, tall: int = 2) -> np.ndarray:
    """The accumulator (n, 8 * tall, N) that warps hold, float32, int32 or float16 (two in a register)."""
    values = np.ascontiguousarray(np.stack(registers, axis=-1)).view(dtype)
    n = len(values)
    values = values.reshape(n, 8, 4, -1, tall, 2)
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(n, 8 * tall, -1)


def registers_of(matrix: np.ndarray, tall: int = 2) -> tuple[np.ndarray, ...]:
    """The registers, uint32 (n, 32) each, of an accumulator (n, 8 * tall, N)."""
    n = len(matrix)
    values = matrix.reshape(n, tall, 8, -1, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    words = np.ascontiguousarray(values).reshape(n, 32, -1).view(np.uint32)
    return tuple(np.moveaxis(words, 2, 0))


def _octets(registers: tuple[np.ndarray, ...]) -> np.ndarray:
    """The bytes (n, 32, 4 * registers) of registers."""
    return np.stack(registers, axis=-1).view(np.uint8)
