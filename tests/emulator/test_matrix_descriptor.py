"""Matrix descriptors: worked layouts of the PTX ISA, and every mode against what CuTe makes."""

# No annotations from __future__: cute.kernel reads them as types.
from dataclasses import replace

import cutlass
import ml_dtypes
import numpy as np
import pytest
from cutlass import cute, memory
from cutlass.cute.nvgpu import tcgen05

from dsv4lab.emulator import ptx
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
TYPES = {8: cutlass.Int8, 16: cutlass.Float16, 32: cutlass.Float32}
# CuTe's atom, the swizzle's bits, base and shift, major, bits of an element, and in which order atoms follow.
K_MAJOR = [
    (kind, function, "K", bits, (0, 1))
    for kind, function in [(KIND.K_INTER, (0, 4, 3)), (KIND.K_SW32, (1, 4, 3)), (KIND.K_SW64, (2, 4, 3)),
                           (KIND.K_SW128, (3, 4, 3))]
    for bits in (8, 16, 32)
]  # fmt: skip
MN_MAJOR = [
    (kind, function, "MN", bits, order)
    for kind, function, widths in [
        (KIND.MN_INTER, (0, 4, 3), (8, 16, 32)), (KIND.MN_SW32, (1, 4, 3), (8, 16)),
        (KIND.MN_SW64, (2, 4, 3), (8, 16)), (KIND.MN_SW128, (3, 4, 3), (8, 16)),
        (KIND.MN_SW128_32B, (2, 5, 2), (32,)),
    ]
    for bits in widths
    for order in ((0, 1), (1, 0))
]  # fmt: skip
MODES = K_MAJOR + MN_MAJOR
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


def tile_of(major, bits):
    """Rows and columns of a tile of several instructions' K (of 32 bytes), and of several atoms' rows."""
    depth = 32 * 8 // bits
    return (24, 4 * depth) if major == "K" else (2 * 1024 // bits, 2 * depth)


def cute_layout(kind, bits, major, order):
    """CuTe's layout of the tile, and of the part that one instruction takes, in elements without swizzle."""
    rows, columns = tile_of(major, bits)
    outer = cute.tile_to_shape(
        tcgen05.make_smem_layout_atom(kind, TYPES[bits]), (rows, max(columns, 8)), order
    ).outer
    return outer, cute.composition(outer, cute.make_layout((rows, 256 // bits), stride=(1, rows)))


def cute_table(kind, bits, major, order):
    """Offsets in elements (rows, columns) that CuTe gives a tile, without swizzle."""
    found, (rows, columns) = {}, tile_of(major, bits)

    @cute.jit
    def host():
        outer, _ = cute_layout(kind, bits, major, order)
        found.update(shape=outer.shape, stride=outer.stride, last=outer((rows - 1, columns - 1)))

    host()
    shape, stride = found["shape"], found["stride"]
    table = crd2idx(np.arange(rows), shape[0], stride[0])[:, None]
    table = table + crd2idx(np.arange(columns), shape[1], stride[1])
    assert table[-1, -1] == found["last"]
    return table


@cute.kernel
def _describe_kernel(out: cute.Tensor):
    shared = memory.SmemAllocator().allocate(1024, byte_alignment=1024)
    for i, (kind, function, major, bits, order) in enumerate(MODES):
        pointer = cute.recast_ptr(shared, cute.make_swizzle(*function), dtype=TYPES[bits])
        _, part = cute_layout(kind, bits, major, order)
        # The descriptor is of the first mode: rows and K of one instruction.
        part = cute.append(cute.group_modes(part, 0, 2), cute.make_layout(1))
        out[i] = tcgen05.smem_descriptor_to_int(tcgen05.make_umma_smem_desc(pointer, part, major.lower()))


@cute.jit
def describe(out: cute.Pointer):
    """Stores the descriptor that CuTe makes of each of MODES."""
    tensor = cute.make_tensor(out, cute.make_layout(len(MODES)))
    _describe_kernel(tensor).launch(grid=(1, 1, 1), block=(32, 1, 1))


@pytest.fixture(scope="module")
def descriptors(ptx_kernels):
    """CuTe's descriptor of each of MODES with start address 0, read off the compiled kernel."""
    text = ptx_kernels.launched("sm_100a", describe, ptx_kernels.pointer(cutlass.Int64)).module.ptx
    found, constants = {}, {}
    for ins in next(f for f in ptx.parse(text).functions if f.defined).instructions:
        if ins.opcode == "or.b64":  # with the start address, which a kernel does not know
            constants[ins.operands[0]] = ins.operands[2].value
        elif ins.opcode.startswith("st.global."):
            values = ins.operands[1] if isinstance(ins.operands[1], ptx.Vector) else [ins.operands[1]]
            found.update({ins.operands[0].offset // 8 + i: constants[v] for i, v in enumerate(values)})
    return [decode_tcgen05(found[i] & (1 << 64) - 1) for i in range(len(MODES))]


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


def test_atoms_of_32_bytes_are_four_lines_high():
    """In line 5 of an MN-major matrix, the second of its atom, pairs of chunks are swapped."""
    d = MatrixDescriptor(start=1024, leading=4096, stride=2048, swizzle="128B_atom32B")
    line = 1024 + 2048 + 128
    assert chunk_offsets(d, 8, 10, "MN")[5].tolist() == [
        *(line + 16 * c for c in (2, 3, 0, 1, 6, 7, 4, 5)),
        *(line + 4096 + 16 * c for c in (2, 3)),
    ]


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


# Every mode against CuTe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", range(len(MODES)), ids=lambda i: "{0.name}-{3}-{4}".format(*MODES[i]))
def test_every_mode_against_cute(mode, descriptors):
    """CuTe's descriptor finds what lies where CuTe's layout says, at each step of 32 bytes along K."""
    kind, function, major, bits, order = MODES[mode]
    table, depth = cute_table(kind, bits, major, order), 256 // bits
    for k in range(0, table.shape[1], depth):
        # Kernels go along K by advancing the start address, before the swizzle.
        descriptor = replace(descriptors[mode], start=BASE + int(table[0, k]) * bits // 8)
        expected = swizzled(BASE + table[:, k : k + depth] * bits // 8, *function)
        found = element_offsets(descriptor, len(table), depth, bits, major)
        np.testing.assert_array_equal(found, expected)


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
