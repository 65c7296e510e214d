"""Operands of tcgen05.mma as numbers: A and B from their memories, scales and accumulators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator import small_floats
from dsv4lab.emulator.instruction_descriptor import InstructionDescriptor
from dsv4lab.emulator.isa.tcgen05_layouts import Block, scale_columns, scales
from dsv4lab.emulator.matrix_descriptor import (
    DescriptorError,
    MatrixDescriptor,
    decode_bytes,
    decode_tcgen05,
    read_matrix,
)
from dsv4lab.emulator.tensor_memory import TensorMemory, TensorMemoryError

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine

# Where an operand begins, and where it goes on.
Matrix = tuple[MatrixDescriptor, ...]

# Kinds whose operands of 4 and 6 bits have a byte each in tensor memory, and 16 in 16 bytes in shared memory.
_BYTEWISE = ("f8f6f4", "mxf8f6f4")
_ABSOLUTE = 52  # bit of a matrix descriptor
_LINE = 128  # bytes of a row in an atom of the 128-byte swizzle
_BITS = {"tf32": 32, "f16": 16, "bf16": 16}


def matrix(bits: int, descriptor: InstructionDescriptor) -> Matrix:
    """Where an operand in shared memory lies.

    The 48 bytes of K = 96 may run over the end of a 128-byte line. Its descriptor can then say, in place of
    the leading offset, at which address the operand goes on.

    Raises:
        DescriptorError: for a matrix descriptor that this MMA does not take.
    """
    if descriptor.k != 96 or not bits >> _ABSOLUTE & 1:
        return (decode_tcgen05(bits),)
    first = decode_tcgen05(bits & ~(1 << _ABSOLUTE))
    if first.swizzle != "128B" or first.base_offset:
        raise DescriptorError(
            f"the matrix descriptor {bits:#018x} gives its leading offset as an address, which goes with the "
            "128-byte swizzle and no base offset"
        )
    return first, replace(first, start=first.leading)


def from_shared(
    machine: Machine,
    cta: int,
    places: Matrix,
    rows: int,
    descriptor: InstructionDescriptor,
    side: str,
    by: Access | None,
) -> np.ndarray:
    """Values (rows, K) of A or B ("a" or "b") in a CTA's shared memory; integers or float32."""
    type_ = getattr(descriptor, side)
    major = "MN" if getattr(descriptor, f"mn_major_{side}") else "K"
    padded = descriptor.kind in _BYTEWISE
    if descriptor.kind == "tf32" and (major == "MN") != (places[0].swizzle == "128B_atom32B"):
        raise DescriptorError(
            f"an operand of kind tf32 that is {major}-major with swizzle {places[0].swizzle}: "
            "128B with 32-byte atoms goes with MN-major"
        )
    read = partial(machine.shared.read, cta, by=by)
    parts = [
        read_matrix(read, place, rows, depth, type_, major, padded)
        for place, depth in zip(places, _depths(places, descriptor.k), strict=False)
    ]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return -values if getattr(descriptor, f"negate_{side}") else values


def _depths(places: Matrix, k: int) -> tuple[int, ...]:
    """Values of K at each of the places of an operand."""
    if len(places) == 1:
        return (k,)
    first = min(k, (_LINE - places[0].start % _LINE) * 2)
    return (first, k - first) if first < k else (k,)


def from_tensor(
    tensor: TensorMemory,
    cta: int,
    lanes: slice | np.ndarray,
    column: int,
    descriptor: InstructionDescriptor,
    by: Access | None,
) -> np.ndarray:
    """Values (lanes, K) of A in a CTA's tensor memory: one row a lane, elements from the low bits on."""
    bytewise = descriptor.kind in _BYTEWISE
    bits = _BITS.get(descriptor.a, 8 if bytewise or descriptor.kind == "i8" else 4)
    cells = tensor.read(cta, lanes, column, descriptor.k * bits // 32, by)
    octets = np.ascontiguousarray(cells).view(np.uint8)
    if not bytewise:
        values = decode_bytes(octets, descriptor.a)
    else:
        # An e2m1 stands in the middle of its byte, 6 bits in the low ones.
        values = small_floats.decode(octets >> 2 if descriptor.a == "e2m1" else octets, descriptor.a)
    return -values if descriptor.negate_a else values


def scale_values(
    tensor: TensorMemory,
    cta: int,
    column: int,
    rows: int,
    partitions: tuple[int, ...],
    descriptor: InstructionDescriptor,
    side: str,
    count: int,
    by: Access | None,
) -> np.ndarray:
    """Values (rows, count) of the scales of A or B.

    Every quarter of the lanes is to hold a copy; they are compared, as it is not said which one is used.

    Raises:
        TensorMemoryError: where the copies in these quarters differ.
    """
    first = getattr(descriptor, f"scale_id_{side}")
    width, starts = scale_columns(rows, first, count)
    lanes = slice(32 * partitions[0], 32 * partitions[-1] + 32)
    cells = np.stack([tensor.read(cta, lanes, column + start, width, by) for start in starts], axis=-1)
    quarters = cells.reshape(len(partitions), 32, width, len(starts))
    codes = scales(quarters[0], rows, first, count)
    for part, quarter in zip(partitions[1:], quarters[1:], strict=True):
        if not np.array_equal(scales(quarter, rows, first, count), codes):
            raise TensorMemoryError(
                f"the scale factors of {side.upper()} at column {column} of tensor memory differ between "
                f"lanes {32 * partitions[0]} and {32 * part} on: each quarter of the lanes must hold the same"
            )
    return small_floats.decode(codes, descriptor.scale)


def accumulated(cells: np.ndarray, type_: str) -> np.ndarray:
    """Values of accumulator cells; one of 16 bits has its cell's low half."""
    if type_ == "f16":
        return (cells & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
    return cells.view(np.float32 if type_ == "f32" else np.int32)


def to_cells(values: np.ndarray) -> np.ndarray:
    """Cells of accumulator values float32, float16 or int32."""
    if values.dtype == np.float16:
        return values.view(np.uint16).astype(np.uint32)
    return values.view(np.uint32)


def kept(block: Block, disabled: np.ndarray | None) -> tuple[slice | np.ndarray, slice | np.ndarray]:
    """Lanes of a block that are written, and the rows that they get.

    Args:
        block: of the accumulator.
        disabled: bool (128,), lanes that are left alone; None for none.
    """
    if disabled is None or not disabled.any():
        return block.lanes, slice(None)
    lanes = np.arange(128)[block.lanes]
    rows = np.nonzero(~disabled[lanes])[0]
    return lanes[rows], rows
