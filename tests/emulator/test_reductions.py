"""Reductions in memory: what an H200 wrote, and random values against ml_dtypes and NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.errors import EmulatorError
from dsv4lab.emulator.reductions import TYPES, check, combine

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and overflow in the oracles

BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def combined(operation, type_, old, new, dtype):
    old, new = (np.array(x, dtype) for x in (old, new))
    return combine(operation, type_, old.view(np.uint8), new.view(np.uint8)).view(dtype).tolist()


# (held, reduced into it, result) as seen on an H200 with cp.reduce.async.bulk.tensor.
F16_ADD = [
    (0x3C00, 0x1400, 0x3C01), (0x0001, 0x0001, 0x0002), (0x8001, 0x0001, 0x0000), (0x7C00, 0xFC00, 0x7FFF),
    (0x7E01, 0x3C00, 0x7FFF), (0x0000, 0x8000, 0x0000), (0xFC00, 0x3C00, 0xFC00), (0x7BFF, 0x7BFF, 0x7C00),
    (0x7D01, 0x3C00, 0x7FFF), (0x0400, 0x83FF, 0x0001), (0x8400, 0x03FF, 0x8001), (0x3C01, 0x1001, 0x3C02),
    (0x0001, 0xBC00, 0xBC00),
]  # fmt: skip
F16_MIN = [
    (0x3C00, 0x1400, 0x1400), (0x8001, 0x0001, 0x8001), (0x7C00, 0xFC00, 0xFC00), (0x7E01, 0x3C00, 0x3C00),
    (0x0000, 0x8000, 0x8000), (0x8000, 0x0000, 0x8000), (0xFE55, 0x3C00, 0x3C00), (0x0400, 0x83FF, 0x83FF),
    (0x8400, 0x03FF, 0x8400), (0x3C00, 0x7E01, 0x3C00), (0x7E01, 0x7E02, 0x7FFF), (0x7C01, 0xFC01, 0x7FFF),
]  # fmt: skip
F16_MAX = [
    (0x3C00, 0x1400, 0x3C00), (0x8001, 0x0001, 0x0001), (0x7C00, 0xFC00, 0x7C00), (0x7D01, 0x3C00, 0x3C00),
    (0x0000, 0x8000, 0x0000), (0x8000, 0x0000, 0x0000), (0x8400, 0x03FF, 0x03FF), (0x0001, 0xBC00, 0x0001),
]  # fmt: skip
BF16_ADD = [
    (0x3F80, 0x3B80, 0x3F80), (0x0001, 0x0001, 0x0002), (0x7F80, 0xFF80, 0x7FFF), (0x7F7F, 0x7F7F, 0x7F80),
    (0x0080, 0x807F, 0x0001), (0x8080, 0x007F, 0x8001), (0x3F81, 0x3B81, 0x3F82), (0x0001, 0xBF80, 0xBF80),
    (0xFFD5, 0x3F80, 0x7FFF),
]  # fmt: skip
BF16_MIN = [(0x0000, 0x8000, 0x8000), (0x7FC1, 0x3F80, 0x3F80), (0x0080, 0x807F, 0x807F)]
F32_ADD = [
    (0x3F800000, 0x33800000, 0x3F800000), (1, 1, 2), (0x80000001, 1, 0), (0x7F800000, 0xFF800000, 0x7FFFFFFF),
    (0x7FC12345, 0x3F800000, 0x7FFFFFFF), (0x7F7FFFFF, 0x7F7FFFFF, 0x7F800000), (0x00800000, 0x807FFFFF, 1),
    (0x80800000, 0x00FFFFFF, 0x007FFFFF), (0x3F800001, 0x33800001, 0x3F800002), (0, 0x80000001, 0x80000001),
    (0x00400000, 0x00400000, 0x00800000), (0xFFC00001, 0x7FC54321, 0x7FFFFFFF),
]  # fmt: skip
F32_FTZ_ADD = [
    (1, 1, 0), (0x80000001, 1, 0), (0x00800000, 0x807FFFFF, 0x00800000), (0x80800000, 0x00FFFFFF, 0),
    (0x00400000, 0x00400000, 0), (0, 0x80000001, 0), (0x7F800000, 0xFF800000, 0x7FFFFFFF),
    (0x80000001, 0x80000001, 0x80000000), (1, 0x00800000, 0x00800000),
]  # fmt: skip
U32_INC = [(0, 0, 0), (1, 1, 0), (5, 3, 0), (7, 8, 8), (7, 7, 0), (0, 1, 1), (3, 0xFFFFFFFF, 4)]
U32_DEC = [(0, 0, 0), (1, 1, 0), (2, 1, 1), (5, 3, 3), (0xFFFFFFFF, 1, 1), (7, 8, 6), (7, 0, 0), (0, 5, 5)]
S32_MIN = [(0xFFFFFFFF, 1, 0xFFFFFFFF), (0x80000000, 0x7FFFFFFF, 0x80000000), (3, 0xFFFFFFFF, 0xFFFFFFFF)]
S64_MAX = [(0xFFFFFFFF00000001, 0x1FFFFFFFF, 0x1FFFFFFFF), (0x800000007FFFFFFF, 5, 5)]
U64_MAX = [(0xFFFFFFFF00000001, 0x1FFFFFFFF, 0xFFFFFFFF00000001)]
SEEN = [
    ("add", "f16", 2, F16_ADD), ("min", "f16", 2, F16_MIN), ("max", "f16", 2, F16_MAX),
    ("add", "bf16", 2, BF16_ADD), ("min", "bf16", 2, BF16_MIN), ("add", "f32", 4, F32_ADD),
    ("add", "tf32", 4, F32_ADD), ("add", "f32.ftz", 4, F32_FTZ_ADD), ("inc", "u32", 4, U32_INC),
    ("dec", "u32", 4, U32_DEC), ("min", "s32", 4, S32_MIN), ("max", "s64", 8, S64_MAX),
    ("max", "u64", 8, U64_MAX),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "type_", "size", "rows"), SEEN)
def test_bits_that_an_h200_wrote(operation, type_, size, rows):
    old, new, expected = zip(*rows, strict=True)
    assert combined(operation, type_, old, new, BITS[size]) == list(expected)


@pytest.mark.parametrize(("type_", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_sums_are_rounded_once(type_, dtype):
    """Against sums in float64, which hold any sum of two halves exactly."""
    rng = np.random.default_rng(0)
    old, new = (rng.integers(0, 1 << 16, 20_000, dtype=np.uint16) for _ in range(2))
    exact = old.view(dtype).astype(np.float64) + new.view(dtype).astype(np.float64)
    found = np.array(combined("add", type_, old, new, np.uint16), np.uint16)
    number = ~np.isnan(exact)
    np.testing.assert_array_equal(found[number], exact.astype(dtype).view(np.uint16)[number])
    assert (found[~number] == 0x7FFF).all()


@pytest.mark.parametrize(("type_", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_extremes(type_, dtype):
    rng = np.random.default_rng(1)
    old, new = (rng.integers(0, 1 << 16, 20_000, dtype=np.uint16) for _ in range(2))
    for operation, function in (("min", np.fmin), ("max", np.fmax)):
        found = np.array(combined(operation, type_, old, new, np.uint16), np.uint16).view(dtype)
        expected = function(old.view(dtype).astype(np.float64), new.view(dtype).astype(np.float64))
        np.testing.assert_array_equal(found.astype(np.float64), expected)


@pytest.mark.parametrize(
    ("type_", "dtype"), [("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("s64", np.int64)]
)
def test_integers(type_, dtype):
    rng = np.random.default_rng(2)
    unsigned = BITS[np.dtype(dtype).itemsize]
    old, new = (rng.integers(0, np.iinfo(unsigned).max, 500, unsigned).view(dtype) for _ in range(2))
    ways = {"min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    ways |= {"xor": np.bitwise_xor, "add": np.add}
    for operation, function in ways.items():
        if type_ in TYPES[operation]:
            assert combined(operation, type_, old, new, dtype) == function(old, new).tolist()


def test_doubles():
    quiet, negative, signalling = 0x7FF8000000000001, 0xFFF8000000000001, 0x7FF0000000000123
    one, infinity = 0x3FF0000000000000, 0x7FF0000000000000
    rows = [(quiet, one, quiet), (negative, one, negative), (one, signalling, signalling)]
    rows.append((infinity, infinity | 1 << 63, 0xFFF8000000000000))
    old, new, expected = zip(*rows, strict=True)
    assert combined("add", "f64", old, new, np.uint64) == list(expected)
    assert combined("add", "f64", [1.0, 5e-324], [2.0**-53, 5e-324], np.float64) == [1.0, 1e-323]


@pytest.mark.parametrize(
    ("operation", "type_"),
    [
        ("min", "f32"),
        ("inc", "s32"),
        ("and", "f16"),
        ("add", "s64"),
        ("or", "s64"),
        ("add", "u16"),
        ("xor", "f64"),
    ],
)
def test_combinations_that_do_not_exist(operation, type_):
    with pytest.raises(EmulatorError, match=f"the reduction {operation} takes elements of .*, got {type_}"):
        check(operation, type_)
