"""The numeric contract on one block of 16 values: scale and codes, and back.

A block is either 8 words of two bf16 each, the even one in the lower half, or 16 words of float32 bits. All
of it is straight-line code on the registers of one thread, IEEE float32 with one rounding a step.
"""

# No annotations from __future__: the DSL reads them as types.
import math
from dataclasses import dataclass

from cutlass import Float32, Uint32
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.quantize_ptx import bits, both, either, fma, mul, select, single

from dsv4lab.formats import AMAX_FLOOR, E2M1_MAX, E4M3_MAX, GLOBAL_MAX, GLOBAL_MIN

WORDS = 8  # of a block of bf16
_INFINITY = 0x7F800000
# Floats from here on are 1 apart, and have the integer they hold in their lowest bits.
_ROUNDER = 1.5 * 2.0**23
# Below this a code is rounded to, above it they are all 6.
_BEYOND_SIX = 6.5


@dataclass
class RowScale:
    """A global scale with what all blocks that it is for need of it.

    Attributes:
        g: the scale, NaN where none is.
        unit: a power of two that makes `divisor` of 6 g.
        divisor: from 1 to 2, or 0 where g is 0.
        reciprocal: of the divisor; 0 where that is 0.
        saturates: blocks whose amax is above it have the largest scale, 4096 * 6 g.
    """

    g: Float32
    unit: Float32
    divisor: Float32
    reciprocal: Float32
    saturates: Float32


def row_scale(g: Float32) -> RowScale:
    """From a global scale that is 0, in range or NaN."""
    product = mul(g, E2M1_MAX)
    # The exponents add up to that of 1, twice.
    unit = single(ptx.sub_words(2 * ptx.pattern(1.0), both(bits(product), _INFINITY)))
    divisor = mul(product, unit)
    inverse = select("eq.f32", g, 0.0, 0.0, reciprocal(divisor))
    return RowScale(g, unit, divisor, inverse, mul(product, 4096.0))


def reciprocal(x: Float32) -> Float32:
    """1 / x to nearest, as rcp.rn makes it of an x from 2^-125 to 2^125, but without asking for others."""
    r = ptx.rcp_fast(x)
    return fma(r, fma(ptx.negated(x), r, 1.0), r)


def _quotient(a: Float32, row: RowScale) -> Float32:
    """a / (6 g) to nearest where a is at most `row.saturates`, in the steps of div.rn.

    `unit` keeps the remainder from being subnormal where the quotient is one that E4M3 does not round to 0.
    """
    a = mul(a, row.unit)
    q = mul(a, row.reciprocal)
    return fma(fma(ptx.negated(q), row.divisor, a), row.reciprocal, q)


def checked_scale(g: Float32) -> Float32:
    """A known global scale as it is where it is 0 or in range, else NaN."""
    g_or_nan = select("le.f32", g, GLOBAL_MAX, g, math.nan)
    return select("eq.f32", g, 0.0, g, select("ge.f32", g, GLOBAL_MIN, g_or_nan, math.nan))


def runtime_scale(amax: Uint32, divisor: Float32) -> Float32:
    """max(amax, 1e-8) / divisor; NaN where the data holds NaN or Inf, or the scale is too large.

    Args:
        amax: bits of the largest magnitude, those of Inf or NaN being larger than any number's.
    """
    g = ptx.div(ptx.max_nan(finite_or_nan(amax), AMAX_FLOOR), divisor)
    return select("le.f32", g, GLOBAL_MAX, g, math.nan)


def finite_or_nan(magnitude: Uint32) -> Float32:
    """The float with these bits, sign 0; Inf becomes NaN too."""
    return select("ge.u32", magnitude, _INFINITY, math.nan, magnitude)


def amax(block: list[Uint32]) -> Uint32:
    """Bits of a block's largest magnitude as float32, at least 0x7F800000 where it holds Inf or NaN."""
    if len(block) != WORDS:
        high = both(block[0], 0x7FFFFFFF)
        for word in block[1:]:
            high = ptx.umax(high, both(word, 0x7FFFFFFF))
        return high
    high = both(block[0], 0x7FFF7FFF)
    for word in block[1:]:
        high = ptx.max_halves(high, both(word, 0x7FFF7FFF))
    return both(ptx.max_halves(high, ptx.shift_left(high, 16)), 0xFFFF0000)


def block_scale(high: Uint32, row: RowScale) -> tuple[Uint32, Float32]:
    """The block's E4M3 scale s and s g, from the bits of its amax."""
    a = finite_or_nan(high)
    scale = ptx.to_e4m3(select("gt.f32", a, row.saturates, E4M3_MAX, _quotient(a, row)))
    return scale, mul(ptx.from_e4m3(scale), row.g)


def encode(block: list[Uint32], step: Float32, has_e2m1: bool) -> tuple[Uint32, Uint32]:
    """The 16 codes of a block.

    Args:
        block: 8 words of bf16 or 16 of float32.
        step: s g; blocks for which it is NaN get codes 0.
        has_e2m1: whether the architecture converts to E2M1.
    """
    # -0 is no larger than 0 either, and NaN than nothing.
    usable = select("gt.f32", step, 0.0, step, 1.0)
    r = select("gt.f32", step, 0.0, reciprocal(usable), 0.0)
    half = len(block) // 2
    if has_e2m1:
        kept = select("nan.f32", step, step, 0, 0xFFFFFFFF, "r")
        halves = (_singles(block[:half]), _singles(block[half:]))
        return tuple(both(ptx.to_e2m1([mul(x, r) for x in values]), kept) for values in halves)
    if len(block) != WORDS:
        kept = select("nan.f32", step, step, 0, 0xFFFFFFFF, "r")
        return tuple(both(_encode_singles(part, r), kept) for part in (block[:half], block[half:]))
    # What is beyond 6 may as well be 6.5: then no code is above 7. The limit as bf16, twice in a word.
    limit = bits(mul(usable, _BEYOND_SIX))
    limit = ptx.permute(limit, limit, 0x3232)
    signs = select("nan.f32", step, step, 0, 0x88888888, "r")
    return tuple(_encode_words(part, r, limit, signs) for part in (block[:half], block[half:]))


def _singles(block: list[Uint32]) -> list[Float32]:
    """Eight values as float32."""
    if len(block) == 8:
        return [single(word) for word in block]
    return [value for word in block for value in (ptx.lower_half(word, "bf16"), ptx.upper_half(word, "bf16"))]


def _magnitude(y: Float32) -> Uint32:
    """The E2M1 code of 0 <= y < 7 in the lowest bits of a word, whose others are those of _ROUNDER.

    E2M1 is three uniform grids: steps of 1/2 up to 2 (codes 0 to 4), of 1 to 4 (codes 4 to 6), of 2 to 6.
    Away from its own range each grid counts too far, so the least of the three codes is the right one. The
    sum with _ROUNDER rounds to an integer, half to even, and is the one rounding that happens.
    """
    halves, ones = ptx.fma(y, 2.0, _ROUNDER), ptx.add(y, _ROUNDER + 2)
    twos = ptx.fma(y, 0.5, _ROUNDER + 4)
    return ptx.umin(ptx.umin(bits(halves), bits(ones)), bits(twos))


def _pack(magnitudes: list[Uint32]) -> Uint32:
    """Eight codes of `_magnitude` in a word, signs 0."""
    word = magnitudes[-1]
    for magnitude in magnitudes[-2::-1]:
        word = ptx.multiply_add(word, 16, magnitude)
    # The other bits of _ROUNDER have been shifted and added too.
    rest = sum(ptx.pattern(_ROUNDER) << 4 * i for i in range(len(magnitudes)))
    return ptx.sub_words(word, rest % 2**32)


def _encode_words(words: list[Uint32], r: Float32, limit: Uint32, signs: Uint32) -> Uint32:
    """Eight codes of four words of bf16 without a conversion to E2M1."""
    magnitudes = []
    for word in words:
        clamped = ptx.min_halves(both(word, 0x7FFF7FFF), limit)
        magnitudes.append(_magnitude(mul(ptx.lower_half(clamped, "bf16"), r)))
        magnitudes.append(_magnitude(mul(ptx.upper_half(clamped, "bf16"), r)))
    # The bytes with the signs of values (0, 2, 1, 3) and (4, 6, 5, 7), then of all the even and all the odd.
    first, last = ptx.permute(words[0], words[1], 0x7351), ptx.permute(words[2], words[3], 0x7351)
    even, odd = ptx.permute(first, last, 0x5410), ptx.permute(first, last, 0x7632)
    even = both(ptx.shift_right(even, 4), 0x08080808)
    return either(_pack(magnitudes), both(either(even, both(odd, 0x80808080)), signs))


def _encode_singles(words: list[Uint32], r: Float32) -> Uint32:
    """Eight codes of eight float32 without a conversion to E2M1."""
    magnitudes, signs = [], None
    for i, word in enumerate(words):
        y = mul(single(both(word, 0x7FFFFFFF)), r)
        magnitudes.append(_magnitude(ptx.fmin(y, E2M1_MAX)))
        sign = both(ptx.shift_right(word, 28 - 4 * i), 8 << 4 * i)
        signs = sign if signs is None else either(signs, sign)
    return either(_pack(magnitudes), signs)


def decode(codes: Uint32, scale: Float32) -> list[Float32]:
    """The 8 values code * block scale, exactly.

    Args:
        codes: a word of them.
        scale: the block's scale s.
    """
    # A nibble at the top of each half, taken for f16, has the sign and 3 bits that count in steps of 2^-15.
    scale, values = mul(scale, 2.0**14), [None] * 8
    for i in range(4):
        up, down = 12 - 4 * i, 4 * i - 9
        signs = both(ptx.shift_left(codes, up), 0x80008000)
        sizes = ptx.shift_right(codes, down) if down > 0 else ptx.shift_left(codes, -down)
        pair = either(signs, both(sizes, 0x0E000E00))
        values[i] = mul(ptx.lower_half(pair, "f16"), scale)
        values[i + 4] = mul(ptx.upper_half(pair, "f16"), scale)
    return values
