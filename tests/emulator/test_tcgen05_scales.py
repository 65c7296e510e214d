"""Scale factors of tcgen05.mma: where they are read in tensor memory, and what they do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.isa.registry import UnsupportedInstruction
from dsv4lab.emulator.matrix_descriptor import DescriptorError
from dsv4lab.emulator.small_floats import decode_nibbles
from dsv4lab.emulator.tensor_core import dot
from dsv4lab.emulator.tensor_memory import TensorMemoryError

path = Path(__file__).with_name("tcgen05_text.py")
spec = importlib.util.spec_from_file_location("tcgen05_text", path)
text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text)


def nvfp4(seed=0, n=64):
    """Codes of NVFP4 operands with scales: packed A, B, their values, scale codes (rows, 4)."""
    rng = np.random.default_rng(seed)
    parts = []
    for rows in (128, n):
        packed = rng.integers(0, 256, (rows, 32)).astype(np.uint8)
        scales = rng.integers(0x20, 0x50, (rows, 4)).astype(np.uint8)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, 64)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        values *= np.repeat(scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=1)
        parts.append((packed, values, scales))
    return parts


def scale_cells(a, b):
    """Columns from 128 on with the scales of A in 4 and of B from 160 on, in every quarter of the lanes."""
    cells = np.zeros((128, text.SCALES_B - text.SCALES_A + len(b) // 32), np.uint32)
    for codes, column in ((a, 0), (b, text.SCALES_B - text.SCALES_A)):
        words = codes.view(np.uint32).reshape(-1, 32).T
        cells[:, column : column + words.shape[1]] = np.tile(words, (4, 1))
    return cells


SCALED = {"modifiers": ".block_scale.block16", "tail": "[%r43], [%r44], {p}"}


def scaled_case(**changes):
    (a, av, sa), (b, bv, sb) = nvfp4()
    cells = scale_cells(sa, sb)
    case = text.Multiplication(
        "mxf4nvf4", a, b, text.word(a=1, b=1, n=64, m=128, **changes), cells=cells, first=text.SCALES_A
    )
    return case, (av @ bv.T).astype(np.float32)


def test_scales_are_found_in_every_quarter(ptx_kernel):
    case, right = scaled_case()
    found, launched = case.run(ptx_kernel, **SCALED)
    np.testing.assert_array_equal(found.view(np.float32), right)
    assert launched.counters["mma.mxf4nvf4"] == 1
    found, _ = case.run(ptx_kernel, **SCALED | {"modifiers": ".block_scale.scale_vec::4X.collector::a::fill"})
    np.testing.assert_array_equal(found.view(np.float32), right)


def test_quarters_that_differ(ptx_kernel):
    case, _ = scaled_case()
    case.cells[70, 1] ^= 0x100
    with pytest.raises(TensorMemoryError, match=r"scale factors of A at column 128 .* lanes 0 and 64"):
        case.run(ptx_kernel, **SCALED)
    case, _ = scaled_case()
    case.cells[127, text.SCALES_B - text.SCALES_A + 1] ^= 1
    with pytest.raises(TensorMemoryError, match=r"scale factors of B at column 160 .* lanes 0 and 96"):
        case.run(ptx_kernel, **SCALED)


def test_a_scale_of_one_row_changes_that_row(ptx_kernel):
    case, right = scaled_case()
    # Row 70: lane 6 of each quarter, column 2; its second scale is byte 1.
    case.cells[6::32, 2] = case.cells[6::32, 2] & 0xFFFF00FF | 0x7E00
    found, _ = case.run(ptx_kernel, **SCALED)
    differs = (found.view(np.float32) != right).any(axis=1)
    assert differs.nonzero()[0].tolist() == [70]


@pytest.mark.parametrize("first", [0, 2])
def test_scale_ids_choose_bytes_of_a_cell(ptx_kernel, first):
    (a, _, sa), (b, _, sb) = nvfp4()
    # Powers of two, exponents near 127, two for each row.
    sa, sb = (np.clip(codes, 0x20, 0x28) + 90 for codes in (sa, sb))
    descriptor = text.word(a=1, b=1, n=64, m=128, scale=1, sfa=first, sfb=2 - first)
    case = text.Multiplication("mxf4", a, b, descriptor, cells=scale_cells(sa, sb), first=text.SCALES_A)
    found, _ = case.run(ptx_kernel, modifiers=".block_scale", tail="[%r43], [%r44], {p}")
    operands = []
    for packed, codes, byte in ((a, sa, first), (b, sb, 2 - first)):
        values = (
            np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), 64).view(ml_dtypes.float4_e2m1fn)
        )
        factors = np.exp2(codes[:, byte : byte + 2].astype(np.float64) - 127)
        operands.append(values.astype(np.float64) * np.repeat(factors, 32, axis=1))
    np.testing.assert_array_equal(found.view(np.float32), (operands[0] @ operands[1].T).astype(np.float32))


def test_the_scale_id_in_an_address_is_no_lane(ptx_kernel):
    case, right = scaled_case()
    source = case.source(ptx_kernel, **SCALED)
    ids = source.replace(
        f"add.u32 %r43, %r10, {text.SCALES_A};", f"add.u32 %r43, %r10, {0x80000000 + text.SCALES_A};"
    )
    y, _ = text.run(ids, case.words, 128 * 64, start=case.cells.reshape(-1))
    np.testing.assert_array_equal(y.view(np.float32).reshape(128, 64), right)
    lane = source.replace(
        f"add.u32 %r43, %r10, {text.SCALES_A};", f"add.u32 %r43, %r10, {(1 << 16) + text.SCALES_A};"
    )
    with pytest.raises(TensorMemoryError, match="must be at lane 0"):
        text.run(lane, case.words, 128 * 64, start=case.cells.reshape(-1))


def test_packed_a_in_tensor_memory(ptx_kernel):
    (a, av, sa), (b, bv, sb) = nvfp4()
    cells = np.zeros((128, text.MATRIX_A - text.SCALES_A + 8), np.uint32)
    cells[:, : text.SCALES_B - text.SCALES_A + 2] = scale_cells(sa, sb)
    cells[:, text.MATRIX_A - text.SCALES_A :] = a.view(np.uint32)
    case = text.Multiplication(
        "mxf4nvf4", None, b, text.word(a=1, b=1, n=64, m=128), cells=cells, first=text.SCALES_A
    )
    found, _ = case.run(ptx_kernel, a="[%r42]", **SCALED)
    np.testing.assert_array_equal(found.view(np.float32), (av @ bv.T).astype(np.float32))


def test_hardware_mode_with_scales(ptx_kernel):
    (a, _, sa), (b, _, sb) = nvfp4(seed=5, n=128)
    start = np.random.default_rng(6).standard_normal((128, 128)).astype(np.float32) * 1e4
    cells = np.concatenate([start.view(np.uint32), scale_cells(sa, sb)], axis=1)
    case = text.Multiplication("mxf4nvf4", a, b, text.word(a=1, b=1, n=128, m=128), cells=cells)
    found, _ = case.run(ptx_kernel, columns=128, accumulate=True, options={"mma": "hardware"}, **SCALED)
    values = [decode_nibbles(packed).reshape(-1, 64) for packed in (a, b)]
    scales = [codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) for codes in (sa, sb)]
    right = dot(
        *values, start, kind="mxf4nvf4", types=("e2m1", "e2m1"), mode="hardware",
        scales_a=scales[0], scales_b=scales[1], scale_type="ue4m3",
    )  # fmt: skip
    np.testing.assert_array_equal(found, right.view(np.uint32))
    exact, _ = case.run(ptx_kernel, columns=128, accumulate=True, **SCALED)
    assert (exact != found).any()


def lines(octets, chunk, seed):
    """Rows of 48 bytes in two buffers of 128-byte lines, swizzled: from a chunk of 16 bytes on, then over."""
    found = np.random.default_rng(seed).integers(0, 256, (2, len(octets), 8, 16)).astype(np.uint8)
    for i in range(3):
        found[(chunk + i) // 8, :, (chunk + i) % 8] = octets[:, 16 * i : 16 * i + 16]
    row, place = np.arange(len(octets))[:, None], np.arange(8)
    swizzled = np.empty_like(found)
    swizzled[:, row, place ^ row % 8] = found
    return swizzled.reshape(-1)


@pytest.mark.parametrize("block, first, chunk", [(16, 0, 5), (16, 2, 6), (32, 3, 7), (32, 0, 0)])
def test_k_of_96(ptx_kernel, block, first, chunk):
    rng = np.random.default_rng(7)
    count, parts, cells = 96 // block, [], np.zeros((128, text.SCALES_B - text.SCALES_A + 8), np.uint32)
    type_ = ml_dtypes.float8_e4m3fn if block == 16 else ml_dtypes.float8_e8m0fnu
    for rows, column in ((128, 0), (64, text.SCALES_B - text.SCALES_A)):
        packed = rng.integers(0, 256, (rows, 48)).astype(np.uint8)
        codes = rng.integers(0x20, 0x50, (rows, 8)).astype(np.uint8) + (0 if block == 16 else 90)
        # Cells of a row are 4 columns apart.
        words = codes.view(np.uint32).reshape(-1, 32, 2)
        for cell in range(2):
            at = column + 4 * cell
            cells[:, at : at + len(words)] = np.tile(words[:, :, cell].T, (4, 1))
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, 96)
        values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        scales = codes[:, first : first + count].view(type_).astype(np.float64)
        parts.append((packed, values * np.repeat(scales, block, axis=1)))
    (a, av), (b, bv) = parts
    descriptor = text.word(a=1, b=1, n=64, m=128, k=1, sfa=first, sfb=first, scale=int(block == 32))
    case = text.Multiplication("mxf4nvf4", a, b, descriptor, cells=cells, first=text.SCALES_A)
    source = case.source(ptx_kernel, **SCALED | {"modifiers": f".block_scale.block{block}"})
    for register, start, size in (("%rd7", 0, 128 * 128), ("%rd8", 2 * 128 * 128, 64 * 128)):
        old = source[source.index(f"mov.b64 {register}, ") :].split(";")[0]
        over = text.RESERVED + text.DATA + start + size
        place = text.matrix_descriptor(start + 16 * chunk, leading=over, stride=1024, swizzle=2) | 1 << 52
        source = source.replace(old, f"mov.b64 {register}, {place}")
    words = np.concatenate([lines(a, chunk, 1), lines(b, chunk, 2)]).view(np.uint32)
    old, new = (text.to_shared(n) for n in (case.words.shape[1], len(words)))
    source = source.replace(old, new)
    y, _ = text.run(source, words, 128 * 64, start=cells.reshape(-1), arch="sm_103a")
    np.testing.assert_array_equal(y.view(np.float32).reshape(128, 64), (av @ bv.T).astype(np.float32))


def test_two_ctas_scale_each_half_of_the_columns(ptx_kernel):
    # M = 128: lanes 0 to 63 hold the left half of N, and their scales of B; lanes 64 and up the right one.
    rng = np.random.default_rng(8)
    values, packed, codes = [], [], []
    for rows in (128, 128):
        octets = rng.integers(0, 256, (rows, 32)).astype(np.uint8)
        scales = rng.integers(0x20, 0x50, (rows, 4)).astype(np.uint8)
        packed.append(octets)
        codes.append(scales)
    # Both CTAs store the same cells, so both have the same scales of A.
    codes[0][64:] = codes[0][:64]
    for octets, scales in zip(packed, codes, strict=True):
        nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(-1, 64)
        factors = np.repeat(scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=1)
        values.append(nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * factors)
    cells = np.zeros((128, text.SCALES_B - text.SCALES_A + 2), np.uint32)
    cells[:, :2] = np.tile(codes[0][:64].view(np.uint32).reshape(2, 32).T, (4, 1))
    halves = codes[1].view(np.uint32).reshape(2, 2, 32)
    cells[:, text.SCALES_B - text.SCALES_A :] = np.concatenate(
        [halves[0].T, halves[0].T, halves[1].T, halves[1].T]
    )
    case = text.Multiplication(
        "mxf4nvf4", *packed, text.word(a=1, b=1, n=128, m=128), cells=cells, first=text.SCALES_A, group=2
    )
    found, _ = case.run(ptx_kernel, columns=64, **SCALED)
    right = (values[0] @ values[1].T).astype(np.float32)
    right = right.reshape(2, 64, 2, 64).transpose(0, 2, 1, 3).reshape(256, 64)
    np.testing.assert_array_equal(found.view(np.float32), right)


@pytest.mark.parametrize("ids, block", [({"sfa": 2}, 16), ({"sfb": 1}, 16), ({"sfa": 3}, 32)])
def test_scale_ids_that_are_refused(ptx_kernel, ids, block):
    case, _ = scaled_case(scale=1, **ids)
    with pytest.raises(DescriptorError, match=f"scale ids .* K = 64 and blocks of {block}"):
        case.run(ptx_kernel, **SCALED | {"modifiers": f".block_scale.block{block}"})


def test_blocks_of_32_have_powers_of_two(ptx_kernel):
    case, _ = scaled_case()
    with pytest.raises(DescriptorError, match="ue4m3 go with blocks of 16"):
        case.run(ptx_kernel, **SCALED | {"modifiers": ".block_scale.block32"})


def test_k_of_96_is_sm_103s(ptx_kernel):
    case, _ = scaled_case(k=1)
    with pytest.raises(UnsupportedInstruction, match="sm_100a has no MMA with K = 96"):
        case.run(ptx_kernel, **SCALED)
