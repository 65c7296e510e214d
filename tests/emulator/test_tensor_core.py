"""Tensor-core arithmetic: worked values, and random ones against a slow model of Python integers."""

from __future__ import annotations

from fractions import Fraction
from math import inf, nan

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.tensor_core import dot, dot_integer

# The oracle's own table: exponent bits, mantissa bits, bias.
FIELDS = {
    "f16": (5, 10, 15), "bf16": (8, 7, 127), "tf32": (8, 10, 127), "f32": (8, 23, 127), "e4m3": (4, 3, 7),
    "e5m2": (5, 2, 15), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3), "e2m1": (2, 1, 1), "ue4m3": (4, 3, 7),
}  # fmt: skip
DTYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn, "ue4m3": ml_dtypes.float8_e4m3fn, "ue8m0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
# Kind, types, fractional bits, K summed at once, mantissa bits of the result, K of the test.
PLAIN = [
    ("f16", "f16", "f16", 25, 16, 23, 32), ("f16", "bf16", "bf16", 25, 16, 23, 16),
    ("tf32", "tf32", "tf32", 25, 8, 23, 16), ("f8f6f4", "e4m3", "e5m2", 25, 32, 23, 32),
    ("f8f6f4", "e2m1", "e3m2", 25, 32, 23, 32), ("f8f6f4", "e2m3", "e4m3", 25, 32, 23, 32),
    ("wgmma_fp8", "e4m3", "e4m3", 13, 32, 13, 32), ("wgmma_fp8", "e5m2", "e4m3", 13, 32, 13, 32),
]  # fmt: skip


def parts(value, name):
    """Significand and exponent of a value as the format writes it, subnormals with the smallest exponent."""
    _, _, bias = FIELDS[name]
    value, exponent = Fraction(float(value)), 1 - bias
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return value / Fraction(2) ** exponent, exponent


def cut(value):
    """Toward zero."""
    return abs(value).__floor__() * (1 if value > 0 else -1)


def fused(terms, bits):
    """Sum of (significand, exponent), each cut at so many bits below the largest exponent."""
    largest = max([-126] + [e for s, e in terms if s])
    unit = Fraction(2) ** (largest - bits)
    return sum(cut(s * Fraction(2) ** e / unit) for s, e in terms) * unit


def to_fp32(value, mantissa):
    """Toward zero to a float of 8 exponent bits."""
    exponent = -126
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - mantissa)
    return float(cut(value / unit) * unit)


def slow(a, b, c, types, bits, chunk, mantissa, scales=None):
    """One element of a product without groups; scales are exponents."""
    for start in range(0, len(a), chunk):
        terms = [parts(c, "f32")]
        for k in range(start, start + chunk):
            (sa, ea), (sb, eb) = parts(a[k], types[0]), parts(b[k], types[1])
            terms.append((sa * sb, ea + eb + (0 if scales is None else int(scales[k // 32]))))
        c = to_fp32(fused(terms, bits), mantissa)
    return c


def slow_groups(a, b, c, scales_a, scales_b, block):
    """One element of a product of FP4 with ue4m3 scales."""
    terms = [parts(c, "f32")]
    for k in range(0, len(a), 16):
        total = sum(
            Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[k : k + 16], b[k : k + 16], strict=True)
        )
        (sa, ea), (sb, eb) = parts(scales_a[k // block], "ue4m3"), parts(scales_b[k // block], "ue4m3")
        terms.append((total * sa * sb, ea + eb))
    return to_fp32(fused(terms, 35), 23)


def random(rng, name, shape):
    """Finite values of a type, of every exponent but those whose products would overflow."""
    if name == "tf32":
        bits = random(rng, "f32", shape).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.float32)
    if name == "f32":
        return (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)).astype(np.float32)
    if name == "bf16":
        return (rng.standard_normal(shape) * 2.0 ** rng.integers(-10, 10, shape)).astype(DTYPES[name])
    width = sum(FIELDS[name][:2]) + 1
    codes = rng.integers(0, 1 << width, shape).astype(np.uint16 if width == 16 else np.uint8)
    values = codes.view(DTYPES[name])
    return np.where(np.isfinite(values.astype(np.float32)), values, values.dtype.type(1))


# Worked values ---------------------------------------------------------------------------------------------


def test_worked_truncation_at_25_bits():
    """2**0 keeps 2**-25 and loses 2**-26: and the sum, with bits below fp32's, is cut toward zero."""
    a = np.zeros((1, 16), np.float32)
    a[0, :3] = 1, 2.0**-14, 2.0**-14
    b = np.ones((1, 16), np.float32)
    b[0, 1:3] = 2.0**-11
    zero = np.zeros((1, 1), np.float32)
    options = {"kind": "f16", "types": ("f16", "f16"), "mode": "hardware"}
    # 1 + 2 * 2**-25 = 1 + 2**-24: below an ulp, cut; with c = -1 it is there in full.
    assert dot(a, b, zero, **options)[0, 0] == 1
    assert dot(a, b, zero - 1, **options)[0, 0] == 2.0**-24
    b[0, 1:3] = 2.0**-12
    assert dot(a, b, zero - 1, **options)[0, 0] == 0  # 2**-26 is cut before the addition
    assert dot(a, b, zero - 1, kind="f16", types=("f16", "f16"))[0, 0] == 2.0**-25


def test_worked_products_are_not_normalised():
    """1.5 * 1.5 = 2.25 counts as exponent 0, so that 2**-25 beside it is kept; 2 * 1 has exponent 1."""
    a = np.zeros((1, 16), np.float32)
    b = np.zeros((1, 16), np.float32)
    a[0, :2], b[0, :2] = (1.5, 2.0**-13), (1.5, 2.0**-12)
    c = np.full((1, 1), -2.25, np.float32)
    options = {"kind": "f16", "types": ("f16", "f16"), "mode": "hardware"}
    assert dot(a, b, c, **options)[0, 0] == 0  # C's own exponent, 1, cuts it
    b[0, 0] = -1.5
    a[0, 2], b[0, 2] = 1.5, 1.5
    assert dot(a, b, c * 0, **options)[0, 0] == 2.0**-25


def test_worked_hopper_fp8():
    """13 bits: 1 + 2**-13 stays, 2**-14 goes, and a fp32 C loses its low bits."""
    a = np.zeros((1, 32), np.float32)
    a[0, :2] = 1, 2.0**-6
    b = np.ones((1, 32), np.float32)
    b[0, 1] = 2.0**-7
    options = {"kind": "wgmma_fp8", "types": ("e4m3", "e4m3"), "mode": "hardware"}
    assert dot(a, b, None, **options)[0, 0] == 1 + 2.0**-13
    b[0, 1] = 2.0**-8
    assert dot(a, b, None, **options)[0, 0] == 1
    assert dot(a * 0, b, np.full((1, 1), 1 + 2.0**-14, np.float32), **options)[0, 0] == 1


def test_worked_scales_decide_the_exponent():
    """FP4: scale exponents 0 and -35 are aligned at 35 bits; one less is cut."""
    a = np.zeros((1, 64), np.float32)
    a[0, 0] = a[0, 16] = 1
    b = np.ones((1, 64), np.float32)
    ones = np.ones((1, 4), np.float32)
    small = np.array([[1, 2.0**-35, 1, 1]], np.float32)
    options = {"kind": "mxf4nvf4", "types": ("e2m1", "e2m1"), "mode": "hardware"}
    c = np.full((1, 1), -1, np.float32)
    assert dot(a, b, c, scales_a=small, scales_b=ones, **options)[0, 0] == 2.0**-35
    assert dot(a, b, c, scales_a=small * [1, 0.5, 1, 1], scales_b=ones, **options)[0, 0] == 0
    # A subnormal ue4m3 has exponent -6: with two of them C is cut at 2**-47, though the terms cancel.
    a[0, 16] = -1
    tiny = np.array([[2.0**-9, 2.0**-9, 1, 1]], np.float32)
    options |= {"scales_a": tiny, "scales_b": tiny, "scale_type": "ue4m3"}
    assert dot(a, b, np.full((1, 1), 2.0**-47, np.float32), **options)[0, 0] == 2.0**-47
    assert dot(a, b, np.full((1, 1), 2.0**-48, np.float32), **options)[0, 0] == 0


@pytest.mark.parametrize("mode", ["exact", "hardware"])
@pytest.mark.parametrize(
    ("a", "c", "expected"),
    [
        (nan, 0, 0x7FFFFFFF), (inf, 0, 0x7F800000), (-inf, 0, 0xFF800000), (inf, -inf, 0x7FFFFFFF),
        (0, inf, 0x7F800000), (0, nan, 0x7FFFFFFF),
    ],
)  # fmt: skip
def test_special_values(mode, a, c, expected):
    """NaN of one bit pattern; infinities of IEEE."""
    left = np.zeros((2, 16), np.float32)
    left[0, 3] = a
    right = np.ones((2, 16), np.float32)
    right[1] = 0
    d = dot(left, right, np.full((2, 2), c, np.float32), kind="f16", types=("bf16", "bf16"), mode=mode)
    assert d.view(np.uint32)[0, 0] == expected
    if np.isinf(a):
        assert d.view(np.uint32)[0, 1] == 0x7FFFFFFF  # infinity times zero
    if c == 0:
        assert (d[1] == 0).all()


@pytest.mark.parametrize("mode", ["exact", "hardware"])
@pytest.mark.parametrize("kind", ["mxf4nvf4", "mxf4", "mxf8f6f4"])
def test_a_nan_scale_spoils_its_row(mode, kind):
    """0x7FFFFFFF, even where all elements are zero."""
    a, b = np.zeros((2, 64), np.float32), np.ones((3, 64), np.float32)
    scales_a, scales_b = np.ones((2, 2), np.float32), np.ones((3, 2), np.float32)
    scales_a[1, 1] = nan
    d = dot(a, b, None, kind=kind, types=("e2m1", "e2m1"), mode=mode, scales_a=scales_a, scales_b=scales_b)
    assert (d.view(np.uint32) == [[0] * 3, [0x7FFFFFFF] * 3]).all()


def test_fp8_of_mma_sync_on_hopper():
    """Two halves of K one after the other, then C, rounded to nearest; one NaN."""
    a, b = np.zeros((1, 32), np.float32), np.ones((1, 32), np.float32)
    a[0, :3] = 128, 2.0**-9, -128
    options = {"kind": "mma_fp8_sm90", "types": ("e4m3", "e4m3"), "mode": "hardware"}
    b[0, 1] = 2.0**-9
    # 128 + 2**-18 is cut to 128 in the first half; in one sum with -128 it would be kept.
    assert dot(a, b, np.zeros((1, 1), np.float32), **options)[0, 0] == 0
    assert dot(a, b, None, kind="f8f6f4", types=("e4m3", "e4m3"), mode="hardware")[0, 0] == 2.0**-18
    # C is added as any float: 2**24 + 1.5 is 2**24 + 2, toward zero it would be 2**24.
    a[0, :3], b[0, :3] = (1.5, 0, 0), 1
    assert dot(a, b, np.full((1, 1), 2.0**24, np.float32), **options)[0, 0] == 2.0**24 + 2
    assert dot(a, b, np.full((1, 1), np.nan, np.float32), **options).view(np.uint32)[0, 0] == 0x7FFFFFFF


def test_overflow_and_underflow():
    """Beyond fp32 infinity, just below it the largest number; subnormals are kept."""
    one = np.ones((1, 16), np.float32)
    big = np.zeros((1, 16), np.float32)
    big[0, :2] = 2.0**127
    options = {"kind": "f16", "types": ("bf16", "bf16"), "mode": "hardware"}
    assert dot(big, one, None, **options)[0, 0] == inf
    largest = np.finfo(np.float32).max
    almost = np.zeros((1, 16), np.float32)
    almost[0, 0] = 2.0**102  # half an ulp: to nearest it would be infinity
    assert dot(almost, one * 2, np.full((1, 1), largest), **options)[0, 0] == largest
    tiny = np.zeros((1, 16), np.float32)
    tiny[0, 0] = 2.0**-120
    assert dot(tiny, one * np.float32(2.0**-20), None, **options)[0, 0] == np.float32(2.0**-140)
    # With nothing larger the terms are cut at 25 bits below 2**-126.
    tiny[0, :8] = 2.0**-126
    assert dot(tiny, one * np.float32(2.0**-25), None, **options)[0, 0] == np.float32(2.0**-148)
    assert dot(tiny, one * np.float32(2.0**-26), None, **options)[0, 0] == 0


def test_tf32_ignores_low_bits():
    """13 of them, in both modes."""
    a = np.full((1, 8), 0x3F801FFF, np.uint32).view(np.float32)
    for mode in "exact", "hardware":
        assert dot(a, a, None, kind="tf32", types=("tf32", "tf32"), mode=mode)[0, 0] == 8


@pytest.mark.parametrize("mode", ["exact", "hardware"])
def test_half_accumulators(mode):
    """Rounded to nearest even, 65520 to infinity; NaN 0x7FFF."""
    a, b = np.zeros((1, 16), np.float32), np.ones((1, 16), np.float32)

    def half(product, c):
        a[0, 0] = product
        d = dot(a, b, np.full((1, 1), c, np.float16), kind="f16", types=("f16", "f16"), mode=mode,
                accumulator="f16")  # fmt: skip
        assert d.dtype == np.float16
        return d[0, 0]

    assert half(2048, 1) == 2048
    assert half(2048, 3) == 2052
    assert half(15.5, 65504) == 65504
    assert half(16, 65504) == inf
    assert half(-16, -65504) == -inf
    assert half(2.0**-24, 0) == 2.0**-24
    assert half(0, nan).view(np.uint16) == 0x7FFF


# Random ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "ta", "tb", "bits", "chunk", "mantissa", "depth"), PLAIN)
def test_hardware_against_slow_model(kind, ta, tb, bits, chunk, mantissa, depth):
    """Bit for bit."""
    rng = np.random.default_rng(1)
    a, b, c = random(rng, ta, (9, depth)), random(rng, tb, (7, depth)), random(rng, "f32", (9, 7))
    d = dot(a.astype(np.float32), b.astype(np.float32), c, kind=kind, types=(ta, tb), mode="hardware")
    expected = [[slow(x, y, c[i, j], (ta, tb), bits, chunk, mantissa) for j, y in enumerate(b)]
                for i, x in enumerate(a)]  # fmt: skip
    assert d.dtype == np.float32
    np.testing.assert_array_equal(d, np.array(expected))


def test_hardware_mxf8f6f4_against_slow_model():
    """ue8m0 scales count in the exponents."""
    rng = np.random.default_rng(2)
    a, b, c = random(rng, "e4m3", (6, 64)), random(rng, "e5m2", (5, 64)), random(rng, "f32", (6, 5))
    ea, eb = rng.integers(-9, 9, (6, 2)), rng.integers(-9, 9, (5, 2))
    d = dot(a.astype(np.float32), b.astype(np.float32), c, kind="mxf8f6f4", types=("e4m3", "e5m2"),
            mode="hardware", scales_a=2.0**ea, scales_b=2.0**eb)  # fmt: skip
    expected = [[slow(x, y, c[i, j], ("e4m3", "e5m2"), 25, 32, 23, ea[i] + eb[j]) for j, y in enumerate(b)]
                for i, x in enumerate(a)]  # fmt: skip
    np.testing.assert_array_equal(d, np.array(expected))


@pytest.mark.parametrize("block", [16, 32])
def test_hardware_fp4_against_slow_model(block):
    """Groups of 16 with ue4m3 scales of all sizes, subnormal ones too."""
    rng = np.random.default_rng(3)
    a, b, c = random(rng, "e2m1", (12, 64)), random(rng, "e2m1", (9, 64)), random(rng, "f32", (12, 9))
    sa = rng.integers(0, 0x7F, (12, 64 // block)).astype(np.uint8).view(DTYPES["ue4m3"])
    sb = rng.integers(0, 0x7F, (9, 64 // block)).astype(np.uint8).view(DTYPES["ue4m3"])
    d = dot(a.astype(np.float32), b.astype(np.float32), c, kind="mxf4nvf4", types=("e2m1", "e2m1"),
            mode="hardware", scales_a=sa.astype(np.float32), scales_b=sb.astype(np.float32),
            scale_type="ue4m3")  # fmt: skip
    expected = [[slow_groups(x, y, c[i, j], sa[i], sb[j], block) for j, y in enumerate(b)]
                for i, x in enumerate(a)]  # fmt: skip
    np.testing.assert_array_equal(d, np.array(expected))


@pytest.mark.parametrize("mode", ["exact", "hardware"])
def test_small_integers_are_exact_in_every_kind(mode):
    """Nothing is lost where every partial sum has few bits."""
    rng = np.random.default_rng(4)
    for kind, name, depth in [("f16", "f16", 16), ("tf32", "tf32", 8), ("f8f6f4", "e4m3", 32),
                              ("wgmma_fp8", "e5m2", 32), ("mxf8f6f4", "e4m3", 32), ("mxf4", "e2m1", 64),
                              ("mxf4nvf4", "e2m1", 64)]:  # fmt: skip
        a = rng.integers(-2, 3, (4, 16, depth)).astype(np.float32)
        b = rng.integers(-2, 3, (4, 8, depth)).astype(np.float32)
        c = rng.integers(-50, 50, (4, 16, 8)).astype(np.float32)
        expected = np.einsum("bmk,bnk->bmn", a, b) + c
        np.testing.assert_array_equal(dot(a, b, c, kind=kind, types=(name, name), mode=mode), expected)


def test_exact_mode_scales_blocks():
    """Against a float64 loop over blocks."""
    rng = np.random.default_rng(5)
    a, b = random(rng, "e2m1", (8, 64)).astype(np.float32), random(rng, "e2m1", (6, 64)).astype(np.float32)
    sa, sb = 2.0 ** rng.integers(-3, 4, (8, 4)), 2.0 ** rng.integers(-3, 4, (6, 4))
    expected = sum(np.outer(sa[:, g], sb[:, g]) * (a[:, 16 * g : 16 * g + 16] @ b[:, 16 * g : 16 * g + 16].T)
                   for g in range(4))  # fmt: skip
    d = dot(a, b, None, kind="mxf4nvf4", types=("e2m1", "e2m1"), scales_a=sa, scales_b=sb)
    np.testing.assert_array_equal(d, expected.astype(np.float32))


def test_integers():
    """Wrapped around, or clamped with saturate."""
    rng = np.random.default_rng(6)
    a, b = rng.integers(-128, 128, (5, 32)), rng.integers(0, 256, (6, 32))
    c = rng.integers(-(2**31), 2**31, (5, 6)).astype(np.int32)
    total = a @ b.T + c.astype(np.int64)
    d = dot_integer(a.astype(np.float32), b.astype(np.float32), c)
    assert d.dtype == np.int32
    np.testing.assert_array_equal(d, (total & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
    top = np.full((1, 1), 2**31 - 1, np.int32)
    one = np.ones((1, 32), np.int8)
    assert dot_integer(one, one, top)[0, 0] == -(2**31) + 31
    assert dot_integer(one, one, top, saturate=True)[0, 0] == 2**31 - 1
    assert dot_integer(one, -one, -top, saturate=True)[0, 0] == -(2**31)


def test_unknown_mode_is_refused():
    """Rather than taken for another."""
    with pytest.raises(ValueError, match="'fast'"):
        dot(np.ones((1, 16)), np.ones((1, 16)), None, kind="f16", types=("f16", "f16"), mode="fast")
