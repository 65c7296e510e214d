"""The quantize family on a GPU: sizes that an emulator has no time for, many random ones, and graphs."""

from __future__ import annotations

import math
import random

import pytest
import torch
from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS
from torch import Tensor

from dsv4lab import reference

pytestmark = pytest.mark.gpu
GPU = "cuda"
DIVISOR, EPS = 2688.0, 1e-6
REFERENCES = {"swizzle_scales": reference.swizzle, "unswizzle_scales": reference.unswizzle}


def bits(t: Tensor) -> Tensor:
    """The bits of a tensor, those of any NaN the same."""
    if t.dtype in (torch.float32, torch.bfloat16, torch.float16):
        t = torch.where(t.isnan(), math.nan, t)
        return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)
    return t.view(torch.uint8)


def fill(op: str, *args, **options) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels make, and what the reference makes on the same device."""
    want = REFERENCES.get(op, getattr(reference, op, None))(*args)
    want = list(want) if isinstance(want, tuple) else [want]
    outs = [torch.empty_like(t) for t in want]
    IMPLEMENTATIONS[op](*args, *outs, **options)
    return outs, want


def check(op: str, *args) -> None:
    for found, want in zip(*fill(op, *args), strict=True):
        assert torch.equal(bits(found), bits(want)), (op, [getattr(a, "shape", a) for a in args])


def check_fused(op: str, shape: tuple[int, ...], *args) -> Tensor:
    """The codes must be those of the bf16 values between, which are returned."""
    values = torch.empty(shape, dtype=torch.bfloat16, device=GPU)
    outs, _ = fill(op, *args, kept=values)
    for found, want in zip(outs, reference.quantize(values, *args[-4:]), strict=False):
        assert torch.equal(bits(found), bits(want)), (op, shape)
    return values


def data(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(shape, device=GPU)
    return (x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), device=GPU))).to(dtype)


def ulp(y: Tensor) -> Tensor:
    _, exponent = torch.frexp(y.abs().clamp_min(2.0**-126))
    return torch.exp2((exponent - 8).double())


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("policy", ["tensor", "token", "known"])
@pytest.mark.parametrize("rows", [1, 16, 17, 300, 8192])
def test_large_rows(rows, policy, swizzled):
    g = torch.tensor(0.002, device=GPU) if policy == "known" else None
    scale = (g, "tensor" if policy == "known" else policy, DIVISOR, swizzled)
    check("quantize", data(rows, 7168), *scale)
    x, weight = data(rows, 7168), torch.randn(7168, device=GPU)
    values = check_fused("rmsnorm_quantize", (rows, 7168), x, weight, EPS, *scale)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    assert ((values.double() - exact).abs() <= ulp(exact)).all()
    streams, mix = data(rows, 4, 7168), torch.rand(rows, 4, device=GPU)
    check_fused("mhc_rmsnorm_quantize", (rows, 7168), streams, mix, weight, EPS, *scale)
    gate_up = torch.randn(rows, 2 * 3072, device=GPU).mul(7).bfloat16()
    for limit, interleaved in ((10.0, True), (None, False)):
        values = check_fused("swiglu_quantize", (rows, 3072), gate_up, limit, interleaved, *scale)
        gate, up = (t.double() for t in reference.split_gate_up(gate_up, interleaved))
        if limit:
            gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
        exact = gate * torch.sigmoid(gate) * up
        assert ((values.double() - exact).abs() <= ulp(exact)).all()
    codes, scales, g = reference.quantize(data(rows, 7168), *scale)
    check("dequantize", codes, scales, g, scale[1], swizzled, False, torch.bfloat16)


def test_more_than_two_to_the_31_values():
    rows, columns = 2**31 // 16384 + 3, 16384
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=GPU)
    x[-1] = torch.randn(columns, device=GPU)
    outs = [torch.empty(rows, columns // 2, dtype=torch.uint8, device=GPU)]
    outs.append(torch.empty(-(-rows // 128) * 128, columns // 16, device=GPU).to(torch.float8_e4m3fn))
    outs.append(torch.empty(rows, device=GPU))
    IMPLEMENTATIONS["quantize"](x, None, "token", DIVISOR, True, *outs)
    codes, _, g = reference.quantize(x[-1:], None, "token", DIVISOR, False)
    assert torch.equal(outs[0][-1:], codes) and torch.equal(outs[2][-1:], g)
    back = torch.empty_like(x)
    IMPLEMENTATIONS["dequantize"](*outs, "token", True, False, torch.bfloat16, back)
    assert not back[:-1].any()
    scales = reference.unswizzle(outs[1][-128:], rows % 128 or 128, columns // 16)[-1:]
    assert torch.equal(
        back[-1:], reference.dequantize(codes, scales, g, "token", False, False, torch.bfloat16)
    )


def test_random_shapes():
    """Sizes at random, in every policy and layout; values of any bits once in a while."""
    choose = random.Random(0)
    for _ in range(300):
        rows, columns = int(2 ** choose.uniform(0, 11)), 16 * int(2 ** choose.uniform(0, 10.5))
        groups = choose.choice((None, None, 1, 3, 7))
        shape = (rows, columns) if groups is None else (groups, max(rows // groups, 1), columns)
        dtype = choose.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
        x = data(*shape, dtype=dtype)
        if choose.random() < 0.2 and dtype == torch.bfloat16:
            x = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=GPU).view(dtype)
        policy = choose.choice(("tensor", "token", "known", "known token") + ("group",) * (len(shape) > 2))
        swizzled = choose.random() < 0.5
        g, granularity = None, policy
        if policy == "known":
            g, granularity = torch.rand((), device=GPU) * 0.01, "tensor"
        elif policy == "known token":
            g, granularity = torch.rand(shape[:-1], device=GPU) * 0.01, "token"
        check("quantize", x, g, granularity, DIVISOR, swizzled)
        codes, scales, g = reference.quantize(x, g, granularity, DIVISOR, swizzled)
        check("dequantize", codes, scales, g, granularity, swizzled, False, dtype)
        linear = torch.randint(0, 256, (*shape[:-1], columns // 16), device=GPU, dtype=torch.uint8)
        check("swizzle_scales", linear)
        check("unswizzle_scales", reference.swizzle(linear), *linear.shape[-2:])


@pytest.mark.parametrize("policy", ["tensor", "token"])
@pytest.mark.parametrize("rows", [4, 64])
def test_a_graph_sees_new_data(policy, rows):
    x = data(rows, 7168)
    outs, _ = fill("quantize", x, None, policy, DIVISOR, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        IMPLEMENTATIONS["quantize"](x, None, policy, DIVISOR, True, *outs)
    for _ in range(3):
        x.copy_(data(rows, 7168))
        graph.replay()
        for found, want in zip(outs, reference.quantize(x, None, policy, DIVISOR, True), strict=True):
            assert torch.equal(bits(found), bits(want))
