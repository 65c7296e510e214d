"""Activations as fragments of MMAs, straight from global memory.

Lane 4 i + j has token i of each 8, and of its K what the lane has of weights: 32 values from 32 j on of the
128 of a step. They are bf16 values or, decoded like the weights, NVFP4 codes; tokens that are not there and
what is beyond K are zero.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint16, Uint32, cute
from dsv4lab.kernels import decode_sm90a_registers as registers
from dsv4lab.kernels.decode_sm90a_form import DEPTH, Form
from dsv4lab.kernels.gemm_tiles import Tile
from dsv4lab.kernels.rows import swizzled_offset

_MINE = DEPTH // 4  # values of a lane
_SCALES = 4  # which word of a lane holds its two block scales


@dataclass(frozen=True)
class Tokens:
    """All activations.

    Attributes:
        words: of values (rows, k), k % 32 == 0.
        scales: bytes of block scales of NVFP4.
        rows, k: sizes.
    """

    words: cute.Pointer
    scales: cute.Pointer
    rows: Int32
    k: Int32


def raw_words(form: Form) -> int:
    """That a lane has of a token and step: values, or codes and two block scales."""
    return _MINE // 2 if form.activations == "bf16" else _SCALES + 1


@cute.jit
def fetch(
    form: cutlass.Constexpr[Form], tokens: Tokens, tile: Tile, step: Int32, ends: Int32, r_raw: cute.Tensor
):
    """Read a step's activations, zeros from the step `ends` on.

    Args:
        r_raw: (raw_words(form), form.tokens / 8), what is filled in.
    """
    lane = cute.arch.lane_idx()
    begin = step * DEPTH + (lane & 3) * _MINE
    r_raw.fill(0)
    for block in cutlass.range_constexpr(form.tokens // 8):
        token = block * 8 + (lane >> 2)
        if step < ends and begin < tokens.k and token < tile.left:
            row = tile.row + token
            if cutlass.const_expr(form.activations == "bf16"):
                _copy(tokens.words, Int64(row) * (tokens.k >> 3) + (begin >> 3), r_raw[None, block])
            else:
                _copy(tokens.words, Int64(row) * (tokens.k >> 5) + (begin >> 5), r_raw[None, block])
                columns, column = tokens.k >> 4, begin >> 4
                at = Int64(row) * columns + column
                if cutlass.const_expr(form.activations == "swizzled"):
                    at = swizzled_offset(Int32(0), row, column, tokens.rows, columns)
                pairs = cute.recast_ptr(tokens.scales, dtype=Uint16)
                r_raw[_SCALES, block] = cute.make_tensor(pairs + (at >> 1), cute.make_layout(1))[0].to(Uint32)


def _copy(words: cute.Pointer, number: Int64, r_words: cute.Tensor) -> None:
    """All 16 bytes that there is room for, from that number of them on."""
    count = cute.size(r_words) // 4
    vectors = cute.make_tensor(words, cute.make_layout((4, 1 << 30)))
    for i in range(count):
        r_vector = cute.make_rmem_tensor(4, Uint32)
        cute.autovec_copy(vectors[None, number + i], r_vector)
        for j in range(4):
            r_words[4 * i + j] = r_vector[j]


def fragments(form: Form, r_raw: cute.Tensor) -> list[list[Uint32]]:
    """For each 8 tokens 16 words, those of a word of codes after those of the one before."""
    found = []
    for block in range(form.tokens // 8):
        words = [r_raw[i, block] for i in range(raw_words(form))]
        if form.activations == "bf16":
            quads = [registers.paired(words[i : i + 4]) for i in range(0, len(words), 4)]
        else:
            scales = registers.scale_pair(words[_SCALES], Uint32(0x4140))
            quads = [registers.decoded(words[i], scales[i // 2]) for i in range(4)]
        found.append([word for quad in quads for word in quad])
    return found
