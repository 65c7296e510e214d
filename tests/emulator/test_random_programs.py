"""Random programs: whatever way threads go, they compute what they compute when each runs by itself."""

from __future__ import annotations

import random

import pytest
import torch

from dsv4lab.emulator import device

BLOCKS = ((32, 1, 1), (1, 1, 1), (20, 1, 1), (5, 3, 3), (64, 1, 1), (2, 35, 1), (8, 4, 3))
CTAS = 2


def check(programs, seed, program, block, exits):
    """Run one program in the emulator and thread by thread.

    A warp that ends does not arrive at later barriers, so that reading what it wrote counts as a race.
    """
    dice = random.Random(seed)
    count = block[0] * block[1] * block[2]
    values = [
        [dice.getrandbits(63) >> dice.choice((0, 32, 60)) for _ in programs.NAMES]
        for _ in range(CTAS * count)
    ]
    sums, expected = [0] * programs.SUMS, []
    for cta in range(CTAS):
        start = [programs.start_of(v) | {"ctaid": cta, "fuel": 0} for v in values[cta * count :][:count]]
        expected += programs.Interpreter(program, count, sums).run(start)
    checks = ["initialised", "proxy", "barriers", "leaks"] + ["race"] * (not exits)
    gpu = device("sm_100a", checks=checks, seed=seed, trace=False, limit=10**6)
    y = gpu.from_torch(torch.zeros(programs.SUMS + CTAS * count * programs.WORDS, dtype=torch.int64))
    text = programs.kernel(program)
    gpu.run_ptx(
        text,
        gpu.from_torch(torch.tensor(values)),
        y,
        grid=(CTAS, 1, 1),
        block=block,
        shared_bytes=programs.SLOT * count,
    )
    found = y[programs.SUMS :].reshape(-1, programs.WORDS).tolist()
    wanted = [[0] * programs.WORDS if have is None else programs.words_of(have) for have in expected]
    assert found == wanted, text
    assert [s % 2**64 for s in y[: programs.SUMS].tolist()] == [s % 2**64 for s in sums], text


def structured(programs, seed):
    block = BLOCKS[seed % len(BLOCKS)]
    exits = seed % 3 == 0
    maker = programs.Generator(seed, exits, block[0] * block[1] * block[2] % 32 == 0)
    check(programs, seed, maker.structured(8), block, exits)


def unstructured(programs, seed):
    maker = programs.Generator(seed, seed % 2 == 0, False)
    check(programs, seed, maker.unstructured(3 + seed % 9, 25), BLOCKS[seed % len(BLOCKS)], True)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_branches_and_loops_within_each_other(random_programs, first):
    for seed in range(first, first + 20):
        structured(random_programs, seed)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_jumps_to_anywhere(random_programs, first):
    for seed in range(first, first + 20):
        unstructured(random_programs, seed)
