"""Activations as fragments of MMAs, from shared memory, where TMA puts them beside the weights.

Lane 4 i + j has token i of each 8, and of its K what the lane has of weights: 32 values from 32 j on of the
128 of a step. They are bf16 values, whose 16 bytes TMA swizzles, or, decoded like the weights, NVFP4 codes.
Rows behind the last token hold anything: they only reach sums that nobody reads.
"""

# No annotations from __future__: the DSL reads them as types.
from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint16, Uint32, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from dsv4lab.kernels import decode_sm90a_registers as registers
from dsv4lab.kernels.decode_sm90a_form import DEPTH, TOKEN_DEPTH, Form
from dsv4lab.kernels.gemm_tiles import Tile
from dsv4lab.kernels.rows import swizzled_offset

_WORDS = DEPTH // 8  # of codes of a token in a step


@dataclass(frozen=True)
class Tokens:
    """All activations.

    Attributes:
        load: copies by TMA.
        m_values: what they read, as coordinates.
        scales: bytes of block scales of NVFP4.
        rows, k: sizes.
    """

    load: cute.CopyAtom
    m_values: cute.Tensor
    scales: cute.Pointer
    rows: Int32
    k: Int32


@cute.jit
def tokens_of(
    form: cutlass.Constexpr[Form], values: cute.Pointer, scales: cute.Pointer, rows: Int32, k: Int32
) -> Tokens:
    """A descriptor for TMA of bf16 values (rows, k), or of NVFP4 codes; k % 32 == 0."""
    element, width = (cutlass.BFloat16, k) if form.activations == "bf16" else (Uint32, k // 8)
    width = cute.assume(width, 128 // element.width)
    m_values = cute.make_tensor(
        cute.recast_ptr(values, dtype=element), cute.make_layout((rows, width), stride=(width, 1))
    )
    stage = cute.select(token_layout(form), mode=[0, 1])
    info = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), m_values, stage, token_box(form))
    return Tokens(info.atom, info.tma_tensor, cute.recast_ptr(scales, dtype=cutlass.Uint8), rows, k)


def token_box(form: Form) -> tuple[int, int]:
    """What a copy brings: tokens by values, or by words of codes."""
    return form.tokens, TOKEN_DEPTH if form.activations == "bf16" else _WORDS


def token_layout(form: Form) -> cute.Layout | cute.ComposedLayout:
    """Of all stages: (tokens, values, copies), or words of codes."""
    boxes = form.token_boxes * form.stages
    if form.activations == "bf16":
        tile = (64, *token_box(form))
        return hopper_helpers.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, cutlass.BFloat16, boxes)
    return cute.make_ordered_layout((*token_box(form), boxes), order=(1, 0, 2))


def token_tensor(form: Form, begin: cute.Pointer) -> cute.Tensor:
    """All stages as TMA fills them, from an address that is a multiple of 1024."""
    layout = token_layout(form)
    if form.activations != "bf16":
        return cute.make_tensor(begin, layout)
    begin = cute.recast_ptr(begin, swizzle_=layout.inner, dtype=cutlass.BFloat16)
    return cute.make_tensor(begin, layout.outer)


@cute.jit
def fetch_scales(
    form: cutlass.Constexpr[Form], tokens: Tokens, tile: Tile, step: Int32, ends: Int32, r_scales: cute.Tensor
):
    """Read this lane's two block scales of each 8 tokens, zeros from the step `ends` on.

    Args:
        r_scales: (form.tokens / 8) words, what is filled in.
    """
    lane = cute.arch.lane_idx()
    column = step * (DEPTH // 16) + (lane & 3) * 2
    columns = tokens.k >> 4
    r_scales.fill(0)
    pairs = cute.make_tensor(cute.recast_ptr(tokens.scales, dtype=Uint16), cute.make_layout(1))
    for block in cutlass.range_constexpr(form.tokens // 8):
        token = block * 8 + (lane >> 2)
        if step < ends and column < columns and token < tile.left:
            row = tile.row + token
            at = Int64(row) * columns + column
            if cutlass.const_expr(form.activations == "swizzled"):
                at = swizzled_offset(Int32(0), row, column, tokens.rows, columns)
            r_scales[block] = cute.make_tensor(pairs.iterator + (at >> 1), cute.make_layout(1))[0].to(Uint32)


def fragments(form: Form, begin: cute.Pointer, slot: Int32, r_scales: cute.Tensor) -> Callable:
    """A function of 8 tokens' number and of a word's: the pairs of `decoded` for that word that a lane has.

    Args:
        begin: words of all stages.
        r_scales: of NVFP4, see `fetch_scales`.
    """
    lane, stage = cute.arch.lane_idx(), form.token_bytes // 16
    token, quarter = lane >> 2, lane & 3
    s_vectors = cute.make_tensor(begin, cute.make_layout((4, form.stages * stage)))
    if form.activations == "bf16":
        # Each 64 values of a token are 8 times 16 bytes, of which number i stands at i ^ (token % 8).
        first = slot * stage + (quarter >> 1) * (form.tokens * 8) + token * 8
        swizzle = (quarter & 1) * 4 ^ token

        def read(block: int, i: int) -> list[Uint32]:
            return registers.paired(_vector(s_vectors, first + block * 64 + (swizzle ^ i)))
    else:
        first = slot * stage + token * 4 + quarter
        words = [_vector(s_vectors, first + block * 32) for block in range(form.tokens // 8)]
        scales = [registers.scale_pair(r_scales[i], Uint32(0x4140)) for i in range(form.tokens // 8)]

        def read(block: int, i: int) -> list[Uint32]:
            return registers.decoded(words[block][i], scales[block][i // 2])

    # Of few tokens all are kept in registers, since several pairs of MMAs take them.
    if form.tokens > 16:
        return read
    kept = {(block, i): read(block, i) for block in range(form.tokens // 8) for i in range(4)}
    return lambda block, i: kept[block, i]


def _vector(s_vectors: cute.Tensor, number: Int32) -> list[Uint32]:
    r_vector = cute.make_rmem_tensor(4, Uint32)
    cute.autovec_copy(s_vectors[None, number], r_vector)
    return [r_vector[i] for i in range(4)]
