"""Single PTX instructions that the quantizing kernels are made of, as functions of 32-bit values.

Where the numeric contract fixes the bits, arithmetic names its rounding: a product or sum without `.rn` may
be fused by the assembler. Python numbers become immediates.
"""

# No annotations from __future__: the DSL reads them as types.
import re
import struct
from collections.abc import Sequence

from cutlass import Float32, Uint32
from cutlass._mlir.dialects import llvm

_LETTER = {Float32: "f", Uint32: "r"}
_LETTERS = {"f": Float32, "r": Uint32}


def pattern(value: float) -> int:
    """The bits of a number as float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def assembly(text: str, result: str, *operands: Float32 | Uint32 | float | int) -> Float32 | Uint32:
    """One value from inline PTX without side effects.

    Args:
        text: uses $0 for the result and $1, $2, ... for the operands.
        result: "f" for Float32, "r" for Uint32.
        operands: values; an int stands for itself, a float for the bits of a float32.
    """
    values, names = [], ["$0"]
    for operand in operands:
        if isinstance(operand, float):
            names.append(f"0f{pattern(operand):08X}")
        elif isinstance(operand, int):
            names.append(f"0x{operand:x}")
        else:
            values.append(operand)
            names.append(f"${len(values)}")
    text = re.sub(r"\$(\d+)", lambda match: names[int(match[1])], text)
    letters = ["=" + result, *(_LETTER[type(value)] for value in values)]
    kind = _LETTERS[result]
    made = llvm.inline_asm(
        kind.mlir_type,
        [value.ir_value() for value in values],
        text,
        ",".join(letters),
        has_side_effects=False,
        is_align_stack=False,
    )
    return kind(made)


def bits(x: Float32) -> Uint32:
    """The bits of a float."""
    return x.bitcast(Uint32)


def single(x: Uint32) -> Float32:
    """The float with these bits."""
    return x.bitcast(Float32)


def _floats(opcode: str):
    def call(*operands):
        names = ", ".join(f"${i}" for i in range(len(operands) + 1))
        return assembly(f"{opcode} {names};", "f", *operands)

    call.__doc__ = opcode
    return call


def _words(opcode: str):
    def call(*operands):
        names = ", ".join(f"${i}" for i in range(len(operands) + 1))
        return assembly(f"{opcode} {names};", "r", *operands)

    call.__doc__ = opcode
    return call


mul, add, sub = _floats("mul.rn.f32"), _floats("add.rn.f32"), _floats("sub.rn.f32")
fma, div = _floats("fma.rn.f32"), _floats("div.rn.f32")
rcp, sqrt = _floats("rcp.rn.f32"), _floats("sqrt.rn.f32")
negated, absolute = _floats("neg.f32"), _floats("abs.f32")
# The plain ones drop a NaN, the others give it on.
fmin, fmax, min_nan, max_nan = map(_floats, ("min.f32", "max.f32", "min.NaN.f32", "max.NaN.f32"))
# Not part of the contract: an activation is right to a unit of bf16. (The reciprocal is where a step of
# Newton's follows.)
exp2_fast, rcp_fast = _floats("ex2.approx.ftz.f32"), _floats("rcp.approx.ftz.f32")
rsqrt_fast = _floats("rsqrt.approx.f32")

both, either, shift_left, shift_right = map(_words, ("and.b32", "or.b32", "shl.b32", "shr.u32"))
add_words, sub_words, multiply_add = _words("add.u32"), _words("sub.u32"), _words("mad.lo.u32")
umin, umax = _words("min.u32"), _words("max.u32")
# Of the two 16-bit halves.
min_halves, max_halves = _words("min.u16x2"), _words("max.u16x2")
min_bf16x2, max_bf16x2 = _words("min.bf16x2"), _words("max.bf16x2")
# Two floats rounded to a word, the first one in its upper half.
to_bf16x2, to_f16x2 = _words("cvt.rn.bf16x2.f32"), _words("cvt.rn.f16x2.f32")


def permute(a: Uint32, b: Uint32, selector: int) -> Uint32:
    """Bytes of a (0 to 3) and b (4 to 7), the selector's lowest nibble naming the lowest byte."""
    return assembly("prmt.b32 $0, $1, $2, $3;", "r", a, b, selector)


def select(compare: str, a, b, yes, no, result: str = "f") -> Float32 | Uint32:
    """`yes` where a compares so to b, such as "lt.f32", else `no`."""
    kind = "f32" if result == "f" else "b32"
    text = f"{{.reg .pred p; setp.{compare} p, $1, $2; selp.{kind} $0, $3, $4, p;}}"
    return assembly(text, result, a, b, yes, no)


def upper_half(word: Uint32, half: str) -> Float32:
    """The upper half of a word of "bf16" or "f16" as float32."""
    if half == "bf16":
        return single(both(word, 0xFFFF0000))
    return assembly("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h;}", "f", word)


def lower_half(word: Uint32, half: str) -> Float32:
    """The lower half of a word of "bf16" or "f16" as float32."""
    if half == "bf16":
        return single(shift_left(word, 16))
    return assembly("{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;}", "f", word)


def zero_or_nan(word: Uint32, half: str, before: Uint32) -> Uint32:
    """Halves that are NaN where they are in `before`, or where the word's ("bf16" or "f16") is NaN or Inf;
    otherwise 0 or -0."""
    text = f"{{.reg .b32 z; mov.b32 z, 0; fma.rn.{half}x2 $0, $1, z, $2;}}"
    return assembly(text, "r", word, before)


def to_e4m3(x: Float32) -> Uint32:
    """The E4M3 code of a float, to nearest even, saturating at 448; 0x7F for NaN."""
    text = "{.reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, $1; cvt.u32.u16 $0, h;}"
    return assembly(text, "r", x)


def from_e4m3(code: Uint32) -> Float32:
    """The float of an E4M3 code, from a word whose other bytes are 0."""
    text = (
        "{.reg .b16 h, l; .reg .b32 t; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 t, h; "
        "mov.b32 {l, h}, t; cvt.f32.f16 $0, l;}"
    )
    return assembly(text, "f", code)


def to_e2m1(values: Sequence[Float32]) -> Uint32:
    """Eight floats as E2M1 codes, the first one in the lowest bits; NaN becomes 6. From Blackwell on."""
    pairs = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4))
    return assembly(f"{{.reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}};}}", "r", *values)
