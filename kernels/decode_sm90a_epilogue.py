"""How sums of few tokens become what is stored: those of all warps and of all CTAs of a cluster are added up.

Every warp leaves its sums in shared memory. Threads add up those of four neighbouring features of a token,
one warp along K after the other. Where CTAs share a tile, they give what they have to the CTA that stores it,
which adds it up rank after rank: always in the same order, so that results repeat bit for bit.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.decode_exchange import arrive, wait
from dsv4lab.kernels.decode_sm90a_form import MMA_ROWS, Form
from dsv4lab.kernels.decode_sm90a_store import Outputs, parts, place_of, store_part
from dsv4lab.kernels.gemm_epilogue import Factors
from dsv4lab.kernels.gemm_tiles import Tile, Work

_QUAD = 4  # neighbouring features that a thread adds up at a time


@dataclass(frozen=True)
class Exchange:
    """Where sums meet.

    Attributes:
        parts: floats, of each warp along K and token form.pitch.
        given: floats, of each rank and slot form.unit.
        filled, taken: barriers of a cluster, see decode_exchange.
    """

    parts: cute.Pointer
    given: cute.Pointer
    filled: cute.Pointer
    taken: cute.Pointer


@cute.jit
def finish_tile(
    form: cutlass.Constexpr[Form], work: Work, tile: Tile, rank: Int32, phase: Int32, r_sums: cute.Tensor,
    exchange: Exchange, factors: Factors, out: Outputs,
):  # fmt: skip
    """Add up and store a tile; all warps that multiply come here.

    Args:
        rank: of this CTA among those that share the tile.
        phase: 0 for the first tile, 1 for the next one, 0, ...
        r_sums: (4, form.tokens / 8, form.mmas), of this warp.
    """
    count = cutlass.min(tile.left, form.tokens)
    # Nobody still reads what the tile before left.
    _meet(form)
    _leave(form, count, r_sums, exchange.parts)
    _meet(form)
    if cutlass.const_expr(form.split > 1):
        wait(form, exchange.taken, phase ^ 1)
        _give(form, count, rank, exchange)
        arrive(form, exchange.filled)
        wait(form, exchange.filled, phase)
    thread, _, _ = cute.arch.thread_idx()
    threads = cutlass.const_expr(32 * form.warps)
    all_parts = (count * form.units - rank + form.split - 1) // form.split * parts(form)
    for first in cutlass.range(0, all_parts, threads, unroll=1):
        number = first + thread
        here = number < all_parts
        unit = number // parts(form) * form.split + rank
        token, part = unit // form.units, unit % form.units * parts(form) + number % parts(form)
        if not here:
            token, part = Int32(0), Int32(0)
        row = place_of(form, part)
        r_first, r_second = cute.make_rmem_tensor(_QUAD, Float32), cute.make_rmem_tensor(_QUAD, Float32)
        _total(form, exchange, token, row, r_first)
        if cutlass.const_expr(form.output != "bf16"):
            _total(form, exchange, token, row + MMA_ROWS // 2, r_second)
        store_part(form, work, tile, factors, out, token, part, here, r_first, r_second)
    if cutlass.const_expr(form.split > 1):
        arrive(form, exchange.taken)


def _meet(form: Form) -> None:
    """All warps but the one that loads."""
    cute.arch.barrier(barrier_id=1, number_of_threads=32 * form.warps)


@cute.jit
def _leave(form: cutlass.Constexpr[Form], count: Int32, r_sums: cute.Tensor, parts: cute.Pointer):
    """This warp's sums of real tokens: lane 4 i + j has features i and i + 8 of tokens 2 j and 2 j + 1."""
    lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
    turn, row = warp // form.across, warp % form.across * (MMA_ROWS * form.mmas) + (lane >> 2)
    for block in cutlass.range_constexpr(form.tokens // 8):
        for odd in cutlass.range_constexpr(2):
            token = block * 8 + (lane & 3) * 2 + odd
            begin = parts + ((turn * form.tokens + token) * form.pitch + row)
            s_sums = cute.make_tensor(begin, cute.make_layout(form.features))
            if token < count:
                for mma in cutlass.range_constexpr(form.mmas):
                    for half in cutlass.range_constexpr(2):
                        s_sums[MMA_ROWS * mma + 8 * half] = r_sums[2 * half + odd, block, mma]


@cute.jit
def _give(form: cutlass.Constexpr[Form], count: Int32, rank: Int32, exchange: Exchange):
    """Hand all sums of this CTA to those that store them."""
    quads = cutlass.const_expr(form.features // _QUAD)
    thread, _, _ = cute.arch.thread_idx()
    for number in cutlass.range(thread, count * quads, 32 * form.warps, unroll=1):
        token, row = number // quads, number % quads * _QUAD
        r_total = cute.make_rmem_tensor(_QUAD, Float32)
        _add_warps(form, exchange, token, row, r_total)
        unit = token * form.units + row // form.unit
        slot, owner = unit // form.split, unit % form.split
        here = exchange.given + ((rank * form.slots + slot) * form.unit + row % form.unit)
        there = cute.arch.map_dsmem_ptr(here, owner).toint()
        words = [ptx.bits(r_total[i]) for i in range(_QUAD)]
        cute.arch.inline_ptx(
            "st.shared::cluster.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[there, *words],
        )


@cute.jit
def _total(form: cutlass.Constexpr[Form], exchange: Exchange, token: Int32, row: Int32, r_total: cute.Tensor):
    """Four features' sums of a token, of all that was left or given."""
    if cutlass.const_expr(form.split == 1):
        _add_warps(form, exchange, token, row, r_total)
    else:
        slot = (token * form.units + row // form.unit) // form.split
        quad = slot * (form.unit // _QUAD) + row % form.unit // _QUAD
        _add(exchange.given, quad, form.slots * form.unit // _QUAD, form.split, r_total)


def _add_warps(form: Form, exchange: Exchange, token: Int32, row: Int32, r_total: cute.Tensor) -> None:
    quad = token * (form.pitch // _QUAD) + row // _QUAD
    _add(exchange.parts, quad, form.tokens * form.pitch // _QUAD, form.along, r_total)


def _add(begin: cute.Pointer, quad: Int32, step: int, count: int, r_total: cute.Tensor) -> None:
    """Four floats at each of so many places, one after the other."""
    r_part = cute.make_rmem_tensor(_QUAD, Float32)
    quads = cute.make_tensor(begin, cute.make_layout((_QUAD, step * count)))
    for i in range(count):
        cute.autovec_copy(quads[None, quad + i * step], r_part)
        for j in range(_QUAD):
            r_total[j] = r_part[j] if i == 0 else ptx.add(r_total[j], r_part[j])
