"""How those who share a tile's K put their sums together, always in the same order.

They are CTAs of a cluster, and in each CTA perhaps two sets of warpgroups. Each of them stores some of the
tile's tokens, to whom the others give their sums of these through its shared memory. They stand there where
the ring of stages was: all have read their last stage before.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Float32, Int32, Uint32, cute
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.gemm_sm90a_form import Form

VECTOR = 4  # sums that a thread has of 8 tokens: of two features, two tokens each


@cute.jit
def meet(form: cutlass.Constexpr[Form]):
    """All threads of the cluster come here."""
    if cutlass.const_expr(form.split > 1):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


def parts_layout(form: Form) -> cute.Layout:
    """Sums by (one of a thread's four, thread, 8 tokens of those that are stored here, giver, taker)."""
    return cute.make_layout((VECTOR, 128 * form.warpgroups, form.stored // 8, form.shares, form.halves))


@cute.jit
def give(form: cutlass.Constexpr[Form], s_parts: cute.Tensor, r_sums: cute.Tensor, share: Int32):
    """Hand this thread's sums to those who store them.

    Args:
        r_sums: (4 rows / 8,) of all tokens of the tile.
        share: of K, that they are of.
    """
    thread, _, _ = cute.arch.thread_idx()
    for owner in cutlass.range_constexpr(form.shares):
        mine = s_parts[None, thread % (128 * form.warpgroups), None, share, owner % form.halves]
        there = mine.iterator.toint()
        if cutlass.const_expr(form.split > 1):
            there = cute.arch.map_dsmem_ptr(mine.iterator, owner // form.halves).toint()
        for i in cutlass.range_constexpr(form.stored // 8):
            words = [ptx.bits(r_sums[(owner * (form.stored // 8) + i) * VECTOR + j]) for j in range(VECTOR)]
            _store(form, there, i * 128 * form.warpgroups * VECTOR * 4, words)


def _store(form: Form, address: Int32, offset: int, words: list[Uint32]):
    where = "cluster" if form.split > 1 else "cta"
    cute.arch.inline_ptx(
        f"st.shared::{where}.v4.b32 [{{$r0}}+{offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
        read_only_args=[address, *words],
    )


@cute.jit
def total(form: cutlass.Constexpr[Form], s_parts: cute.Tensor, taker: Int32, r_total: cute.Tensor):
    """This thread's sums of the tokens that are stored here, share after share.

    Args:
        taker: which of those in this CTA.
        r_total: (4 stored / 8,), what is filled in.
    """
    thread, _, _ = cute.arch.thread_idx()
    r_part = cute.make_rmem_tensor(VECTOR, Float32)
    for i in cutlass.range_constexpr(form.stored // 8):
        for share in cutlass.range_constexpr(form.shares):
            part = s_parts[None, thread % (128 * form.warpgroups), i, share, taker]
            cute.autovec_copy(cute.make_tensor(part.iterator.align(16), part.layout), r_part)
            for j in cutlass.range_constexpr(VECTOR):
                at = cutlass.const_expr(i * VECTOR + j)
                r_total[at] = r_part[j] if share == 0 else ptx.add(r_total[at], r_part[j])
