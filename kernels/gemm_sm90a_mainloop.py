"""The way of operands: TMA brings tiles to a ring of stages in shared memory, warpgroups multiply them.

Operands are swapped: weights are the first operand of an MMA and come from registers, dequantized there, see
gemm_sm90a_dequantize; tokens in bf16 are the second one and come from shared memory. Where codes, tokens or
scales end within a tile, TMA fills in zeros.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from dsv4lab.kernels.gemm_sm90a_dequantize import Place, keep, load, scale, spread
from dsv4lab.kernels.gemm_sm90a_form import CHUNK_BYTES, GROUP_FEATURES, SCALE_ROWS, SLICE, Form
from dsv4lab.kernels.gemm_tiles import Tile

CODES, TOKEN, SUM = cutlass.Uint8, cutlass.BFloat16, cutlass.Float32
_WORDS = CHUNK_BYTES // 4
_KINDS = {
    32: warpgroup.SmemLayoutAtomKind.K_SW32,
    64: warpgroup.SmemLayoutAtomKind.K_SW64,
    128: warpgroup.SmemLayoutAtomKind.K_SW128,
}


@dataclass(frozen=True)
class Operands:
    """Tokens, codes and block scales of weights, in this order.

    Attributes:
        loads: copies by TMA.
        tensors: what they read, as coordinates.
        layouts: of all stages in shared memory.
    """

    loads: list
    tensors: list
    layouts: list


@dataclass(frozen=True)
class Ring:
    """Stages in shared memory.

    Attributes:
        s_tokens: (rows, 64, 64s of K of all stages).
        s_codes: (features, bytes, stages).
        s_scales: (words, chunks of a stage, 1, stages).
        full, free: a barrier for each stage: filled, and read by all warps that multiply with it.
    """

    s_tokens: cute.Tensor
    s_codes: cute.Tensor
    s_scales: cute.Tensor
    full: cute.Pointer
    free: cute.Pointer


def tiled_mma(form: Form) -> cute.TiledMma:
    """The MMA of a warpgroup."""
    major = OperandMajorMode.K
    return hopper_helpers.make_trivial_tiled_mma(
        TOKEN, TOKEN, major, major, SUM, (1, 1, 1), (GROUP_FEATURES, form.rows),
        warpgroup.OperandSource.RMEM,
    )  # fmt: skip


def arrivals(form: Form) -> int:
    """At the barrier of a stage that was read: of all warps that multiply."""
    return 4 * form.all_warpgroups


@cute.jit
def operands(form: cutlass.Constexpr[Form], pointers: list, rows: Int32, n: Int32, k: Int32, groups: Int32):
    """Descriptors for TMA.

    Args:
        pointers: tokens (rows, k), codes (groups, n, k / 2) and swizzled block scales; k is a multiple of 32.
    """
    tokens, codes, scales = pointers
    k = cute.assume(k, 32)
    nbytes = cute.assume(k // 2, 16)
    m_tokens = cute.make_tensor(
        cute.recast_ptr(tokens, dtype=TOKEN), cute.make_layout((rows, k), stride=(k, 1))
    )
    m_codes = cute.make_tensor(
        cute.recast_ptr(codes, dtype=CODES),
        cute.make_layout((n, nbytes, groups), stride=(nbytes, 1, cute.assume(Int64(n) * nbytes, 16))),
    )
    depth, blocks = cute.ceil_div(k, SLICE), cute.ceil_div(n, SCALE_ROWS) * groups
    m_scales = cute.make_tensor(
        cute.recast_ptr(scales, dtype=Int32),
        cute.make_layout((_WORDS, depth, blocks), stride=(1, _WORDS, Int64(_WORDS) * depth)),
    )
    s_tokens = hopper_helpers.make_smem_layout_b(
        LayoutEnum.ROW_MAJOR, (GROUP_FEATURES, form.rows, SLICE), TOKEN, form.stages * form.slices
    )
    atom = warpgroup.make_smem_layout_atom(_KINDS[form.code_bytes], CODES)
    s_codes = cute.tile_to_shape(atom, (form.features, form.code_bytes, form.stages), order=(0, 1, 2))
    s_scales = cute.make_layout((_WORDS, form.slices, 1, form.stages))
    one = cpasync.CopyBulkTensorTileG2SOp()
    infos = [
        cpasync.make_tiled_tma_atom(
            one, m_tokens, cute.slice_(s_tokens, (None, None, 0)), (form.rows, SLICE)
        ),
        cpasync.make_tiled_tma_atom(
            one, m_codes, cute.slice_(s_codes, (None, None, 0)), (form.features, form.code_bytes)
        ),
        cpasync.make_tiled_tma_atom(
            one, m_scales, cute.slice_(s_scales, (None, None, None, 0)), (_WORDS, form.slices, 1)
        ),
    ]  # fmt: skip
    loads, tensors = [info.atom for info in infos], [info.tma_tensor for info in infos]
    return Operands(loads, tensors, [s_tokens, s_codes, s_scales])


@cute.jit
def stages_of(form: cutlass.Constexpr[Form], share: Int32, k: Int32):
    """First and last stage along K that a CTA with this share multiplies."""
    steps = cute.ceil_div(k, form.depth)
    if cutlass.const_expr(form.split > 1):
        return steps * share // form.split, steps * (share + 1) // form.split
    return Int32(0), steps


@cute.jit
def load_tile(
    form: cutlass.Constexpr[Form], given: Operands, ring: Ring, tile: Tile, columns: Int32, begins: Int32,
    ends: Int32, stage: Int32, phase: Int32,
):  # fmt: skip
    """Bring the operands of a tile, stage after stage.

    Args:
        columns: chunks of block scales of a group.
        begins, ends: stages along K.
        stage, phase: of the ring, where the first ones go; gives those that are next.
    """
    m_tokens, m_codes, m_scales = given.tensors
    g_tokens = cute.local_tile(cute.domain_offset((tile.row, 0), m_tokens), (form.rows, SLICE), (0, None))
    g_codes = cute.local_tile(m_codes, (form.features, form.code_bytes), (tile.column, None, tile.group))
    block = tile.group * columns + tile.column * form.features // SCALE_ROWS
    g_scales = cute.local_tile(m_scales, (_WORDS, form.slices, 1), (0, None, block))
    s_tokens, g_tokens = _partition(given.loads[0], ring.s_tokens, g_tokens, 2)
    s_codes, g_codes = _partition(given.loads[1], ring.s_codes, g_codes, 2)
    s_scales, g_scales = _partition(given.loads[2], ring.s_scales, g_scales, 3)
    for i in cutlass.range(begins, ends, unroll=1):
        full = ring.full + stage
        # Phases of a barrier are 0, 1, 0, ...; before the first one, waiting for 1 does not wait.
        wait(ring.free + stage, phase ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, form.stage_bytes)
        cute.copy(given.loads[1], g_codes[None, i], s_codes[None, stage], tma_bar_ptr=full)
        cute.copy(given.loads[2], g_scales[None, i], s_scales[None, stage], tma_bar_ptr=full)
        for j in cutlass.range_constexpr(form.slices):
            cute.copy(
                given.loads[0], g_tokens[None, i * form.slices + j], s_tokens[None, stage * form.slices + j],
                tma_bar_ptr=full,
            )  # fmt: skip
        stage, phase = _next(form, stage, phase)
    return stage, phase


@cute.jit
def _next(form: cutlass.Constexpr[Form], stage: Int32, phase: Int32):
    stage += 1
    if stage == form.stages:
        stage = Int32(0)
        phase ^= 1
    return stage, phase


def _partition(load, s_tensor: cute.Tensor, g_tensor: cute.Tensor, modes: int):
    """Boxes in shared and in global memory: (box, ...)."""
    return cpasync.tma_partition(
        load, 0, cute.make_layout(1), cute.group_modes(s_tensor, 0, modes),
        cute.group_modes(g_tensor, 0, modes),
    )  # fmt: skip


@cute.jit
def multiply_tile(
    form: cutlass.Constexpr[Form], mma: cute.TiledMma, ring: Ring, at: Place, r_sums: cute.Tensor,
    part_of_stage: Int32, steps: Int32, stage: Int32, phase: Int32, never: Int32,
):  # fmt: skip
    """Multiply the stages of a tile; while MMAs run, the operands of the next ones are dequantized.

    Args:
        part_of_stage: which this warpgroup multiplies.
        steps: stages.
        stage, phase: of the ring, where the first one is; gives those that are next.
        never: see `keep`.
    """
    r_tokens = mma.make_fragment_B(mma.get_slice(0).partition_B(ring.s_tokens))
    mma.set(warpgroup.Field.ACCUMULATE, False)
    r_spread = cute.make_rmem_tensor(16, Uint32)
    r_weights = cute.make_rmem_tensor(mma.partition_shape_A((GROUP_FEATURES, SLICE)), TOKEN)
    r_words = cute.recast_tensor(r_weights, Uint32)
    r_words = cute.make_tensor(r_words.iterator, r_spread.layout)
    r_words.fill(0)
    first, before = part_of_stage * form.own_slices, stage
    for i in cutlass.range(steps, unroll=1):
        wait(ring.full + stage, phase)
        for part in cutlass.range_constexpr(form.own_slices):
            r_codes, scales = load(form, at, stage, part)
            spread(at, r_codes, r_spread)
            keep(r_spread, never, at.scales)
            keep(scales, never, at.scales)
            warpgroup.wait_group(0)
            keep(r_words, never, at.scales)
            if cutlass.const_expr(part == 0) and i > 0:
                release(ring, before)
            scale(r_spread, scales, r_words)
            warpgroup.fence()
            for step in cutlass.range_constexpr(cute.size(r_tokens, mode=[2])):
                where = (None, None, step, stage * form.slices + first + part)
                cute.gemm(mma, r_sums, r_weights[None, None, step], r_tokens[where], r_sums)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        before = stage
        stage, phase = _next(form, stage, phase)
    warpgroup.wait_group(0)
    keep(r_words, never, at.scales)
    if steps > 0:
        release(ring, before)
    return stage, phase


@cute.jit
def release(ring: Ring, stage: Int32):
    """This warp has read a stage."""
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(ring.free + stage)


@cute.jit
def wait(barrier: cute.Pointer, phase: Int32):
    """Until a phase is over, without the DSL's sleep, which took 1 to 3 % longer."""
    address = barrier.toint()
    done = _asked(address, phase)
    while done == 0:
        done = _asked(address, phase)


def _asked(address: Int32, phase: Int32) -> Int32:
    return cute.arch.inline_ptx(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{$r0}], {$r1}; "
        "selp.b32 {$w0}, 1, 0, p; }",
        write_only_types=[Int32],
        read_only_args=[address, phase],
    )
