"""cvt: integers, floating-point numbers, and packed formats, against exact fractions and ml_dtypes."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.isa.registry import UnsupportedInstruction, build
from dsv4lab.emulator.small_floats import decode

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
LETTERS = {8: "h", 16: "h", 32: "r", 64: "w"}
TO_INTEGER = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
FLOAT_LETTERS = {"f16": "h", "bf16": "h", "f32": "r", "f64": "w"}
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def run(lanes):
    return lanes.execute


def limits(type_):
    bits = int(type_[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)


def value_of(bits, type_):
    width = int(type_[1:])
    bits %= 1 << width
    return bits - (1 << width) if type_[0] == "s" and bits >> width - 1 else bits


def integers(seed=0, count=300):
    rng = np.random.default_rng(seed)
    edges = [
        0,
        1,
        127,
        128,
        255,
        256,
        32767,
        32768,
        65535,
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        (1 << 63) - 1,
        1 << 63,
    ]
    some = [
        int(x) >> int(s)
        for x, s in zip(rng.integers(0, 1 << 63, count), rng.integers(0, 63, count), strict=True)
    ]
    return [*edges, *(-x % (1 << 64) for x in edges), *some, *(-x % (1 << 64) for x in some)]


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_between_integers(run, target, source):
    """Truncated or extended by the source's sign, or clamped; a wider register is extended too."""
    letters = [LETTERS[int(t[1:])] for t in (target, source)]
    values = [value_of(x, source) for x in integers()]
    width = {"h": 16, "r": 32, "w": 64}[letters[0]]
    registers = {f"{letters[1]}1": values}
    found = run(f"cvt.{target}.{source} {letters[0]}0, {letters[1]}1", **registers)
    assert found.tolist() == [value_of(x, target) % (1 << width) for x in values]
    low, high = limits(target)
    found = run(f"cvt.sat.{target}.{source} {letters[0]}0, {letters[1]}1", **registers)
    assert found.tolist() == [min(max(x, low), high) % (1 << width) for x in values]


def test_a_wider_source_register(run):
    """Only the low bits of the type count."""
    assert run("cvt.s32.s8 r0, r1", r1=[0x12345680, 0x7F]).tolist() == [0xFFFFFF80, 0x7F]
    assert run("cvt.u64.u16 w0, r1", r1=[0xABCD1234]).tolist() == [0x1234]


def some_floats(name, seed=1):
    rng = np.random.default_rng(seed)
    dtype = DTYPES[name]
    halves = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        0.49999,
        127.5,
        128.5,
        255.5,
        -128.5,
        32767.5,
        65535.5,
    ]
    large = [
        2.0**31,
        -(2.0**31),
        2.0**31 - 128,
        2.0**32,
        2.0**63,
        -(2.0**63),
        2.0**64,
        2.0**64 - 2.0**40,
        1e30,
    ]
    edges = [*halves, *large, INF, -INF, NAN]
    with np.errstate(over="ignore"):
        return np.concatenate([edges, rng.standard_normal(200) * 2.0 ** rng.integers(-3, 66, 200)]).astype(
            dtype
        )


@pytest.mark.parametrize("way", TO_INTEGER)
@pytest.mark.parametrize("source", DTYPES)
def test_floats_to_integers(run, source, way):
    """Rounded, then clamped; NaN gives 0, or the sign bit where 64-bit numbers are involved."""
    x = some_floats(source)
    for target in INTEGERS:
        letter = LETTERS[int(target[1:])]
        low, high = limits(target)
        nan = 1 << int(target[1:]) - 1 if source == "f64" or target[1:] == "64" else 0

        def expected(value, low=low, high=high, nan=nan):
            if math.isnan(value):
                return nan
            return (
                min(max(TO_INTEGER[way](Fraction(value)), low), high)
                if math.isfinite(value)
                else (low if value < 0 else high)
            )

        found = run(
            f"cvt.{way}.{target}.{source} {letter}0, {FLOAT_LETTERS[source]}1",
            **{f"{FLOAT_LETTERS[source]}1": x},
        )
        mask = (1 << int(target[1:])) - 1
        assert [f & mask for f in found.tolist()] == [
            expected(v) & mask for v in x.astype(np.float64).tolist()
        ], target


@pytest.mark.parametrize("way", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("target", DTYPES)
def test_integers_to_floats(run, lanes, target, way):
    """One rounding, of 64-bit integers too."""
    for source in ("u16", "s16", "u32", "s32", "u64", "s64"):
        values = [value_of(x, source) for x in integers()]
        letter = LETTERS[int(source[1:])]
        found = run(
            f"cvt.{way}.{target}.{source} {FLOAT_LETTERS[target]}0, {letter}1", **{f"{letter}1": values}
        )
        expected = [float(lanes.rounded(Fraction(v), target, way)) for v in values]
        assert found.view(DTYPES[target]).astype(np.float64).tolist() == expected, source


@pytest.mark.parametrize("way", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(
    ("target", "source"), [("f32", "f64"), ("f16", "f64"), ("bf16", "f64"), ("f16", "f32"), ("bf16", "f32")]
)
def test_narrowing(run, lanes, target, source, way):
    """Random numbers, ties and their neighbours, subnormal results, overflow."""
    rng = np.random.default_rng(3)
    fraction, least, most = lanes.FORMATS[target]
    count = 300
    x = rng.choice([-1, 1], count) * rng.integers(2 << fraction, 4 << fraction, count)
    x = x * 2.0 ** rng.integers(least - 2 * fraction, most - fraction - 1, count)
    x[:100] *= 1 + 2.0**-20
    x[-4:] = [
        2.0**most * (2 - 2.0 ** -(fraction + 1)),
        2.0**most * (2 - 2.0 ** -(fraction + 2)),
        -(2.0**most) * 2,
        0.0,
    ]
    with np.errstate(over="ignore"):
        x = x.astype(DTYPES[source])
    x = x[np.isfinite(x)]
    letter = FLOAT_LETTERS[source]
    found = run(f"cvt.{way}.{target}.{source} {FLOAT_LETTERS[target]}0, {letter}1", **{f"{letter}1": x})
    expected = [float(lanes.rounded(v, target, way)) for v in lanes.fractions(x)]
    assert found.view(DTYPES[target]).astype(np.float64).tolist() == expected


def test_widening_is_exact(run):
    halves = np.arange(0x7C00, dtype=np.uint16)
    assert (
        run("cvt.f32.f16 r0, h1", h1=halves).view(np.float32).tolist()
        == halves.view(np.float16).astype(float).tolist()
    )
    assert (
        run("cvt.f64.f16 w0, h1", h1=halves).view(np.float64).tolist()
        == halves.view(np.float16).astype(float).tolist()
    )
    assert run("cvt.f32.bf16 r0, h1", h1=[0x3F80, 0xC040, 0x0001]).tolist() == [
        0x3F800000,
        0xC0400000,
        0x00010000,
    ]
    assert run("cvt.f64.f32 w0, r1", r1=[0x3FC00000]).tolist() == [0x3FF8000000000000]


def test_between_halves(run):
    assert run("cvt.rn.bf16.f16 h0, h1", h1=[0x3C01, 0x7BFF]).tolist() == [0x3F80, 0x4780]
    assert run("cvt.rn.f16.bf16 h0, h1", h1=[0x3F81, 0x4800]).tolist() == [0x3C08, 0x7C00]


def test_rounding_to_whole_numbers(run, lanes):
    x = lanes.f32(0.5, 1.5, -0.5, -2.7, 3.2)
    for way, expected in (("rni", [0, 2, -0.0, -3, 3]), ("rzi", [0, 1, -0.0, -2, 3]),
                          ("rmi", [0, 1, -1, -3, 3]), ("rpi", [1, 2, -0.0, -2, 4])):  # fmt: skip
        assert run(f"cvt.{way}.f32.f32 r0, r1", r1=x).tolist() == lanes.bits32(expected).tolist()
    assert run("cvt.rni.f16.f16 h0, h1", h1=lanes.f16([2.5, 3.5])).view(np.float16).tolist() == [2, 4]


def test_tf32(run):
    """Ten bits of fraction: ties away from zero (rna), to even (rn), cut off (rz)."""
    x = np.array([0x3F801000, 0x3F803000, 0x3F800FFF, 0xBF801000, 0x7F7FFFFF], np.uint32)
    assert run("cvt.rna.tf32.f32 r0, r1", r1=x).tolist() == [
        0x3F802000,
        0x3F804000,
        0x3F800000,
        0xBF802000,
        0x7F800000,
    ]
    assert run("cvt.rn.tf32.f32 r0, r1", r1=x).tolist() == [
        0x3F800000,
        0x3F804000,
        0x3F800000,
        0xBF800000,
        0x7F800000,
    ]
    assert run("cvt.rz.tf32.f32 r0, r1", r1=x).tolist() == [
        0x3F800000,
        0x3F802000,
        0x3F800000,
        0xBF800000,
        0x7F7FE000,
    ]
    assert run("cvt.rna.satfinite.tf32.f32 r0, r1", r1=x)[-1] == 0x7F7FE000
    assert run("cvt.rn.relu.tf32.f32 r0, r1", r1=x)[3] == 0


def test_flags(run, lanes):
    x = lanes.f32(-1, 0.25, 3, NAN, INF, -INF, 1e6)
    f16 = lambda bits: bits.view(np.float16).tolist()  # noqa: E731
    assert f16(run("cvt.rn.sat.f16.f32 h0, r1", r1=x)) == [0, 0.25, 1, 0, 1, 0, 1]
    found = f16(run("cvt.rn.relu.f16.f32 h0, r1", r1=x))
    assert found[:3] == [0, 0.25, 3]
    assert math.isnan(found[3])
    assert found[4:] == [INF, 0, INF]
    found = f16(run("cvt.rn.satfinite.f16.f32 h0, r1", r1=x))
    assert found[4:] == [65504, -65504, 65504]
    assert run("cvt.rn.satfinite.bf16.f32 h0, r1", r1=x)[3:6].tolist() == [0x7FFF, 0x7F7F, 0xFF7F]
    tiny = lanes.f32(2.0**-127, -(2.0**-149))
    assert run("cvt.ftz.f32.f32 r0, r1", r1=tiny).tolist() == [0, 0x80000000]
    assert run("cvt.rpi.ftz.s32.f32 r0, r1", r1=tiny).tolist() == [0, 0]
    assert run("cvt.rpi.s32.f32 r0, r1", r1=tiny).tolist() == [1, 0]
    assert run("cvt.rn.ftz.f32.f64 r0, w1", w1=np.array([2.0**-127])).tolist() == [0]
    assert run("cvt.rp.bf16.f32 h0, r1", r1=tiny[:1]).tolist() == [0x0040]
    assert run("cvt.rp.ftz.bf16.f32 h0, r1", r1=tiny[:1]).tolist() == [0]
    assert run("cvt.rp.ftz.f16.f32 h0, r1", r1=tiny[:1]).tolist() == [1]  # as on an H200


# Packed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("way", ["rn", "rz"])
def test_two_singles_into_halves(run, lanes, name, way):
    """The first operand is the upper half."""
    rng = np.random.default_rng(5)
    a, b = (
        (rng.standard_normal(500) * 2.0 ** rng.integers(-20, 18, 500)).astype(np.float32) for _ in range(2)
    )
    found = (
        run(f"cvt.{way}.{name}x2.f32 r0, r1, r2", r1=a, r2=b)[:, None].view(DTYPES[name]).astype(np.float64)
    )
    assert found[:, 1].tolist() == [float(lanes.rounded(v, name, way)) for v in lanes.fractions(a)]
    assert found[:, 0].tolist() == [float(lanes.rounded(v, name, way)) for v in lanes.fractions(b)]


def test_halves_worked(run, lanes):
    assert run("cvt.rn.f16x2.f32 r0, r1, r2", r1=lanes.f32(1), r2=lanes.f32(-2)).tolist() == [0x3C00C000]
    assert run("cvt.rn.bf16x2.f32 r0, r1, r2", r1=lanes.f32(1), r2=lanes.f32(-2)).tolist() == [0x3F80C000]
    assert run("cvt.rn.relu.bf16x2.f32 r0, r1, r2", r1=lanes.f32(1), r2=lanes.f32(-2)).tolist() == [
        0x3F800000
    ]
    found = run("cvt.rn.satfinite.f16x2.f32 r0, r1, r2", r1=lanes.f32(1e9), r2=lanes.f32(NAN))
    assert found.tolist() == [0x7BFF7FFF]


SMALL = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
}
BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4, "e2m3": 8, "e3m2": 8}  # that each takes in its register
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0}


def codes(values, name):
    values = np.asarray(values, np.float32)
    return np.clip(values, -LARGEST[name], LARGEST[name]).astype(SMALL[name]).view(np.uint8).astype(np.uint32)


@pytest.mark.parametrize("name", SMALL)
def test_two_singles_into_a_small_format(run, name):
    rng = np.random.default_rng(6)
    a, b = (
        (rng.standard_normal(1000) * 2.0 ** rng.integers(-8, 10, 1000)).astype(np.float32) for _ in range(2)
    )
    d = "o0" if name == "e2m1" else "h0"
    expected = codes(a, name) << BITS[name] | codes(b, name)
    assert run(f"cvt.rn.satfinite.{name}x2.f32 {d}, r1, r2", r1=a, r2=b).tolist() == expected.tolist()
    with_relu = codes(np.maximum(a, 0), name) << BITS[name] | codes(np.maximum(b, 0), name)
    assert run(f"cvt.rn.satfinite.relu.{name}x2.f32 {d}, r1, r2", r1=a, r2=b).tolist() == with_relu.tolist()
    for half in ("f16", "bf16"):
        low, high = (x.astype(DTYPES[half]) for x in (a, b))
        pair = low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16
        expected = codes(high.astype(np.float32), name) << BITS[name] | codes(low.astype(np.float32), name)
        assert run(f"cvt.rn.satfinite.{name}x2.{half}x2 {d}, r1", r1=pair).tolist() == expected.tolist()


@pytest.mark.parametrize("half", ["f16", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_format_into_halves(run, name, half):
    """Every pair of codes that the lower one runs through."""
    every = np.arange(1 << BITS[name], dtype=np.uint32)
    pairs = every | every[::-1] << BITS[name]
    s = "o1" if name == "e2m1" else "h1"
    found = (
        run(f"cvt.rn.{half}x2.{name}x2 r0, {s}", **{s: pairs})[:, None].view(DTYPES[half]).astype(np.float32)
    )
    values = decode(every.astype(np.uint8), name)
    np.testing.assert_array_equal(found[:, 0], values)
    np.testing.assert_array_equal(found[:, 1], values[::-1])
    found = (
        run(f"cvt.rn.relu.{half}x2.{name}x2 r0, {s}", **{s: pairs})[:, None]
        .view(DTYPES[half])
        .astype(np.float32)
    )
    np.testing.assert_array_equal(found[:, 0], np.maximum(values, 0))


def test_e2m1_worked(run, lanes):
    """6 and -0.5 are 7 and 9; NaN and large numbers give the largest; it lies in a register of 8 bits."""
    assert run("cvt.rn.satfinite.e2m1x2.f32 o0, r1, r2", r1=lanes.f32(6), r2=lanes.f32(-0.5)).tolist() == [
        0x79
    ]
    assert run("cvt.rn.satfinite.e2m1x2.f32 o0, r1, r2", r1=lanes.f32(NAN), r2=lanes.f32(-99)).tolist() == [
        0x7F
    ]
    assert run("cvt.rn.f16x2.e2m1x2 r0, o1", o1=[0x79]).tolist() == [0x4600B800]


def test_e4m3_worked(run, lanes):
    assert run("cvt.rn.satfinite.e4m3x2.f32 h0, r1, r2", r1=lanes.f32(448), r2=lanes.f32(-1)).tolist() == [
        0x7EB8
    ]
    assert run("cvt.rn.satfinite.e4m3x2.f32 h0, r1, r2", r1=lanes.f32(NAN), r2=lanes.f32(-INF)).tolist() == [
        0x7FFE
    ]
    assert run("cvt.rn.f16x2.e4m3x2 r0, h1", h1=[0x7EB8]).tolist() == [0x5F00BC00]


def test_scale_factors(run, lanes):
    assert run("cvt.rz.ue8m0x2.f32 h0, r1, r2", r1=lanes.f32(3), r2=lanes.f32(0.3)).tolist() == [0x807D]
    assert run("cvt.rp.satfinite.ue8m0x2.f32 h0, r1, r2", r1=lanes.f32(3), r2=lanes.f32(INF)).tolist() == [
        0x81FE
    ]
    assert run("cvt.rp.ue8m0x2.bf16x2 h0, r1", r1=[0x40403E80]).tolist() == [0x817D]  # 3 and 1/4
    assert run("cvt.rn.bf16x2.ue8m0x2 r0, h1", h1=[0x807F, 0x00FF]).tolist() == [0x40003F80, 0x00407FFF]


def test_scaled_fixed_point(run, lanes):
    """s2f6 counts 64ths; with the scale 2**6 it is an 8-bit integer."""
    scale = [0x8585] * 4
    found = run(
        "cvt.rn.satfinite.scaled::n2::ue8m0.bf16x2.s2f6x2 r0, h1, h2",
        h1=[0x0201, 0xFF80, 0x7F00, 0x64F6],
        h2=scale,
    )
    values = found[:, None].view(ml_dtypes.bfloat16).astype(float)
    assert values.tolist() == [[1, 2], [-128, -1], [0, 127], [-10, 100]]
    found = run(
        "cvt.rn.scaled::n2::ue8m0.bf16x2.s2f6x2 r0, h1, h2", h1=[0x4040], h2=[0x807E]
    )  # 1 times 2, and 1/2
    assert found.tolist() == [0x40003F00]
    assert run("cvt.rn.bf16x2.s2f6x2 r0, h1", h1=[0x40C0]).tolist() == [0x3F80BF80]  # 64/64 and -64/64
    found = run(
        "cvt.rn.satfinite.s2f6x2.f32 h0, r1, r2", r1=lanes.f32(1.5, 9, NAN), r2=lanes.f32(-0.25, -9, 0)
    )
    assert found.tolist() == [0x60F0, 0x7F80, 0x7F00]
    found = run(
        "cvt.rn.satfinite.scaled::n2::ue8m0.s2f6x2.f32 h0, r1, r2, h3",
        r1=lanes.f32(100),
        r2=lanes.f32(-7),
        h3=[0x8585],
    )
    assert found.tolist() == [0x64F9]


def test_stochastic_halves(run, lanes):
    """A random number goes with each operand; of f16, 13 bits of it."""
    x = lanes.f32(1 + 2.0**-9)  # a quarter of the way from 1 to the next bfloat16
    for random, expected in ((0, 0x3F80), (0xBFFF, 0x3F80), (0xC000, 0x3F81), (0xFFFF, 0x3F81)):
        found = run("cvt.rs.bf16x2.f32 r0, r1, r2, r3", r1=x, r2=lanes.f32(1), r3=[random << 16])
        assert found.tolist() == [expected << 16 | 0x3F80]
        found = run("cvt.rs.bf16x2.f32 r0, r2, r1, r3", r1=-x, r2=lanes.f32(1), r3=[random])
        assert found.tolist() == [0x3F80 << 16 | 0x8000 | expected]
    x = lanes.f32(1 + 2.0**-12)  # a quarter of the way to the next float16
    for random, expected in ((0x17FF, 0x3C00), (0x1800, 0x3C01), (0xE000, 0x3C00)):
        found = run("cvt.rs.f16x2.f32 r0, r1, r2, r3", r1=x, r2=x, r3=[random << 16])
        assert found.tolist() == [expected << 16 | 0x3C00]


def test_stochastic_fours(run, lanes):
    """a, b in the upper half and with the upper random bits; e, f in the lower half."""
    a, b, e, f = (lanes.f32(x) for x in (1.0, 1.125, 2.0, 2.25))  # 1.125 and 2.25 are a quarter up in e2m1
    values = {"r1": a, "r2": b, "r3": e, "r4": f}
    text = "cvt.rs.satfinite.e2m1x4.f32 h0, {r1, r2, r3, r4}, r5"
    assert run(text, **values, r5=[0]).tolist() == [0x2244]
    assert run(text, **values, r5=[0xFF00FF00]).tolist() == [0x2344]
    assert run(text, **values, r5=[0x00FF00FF]).tolist() == [0x2245]
    # Of each half of the random bits, the lower byte is for e and f; that of the upper half counts for more.
    assert run(text, **values, r5=[0x00C00000]).tolist() == [0x2245]
    assert run(text, **values, r5=[0x00BF00FF]).tolist() == [0x2244]
    assert run(text, **values, r5=[0xC0000000]).tolist() == [0x2344]
    assert run(text, **values, r5=[0xBF00FF00]).tolist() == [0x2244]
    text = "cvt.rs.satfinite.e4m3x4.f32 r0, {r1, r2, r3, r4}, r5"
    c = {**values, "r2": lanes.f32(1 + 2.0**-5)}  # a quarter up in e4m3
    assert run(text, **c, r5=[0xBFFF0000]).tolist() == [0x38384041]
    assert run(text, **c, r5=[0xC0000000]).tolist() == [0x38394041]


def test_pack(run):
    """As in the manual: b below a, c above both."""
    a, b = [300, -5, 100], [-300, 7, -100]
    assert run("cvt.pack.sat.s16.s32 r0, r1, r2", r1=[40000, -5, 1], r2=[-40000, 7, 2]).tolist() == [
        0x7FFF8000, 0xFFFB0007, 0x00010002,
    ]  # fmt: skip
    assert run("cvt.pack.sat.u8.s32.b32 r0, r1, r2, r3", r1=a, r2=b, r3=[0xABCD1234] * 3).tolist() == [
        0x1234FF00, 0x12340007, 0x12346400,
    ]  # fmt: skip
    found = run("cvt.pack.sat.s4.s32.b32 r0, r1, r2, r3", r1=[9, -9, 3], r2=[1, 2, -3], r3=[0xFFFFFF] * 3)
    assert found.tolist() == [0xFFFFFF71, 0xFFFFFF82, 0xFFFFFF3D]


@pytest.mark.parametrize(
    "text",
    [
        "cvt.f16.f32 h0, r1",
        "cvt.rn.s32.f32 r0, r1",
        "cvt.s32.f32 r0, r1",
        "cvt.rna.f16.f32 h0, r1",
        "cvt.rn.e4m3x2.f32 h0, r1, r2",
        "cvt.rz.satfinite.e4m3x2.f32 h0, r1, r2",
        "cvt.rn.satfinite.ue8m0x2.f32 h0, r1, r2",
        "cvt.rn.f16x2.ue8m0x2 r0, h1",
        "cvt.rn.f16x2.f32 r0, r1, r2, r3",
        "cvt.pack.sat.u8.s32 r0, r1, r2",
    ],
)
def test_what_ptx_does_not_have_is_refused(lanes, text):
    with pytest.raises((UnsupportedInstruction, ValueError)):
        build(lanes.parse(text))
