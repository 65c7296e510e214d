"""How the CTAs of a cluster that share a tile's K put their sums together, always in the same order.

Tensor memory has a lane for each feature and a column for each token. Token t is stored by the CTA of rank
t % split, to which the others give their sums of it through its shared memory: there it adds them up in the
order of ranks. A CTA alone goes the same way, since its warps then store neighbouring features of one token.
"""

# No annotations from __future__: the DSL reads them as types.
from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.decode_form import FEATURES, Form

WARPS = FEATURES // 32


@dataclass(frozen=True)
class Exchange:
    """Where sums meet.

    Attributes:
        s_parts: (FEATURES, slots, split) float32, from each rank those of the tokens that this CTA stores.
        filled: a barrier for the arrivals of all warps of all ranks, when they have given what they had.
        taken: one for those of the same warps, when they have read what they were given.
    """

    s_parts: cute.Tensor
    filled: cute.Pointer
    taken: cute.Pointer


def parts_layout(form: Form) -> cute.Layout:
    return cute.make_layout((FEATURES, form.slots, form.split))


def arrivals(form: Form) -> int:
    """At either barrier, before it goes on."""
    return WARPS * form.split


@cute.jit
def give(
    form: cutlass.Constexpr[Form], exchange: Exchange, r_sums: cute.Tensor, begin: cutlass.Constexpr[int],
    count: Int32, rank: Int32, feature: Int32,
):  # fmt: skip
    """Hand a feature's sums of some tokens to those who store them.

    Args:
        r_sums: of the tokens from `begin` on.
        count: of the tile's tokens; what is behind them goes nowhere.
    """
    s_mine = exchange.s_parts[feature, None, rank]
    for owner in cutlass.range_constexpr(form.split):
        there = s_mine.iterator.toint()
        if cutlass.const_expr(form.split > 1):
            there = cute.arch.map_dsmem_ptr(s_mine.iterator, owner).toint()
        for i in cutlass.range_constexpr(cute.size(r_sums)):
            token = cutlass.const_expr(begin + i)
            if cutlass.const_expr(token % form.split == owner):
                slot = cutlass.const_expr(token // form.split)
                if token < count:
                    if cutlass.const_expr(form.split > 1):
                        _store_remote(there, slot * FEATURES * 4, r_sums[i])
                    else:
                        s_mine[slot] = r_sums[i]


def _store_remote(address: Int32, offset: int, value: Float32):
    cute.arch.inline_ptx(
        f"st.shared::cluster.b32 [{{$r0}}+{offset}], {{$r1}};", read_only_args=[address, ptx.bits(value)]
    )


@cute.jit
def arrive(form: cutlass.Constexpr[Form], barrier: cute.Pointer):
    """This warp's arrival at every rank's barrier, behind all that its lanes have written and read."""
    cute.arch.sync_warp()
    lane = cute.arch.lane_idx()
    if lane < form.split:
        if cutlass.const_expr(form.split > 1):
            there = cute.arch.map_dsmem_ptr(barrier, lane).toint()
            cute.arch.inline_ptx(
                "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{$r0}];", read_only_args=[there]
            )
        else:
            cute.arch.mbarrier_arrive(barrier)


@cute.jit
def wait(form: cutlass.Constexpr[Form], barrier: cute.Pointer, phase: Int32):
    """Until a phase is over; then what others did before they arrived is done for this thread too."""
    if cutlass.const_expr(form.split > 1):
        # The DSL's own wait hears of the same CTA's threads alone.
        there = barrier.toint()
        done = _asked(there, phase)
        while done == 0:
            done = _asked(there, phase)
    else:
        cute.arch.mbarrier_wait(barrier, phase)


def _asked(address: Int32, phase: Int32) -> Int32:
    return cute.arch.inline_ptx(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [{$r0}], {$r1}; "
        "selp.b32 {$w0}, 1, 0, p; }",
        write_only_types=[Int32],
        read_only_args=[address, phase],
    )


@cute.jit
def total(
    form: cutlass.Constexpr[Form], exchange: Exchange, feature: Int32, slot: Int32, r_total: cute.Tensor
):
    """A token's sums of neighbouring features, rank after rank.

    Args:
        feature: the first one, a multiple of their number.
        r_total: what is filled in.
    """
    count = cutlass.const_expr(cute.size(r_total))
    r_part = cute.make_rmem_tensor(count, Float32)
    for rank in cutlass.range_constexpr(form.split):
        place = exchange.s_parts.iterator + ((rank * form.slots + slot) * FEATURES + feature)
        s_part = cute.make_tensor(place.align(4 * count), cute.make_layout(count))
        cute.autovec_copy(s_part, r_part)
        for i in cutlass.range_constexpr(count):
            r_total[i] = r_part[i] if rank == 0 else ptx.add(r_total[i], r_part[i])
