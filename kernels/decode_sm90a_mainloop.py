"""The warps that multiply tiles of few tokens on Hopper: one has operands brought, the others multiply them.

A tile is 16 to 256 rows of weights by 8 to 32 tokens. Warps side by side have rows of their own; those along
K take steps of it in turn, each with sums of its own, so that each weight is read from shared memory once.
The four threads that share a row in an MMA have 16 bytes of its codes each, two whole blocks; K may stand in
any order as long as activations stand in the same one.
"""

# No annotations from __future__: the DSL reads them as types.
from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import cpasync
from dsv4lab.kernels import decode_sm90a_registers as registers
from dsv4lab.kernels.decode_sm90a_form import CHUNK_BYTES, CHUNK_ROWS, CHUNKS, DEPTH, MMA_ROWS, Form
from dsv4lab.kernels.decode_sm90a_tokens import Tokens, fetch_scales, fragments, token_box
from dsv4lab.kernels.gemm_tiles import Tile, Work, begin, find

_STEP_WORDS, _STEP_VECTORS = DEPTH // 8, DEPTH // 32  # of codes of a row in a step, 4 and 16 bytes each
_CHUNK_WORDS = CHUNK_BYTES // 4


@dataclass(frozen=True)
class Weights:
    """Copies by TMA of codes and of block scales, and what they read, as coordinates of words."""

    load_codes: cute.CopyAtom
    m_codes: cute.Tensor
    load_scales: cute.CopyAtom
    m_scales: cute.Tensor


@dataclass(frozen=True)
class Ring:
    """Stages of shared memory, form.depth for each turn of warps along K.

    A warp waits for a stage that it has had itself form.depth steps before: of a barrier's phases only the
    parity is seen, so that nobody may wait for a phase while the one before it is not over yet.

    Attributes:
        s_codes: (16 words, features, 1, stages).
        s_scales: (128 words, chunks along K, chunks along N, stages).
        s_tokens: see decode_sm90a_tokens.token_tensor.
        tokens: its words.
        full, empty: barriers of each stage.
    """

    s_codes: cute.Tensor
    s_scales: cute.Tensor
    s_tokens: cute.Tensor
    tokens: cute.Pointer
    full: cute.Pointer
    empty: cute.Pointer


@cute.jit
def weights_of(
    form: cutlass.Constexpr[Form], codes: cute.Pointer, scales: cute.Pointer, n: Int32, k: Int32,
    groups: Int32,
) -> Weights:  # fmt: skip
    """Descriptors for TMA of codes (groups, n, k / 2), k % 32 == 0, and their swizzled block scales."""
    row = cute.assume(k // 8, 4)
    matrix = cute.assume(Int64(n) * row, 32)
    m_codes = cute.make_tensor(
        cute.recast_ptr(codes, dtype=Uint32), cute.make_layout((row, n, groups), stride=(1, row, matrix))
    )
    depth = cute.ceil_div(k, 64)
    chunks = cute.ceil_div(n, CHUNK_ROWS) * groups
    m_scales = cute.make_tensor(
        cute.recast_ptr(scales, dtype=Uint32),
        cute.make_layout(
            (_CHUNK_WORDS, depth, chunks), stride=(1, _CHUNK_WORDS, Int64(_CHUNK_WORDS) * depth)
        ),
    )
    op = cpasync.CopyBulkTensorTileG2SOp()
    boxes = [cute.make_layout(shape) for shape in _boxes(form)]
    first = cpasync.make_tiled_tma_atom(op, m_codes, boxes[0], boxes[0].shape)
    second = cpasync.make_tiled_tma_atom(op, m_scales, boxes[1], boxes[1].shape)
    return Weights(first.atom, first.tma_tensor, second.atom, second.tma_tensor)


def _boxes(form: Form) -> tuple[tuple[int, ...], ...]:
    """Words of a step's codes and of its block scales."""
    return (_STEP_WORDS, form.features, 1), (_CHUNK_WORDS, CHUNKS, form.scale_chunks)


def ring_layouts(form: Form) -> list[cute.Layout]:
    """Of a ring's tensors."""
    return [cute.make_layout((*box, form.stages)) for box in _boxes(form)]


@cute.jit
def share(form: cutlass.Constexpr[Form], rank: Int32, k: Int32):
    """First and last step along K that the CTA of this rank multiplies."""
    steps = cute.ceil_div(k, DEPTH)
    return steps * rank // form.split, steps * (rank + 1) // form.split


def _first_chunk(form: Form, tile: Tile, n: Int32) -> Int32:
    """Of the block scales of a tile's rows."""
    return tile.group * cute.ceil_div(n, CHUNK_ROWS) + tile.column * form.features // CHUNK_ROWS


@cute.jit
def load_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, rank: Int32, weights: Weights,
    tokens: Tokens, ring: Ring, n: Int32,
):  # fmt: skip
    """Bring this CTA's share of the operands of every tile, step after step.

    Args:
        first, step: numbers of the tiles.
        rank: of this CTA among those that share a tile.
    """
    begins, ends = share(form, rank, tokens.k)
    tile, seen = find(work, form, begin(work, form), first)
    number, count = first, Int32(0)
    while tile.here:
        for i in cutlass.range(ends - begins, unroll=1):
            slot, round_ = place_in_ring(form, i, ends - begins, count)
            # Phases of a barrier are 0, 1, 0, ...; before the first one, waiting for 1 does not wait.
            cute.arch.mbarrier_wait(ring.empty + slot, round_ % 2 ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(ring.full + slot, form.stage_bytes)
            _load_weights(form, tile, weights, ring, n, begins + i, slot)
            _load_tokens(form, tile, tokens, ring, begins + i, slot)
        count += 1
        number += step
        tile, seen = find(work, form, seen, number)


def place_in_ring(form: Form, step: Int32, steps: Int32, count: Int32):
    """A step's stage, and how often that was used before.

    Args:
        step: of the CTA in a tile, which has so many steps.
        count: tiles that the CTA has had before.
    """
    turn = step % form.along
    each = (steps - turn + (form.along - 1)) // form.along
    number = count * each + step // form.along
    return turn * form.depth + number % form.depth, number // form.depth


@cute.jit
def _load_weights(
    form: cutlass.Constexpr[Form], tile: Tile, weights: Weights, ring: Ring, n: Int32, step: Int32,
    slot: Int32,
):  # fmt: skip
    """Ask for a stage's weights."""
    box, scale_box = _boxes(form)
    g_codes = cute.local_tile(weights.m_codes, box, (None, None, None))
    s_codes, g_codes = _partition(weights.load_codes, ring.s_codes, g_codes, 3)
    moved = cute.domain_offset((0, 0, _first_chunk(form, tile, n)), weights.m_scales)
    g_scales = cute.local_tile(moved, scale_box, (0, None, 0))
    s_scales, g_scales = _partition(weights.load_scales, ring.s_scales, g_scales, 3)
    full = ring.full + slot
    source = g_codes[None, step, tile.column, tile.group]
    cute.copy(weights.load_codes, source, s_codes[None, slot], tma_bar_ptr=full)
    cute.copy(weights.load_scales, g_scales[None, step], s_scales[None, slot], tma_bar_ptr=full)


@cute.jit
def _load_tokens(
    form: cutlass.Constexpr[Form], tile: Tile, tokens: Tokens, ring: Ring, step: Int32, slot: Int32
):
    """Ask for a stage's activations."""
    g_tokens = cute.local_tile(tokens.m_values, token_box(form), (None, None))
    s_tokens, g_tokens = _partition(tokens.load, ring.s_tokens, g_tokens, 2)
    boxes, full = form.token_boxes, ring.full + slot
    for i in cutlass.range_constexpr(boxes):
        source = g_tokens[None, tile.row // form.tokens, step * boxes + i]
        cute.copy(tokens.load, source, s_tokens[None, slot * boxes + i], tma_bar_ptr=full)


def _partition(load, s_tensor: cute.Tensor, g_tensor: cute.Tensor, modes: int):
    """Boxes in shared and in global memory: (box, ...)."""
    return cpasync.tma_partition(
        load, 0, cute.make_layout(1), cute.group_modes(s_tensor, 0, modes),
        cute.group_modes(g_tensor, 0, modes),
    )  # fmt: skip


@cute.jit
def multiply_tile(
    form: cutlass.Constexpr[Form], tile: Tile, ring: Ring, tokens: Tokens, begins: Int32, ends: Int32,
    count: Int32, r_sums: cute.Tensor,
):  # fmt: skip
    """This warp's part of the CTA's steps of a tile.

    Args:
        begins, ends: steps of the CTA.
        count: tiles that the CTA has had before.
        r_sums: (4, form.tokens / 8, form.mmas), what is filled in.
    """
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    turn, aside = warp // form.across, warp % form.across * form.mmas
    r_sums.fill(0.0)
    r_scales = cute.make_rmem_tensor(form.tokens // 8, Uint32)
    if cutlass.const_expr(form.activations != "bf16"):
        fetch_scales(form, tokens, tile, begins + turn, ends, r_scales)
    codes_at, scales_at, selector = _places()
    codes_at += aside * (MMA_ROWS * _STEP_VECTORS)
    for i in cutlass.range(turn, ends - begins, form.along, unroll=1):
        slot, round_ = place_in_ring(form, i, ends - begins, count)
        cute.arch.mbarrier_wait(ring.full + slot, round_ % 2)
        read_tokens = fragments(form, ring.tokens, slot, r_scales)
        if cutlass.const_expr(form.activations != "bf16"):
            fetch_scales(form, tokens, tile, begins + i + form.along, ends, r_scales)
        for first in cutlass.range_constexpr(0, form.mmas, 2):
            pair = []
            for mma in cutlass.range_constexpr(first, min(first + 2, form.mmas)):
                scale_at = scales_at + _scale_place(form, tile, aside + mma)
                place = codes_at + mma * MMA_ROWS * _STEP_VECTORS, scale_at
                pair.append((mma, _rows(form, ring, slot, place, selector)))
            _multiply_rows(form, pair, read_tokens, r_sums)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(ring.empty + slot)


def _places():
    """Of this lane in a stage: its 16 bytes of codes, its word of block scales, and which of its bytes.

    Lane 4 i + j has the codes j of rows i and i + 8 of every 16, counted in 16 bytes.
    """
    lane = cute.arch.lane_idx()
    row, quarter = lane >> 2, lane & 3
    selector = Uint32(0x4140) + Uint32(0x202) * Uint32(quarter & 1)
    return row * _STEP_VECTORS + quarter, (quarter >> 1) * _CHUNK_WORDS + row * 4, selector


def _scale_place(form: Form, tile: Tile, mma: Int32) -> Int32:
    """Of the first of 16 rows, counted in words from a stage's first block scale, see dsv4lab.layouts."""
    begin = tile.column * (form.features // MMA_ROWS)
    rows = begin + mma
    return ((rows >> 3) - (begin >> 3)) * CHUNKS * _CHUNK_WORDS + (rows & 1) * 64 + (rows >> 1 & 3)


def _rows(form: Form, ring: Ring, slot: Int32, place: tuple, selector: Uint32) -> list:
    """Four words of codes and two block scales of this lane's two rows of 16, which are 8 apart."""
    vectors = cute.make_layout((4, form.stages * form.features * _STEP_VECTORS))
    s_vectors = cute.make_tensor(ring.s_codes.iterator, vectors)
    codes_at = slot * (form.features * _STEP_VECTORS) + place[0]
    scale_at = slot * (form.scale_chunks * CHUNKS * _CHUNK_WORDS) + place[1]
    rows = []
    for half in range(2):
        r_codes = cute.make_rmem_tensor(4, Uint32)
        cute.autovec_copy(s_vectors[None, codes_at + half * 8 * _STEP_VECTORS], r_codes)
        scales = ring.s_scales.iterator + (scale_at + half * 8 * 4)
        word = cute.make_tensor(scales, cute.make_layout(1))[0]
        rows.append(([r_codes[i] for i in range(4)], registers.scale_pair(word, selector)))
    return rows


def _multiply_rows(form: Form, pair: list, read_tokens: Callable, r_sums: cute.Tensor) -> None:
    """Up to twice 16 rows of weights by all tokens for a step, MMAs of both in turn: each waits for its last.

    Args:
        pair: which MMAs, and codes and scales of this lane's two rows of each.
        read_tokens: see `fragments`.
    """
    for i in range(4):
        tokens = [read_tokens(block, i) for block in range(form.tokens // 8)]
        decoded = [
            (mma, *(registers.decoded(codes[i], scales[i // 2]) for codes, scales in rows))
            for mma, rows in pair
        ]
        for j in (0, 2):
            for mma, pairs, others in decoded:
                a = [pairs[j], others[j], pairs[j + 1], others[j + 1]]
                for block, words in enumerate(tokens):
                    sums = registers.multiply(a, words[j : j + 2], [r_sums[s, block, mma] for s in range(4)])
                    for s in range(4):
                        r_sums[s, block, mma] = sums[s]
