"""TMA descriptors: what compiled host code writes against what was asked for, every field, every rule."""

from __future__ import annotations

from dataclasses import replace as changed

import numpy as np
import pytest

from dsv4lab.emulator.tensormap import TensorMap, TensorMapError, decode, replace
from dsv4lab.emulator.tensormap_fields import ELEMENTS, FIELDS, SWIZZLES, unpack

ADDRESS = 0x7F0000001000


# What real host code writes --------------------------------------------------------------------------------

# CuTe DSL's type, the type it becomes, its bits. A type TMA does not have travels as an integer of its size.
TYPES = [
    ("Uint8", "u8", 8), ("Int8", "u8", 8), ("Uint16", "u16", 16), ("Int16", "u16", 16), ("Uint32", "u32", 32),
    ("Int32", "u32", 32), ("Uint64", "u64", 64), ("Int64", "u64", 64), ("Float16", "f16", 16),
    ("BFloat16", "bf16", 16), ("Float32", "f32", 32), ("TFloat32", "tf32", 32), ("Float64", "f64", 64),
    ("Float8E4M3FN", "u8", 8), ("Float8E5M2", "u8", 8), ("Float8E8M0FNU", "u8", 8),
]  # fmt: skip
# CuTe's Swizzle<bits, base, shift> of a tile with 128 bytes in its inner dimension, and the mode it becomes.
MODES = [
    ((1, 4, 3), "32B", 16), ((2, 4, 3), "64B", 32), ((3, 4, 3), "128B", 64), ((0, 4, 3), "none", 64),
    ((2, 5, 2), "128B_atom32B", 64), ((1, 6, 1), "128B_atom64B", 64),
]  # fmt: skip
# Shape, stride and box in elements of 16 bits, and whether the tensor spans 128 KiB.
SHAPES = [
    ((512,), (1,), (128,), False),
    ((64, 8), (1, 72), (64, 8), False),
    ((256, 256), (1, 256), (64, 256), True),
    ((256, 255), (1, 256), (64, 8), False),
    ((64, 8, 6), (1, 64, 512), (32, 4, 2), False),
    ((64, 8, 6), (1, 2**36, 2**30 + 8), (32, 4, 2), True),
    ((64, 8, 6, 5), (1, 64, 512, 4096), (32, 4, 2, 3), False),
    ((64, 8, 6, 5, 4), (1, 64, 512, 4096, 32768), (32, 4, 2, 3, 2), True),
    ((2**31, 3), (1, 2**31), (256, 2), True),
]


def written(ptx_kernels, arch, element, *arguments, address=ADDRESS, **options) -> bytes:
    """The descriptor in the parameters of a kernel that real host code launches."""
    pointer = ptx_kernels.pointer(element, address)
    launch = ptx_kernels.launched(arch, ptx_kernels.describe(element, *arguments, **options), pointer)
    (descriptor,) = [p for p in launch.parameters if len(p) == 128]
    return descriptor


def holds(descriptor: bytes, asked: TensorMap) -> None:
    assert decode(descriptor) == asked
    assert decode(descriptor).encode()[:64] == descriptor[:64]
    assert asked.encode()[64:] == bytes(64)


@pytest.mark.parametrize(
    ("arch", "name", "element", "bits"),
    [(arch, *row) for arch in ("sm_90a", "sm_100a") for row in TYPES]
    + [("sm_100a", "Float4E2M1FN", "b4x16", 4)],
)
def test_types_of_real_descriptors(ptx_kernels, arch, name, element, bits):
    type_ = getattr(ptx_kernels.cutlass, name)
    inner = 128 if bits < 64 else 64
    descriptor = written(ptx_kernels, arch, type_, (256, 64), (1, 256), (inner, 8))
    asked = TensorMap(ADDRESS, element, (256, 64), (256 * bits // 8,), (inner, 8))
    assert asked.large == (bits == 64)
    holds(descriptor, asked)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("swizzle", "mode", "inner"), MODES)
def test_swizzles_of_real_descriptors(ptx_kernels, arch, swizzle, mode, inner):
    descriptor = written(ptx_kernels, arch, ptx_kernels.HALF, (256, 64), (1, 256), (inner, 8), swizzle)
    holds(descriptor, TensorMap(ADDRESS, "f16", (256, 64), (512,), (inner, 8), swizzle=mode))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("shape", "stride", "box", "large"), SHAPES)
def test_ranks_and_strides_of_real_descriptors(ptx_kernels, arch, shape, stride, box, large):
    address = 0x7F0123456780
    descriptor = written(ptx_kernels, arch, ptx_kernels.cutlass.BFloat16, shape, stride, box, address=address)
    strides = tuple(2 * step for step in stride[1:])
    asked = TensorMap(address, "bf16", shape, strides, box, large=large)
    holds(descriptor, asked)
    assert changed(asked, large=None) == asked  # worked out from the span


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_store_and_a_type_in_disguise(ptx_kernels, arch):
    store = written(ptx_kernels, arch, ptx_kernels.HALF, (256, 64), (1, 256), (64, 8), (3, 4, 3), store=True)
    holds(store, TensorMap(ADDRESS, "f16", (256, 64), (512,), (64, 8), swizzle="128B"))
    scales = written(
        ptx_kernels, arch, ptx_kernels.cutlass.Float8E4M3FN, (256, 64), (1, 256), (128, 8),
        internal=ptx_kernels.cutlass.Uint16,
    )  # fmt: skip
    holds(scales, TensorMap(ADDRESS, "u16", (128, 64), (256,), (64, 8)))


def test_fp4_padded_to_bytes(ptx_kernels):
    fp4 = ptx_kernels.cutlass.Float4E2M1FN
    descriptor = written(
        ptx_kernels, "sm_100a", fp4, (256, 64), (1, 256), (128, 8), internal=ptx_kernels.cutlass.Uint8
    )
    holds(descriptor, TensorMap(ADDRESS, "b4x16_p64", (256, 64), (128,), (128, 8)))


def test_the_flags_seen_first():
    """Flag words of an NVFP4 GEMM's operand and of its scale factors, written out bit by bit."""
    operand = TensorMap(ADDRESS, "b4x16", (512, 256, 1), (256, 0), (256, 128, 1), swizzle="128B", large=False)
    assert int.from_bytes(operand.encode()[8:12], "little") == 0x465A2
    scales = TensorMap(ADDRESS, "u16", (256, 4, 2, 1), (512, 2048, 0), (256, 1, 1, 1))
    assert int.from_bytes(scales.encode()[8:12], "little") == 0x400B2


# tensormap.replace -----------------------------------------------------------------------------------------

# What the machine code of ptxas 13.0 does for sm_100a: field, value, dimension, byte offset of the 32-bit
# word, bits it clears, bits it sets.
MACHINE_CODE = [
    ("rank", 3, 0, 0x08, 0x70, 0x30),
    ("elemtype", 0, 0, 0x08, 0x780, 0x0),
    ("elemtype", 5, 0, 0x08, 0x780, 0x280),
    ("elemtype", 9, 0, 0x08, 0x780, 0x480),
    ("elemtype", 10, 0, 0x08, 0x780, 0x500),
    ("elemtype", 11, 0, 0x08, 0x10780, 0x10380),
    ("elemtype", 12, 0, 0x08, 0x10780, 0x10400),
    ("elemtype", 13, 0, 0x08, 0x780, 0x580),
    ("elemtype", 14, 0, 0x08, 0x780, 0x600),
    ("elemtype", 15, 0, 0x08, 0x780, 0x680),
    ("interleave_layout", 1, 0, 0x08, 0x1800, 0x800),
    ("interleave_layout", 2, 0, 0x08, 0x1800, 0x1000),
    ("swizzle_mode", 0, 0, 0x08, 0x406000, 0x0),
    ("swizzle_mode", 1, 0, 0x08, 0x406000, 0x2000),
    ("swizzle_mode", 2, 0, 0x08, 0x406000, 0x4000),
    ("swizzle_mode", 3, 0, 0x08, 0x406000, 0x6000),
    ("swizzle_mode", 4, 0, 0x08, 0x406000, 0x400000),  # for sm_103a
    ("swizzle_atomicity", 0, 0, 0x08, 0x380000, 0x0),
    ("swizzle_atomicity", 1, 0, 0x08, 0x380000, 0x80000),
    ("swizzle_atomicity", 2, 0, 0x08, 0x380000, 0x100000),
    ("swizzle_atomicity", 3, 0, 0x08, 0x380000, 0x180000),
    ("fill_mode", 0, 0, 0x08, 0x8000, 0x0),
    ("fill_mode", 1, 0, 0x08, 0x8000, 0x8000),
    ("box_dim", 0x41, 0, 0x34, 0xFF000000, 0x40000000),
    ("box_dim", 0x41, 1, 0x38, 0xFF, 0x40),
    ("box_dim", 0x41, 2, 0x38, 0xFF00, 0x4000),
    ("box_dim", 0x41, 3, 0x38, 0xFF0000, 0x400000),
    ("box_dim", 0x41, 4, 0x38, 0xFF000000, 0x40000000),
    ("element_stride", 6, 0, 0x34, 0x7, 0x5),
    ("element_stride", 6, 1, 0x34, 0x38, 0x28),
    ("element_stride", 6, 2, 0x34, 0x1C0, 0x140),
    ("element_stride", 6, 3, 0x34, 0xE00, 0xA00),
    ("element_stride", 6, 4, 0x34, 0x7000, 0x5000),
    *[("global_dim", 0x12345678, i, 0x20 + 4 * i, 0xFFFFFFFF, 0x12345677) for i in range(5)],
    *[("global_stride", 0xABCDEF0120, i, 0x0C + 4 * i, 0xFFFFFFFF, 0xBCDEF012) for i in range(4)],
    *[("global_stride", 0xABCDEF0120, i, 0x1C, 0xF << 4 * i, 0xA << 4 * i) for i in range(4)],
    ("global_address", ADDRESS, 0, 0x00, 0xFFFFFFFF, 0x00001000),
    ("global_address", ADDRESS, 0, 0x04, 0xFFFFFFFF, 0x00007F00),
]


@pytest.mark.parametrize("garbage", [0x00, 0xFF, 0xA5])
@pytest.mark.parametrize(("field", "value", "index", "offset", "clear", "bits"), MACHINE_CODE)
def test_replace_does_what_the_machine_code_does(field, value, index, offset, clear, bits, garbage):
    before = bytes([garbage]) * 128
    after = np.frombuffer(replace(before, field, value, index), "<u4")
    words = np.frombuffer(before, "<u4").copy()
    words[offset // 4] = words[offset // 4] & ~np.uint32(clear) | np.uint32(bits)
    assert after[offset // 4] == words[offset // 4]
    # Strides and addresses write two words; nothing else changes.
    same = [i for i in range(32) if i != offset // 4]
    if field not in ("global_stride", "global_address"):
        assert (after[same] == words[same]).all()


def test_replace_and_decode():
    before = TensorMap(ADDRESS, "f16", (256, 64), (512,), (64, 8), swizzle="128B").encode()
    after = replace(before, "global_address", 0x7F0000002000)
    after = replace(replace(after, "global_dim", 100, 1), "global_stride", 1024, 0)
    expected = TensorMap(0x7F0000002000, "f16", (256, 100), (1024,), (64, 8), swizzle="128B", large=False)
    assert decode(after) == expected
    for number, name in ((6, "f16"), (10, "bf16"), (1, "u16")):
        assert decode(replace(before, "elemtype", number)).element == name
        assert ELEMENTS[name].number == number


@pytest.mark.parametrize(
    ("field", "value", "index", "message"),
    [
        ("colour", 1, 0, "no field colour"),
        ("elemtype", 16, 0, "elemtype has no value 16"),
        ("swizzle_mode", 5, 0, "swizzle_mode has no value 5"),
        ("box_dim", 1, 5, "box_dim has no dimension 5"),
        ("global_stride", 16, 4, "global_stride has no dimension 4"),
    ],
)
def test_replace_refuses_what_ptx_does_not_have(field, value, index, message):
    with pytest.raises(TensorMapError, match=message):
        replace(bytes(128), field, value, index)


# All of the fields -----------------------------------------------------------------------------------------

GOOD = TensorMap(ADDRESS, "bf16", (64, 8, 6), (128, 1024), (32, 4, 2))


def test_fields_do_not_overlap():
    bits = [first + i for first, width in FIELDS.values() for i in range(width)]
    assert len(bits) == len(set(bits)) and max(bits) < 512


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_element_goes_there_and_back(element):
    padded = element in ("b4x16_p64", "b6x16_p32")
    inner = 128 if padded else 16 * 8 // ELEMENTS[element].bits
    whole = TensorMap(ADDRESS, element, (256, 8), (512,), (inner, 4))
    assert decode(whole.encode()) == whole


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("fill", ["zero", "nan"])
@pytest.mark.parametrize("l2_promotion", ["none", "64B", "128B", "256B"])
def test_every_mode_goes_there_and_back(swizzle, fill, l2_promotion):
    whole = changed(GOOD, box=(16, 4, 2), swizzle=swizzle, fill=fill, l2_promotion=l2_promotion)
    assert decode(whole.encode()) == whole


def test_interleave_and_element_strides_go_there_and_back():
    for interleave, swizzle in (("16B", "none"), ("32B", "32B")):
        whole = changed(
            GOOD, interleave=interleave, swizzle=swizzle, element_strides=(2, 3, 8), box=(32, 4, 9)
        )
        assert decode(whole.encode()) == whole
        assert whole.copied == (16, 2, 2)
    assert changed(GOOD, element_strides=(2, 3, 1)).copied == (32, 2, 2)  # no step in dimension 0


def test_sizes_are_in_bytes():
    assert (GOOD.rank, GOOD.bits, GOOD.span) == (3, 16, 5 * 1024 + 7 * 128 + 128)
    assert TensorMap(ADDRESS, "b4x16", (66, 2), (48,), (32, 2)).span == 48 + 33


def test_what_lies_beyond_does_not_matter():
    plain = GOOD.encode()
    assert decode(plain[:64]) == GOOD
    assert decode(plain[:64] + bytes(range(64))) == GOOD
    assert decode(replace(plain, "global_dim", 77, 4)) == GOOD


# Rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element": "f8"}, "element must be one of u8, .*, got 'f8'"),
        ({"swizzle": "96B"}, "swizzle must be one of"),
        ({"interleave": "8B"}, "interleave must be one of"),
        ({"fill": "one"}, "fill must be one of zero, nan, got 'one'"),
        ({"l2_promotion": "1B"}, "l2_promotion must be one of"),
        ({"shape": (), "strides": (), "box": (), "element_strides": ()}, "rank must be 1 to 5, got 0"),
        ({"shape": (8,) * 6}, "rank must be 1 to 5, got 6"),
        ({"strides": (128,)}, r"strides must have 2 entries for rank 3, got \(128,\)"),
        ({"box": (32, 4)}, "box must have 3 entries"),
        ({"element_strides": (1, 1)}, "element_strides must have 3 entries"),
        ({"shape": (64, 0, 6)}, "shape must be between 1 and 4294967296"),
        ({"shape": (64, 2**32 + 1, 6)}, "shape must be between 1 and 4294967296"),
        ({"box": (32, 257, 1)}, "box must be between 1 and 256"),
        ({"box": (32, 0, 1)}, "box must be between 1 and 256"),
        ({"element_strides": (1, 9, 1)}, "element_strides must be between 1 and 8"),
        ({"address": ADDRESS + 8}, "address must be a multiple of 16, got 0x7f0000001008"),
        ({"strides": (136, 1024)}, r"strides must be multiples of 16 below 2\*\*40"),
        ({"strides": (128, 2**40)}, r"strides must be multiples of 16 below 2\*\*40"),
        ({"box": (12, 4, 2)}, "must span a multiple of 16 bytes, got 24"),
        ({"swizzle": "32B"}, "must span at most 32 bytes for swizzle 32B, got 64"),
        ({"swizzle": "128B", "box": (72, 4, 2)}, "must span at most 128 bytes for swizzle 128B, got 144"),
        ({"element": "u16", "fill": "nan"}, "fill 'nan' needs a floating-point element, got u16"),
        ({"interleave": "32B"}, "interleave 32B needs swizzle 32B, got none"),
        (
            {"interleave": "32B", "swizzle": "32B", "address": ADDRESS + 16},
            "address must be a multiple of 32",
        ),
        ({"element": "b4x16", "shape": (63, 8, 6)}, r"shape\[0\] must be a multiple of 2 for b4x16, got 63"),
        ({"element": "b4x16_p64", "box": (128, 4, 2)}, r"shape\[0\] must be a multiple of 128 for b4x16_p64"),
        ({"element": "b6x16_p32", "shape": (128, 8, 6)}, r"box\[0\] must be 128 for b6x16_p32, got 32"),
        ({"element": "b4x16_p64", "strides": (144, 1024)}, "strides must be multiples of 32"),
    ],
)
def test_rules(change, message):
    with pytest.raises(TensorMapError, match=message):
        changed(GOOD, **change)


def test_interleaving_needs_three_dimensions():
    with pytest.raises(TensorMapError, match="an interleaved tensor has at least 3 dimensions, got 2"):
        TensorMap(ADDRESS, "bf16", (64, 8), (128,), (32, 4), interleave="16B")


def tampered(field: str, value: int) -> bytes:
    first, width = FIELDS[field]
    whole = int.from_bytes(GOOD.encode(), "little") & ~(((1 << width) - 1) << first) | value << first
    return whole.to_bytes(128, "little")


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [
        (bytes(100), "a TMA descriptor has 128 bytes, got 100"),
        (bytes(128), "this is no TMA descriptor: its version is 0, not 1"),
        (tampered("im2col", 1), "an im2col descriptor"),
        (tampered("rank", 5), "rank must be 1 to 5, got 6"),
        (tampered("element", 14), "no element type has code 14 with the TF32 bit 0"),
        (tampered("to_tf32", 1), "no element type has code 10 with the TF32 bit 1"),
        (tampered("swizzle_atom", 1), "swizzle mode 0 has no atom 1"),
        (tampered("swizzle_96B", 1), "swizzle 96B is not supported"),
        (tampered("interleave", 3), "no interleave has code 3"),
        (tampered("address", ADDRESS + 1), "address must be a multiple of 16"),
        (GOOD.encode()[:60] + b"\x01" + bytes(67), "bits that are not known: 0x1000"),
    ],
)
def test_descriptors_that_cannot_be(descriptor, message):
    with pytest.raises(TensorMapError, match=message):
        decode(descriptor)


def test_an_im2col_descriptor_of_real_host_code_is_named_as_such():
    words = (0x00007F0000001000, 0x0000000800046533, 0x0000040000000080, 0, 0x0000000F0000003F,
             0x0000000100000007, 0x3F00000000000000, 0x0000003FFFFFFFFF)  # fmt: skip
    with pytest.raises(TensorMapError, match="an im2col descriptor: only tiled ones are supported"):
        decode(np.array(words, "<u8").tobytes())


def test_unpack_names_every_field():
    assert unpack(GOOD.encode())["rank"] == 2 and set(unpack(GOOD.encode())) == set(FIELDS)
