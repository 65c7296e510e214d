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
from dsv4lab.emulator.tensor_memory import TensorMemoryError

path = Path(__file__).with_name("tcgen05_text.py")
spec = importlib.util.spec_from_file_location("tcgen05_text", path)
text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text)


def half_case(m=128, n=64, seed=0, **fields):
    rng = np.random.default_rng(seed)
    a, b = text.small(rng, (m, 16)), text.small(rng, (n, 16))
    fields = dict(d=1, m=m, n=n) | fields
    return a, b, text.Multiplication("f16", a, b, text.word(**fields))


def test_a_worked_product(ptx_kernel):
    a, b = np.zeros((128, 16), np.float16), np.zeros((64, 16), np.float16)
    a[70, 3], a[70, 15], b[9, 3], b[9, 15], b[63, 15] = 2, 0.5, 3, 8, -1
    found, launched = text.Multiplication("f16", a, b, text.word(d=1, m=128, n=64)).run(ptx_kernel)
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
    np.testing.assert_array_equal(found.view(np.float32), text.product(a, b) + (2.5 if accumulate else 0))


@pytest.mark.parametrize("tail", ["0", "1", "1, 3"])
def test_a_constant_for_the_predicate(ptx_kernel, tail):
    a, b, case = half_case()
    case.cells = np.full((128, 64), 2.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, tail=tail)
    before = {"0": 0, "1": 2, "1, 3": 0.25}[tail]
    np.testing.assert_array_equal(found.view(np.float32), text.product(a, b) + before)


def test_an_accumulator_nobody_wrote(ptx_kernel):
    _, _, case = half_case()
    with pytest.raises(UninitialisedError, match=r"tensor memory .*tcgen05\.mma"):
        case.run(ptx_kernel, accumulate=True)


@pytest.mark.parametrize("shift", [0, 1, 15])
def test_d_is_scaled(ptx_kernel, shift):
    a, b, case = half_case()
    case.cells = np.full((128, 64), 2.0**16, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, accumulate=True, tail=f"{{p}}, {shift}")
    np.testing.assert_array_equal(found.view(np.float32), text.product(a, b) + 2.0 ** (16 - shift))


def test_operands_are_negated(ptx_kernel):
    for fields in ({"neg_a": 1}, {"neg_b": 1}):
        a, b, case = half_case(**fields)
        np.testing.assert_array_equal(case.run(ptx_kernel)[0].view(np.float32), -text.product(a, b))


def test_lanes_that_are_left_alone(ptx_kernel):
    a, b, case = half_case()
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, tail="{{1, 0, 0xFFFF0000, 0x80000000}}, {p}")
    expected = text.product(a, b)
    expected[[0, *range(80, 96), 127]] = 7
    np.testing.assert_array_equal(found.view(np.float32), expected)


def test_lanes_that_are_left_alone_of_m_64(ptx_kernel):
    a, b, case = half_case(m=64)
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    # Rows 16 and up begin at lane 32; lane 20 holds none.
    found, _ = case.run(ptx_kernel, tail="{{0x100001, 4, 0, 0}}, {p}")
    expected = text.product(a, b)
    expected[[0, 18]] = 7
    np.testing.assert_array_equal(found.view(np.float32).reshape(4, 32, 64)[:, :16].reshape(64, 64), expected)


@pytest.mark.parametrize("lane", [0, 16])
def test_m_64_fills_half_of_each_quarter(ptx_kernel, lane):
    a, b, case = half_case(m=64)
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, d=lane << 16)
    expected = np.full((4, 2, 16, 64), 7, np.float32)
    expected[:, lane // 16] = text.product(a, b).reshape(4, 16, 64)
    np.testing.assert_array_equal(found.view(np.float32), expected.reshape(128, 64))


@pytest.mark.parametrize("lane, m", [(16, 128), (8, 64), (32, 64)])
def test_an_accumulator_at_another_lane(ptx_kernel, lane, m):
    _, _, case = half_case(m=m)
    with pytest.raises(TensorMemoryError, match=f"D of an MMA with M = {m} at lane {lane}"):
        case.run(ptx_kernel, d=lane << 16)


IN_TENSOR = {
    "f16": (text.word(d=1, n=64, m=128), np.float16, 16),
    "tf32": (text.word(d=1, a=2, b=2, n=64, m=128), np.float32, 8),
    "i8": (text.word(d=2, a=1, b=1, n=64, m=128), np.int8, 32),
    "f8f6f4": (text.word(d=1, a=0, b=1, n=64, m=128), ml_dtypes.float8_e4m3fn, 32),
}


@pytest.mark.parametrize("kind", IN_TENSOR)
def test_a_in_tensor_memory(ptx_kernel, kind):
    descriptor, dtype, k = IN_TENSOR[kind]
    rng = np.random.default_rng(1)
    other = ml_dtypes.float8_e5m2 if kind == "f8f6f4" else dtype
    if kind == "i8":
        a, b = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (128, 64))
    else:
        a, b = text.small(rng, (128, k), dtype), text.small(rng, (64, k), other)
    cells = np.ascontiguousarray(a).view(np.uint32)
    found, _ = text.Multiplication(kind, None, b, descriptor, cells=cells, first=text.MATRIX_A).run(
        ptx_kernel, a="[%r42]"
    )
    right = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_array_equal(found.view(np.int32 if kind == "i8" else np.float32), right)


@pytest.mark.parametrize("lane", [0, 16])
def test_a_of_m_64_in_tensor_memory_lies_at_the_lanes_of_d(ptx_kernel, lane):
    rng = np.random.default_rng(1)
    a, b = text.small(rng, (64, 16)), text.small(rng, (64, 16))
    cells = np.full((128, text.MATRIX_A + 8), 7.0, np.float32).view(np.uint32)
    cells.reshape(4, 2, 16, -1)[:, lane // 16, :, text.MATRIX_A :] = a.view(np.uint32).reshape(4, 16, 8)
    case = text.Multiplication("f16", None, b, text.word(d=1, n=64, m=64), cells=cells)
    found, _ = case.run(ptx_kernel, a="[%r42]", d=lane << 16)
    expected = np.full((4, 2, 16, 64), 7, np.float32)
    expected[:, lane // 16] = text.product(a, b).reshape(4, 16, 64)
    np.testing.assert_array_equal(found.view(np.float32), expected.reshape(128, 64))
    source = case.source(ptx_kernel, a="[%r42]", d=lane << 16)
    moved = f"add.u32 %r42, %r10, {text.MATRIX_A | 16 - lane << 16};"
    source = source.replace(f"add.u32 %r42, %r10, {text.MATRIX_A | lane << 16};", moved)
    with pytest.raises(
        TensorMemoryError, match=rf"A of an MMA with M = 64 at lane {16 - lane} .* at the same"
    ):
        text.run(source, case.words, 128 * 200, start=cells.reshape(-1))


def test_small_floats_in_bytes_of_tensor_memory(ptx_kernel):
    rng = np.random.default_rng(2)
    b = text.small(rng, (64, 32), ml_dtypes.float8_e4m3fn)
    for type_, code, dtype, shift in (
        ("e2m1", 5, ml_dtypes.float4_e2m1fn, 2),
        ("e3m2", 4, ml_dtypes.float6_e3m2fn, 0),
        ("e2m3", 3, ml_dtypes.float6_e2m3fn, 0),
    ):
        codes = rng.integers(0, 16 if shift else 64, (128, 32)).astype(np.uint8)
        cells = (codes << shift).view(np.uint32)
        case = text.Multiplication(
            "f8f6f4", None, b, text.word(d=1, a=code, n=64, m=128), cells=cells, first=text.MATRIX_A
        )
        found, _ = case.run(ptx_kernel, a="[%r42]")
        right = text.product(codes.view(dtype), b)
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
    case = text.Multiplication("f8f6f4", padded(a, 4), padded(b, 6), text.word(d=1, a=5, b=4, n=64, m=128))
    found, _ = case.run(ptx_kernel)
    right = text.product(a.view(ml_dtypes.float4_e2m1fn), b.view(ml_dtypes.float6_e3m2fn))
    np.testing.assert_array_equal(found.view(np.float32), right)


def test_integers_saturate_or_wrap(ptx_kernel):
    a, b = np.full((128, 32), -128, np.int8), np.full((64, 32), 127, np.int8)
    start = np.full((128, 64), -(2**31) + 5, np.int32).view(np.uint32)
    total = -(2**31) + 5 - 32 * 128 * 127
    for saturate, expected in ((0, total + 2**32), (1, -(2**31))):
        case = text.Multiplication(
            "i8", a, b, text.word(d=2, a=1, b=1, n=64, m=128, saturate=saturate), cells=start
        )
        assert (case.run(ptx_kernel, accumulate=True)[0].view(np.int32) == expected).all()


def test_hardware_mode_is_the_bit_model(ptx_kernel):
    a, b = np.zeros((128, 16), np.float16), np.zeros((64, 16), np.float16)
    a[0, :3], b[0, :3] = (256, 1, 256), (256, 2.0**-12, -256)
    case = text.Multiplication("f16", a, b, text.word(d=1, m=128, n=64))
    exact, _ = case.run(ptx_kernel)
    bits, _ = case.run(ptx_kernel, options={"mma": "hardware"})
    # 2**16 + 2**-12 - 2**16: the small term is cut at 25 fractional bits of the large ones.
    assert exact.view(np.float32)[0, 0] == 2.0**-12
    assert bits.view(np.float32)[0, 0] == 0


# Two CTAs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [128, 256])
def test_two_ctas_share_a_product(ptx_kernel, m):
    rng = np.random.default_rng(4)
    a, b = text.small(rng, (m, 16)), text.small(rng, (64, 16))
    case = text.Multiplication("f16", a, b, text.word(d=1, m=m, n=64), group=2)
    found, launched = case.run(ptx_kernel, columns=64 if m == 256 else 32)
    right = text.product(a, b)
    if m == 128:
        # Lanes 64 and up of each CTA hold the right half of the columns.
        right = right.reshape(2, 64, 2, 32).transpose(0, 2, 1, 3).reshape(256, 32)
    np.testing.assert_array_equal(found.view(np.float32), right)
    assert launched.counters["mma.flops"] == 2 * m * 64 * 16


def test_two_ctas_leave_lanes_alone(ptx_kernel):
    rng = np.random.default_rng(4)
    a, b = text.small(rng, (256, 16)), text.small(rng, (64, 16))
    case = text.Multiplication("f16", a, b, text.word(d=1, m=256, n=64), group=2)
    case.cells = np.full((128, 64), 7.0, np.float32).view(np.uint32)
    found, _ = case.run(ptx_kernel, tail="{{2, 0, 0, 0, 0, 0, 0, 0x80000000}}, {p}")
    right = text.product(a, b)
    right[[1, 255]] = 7
    np.testing.assert_array_equal(found.view(np.float32), right)


# Refused ----------------------------------------------------------------------------------------------------


def test_forms_that_are_not_emulated(ptx_kernel):
    _, _, case = half_case()
    source = case.source(ptx_kernel)
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


def test_descriptors_that_are_refused(ptx_kernel):
    _, _, case = half_case(m=32)
    with pytest.raises(DescriptorError, match=r"warp 0, lane 0.*M = 32.*PTX line"):
        case.run(ptx_kernel)
    _, _, case = half_case()
    source = case.source(ptx_kernel)
    first = text.matrix_descriptor(0, leading=2048, stride=128)
    with pytest.raises(DescriptorError, match="bits 46 to 48"):
        text.run(source.replace(f"%rd7, {first};", f"%rd7, {first ^ 1 << 46};"), case.words, 8192)


def test_operands_nobody_wrote(ptx_kernel):
    _, _, case = half_case()
    source = case.source(ptx_kernel).replace(f" st.shared.b32 [%r7+{text.DATA + 512 * 8}], %r8;", "")
    with pytest.raises(UninitialisedError, match=r"shared memory .*tcgen05\.mma"):
        text.run(source, case.words, 8192)
