"""How the CTAs of a cluster that share a tile's K put their sums together, always in the same order.

Each of them stores some of the tile's tokens, to whom the others give their sums of these through its shared
memory. They stand there where the ring of stages was: every CTA has read its last stage before.
"""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Float32, Int32, Uint32, cute
from dsv4lab.kernels import quantize_ptx as ptx
from dsv4lab.kernels.gemm_sm90a_form import Form

VECTOR = 4  # sums that a thread has of 8 tokens: of two features, two tokens each


def meet():
    """All threads of the cluster come here."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


def parts_layout(form: Form) -> cute.Layout:
    """Sums by (one of a thread's four, thread, 8 tokens of those that are stored here, rank)."""
    return cute.make_layout((VECTOR, 128 * form.warpgroups, form.stored // 8, form.split))


@cute.jit
def give(form: cutlass.Constexpr[Form], s_parts: cute.Tensor, r_sums: cute.Tensor, rank: Int32):
    """Hand this thread's sums to those who store them.

    Args:
        r_sums: (4 rows / 8,) of all tokens of the tile.
    """
    thread, _, _ = cute.arch.thread_idx()
    mine = s_parts[None, thread, None, rank]
    for owner in cutlass.range_constexpr(form.split):
        there = cute.arch.map_dsmem_ptr(mine.iterator, owner).toint()
        for i in cutlass.range_constexpr(form.stored // 8):
            words = [ptx.bits(r_sums[(owner * (form.stored // 8) + i) * VECTOR + j]) for j in range(VECTOR)]
            _store_remote(there, i * 128 * form.warpgroups * VECTOR * 4, words)


def _store_remote(address: Int32, offset: int, words: list[Uint32]):
    cute.arch.inline_ptx(
        f"st.shared::cluster.v4.b32 [{{$r0}}+{offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};",
        read_only_args=[address, *words],
    )


@cute.jit
def total(form: cutlass.Constexpr[Form], s_parts: cute.Tensor, r_total: cute.Tensor):
    """This thread's sums of the tokens that are stored here, rank after rank.

    Args:
        r_total: (4 stored / 8,), what is filled in.
    """
    thread, _, _ = cute.arch.thread_idx()
    r_part = cute.make_rmem_tensor(VECTOR, Float32)
    for i in cutlass.range_constexpr(form.stored // 8):
        for rank in cutlass.range_constexpr(form.split):
            part = s_parts[None, thread, i, rank]
            cute.autovec_copy(cute.make_tensor(part.iterator.align(16), part.layout), r_part)
            for j in cutlass.range_constexpr(VECTOR):
                at = cutlass.const_expr(i * VECTOR + j)
                r_total[at] = r_part[j] if rank == 0 else ptx.add(r_total[at], r_part[j])
