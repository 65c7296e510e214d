"""The bits of a TMA descriptor, and what `tensormap.replace` does to them.

NVIDIA does not document them. They were read off what CuTe DSL's host code writes, and off the machine code
that ptxas makes of each form of `tensormap.replace`; the two agree. Of the two L2-promotion bits only the
value that CuTe DSL writes, 128 bytes, was seen.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv4lab.emulator.errors import EmulatorError


class TensorMapError(EmulatorError, ValueError):
    """A TMA descriptor that the TMA unit would not take, or that the emulator does not know."""


class Element(NamedTuple):
    """An element type: its number in PTX and in the descriptor, and its bits in either memory."""

    number: int
    code: int
    bits: int
    shared_bits: int
    to_tf32: bool = False


# The order, and so the number, is that of PTX (tensormap.replace, .elemtype).
ELEMENTS = {
    "u8": Element(0, 0, 8, 8),
    "u16": Element(1, 1, 16, 16),
    "u32": Element(2, 2, 32, 32),
    "s32": Element(3, 3, 32, 32),
    "u64": Element(4, 4, 64, 64),
    "s64": Element(5, 5, 64, 64),
    "f16": Element(6, 6, 16, 16),
    "f32": Element(7, 7, 32, 32),
    "f32.ftz": Element(8, 8, 32, 32),
    "f64": Element(9, 9, 64, 64),
    "bf16": Element(10, 10, 16, 16),
    "tf32": Element(11, 7, 32, 32, True),
    "tf32.ftz": Element(12, 8, 32, 32, True),
    "b4x16": Element(13, 11, 4, 4),
    "b4x16_p64": Element(14, 12, 4, 8),  # 8 bytes of padding behind each 8 bytes in shared memory
    "b6x16_p32": Element(15, 13, 6, 8),  # 4 bytes of padding behind each 12
}
# Span in bytes that a mode swizzles within, mode and atom in the descriptor.
SWIZZLES = {
    "none": (0, 0, 0),
    "32B": (32, 1, 0),
    "64B": (64, 2, 0),
    "128B": (128, 3, 0),
    "128B_atom32B": (128, 3, 1),
    "128B_atom32B_flip8B": (128, 3, 2),
    "128B_atom64B": (128, 3, 3),
}
INTERLEAVES = ("none", "16B", "32B")
FILLS = ("zero", "nan")
L2_PROMOTIONS = ("none", "64B", "128B", "256B")


def _fields() -> dict[str, tuple[int, int]]:
    """First bit and width of each field in the 512 bits that count."""
    fields = {
        "address": (0, 64),
        "im2col": (64, 1),
        "version": (65, 3),
        "rank": (68, 3),  # minus 1
        "element": (71, 4),
        "interleave": (75, 2),
        "swizzle": (77, 2),
        "fill": (79, 1),
        "to_tf32": (80, 1),
        "l2_promotion": (81, 2),
        "swizzle_atom": (83, 2),
        "large": (85, 1),
        "swizzle_96B": (86, 1),  # of sm_103a alone
    }
    for i in range(4):  # in units of 16 bytes: 32 bits in words 3 to 6, the upper 4 in word 7
        fields[f"stride{i}"] = (96 + 32 * i, 32)
        fields[f"stride_high{i}"] = (224 + 4 * i, 4)
    for i in range(5):  # all minus 1
        fields[f"shape{i}"] = (256 + 32 * i, 32)
        fields[f"element_stride{i}"] = (416 + 3 * i, 3)
        fields[f"box{i}"] = (440 + 8 * i, 8)
    return fields


FIELDS = _fields()
_KNOWN = sum(((1 << width) - 1) << first for first, width in FIELDS.values())


def unpack(descriptor: bytes) -> dict[str, int]:
    """All fields of a descriptor of 128 bytes, or of the 64 that count.

    Raises:
        TensorMapError: for another length.
    """
    if len(descriptor) not in (64, 128):
        raise TensorMapError(f"a TMA descriptor has 128 bytes, got {len(descriptor)}")
    whole = int.from_bytes(descriptor[:64], "little")
    return {name: whole >> first & (1 << width) - 1 for name, (first, width) in FIELDS.items()}


def unknown_bits(descriptor: bytes) -> int:
    """The bits of the 64 bytes that count that belong to no field, as one number."""
    return int.from_bytes(descriptor[:64], "little") & ~_KNOWN


def pack(values: dict[str, int]) -> bytes:
    """The 128 bytes with these fields, all others zero."""
    return sum(value << FIELDS[name][0] for name, value in values.items()).to_bytes(128, "little")


def replace(descriptor: bytes, field: str, value: int, index: int = 0) -> bytes:
    """What `tensormap.replace.tile.<field>` makes of a descriptor.

    Args:
        descriptor: 128 bytes.
        field: as PTX names it, "global_address", "rank", "box_dim", ...
        value: new value, of a stride in bytes; of an enumeration, its PTX number; of the rank, minus 1.
        index: dimension, of box_dim, global_dim, global_stride (0 is dimension 1) and element_stride.
    Returns:
        The new descriptor; whether it is sound shows when it is decoded.
    Raises:
        TensorMapError: for a field, value or index that PTX does not have.
    """
    whole = int.from_bytes(descriptor, "little")
    for name, new in _replacement(field, value, index).items():
        first, width = FIELDS[name]
        mask = (1 << width) - 1
        whole = whole & ~(mask << first) | (new & mask) << first
    return whole.to_bytes(len(descriptor), "little")


_ENUMERATIONS = {
    "elemtype": 16,
    "interleave_layout": 3,
    "swizzle_mode": 5,
    "swizzle_atomicity": 4,
    "fill_mode": 2,
}
_INDEXED = {"box_dim": 5, "global_dim": 5, "element_stride": 5, "global_stride": 4}


def _replacement(field: str, value: int, index: int) -> dict[str, int]:
    if field in _ENUMERATIONS and not 0 <= value < _ENUMERATIONS[field]:
        raise TensorMapError(f"tensormap.replace: {field} has no value {value}")
    if field in _INDEXED and not 0 <= index < _INDEXED[field]:
        raise TensorMapError(f"tensormap.replace: {field} has no dimension {index}")
    match field:
        case "global_address":
            return {"address": value}
        case "rank":
            return {"rank": value}
        case "box_dim":
            return {f"box{index}": value - 1}
        case "global_dim":
            return {f"shape{index}": value - 1}
        case "element_stride":
            return {f"element_stride{index}": value - 1}
        case "global_stride":
            return {f"stride{index}": value >> 4, f"stride_high{index}": value >> 36}
        case "elemtype":
            element = next(e for e in ELEMENTS.values() if e.number == value)
            # ptxas sets the bit for tf32 and leaves it alone for all other types.
            return {"element": element.code} | ({"to_tf32": 1} if element.to_tf32 else {})
        case "interleave_layout":
            return {"interleave": value}
        case "swizzle_mode":
            return {"swizzle": value % 4, "swizzle_96B": value // 4}
        case "swizzle_atomicity":
            return {"swizzle_atom": value, "large": 0}  # one field of three bits to ptxas 13.0
        case "fill_mode":
            return {"fill": value}
    raise TensorMapError(f"tensormap.replace has no field {field}")
