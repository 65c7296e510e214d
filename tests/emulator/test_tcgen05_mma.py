"""tcgen05.mma in the forms that CuTe DSL does not write by itself, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.errors import UninitialisedError
from dsv4lab.emulator.isa.registry import UnsupportedInstruction
from dsv4lab.emulator.matrix_descriptor import DescriptorError
from dsv4lab.emulator.small_floats import decode_nibbles
from dsv4lab.emulator.tensor_core import dot
from dsv4lab.emulator.tensor_memory import TensorMemoryError

path = Path(__file__).with_name("tcgen05_text.py")
spec = importlib.util.spec_from_file_location("tcgen05_text", path)
text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text)

SCALES_A, SCALES_B, MATRIX_A = 128, 160, 192  # columns of tensor memory; D is at 0


def word(**fields):
    """An instruction descriptor from fields by name."""
    places = {
        "saturate": 3, "d": 4, "sfb": 4, "a": 7, "b": 10, "neg_a": 13, "neg_b": 14, "n": 17, "scale": 23,
        "m": 24, "sfa": 29, "k": 31,
    }  # fmt: skip
    return sum((v >> {"n": 3, "m": 4}.get(name, 0)) << places[name] for name, v in fields.items())


def chunked(octets):
    """Rows of bytes (rows, n) as shared memory holds them without swizzle: (n / 16, rows, 16)."""
    return np.ascontiguousarray(octets).view(np.uint8).reshape(len(octets), -1, 16).transpose(1, 0, 2)


def stored(cells, column, register=20):
    """Store cells (128, n), which lie in y, to columns of tensor memory."""
    count = cells.shape[1]
    lines = [
        f" mad.lo.u32 %r6, %r1, {4 * count}, {0};",
        " cvt.u64.u32 %rd5, %r6;",
        " add.u64 %rd5, %rd5, %rd2;",
    ]
    for i in range(count):
        lines.append(f" ld.global.b32 %r{register}, [%rd5+{4 * i}];")
        lines.append(f" tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11+{column + i}], {{%r{register}}};")
    return "\n".join(lines)


class Multiplication:
    """One MMA on A and B in shared memory, each (rows, bytes of K), or A in tensor memory.

    Args:
        kind: with the modifiers that follow it.
        a: bytes (M, ...) in shared memory, or None.
        b: bytes (N, ...).
        cells: uint32 (128, n) that are stored to tensor memory first, from column `first` on.
        first: that column.
    """

    def __init__(self, kind, a, b, descriptor, *, cells=None, first=0, group=1):
        self.kind, self.descriptor, self.group = kind, descriptor, group
        self.cells, self.first = cells, first
        self.parts = [chunked(b)] if a is None else [chunked(a), chunked(b)]

    def text(self, kernel, tail="", accumulate=False, d=0, a="%rd7", columns=64, modifiers=""):
        """The kernel; the MMA's mask, scales or shift stand in `tail` with {p} for the predicate."""
        offset = 0 if len(self.parts) == 1 else self.parts[0].size // self.group
        places = [
            text.matrix_descriptor(start, leading=part.shape[1] // self.group * 16, stride=128)
            for part, start in zip((self.parts[0], self.parts[-1]), (0, offset), strict=True)
        ]
        tail = (tail or "{p}").format(p="%p6")
        opcode = f"tcgen05.mma.cta_group::{self.group}.kind::{self.kind}{modifiers}"
        mma = f"""
 mov.b64 %rd7, {places[0]};
 mov.b64 %rd8, {places[1]};
 mov.b32 %r40, {self.descriptor:#x};
 setp.{"eq" if accumulate else "ne"}.u32 %p6, 0, 0;
 add.u32 %r41, %r10, {d};
 add.u32 %r42, %r10, {MATRIX_A | d & 0xFFFF0000};
 add.u32 %r43, %r10, {SCALES_A};
 add.u32 %r44, %r10, {SCALES_B};
 {opcode} [%r41], {a}, %rd8, %r40, {tail};
"""
        before = ""
        if self.cells is not None:
            before = stored(self.cells, self.first) + "\n tcgen05.wait::st.sync.aligned;\n bar.sync 0;\n"
        if self.group == 2:
            before += text.CLUSTER + "\n mov.b16 %rs1, 3;\n"
        mask = ", %rs1" if self.group == 2 else ""
        body = before + text.committed(mma, self.group, mask) + text.load(columns)
        return text.program(body, kernel, words=self.words.shape[1], group=self.group)

    @property
    def words(self):
        """Words of shared memory of each CTA: its rows of A and of B, one after the other."""
        halves = []
        for rank in range(self.group):
            pieces = [np.split(part, self.group, axis=1)[rank].reshape(-1) for part in self.parts]
            halves.append(np.concatenate(pieces).view(np.uint32))
        size = -(-len(halves[0]) // 128) * 128
        return np.stack([np.pad(half, (0, size - len(half))) for half in halves])

    def run(self, kernel, columns=64, options=None, **form):
        """Columns of D from 0 on, uint32 (CTAs * 128, columns), and the run."""
        source = self.text(kernel, columns=columns, **form)
        # What is stored to tensor memory first is read from y, which the result then replaces.
        count = self.group * 128 * max(columns, 0 if self.cells is None else self.cells.shape[1])
        start = None if self.cells is None else self.cells.reshape(-1)
        y, launched = text.run(source, self.words, count, ctas=self.group, start=start, **(options or {}))
        return y[: self.group * 128 * columns].reshape(-1, columns), launched


def small(rng, shape, dtype=np.float16):
    """Multiples of 1/4 up to 4: sums of their products are exact."""
    return (rng.integers(-16, 17, shape) / 4).astype(dtype)


def half_case(m=128, n=64, seed=0, **fields):
    rng = np.random.default_rng(seed)
    a, b = small(rng, (m, 16)), small(rng, (n, 16))
    fields = dict(d=1, m=m, n=n) | fields
    return a, b, Multiplication("f16", a, b, word(**fields))


def product(a, b):
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


def test_a_worked_product(ptx_kernel):
    a, b = np.zeros((128, 16), np.float16), np.zeros((64, 16), np.float16)
    a[70, 3], a[70, 15], b[9, 3], b[9, 15], b[63, 15] = 2, 0.5, 3, 8, -1
    found, launched = Multiplication("f16", a, b, word(d=1, m=128, n=64)).run(ptx_kernel)
    expected = np.zeros((128, 64), np.float32)
    expected[70, 9], expected[70, 63] = 2 * 3 + 0.5 * 8, -0.5
    np.testing.assert_array_equal(found.view(np.float32), expected)
    assert launched.counters["mma.f16"] == 1
    assert launched.counters["mma.flops"] == 2 * 128 * 64 * 16
    (event,) = launched.trace.of("mma")
    assert (event.cta, event.warp, event.detail["m"], event.detail["k"]) == (0, 0, 128, 16)
    assert event.end - event.start == 128 * 64 * 16 // 4096


@pytest.mark.parametrize("accumulate", [False, True])
def test_d_is_added_only_when_asked(ptx_kernel, accumulate):
    a, b, case = half_case()
    case.cells = np.full((128, 64), 2.5, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, accumulate=accumulate)
    np.testing.assert_array_equal(found.view(np.float32), product(a, b) + (2.5 if accumulate else 0))


def test_an_accumulator_nobody_wrote(ptx_kernel):
    _, _, case = half_case()
    with pytest.raises(UninitialisedError, match=r"tensor memory .*tcgen05\.mma"):
        case.run(ptx_kernel, accumulate=True)


@pytest.mark.parametrize("shift", [0, 1, 15])
def test_d_is_scaled(ptx_kernel, shift):
    a, b, case = half_case()
    case.cells = np.full((128, 64), 2.0**16, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, accumulate=True, tail=f"{{p}}, {shift}")
    np.testing.assert_array_equal(found.view(np.float32), product(a, b) + 2.0 ** (16 - shift))


def test_operands_are_negated(ptx_kernel):
    for fields in ({"neg_a": 1}, {"neg_b": 1}):
        a, b, case = half_case(**fields)
        np.testing.assert_array_equal(case.run(ptx_kernel)[0].view(np.float32), -product(a, b))


def test_lanes_that_are_left_alone(ptx_kernel):
    a, b, case = half_case()
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, tail="{{1, 0, 0xFFFF0000, 0x80000000}}, {p}")
    expected = product(a, b)
    expected[[0, *range(80, 96), 127]] = 7
    np.testing.assert_array_equal(found.view(np.float32), expected)


def test_lanes_that_are_left_alone_of_m_64(ptx_kernel):
    a, b, case = half_case(m=64)
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    # Rows 16 and up begin at lane 32; lane 20 holds none.
    found, _ = case.run(ptx_kernel, tail="{{0x100001, 4, 0, 0}}, {p}")
    expected = product(a, b)
    expected[[0, 18]] = 7
    np.testing.assert_array_equal(found.view(np.float32).reshape(4, 32, 64)[:, :16].reshape(64, 64), expected)


@pytest.mark.parametrize("lane", [0, 16])
def test_m_64_fills_half_of_each_quarter(ptx_kernel, lane):
    a, b, case = half_case(m=64)
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, d=lane << 16)
    expected = np.full((4, 2, 16, 64), 7, np.float32)
    expected[:, lane // 16] = product(a, b).reshape(4, 16, 64)
    np.testing.assert_array_equal(found.view(np.float32), expected.reshape(128, 64))


@pytest.mark.parametrize("lane, m", [(16, 128), (8, 64), (32, 64)])
def test_an_accumulator_at_another_lane(ptx_kernel, lane, m):
    _, _, case = half_case(m=m)
    with pytest.raises(TensorMemoryError, match=f"D of an MMA with M = {m} at lane {lane}"):
        case.run(ptx_kernel, d=lane << 16)


IN_TENSOR = {
    "f16": (word(d=1, n=64, m=128), np.float16, 16),
    "tf32": (word(d=1, a=2, b=2, n=64, m=128), np.float32, 8),
    "i8": (word(d=2, a=1, b=1, n=64, m=128), np.int8, 32),
    "f8f6f4": (word(d=1, a=0, b=1, n=64, m=128), ml_dtypes.float8_e4m3fn, 32),
}


@pytest.mark.parametrize("kind", IN_TENSOR)
def test_a_in_tensor_memory(ptx_kernel, kind):
    descriptor, dtype, k = IN_TENSOR[kind]
    rng = np.random.default_rng(1)
    other = ml_dtypes.float8_e5m2 if kind == "f8f6f4" else dtype
    if kind == "i8":
        a, b = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (128, 64))
    else:
        a, b = small(rng, (128, k), dtype), small(rng, (64, k), other)
    cells = np.ascontiguousarray(a).view(np.uint32)
    found, _ = Multiplication(kind, None, b, descriptor, cells=cells, first=MATRIX_A).run(
        ptx_kernel, a="[%r42]"
    )
    right = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_array_equal(found.view(np.int32 if kind == "i8" else np.float32), right)


@pytest.mark.parametrize("lane", [0, 16])
def test_a_of_m_64_in_tensor_memory_lies_at_the_lanes_of_d(ptx_kernel, lane):
    rng = np.random.default_rng(1)
    a, b = small(rng, (64, 16)), small(rng, (64, 16))
    cells = np.full((128, MATRIX_A + 8), 7.0, np.float32).view(np.uint32)
    cells.reshape(4, 2, 16, -1)[:, lane // 16, :, MATRIX_A:] = a.view(np.uint32).reshape(4, 16, 8)
    case = Multiplication("f16", None, b, word(d=1, n=64, m=64), cells=cells)
    found, _ = case.run(ptx_kernel, a="[%r42]", d=lane << 16)
    expected = np.full((4, 2, 16, 64), 7, np.float32)
    expected[:, lane // 16] = product(a, b).reshape(4, 16, 64)
    np.testing.assert_array_equal(found.view(np.float32), expected.reshape(128, 64))
    source = case.text(ptx_kernel, a="[%r42]", d=lane << 16)
    moved = f"add.u32 %r42, %r10, {MATRIX_A | 16 - lane << 16};"
    source = source.replace(f"add.u32 %r42, %r10, {MATRIX_A | lane << 16};", moved)
    with pytest.raises(
        TensorMemoryError, match=rf"A of an MMA with M = 64 at lane {16 - lane} .* at the same"
    ):
        text.run(source, case.words, 128 * 200, start=cells.reshape(-1))


def test_small_floats_in_bytes_of_tensor_memory(ptx_kernel):
    rng = np.random.default_rng(2)
    b = small(rng, (64, 32), ml_dtypes.float8_e4m3fn)
    for type_, code, dtype, shift in (
        ("e2m1", 5, ml_dtypes.float4_e2m1fn, 2),
        ("e3m2", 4, ml_dtypes.float6_e3m2fn, 0),
        ("e2m3", 3, ml_dtypes.float6_e2m3fn, 0),
    ):
        codes = rng.integers(0, 16 if shift else 64, (128, 32)).astype(np.uint8)
        cells = (codes << shift).view(np.uint32)
        case = Multiplication("f8f6f4", None, b, word(d=1, a=code, n=64, m=128), cells=cells, first=MATRIX_A)
        found, _ = case.run(ptx_kernel, a="[%r42]")
        right = product(codes.view(dtype), b)
        np.testing.assert_array_equal(found.view(np.float32), right, err_msg=type_)


def padded(codes, bits):
    """Codes (rows, 32) as shared memory holds them for f8f6f4: 16 of them at the start of each 16 bytes."""
    places = np.arange(bits, dtype=np.uint8)
    as_bits = (codes[..., None] >> places & 1).reshape(len(codes), 2, 16 * bits)
    octets = np.packbits(as_bits.astype(np.uint8), axis=-1, bitorder="little")
    return np.pad(octets, ((0, 0), (0, 0), (0, 16 - 2 * bits)), constant_values=0xAA).reshape(len(codes), 32)


def test_small_floats_in_shared_memory(ptx_kernel):
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 16, (128, 32)).astype(np.uint8), rng.integers(0, 64, (64, 32)).astype(np.uint8)
    case = Multiplication("f8f6f4", padded(a, 4), padded(b, 6), word(d=1, a=5, b=4, n=64, m=128))
    found, _ = case.run(ptx_kernel)
    right = product(a.view(ml_dtypes.float4_e2m1fn), b.view(ml_dtypes.float6_e3m2fn))
    np.testing.assert_array_equal(found.view(np.float32), right)


def test_integers_saturate_or_wrap(ptx_kernel):
    a, b = np.full((128, 32), -128, np.int8), np.full((64, 32), 127, np.int8)
    start = np.full((128, 64), -(2**31) + 5, np.int32).view(np.uint32)
    total = -(2**31) + 5 - 32 * 128 * 127
    for saturate, expected in ((0, total + 2**32), (1, -(2**31))):
        case = Multiplication("i8", a, b, word(d=2, a=1, b=1, n=64, m=128, saturate=saturate), cells=start)
        assert (case.run(ptx_kernel, accumulate=True)[0].view(np.int32) == expected).all()


# Scales -----------------------------------------------------------------------------------------------------


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
    cells = np.zeros((128, SCALES_B - SCALES_A + len(b) // 32), np.uint32)
    for codes, column in ((a, 0), (b, SCALES_B - SCALES_A)):
        words = codes.view(np.uint32).reshape(-1, 32).T
        cells[:, column : column + words.shape[1]] = np.tile(words, (4, 1))
    return cells


SCALED = {"modifiers": ".block_scale.block16", "tail": "[%r43], [%r44], {p}"}


def scaled_case(**changes):
    (a, av, sa), (b, bv, sb) = nvfp4()
    cells = scale_cells(sa, sb)
    case = Multiplication(
        "mxf4nvf4", a, b, word(a=1, b=1, n=64, m=128, **changes), cells=cells, first=SCALES_A
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
    case.cells[127, SCALES_B - SCALES_A + 1] ^= 1
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
    descriptor = word(a=1, b=1, n=64, m=128, scale=1, sfa=first, sfb=2 - first)
    case = Multiplication("mxf4", a, b, descriptor, cells=scale_cells(sa, sb), first=SCALES_A)
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
    source = case.text(ptx_kernel, **SCALED)
    ids = source.replace(f"add.u32 %r43, %r10, {SCALES_A};", f"add.u32 %r43, %r10, {0x80000000 + SCALES_A};")
    y, _ = text.run(ids, case.words, 128 * 64, start=case.cells.reshape(-1))
    np.testing.assert_array_equal(y.view(np.float32).reshape(128, 64), right)
    lane = source.replace(f"add.u32 %r43, %r10, {SCALES_A};", f"add.u32 %r43, %r10, {(1 << 16) + SCALES_A};")
    with pytest.raises(TensorMemoryError, match="must be at lane 0"):
        text.run(lane, case.words, 128 * 64, start=case.cells.reshape(-1))


def test_packed_a_in_tensor_memory(ptx_kernel):
    (a, av, sa), (b, bv, sb) = nvfp4()
    cells = np.zeros((128, MATRIX_A - SCALES_A + 8), np.uint32)
    cells[:, : SCALES_B - SCALES_A + 2] = scale_cells(sa, sb)
    cells[:, MATRIX_A - SCALES_A :] = a.view(np.uint32)
    case = Multiplication("mxf4nvf4", None, b, word(a=1, b=1, n=64, m=128), cells=cells, first=SCALES_A)
    found, _ = case.run(ptx_kernel, a="[%r42]", **SCALED)
    np.testing.assert_array_equal(found.view(np.float32), (av @ bv.T).astype(np.float32))


def test_hardware_mode_is_the_bit_model(ptx_kernel):
    a, b = np.zeros((128, 16), np.float16), np.zeros((64, 16), np.float16)
    a[0, :3], b[0, :3] = (256, 1, 256), (256, 2.0**-12, -256)
    case = Multiplication("f16", a, b, word(d=1, m=128, n=64))
    exact, _ = case.run(ptx_kernel)
    bits, _ = case.run(ptx_kernel, options={"mma": "hardware"})
    # 2**16 + 2**-12 - 2**16: the small term is cut at 25 fractional bits of the large ones.
    assert exact.view(np.float32)[0, 0] == 2.0**-12
    assert bits.view(np.float32)[0, 0] == 0


def test_hardware_mode_with_scales(ptx_kernel):
    (a, _, sa), (b, _, sb) = nvfp4(seed=5, n=128)
    start = np.random.default_rng(6).standard_normal((128, 128)).astype(np.float32) * 1e4
    cells = np.concatenate([start.view(np.uint32), scale_cells(sa, sb)], axis=1)
    case = Multiplication("mxf4nvf4", a, b, word(a=1, b=1, n=128, m=128), cells=cells)
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
    count, parts, cells = 96 // block, [], np.zeros((128, SCALES_B - SCALES_A + 8), np.uint32)
    type_ = ml_dtypes.float8_e4m3fn if block == 16 else ml_dtypes.float8_e8m0fnu
    for rows, column in ((128, 0), (64, SCALES_B - SCALES_A)):
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
    descriptor = word(a=1, b=1, n=64, m=128, k=1, sfa=first, sfb=first, scale=int(block == 32))
    case = Multiplication("mxf4nvf4", a, b, descriptor, cells=cells, first=SCALES_A)
    source = case.text(ptx_kernel, **SCALED | {"modifiers": f".block_scale.block{block}"})
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


# Two CTAs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [128, 256])
def test_two_ctas_share_a_product(ptx_kernel, m):
    rng = np.random.default_rng(4)
    a, b = small(rng, (m, 16)), small(rng, (64, 16))
    case = Multiplication("f16", a, b, word(d=1, m=m, n=64), group=2)
    found, launched = case.run(ptx_kernel, columns=64 if m == 256 else 32)
    right = product(a, b)
    if m == 128:
        # Lanes 64 and up of each CTA hold the right half of the columns.
        right = right.reshape(2, 64, 2, 32).transpose(0, 2, 1, 3).reshape(256, 32)
    np.testing.assert_array_equal(found.view(np.float32), right)
    assert launched.counters["mma.flops"] == 2 * m * 64 * 16


def test_two_ctas_leave_lanes_alone(ptx_kernel):
    rng = np.random.default_rng(4)
    a, b = small(rng, (256, 16)), small(rng, (64, 16))
    case = Multiplication("f16", a, b, word(d=1, m=256, n=64), group=2)
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, tail="{{2, 0, 0, 0, 0, 0, 0, 0x80000000}}, {p}")
    right = product(a, b)
    right[[1, 255]] = 7
    np.testing.assert_array_equal(found.view(np.float32), right)


# Refused ----------------------------------------------------------------------------------------------------


def test_forms_that_are_not_emulated(ptx_kernel):
    _, _, case = half_case()
    source = case.text(ptx_kernel)
    for old, new, match in (
        ("mma.cta_group::1.kind", "mma.ws.cta_group::1.kind", "not emulated"),
        ("mma.cta_group::1.kind", "mma.sp.cta_group::1.kind", "not emulated"),
        ("kind::f16", "kind::f16.ashift", "not emulated"),
        ("kind::f16", "kind::f16.block_scale", "scales do not go"),
        ("kind::f16", "kind::f64", "not emulated"),
        (", %p6;", ", {%r1, %r1}, %p6;", "must have 4 words"),
        (", %p6;", ", %p6, 16;", "scales D by 16"),
    ):
        with pytest.raises(UnsupportedInstruction, match=match):
            text.run(source.replace(old, new), case.words, 8192)
    case, _ = scaled_case(k=1)
    with pytest.raises(UnsupportedInstruction, match="sm_100a has no MMA with K = 96"):
        case.run(ptx_kernel, **SCALED)


def test_descriptors_that_are_refused(ptx_kernel):
    _, _, case = half_case(m=32)
    with pytest.raises(DescriptorError, match=r"warp 0, lane 0.*M = 32.*PTX line"):
        case.run(ptx_kernel)
    _, _, case = half_case()
    source = case.text(ptx_kernel)
    first = text.matrix_descriptor(0, leading=2048, stride=128)
    with pytest.raises(DescriptorError, match="bits 46 to 48"):
        text.run(source.replace(f"%rd7, {first};", f"%rd7, {first ^ 1 << 46};"), case.words, 8192)


@pytest.mark.parametrize("ids, block", [({"sfa": 2}, 16), ({"sfb": 1}, 16), ({"sfa": 3}, 32)])
def test_scale_ids_that_are_refused(ptx_kernel, ids, block):
    case, _ = scaled_case(scale=1, **ids)
    with pytest.raises(DescriptorError, match=f"scale ids .* K = 64 and blocks of {block}"):
        case.run(ptx_kernel, **SCALED | {"modifiers": f".block_scale.block{block}"})


def test_blocks_of_32_have_powers_of_two(ptx_kernel):
    case, _ = scaled_case()
    with pytest.raises(DescriptorError, match="ue4m3 go with blocks of 16"):
        case.run(ptx_kernel, **SCALED | {"modifiers": ".block_scale.block32"})


def test_operands_nobody_wrote(ptx_kernel):
    _, _, case = half_case()
    source = case.text(ptx_kernel).replace(f" st.shared.b32 [%r7+{text.DATA + 512 * 8}], %r8;", "")
    with pytest.raises(UninitialisedError, match=r"shared memory .*tcgen05\.mma"):
        text.run(source, case.words, 8192)
