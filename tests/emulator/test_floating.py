"""Floating-point instructions: packed and mixed forms against exact fractions, modifiers, zeros and NaN."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.isa.registry import UnsupportedInstruction, build

NAN = float("nan")
INF = float("inf")


@pytest.fixture
def run(lanes):
    return lanes.execute


def singles(values):
    return np.asarray(values, np.float32)


def as_single(bits):
    return bits.view(np.float32)


def random_singles(seed, count=200):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-12, 12, count)).astype(np.float32)


def packed(low, high):
    """Two float32 arrays in a 64-bit register."""
    return np.stack([low, high], axis=1).view(np.uint64)[:, 0]


def unpacked(bits, dtype):
    parts = bits[:, None].view(dtype)
    return parts[:, 0], parts[:, 1]


@pytest.mark.parametrize("way", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_pairs_of_singles(run, lanes, op, way):
    """Each half is worked out by itself, and rounded once."""
    halves = [(random_singles(i), random_singles(10 + i)) for i in range(3 if op == "fma" else 2)]
    registers = {f"w{i + 1}": packed(*pair) for i, pair in enumerate(halves)}
    found = unpacked(run(f"{op}.{way}.f32x2 w0, {', '.join(registers)}", **registers), np.float32)
    for part in (0, 1):
        operands = zip(*(lanes.fractions(pair[part]) for pair in halves), strict=True)
        exact = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
                 "fma": lambda a, b, c: a * b + c}[op]  # fmt: skip
        assert found[part].tolist() == [float(lanes.rounded(exact(*row), "f32", way)) for row in operands]


def test_a_pair_of_constants(run, lanes):
    x = packed(singles([1, 2]), singles([3, 4]))
    low, high = unpacked(run("mul.f32x2 w0, w1, 0x4000000040400000", w1=x), np.float32)
    assert (low.tolist(), high.tolist()) == ([3, 6], [6, 8])
    assert as_single(run("fma.rn.f32 r0, r1, 0f40000000, 0f3F800000", r1=singles([3, 4]))).tolist() == [7, 9]


@pytest.mark.parametrize("way", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_mixed_precision(run, lanes, name, way):
    """add, sub and fma of halves into a single; the halves are not rounded products but exact operands."""
    dtype = np.float16 if name == "f16" else ml_dtypes.bfloat16
    a, b = (random_singles(i).astype(dtype) for i in (1, 2))
    c = random_singles(3)
    registers = {"h1": a.view(np.uint16), "h2": b.view(np.uint16), "r3": c}
    rows = list(zip(*(lanes.fractions(x.astype(np.float32)) for x in (a, b, c)), strict=True))
    for op, operands, exact in (
        ("add", "h1, r3", lambda a, b, c: a + c),
        ("sub", "h1, r3", lambda a, b, c: a - c),
        ("fma", "h1, h2, r3", lambda a, b, c: a * b + c),
    ):
        found = as_single(run(f"{op}.{way}.f32.{name} r0, {operands}", **registers))
        assert found.tolist() == [float(lanes.rounded(exact(*row), "f32", way)) for row in rows]
    clamped = as_single(run(f"add.{way}.sat.f32.{name} r0, h1, r3", **registers))
    assert ((clamped >= 0) & (clamped <= 1)).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_halves(run, lanes, name, op):
    """Scalars and pairs, against exact fractions."""
    dtype = np.float16 if name == "f16" else ml_dtypes.bfloat16
    values = [random_singles(i, 400).astype(dtype) for i in range(3 if op == "fma" else 2)]
    exact = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
             "fma": lambda a, b, c: a * b + c}[op]  # fmt: skip
    rows = zip(*(lanes.fractions(x.astype(np.float32)) for x in values), strict=True)
    expected = [float(lanes.rounded(exact(*row), name)) for row in rows]
    way = ".rn" if op == "fma" else ""
    registers = {f"h{i + 1}": x.view(np.uint16) for i, x in enumerate(values)}
    found = run(f"{op}{way}.{name} h0, {', '.join(registers)}", **registers).view(dtype)
    assert found.astype(np.float64).tolist() == expected
    registers = {f"r{i + 1}": x.view(np.uint32) for i, x in enumerate(values)}
    found = run(f"{op}{way}.{name}x2 r0, {', '.join(registers)}", **registers).view(dtype)
    assert found.astype(np.float64).tolist() == expected


def test_half_fma_near_ties(run, lanes):
    """Half-way between two bfloat16, and 2**-40 more or less, which float32 cannot hold."""
    a, b, c = (lanes.bf16([x]) for x in (3.0, 171.0, 1.0))
    assert (
        run("fma.rn.bf16 h0, h1, h2, h3", h1=a, h2=b, h3=c).tolist() == lanes.bf16([512.0]).tolist()
    )  # of 514
    a, b = lanes.bf16([1 + 2.0**-7] * 3), lanes.bf16([1.5] * 3)  # 1.5 + 3 * 2**-8
    tiny = lanes.bf16([0.0, 2.0**-40, -(2.0**-40)])
    assert run("fma.rn.bf16 h0, h1, h2, h3", h1=a, h2=b, h3=tiny).tolist() == [0x3FC2, 0x3FC2, 0x3FC1]
    a, b = lanes.bf16([1 + 2.0**-7] * 2), lanes.bf16([1 - 2.0**-8] * 2)  # 1 + 2**-8 - 2**-15
    c = lanes.bf16([2.0**-15, 2.0**-15 + 2.0**-22])
    assert run("fma.rn.bf16 h0, h1, h2, h3", h1=a, h2=b, h3=c).tolist() == [0x3F80, 0x3F81]
    a = lanes.f16([2.0**-5, 2.0**-5 * (1 + 2.0**-10)])
    b = lanes.f16([2.0**-6, 2.0**-6 * (1 - 2.0**-10)])  # 2**-11, half of the last bit of c, and 2**-31 less
    c = lanes.f16([1 + 2.0**-10] * 2)
    assert run("fma.rn.f16 h0, h1, h2, h3", h1=a, h2=b, h3=c).tolist() == [0x3C02, 0x3C01]


def test_clamps(run, lanes):
    a, one = singles([-3, 0.5, 2, NAN]), singles([1] * 4)
    assert as_single(run("mul.sat.f32 r0, r1, r2", r1=a, r2=one)).tolist() == [0, 0.5, 1, 0]
    h, zero = lanes.f16([-3, 2]), lanes.f16([0, 0])
    ones = lanes.f16([1, 1])
    assert run("fma.rn.relu.f16 h0, h1, h2, h3", h1=h, h2=ones, h3=zero).view(np.float16).tolist() == [0, 2]
    assert run("fma.rn.sat.f16 h0, h1, h2, h3", h1=h, h2=ones, h3=zero).view(np.float16).tolist() == [0, 1]


def test_flush_to_zero(run):
    """Subnormal operands and results become zeros of their sign, even if rounding would make them normal."""
    tiny = singles([2.0**-127, -(2.0**-127), 2.0**-126])
    assert run("add.ftz.f32 r0, r1, 0f00000000", r1=tiny).tolist() == [0, 0, 0x00800000]
    assert run("mul.ftz.f32 r0, r1, 0f3F000000", r1=singles([2.0**-126, -(2.0**-126)])).tolist() == [
        0,
        0x80000000,
    ]
    below = singles([1 - 2.0**-24])  # times 2**-126 that is nearer to 2**-126 than to the subnormal before it
    least = singles([2.0**-126])
    assert run("mul.f32 r0, r1, r2", r1=below, r2=least).tolist() == [0x00800000]
    assert run("mul.ftz.f32 r0, r1, r2", r1=below, r2=least).tolist() == [0]
    assert run("fma.rn.ftz.f32 r0, r1, r2, 0f00000000", r1=below, r2=least).tolist() == [0]
    assert run("mul.ftz.f32 r0, r1, r2", r1=singles([1]), r2=least).tolist() == [0x00800000]


VALUES = [0.0, -0.0, 1.0, -2.0, INF, -INF, NAN]
PAIRS = [(a, b) for a in VALUES for b in VALUES]


def extreme(a, b, largest, propagate):
    """max or min of the manual: -0 < +0, a NaN gives way unless it is to be propagated."""
    if a != a or b != b:
        return NAN if propagate or (a != a and b != b) else (b if a != a else a)
    key = (max if largest else min)((a, math.copysign(1, a)), (b, math.copysign(1, b)))
    return key[0]


def same_bits(found, expected):
    expected = np.array(expected, found.dtype)
    both_nan = np.isnan(found) & np.isnan(expected)
    return (both_nan | ((found == expected) & (np.signbit(found) == np.signbit(expected)))).all()


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("op", ["min", "max"])
def test_extremes(run, op, propagate):
    a, b = (np.array(side) for side in zip(*PAIRS, strict=True))
    nan = ".NaN" if propagate else ""
    expected = [extreme(x, y, op == "max", propagate) for x, y in PAIRS]
    found = run(f"{op}{nan}.f32 r0, r1, r2", r1=singles(a), r2=singles(b))
    assert same_bits(as_single(found), expected)
    assert set(found[np.isnan(as_single(found))].tolist()) == {0x7FFFFFFF}
    half = run(f"{op}{nan}.f16 h0, h1, h2", h1=a.astype(np.float16), h2=b.astype(np.float16))
    assert same_bits(half.view(np.float16), expected)
    pair = run(f"{op}{nan}.bf16x2 r0, r1, r2", r1=np.repeat(singles(a).view(np.uint32) >> 16, 1) * 0x10001,
               r2=(singles(b).view(np.uint32) >> 16) * np.uint32(0x10001))  # fmt: skip
    for part in unpacked(pair, np.uint16):
        assert same_bits((part.astype(np.uint32) << 16).view(np.float32), expected)
    if not propagate:
        assert same_bits(run(f"{op}.f64 w0, w1, w2", w1=a, w2=b).view(np.float64), expected)


def test_extremes_of_three_and_of_magnitudes(run):
    a, b, c = singles([1, -5, NAN, NAN]), singles([-7, 2, 3, NAN]), singles([4, -6, -1, NAN])
    registers = {"r1": a, "r2": b, "r3": c}
    found = run("max.f32 r0, r1, r2, r3", **registers)
    assert as_single(found)[:3].tolist() == [4, 2, 3]
    assert found[3] == 0x7FFFFFFF
    assert as_single(run("min.abs.f32 r0, r1, r2, r3", **registers))[:3].tolist() == [1, 2, 1]
    assert np.isnan(as_single(run("max.NaN.f32 r0, r1, r2, r3", **registers))).tolist() == [
        False,
        False,
        True,
        True,
    ]
    found = as_single(run("max.xorsign.abs.f32 r0, r1, r2", r1=a, r2=b))
    assert found[:3].tolist() == [-7, -5, 3]


def test_signs(run, lanes):
    x = singles([1.5, -1.5, 0.0, -0.0, NAN])
    assert run("neg.f32 r0, r1", r1=x).tolist() == [
        *lanes.bits32([-1.5, 1.5, -0.0, 0.0]).tolist(),
        0x7FFFFFFF,
    ]
    assert run("abs.f32 r0, r1", r1=x).tolist() == [*lanes.bits32([1.5, 1.5, 0, 0]).tolist(), 0x7FFFFFFF]
    assert run("neg.bf16x2 r0, r1", r1=[0x3F80BF80]).tolist() == [0xBF803F80]
    assert run("abs.f16x2 r0, r1", r1=[0xBC00FC00]).tolist() == [0x3C007C00]
    b = singles([3, 3])
    assert as_single(run("copysign.f32 r0, r1, r2", r1=singles([-0.0, 1]), r2=b)).tolist() == [-3, 3]
    assert run("copysign.f64 w0, w1, w2", w1=np.array([-1.0]), w2=np.array([2.5])).view(
        np.float64
    ).tolist() == [-2.5]


def test_kinds_of_numbers(run):
    x = singles([1, 2.0**-130, INF, NAN, 0])
    for test, expected in (
        ("finite", [1, 1, 0, 0, 1]), ("infinite", [0, 0, 1, 0, 0]), ("number", [1, 1, 1, 0, 1]),
        ("notanumber", [0, 0, 0, 1, 0]), ("normal", [1, 0, 0, 0, 1]), ("subnormal", [0, 1, 0, 0, 0]),
    ):  # fmt: skip
        assert run(f"testp.{test}.f32 p0, r1", r1=x).tolist() == [bool(e) for e in expected], test


def test_division_and_roots(run):
    a, b = singles([1, 1, -1, 0, 10]), singles([3, 0, 0, 0, 4])
    found = run("div.rn.f32 r0, r1, r2", r1=a, r2=b)
    assert found.tolist() == [0x3EAAAAAB, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x40200000]
    assert run("div.rz.f32 r0, r1, r2", r1=a, r2=b)[0] == 0x3EAAAAAA
    assert run("rcp.rn.f32 r0, r1", r1=singles([3, -0.0, INF])).tolist() == [0x3EAAAAAB, 0xFF800000, 0]
    assert run("sqrt.rn.f32 r0, r1", r1=singles([2, -1, -0.0])).tolist() == [
        0x3FB504F3,
        0x7FFFFFFF,
        0x80000000,
    ]
    assert run("sqrt.rp.f32 r0, r1", r1=singles([2, 4])).tolist() == [0x3FB504F4, 0x40000000]
    assert run("mad.rn.f32 r0, r1, r2, r3", r1=a, r2=b, r3=a).tolist()[0] == 0x40800000


# Error bounds of the manual: relative, or absolute where it says so.
BOUNDS = {
    "rcp": (lambda x: 1 / x, 2.0**-23, 0),
    "sqrt": (np.sqrt, 2.0**-23, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9, 0),
    "ex2": (np.exp2, 2.0**-22, 0),
    "lg2": (np.log2, 2.0**-22, 2.0**-22),
    "tanh": (np.tanh, 2.0**-11, 0),
    "sin": (np.sin, 0, 2.0**-20.5),
    "cos": (np.cos, 0, 2.0**-20.5),
}


@pytest.mark.parametrize("op", BOUNDS)
def test_approximate_functions_are_within_the_bounds_of_the_manual(run, op):
    function, relative, absolute = BOUNDS[op]
    x = np.abs(random_singles(1, 1000))
    x = x[x < 2 * np.pi] if op in ("sin", "cos") else x[x < 100]
    found = as_single(run(f"{op}.approx.f32 r0, r1", r1=x)).astype(np.float64)
    exact = function(x.astype(np.float64))
    assert (np.abs(found - exact) <= np.maximum(relative * np.abs(exact), absolute)).all()


def test_approximate_functions_of_special_values(run):
    """The tables of the manual."""
    x = singles([-INF, -0.0, 0.0, INF, NAN, -1])
    expected = {
        "rcp": [-0.0, -INF, INF, 0.0, NAN, -1],
        "rsqrt": [NAN, -INF, INF, 0.0, NAN, NAN],
        "sqrt": [NAN, -0.0, 0.0, INF, NAN, NAN],
        "ex2": [0.0, 1, 1, INF, NAN, 0.5],
        "lg2": [NAN, -INF, -INF, INF, NAN, NAN],
        "sin": [NAN, -0.0, 0.0, NAN, NAN, np.sin(-1)],
        "cos": [NAN, 1, 1, NAN, NAN, np.cos(1)],
        "tanh": [-1, -0.0, 0.0, 1, NAN, np.tanh(-1)],
    }
    for op, values in expected.items():
        found = run(f"{op}.approx.f32 r0, r1", r1=x)
        assert same_bits(as_single(found), values), op
        assert set(found[np.isnan(values)].tolist()) == {0x7FFFFFFF}
    found = as_single(
        run("div.approx.f32 r0, r1, r2", r1=singles([6, 1, INF]), r2=singles([3, 2.0**127, 2.0**127]))
    )
    assert found[:2].tolist() == [2, 0]
    assert np.isnan(found[2])
    assert as_single(run("div.full.f32 r0, r1, r2", r1=singles([1]), r2=singles([2.0**127])))[0] == 2.0**-127


def test_approximate_functions_of_halves(run, lanes):
    found = run("ex2.approx.f16x2 r0, r1", r1=[0x3C00C000]).view(np.float16)  # 1 and -2
    assert found.tolist() == [0.25, 2]
    assert run("ex2.approx.ftz.bf16x2 r0, r1", r1=[0x40403F80]).tolist() == [0x41004000]  # 3 and 1
    assert run("tanh.approx.bf16 h0, h1", h1=lanes.bf16([0, 20])).tolist() == [0, 0x3F80]


@pytest.mark.parametrize(
    "text",
    [
        "add.rz.f16 h0, h1, h2",
        "mul.relu.f32 r0, r1, r2",
        "fma.rn.f32.f64 r0, w1, w2, r3",
        "fma.rn.oob.f16 h0, h1, h2, h3",
        "ex2.f32 r0, r1",
        "sin.approx.f16 h0, h1",
        "rsqrt.rn.f32 r0, r1",
        "fma.f32 r0, r1, r2, r3",
        "add.ftz.bf16 h0, h1, h2",
        "add.sat.f64 w0, w1, w2",
        "min.sat.abs.f64.f32 w0, w1, w2",
    ],
)
def test_what_ptx_does_not_have_is_refused(lanes, text):
    with pytest.raises(UnsupportedInstruction, match=text.split()[0].replace(".", r"\.")):
        build(lanes.parse(text))
