"""Kernels that quantize plain data, bit for bit against the reference, on emulated GPUs."""

from __future__ import annotations

import math

import pytest
import torch
from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS
from torch import Tensor

from dsv4lab import reference
from dsv4lab.emulator import device

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DIVISOR = 2688.0
POLICIES = ("tensor", "token", "known", "known token")
LAYOUTS = pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])


@pytest.fixture(scope="module", params=["sm_90a", "sm_100a"])
def gpu(request):
    """An emulated GPU, with all checks on."""
    with device(request.param) as gpu:
        yield gpu
        assert gpu.counters["instructions"] > 0
        assert gpu.counters["fusable_mul_add"] == 0


def bits(t: Tensor) -> Tensor:
    """The bits of a tensor, those of any NaN the same."""
    if t.dtype == torch.float32:
        return torch.where(t.isnan(), math.nan, t).view(torch.int32)
    return t.view(torch.uint8)


def check(op: str, *args) -> list[Tensor]:
    """Run an operation's kernels into tensors with two rows too many; all of it must be the reference's."""
    expected = getattr(reference, op)(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outs, results = [], []
    for result in expected:
        rows = 2 if result.dim() else 0
        out = torch.empty((result.shape[0] + rows, *result.shape[1:]) if rows else (), dtype=result.dtype)
        out.view(torch.uint8 if rows else torch.int32).fill_(-1 if not rows else 0xEE)
        outs.append(out)
        results.append(out[: result.shape[0]] if rows else out)
    before = [
        out[len(result) :].clone() if out.dim() else None for out, result in zip(outs, results, strict=True)
    ]
    IMPLEMENTATIONS[op](*args, *outs)
    for name, result, want in zip(("codes", "scales", "g"), results, expected, strict=False):
        wrong = bits(result) != bits(want)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} wrong, first {wrong.nonzero()[0].tolist()}"
    for out, result, beyond in zip(outs, results, before, strict=True):
        assert beyond is None or torch.equal(bits(out[len(result) :]), bits(beyond)), "wrote beyond its rows"
    return results


def data(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Normal numbers in rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=generator))).to(dtype)


def scale_for(x: Tensor, policy: str) -> tuple[Tensor | None, str]:
    """The arguments of a policy; known scales are such that some blocks saturate and some vanish."""
    if not policy.startswith("known"):
        return None, policy
    generator = torch.Generator().manual_seed(1)
    if policy == "known":
        return torch.tensor(0.0021), "tensor"
    return torch.rand(x.shape[:-1], generator=generator) * 0.01, "token"


@LAYOUTS
@pytest.mark.parametrize("policy", POLICIES)
def test_any_number_of_rows(gpu, policy, swizzled):
    for rows in (0, 1, 3, 37, 130):
        x = data(rows, 48, seed=rows)
        check("quantize", x, *scale_for(x, policy), DIVISOR, swizzled)


@pytest.mark.parametrize("columns", [16, 256, 7168])
@pytest.mark.parametrize("policy", ["tensor", "token", "known"])
def test_rows_of_any_length(gpu, policy, columns):
    x = data(3, columns)
    check("quantize", x, *scale_for(x, policy), DIVISOR, True)


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("policy", ["tensor", "token", "known"])
def test_other_types(gpu, policy, dtype):
    x = data(37, 48, dtype=dtype)
    check("quantize", x, *scale_for(x, policy), DIVISOR, False)


@LAYOUTS
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_tensor_scale_of_more_than_a_cluster_holds(gpu, dtype, swizzled):
    x = data(20, 7168, dtype=dtype)
    launches = len(gpu.launches)
    check("quantize", x, None, "tensor", DIVISOR, swizzled)
    assert len(gpu.launches) == launches + 2


def test_as_many_threads_as_a_cta_may_have(gpu):
    """1024, of which the compiler does not believe that there are so many."""
    x = data(2, 16384)
    for policy in ("known", "token"):
        check("quantize", x, *scale_for(x, policy), DIVISOR, True)
        assert gpu.runs[-1].launch.block[0] == 1024


@pytest.mark.parametrize("policy", ["tensor", "token", "known"])
def test_rows_that_do_not_fit_into_registers(gpu, policy):
    x = data(2, 16 * 2051)
    check("quantize", x, *scale_for(x, policy), DIVISOR, True)


@LAYOUTS
def test_groups(gpu, swizzled):
    x = data(3, 34, 48)
    check("quantize", x, None, "group", DIVISOR, swizzled)
    check("quantize", x, torch.tensor([0.01, 0.0, 0.2]), "group", DIVISOR, swizzled)
    check("quantize", x, torch.rand(3, 2) * 0.01, "group", DIVISOR, swizzled)
    check("quantize", x, None, "tensor", DIVISOR, swizzled)
    check("quantize", x, None, "token", DIVISOR, swizzled)


def test_groups_of_more_than_a_cluster_holds(gpu):
    x = data(2, 20, 7168)
    check("quantize", x, None, "group", DIVISOR, True)
    check("global_scale", x, "group", DIVISOR)


def test_leading_dimensions(gpu):
    for shape in ((48,), (2, 3, 5, 48), (0, 3, 48), (3, 0, 48), (2, 0)):
        x = data(*shape)
        for policy in ("tensor", "token", *(["group"] if len(shape) > 2 else [])):
            check("quantize", x, None, policy, DIVISOR, False)


@pytest.mark.parametrize("shape", [(0, 48), (5, 48), (2, 20, 7168), (3, 2, 48)])
def test_global_scales(gpu, shape):
    for dtype in (BF16, F32):
        for policy in ("tensor", "token", "group") if len(shape) > 2 else ("tensor", "token"):
            check("global_scale", data(*shape, dtype=dtype), policy, 6.0 * 256)


SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-126, 2.0**-149 * 447, 3e38, -3e38, 448.0, 6.0, 0.25)


def special_rows(dtype: torch.dtype) -> Tensor:
    """Rows of three blocks, in the middle one special numbers, and NaN or Inf in some rows."""
    x = data(20, 48, dtype=dtype)
    for row, value in enumerate(SPECIAL):
        x[row, 16:32] = value
        x[row, 20] *= -0.5
    x[12, 17], x[13, 17], x[14, 17] = math.nan, math.inf, -math.inf
    x[15], x[16] = 0.0, -0.0
    x[17, 47] = -math.nan
    return x


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_special_values(gpu, dtype):
    x = special_rows(dtype)
    check("quantize", x, None, "token", DIVISOR, False)
    check("quantize", x, None, "tensor", DIVISOR, False)
    for g in (0.0, -0.0, 2.0**-100, 2.0**115, 1.0, math.nan, -1.0, 2.0**-101, 2.0**116, math.inf, 1e-45):
        check("quantize", x, torch.tensor(g), "tensor", DIVISOR, False)
    for g in (torch.full((20,), 2.0**-9), torch.exp2(torch.linspace(-102, 117, 20)), torch.zeros(20)):
        check("quantize", x, g, "token", DIVISOR, False)


def test_divisors(gpu):
    x = data(3, 48)
    for divisor in (1536.0, 1e22, 1e-30, 1e-39, 3.0):
        check("quantize", x, None, "token", divisor, False)


def test_every_scale_and_every_tie(gpu):
    """Blocks whose amax is near each border between two E4M3 scales, and values near each border of codes."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    amax = (borders * 6).repeat_interleave(3)
    for i, towards in ((1, 0.0), (2, math.inf)):
        amax[i::3] = torch.nextafter(amax[i::3], torch.tensor(towards))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat([ties, torch.nextafter(ties, ties * 2)])
    steps = (amax / 6).to(torch.float8_e4m3fn).float()
    x = torch.cat([amax[:, None], steps[:, None] * ties, -amax[:, None]], 1)
    check("quantize", x, torch.tensor(1.0), "tensor", DIVISOR, False)
    check("quantize", x.bfloat16(), torch.tensor(1.0), "tensor", DIVISOR, False)
    check("quantize", x.bfloat16(), torch.tensor(0.7), "tensor", DIVISOR, False)


def test_tensors_that_kernels_cannot_take_as_they_are(gpu):
    storage = data(7, 96)
    for x in (storage[:, :48], storage[:, 1:49], storage.t()[:48].t(), storage.flatten()[1:49]):
        check("quantize", x, None, "token", DIVISOR, False)
    scales = torch.rand(9) * 0.01
    x = storage[:3]
    check("quantize", x, scales[1], "tensor", DIVISOR, False)
    check("quantize", x, scales[1::3], "token", DIVISOR, False)
    wanted = reference.quantize(x, None, "token", DIVISOR, False)
    codes, block_scales = torch.zeros(3, 96, dtype=torch.uint8), torch.zeros(3, 6).to(torch.float8_e4m3fn)
    g = torch.zeros(7)
    IMPLEMENTATIONS["quantize"](x, None, "token", DIVISOR, False, codes[:, 1:49], block_scales, g[1:4])
    for found, want in zip((codes[:, 1:49], block_scales, g[1:4]), wanted, strict=True):
        assert torch.equal(bits(found.contiguous()), bits(want))


def test_too_many_rows_are_refused(gpu):
    x = torch.empty(1, 16).expand(2**31, 16)
    with pytest.raises(ValueError, match="rows"):
        IMPLEMENTATIONS["global_scale"](x, "tensor", DIVISOR, torch.empty(()))
