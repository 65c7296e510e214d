"""Softmax and RMSNorm of rows, a block for each row."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute, memory

from .case import Buffer, Case, normal, output

WARPS = 4
THREADS = 32 * WARPS
LOG2_E = 1.4426950408889634


@cute.jit
def _all_warps(value: cutlass.Float32, is_maximum: cutlass.Constexpr, cells: cute.Tensor):
    """The maximum or the sum of a value over the block, in every thread."""
    value = cute.arch.warp_reduction_max(value) if is_maximum else cute.arch.warp_reduction_sum(value)
    # Asked before the branch: the answer takes a shuffle by the whole warp.
    warp = cute.arch.warp_idx()
    cute.arch.sync_threads()
    if cute.arch.lane_idx() == 0:
        cells[warp] = value
    cute.arch.sync_threads()
    result = cells[0]
    for warp in cutlass.range_constexpr(1, WARPS):
        result = cutlass.max(result, cells[warp]) if is_maximum else result + cells[warp]
    return result


@cute.kernel
def _softmax(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    cells = memory.SmemAllocator().allocate_tensor(cutlass.Float32, cute.make_layout(WARPS), 16)
    high = -cutlass.Float32.inf
    for i in cutlass.range(thread, x.shape[1], THREADS, unroll=1):
        high = cutlass.max(high, x[row, i].to(cutlass.Float32))
    high = _all_warps(high, True, cells)
    total = cutlass.Float32(0)
    for i in cutlass.range(thread, x.shape[1], THREADS, unroll=1):
        total += cute.math.exp2((x[row, i].to(cutlass.Float32) - high) * LOG2_E, fastmath=True)
    total = _all_warps(total, False, cells)
    scale = 1.0 / total
    for i in cutlass.range(thread, x.shape[1], THREADS, unroll=1):
        power = cute.math.exp2((x[row, i].to(cutlass.Float32) - high) * LOG2_E, fastmath=True)
        y[row, i] = (power * scale).to(y.element_type)


@cute.jit
def softmax(x: cute.Tensor, y: cute.Tensor):
    """Softmax over the columns of x (M, N), in fp32."""
    _softmax(x, y).launch(grid=(x.shape[0], 1, 1), block=(THREADS, 1, 1))


@cute.kernel
def _rms_norm(x: cute.Tensor, weight: cute.Tensor, y: cute.Tensor, epsilon: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    cells = memory.SmemAllocator().allocate_tensor(cutlass.Float32, cute.make_layout(WARPS), 16)
    total = cutlass.Float32(0)
    for i in cutlass.range(thread, x.shape[1], THREADS, unroll=1):
        value = x[row, i].to(cutlass.Float32)
        total += value * value
    total = _all_warps(total, False, cells)
    scale = cute.math.rsqrt(total / cutlass.Float32(x.shape[1]) + epsilon, fastmath=True)
    for i in cutlass.range(thread, x.shape[1], THREADS, unroll=1):
        value = x[row, i].to(cutlass.Float32) * scale * weight[i].to(cutlass.Float32)
        y[row, i] = value.to(y.element_type)


@cute.jit
def rms_norm(x: cute.Tensor, weight: cute.Tensor, y: cute.Tensor, epsilon: cutlass.Float32):
    """x / sqrt(mean(x**2) + epsilon) * weight of x (M, N), weight (N,), in fp32."""
    _rms_norm(x, weight, y, epsilon).launch(grid=(x.shape[0], 1, 1), block=(THREADS, 1, 1))


def _rounding(dtype: torch.dtype, values: torch.Tensor) -> torch.Tensor:
    """Half the distance between neighbours of `values` in a dtype, and half its smallest number."""
    limits = torch.finfo(dtype)
    return values.abs() * (limits.eps / 2) + limits.smallest_normal * limits.eps / 2


def softmax_case(dtype: torch.dtype, rows: int, columns: int) -> Case:
    """ex2.approx is within 2 units in the last place, its argument d log2(e) within 2**-23 |d log2(e)|."""
    x = normal((rows, columns), dtype) * 3
    exact = torch.softmax(x.double(), 1)
    distance = (x.double() - x.double().max(1, keepdim=True).values).abs()
    # Relative errors: the argument's rounding times ln 2, twice ex2, N additions, reciprocal and product.
    spread = distance * LOG2_E * 2.0**-23 + distance.max(1, keepdim=True).values * LOG2_E * 2.0**-23
    relative = spread + 4 * 2.0**-23 + (columns + 4) * 2.0**-24
    bound = exact * relative + _rounding(dtype, exact * (1 + relative))
    how = {"passed": "dynamic", "align": dtype.itemsize}
    return Case(
        softmax, (Buffer(x, **how), output(exact.float().to(dtype), bound + _rounding(dtype, exact), **how))
    )


def rms_norm_case(dtype: torch.dtype, rows: int, columns: int) -> Case:
    """rsqrt.approx is within 2**-22.9 of its result, relatively."""
    x, weight, epsilon = normal((rows, columns), dtype), normal((columns,), dtype, seed=1), 1e-5
    mean = x.double().square().mean(1, keepdim=True)
    exact = x.double() / (mean + epsilon).sqrt() * weight.double()
    # N roundings each of squares and sums, halved by the root; rsqrt; four operations more.
    relative = columns * 2.0**-24 + 2.0**-22.9 + 5 * 2.0**-24
    bound = exact.abs() * relative + 2 * _rounding(dtype, exact * (1 + relative))
    how = {"passed": "dynamic", "align": dtype.itemsize}
    return Case(rms_norm, (
        Buffer(x, **how), Buffer(weight, **how), output(exact.float().to(dtype), bound, **how),
        cutlass.Float32(epsilon),
    ))  # fmt: skip
