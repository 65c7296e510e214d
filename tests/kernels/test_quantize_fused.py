"""Kernels that normalize, or apply SwiGLU, and quantize.

The bf16 values between the two must be within one unit of float64, and what follows the reference's bits.
"""

from __future__ import annotations

import math

import pytest
import torch
from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS
from torch import Tensor

from dsv4lab import reference
from dsv4lab.emulator import device

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DIVISOR, EPS = 2688.0, 1e-6
POLICIES = pytest.mark.parametrize("policy", ["tensor", "token", "known"])


@pytest.fixture(scope="module", params=["sm_90a", "sm_100a"])
def gpu(request):
    with device(request.param) as gpu:
        yield gpu
        assert gpu.counters["fusable_mul_add"] == 0


def ulp(y: Tensor) -> Tensor:
    """The distance of bf16 numbers at y, float64."""
    _, exponent = torch.frexp(y.abs().clamp_min(2.0**-126))
    return torch.exp2((exponent - 8).double())


def bits(t: Tensor) -> Tensor:
    if t.dtype == torch.float32:
        return torch.where(t.isnan(), math.nan, t).view(torch.int32)
    return t.view(torch.uint8)


def run(op: str, args: tuple, shape, policy: str, swizzled: bool, kept: bool = True):
    """The bf16 values; 1 / rms if there is one; codes, scales and g, which must be those of the values."""
    known = {"known": torch.tensor(0.0021), "known token": torch.rand(shape[:-1]) * 0.01}.get(policy)
    policy = {"known": "tensor", "known token": "token"}.get(policy, policy)
    values = torch.full(shape, math.nan, dtype=BF16)
    results = reference.quantize(torch.zeros(shape), known, policy, DIVISOR, swizzled)
    for result in results:
        result.view(torch.uint8 if result.dim() else torch.int32).fill_(-1 if not result.dim() else 0xEE)
    rrms = [] if op == "swiglu_quantize" else [torch.full(shape[:-1], -1.0)]
    scale = (known, policy, DIVISOR, swizzled)
    more = {"kept": values} if kept else {}
    IMPLEMENTATIONS[op](*args, *scale, *results, *rrms, **more)
    if kept:
        for name, found, want in zip(
            ("codes", "scales", "g"), results, reference.quantize(values, *scale), strict=True
        ):
            assert torch.equal(bits(found), bits(want)), name
    return values, rrms[0] if rrms else None, results


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rrms = (x.double().square().mean(-1) + eps).rsqrt()
    return x.double() * rrms[..., None] * weight.double(), rrms


def check_rrms(found: Tensor, exact: Tensor, columns: int, more: Tensor | float = 0.0) -> None:
    """`more`: by how much, relatively, what is squared may be off."""
    # A root halves what a sum of K squares is off by, K roundings; then mean, eps, root and reciprocal.
    bound = (columns / 2 + 4) * 2.0**-24 + more
    assert ((found.double() / exact - 1).abs() <= bound).all()


def check_rmsnorm(shape, policy, swizzled=False, dtype=BF16, weight_dtype=BF16) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    weight = torch.randn(shape[-1]).to(weight_dtype)
    values, rrms, _ = run("rmsnorm_quantize", (x, weight, EPS), shape, policy, swizzled)
    exact, exact_rrms = exact_norm(x, weight, EPS)
    assert ((values.double() - exact).abs() <= ulp(exact)).all()
    check_rrms(rrms, exact_rrms, shape[-1])


@POLICIES
def test_rmsnorm_of_any_number_of_rows(gpu, policy):
    for rows in (0, 1, 3, 37, 130):
        check_rmsnorm((rows, 48), policy, swizzled=True)


@pytest.mark.parametrize(
    "columns, policy", [(16, "token"), (256, "token"), (7168, "token"), (7168, "tensor"), (7168, "known")]
)
def test_rmsnorm_of_any_length(gpu, policy, columns):
    check_rmsnorm((5, columns), policy)


def test_rmsnorm_of_rows_that_do_not_fit(gpu):
    check_rmsnorm((2, 16 * 1800), "token")
    check_rmsnorm((30, 7168), "tensor", swizzled=True)


@pytest.mark.parametrize("dtype, weight_dtype", [(F32, F32), (F16, F16), (BF16, torch.float64)])
def test_rmsnorm_of_other_types(gpu, dtype, weight_dtype):
    check_rmsnorm((2, 3, 48), "known token", dtype=dtype, weight_dtype=weight_dtype)


def test_rmsnorm_of_special_rows(gpu):
    x = torch.randn(6, 48)
    x[0], x[1, 5], x[2, 40], x[3] = 0.0, math.nan, -math.inf, 1e-30
    x[4] = 1e25  # its squares overflow, those of 1e-30 are 0
    weight = torch.randn(48)
    for eps in (EPS, 0.0):
        values, rrms, results = run("rmsnorm_quantize", (x, weight, eps), (6, 48), "token", False)
        want = reference.rmsnorm_quantize(x, weight, eps, None, "token", DIVISOR, False)
        bad = torch.tensor([eps == 0.0, True, True, eps == 0.0, True, False])
        assert torch.equal((~values.isfinite()).all(1), bad)
        assert torch.equal(rrms.isfinite(), want[3].isfinite())
        assert torch.equal(results[2].isnan(), bad)
    # 1 / sqrt(1e-6)
    _, rrms, _ = run("rmsnorm_quantize", (torch.zeros(1, 48), weight, EPS), (1, 48), "token", False)
    assert abs(rrms.item() - 1000) < 1e-3


@pytest.mark.parametrize(
    "streams, policy, columns, dtype",
    [
        (1, "token", 48, F32),
        (2, "known", 7168, BF16),
        (3, "tensor", 48, F16),
        (4, "token", 7168, BF16),
        (4, "tensor", 7168, BF16),
    ],
)
def test_mixed_streams(gpu, streams, policy, columns, dtype):
    shape = (5, columns)
    x = torch.randn(5, streams, columns).to(dtype)
    mix = torch.randn(5, streams).to(dtype if columns == 48 else F32)
    weight = torch.randn(columns)
    args = (x, mix, weight, EPS)
    values, rrms, _ = run("mhc_rmsnorm_quantize", args, shape, policy, streams == 4)
    products = x.double() * mix.double()[..., None]
    exact, exact_rrms = exact_norm(products.sum(-2), weight, EPS)
    # Where streams cancel, each product and sum is off by 2^-24 of its own size, not of what is left.
    lost = streams * 2.0**-24 * products.abs().sum(-2)
    cancelled = lost * (exact_rrms[..., None] * weight.double()).abs()
    assert ((values.double() - exact).abs() <= ulp(exact) + cancelled).all()
    check_rrms(rrms, exact_rrms, columns, lost.square().mean(-1).sqrt() * exact_rrms)


def exact_swiglu(x: Tensor, limit: float | None, interleaved: bool) -> Tensor:
    gate, up = (part.double() for part in reference.split_gate_up(x, interleaved))
    if limit is not None:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize(
    "policy, columns, limit, interleaved",
    [
        ("token", 48, 10.0, False),
        ("tensor", 48, 10.0, True),
        ("known", 48, None, True),
        ("token", 3072, 10.0, True),
        ("known", 3072, 10.0, False),
    ],
)
def test_swiglu(gpu, policy, columns, limit, interleaved):
    for rows in (0, 1, 37) if columns == 48 else (3,):
        x = (torch.randn(rows, 2 * columns) * 7).bfloat16()
        shape = (rows, columns)
        values, _, _ = run("swiglu_quantize", (x, limit, interleaved), shape, policy, interleaved)
        exact = exact_swiglu(x, limit, interleaved)
        assert ((values.double() - exact).abs() <= ulp(exact)).all()


@pytest.mark.parametrize("dtype, interleaved", [(F16, False), (F32, True), (F32, False)])
def test_swiglu_of_other_types(gpu, dtype, interleaved):
    x = (torch.randn(5, 96) * 7).to(dtype)
    values, _, _ = run("swiglu_quantize", (x, 7.3, interleaved), (5, 48), "token", False)
    exact = exact_swiglu(x, torch.tensor(7.3).item(), interleaved)
    assert ((values.double() - exact).abs() <= ulp(exact)).all()


@pytest.mark.parametrize("limit", [10.0, 2.0**80, None])
def test_swiglu_at_the_ends(gpu, limit):
    """Gates from where sigmoid is 1 to where it is below any bf16; up so large that it still counts."""
    gate = torch.cat(
        [torch.linspace(-400, 400, 120), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.7, -88.7, 3e38, -3e38])]
    )
    rows = []
    for up in (1.0, -1e-20, 2.0**70, -(2.0**110), 2.0**125, 0.0):
        rows.append(torch.cat([gate, torch.full_like(gate, up)]))
    x = torch.stack(rows)
    values, _, _ = run("swiglu_quantize", (x, limit, False), (6, 128), "known", False)
    exact = exact_swiglu(x, limit, False)
    small = exact.abs() < 3.38e38
    assert ((values.double() - exact).abs() <= ulp(exact))[small].all()
    assert (values[~small].isinf() | (values[~small].abs() > 3.3e38)).all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_swiglu_of_nan_and_infinity(gpu, dtype):
    """A NaN or Inf makes its block NaN, and no other; the clamp does not hide it."""
    for i, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        x = torch.randn(2, 192).to(dtype)
        x[0, 37 + 8 * i] = value
        _, _, results = run("swiglu_quantize", (x, 10.0, True), (2, 96), "known", False)
        scale = (torch.tensor(0.0021), "tensor", DIVISOR, False)
        bad = reference.swiglu_quantize(x, 10.0, True, *scale)[1].isnan()
        assert bad.sum() == 1 and torch.equal(results[1].isnan(), bad)
        assert not results[0].unflatten(-1, (-1, 8))[bad].any()


def test_without_keeping_the_values(gpu):
    """The form of every day gives the same bits as the one that also writes what it quantizes."""
    x, weight = torch.randn(3, 2, 256).bfloat16(), torch.randn(256)
    calls = (
        ("rmsnorm_quantize", (x[:, 0].contiguous(), weight, EPS)),
        ("mhc_rmsnorm_quantize", (x, torch.rand(3, 2), weight, EPS)),
        ("swiglu_quantize", (x.flatten(1), 10.0, True)),
    )
    for op, args in calls:
        _, _, kept = run(op, args, (3, 256), "token", True)
        _, _, plain = run(op, args, (3, 256), "token", True, kept=False)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(kept, plain, strict=True)), op
