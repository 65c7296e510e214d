"""Small formats against ml_dtypes: every code, every tie, and the cases that PTX names."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator import small_floats
from dsv4lab.emulator.small_floats import decode, encode, encode_stochastic

ORACLES = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 8),
    "e5m2": (ml_dtypes.float8_e5m2, 8),
    "e2m1": (ml_dtypes.float4_e2m1fn, 4),
    "e2m3": (ml_dtypes.float6_e2m3fn, 6),
    "e3m2": (ml_dtypes.float6_e3m2fn, 6),
    "ue8m0": (ml_dtypes.float8_e8m0fnu, 8),
}
SIGNED = ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2")
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ORACLES)
def test_every_code_is_decoded(name, dtype):
    oracle, bits = ORACLES[name]
    codes = np.arange(256, dtype=np.uint8)
    expected = (codes & ((1 << bits) - 1)).view(oracle).astype(dtype)
    found = decode(codes, name, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[numbers], np.signbit(expected)[numbers])


def test_worked_values():
    assert decode(np.arange(16, dtype=np.uint8), "e2m1").tolist() == [
        0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6,
    ]  # fmt: skip
    assert decode(np.uint8([0x7E, 0x01, 0x08, 0xFF]), "e4m3")[:3].tolist() == [448, 2**-9, 2**-6]
    assert decode(np.uint8([0x7B, 0x7C, 0x01]), "e5m2").tolist() == [57344, np.inf, 2**-16]
    assert decode(np.uint8([0, 127, 254]), "ue8m0", np.float64).tolist() == [2.0**-127, 1, 2.0**127]
    assert decode(np.uint8([0x7E, 0xFE]), "ue4m3").tolist() == [448, 448]  # the bit above is padding
    assert decode(np.uint32([0x3F801FFF, 0xC0002000]), "tf32").tolist() == [1.0, -2.001953125]


def test_wide_codes_are_decoded():
    codes = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(decode(codes, "bf16"), codes.view(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(decode(codes, "f16"), codes.view(np.float16).astype(np.float32))


def test_nibbles_come_low_one_first():
    found = small_floats.decode_nibbles(np.array([[0x21, 0xF7]], np.uint8))
    assert found.tolist() == [[[0.5, 1.0], [6.0, -6.0]]]


def candidates(name):
    """float32: all values of the format, what is half-way between two, its neighbours, and random bits."""
    values = np.unique(decode(np.arange(256, dtype=np.uint8), name, np.float64))
    values = values[np.isfinite(values)]
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(way)) for way in (np.inf, -np.inf)]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    usual = (rng.standard_normal(20000) * 2.0 ** rng.integers(-20, 16, 20000)).astype(np.float32)
    every = np.concatenate([values.astype(np.float32), ties, *near, bits, usual, -usual])
    return every[~np.isnan(every)]


@pytest.mark.parametrize("name", SIGNED)
def test_encoding_is_nearest_even_and_saturates(name):
    x = candidates(name)
    largest = LARGEST[name]
    expected = np.clip(x, -largest, largest).astype(ORACLES[name][0]).view(np.uint8)
    np.testing.assert_array_equal(encode(x, name), expected)
    with_relu = np.maximum(x, 0)
    np.testing.assert_array_equal(encode(x, name, relu=True), encode(with_relu + np.float32(0), name))


@pytest.mark.parametrize("name", SIGNED)
def test_every_code_comes_back(name):
    codes = np.arange(1 << ORACLES[name][1], dtype=np.uint8)
    values = decode(codes, name)
    numbers = np.isfinite(values)
    np.testing.assert_array_equal(encode(values[numbers], name), codes[numbers])


def test_nan_and_infinity():
    x = np.float32([np.nan, -np.nan, np.inf, -np.inf])
    assert encode(x, "e4m3").tolist() == [0x7F, 0x7F, 0x7E, 0xFE]
    assert encode(x, "e5m2").tolist() == [0x7F, 0x7F, 0x7B, 0xFB]
    assert encode(x, "e5m2", satfinite=False).tolist() == [0x7F, 0x7F, 0x7C, 0xFC]
    for name, largest, sign in (("e2m1", 7, 8), ("e2m3", 31, 32), ("e3m2", 31, 32)):
        assert encode(x, name).tolist() == [largest, largest, largest, largest | sign]
    assert encode(x, "ue8m0", "rp").tolist() == [255, 255, 254, 254]
    assert encode(x, "ue8m0", "rz", satfinite=False).tolist() == [255] * 4


def test_scale_exponents():
    """Powers of two up (.rp) or down (.rz), of the magnitude."""
    x = np.float32([1, 1.5, 2, 0.3, 0, 2.0**-127, 2.0**-149, 2.0**-126 * 1.25, 3e38, -4, -5])
    assert encode(x, "ue8m0", "rz").tolist() == [127, 127, 128, 125, 0, 0, 0, 1, 254, 129, 129]
    assert encode(x, "ue8m0", "rp").tolist() == [127, 128, 128, 126, 0, 0, 0, 2, 254, 129, 130]
    assert encode(x[8:9], "ue8m0", "rp", satfinite=False).tolist() == [255]


def test_scale_exponents_against_ml_dtypes():
    """Every exponent: ml_dtypes rounds powers of two to themselves."""
    powers = np.ldexp(np.float32(1), np.arange(-127, 128))
    expected = powers.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    for way in ("rz", "rp"):
        np.testing.assert_array_equal(encode(powers, "ue8m0", way), expected)


@pytest.mark.parametrize("name", SIGNED)
def test_stochastic_rounding_goes_up_from_the_right_number_on(name):
    """5/4 of the way between two values goes up for random numbers of 3/4 and more."""
    values = decode(np.arange(1 << ORACLES[name][1] - 1, dtype=np.uint8), name, np.float64)
    values = values[np.isfinite(values)]
    low, high = values[:-1], values[1:]
    x = (low + (high - low) / 4).astype(np.float32)
    for sign in (1, -1):
        for random, expected in ((0, low), (0.75 - 2.0**-16, low), (0.75, high), (1 - 2.0**-16, high)):
            code = encode_stochastic(np.float32(sign) * x, name, np.full(x.shape, random, np.float32))
            np.testing.assert_array_equal(decode(code, name), sign * expected)
    assert decode(encode_stochastic(np.float32([1e9, -1e9]), name, np.float32([0, 0])), name).tolist() == [
        LARGEST[name],
        -LARGEST[name],
    ]
