"""Sums and maxima of rows by a block: shuffles in a warp, shared memory between warps."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory

from .case import Buffer, Case, integers, normal, output

WARPS = 4
THREADS = 32 * WARPS


@cute.kernel
def _reduce(x: cute.Tensor, total: cute.Tensor, largest: cute.Tensor, forget_barrier: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    smem = memory.SmemAllocator()
    sums = smem.allocate_tensor(total.element_type, cute.make_layout(WARPS), 16)
    highs = smem.allocate_tensor(largest.element_type, cute.make_layout(WARPS), 16)
    part = total.element_type(0)
    high = x[row, 0]
    for i in cutlass.range(thread, x.shape[1], THREADS, unroll=1):
        part += x[row, i].to(total.element_type)
        high = cutlass.max(high, x[row, i])
    for step in cutlass.range_constexpr(5):
        part += cute.arch.shuffle_sync_bfly(part, 16 >> step)
        high = cutlass.max(high, cute.arch.shuffle_sync_down(high, 16 >> step))
    if lane == 0:
        sums[warp] = part
        highs[warp] = high
    if cutlass.const_expr(not forget_barrier):
        cute.arch.sync_threads()
    if warp == 0:
        part = total.element_type(0)
        high = highs[0]
        if lane < WARPS:
            part = sums[lane]
            high = highs[lane]
        for step in cutlass.range_constexpr(2):
            part += cute.arch.shuffle_sync_bfly(part, 2 >> step)
            high = cutlass.max(high, cute.arch.shuffle_sync_bfly(high, 2 >> step))
        if lane == 0:
            total[row] = part
            largest[row] = high


@cute.jit
def reduce_rows(
    x: cute.Tensor, total: cute.Tensor, largest: cute.Tensor, forget_barrier: cutlass.Constexpr = False
):
    """The sum and the largest element of each row of x (M, N)."""
    _reduce(x, total, largest, forget_barrier).launch(grid=(x.shape[0], 1, 1), block=(THREADS, 1, 1))


def case(dtype: torch.dtype, rows: int, columns: int, forget_barrier: bool = False) -> Case:
    """float32 rows are summed in some order of N - 1 additions, integers exactly."""
    if dtype.is_floating_point:
        x = normal((rows, columns), dtype)
        exact = x.double().sum(1)
        # Each of the N - 1 additions rounds by at most 2**-24 of a sum that is at most sum(|x|).
        bound = (columns - 1) * 2.0**-24 * x.double().abs().sum(1)
        total = output(exact.float(), bound, passed="dynamic", align=4)
    else:
        x = integers((rows, columns), -1000, 1000, dtype)
        total = output(x.sum(1, dtype=dtype), passed="dynamic", align=4)
    largest = output(x.max(1).values, passed="dynamic", align=4)
    return Case(
        reduce_rows,
        (Buffer(x, passed="dynamic", align=4), total, largest),
        {"forget_barrier": forget_barrier},
    )


@cute.kernel
def _votes(x: cute.Tensor, out: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    value = x[thread]
    odd = value % 2 != 0
    out[thread, 0] = cute.arch.vote_ballot_sync(odd)
    out[thread, 1] = cutlass.Int32(cute.arch.vote_any_sync(value > 90))
    out[thread, 2] = cutlass.Int32(cute.arch.vote_all_sync(value >= 0))
    out[thread, 3] = cute.arch.warp_redux_sync(value, "add")
    out[thread, 4] = cute.arch.warp_redux_sync(value, "min")
    out[thread, 5] = cute.arch.warp_redux_sync(value, "xor")
    out[thread, 6] = cute.arch.match_sync(0xFFFFFFFF, value)
    out[thread, 7] = cute.arch.shuffle_sync_up(value, 3, mask_and_clamp=0)
    out[thread, 8] = cute.arch.shuffle_sync(value, (thread * 7) % 32)
    out[thread, 9] = cute.arch.popc(value)
    out[thread, 10] = cute.arch.clz(value)
    out[thread, 11] = cute.arch.brev(value)
    out[thread, 12] = cute.arch.lop3(value, out[thread, 3], out[thread, 6], 0x96)


@cute.jit
def votes(x: cute.Tensor, out: cute.Tensor):
    """What lanes of a warp tell one another."""
    _votes(x, out).launch(grid=(1, 1, 1), block=(64, 1, 1))


def votes_case() -> Case:
    x = integers((64,), 0, 100, torch.int32)
    columns = []
    for warp in x.view(2, 32).tolist():
        rows = []
        for lane, value in enumerate(warp):
            ballot = sum((v % 2) << i for i, v in enumerate(warp))
            total, smallest, parity = sum(warp), min(warp), 0
            for v in warp:
                parity ^= v
            equal = sum((v == value) << i for i, v in enumerate(warp))
            up = warp[lane - 3] if lane >= 3 else value
            bits = f"{value:032b}"
            rows.append([
                ballot, any(v > 90 for v in warp), 1, total, smallest, parity, equal, up, warp[lane * 7 % 32],
                bits.count("1"), (bits + "1").index("1"), int(bits[::-1], 2), value ^ total ^ equal,
            ])  # fmt: skip
        columns += rows
    expected = torch.tensor(columns, dtype=torch.int64).to(torch.int32)
    how = {"passed": "tensor", "align": 4}
    return Case(votes, (Buffer(x, **how), output(expected, **how)))
