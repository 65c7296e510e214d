"""Lanes that go different ways: loops whose length depends on the data, nested branches, early leavers."""

from __future__ import annotations

import cutlass
import torch
from cutlass import cute

from .case import Buffer, Case, integers, output

THREADS = 96


@cute.kernel
def _wander(x: cute.Tensor, steps: cute.Tensor, path: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    if i < cute.size(x):
        n, count, odd = x[i], cutlass.Int32(0), cutlass.Int32(0)
        while n > 1 and count < 500:
            if n % 2 == 0:
                n = n // 2
                if n % 2 == 0:
                    # Two steps at once, for those that can.
                    n = n // 2
                    count += 1
            else:
                n = 3 * n + 1
                odd += 1
                for j in cutlass.range(n % 3, unroll=1):
                    odd += 1000 * (j + 1)
            count += 1
        steps[i] = count
        # The warp is whole again here, and the lanes must have kept what is theirs.
        path[i] = odd
        if i % 5 == 3:
            path[i] = -path[i]


@cute.jit
def wander(x: cute.Tensor, steps: cute.Tensor, path: cute.Tensor):
    """How many steps of the 3 n + 1 rule lead from x (N,) to 1, and what was odd on the way."""
    _wander(x, steps, path).launch(grid=(cute.ceil_div(cute.size(x), THREADS), 1, 1), block=(THREADS, 1, 1))


def _walk(n: int) -> tuple[int, int]:
    count = odd = 0
    while n > 1 and count < 500:
        if n % 2 == 0:
            n //= 2
            if n % 2 == 0:
                n //= 2
                count += 1
        else:
            n = 3 * n + 1
            odd += 1 + sum(1000 * (j + 1) for j in range(n % 3))
        count += 1
    return count, odd


def case(count: int) -> Case:
    x = integers((count,), 0, 2000, torch.int32)
    walked = torch.tensor([_walk(n) for n in x.tolist()], dtype=torch.int32)
    sign = torch.where(torch.arange(count) % 5 == 3, -1, 1).to(torch.int32)
    how = {"passed": "dynamic", "align": 4}
    steps, path = walked[:, 0].contiguous(), (walked[:, 1] * sign).contiguous()
    return Case(wander, (Buffer(x, **how), output(steps, **how), output(path, **how)))


@cute.kernel
def _common(a: cute.Tensor, b: cute.Tensor, out: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    x, y = a[thread], b[thread]
    while y != 0:
        x, y = y, x % y
    # Once in every lane's own time, then among the lanes of the warp.
    out[thread, 0] = x
    other = cute.arch.shuffle_sync_bfly(x, 1)
    while other != 0:
        x, other = other, x % other
    out[thread, 1] = x


@cute.jit
def common(a: cute.Tensor, b: cute.Tensor, out: cute.Tensor):
    """Greatest common divisors of a and b (N,), then of those of two neighbours."""
    _common(a, b, out).launch(grid=(1, 1, 1), block=(cute.size(a), 1, 1))


def common_case() -> Case:
    a, b = integers((128,), 1, 100000, torch.int32), integers((128,), 0, 5000, torch.int32, seed=1)
    first = torch.gcd(a, b)
    second = torch.gcd(first, first.view(-1, 2).flip(1).flatten())
    how = {"passed": "tensor", "align": 4}
    return Case(common, (Buffer(a, **how), Buffer(b, **how), output(torch.stack([first, second], 1), **how)))
