"""The kernel for reading: right for every shape it takes, and each operand's scales where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dsv4lab.kernels.nvfp4_tile_gemm import nvfp4_tile_gemm

from dsv4lab import dequantize_nvfp4, quantize_nvfp4
from dsv4lab.emulator import device
from dsv4lab.emulator.tensor_memory import TensorMemory
from dsv4lab.formats import NVFP4Tensor


def random(rows: int, k: int, seed: int) -> NVFP4Tensor:
    """Any codes, and scales from 2**-6 to 8, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(8, 81, (rows, k // 16), dtype=torch.uint8, generator=generator)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(0.25))


def product(a: NVFP4Tensor, b: NVFP4Tensor, **options) -> torch.Tensor:
    with device("sm_100a", **options):
        return nvfp4_tile_gemm(a, b)


def values(q: NVFP4Tensor) -> torch.Tensor:
    return dequantize_nvfp4(q, torch.float32).double()


def bound(a: torch.Tensor, b: torch.Tensor, ulps: float) -> torch.Tensor:
    """Each MMA of K = 64 rounds the sum to fp32, by `ulps` at most, and the end rounds it to bf16."""
    sums = -(-a.shape[1] // 64) * ulps * 2.0**-23 * (a.abs() @ b.abs().T)
    return sums * (1 + 2.0**-8) + 2.0**-8 * (a @ b.T).abs()


@pytest.mark.parametrize("shape", [(128, 128, 256), (200, 256, 608), (1, 128, 32), (130, 384, 1056)])
@pytest.mark.parametrize("mma", ["exact", "hardware"])
def test_products(shape, mma):
    m, n, k = shape
    a, b = random(m, k, 0), random(n, k, 1)
    c = product(a, b, mma=mma)
    assert c.shape == (m, n) and c.dtype == torch.bfloat16
    wide_a, wide_b = values(a), values(b)
    # To nearest, or toward zero; what hardware cuts off below 2**-35 of the largest addend is far less.
    limit = bound(wide_a, wide_b, 0.5 if mma == "exact" else 1)
    assert ((c.double() - wide_a @ wide_b.T).abs() <= limit).all()


def test_one_hot_rows_pick_values_exactly():
    """Row i of the identity picks column i of the other operand, whose values have six significant bits."""
    k = 256
    codes = 2 * torch.eye(k, dtype=torch.uint8)  # code 2 is 1.0
    ones = torch.ones(k, k // 16).to(torch.float8_e4m3fn)
    identity = NVFP4Tensor(codes[:, 0::2] + 16 * codes[:, 1::2], ones, torch.tensor(1.0))
    other = random(k, k, 2)
    assert torch.equal(product(identity, other).double(), values(other).T)
    assert torch.equal(product(other, identity).double(), values(other))


def test_the_number_of_stages_changes_time_and_nothing_else():
    a, b = random(128, 1024, 0), random(128, 1024, 1)
    results, ends = [], []
    for stages in (1, 2, 4):
        with device("sm_100a") as gpu:
            results.append(nvfp4_tile_gemm(a, b, stages))
            ends.append(max(event.end for event in gpu.trace))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert ends[0] > ends[1] > ends[2]


def test_a_caller_sees_the_sums_after_each_mma():
    a, b = random(128, 512, 0), random(128, 512, 1)
    seen = []

    def watch(machine, instruction):
        if "tcgen05.mma" in instruction.opcode:
            seen.append(machine.state(TensorMemory).cells[0, :, :128].view(np.float32).copy())

    product(a, b, watch=watch)
    assert len(seen) == 8
    for i, sums in enumerate(seen, 1):
        exact = (values(a)[:, : 64 * i] @ values(b)[:, : 64 * i].T) * 16
        assert np.allclose(sums, exact, rtol=1e-5, atol=1e-3)


def test_bytes_and_flops_are_the_ideal_ones():
    with device("sm_100a") as gpu:
        nvfp4_tile_gemm(random(256, 512, 0), random(128, 512, 1))
    counters = gpu.counters
    assert counters["mma.flops"] == 2 * 256 * 128 * 512
    assert counters["tma.load_bytes"] == 2 * (128 + 128) * 512 * 9 // 16  # 4.5 bits, for each of two tiles
    assert counters["global.store_bytes"] == 2 * 256 * 128


def test_operands_that_do_not_fit_are_refused():
    good = random(128, 64, 0)
    for a, b in ((good, random(128, 96, 0)), (good, random(64, 64, 0)), (random(128, 48, 0),) * 2):
        with pytest.raises(ValueError, match="do not fit"):
            nvfp4_tile_gemm(a, b)
    with pytest.raises(ValueError, match="do not fit"):
        nvfp4_tile_gemm(quantize_nvfp4(torch.ones(128, 64), "token"), good)


def test_a_tensor_may_be_both_operands_and_belong_to_the_caller():
    a = random(128, 64, 0)
    with device("sm_100a") as gpu:
        codes = gpu.from_torch(a.codes)
        mine = a.with_(codes=codes)
        first, second = nvfp4_tile_gemm(mine, mine), nvfp4_tile_gemm(mine, a)
        assert gpu.lookup(codes.data_ptr()).extent.nbytes == codes.nbytes, "still registered"
    assert torch.equal(first, second)
