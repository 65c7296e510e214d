"""tcgen05.mma of every kind as CuTe DSL compiles it, on operands laid out here by CuTe's layouts.

Operands are such that float64 sums are exact: the results have one right value, and no tolerance.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import cutlass
import ml_dtypes
import numpy as np
import pytest
import torch
from cutlass import cute

from dsv4lab.emulator import device


def _kernels():
    path = Path(__file__).with_name("tcgen05_kernels.py")
    spec = importlib.util.spec_from_file_location("tcgen05_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _kernels()
Case, K, MN = kernels.Case, kernels.K, kernels.MN
HALF, SINGLE = cutlass.Float16, cutlass.Float32
FP4, E4M3, E5M2, UE8M0 = (
    cutlass.Float4E2M1FN,
    cutlass.Float8E4M3FN,
    cutlass.Float8E5M2,
    cutlass.Float8E8M0FNU,
)

CASES = {
    "f16": Case(HALF, HALF, SINGLE, (128, 64)),
    "f16 accumulator": Case(HALF, HALF, HALF, (128, 64)),
    "f16 M=64": Case(HALF, HALF, SINGLE, (64, 40)),
    "f16 MN-major": Case(HALF, HALF, SINGLE, (128, 64), majors=(MN, MN)),
    "f16 M-major, wide": Case(HALF, HALF, SINGLE, (128, 256), steps=4, majors=(MN, K)),
    "bf16": Case(cutlass.BFloat16, cutlass.BFloat16, SINGLE, (128, 24), steps=4),
    "bf16 two CTAs": Case(cutlass.BFloat16, cutlass.BFloat16, SINGLE, (256, 64), group=2),
    "f16 two CTAs M=128": Case(HALF, HALF, SINGLE, (128, 64), group=2),
    "tf32": Case(cutlass.TFloat32, cutlass.TFloat32, SINGLE, (128, 64), steps=4),
    "tf32 MN-major": Case(cutlass.TFloat32, cutlass.TFloat32, SINGLE, (128, 64), majors=(MN, MN)),
    "i8": Case(cutlass.Int8, cutlass.Int8, cutlass.Int32, (128, 64)),
    "u8 N-major": Case(cutlass.Uint8, cutlass.Uint8, cutlass.Int32, (128, 64), majors=(K, MN)),
    "f8": Case(E4M3, E5M2, SINGLE, (128, 64)),
    "f8 M-major": Case(E5M2, E4M3, SINGLE, (128, 64), majors=(MN, K)),
    "mxf8": Case(E4M3, E4M3, SINGLE, (128, 64), steps=4, scale=UE8M0, block=32),
    "mxf8 two CTAs": Case(E4M3, E5M2, SINGLE, (256, 128), steps=4, group=2, scale=UE8M0, block=32),
    "mxf4": Case(FP4, FP4, SINGLE, (128, 64), steps=4, scale=UE8M0, block=32),
    "nvf4": Case(FP4, FP4, SINGLE, (128, 256), steps=4, scale=E4M3, block=16),
    "nvf4 N=64": Case(FP4, FP4, SINGLE, (128, 64), steps=4, scale=E4M3, block=16),
    "nvf4 two CTAs": Case(FP4, FP4, SINGLE, (256, 256), steps=4, group=2, scale=E4M3, block=16),
}
# Bits of an element, and its values by code.
TYPES = {
    "Float16": (16, np.float16),
    "BFloat16": (16, ml_dtypes.bfloat16),
    "TFloat32": (32, np.float32),
    "Int8": (8, np.int8),
    "Uint8": (8, np.uint8),
    "Float8E4M3FN": (8, ml_dtypes.float8_e4m3fn),
    "Float8E5M2": (8, ml_dtypes.float8_e5m2),
    "Float8E8M0FNU": (8, ml_dtypes.float8_e8m0fnu),
    "Float4E2M1FN": (4, ml_dtypes.float4_e2m1fn),
}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def values_of(codes, element):
    """Numbers that codes stand for, float64."""
    bits, dtype = TYPES[element.__name__]
    return codes.astype(UNSIGNED[max(bits, 8)]).view(dtype).astype(np.float64)


def random_codes(rng, element, shape):
    """Codes of finite values, of which sums of products are exact in float64."""
    bits = TYPES[element.__name__][0]
    if element is cutlass.Float8E8M0FNU:
        return rng.integers(120, 135, shape)
    if bits < 16:
        codes = rng.integers(0, 2**bits, shape)
        bad = ~np.isfinite(values_of(codes, element))
        return np.where(bad, 1, codes)
    # The low mantissa bits of a tf32 are random: nobody may look at them.
    mantissa = {"Float16": 10, "BFloat16": 7, "TFloat32": 23}[element.__name__]
    exponent = rng.integers(-4, 5, shape) + (15 if element is HALF else 127)
    fields = rng.integers(0, 2, shape) << (bits - 1) | exponent << mantissa
    return fields | rng.integers(0, 2**mantissa, shape)


def offsets(text, element):
    """Bit offsets of a CuTe layout of shared memory, an array with one axis for each of its modes."""
    found = re.fullmatch(r"(?:S<(\d),(\d),(\d)> o 0 o )?(.*)", text)
    places = kernels.table(found[4]) * TYPES[element.__name__][0]
    if found[1]:
        width, base, shift = (int(found[i]) for i in (1, 2, 3))
        octet = places // 8
        places = places ^ (octet >> shift & ((1 << width) - 1 << base)) * 8
    return places


def image(places, codes, element, seed):
    """Words of shared memory with codes at bit offsets, and noise everywhere else."""
    bits = TYPES[element.__name__][0]
    octets = np.random.default_rng(seed).integers(0, 256, kernels.WORDS * 4).astype(np.uint8)
    places, codes = np.broadcast_arrays(places, codes)
    for i in range(max(bits // 8, 1)):
        where = places // 8 + i
        if bits == 4:
            low = places % 8 == 0
            for nibble, shift in ((low, 0), (~low, 4)):
                octets[where[nibble]] &= np.uint8(0xF0 >> shift)
                np.bitwise_or.at(octets, where[nibble], (codes[nibble] << shift).astype(np.uint8))
        else:
            octets[where] = (codes >> 8 * i & 0xFF).astype(np.uint8)
    return octets.view(np.int32)


def operand(rng, case, side):
    """Values (rows, steps, K of a step) of A or B, and for each CTA its words of shared memory."""
    element = getattr(case, side)
    places = offsets(case.layouts[side], element)[:, 0, :, 0]
    rows = (case.shape[0] if side == "a" else case.shape[1]) // case.group
    # Mode 0 is (rows, K of a step), rows fastest.
    places = places.reshape(-1, rows, case.steps)
    codes = random_codes(rng, element, (case.group, *places.shape))
    words = [image(places, codes[r], element, r) for r in range(case.group)]
    values = values_of(codes, element)
    if element is cutlass.TFloat32:
        values = values_of(codes & ~0x1FFF, element)
    return values.transpose(0, 2, 3, 1).reshape(rows * case.group, case.steps, -1), words


def scale_factors(rng, case, side):
    """Scales (rows, steps, K of a step) of A or B, and for each CTA its words of shared memory."""
    if case.scale is None:
        return 1.0, [np.zeros(kernels.WORDS, np.int32)] * case.group
    places = offsets(case.layouts[f"sf{side}"], case.scale)[:, 0, :, 0]
    # Mode 0 is ((rows), (block, scales of a step)).
    rows = case.shape[0] // case.group if side == "a" else case.shape[1]
    places = places.reshape(-1, case.block, max(rows, 128), case.steps)[:, 0, :rows]
    parts = case.group if side == "a" else 1
    codes = random_codes(rng, case.scale, (parts, *places.shape))
    if case.scale is E4M3:
        codes &= 0x7F
    words = [image(places, codes[r % parts], case.scale, 3) for r in range(case.group)]
    values = values_of(codes, case.scale).transpose(0, 2, 3, 1).reshape(rows * parts, case.steps, -1)
    return np.repeat(values, case.block, axis=-1), words


def expected(case, a, b):
    """The accumulator, rounded after every step."""
    rounded = {"Float32": np.float32, "Float16": np.float16, "Int32": np.int32}[case.d.__name__]
    d = np.zeros(case.shape, rounded)
    for step in range(case.steps):
        d = (a[:, step] @ b[:, step].T + d.astype(np.float64)).astype(rounded)
    return d


def matrix(case, raw):
    """The accumulator (M, N) from what the kernel stored of tensor memory, (CTAs, 128 * N)."""
    m, n = case.shape
    if case.group == 2 and m == 128:
        # Each CTA's lanes 64 and up hold the right half of the columns.
        halves = raw[:, : 128 * n // 2].reshape(2, 2, 64, n // 2)
        return halves.transpose(0, 2, 1, 3).reshape(m, n)
    return raw[:, : m // case.group * n].reshape(-1, n)[:m]


def accumulated(case, words):
    """Values of the accumulator's words."""
    if case.d is HALF:
        assert (words >> 16 == 0).all()
        return words.astype(np.uint16).view(np.float16)
    return words.view(np.float32 if case.d is SINGLE else np.int32)


def run(case, seed=0, **options):
    """The accumulator that the emulator computes, the one expected, and the run."""
    rng = np.random.default_rng(seed)
    with device("sm_100a", **options) as gpu:
        inputs = [gpu.empty((2, kernels.WORDS), torch.int32) for _ in range(4)]
        d = gpu.empty((2, 128 * case.shape[1]), torch.int32)
        arguments = [kernels.pointer(cutlass.Int32, x.data_ptr()) for x in (*inputs, d)]
        compiled = cute.compile(case.host(), *arguments)
        (a, wa), (b, wb) = (operand(rng, case, side) for side in "ab")
        (sa, wsa), (sb, wsb) = (scale_factors(rng, case, side) for side in "ab")
        for tensor, words in zip(inputs, (wa, wb, wsa, wsb), strict=True):
            tensor.zero_()
            for rank, part in enumerate(words):
                tensor[rank] = torch.from_numpy(part)
        compiled(*arguments)
        found = accumulated(case, matrix(case, d.numpy()[: case.group].copy()))
        return found, expected(case, a * sa, b * sb), gpu.runs[-1]


@pytest.mark.parametrize("name", CASES)
def test_every_kind_gives_the_exact_result(name):
    found, right, launched = run(CASES[name])
    np.testing.assert_array_equal(found, right)
    case = CASES[name]
    (kind,) = (key for key in launched.counters if key.startswith("mma.") and key != "mma.flops")
    assert launched.counters[kind] == case.steps
