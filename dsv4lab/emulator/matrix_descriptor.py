"""Shared-memory matrix descriptors of wgmma (sm_90) and tcgen05 (sm_100): where an operand's elements lie.

A matrix is made of chunks of 16 bytes. In a K-major matrix a chunk goes along K, and the lines are rows; in
an MN-major one it goes along the rows, and the lines are values of k. Eight lines (four in the layout of
32-byte atoms) and as many chunks as the swizzle is wide make an atom; the two offsets of the descriptor say
how far apart atoms are. PTX ISA, "Strides" and "Canonical layouts", defines which offset leads where:

| major | swizzle | next chunk | next atom along chunks | next atom along lines |
| K     | none    | leading    | leading                | stride                |
| K     | others  | 16 bytes   | none: K ends within    | stride                |
| MN    | none    | stride     | stride                 | leading               |
| MN    | others  | 16 bytes   | leading                | stride                |

The swizzle then flips bits of the address in the shared window (see `swizzle`), so that a start address in
the middle of an atom, as kernels make it to go along K, needs nothing special. A base offset says that the
swizzle's pattern begins that many lines of 128 bytes after a multiple of its period; it is taken off the
address before the bits to flip are looked up, which follows from its definition and is what an H200 does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dsv4lab.emulator import small_floats
from dsv4lab.emulator.errors import EmulatorError
from dsv4lab.emulator.swizzle import swizzle

CHUNK = 16
_PERIOD = 1024  # a multiple of every swizzle's period
_WIDTH = {"none": 16, "32B": 32, "64B": 64, "128B": 128, "128B_atom32B": 128}
_WGMMA_SWIZZLE = ("none", "128B", "64B", "32B")
_TCGEN05_SWIZZLE = {0: "none", 1: "128B_atom32B", 2: "128B", 4: "64B", 6: "32B"}
_INTEGERS = {"s8": np.int8, "u8": np.uint8}
_BITS = {name: form.bits for name, form in small_floats.FORMATS.items()} | {"tf32": 32, "s8": 8, "u8": 8}


class DescriptorError(EmulatorError, ValueError):
    """A descriptor, or a matrix described by it, that the hardware does not know."""


@dataclass(frozen=True, slots=True)
class MatrixDescriptor:
    """A decoded descriptor.

    Attributes:
        start: bytes from the start of the CTA's shared window, a multiple of 16.
        leading: the leading dimension's byte offset.
        stride: the stride dimension's byte offset.
        swizzle: "none", "32B", "64B", "128B" or "128B_atom32B", keys of swizzle.PATTERNS.
        base_offset: lines of 128 bytes by which the swizzle's pattern is shifted, 0 to 7.
    """

    start: int
    leading: int
    stride: int
    swizzle: str
    base_offset: int = 0


def decode_wgmma(bits: int) -> MatrixDescriptor:
    """The descriptor of a 64-bit operand of wgmma.mma_async."""
    return MatrixDescriptor(*_offsets(bits), _WGMMA_SWIZZLE[bits >> 62 & 3], bits >> 49 & 7)


def decode_tcgen05(bits: int) -> MatrixDescriptor:
    """The descriptor of a 64-bit operand of tcgen05.mma or tcgen05.cp.

    Raises:
        DescriptorError: for bits that are no such descriptor, or give the leading offset as an address, which
            only the K = 96 of sm_103a takes.
    """
    if bits >> 46 & 7 != 1:
        raise DescriptorError(
            f"the matrix descriptor {bits:#018x} has {bits >> 46 & 7} and not 1 in bits 46 to 48, "
            "which tcgen05 asks for"
        )
    if bits >> 52 & 1:
        raise DescriptorError(f"the matrix descriptor {bits:#018x} gives its leading offset as an address")
    if bits >> 61 not in _TCGEN05_SWIZZLE:
        raise DescriptorError(f"the matrix descriptor {bits:#018x} asks for the unknown swizzle {bits >> 61}")
    return MatrixDescriptor(*_offsets(bits), _TCGEN05_SWIZZLE[bits >> 61], bits >> 49 & 7)


def _offsets(bits: int) -> tuple[int, int, int]:
    return tuple((bits >> shift & 0x3FFF) * 16 for shift in (0, 16, 32))


def chunk_offsets(descriptor: MatrixDescriptor, lines: int, chunks: int, major: str) -> np.ndarray:
    """Where the 16-byte chunks of a matrix start.

    Args:
        descriptor: of the matrix.
        lines: rows of a K-major matrix, or the extent of K of an MN-major one.
        chunks: 16-byte chunks of a line.
        major: "K" or "MN".
    Returns:
        (lines, chunks) int64, bytes from the start of the CTA's shared window.
    """
    low = descriptor.start % _PERIOD
    layout = descriptor.leading, descriptor.stride, descriptor.swizzle, descriptor.base_offset
    return _relative(low, *layout, lines, chunks, major) + (descriptor.start - low)


# Kernels walk through many start addresses; the pattern is the same for those that agree modulo the period.
@lru_cache(maxsize=1024)
def _relative(low, leading, stride, mode, base_offset, lines, chunks, major) -> np.ndarray:
    width = _WIDTH[mode]
    line, chunk = np.arange(lines)[:, None], np.arange(chunks)[None, :]
    if major == "K":
        if mode == "128B_atom32B":
            raise DescriptorError("a K-major matrix has no layout with 32-byte atoms")
        if mode != "none" and low % width + chunks * CHUNK > width:
            raise DescriptorError(f"{chunks * CHUNK} bytes of K do not lie within the {width} of the swizzle")
        offsets = line % 8 * width + line // 8 * stride + chunk * (leading if mode == "none" else CHUNK)
    elif mode == "none":
        offsets = line % 8 * CHUNK + line // 8 * leading + chunk * stride
    else:
        depth, across = (4 if mode == "128B_atom32B" else 8), width // CHUNK
        offsets = line % depth * width + line // depth * stride
        offsets = offsets + chunk % across * CHUNK + chunk // across * leading
    address = offsets + low
    pattern = address - 128 * base_offset
    found = address ^ pattern ^ swizzle(mode, pattern)
    found.flags.writeable = False
    return found


def element_offsets(
    descriptor: MatrixDescriptor, rows: int, depth: int, bits: int, major: str, padded: bool = False
) -> np.ndarray:
    """Where the elements of a matrix lie.

    Args:
        descriptor: of the matrix.
        rows: M or N.
        depth: K, in elements.
        bits: of an element: 32, 16, 8; or 4 and 6.
        major: "K" or "MN".
        padded: elements of 4 or 6 bits fill 16-byte chunks by 16, at their start, as f8f6f4 takes them;
            elements of 4 bits that are not padded are packed, two in a byte, and K-major.
    Returns:
        (rows, depth) int64, offsets of the byte (for 6 bits, of the first byte) that holds an element, from
        the start of the CTA's shared window. The order within a byte is low bits first.
    """
    per_chunk = _per_chunk(bits, padded)
    within = np.arange(per_chunk) * bits // 8
    if major == "K":
        chunks = chunk_offsets(descriptor, rows, -(-depth // per_chunk), "K")
        return (chunks[..., None] + within).reshape(rows, -1)[:, :depth]
    chunks = chunk_offsets(descriptor, depth, -(-rows // per_chunk), "MN")
    return (chunks[..., None] + within).reshape(depth, -1)[:, :rows].T


def _per_chunk(bits: int, padded: bool) -> int:
    """Elements of a 16-byte chunk."""
    return CHUNK if padded else CHUNK * 8 // bits


def read_matrix(
    read: Callable[[np.ndarray], np.ndarray],
    descriptor: MatrixDescriptor,
    rows: int,
    depth: int,
    type_: str,
    major: str = "K",
    padded: bool = False,
) -> np.ndarray:
    """The values of a matrix.

    Args:
        read: of int64 byte offsets in the CTA's shared window; returns their bytes, uint8 of the same shape.
        descriptor: of the matrix.
        rows: M or N.
        depth: K, in elements.
        type_: of the elements: a name of small_floats.FORMATS, "s8" or "u8".
        major: "K" or "MN".
        padded: see element_offsets; only bytes that hold elements are read.
    Returns:
        (rows, depth) float32, or int8 or uint8 of integers. tf32 keeps all of its 32 bits.
    """
    bits = _BITS[type_]
    per_chunk = _per_chunk(bits, padded)
    lines, along = (rows, depth) if major == "K" else (depth, rows)
    chunks = chunk_offsets(descriptor, lines, -(-along // per_chunk), major)
    octets = read(chunks[..., None] + np.arange(per_chunk * bits // 8))
    values = decode_bytes(octets, type_).reshape(lines, -1)[:, :along]
    return values if major == "K" else values.T


def decode_bytes(octets: np.ndarray, type_: str) -> np.ndarray:
    """Values of packed elements, lowest byte and lowest bits first.

    Args:
        octets: (..., bytes) uint8, whole elements (6-bit ones by four).
        type_: a name of small_floats.FORMATS, "s8" or "u8".
    Returns:
        (..., elements) float32, or int8 or uint8.
    """
    octets = np.ascontiguousarray(octets)
    bits = _BITS[type_]
    if type_ in _INTEGERS:
        return octets.view(_INTEGERS[type_])
    if bits == 4:
        return small_floats.decode_nibbles(octets).reshape(*octets.shape[:-1], -1)
    if bits == 6:
        octets = split_six(octets)
    elif bits == 32:
        return octets.view(np.float32)
    elif bits == 16:
        octets = octets.view(np.uint16)
    return small_floats.decode(octets, type_)


def split_six(octets: np.ndarray) -> np.ndarray:
    """Codes of 6 bits, four in three bytes."""
    triples = octets.reshape(*octets.shape[:-1], -1, 3).astype(np.uint32)
    words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    codes = words[..., None] >> np.arange(0, 24, 6, dtype=np.uint32) & 63
    return codes.astype(np.uint8).reshape(*octets.shape[:-1], -1)
