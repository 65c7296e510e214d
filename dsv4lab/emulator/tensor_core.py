"""What a tensor core computes: D = A B^T + C, exactly or with the bits of the hardware.

Mode "exact" sums in float64 and rounds once to the accumulator's type. Mode "hardware" follows MMA-Sim (arXiv
2511.10909 and its reference code), which its authors found equal to real GPUs bit for bit:

- An instruction's K is summed in chunks of 32 bytes of operands (64 values of FP4), one after the other, each
  in one fused addition together with C, which is then the result so far.
- The exponent of a product is the sum of its operands' exponents, those of significands in [1, 2): the
  product itself, in [1, 4), is not normalised, and a subnormal has the smallest exponent of its type. All
  terms, C too, are aligned to the largest exponent of those that are not zero, or to -126 if that is larger,
  and cut toward zero at so many fractional bits: 35 of mxf4 and mxf4nvf4, 13 of wgmma with FP8, else 25.
- mxf4 and mxf4nvf4 add up 16 products exactly first; this sum times the significands of both scales is one
  term, and its exponent that of the scales alone. The scales of mxf8f6f4, powers of two, count in the
  exponent of each product.
- The sum is rounded toward zero to fp32, of Hopper's wgmma with FP8 to 13 bits of mantissa; to nearest even
  for fp16 accumulators. An overflow gives infinity, NaN is 0x7FFFFFFF or 0x7FFF.

- mma.sync with FP8 is no such instruction on Hopper, as an H200 shows: the operands become fp16, those with k
  modulo 4 below 2 are summed first, from zero, then the others, and at last C is added as `add` would.

An H200 gives these bits for every type of mma.sync and wgmma. Assumed, because nothing is published: operands
of 4 and 6 bits in kind f8f6f4 behave as FP8 does, each with the smallest exponent of its own type; mma.sync
with FP8 is on Blackwell as published; sm_103a computes as sm_100a does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4lab.emulator.small_floats import FORMATS

_ZERO = -10_000  # the exponent of a zero: below any sum of exponents
_FLOOR = -126  # the smallest exponent of fp32


@dataclass(frozen=True, slots=True)
class Kind:
    """How the tensor core sums.

    Attributes:
        bits: fractional bits kept of aligned terms.
        chunk: products along K that are added in one go.
        group: products that are first added exactly; 1 where each product is a term.
        mantissa: bits of the mantissa of an fp32 result.
    """

    bits: int
    chunk: int
    group: int = 1
    mantissa: int = 23


KINDS = {
    "f16": Kind(25, 16),
    "tf32": Kind(25, 8),
    "f8f6f4": Kind(25, 32),
    "wgmma_fp8": Kind(13, 32, mantissa=13),
    "mxf8f6f4": Kind(25, 32),
    "mxf4": Kind(35, 64, group=16),
    "mxf4nvf4": Kind(35, 64, group=16),
}


def dot(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray | None,
    *,
    kind: str,
    types: tuple[str, str],
    mode: str = "exact",
    scales_a: np.ndarray | None = None,
    scales_b: np.ndarray | None = None,
    scale_type: str = "ue8m0",
    accumulator: str = "f32",
) -> np.ndarray:
    """A B^T + C as a tensor core of this kind computes it.

    Args:
        a: (..., M, K) float32 or float64, the values of the operand; of tf32 the low 13 bits are ignored.
        b: (..., N, K), likewise.
        c: (..., M, N) float32 or float16; None for zeros.
        kind: of KINDS: "f16" (bf16 too), "tf32", "f8f6f4", "mxf8f6f4", "mxf4", "mxf4nvf4"; "wgmma_fp8", or
            "mma_fp8_sm90" for mma.sync with FP8 on Hopper.
        types: of the elements of a and b, names of small_floats.FORMATS.
        mode: "exact" or "hardware".
        scales_a: (..., M, K / block) values of the block scales, NaN included, of the kinds that have them.
        scales_b: (..., N, K / block).
        scale_type: "ue8m0" or, of mxf4nvf4, "ue4m3".
        accumulator: "f32" or "f16".
    Returns:
        (..., M, N) float32 or float16; its NaNs are 0x7FFFFFFF or 0x7FFF.
    """
    if kind == "tf32":
        a, b = tf32(a), tf32(b)
    if c is None:
        c = np.zeros((*a.shape[:-1], b.shape[-2]), np.float32)
    with np.errstate(all="ignore"):
        if mode == "exact":
            total = _scaled(a, scales_a) @ np.swapaxes(_scaled(b, scales_b), -1, -2) + c
            return _canonical(total.astype(np.float16 if accumulator == "f16" else np.float32))
        if mode != "hardware":
            raise ValueError(f'the tensor core computes "exact" or "hardware", not {mode!r}')
        if kind == "mma_fp8_sm90":
            return _converted(a, b, c, accumulator)
        exponents = (
            _term_exponents(a, types[0], scales_a, scale_type, KINDS[kind].group),
            _term_exponents(b, types[1], scales_b, scale_type, KINDS[kind].group),
        )
        return _hardware(_scaled(a, scales_a), _scaled(b, scales_b), c, exponents, KINDS[kind], accumulator)


def dot_integer(a: np.ndarray, b: np.ndarray, c: np.ndarray, *, saturate: bool = False) -> np.ndarray:
    """A B^T + C of integers of 8 bits or less, the same in every mode.

    Args:
        a: (..., M, K) integers or integer-valued floats.
        b: (..., N, K), likewise.
        c: (..., M, N) int32.
        saturate: clamp to the range of int32 (.satfinite) and do not wrap around.
    Returns:
        (..., M, N) int32.
    """
    # Products of bytes add up to less than 2**53, so that the fast matmul of floats is exact.
    total = (a.astype(np.float64) @ np.swapaxes(b.astype(np.float64), -1, -2)).astype(np.int64) + c
    if saturate:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return total.astype(np.int32)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 values without the 13 low mantissa bits, which the tensor core does not look at."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


def _scaled(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    values = values.astype(np.float64)
    if scales is None:
        return values
    return values * _along_k(scales.astype(np.float64), values)


def _along_k(scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)


def _term_exponents(values, type_: str, scales, scale_type: str, group: int) -> np.ndarray:
    """Exponents along K, one for each term: of values and their scales, or of a group's scale alone."""
    if scales is None:
        return _exponents(values, _smallest(type_))
    of_scales = _along_k(_exponents(scales, _smallest(scale_type)), values)
    if group > 1:
        return of_scales[..., ::group]
    return _exponents(values, _smallest(type_)) + of_scales


def _converted(a: np.ndarray, b: np.ndarray, c: np.ndarray, accumulator: str) -> np.ndarray:
    """FP8 as fp16, in two halves of K, and C added to their sum."""
    first, total = np.arange(a.shape[-1]) % 4 < 2, None
    for half in (first, ~first):
        total = dot(
            a[..., half], b[..., half], total, kind="f16", types=("f16", "f16"), mode="hardware",
            accumulator=accumulator,
        )  # fmt: skip
    return _canonical(total + c.astype(total.dtype))


def _hardware(a, b, c, exponents, kind: Kind, accumulator: str) -> np.ndarray:
    total, smallest = c, FORMATS["f16"].least_exponent if accumulator == "f16" else _FLOOR
    for start in range(0, a.shape[-1], kind.chunk):
        terms = [np.asarray(total, np.float64)]
        largest = np.maximum(_exponents(terms[0], smallest), _FLOOR)
        for k in range(start, min(start + kind.chunk, a.shape[-1]), kind.group):
            terms.append(_term(a[..., k : k + kind.group], b[..., k : k + kind.group]))
            i = k // kind.group
            exponent = exponents[0][..., :, None, i] + exponents[1][..., None, :, i]
            largest = np.maximum(largest, np.where(terms[-1] == 0, _ZERO, exponent))
        total = _round(_aligned_sum(terms, largest, kind.bits), accumulator, kind.mantissa)
    return total


def _smallest(type_: str) -> int:
    form = FORMATS[type_]
    return form.least_exponent if form.mantissa else -form.bias  # ue8m0 has no subnormals


def _exponents(values: np.ndarray, smallest: int) -> np.ndarray:
    exponents = np.maximum(np.frexp(values)[1] - 1, smallest)
    exponents[values == 0] = _ZERO
    return exponents


def _term(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # Exact in float64: products of one group share their scales, and so a unit.
    if a.shape[-1] > 1:
        return a @ np.swapaxes(b, -1, -2)
    return a * np.swapaxes(b, -1, -2)


def _aligned_sum(terms: list[np.ndarray], largest: np.ndarray, bits: int) -> np.ndarray:
    """Sum of the terms, each cut to multiples of 2**(largest - bits), exactly: these fit float64."""
    unit = np.ldexp(1.0, bits - largest)
    total = np.zeros_like(unit)
    for term in terms:
        total += np.trunc(term * unit)
    return total / unit


def _round(values: np.ndarray, accumulator: str, mantissa: int) -> np.ndarray:
    if accumulator == "f16":
        return _canonical(values.astype(np.float16))
    rounded = values.astype(np.float32)
    toward_zero = np.nextafter(rounded, np.float32(0))
    rounded = np.where(np.abs(rounded) > np.abs(values), toward_zero, rounded)
    rounded[np.abs(values) >= 2.0**128] *= np.float32(np.inf)
    bits = rounded.view(np.uint32) & np.uint32(0xFFFFFFFF << (23 - mantissa) & 0xFFFFFFFF)
    return _canonical(bits.view(np.float32))


def _canonical(values: np.ndarray) -> np.ndarray:
    """The same values, in place, with the NaN that the tensor core writes."""
    bits = values.view(np.uint16 if values.dtype == np.float16 else np.uint32)
    nan = np.isnan(values)
    if nan.any():
        bits[nan] = 0x7FFF if values.dtype == np.float16 else 0x7FFFFFFF
    return values
