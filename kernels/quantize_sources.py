"""Where the values to quantize come from: read as they are, mixed and normalized, or made by SwiGLU.

Reading is apart from computing, so that a thread can have the loads of all its blocks under way.
"""

# No annotations from __future__: the DSL reads them as types.
import math

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, Uint32, cute
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.quantize_form import Form, words_of
from dsv4lab.kernels.quantize_ptx import bits, both, either, fma, mul, select, single
from dsv4lab.kernels.rows import load


def singles(words: list[Uint32], element: str) -> list[Float32]:
    """Words as float32."""
    if element == "f32":
        return [single(word) for word in words]
    return [half(word, element) for word in words for half in (ptx.lower_half, ptx.upper_half)]


def rounded(values: list[Float32]) -> list[Uint32]:
    """Values as words of two bf16."""
    return [ptx.to_bf16x2(high, low) for low, high in zip(values[0::2], values[1::2], strict=True)]


@cute.jit
def read(
    form: cutlass.Constexpr[Form],
    m_x: cute.Pointer,
    m_mix: cute.Pointer,
    row: Int64,
    column: Int32,
    columns: Int32,
    here: Boolean,
    r_read: cute.Tensor,
):
    """A block's words as `finished` takes them, 0 where there is no block.

    Args:
        m_x: words of the rows.
        m_mix: of each row, the weights of its streams.
        column: of the block; a row has `columns`.
        r_read: (form.read_words,).
    """
    words = cutlass.const_expr(words_of(form.element))
    r_read.fill(0)
    if here:
        if cutlass.const_expr(form.source == "mhc"):
            mix = cute.make_tensor(m_mix + row * form.streams, cute.make_layout(form.streams))
            mixed = None
            for stream in cutlass.range_constexpr(form.streams):
                at = (row * form.streams + stream) * columns + column
                r_words = load(m_x, at * words, words)
                factor = mix[stream].to(Float32)
                values = singles([r_words[i] for i in range(words)], form.element)
                mixed = _mixed(mixed, values, factor)
            for i in cutlass.range_constexpr(16):
                r_read[i] = bits(mixed[i])
        elif cutlass.const_expr(form.source == "swiglu" and not form.interleaved):
            at = row * 2 * columns + column
            r_gate, r_up = load(m_x, at * words, words), load(m_x, (at + columns) * words, words)
            for i in cutlass.range_constexpr(words):
                r_read[i], r_read[words + i] = r_gate[i], r_up[i]
        else:
            count = cutlass.const_expr(form.read_words)
            r_words = load(m_x, (row * columns + column) * count, count)
            for i in cutlass.range_constexpr(count):
                r_read[i] = r_words[i]


def _mixed(sums: list[Float32] | None, values: list[Float32], factor: Float32) -> list[Float32]:
    if sums is None:
        return [mul(x, factor) for x in values]
    return [fma(x, factor, total) for x, total in zip(values, sums, strict=True)]


def read_values(form: Form, words: list[Uint32]) -> list[Float32]:
    """The 16 values that a norm is of."""
    return singles(words, "f32" if form.source == "mhc" else form.element)


def squares(form: Form, words: list[Uint32], total: Float32) -> Float32:
    """total plus the squares of the values."""
    for x in read_values(form, words):
        total = fma(x, x, total)
    return total


def reciprocal_root(total: Float32, count: Int32, eps: Float32) -> Float32:
    """1 / sqrt(mean + eps) of a sum of squares, to 2^-22; NaN where the sum overflows."""
    mean = mul(total, ptx.rcp_fast(Float32(count)))
    mean = select("lt.f32", total, math.inf, mean, math.nan)
    return ptx.rsqrt_fast(ptx.add(mean, eps))


def finished(
    form: Form, words: list[Uint32], rrms: Float32 | None, weight: list[Uint32] | None, limit: Float32
) -> list[Uint32]:
    """A block as it is quantized (form.block_words words), from what `read` gives."""
    if form.norm:
        values, factors = read_values(form, words), singles(weight, form.weight)
        return rounded([mul(mul(x, rrms), w) for x, w in zip(values, factors, strict=True)])
    if form.source == "swiglu":
        return _swiglu(form, words, limit)
    if form.element == "f16":
        return [bits(x) for x in singles(words, "f16")]
    return words


def _swiglu(form: Form, words: list[Uint32], limit: Float32) -> list[Uint32]:
    """silu(gate) up in bf16; with a NaN in it if there is a NaN or Inf among gate and up."""
    run = len(words) // 4 if form.interleaved else len(words) // 2
    gate, up = [], []
    for i in range(0, len(words), 2 * run):
        gate += words[i : i + run]
        up += words[i + run : i + 2 * run]
    value = _swiglu_value
    if form.tame:
        top = ptx.permute(bits(limit), bits(limit), 0x3232)
        bottom = either(top, 0x80008000)
        gate = [ptx.min_bf16x2(word, top) for word in gate]
        up = [ptx.min_bf16x2(ptx.max_bf16x2(word, bottom), top) for word in up]
        value = _tame_value
    pairs = zip(singles(gate, form.element), singles(up, form.element), strict=True)
    made = rounded([value(form, g, u, limit) for g, u in pairs])
    made[0] = either(made[0], _nan_if_not_finite(form, words))
    return made


def _tame_value(form: Form, gate: Float32, up: Float32, limit: Float32) -> Float32:
    """In fp32, of a clamped gate: 2^64 sigmoid(gate) is a number wherever the product does not vanish."""
    exponential = ptx.exp2_fast(fma(gate, -math.log2(math.e), -64.0))
    sigmoid = ptx.rcp_fast(ptx.add(exponential, 2.0**-64))
    return mul(mul(mul(gate, sigmoid), up), 2.0**-64)


def _swiglu_value(form: Form, gate: Float32, up: Float32, limit: Float32) -> Float32:
    """In fp32, from e = exp(-|gate| / 2): exp(-gate) would be Inf where the product is still a number."""
    if form.clamped:
        gate, up = ptx.fmin(gate, limit), ptx.fmin(ptx.fmax(up, ptx.negated(limit)), limit)
    parts = 4 if form.wide else 2
    e = ptx.exp2_fast(ptx.negated(ptx.absolute(mul(gate, math.log2(math.e) / parts))))
    if form.wide:
        # The fast exponential has no subnormal results; e may be one where up is as large as 2^110.
        e = mul(e, e)
    numerator = select("lt.f32", gate, 0.0, e, 1.0)
    sigmoid = mul(numerator, ptx.rcp_fast(fma(e, e, 1.0)))
    return mul(mul(gate, sigmoid), mul(numerator, up))


def _nan_if_not_finite(form: Form, words: list[Uint32]) -> Uint32:
    """Bits to set in a word of bf16: those of NaN if one of the values is none or infinite, else 0."""
    if form.element == "f32":
        seen = 0.0
        for word in words:
            seen = fma(single(word), 0.0, seen)
        seen = both(bits(seen), 0x7FFFFFFF)
    else:
        seen = Uint32(0)
        for word in words:
            seen = ptx.zero_or_nan(word, form.element, seen)
        seen = both(seen, 0x7FFF7FFF)
    return select("ne.u32", seen, 0, 0x7FFF7FFF, 0, "r")
