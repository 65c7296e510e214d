"""Warps that hand over at named barriers, arrays in local memory, and integer functions of the hardware."""

from __future__ import annotations

import math

import cutlass
import torch
from cutlass import cute, memory, pipeline

from .case import Buffer, Case, integers, output

TURNS, LANES = 5, 32


@cute.kernel
def _hand_over(x: cute.Tensor, y: cute.Tensor, forget: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    lane = thread % LANES
    cell = memory.SmemAllocator().allocate_tensor(cutlass.Int32, cute.make_layout(LANES), 16)
    full = pipeline.NamedBarrier(barrier_id=1, num_threads=2 * LANES)
    empty = pipeline.NamedBarrier(barrier_id=2, num_threads=2 * LANES)
    if warp == 0:
        for turn in cutlass.range(TURNS, unroll=1):
            if turn > 0:
                empty.arrive_and_wait()
            cell[lane] = x[turn, lane]
            # The writer does not wait for the reader here, only before it writes again.
            full.arrive()
    else:
        total = cutlass.Int32(0)
        for turn in cutlass.range(TURNS, unroll=1):
            full.arrive_and_wait()
            total = 10 * total + cell[LANES - 1 - lane]
            if turn < TURNS - 1 and not forget:
                empty.arrive()
        y[lane] = total


@cute.jit
def hand_over(x: cute.Tensor, y: cute.Tensor, forget: cutlass.Constexpr):
    """y (32,) = the digits of x (5, 32) as numbers, the lanes back to front."""
    _hand_over(x, y, forget).launch(grid=(1, 1, 1), block=(2 * LANES, 1, 1))


def case(forget: bool = False) -> Case:
    x = integers((TURNS, LANES), 0, 10, torch.int32)
    y = sum(10 ** (TURNS - 1 - turn) * x[turn].flip(0) for turn in range(TURNS))
    how = {"passed": "tensor", "align": 4}
    return Case(hand_over, (Buffer(x, **how), output(y.to(torch.int32), **how)), {"forget": forget})


@cute.kernel
def _sort(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    count = x.shape[1]
    mine = cute.make_rmem_tensor(12, cutlass.Int32)
    for i in cutlass.range(count, unroll=1):
        mine[i] = x[thread, i]
    for i in cutlass.range(1, count, unroll=1):
        value, j = mine[i], i
        while j > 0 and mine[(j + 11) % 12] > value:
            mine[j] = mine[j - 1]
            j -= 1
        mine[j] = value
    for i in cutlass.range(count, unroll=1):
        y[thread, i] = mine[i]


@cute.jit
def sort(x: cute.Tensor, y: cute.Tensor):
    """y = the rows of x (threads, up to 12) sorted, each by one thread in an array of its own."""
    _sort(x, y).launch(grid=(1, 1, 1), block=(x.shape[0], 1, 1))


def sort_case(threads: int, count: int) -> Case:
    x = integers((threads, count), -100, 100, torch.int32)
    how = {"passed": "dynamic", "align": 4}
    return Case(sort, (Buffer(x, **how), output(x.sort(1).values, **how)))


@cute.kernel
def _functions(a: cute.Tensor, b: cute.Tensor, out: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    x, y = a[thread], b[thread]
    arch = cute.arch
    low, carried = arch.add_cc(x, y), arch.addc(x, x)
    results = (
        arch.mul_hi(x, y), arch.mul24(x, y), arch.mad24(x, y, x), arch.bfe(x, 5, 9), arch.bfi(y, x, 3, 7),
        arch.shf(x, y, 11, kind="l"), arch.shf(x, y, 11, kind="r"), arch.prmt(x, y, 0x5140), arch.bfind(x),
        arch.lop3(x, y, low, 0xCA), arch.add_sat_int(x, y), arch.sub_sat_int(x, y), low, carried,
        arch.lanemask_lt(), arch.activemask(), cutlass.Int32(arch.mul_wide(x, y) >> 20), x >> 3, x << 5,
        x // (y | 1), x % (y | 1), cutlass.min(x, y), cutlass.max(x, y),
    )  # fmt: skip
    for i in cutlass.range_constexpr(len(results)):
        out[i, thread] = cutlass.Int32(results[i])


@cute.jit
def functions(a: cute.Tensor, b: cute.Tensor, out: cute.Tensor):
    """Integer functions that have an instruction of their own."""
    _functions(a, b, out).launch(grid=(1, 1, 1), block=(64, 1, 1))


def _signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _reference(x: int, y: int, lane: int) -> list[int]:
    ux, uy, word = x & 0xFFFFFFFF, y & 0xFFFFFFFF, 0xFFFFFFFF
    product24 = _signed(x, 24) * _signed(y, 24)
    bytes_ = [(ux >> 8 * i) & 255 for i in range(4)] + [(uy >> 8 * i) & 255 for i in range(4)]
    # bfe.s32 repeats the field's top bit.
    field = _signed(ux >> 5, 9)
    inserted = (ux & ~(127 << 3)) | ((uy & 127) << 3)
    top = ux if x >= 0 else ~ux & word
    low = ux + uy
    wide = (uy << 32) | ux
    floor, rest = x // (y | 1), math.fmod(x, y | 1)
    lowest, highest = -(2**31), 2**31 - 1
    return [_signed(v) for v in (
        (x * y) >> 32, product24, product24 + x, field, inserted, wide << 11 >> 32, wide >> 11,
        sum(bytes_[(0x5140 >> 4 * i) & 7] << 8 * i for i in range(4)), top.bit_length() - 1,
        (ux & uy) | (~ux & low & word), min(max(x + y, lowest), highest), min(max(x - y, lowest), highest),
        low, 2 * ux + (low >> 32), (1 << lane) - 1, word, (x * y) >> 20, x >> 3, ux << 5, floor,
        int(rest), min(x, y), max(x, y),
    )]  # fmt: skip


def functions_case() -> Case:
    a, b = (integers((64,), -(2**31), 2**31, torch.int32, seed) for seed in (0, 1))
    a[:4], b[:4] = torch.tensor([0, -1, 2**31 - 1, -(2**31)]), torch.tensor([0, 7, 1, -5])
    rows = [_reference(x, y, i % 32) for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True))]
    expected = torch.tensor(rows, dtype=torch.int64).to(torch.int32).t().contiguous()
    how = {"passed": "tensor", "align": 4}
    return Case(functions, (Buffer(a, **how), Buffer(b, **how), output(expected, **how)))
