"""NVFP4 as bf16 in registers, exactly, and the MMA that takes it.

The sign and the three other bits of a code, put at bits 15 and 8 to 6 of a bf16, are its value times 2^-126,
subnormals included. A block scale's byte times 16, taken for a bf16, is its value times 2^-120. Their product
has at most 6 significant bits; with the scale at 2^119 times its value it is 2^-7 times what is meant, which
is never subnormal, and the epilogue puts the factor right.

A word of 8 codes becomes the pairs (0, 4), (1, 5), (2, 6) and (3, 7): the lower one in the lower half.
"""

# No annotations from __future__: the DSL reads them as types.
from cutlass import Float32, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from dsv4lab.kernels import quantize_ptx as ptx

EXPONENT = 7  # decoded values are 2^-7 times what they stand for
_TYPES = {"r": Uint32, "f": Float32}
# Halves of bf16: 2^120, 2^119 and 137/128 of it, which makes infinity of 480 alone. 480 stands for NaN.
_TO_VALUE, _TO_SCALE, _TO_INFINITY = 0x7B807B80, 0x7B007B00, 0x7B097B09


def _block(text: str, results: str, *operands: Float32 | Uint32) -> list:
    """Several values from inline PTX without side effects, of types as the letters of `results` say."""
    kinds = [_TYPES[letter] for letter in results]
    letters = ["=" + letter for letter in results]
    letters += ["f" if isinstance(operand, Float32) else "r" for operand in operands]
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(str(kind.mlir_type) for kind in kinds)})>")
    made = llvm.inline_asm(
        struct,
        [operand.ir_value() for operand in operands],
        text,
        ",".join(letters),
        has_side_effects=False,
        is_align_stack=False,
    )
    return [kind(llvm.extractvalue(kind.mlir_type, made, [i])) for i, kind in enumerate(kinds)]


def scale_pair(word: Uint32, selector: Uint32) -> list[Uint32]:
    """Two block scales times 2^119, each in both halves of a word.

    Args:
        word: with their bytes.
        selector: of `prmt`, which byte goes to the lower and which to the upper half.
    """
    text = f"""{{
        .reg .b32 p, v, i, value, scale, infinity, zero;
        mov.b32 value, {_TO_VALUE:#x};
        mov.b32 scale, {_TO_SCALE:#x};
        mov.b32 infinity, {_TO_INFINITY:#x};
        mov.b32 zero, 0;
        prmt.b32 p, $2, zero, $3;
        shl.b32 p, p, 4;
        mul.rn.bf16x2 v, p, value;
        mul.rn.bf16x2 i, v, infinity;
        mul.rn.bf16x2 i, i, zero;
        fma.rn.bf16x2 v, v, scale, i;
        prmt.b32 $0, v, v, 0x1010;
        prmt.b32 $1, v, v, 0x3232;
    }}"""
    return _block(text, "rr", word, selector)


def decoded(codes: Uint32, scale: Uint32) -> list[Uint32]:
    """The pairs of a word of 8 codes; `scale` is one of `scale_pair`."""
    # A nibble times the sum of two powers of 2 is there twice: with the sign in place, and with the rest.
    text = """{
        .reg .b32 t, n;
        shr.b32 t, $4, 6;
        and.b32 n, $4, 0x000F000F;
        mul.lo.u32 n, n, 0x1040;
        and.b32 n, n, 0x81C081C0;
        mul.rn.bf16x2 $0, n, $5;
        and.b32 n, $4, 0x00F000F0;
        mul.lo.u32 n, n, 0x104;
        and.b32 n, n, 0x81C081C0;
        mul.rn.bf16x2 $1, n, $5;
        and.b32 n, t, 0x003C003C;
        mul.lo.u32 n, n, 0x410;
        and.b32 n, n, 0x81C081C0;
        mul.rn.bf16x2 $2, n, $5;
        and.b32 n, t, 0x01C001C0;
        lop3.b32 n, $4, 0x80008000, n, 0xEA;
        mul.rn.bf16x2 $3, n, $5;
    }"""
    return _block(text, "rrrr", codes, scale)


def paired(words: list[Uint32]) -> list[Uint32]:
    """Four words of 8 bf16 as the pairs of `decoded`."""
    first, second, third, last = words
    halves = [(first, third), (second, last)]
    return [ptx.permute(a, b, selector) for a, b in halves for selector in (0x5410, 0x7632)]


def multiply(a: list[Uint32], b: list[Uint32], sums: list[Float32]) -> list[Float32]:
    """One m16n8k16 MMA added to four sums."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return _block(text, "ffff", *a, *b, *sums)
