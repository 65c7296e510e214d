"""The two warps that multiply tiles of few tokens: one has operands brought to shared memory, one multiplies.

The weights' rows are the M of the MMA and the tokens its N, so that a tile is 128 features of 8 to 128 tokens
and no lane of tensor memory is spent on a token that is not there. What is loaded are weights above all: each
of their bytes once for every block of tokens.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout
from dsv4lab.kernels.decode_form import CHUNK_BYTES, CHUNKS, DEPTH, FEATURES, Form
from dsv4lab.kernels.gemm_tiles import Tile, Work, begin, find

from dsv4lab.formats import BLOCK

CODE, SCALE, SUM = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32
# Block scales are loaded as words: those of 4 columns of a row, as the MMA takes them for 64 of K.
_WORDS, _ROW_WORDS, _CHUNK_ROWS = CHUNK_BYTES // 4, 4, 32


@dataclass(frozen=True)
class Operands:
    """Codes of weights and tokens, then block scales of both.

    Attributes:
        loads: copies by TMA.
        tensors: what they read, as coordinates.
        layouts: of all stages in shared memory; those of scales as the MMA sees them.
    """

    loads: list
    tensors: list
    layouts: list


def tiled_mma(form: Form) -> cute.TiledMma:
    """The MMA of a tile."""
    major, one = OperandMajorMode.K, tcgen05.CtaGroup.ONE
    return blackwell_helpers.make_blockscaled_trivial_tiled_mma(
        CODE, CODE, major, major, SCALE, BLOCK, one, form.tile[:2]
    )


@cute.jit
def operands(
    form: cutlass.Constexpr[Form], mma: cute.TiledMma, pointers: list, rows: Int32, n: Int32, k: Int32,
    groups: Int32,
):  # fmt: skip
    """Descriptors for TMA.

    Args:
        pointers: codes (rows, k / 2) of tokens and (groups, n, k / 2) of weights, then swizzled block scales
            of both; k is a multiple of 32.
    """
    tokens, weights, token_scales, weight_scales = pointers
    k = cute.assume(k, 32)
    matrix = cute.assume(Int64(n) * k, 256)
    m_weights = cute.make_tensor(weights, cute.make_layout((n, k, groups), stride=(k, 1, matrix)))
    m_tokens = cute.make_tensor(tokens, cute.make_layout((rows, k, 1), stride=(k, 1, 0)))
    depth = cute.ceil_div(k, 64)
    blocks = cute.ceil_div(n, FEATURES) * groups
    m_weight_scales = cute.make_tensor(
        cute.recast_ptr(weight_scales, dtype=Int32),
        cute.make_layout((_WORDS, depth, blocks), stride=(1, _WORDS, Int64(_WORDS) * depth)),
    )
    m_token_scales = cute.make_tensor(
        cute.recast_ptr(token_scales, dtype=Int32),
        cute.make_layout(
            (_ROW_WORDS, _CHUNK_ROWS, depth, cute.ceil_div(rows, 128)),
            stride=(1, _ROW_WORDS, _WORDS, Int64(_WORDS) * depth),
        ),
    )
    layouts = [
        blackwell_helpers.make_smem_layout_a(mma, form.tile, CODE, form.stages),
        blackwell_helpers.make_smem_layout_b(mma, form.tile, CODE, form.stages),
        blockscaled_layout.make_smem_layout_sfa(mma, form.tile, BLOCK, form.stages),
        blockscaled_layout.make_smem_layout_sfb(mma, form.tile, BLOCK, form.stages),
    ]
    op, alone = cpasync.CopyBulkTensorTileG2SOp(), (1, 1, 1, 1)
    stage = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts[:2]]
    boxes = [cute.make_layout(shape) for shape in _scale_boxes()]
    infos = [
        cute.nvgpu.make_tiled_tma_atom_A(op, m_weights, stage[0], form.tile, mma, alone),
        cute.nvgpu.make_tiled_tma_atom_B(op, m_tokens, stage[1], form.tile, mma, alone),
        cpasync.make_tiled_tma_atom(op, m_weight_scales, boxes[0], boxes[0].shape),
        cpasync.make_tiled_tma_atom(op, m_token_scales, boxes[1], boxes[1].shape),
    ]
    return Operands([info.atom for info in infos], [info.tma_tensor for info in infos], layouts)


def _scale_boxes() -> tuple[tuple[int, ...], ...]:
    """Words of a stage's block scales, of weights and of tokens."""
    return (_WORDS, CHUNKS, 1), (_ROW_WORDS, _CHUNK_ROWS, CHUNKS, 1)


@cute.jit
def share(form: cutlass.Constexpr[Form], rank: Int32, k: Int32):
    """First and last stage along K that the CTA of this rank multiplies."""
    steps = cute.ceil_div(k, DEPTH)
    return steps * rank // form.split, steps * (rank + 1) // form.split


@cute.jit
def load_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, rank: Int32, mma: cute.TiledMma,
    given: Operands, s_tensors: list, ring: pipeline.PipelineTmaUmma, k: Int32,
):  # fmt: skip
    """Bring this CTA's share of the operands of every tile, stage after stage.

    Args:
        first, step: numbers of the tiles.
        rank: of this CTA among those that share a tile.
    """
    for load in given.loads:
        cpasync.prefetch_descriptor(load)
    part = mma.get_slice(0)
    m_weights, m_tokens, m_weight_scales, m_token_scales = given.tensors
    g_weights = part.partition_A(cute.local_tile(m_weights, (FEATURES, DEPTH), (None, None, None)))
    g_tokens = part.partition_B(cute.local_tile(m_tokens, (form.tokens, DEPTH), (None, None, 0)))
    box, token_box = _scale_boxes()
    g_weight_scales = cute.local_tile(m_weight_scales, box, (0, None, None))
    s_weights, g_weights = _partition(given.loads[0], s_tensors[0], g_weights, 3)
    s_tokens, g_tokens = _partition(given.loads[1], s_tensors[1], g_tokens, 3)
    s_words = _words(s_tensors[2], box, form.stages)
    s_weight_scales, g_weight_scales = _partition(given.loads[2], s_words, g_weight_scales, 3)
    s_words = _words(s_tensors[3], token_box, form.stages)

    state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, form.stages)
    begins, ends = share(form, rank, k)
    tile, seen = find(work, form, begin(work, form), first)
    number = first
    while tile.here:
        # A tile that begins within 32 rows of scales has them moved to the front, and zeros behind them.
        moved = tile.row % _CHUNK_ROWS
        g_token_scales = cute.local_tile(
            cute.domain_offset((0, moved, 0, 0), m_token_scales), token_box, (0, 0, None, tile.row // 128)
        )
        s_token_scales, g_token_scales = _partition(given.loads[3], s_words, g_token_scales, 4)
        block = tile.group * work.columns + tile.column
        for i in cutlass.range(begins, ends, unroll=1):
            ring.producer_acquire(state)
            full = ring.producer_get_barrier(state)
            at = (None, state.index)
            cute.copy(
                given.loads[0], g_weights[None, tile.column, i, tile.group], s_weights[at], tma_bar_ptr=full
            )
            cute.copy(given.loads[2], g_weight_scales[None, i, block], s_weight_scales[at], tma_bar_ptr=full)
            cute.copy(
                given.loads[1], g_tokens[None, tile.row // form.tokens, i], s_tokens[at], tma_bar_ptr=full
            )
            cute.copy(given.loads[3], g_token_scales[None, i], s_token_scales[at], tma_bar_ptr=full)
            state.advance()
        number += step
        tile, seen = find(work, form, seen, number)
    ring.producer_tail(state)


def _words(s_scales: cute.Tensor, box: tuple[int, ...], stages: int) -> cute.Tensor:
    """Block scales of all stages as the words that TMA writes."""
    layout = cute.append(cute.make_layout(box), cute.make_layout(stages, stride=CHUNKS * _WORDS))
    return cute.make_tensor(cute.recast_ptr(s_scales.iterator, dtype=Int32), layout)


def _partition(load, s_tensor: cute.Tensor, g_tensor: cute.Tensor, modes: int):
    """Boxes in shared and in global memory: (box, ...)."""
    return cpasync.tma_partition(
        load, 0, cute.make_layout(1), cute.group_modes(s_tensor, 0, modes),
        cute.group_modes(g_tensor, 0, modes),
    )  # fmt: skip


@cute.jit
def multiply_tiles(
    form: cutlass.Constexpr[Form], work: Work, first: Int32, step: Int32, rank: Int32, mma: cute.TiledMma,
    s_tensors: list, t_sums: cute.Tensor, t_base: cute.Pointer, ring: pipeline.PipelineTmaUmma,
    results: pipeline.PipelineUmmaAsync, k: Int32,
):  # fmt: skip
    """Multiply this CTA's share of every tile, in one accumulator and the other in turn.

    Args:
        t_sums: both accumulators (..., 2).
        t_base: where tensor memory begins.
    """
    s_weights, s_tokens, s_weight_scales, s_token_scales = s_tensors
    r_weights, r_tokens = mma.make_fragment_A(s_weights), mma.make_fragment_B(s_tokens)
    stage = [cute.slice_(s_scales.layout, (None, None, None, 0)) for s_scales in s_tensors[2:]]
    weight_layout = blockscaled_layout.make_tmem_layout_sfa(mma, form.tile, BLOCK, stage[0])
    token_layout = blockscaled_layout.make_tmem_layout_sfb(mma, form.tile, BLOCK, stage[1])
    t_weight_scales = _scales(t_base, form.weight_column, weight_layout)
    t_token_scales = _scales(t_base, form.token_column, token_layout)
    copy_weight, weight_from, weight_to = _to_tensor_memory(s_weight_scales, t_weight_scales)
    copy_token, token_from, token_to = _to_tensor_memory(s_token_scales, t_token_scales)

    read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, form.stages)
    write = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 2)
    begins, ends = share(form, rank, k)
    tile, seen = find(work, form, begin(work, form), first)
    number = first
    while tile.here:
        into = t_sums[None, None, None, write.index]
        t_tile_scales = _scales(t_base, form.token_column + _scale_column(tile), token_layout)
        results.producer_acquire(write)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for _ in cutlass.range(begins, ends, unroll=1):
            ring.consumer_wait(read)
            slot = (None, None, None, None, read.index)
            cute.copy(copy_weight, weight_from[slot], weight_to)
            cute.copy(copy_token, token_from[slot], token_to)
            for i in cutlass.range_constexpr(cute.size(r_weights, mode=[2])):
                mma.set(tcgen05.Field.SFA, t_weight_scales[None, None, i].iterator)
                mma.set(tcgen05.Field.SFB, t_tile_scales[None, None, i].iterator)
                at = (None, None, i, read.index)
                cute.gemm(mma, into, r_weights[at], r_tokens[at], into)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            ring.consumer_release(read)
            read.advance()
        results.producer_commit(write)
        write.advance()
        number += step
        tile, seen = find(work, form, seen, number)


def _scale_column(tile: Tile) -> Int32:
    """Where the scales of a tile's first token are: columns hold those of 32 rows each."""
    return tile.row % 128 // _CHUNK_ROWS


def _scales(t_base: cute.Pointer, column, layout: cute.Layout) -> cute.Tensor:
    return cute.make_tensor(cute.recast_ptr(t_base + column, dtype=SCALE), layout)


def _to_tensor_memory(s_scales: cute.Tensor, t_scales: cute.Tensor):
    """A `tcgen05.cp` of a stage's scales, with its sources (..., stages) and its target."""
    # That 16 values share a scale is a stride of 0 in these layouts, which a copy must not follow.
    s_scales, t_scales = cute.filter_zeros(s_scales), cute.filter_zeros(t_scales)
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), SCALE)
    copy = tcgen05.make_s2t_copy(atom, t_scales)
    source = tcgen05.get_s2t_smem_desc_tensor(copy, copy.get_slice(0).partition_S(s_scales))
    return copy, source, copy.get_slice(0).partition_D(t_scales)
