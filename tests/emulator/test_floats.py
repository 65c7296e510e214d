"""IEEE arithmetic on lanes against exact fractions: every rounding, ties, subnormal numbers, cancellation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from dsv4lab.emulator import floats, rounding

EVERY = ("rn", "rz", "rm", "rp")


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def numbers(rng, count, name):
    """Finite values of a format with few or many bits, some subnormal, as float64."""
    fraction, least, most = {"f32": (23, -126, 127), "bf16": (7, -126, 127), "f16": (10, -14, 15)}[name]
    bits = rng.integers(1, fraction + 2, count)
    integers = rng.integers(0, 1 << bits) | 1 << bits - 1
    exponents = np.where(
        rng.random(count) < 0.2, least - fraction, rng.integers(least // 3, most // 3, count)
    )
    values = integers * 2.0 ** (exponents - np.where(exponents < least, 0, bits - 1))
    return values * rng.choice([-1.0, 1.0], count) * (rng.random(count) > 0.05)


def held(values, name):
    return values.astype(np.float16 if name == "f16" else np.float32)


def exact(op, operands):
    a, *rest = operands
    if op == "fma":
        return a * rest[0] + rest[1]
    if op in ("div", "rcp"):
        a, b = (a, rest[0]) if op == "div" else (Fraction(1), a)
        return a / b if b else None
    if op == "sqrt":
        if a < 0:
            return None
        scaled = a.numerator * a.denominator << 800
        root = math.isqrt(scaled)
        # A root that is not exact lies strictly between two of these, so that half a step stands for it.
        return (root + Fraction(root * root != scaled, 2)) / (a.denominator << 400)
    return {"add": lambda: a + rest[0], "sub": lambda: a - rest[0], "mul": lambda: a * rest[0]}[op]()


def check(lanes, op, name, way, operands):
    found = floats.operation(op, name, way)(*(held(x, name) for x in operands)).astype(np.float64)
    for i, values in enumerate(zip(*(lanes.fractions(x) for x in operands), strict=True)):
        value = exact(op, values)
        if value is None:
            continue
        expected = lanes.rounded(value, name, way)
        assert found[i] == expected, f"{op}.{way}.{name} of {[float(v) for v in values]}"


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_sums_and_products_round_once(lanes, op, name, way):
    rng = np.random.default_rng(1)
    a, b, c = (numbers(rng, 500, name) for _ in range(3))
    close = (
        (a * b).astype(np.float32).astype(np.float64)
    )  # c near -a * b, and where c is half a unit of a * b
    c[:200] = np.where(
        np.abs(close[:200]) < 60000, close[:200] * rng.choice([-1, 1, 2.0**-24, 2.0**-11], 200), 0
    )
    c = held(c, name).astype(np.float64)
    c = (
        (held(c, name).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
        if name == "bf16"
        else c
    )
    check(lanes, op, name, way, (a, b, c)[: 3 if op == "fma" else 2])


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("op", ["div", "rcp", "sqrt"])
def test_quotients_and_roots_round_once(lanes, op, way):
    rng = np.random.default_rng(2)
    a, b = numbers(rng, 400, "f32"), numbers(rng, 400, "f32")
    a[:100] = (b[:100] * rng.integers(-50, 50, 100)).astype(np.float32)  # exact quotients
    a = np.abs(a) if op == "sqrt" else a
    a[100:150] = np.square(rng.integers(1, 4096, 50))  # exact roots
    check(lanes, op, "f32", way, (a, b) if op == "div" else (a,))


def test_fma_of_halfway_cases():
    """Ties go to the neighbour with an even last bit."""
    one, half = np.float32([1.0]), np.float32([2.0**-24])
    assert floats.fma32(one, half, one)[0] == 1
    assert floats.fma32(one, half, one + np.float32(2.0**-23))[0] == 1 + 2.0**-22
    assert floats.fma32(-one, half, one + np.float32(2.0**-23))[0] == 1


def test_fma_keeps_what_float64_rounds_away():
    """Half-way between two float32 as far as float64 can tell, but 2**-40 less."""
    a, b = np.float32([8 - 2.0**-20]), np.float32([8 + 2.0**-20])  # the product is 64 - 2**-40
    c = np.float32([2.0**30 + 2.0**7])  # its neighbours are 128 away
    in_float64 = float(a[0]) * float(b[0]) + float(c[0])
    assert in_float64 == 2.0**30 + 2.0**7 + 64
    assert np.float32(in_float64) == 2.0**30 + 2.0**8
    assert floats.fma32(a, b, c)[0] == 2.0**30 + 2.0**7


def test_fma_of_subnormal_results_rounds_once():
    """Units are 2**-149: half a unit less 2**-47 of one is added, which float64 takes for half a unit."""
    a, b = np.float32([2.0**-100 * (1 - 2.0**-23)]), np.float32([2.0**-50 * (1 + 2.0**-23)])
    c = np.float32([2.0**-127 + 2.0**-149])
    assert float(a[0]) * float(b[0]) + float(c[0]) == 2.0**-127 + 2.0**-149 + 2.0**-150
    assert floats.fma32(a, b, c)[0] == c[0]
    assert floats.fma32(np.float32([2.0**-100]), np.float32([2.0**-50]), c)[0] == 2.0**-127 + 2.0**-148


def test_fma_of_float64_near_a_tie():
    """2**53 + 2 and 1 - 2**-104: the sum is just below half-way to 2**53 + 4."""
    a, b, c = np.float64([[1 + 2.0**-52], [1 - 2.0**-52], [2.0**53 + 2]])
    assert floats.operation("fma", "f64")(a, b, c)[0] == 2.0**53 + 2
    assert floats.operation("fma", "f64")(-a, b, -c)[0] == -(2.0**53) - 2
    assert floats.operation("fma", "f64")(a, a, c)[0] == 2.0**53 + 4


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("op", ["add", "mul", "div", "fma", "sqrt"])
def test_float64(lanes, op, way):
    rng = np.random.default_rng(3)
    count = 300

    def some():
        values = rng.standard_normal(count) * 2.0 ** rng.integers(-30, 30, count)
        values[:40] *= 2.0 ** rng.integers(-1000, 950, 40)
        values[40:60] = rng.integers(-(2**20), 2**20, 20) * 2.0**-1074
        return values

    a, b, c = some(), some(), some()
    c[100:200] = -(a * b)[100:200]  # all but the lowest bits cancel
    operands = {"fma": (a, b, c), "sqrt": (np.abs(a),)}.get(op, (a, b))
    found = floats.operation(op, "f64", way)(*operands)
    for i, values in enumerate(zip(*(lanes.fractions(x) for x in operands), strict=True)):
        value = exact(op, values)
        if value is not None:
            assert found[i] == lanes.rounded(value, "f64", way), f"{op} {[float(v).hex() for v in values]}"


def test_exact_zeros_have_their_sign():
    zero, one = np.float32([0.0, -0.0, 0.0, -0.0]), np.float32([1])
    other = np.float32([0.0, -0.0, -0.0, 0.0])
    assert np.signbit(floats.operation("add", "f32", "rn")(zero, other)).tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert np.signbit(floats.operation("add", "f32", "rz")(zero, other)).tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert np.signbit(floats.operation("add", "f32", "rm")(zero, other)).tolist() == [False, True, True, True]
    for way, negative in (("rn", False), ("rm", True)):
        assert np.signbit(floats.operation("sub", "f32", way)(one, one))[0] == negative
        assert np.signbit(floats.operation("fma", "f64", way)(*np.float64([[3], [2], [-6]])))[0] == negative


@pytest.mark.parametrize(("name", "nan"), [("f16", 0x7FFF), ("f32", 0x7FFFFFFF)])
def test_nan_is_the_one_of_a_gpu(name, nan):
    dtype = np.float16 if name == "f16" else np.float32
    odd = np.array([0xFE01 if name == "f16" else 0xFFC12345], f"u{dtype().itemsize}").view(dtype)
    infinity, one = np.array([np.inf], dtype), np.array([1], dtype)
    for op, operands in (
        ("add", (odd, one)),
        ("sub", (infinity, infinity)),
        ("mul", (infinity, 0 * one)),
        ("fma", (one, odd, one)),
    ):
        assert floats.operation(op, name)(*operands).view(f"u{dtype().itemsize}")[0] == nan


def test_float64_passes_a_nan_on():
    odd, other = np.uint64([0x7FF0000000000001, 0xFFF8123456789ABC]).view(np.float64)[:, None]
    bits = lambda op, *x: int(floats.operation(op, "f64")(*x).view(np.uint64)[0])  # noqa: E731
    assert bits("add", np.float64([1]), odd) == 0x7FF8000000000001
    assert bits("mul", odd, other) == 0xFFF8123456789ABC
    assert bits("div", odd, other) == 0x7FF8000000000001
    assert bits("sub", *np.float64([[np.inf], [np.inf]])) == 0xFFF8000000000000


def test_flush_keeps_signs_and_normal_numbers():
    tiny = np.float32([2.0**-126, -(2.0**-126), 2.0**-127, -(2.0**-149), 0.0, -0.0, np.inf, 1.5])
    assert rounding.flush(tiny).view(np.uint32).tolist() == [
        0x00800000, 0x80800000, 0, 0x80000000, 0, 0x80000000, 0x7F800000, 0x3FC00000,
    ]  # fmt: skip
    half = np.float16([2.0**-14, -(2.0**-15), 3.0])
    assert rounding.flush(half).view(np.uint16).tolist() == [0x0400, 0x8000, 0x4200]


def test_clamps():
    x = np.float32([-1, -0.0, 0.25, 1, 7, np.inf, -np.inf, np.nan])
    assert rounding.saturate(x).view(np.uint32).tolist() == [0, 0, 0x3E800000, *[0x3F800000] * 3, 0, 0]
    assert rounding.relu(x)[:7].view(np.uint32).tolist() == [0, 0, *x[2:6].view(np.uint32).tolist(), 0]
    assert np.isnan(rounding.relu(x)[7])


@pytest.mark.parametrize("way", [*EVERY, "rna"])
@pytest.mark.parametrize("name", ["f32", "tf32", "bf16", "f16"])
def test_float64_to_each_format(lanes, name, way):
    """Random values, ties, and their neighbours; overflow."""
    rng = np.random.default_rng(4)
    most = {"f16": 15}.get(name, 127)
    x = rng.choice([-1, 1], 600) * rng.random(600) * 2.0 ** rng.integers(-most - 24, most + 2, 600)
    precision = {"f32": 24, "tf32": 11, "bf16": 8, "f16": 11}[name]
    x[:300] = rng.integers(1 << precision, 2 << precision, 300) * 2.0 ** rng.integers(
        -most - 20, most - 12, 300
    )
    x[:100] = np.nextafter(x[:100], 0)
    x[100:200] = np.nextafter(x[100:200], np.inf)
    found = rounding.round_to(x, name, way).astype(np.float64)
    assert found.tolist() == [float(lanes.rounded(v, name, way)) for v in lanes.fractions(x)]


def test_bf16_from_float32_is_nearest_even(lanes):
    rng = np.random.default_rng(5)
    bits = (
        rng.integers(0, 0x7F800000, 3000).astype(np.uint32) | rng.integers(0, 2, 3000).astype(np.uint32) << 31
    )
    bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # ties
    x = bits.view(np.float32)
    expected = [float(lanes.rounded(v, "bf16")) for v in lanes.fractions(x)]
    assert rounding.bf16_rn(x).astype(np.float64).tolist() == expected
    assert rounding.bf16_bits(np.float32([np.nan]))[0] == 0x7FFF0000
