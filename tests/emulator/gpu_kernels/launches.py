"""What host functions do: several launches a call, sizes known at run time, persistent blocks, print."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute

from .case import Buffer, Case, integers, normal, output

THREADS = 64


@cute.kernel
def _double(x: cute.Tensor, y: cute.Tensor, early: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    if cutlass.const_expr(early):
        # Begun before the launch ahead has ended, whose results are there after this.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    if i < cute.size(x):
        y[i] = 2 * x[i]


@cute.kernel
def _differences(x: cute.Tensor, y: cute.Tensor, early: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    n = cute.size(x)
    if cutlass.const_expr(early):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
    if i < n:
        y[i] = x[(i + 1) % n] - x[i]


@cute.jit
def chain(
    x: cute.Tensor, between: cute.Tensor, y: cute.Tensor, rounds: cutlass.Int32, early: cutlass.Constexpr
):  # fmt: skip
    """Differences of 2 x, `rounds` times over: 2 * rounds launches, each reading what the last one wrote.

    early: each launch may begin before the one ahead has ended.
    """
    how = {"grid": (cute.ceil_div(cute.size(x), THREADS), 1, 1), "block": (THREADS, 1, 1), "use_pdl": early}
    _double(x, between, early).launch(**how)
    _differences(between, y, early).launch(**how)
    for _ in range(1, rounds):
        _double(y, between, early).launch(**how)
        _differences(between, y, early).launch(**how)


def chain_case(count: int, rounds: int, early: bool = False) -> Case:
    x = integers((count,), -50, 50, torch.int32)
    y = x
    for _ in range(rounds):
        between = 2 * y
        y = between.roll(-1) - between
    how = {"passed": "dynamic", "align": 4}
    arguments = Buffer(x, **how), output(between, **how), output(y, **how), cutlass.Int32(rounds)
    return Case(chain, arguments, {"early": early})


@cute.kernel
def _persistent(x: cute.Tensor, y: cute.Tensor, visits: cute.Tensor):
    thread, ty, _ = cute.arch.thread_idx()
    width, height, _ = cute.arch.block_dim()
    block, by, bz = cute.arch.block_idx()
    grid, gy, gz = cute.arch.grid_dim()
    me = block + grid * (by + gy * bz)
    lane = thread + width * ty
    tiles = cute.ceil_div(cute.size(x), width * height)
    count = cutlass.Int32(0)
    for tile in cutlass.range(me, tiles, grid * gy * gz, unroll=1):
        i = tile * width * height + lane
        if i < cute.size(x):
            y[i] = x[i] * x[i]
        count += 1
    if lane == 0:
        visits[me] = count


@cute.jit
def persistent(x: cute.Tensor, y: cute.Tensor, visits: cute.Tensor):
    """y = x * x by 2 x 3 x 2 blocks of 16 x 5 threads, each going over the tiles that are its own."""
    _persistent(x, y, visits).launch(grid=(2, 3, 2), block=(16, 5, 1))


def persistent_case(count: int) -> Case:
    x = normal((count,))
    tiles = -(-count // 80)
    visits = torch.tensor([len(range(me, tiles, 12)) for me in range(12)], dtype=torch.int32)
    how = {"passed": "dynamic", "align": 4}
    return Case(persistent, (Buffer(x, **how), output(x * x, **how), output(visits, **how)))


@cute.kernel
def _speak(x: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    if thread % 20 == 3:
        cute.printf(
            "thread %d has %d, half of it is %f", thread, x[thread], x[thread].to(cutlass.Float32) / 2
        )


@cute.jit
def speak(x: cute.Tensor):
    """Three of 64 threads print what they have."""
    _speak(x).launch(grid=(1, 1, 1), block=(64, 1, 1))


def printing_case() -> Case:
    x = integers((64,), 0, 100, torch.int32)
    lines = [f"thread {i} has {x[i]}, half of it is {x[i] / 2:f}\n" for i in range(3, 64, 20)]
    return Case(speak, (Buffer(x, passed="tensor", align=4),), printed="".join(lines))
