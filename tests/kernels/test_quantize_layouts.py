"""Kernels that dequantize, and that swizzle scales, bit for bit against the reference, on emulated GPUs."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS
from torch import Tensor

from dsv4lab import reference
from dsv4lab.emulator import device

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@pytest.fixture(scope="module", params=["sm_90a", "sm_100a"])
def gpu(request):
    with device(request.param) as gpu:
        yield gpu
        assert gpu.counters["fusable_mul_add"] == 0


def filled(result: Tensor) -> Tensor:
    """A tensor for a result and two rows more, of bytes 0xEE."""
    out = torch.empty((result.shape[0] + 2, *result.shape[1:]), dtype=result.dtype)
    out.view(torch.uint8).fill_(0xEE)
    return out


def check(op: str, name: str, *args) -> None:
    """Run an operation's kernels; the result must be the reference's, and nothing else be written."""
    want = getattr(reference, name)(*args)
    out = filled(want)
    IMPLEMENTATIONS[op](*args, out)
    found = out[: len(want)]
    if want.is_floating_point() and want.itemsize > 1:
        same = (found == want) & (found.signbit() == want.signbit()) | (found.isnan() & want.isnan())
    else:
        same = found.view(torch.uint8) == want.view(torch.uint8)
    assert same.all(), f"{int((~same).sum())} wrong, first {(~same).nonzero()[0].tolist()}"
    assert (out[len(want) :].view(torch.uint8) == 0xEE).all(), "wrote beyond its rows"


def operand(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Any codes (..., K/2) and any scales, also negative and NaN, of a shape (..., K)."""
    generator = torch.Generator().manual_seed(seed)
    *lead, k = shape
    codes = torch.randint(0, 256, (*lead, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (*lead, k // 16), generator=generator, dtype=torch.uint8)
    return codes, scales.view(torch.float8_e4m3fn)


@DTYPES
def test_every_code_with_every_scale(gpu, dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    for g in (1.0, 0.7, 2.0**-100, 2.0**115, 0.0, math.nan):
        check("dequantize", "dequantize", codes, scales, torch.tensor(g), "tensor", False, False, dtype)


@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@pytest.mark.parametrize(
    "shape", [(1, 16), (37, 48), (130, 256), (3, 7168), (0, 48), (3, 34, 48), (2, 128, 16)]
)
def test_any_shape_and_layout(gpu, shape, swizzled):
    codes, scales = operand(*shape)
    lead = shape[:-1]
    scales = reference.swizzle(scales) if swizzled else scales
    scale_sets = [("tensor", ()), ("token", lead), ("token", (*lead, 1))]
    if len(shape) == 3:
        scale_sets += [("group", lead[:1]), ("group", (*lead[:1], 2))]
    for granularity, g_shape in scale_sets:
        g = torch.rand(g_shape)
        for interleaved in (False, True) if len(g_shape) == 2 and lead[-1] % 16 == 0 else (False,):
            args = (codes, scales, g, granularity, swizzled, interleaved, torch.bfloat16)
            check("dequantize", "dequantize", *args)


def test_gate_and_up_of_one_matrix(gpu):
    codes, scales = operand(96, 48)
    for interleaved in (False, True):
        args = (codes, scales, torch.tensor([[0.5, 3.0]]), "group", False, interleaved, torch.float32)
        check("dequantize", "dequantize", *args)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 3), (37, 16), (128, 33), (260, 36), (0, 4), (5, 0), (2, 130, 5)]
)
def test_scales_swizzled_and_back(gpu, shape):
    generator = torch.Generator().manual_seed(0)
    scales = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    check("swizzle_scales", "swizzle", scales)
    swizzled = reference.swizzle(scales)
    check("unswizzle_scales", "unswizzle", swizzled, *shape[-2:])
    check("swizzle_scales", "swizzle", scales.view(torch.float8_e4m3fn))


def test_scales_from_anywhere(gpu):
    scales = torch.randint(0, 256, (9, 30), dtype=torch.uint8)
    check("swizzle_scales", "swizzle", scales[1:, 3:23])
    check("swizzle_scales", "swizzle", scales.t())
