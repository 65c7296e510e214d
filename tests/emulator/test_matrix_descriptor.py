"""Matrix descriptors: worked layouts of the PTX ISA, and every mode against CuTe's own layouts."""

from __future__ import annotations

import cutlass
import ml_dtypes
import numpy as np
import pytest
from cutlass import cute
from cutlass.cute.nvgpu import tcgen05

from dsv4lab.emulator.matrix_descriptor import (
    DescriptorError,
    MatrixDescriptor,
    chunk_offsets,
    decode_tcgen05,
    decode_wgmma,
    element_offsets,
    read_matrix,
)

KIND = tcgen05.SmemLayoutAtomKind
# CuTe's atom, swizzle, its bits, base and shift; the widths of elements that the hardware takes.
K_MAJOR = [
    (KIND.K_INTER, "none", (0, 4, 3)), (KIND.K_SW32, "32B", (1, 4, 3)), (KIND.K_SW64, "64B", (2, 4, 3)),
    (KIND.K_SW128, "128B", (3, 4, 3)),
]  # fmt: skip
MN_MAJOR = [
    (KIND.MN_INTER, "none", (0, 4, 3)), (KIND.MN_SW32, "32B", (1, 4, 3)), (KIND.MN_SW64, "64B", (2, 4, 3)),
    (KIND.MN_SW128, "128B", (3, 4, 3)),
]  # fmt: skip
TYPES = {8: cutlass.Int8, 16: cutlass.Float16, 32: cutlass.Float32}
BASE = 3072


def swizzled(address, bits, base, shift):
    """CuTe's Swizzle<bits, base, shift> of addresses."""
    for i in range(base, base + bits):
        address = address ^ (address >> (i + shift) & 1) << i
    return address


def crd2idx(coordinate, shape, stride):
    """CuTe's layout function of one mode: a factor after the other, the first fastest."""
    if isinstance(shape, int):
        return coordinate * stride
    total = 0
    for extent, step in zip(shape, stride, strict=True):
        total = total + coordinate % extent * step
        coordinate = coordinate // extent
    return total


def cute_table(kind, element, rows, depth, order):
    """Element offsets (rows, depth) that CuTe gives a tile, without swizzle."""
    found = {}

    @cute.jit
    def host():
        outer = cute.tile_to_shape(tcgen05.make_smem_layout_atom(kind, element), (rows, depth), order).outer
        found.update(shape=outer.shape, stride=outer.stride, last=outer((rows - 1, depth - 1)))

    host()
    (of_rows, of_columns), (row_step, column_step) = found["shape"], found["stride"]
    table = crd2idx(np.arange(rows), of_rows, row_step)[:, None] + crd2idx(
        np.arange(depth), of_columns, column_step
    )
    assert table[-1, -1] == found["last"]
    return table


def strides_of(table, major, mode, unit):
    """Leading and stride byte offsets by their definitions in the PTX ISA, of a layout in elements."""

    def distance(row, k):
        inside = row < table.shape[0] and k < table.shape[1]
        return int(table[row, k] - table[0, 0]) * unit if inside else 16

    per_chunk = 16 // unit
    if major == "K":
        leading = distance(0, per_chunk) if mode == "none" else 16
        return leading, distance(8, 0)
    if mode == "none":
        return distance(0, 8), distance(per_chunk, 0)
    width = 128 if mode.startswith("128B") else int(mode[:-1])
    return distance(width // unit, 0), distance(0, 4 if mode == "128B_atom32B" else 8)


# Worked layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "major", "mode", "rows", "columns", "leading", "stride"),
    [
        (32, "K", "none", ((8, 2), (4, 32)), ((4, 4), (1, 64)), 16, 8),
        (32, "K", "32B", ((8, 2), (8, 64)), ((4, 2), (1, 4)), 1, 16),
        (16, "MN", "none", ((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128)), 16, 8),
        (16, "MN", "32B", ((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256)), 16, 32),
        (16, "MN", "64B", ((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512)), 32, 64),
    ],
)
def test_examples_of_the_manual(bits, major, mode, rows, columns, leading, stride):
    """wgmma's examples, with the encodings of the offsets written out."""
    height = int(np.prod(rows[0]))
    depth = int(np.prod(columns[0]))
    code = {"none": 0, "128B": 1, "64B": 2, "32B": 3}[mode]
    descriptor = decode_wgmma(BASE >> 4 | leading << 16 | stride << 32 | code << 62)
    bits_of_swizzle = {"none": 0, "32B": 1, "64B": 2}[mode]
    table = crd2idx(np.arange(height), *rows)[:, None] + crd2idx(np.arange(depth), *columns)
    expected = swizzled(BASE + table * bits // 8, bits_of_swizzle, 4, 3)
    np.testing.assert_array_equal(element_offsets(descriptor, height, depth, bits, major), expected)


def test_a_line_of_the_128_byte_swizzle():
    """Row 3 of a K-major matrix: chunk c lies where chunk c ^ 3 would."""
    d = MatrixDescriptor(start=1024, leading=16, stride=1024, swizzle="128B")
    assert chunk_offsets(d, 16, 8, "K")[3].tolist() == [
        1024 + 3 * 128 + 16 * c for c in (3, 2, 1, 0, 7, 6, 5, 4)
    ]
    assert chunk_offsets(d, 16, 8, "K")[11, 0] == 2048 + 3 * 128 + 3 * 16


# Fields ----------------------------------------------------------------------------------------------------


def test_fields_of_wgmma():
    """Each where the manual puts it, the offsets in units of 16 bytes."""
    bits = 0x1234 | 0x0ABC << 16 | 0x2345 << 32 | 5 << 49 | 2 << 62
    assert decode_wgmma(bits) == MatrixDescriptor(0x12340, 0xABC0, 0x23450, "64B", 5)
    assert [decode_wgmma(code << 62).swizzle for code in range(4)] == ["none", "128B", "64B", "32B"]


def test_fields_of_tcgen05():
    """Other codes of the swizzle, and a constant that must be there."""
    bits = 0x1234 | 0x0ABC << 16 | 0x2345 << 32 | 1 << 46 | 5 << 49 | 4 << 61
    assert decode_tcgen05(bits) == MatrixDescriptor(0x12340, 0xABC0, 0x23450, "64B", 5)
    modes = {code: decode_tcgen05(1 << 46 | code << 61).swizzle for code in (0, 1, 2, 4, 6)}
    assert modes == {0: "none", 1: "128B_atom32B", 2: "128B", 4: "64B", 6: "32B"}


@pytest.mark.parametrize(
    ("bits", "what"),
    [(0, "bits 46 to 48"), (2 << 46, "has 2 and not 1"), (1 << 46 | 3 << 61, "unknown swizzle 3"),
     (1 << 46 | 1 << 52, "as an address")],
)  # fmt: skip
def test_descriptors_that_tcgen05_does_not_know(bits, what):
    """A descriptor of wgmma is one."""
    with pytest.raises(DescriptorError, match=what):
        decode_tcgen05(bits)


def test_layouts_that_do_not_exist():
    """32-byte atoms are for MN-major matrices; K stays within a swizzle."""
    with pytest.raises(DescriptorError, match="no layout with 32-byte atoms"):
        chunk_offsets(MatrixDescriptor(0, 16, 1024, "128B_atom32B"), 8, 2, "K")
    with pytest.raises(DescriptorError, match="32 bytes of K do not lie within the 64"):
        chunk_offsets(MatrixDescriptor(1024 + 48, 16, 512, "64B"), 8, 2, "K")


# Every mode against CuTe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize(("kind", "mode", "function"), K_MAJOR)
def test_k_major_against_cute(kind, mode, function, bits):
    """All 32-byte steps along K of a tile, as kernels advance the start address."""
    unit, depth = bits // 8, 32 * 8 // bits
    table = cute_table(kind, TYPES[bits], 24, 4 * depth, (0, 1))
    leading, stride = strides_of(table, "K", mode, unit)
    for k in range(0, 4 * depth, depth):
        start = BASE + int(table[0, k]) * unit
        descriptor = MatrixDescriptor(start, leading, stride, mode)
        expected = swizzled(BASE + table[:, k : k + depth] * unit, *function)
        np.testing.assert_array_equal(element_offsets(descriptor, 24, depth, bits, "K"), expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("kind", "mode", "function", "bits"),
    [(*mode, bits) for mode in MN_MAJOR for bits in (8, 16)]
    + [(KIND.MN_INTER, "none", (0, 4, 3), 32), (KIND.MN_SW128_32B, "128B_atom32B", (2, 5, 2), 32)],
)
def test_mn_major_against_cute(kind, mode, function, bits, order):
    """Atoms one after the other along the rows or along K."""
    unit, depth = bits // 8, 32 * 8 // bits
    rows = 2 * 128 // unit
    table = cute_table(kind, TYPES[bits], rows, 2 * depth, order)
    leading, stride = strides_of(table, "MN", mode, unit)
    for k in (0, depth):
        start = BASE + int(table[0, k]) * unit
        descriptor = MatrixDescriptor(start, leading, stride, mode)
        expected = swizzled(BASE + table[:, k : k + depth] * unit, *function)
        np.testing.assert_array_equal(element_offsets(descriptor, rows, depth, bits, "MN"), expected)


# Start addresses and base offset ---------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1024, 2048 + 32, 1024 * 100 + 96, 1024 * 200])
def test_start_addresses_share_a_pattern(start):
    """The cached pattern is moved by whole periods only."""
    d = MatrixDescriptor(start, 16, 2048, "128B")
    expected = [[swizzled(start + r % 8 * 128 + r // 8 * 2048 + 16 * c, 3, 4, 3) for c in range(2)]
                for r in range(16)]  # fmt: skip
    assert chunk_offsets(d, 16, 2, "K").tolist() == expected


def test_an_unaligned_line_shifts_the_swizzle():
    """A tile that starts in line 2 of the period: the pattern of absolute addresses, and its own."""
    absolute = MatrixDescriptor(1024 + 256, 16, 1024, "128B")
    assert chunk_offsets(absolute, 8, 2, "K")[0].tolist() == [1280 + 32, 1280 + 48]
    own = MatrixDescriptor(1024 + 256, 16, 1024, "128B", base_offset=2)
    assert chunk_offsets(own, 8, 2, "K")[0].tolist() == [1280, 1296]
    assert chunk_offsets(own, 8, 2, "K")[1].tolist() == [1408 + 16, 1408]


# Values ----------------------------------------------------------------------------------------------------

PACKED = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "s8": np.int8, "u8": np.uint8,
}  # fmt: skip


@pytest.mark.parametrize("major", ["K", "MN"])
@pytest.mark.parametrize("type_", PACKED)
def test_values_of_whole_bytes(type_, major):
    """Of random bytes, as ml_dtypes and NumPy read them."""
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, 1 << 14).astype(np.uint8)
    dtype = np.dtype(PACKED[type_])
    depth = 32 // dtype.itemsize
    d = MatrixDescriptor(1024, 2048, 1024 if major == "K" else 4096, "64B")
    values = read_matrix(memory.take, d, 64, depth, type_, major)
    at = element_offsets(d, 64, depth, 8 * dtype.itemsize, major)
    expected = memory[at[..., None] + np.arange(dtype.itemsize)].copy().view(dtype)[..., 0]
    assert values.dtype == (dtype if type_ in ("s8", "u8") else np.float32)
    np.testing.assert_array_equal(values, expected.astype(values.dtype))


def test_packed_fp4():
    """Two in a byte, the low nibble first; 64 in a row of two chunks."""
    rng = np.random.default_rng(2)
    memory = rng.integers(0, 256, 4096).astype(np.uint8)
    d = MatrixDescriptor(1024, 16, 1024, "128B")
    values = read_matrix(memory.take, d, 16, 64, "e2m1")
    at = element_offsets(d, 16, 64, 4, "K")
    assert (at[:, 0::2] == at[:, 1::2]).all()
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for row, k in [(0, 0), (0, 1), (5, 31), (9, 62), (15, 63)]:
        code = int(memory[at[row, k]]) >> 4 * (k % 2) & 15
        assert values[row, k] == magnitudes[code & 7] * (-1 if code & 8 else 1)
    assert at[1, 0] == 1024 + 128 + 16


@pytest.mark.parametrize("major", ["K", "MN"])
@pytest.mark.parametrize(
    ("type_", "bits", "dtype"),
    [
        ("e2m1", 4, ml_dtypes.float4_e2m1fn),
        ("e2m3", 6, ml_dtypes.float6_e2m3fn),
        ("e3m2", 6, ml_dtypes.float6_e3m2fn),
    ],
)
def test_padded_elements(type_, bits, dtype, major):
    """Sixteen at the start of 16 bytes, as TMA unpacks them; the padding is never read."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 1 << bits, (32, 32))
    memory, used = np.zeros(8192, np.uint8), np.zeros(8192, bool)
    d = MatrixDescriptor(1024, 2048, 512, "64B")
    lines = codes if major == "K" else codes.T
    for line, offsets in enumerate(chunk_offsets(d, 32, 2, major)):
        for c, offset in enumerate(offsets):
            word = sum(int(code) << bits * i for i, code in enumerate(lines[line, 16 * c : 16 * c + 16]))
            memory[offset : offset + 2 * bits] = list(word.to_bytes(2 * bits, "little"))
            used[offset : offset + 2 * bits] = True

    def read(offsets):
        assert used[offsets].all()
        return memory[offsets]

    values = read_matrix(read, d, 32, 32, type_, major, padded=True)
    np.testing.assert_array_equal(values, codes.astype(np.uint8).view(dtype).astype(np.float32))
    at = element_offsets(d, 32, 32, bits, major, padded=True)
    low = (memory[at].astype(int) | memory[at + 1].astype(int) << 8) >> np.array(
        [[((k if major == "K" else r) % 16 * bits) % 8 for k in range(32)] for r in range(32)]
    )
    np.testing.assert_array_equal(low & ((1 << bits) - 1), codes)
