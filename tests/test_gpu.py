"""What only a GPU can show: the CPU's bits, no waits for the device, and graphs that see new data."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsv4lab import quantize, reference
from dsv4lab.calibration import calibrate
from dsv4lab.checkpoint.load import NANO
from dsv4lab.formats import NVFP4Tensor
from dsv4lab.gemm import grouped_mm, grouped_mm_swiglu
from dsv4lab.layers import (
    GroupedLinear,
    Linear,
    MoE,
    SharedExpert,
    quantize_model_,
    set_activation_scale_,
    warmup,
)
from dsv4lab.layouts import interleave_gate_up, swizzle_scales, unswizzle_scales
from dsv4lab.model import DeepseekV4
from dsv4lab.model.decode_step import DecodeStep
from dsv4lab.model.generate import generate
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4, quantize_weight

pytestmark = pytest.mark.gpu
GPU = "cuda"
SHAPE = (4, 8, 64)
POLICIES = ("tensor", "token", "group", "number", "static", "row scales", "group scales", "callable")
RUNTIME = ("token", "tensor", "group", "static", "bound", "callable")


def same(a: Tensor | NVFP4Tensor, b: Tensor | NVFP4Tensor) -> bool:
    """Equal in shape, dtype and every byte; a NaN equals any other NaN, whose payload devices choose."""
    if isinstance(a, NVFP4Tensor):
        return all(same(getattr(a, n), getattr(b, n)) for n in ("codes", "block_scales", "global_scale"))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.cpu(), b.cpu()
    if a.dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.where(t.isnan(), torch.full_like(t, math.nan), t) for t in (a, b))
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def on_gpu(value):
    """A tensor or NVFP4Tensor on the GPU, anything else as it is."""
    return value.to(GPU) if isinstance(value, Tensor | NVFP4Tensor) else value


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> dict[str, Tensor]:
    """Inputs of SHAPE, by name."""
    spread = torch.randint(-60, 60, SHAPE, generator=torch.Generator().manual_seed(1)).float()
    bits = torch.arange(2048, dtype=torch.int32) * 32 + 7
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]).repeat(2) * torch.tensor([1.0, -1]).repeat(
        8
    )
    broken = normal(*SHAPE)
    broken[0, 3, 40], broken[1, 0, 0], broken[2, 7, 63] = math.nan, math.inf, -math.inf
    outlier = torch.zeros(SHAPE)
    outlier[1, 2, 17], outlier[3, 7, 63] = 1e4, -3e-7
    return {
        "bf16": normal(*SHAPE).bfloat16(),
        "fp16": normal(*SHAPE).half(),
        "fp32": normal(*SHAPE),
        "wide": normal(*SHAPE) * spread.exp2(),
        "every 32nd bf16, NaN too": bits.to(torch.int16).view(torch.bfloat16).reshape(SHAPE),
        "ties": ties.repeat(128).reshape(SHAPE) * spread[..., ::16].repeat_interleave(16, -1).exp2(),
        "zeros": torch.zeros(SHAPE),
        "negative zeros": torch.full(SHAPE, -0.0),
        "one value among zeros": outlier,
        "NaN and Inf": broken,
        "subnormals": torch.arange(2048, dtype=torch.int32).view(torch.float32).reshape(SHAPE),
        "largest": torch.full(SHAPE, torch.finfo(torch.bfloat16).max),
    }


def policy(name: str, lead: tuple[int, ...] = SHAPE[:-1]):
    """A policy for data with these leading dimensions, known scales on the CPU."""
    return {
        "number": 0.0123,
        "static": torch.tensor(0.0123),
        "row scales": normal(*lead, seed=2).abs() / 100,
        "group scales": normal(lead[0], seed=3).abs() / 100,
        "callable": lambda y: quantize.global_scale(y, "token"),
    }.get(name, name)


# ---------------------------------------------------------------- the quantizing operations: the CPU's bits


@pytest.mark.parametrize("how", POLICIES)
@pytest.mark.parametrize("name", list(data()))
def test_quantize_gives_the_bits_of_the_cpu(name, how):
    x, p = data()[name], policy(how)
    for layout in ("linear", "swizzled"):
        want = quantize_nvfp4(x, p, scale_layout=layout)
        got = quantize_nvfp4(x.to(GPU), on_gpu(p), scale_layout=layout)
        assert same(got, want)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert same(dequantize_nvfp4(got, dtype), dequantize_nvfp4(want, dtype))
    if how in ("tensor", "token", "group", "callable"):
        assert same(quantize.global_scale(x.to(GPU), p), quantize.global_scale(x, p))


def test_quantize_of_random_bits():
    """Ten million values, each with a row scale of its own."""
    g = torch.Generator().manual_seed(5)
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.randint(-(2**15), 2**15, (4096, 1024), generator=g, dtype=torch.int16)
        x = bits.view(dtype)
        for how in ("token", 0.05):
            assert same(quantize_nvfp4(x.to(GPU), how), quantize_nvfp4(x, how))


@pytest.mark.parametrize("shape", [(1, 0), (0, 16), (1, 16), (129, 80), (3, 0, 32)])
def test_quantize_of_odd_and_empty_shapes(shape):
    x = normal(*shape).bfloat16()
    for how in ("tensor", "token", 0.01):
        for layout in ("linear", "swizzled"):
            assert same(
                quantize_nvfp4(x.to(GPU), how, scale_layout=layout),
                quantize_nvfp4(x, how, scale_layout=layout),
            )


def fused(name: str, seed: int = 0):
    """(call(policy, **options), bf16 intermediate, the same in float64), all inputs on the GPU."""
    x, weight = (4 * normal(*SHAPE, seed=seed)).bfloat16().to(GPU), normal(64, seed=1).to(GPU)
    if name == "rmsnorm":
        y = reference.rmsnorm(x, weight, 1e-6)[0]
        call = lambda p, **o: quantize.rmsnorm_quantize(x, weight, 1e-6, p, **o)[0]  # noqa: E731
        return call, y, exact_norm(x.double(), weight)
    if name == "mhc":
        streams = normal(*SHAPE[:-1], 4, 64, seed=seed).bfloat16().to(GPU)
        mix = normal(*SHAPE[:-1], 4, seed=2).to(GPU)
        y = reference.rmsnorm(reference.mhc_mix(streams, mix), weight, 1e-6)[0]
        call = lambda p, **o: quantize.mhc_rmsnorm_quantize(streams, mix, weight, 1e-6, p, **o)[0]  # noqa: E731
        return call, y, exact_norm((streams.double() * mix.double().unsqueeze(-1)).sum(-2), weight)
    kind, _, clamp = name.partition(" ")
    limit, interleaved = (10.0 if clamp else None), kind == "interleaved"
    gate_up = (4 * normal(*SHAPE[:-1], 128, seed=seed)).bfloat16().to(GPU)
    gate, up = reference.split_gate_up(gate_up, interleaved)
    call = lambda p, **o: quantize.swiglu_quantize(gate_up, limit, p, interleaved, **o)  # noqa: E731
    top = limit or math.inf
    exact = nn.functional.silu(gate.double().clamp(max=top)) * up.double().clamp(-top, top)
    return call, reference.swiglu(gate, up, limit), exact


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


FUSED = ("rmsnorm", "mhc", "plain", "plain clamped", "interleaved", "interleaved clamped")


@pytest.mark.parametrize("how", POLICIES)
@pytest.mark.parametrize("name", FUSED)
def test_fused_gives_the_cpu_s_bits_of_its_own_intermediate(name, how):
    """The intermediate itself is within one bf16 ulp of float64."""
    call, y, exact = fused(name)
    p = policy(how)
    for layout in ("linear", "swizzled"):
        assert same(call(on_gpu(p), scale_layout=layout), quantize_nvfp4(y.cpu(), p, scale_layout=layout))
    ulp = torch.exp2(exact.abs().log2().floor() - 7)
    assert ((y.double() - exact).abs() <= ulp).all()


# ---------------------------------------------------------------- layouts, GEMM, given results


SIZES = [(1, 1), (128, 4), (130, 5), (300, 17), (3, 64, 9), (2, 129, 1)]


@pytest.mark.parametrize("shape", SIZES)
def test_swizzle_and_back(shape):
    x = torch.randint(0, 127, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for scales in (x, x.view(torch.float8_e4m3fn)):
        swizzled = swizzle_scales(scales.to(GPU))
        assert same(swizzled, swizzle_scales(scales))
        assert same(unswizzle_scales(swizzled, *shape[-2:]), scales)


def groups(how: str, sizes=(0, 130, 1, 128, 7), behind: int = 128, n: int = 48, k: int = 96, seed: int = 0):
    """(a, b, offsets, sizes, real rows) on the GPU: five groups, and rows behind the last."""
    sizes = torch.tensor(sizes, dtype=torch.int32)
    offsets = ((sizes + 127) // 128 * 128).cumsum(0, dtype=torch.int32)
    rows = int(offsets[-1]) + behind
    starts = torch.cat((offsets.new_zeros(1), offsets[:-1]))
    real = torch.cat([torch.arange(s, s + c) for s, c in zip(starts.tolist(), sizes.tolist(), strict=True)])
    x = normal(rows, k, seed=seed).bfloat16().to(GPU)
    g = torch.rand(5, generator=torch.Generator().manual_seed(9)).to(GPU) + 0.01
    a = {
        "bf16": lambda: x,
        "group": lambda: quantize_nvfp4(x, 0.002).with_(global_scale=g / 100, granularity="group"),
    }.get(how, lambda: quantize_nvfp4(x, how))()
    b = quantize_weight(normal(5, n, k, seed=1).bfloat16().to(GPU), global_scale="group")
    return a, b, offsets.to(GPU), sizes.to(GPU), real.to(GPU)


def exact_product(a, b, offsets, real) -> tuple[Tensor, Tensor]:
    """In float64, and the same of magnitudes: real rows of a against their group's matrix."""
    if isinstance(a, NVFP4Tensor):
        ones = a.with_(global_scale=torch.ones((), device=GPU), granularity="tensor")
        g = a.global_scale.double()
        group = torch.searchsorted(offsets, torch.arange(a.shape[0], device=GPU), right=True).clamp(max=4)
        g = {"tensor": lambda: g, "token": lambda: g[:, None], "group": lambda: g[group][:, None]}[
            a.granularity
        ]()
        rows = (dequantize_nvfp4(ones, torch.float32).double() * g)[real]
    else:
        rows = a.double()[real]
    weight = dequantize_nvfp4(
        b.with_(global_scale=torch.ones((), device=GPU), granularity="tensor"), torch.float32
    )
    weight = weight.double() * b.global_scale.double()[:, None, None]
    weight = weight[torch.searchsorted(offsets, real, right=True)]
    return tuple(torch.einsum("rk,rnk->rn", f(rows), f(weight)) for f in (lambda t: t, torch.abs))


@pytest.mark.parametrize("how", ["tensor", "token", "group", "bf16"])
def test_grouped_mm_is_within_its_bound(how):
    """One bf16 rounding (2^-8), and per accumulation step and scaling 2^-23 of the sum of magnitudes."""
    a, b, offsets, sizes, real = groups(how)
    exact, magnitude = exact_product(a, b, offsets, real)
    got = grouped_mm(a, b, offsets, sizes)[real].double()
    assert ((got - exact).abs() <= 2**-8 * exact.abs() + (96 + 3) * 2**-23 * magnitude).all()


@pytest.mark.parametrize("how", ["tensor", "token", "group", "bf16"])
def test_grouped_mm_of_one_hot_rows_is_exact(how):
    """Row r is six times column r % K of its group's weight: which is which leaves no room for tolerance.

    Six is a code with scale one; a code, a scale and six together have 8 bits, as many as bf16.
    """
    a, b, offsets, sizes, real = groups(how)
    x = torch.zeros(a.shape, dtype=torch.bfloat16, device=GPU)
    x[torch.arange(len(x)), torch.arange(len(x)) % 96] = 6.0
    if how != "bf16":
        one = {"tensor": (), "token": (len(x),), "group": (5,)}[how]
        x = quantize_nvfp4(x, 1.0).with_(global_scale=torch.ones(one, device=GPU), granularity=how)
    b = b.with_(global_scale=torch.full((5,), 0.5, device=GPU))
    weight = 6 * dequantize_nvfp4(b, torch.float32)
    want = weight[torch.searchsorted(offsets, real, right=True), :, real % 96].bfloat16()
    assert torch.equal(grouped_mm(x, b, offsets, sizes)[real], want)  # a sum with zeros has no negative zero


@pytest.mark.parametrize("how", ["tensor", "token", "group", "bf16"])
def test_grouped_mm_swiglu_is_within_its_bound(how):
    """silu has slope 1.1 at most, and rounding to bf16 and fp32's own exp add to what the product left."""
    a, b, offsets, sizes, real = groups(how, n=64)
    (gate, up), sizes_of = (t.chunk(2, -1) for t in exact_product(a, b, offsets, real))
    dg, du = ((96 + 3) * 2**-23 * m for m in sizes_of)
    exact = nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)
    bound = (
        1.1 * dg * up.abs() + nn.functional.silu(gate).abs() * du + (2**-8 + 2**-20) * exact.abs() + dg * du
    )
    woven = interleave_gate_up(b)
    h = grouped_mm_swiglu(a, woven, offsets, sizes)
    assert ((h[real].double() - exact).abs() <= bound).all()
    codes = grouped_mm_swiglu(a, woven, offsets, sizes, output="nvfp4")
    want = quantize_nvfp4(h.cpu(), quantize.bound_global_scale(10.0))
    assert same(codes.codes[real], want.codes[real.cpu()])
    assert same(codes.block_scales[real], want.block_scales[real.cpu()])
    padding = torch.ones(len(h), dtype=torch.bool, device=GPU)
    padding[real] = False
    assert not codes.block_scales.view(torch.uint8)[padding].any()


def operations(seed: int) -> dict[str, tuple]:
    """name -> (call(*inputs, out=None), inputs); fixed sizes, data by the seed."""
    x, w = normal(8, 64, seed=seed).bfloat16().to(GPU), normal(64, seed=1).to(GPU)
    made = {
        f"quantize {how} {layout}": (
            partial(quantize_nvfp4, global_scale=how, scale_layout=layout), (x,)
        )
        for how in ("tensor", "token", 0.01) for layout in ("linear", "swizzled")
    }  # fmt: skip
    made["rmsnorm"] = (
        lambda t, out=None: quantize.rmsnorm_quantize(t, w, 1e-6, "token", out=out)[0],
        (x,),
    )
    made["mhc"] = (
        lambda s, m, out=None: quantize.mhc_rmsnorm_quantize(s, m, w, 1e-6, "token", out=out)[0],
        (normal(8, 4, 64, seed=seed).bfloat16().to(GPU), normal(8, 4, seed=seed).to(GPU)),
    )
    made["swiglu"] = (
        lambda t, out=None: quantize.swiglu_quantize(t, 10.0, "token", out=out),
        (normal(8, 128, seed=seed).bfloat16().to(GPU),),
    )
    made["dequantize"] = (
        lambda c, s, g, out=None: dequantize_nvfp4(NVFP4Tensor(c, s, g), out=out),
        parts(quantize_nvfp4(x, "token")),
    )
    scales = quantize_nvfp4(x.repeat(40, 1), "tensor").block_scales
    made["swizzle"] = (swizzle_scales, (scales,))
    made["unswizzle"] = (lambda t, out=None: unswizzle_scales(t, 320, 4, out=out), (swizzle_scales(scales),))
    a, b, offsets, sizes, _ = groups("token", (0, 256, 128, 128, 0), 0, n=64, seed=seed)  # without padding
    woven = interleave_gate_up(b)
    for name, call in {
        "grouped_mm": lambda t, out=None: grouped_mm(t, b, offsets, sizes, out=out),
        "grouped_mm_swiglu": lambda t, out=None: grouped_mm_swiglu(t, woven, offsets, sizes, out=out),
        "grouped_mm_swiglu nvfp4": lambda t, out=None: grouped_mm_swiglu(
            t, woven, offsets, sizes, output="nvfp4", out=out
        ),
    }.items():
        made[name] = (lambda c, s, g, out=None, call=call: call(NVFP4Tensor(c, s, g), out=out), parts(a))
    return made


def parts(t: NVFP4Tensor) -> tuple[Tensor, ...]:
    return t.codes, t.block_scales, t.global_scale


def longer(t: Tensor | NVFP4Tensor, more: int = 128):
    """An `out` with more rows than the result, filled with a byte that stands out."""
    if isinstance(t, NVFP4Tensor):
        g = t.global_scale
        g = longer(g, more) if t.granularity == "token" else torch.full_like(g, 7.0)
        codes, scales = longer(t.codes, more), longer(t.block_scales, more)
        return NVFP4Tensor(codes, scales, g, t.scale_layout, t.granularity)
    empty = torch.empty(t.shape[0] + more, *t.shape[1:], dtype=t.dtype, device=t.device)
    empty.flatten().view(torch.uint8).fill_(0xEE)
    return empty


def storages(t: Tensor | NVFP4Tensor) -> list[Tensor]:
    return list(parts(t)) if isinstance(t, NVFP4Tensor) else [t]


@pytest.mark.parametrize("name", list(operations(0)) if torch.cuda.is_available() else [])
def test_given_results_are_filled_and_no_more(name):
    call, inputs = operations(0)[name]
    want = call(*inputs)
    out = longer(want)
    got = call(*inputs, out=out)
    assert same(got, want)
    for have, full, result in zip(storages(got), storages(out), storages(want), strict=True):
        assert have.data_ptr() == full.data_ptr()
        if full.shape != result.shape:
            assert (full[len(result) :].flatten().view(torch.uint8) == 0xEE).all()


@pytest.mark.parametrize("name", list(operations(0)) if torch.cuda.is_available() else [])
def test_a_replay_sees_new_data(name):
    """Both forms in one graph; a launch off the capturing stream would leave the old result."""
    call, inputs = operations(0)[name]
    out, seen = longer(call(*inputs)), []

    def run():
        return call(*inputs), call(*inputs, out=out)

    graph, (fresh, filled) = capture(run)
    for seed in (3, 4):
        new = operations(seed)[name][1]
        for to, value in zip(inputs, new, strict=True):
            to.copy_(value)
        graph.replay()
        want = call(*new)
        assert same(fresh, want) and same(filled, want)
        seen.append(storages(want)[0].clone())
    assert not same(*seen)


def capture(run, prepare=lambda: None):
    """(graph, results) of a function, after a run of it on the capturing stream."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        prepare()
        run()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        results = run()
    return graph, results


# ---------------------------------------------------------------- layers: no waits, graphs, scratch memory


@contextmanager
def no_waits():
    """Every wait of the host for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_operation_waits_for_the_device():
    x, weight, mix = (on_gpu(t) for t in (data()["bf16"], torch.ones(64), normal(4, 2, 4)))
    with no_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        x.amax().item()  # a wait is seen
    gate_up = torch.cat((x, x), -1)
    products = [groups(how, n=64) for how in ("tensor", "token", "group", "bf16")]
    known = on_gpu(policy("static"))
    for again in (nullish, no_waits):  # decoded weights and tables exist after the first time
        with again():
            for how in ("tensor", "token", "group", 0.0123, known, policy("callable")):
                for layout in ("linear", "swizzled"):
                    t = quantize_nvfp4(x, how, scale_layout=layout)
                    dequantize_nvfp4(t)
                quantize.swiglu_quantize(gate_up, 10.0, how)
                quantize.rmsnorm_quantize(x, weight, 1e-6, how)
                quantize.mhc_rmsnorm_quantize(x.view(4, 2, 4, 64), mix, weight, 1e-6, how)
            for a, b, offsets, sizes, _ in products:
                grouped_mm(a, b, offsets, sizes)
                for output in ("bf16", "nvfp4"):
                    grouped_mm_swiglu(a, interleave_gate_up(b), offsets, sizes, output=output)


@contextmanager
def nullish():
    yield


def layer_inputs(rows: int, seed: int = 0) -> dict[str, tuple[Tensor, ...]]:
    x = normal(rows, 64, seed=seed).bfloat16().to(GPU)
    ids = torch.randint(0, 97, (rows,), generator=torch.Generator().manual_seed(seed)).to(GPU)
    return {"linear": (x,), "wo_a": (x.view(rows, 2, 32),), "shared": (x,), "moe": (x,), "hash": (x, ids)}


def layers(how: str, experts: int = 16) -> nn.ModuleDict:
    """One of each kind, in NVFP4 under a policy, or in bf16."""
    made = {"dtype": torch.bfloat16, "device": GPU}
    torch.manual_seed(0)
    all_of_them = nn.ModuleDict({
        "linear": Linear(64, 48, **made), "wo_a": GroupedLinear(2, 32, 32, **made),
        "shared": SharedExpert(64, 32, **made), "moe": MoE(64, 32, experts, 3, **made),
        "hash": MoE(64, 32, experts, 3, vocab_size=97, **made),
    }).requires_grad_(False)  # fmt: skip
    if how == "bf16":
        return all_of_them

    def run(model, inputs):
        for name, args in inputs.items():
            model[name](*args)

    scales = calibrate(all_of_them, [layer_inputs(64, seed=8)], run)
    quantize_model_(all_of_them, calibration=scales)
    set_activation_scale_(all_of_them, policy("callable") if how == "callable" else how)
    return all_of_them


@pytest.mark.parametrize("how", [*RUNTIME, "bf16"])
def test_no_layer_waits_for_the_device(how):
    model, inputs = layers(how), layer_inputs(9)
    want = {name: model[name](*args) for name, args in inputs.items()}
    with no_waits():
        got = {name: model[name](*args) for name, args in inputs.items()}
    for name, y in got.items():
        assert y.isfinite().all() and same(y, want[name])


@pytest.mark.parametrize("how", RUNTIME)
def test_layers_agree_with_the_cpu(how):
    """The same input gives the same codes, so that only sums differ, in their order, by 1e-6 at most.

    One code in ten thousand between two products may then flip, which is worth 12 mean squared errors of the
    rounding (step^2 / 12): sqrt(12e-4) = 3.5 % of what quantization does to the result.
    """
    model, exact, inputs = layers(how), layers("bf16"), layer_inputs(300)
    cpu = copy.deepcopy(model).to("cpu")
    for name, args in inputs.items():
        want = cpu[name](*(t.cpu() for t in args)).float()
        effect = (exact[name](*args).float().cpu() - want).square().mean()
        distance = (model[name](*args).float().cpu() - want).square().mean()
        assert effect.sqrt() > 0.01 * want.square().mean().sqrt()
        assert distance <= 12e-4 * effect, name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", [*RUNTIME, "bf16"])
def test_captured_layers_equal_eager_ones(how, fused):
    """Bit for bit, with other tokens, and so other experts, each time; scratch memory stays where it is."""
    model, inputs = layers(how), layer_inputs(5)
    for name in ("moe", "hash"):
        model[name].experts.fused = fused
    model["shared"].fused = fused
    prepared = []
    graph, results = capture(
        lambda: {name: model[name](*args) for name, args in inputs.items()},
        lambda: prepared.append(warmup(model, 5).on(torch.device(GPU, torch.cuda.current_device()))),
    )
    scratch = {name: b.data_ptr() for name, b in prepared[0]._buffers.items()}
    seen, chosen = [], []
    with prepared[0].hold():
        for seed in range(1, 6):
            new = layer_inputs(5, seed)
            for name, args in new.items():
                for to, value in zip(inputs[name], args, strict=True):
                    to.copy_(value)
            graph.replay()
            for name, args in new.items():
                assert same(results[name], model[name](*args)), name
            seen.append(results["moe"].clone())
            chosen.append(model["moe"].gate(new["moe"][0])[1])
    assert {name: b.data_ptr() for name, b in prepared[0]._buffers.items()} == scratch
    assert bool(scratch) == (how != "bf16")
    for a, b in pairwise(seen):
        assert not same(a, b)
    assert any(not torch.equal(a, chosen[0]) for a in chosen[1:])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_that_would_allocate_scratch_memory_raises():
    cold, x = layers("token")["moe"], layer_inputs(5)["moe"][0]
    cold(x)
    with pytest.raises(RuntimeError, match=r"would allocate under capture: call warmup"):
        only_capture(cold, x)
    with pytest.raises(RuntimeError, match=r"cannot grow to \d+ bytes while a capture runs"):
        only_capture(cold, layer_inputs(300)["moe"][0], lambda: warmup(cold, 5))
    with pytest.raises(RuntimeError, match="call it before"):
        only_capture(lambda t: warmup(cold, 5), x)
    assert cold(x).isfinite().all()


def only_capture(call, x: Tensor, prepare=lambda: None) -> None:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        prepare()
    with torch.cuda.graph(graph, stream=stream):
        call(x)


def test_scratch_memory_does_not_grow_under_a_graph():
    moe, x = layers("token")["moe"], layer_inputs(5)["moe"][0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        space = warmup(moe, 5).on(x.device)
        with space.hold(), pytest.raises(RuntimeError, match=r"while 1 graph\(s\) hold it"):
            moe(layer_inputs(300)["moe"][0])
    torch.cuda.synchronize()


# ---------------------------------------------------------------- the decode step


def tiny(model: DeepseekV4, how: str) -> DeepseekV4:
    """The tiny model on the GPU, in bf16 or NVFP4 under a policy; its inputs calibrated."""
    model = copy.deepcopy(model).to(GPU).requires_grad_(False)
    if how == "bf16":
        return model
    scales = calibrate(model, [tokens(64, seed=5)])
    quantize_model_(model, calibration=scales)
    set_activation_scale_(model, policy("callable") if how == "callable" else how)
    return model


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(GPU)


@pytest.mark.parametrize("how", ["bf16", *RUNTIME])
def test_replayed_steps_equal_eager_fixed_ones(tiny_model, how):
    """Bit for bit from token 120 to 270, past the ends of the window, of blocks, and of what topk keeps."""
    model, ids = tiny(tiny_model, how), tokens(270)
    want, got = model.new_cache(2, 300), model.new_cache(2, 300)
    model(ids[:, :120], want), model(ids[:, :120], got)
    want.fixed = True
    with DecodeStep(model, got) as step:
        assert got.length == got.position.item() == 120
        for t in range(120, 270):
            assert torch.equal(step(ids[:, t]), model(ids[:, t : t + 1], want)[:, -1]), t
        assert got.length == got.position.item() == 270
        for a, b in zip(want.layers, got.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("how", ["bf16", *RUNTIME])
def test_no_step_waits_for_the_device(tiny_model, how):
    model, ids = tiny(tiny_model, how), tokens(20)
    cache = model.new_cache(2, 300)
    model(ids[:, :10], cache)
    with DecodeStep(model, cache) as step, no_waits():
        for t in range(10, 15):
            step(ids[:, t])
        model(ids[:, 15:16], cache)
        model(ids[:, 16:], cache)


def test_replays_allocate_nothing_and_stay_in_place(tiny_model):
    model, ids = tiny(tiny_model, "token"), tokens(100)
    cache = model.new_cache(2, 100)
    buffers = lambda: [t.data_ptr() for layer in cache.layers for t in layer.tensors()]  # noqa: E731
    with DecodeStep(model, cache) as step:
        step(ids[:, 0])
        where, memory = [*buffers(), step.logits.data_ptr()], torch.cuda.memory_allocated()
        for t in range(1, 100):
            step(ids[:, t])
        assert [*buffers(), step.logits.data_ptr()] == where
        assert torch.cuda.memory_allocated() == memory


def test_generate_waits_once_a_token(tiny_model):
    """And its tokens, by graph, are those of eager fixed steps; a seed repeats what is drawn."""
    model, ids = tiny(tiny_model, "token"), tokens(7)
    stepped = generate(model, ids, 12, stop=(300,))
    first = [next(stepped), next(stepped)]
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rest = [next(stepped) for _ in range(10)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 10
    assert all(t.device.type == "cpu" for t in first + rest)
    cache = model.new_cache(2, 19)
    want = [model(ids, cache, last_only=True)[:, -1].argmax(-1)]
    cache.fixed = True
    while len(want) < 12:
        want.append(model(want[-1][:, None], cache)[:, -1].argmax(-1))
    assert torch.equal(torch.stack(first + rest), torch.stack(want).cpu())
    draw = lambda seed: torch.stack(list(generate(model, ids, 12, temperature=1.0, seed=seed)))  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


WAITS = """
import torch
from dsv4lab.model import DeepseekV4, ModelConfig
from dsv4lab.model.generate import generate
model = DeepseekV4(ModelConfig.nano(), device="cuda").eval()
norm = model.norm.forward
model.norm.forward = lambda x: norm(x) * (1.0 if x.sum().item() < 1e30 else 2.0)
steps = generate(model, torch.ones(1, 3, dtype=torch.int64, device="cuda"), 5)
next(steps)
try:
    next(steps)
except RuntimeError as error:
    print("refused:", error)
"""


def test_a_step_that_cannot_be_captured_is_one_clear_error():
    """In a process of its own, since a broken capture may leave the allocator in any state."""
    done = subprocess.run(
        [sys.executable, "-c", WAITS], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.startswith("refused: the decode step could not be captured as a CUDA graph: ")
    assert "operation not permitted when stream is capturing" in done.stdout
    assert "(graph=False decodes without one)" in done.stdout


# ---------------------------------------------------------------- nano: the CPU's tokens

PROMPT, NEW, ROWS = 100, 64, 8


def prompts() -> Tensor:
    """The beginnings of eight of the package's own modules."""
    files = sorted((NANO.parents[1] / "dsv4lab").glob("*.py"))
    beginnings = [f.read_bytes()[:PROMPT] for f in files]
    return torch.tensor([list(b) for b in beginnings if len(b) == PROMPT][:ROWS])


@torch.no_grad()
def replayed(model: DeepseekV4, ids: Tensor, follow: Tensor) -> Tensor:
    """Logits (B, NEW, V) of a graph's steps through given tokens, on the CPU."""
    cache = model.new_cache(len(ids), PROMPT + NEW)
    rows = [model(ids.to(GPU), cache, last_only=True)[:, -1]]
    with DecodeStep(model, cache) as step:
        rows += [step(t).clone() for t in follow.to(GPU).T[: NEW - 1]]
    return torch.stack(rows, 1).cpu()


@torch.no_grad()
def decoded(model: DeepseekV4, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, NEW) and their logits, step by step on the CPU."""
    cache, rows, follow = model.new_cache(len(ids), PROMPT + NEW), [], [ids]
    for _ in range(NEW):
        rows.append(model(follow[-1], cache, last_only=True)[:, -1])
        follow.append(rows[-1].argmax(-1)[:, None])
    return torch.cat(follow[1:], 1), torch.stack(rows, 1)


@torch.no_grad()
def forwarded(model: DeepseekV4, ids: Tensor, follow: Tensor) -> Tensor:
    """The same logits by one forward of the whole."""
    return model(torch.cat((ids, follow), 1)[:, :-1])[:, PROMPT - 1 :]


def nano(dtype: torch.dtype, quantized: bool) -> DeepseekV4:
    model = DeepseekV4.from_pretrained(NANO, dtype=dtype).requires_grad_(False)
    return quantize_model_(model) if quantized else model


def test_nano_in_fp32_decodes_the_cpu_s_tokens():
    """By graph, on its own tokens: 8 texts of 64 bytes.

    Without quantization nothing magnifies rounding, so that a choice may differ only where its margin is
    within what the order of accumulation changes: twice (a margin has two logits) the largest difference
    between one forward and steps on the CPU, twice over for another device. A row is compared up to there.
    """
    cpu, ids = nano(torch.float32, quantized=False), prompts()
    want, logits = decoded(cpu, ids)
    room = 4 * (logits - forwarded(cpu, ids, want)).abs().max()
    top = logits.topk(2, -1).values
    close = (top[..., 0] - top[..., 1] <= room).int().cummax(1).values.bool()
    got = torch.stack(list(generate(copy.deepcopy(cpu).to(GPU), ids.to(GPU), NEW)), 1)
    print(f"fp32: room {room:.1e}, {(~close).sum()} of {close.numel()} choices compared")
    assert torch.equal(got[~close], want[~close]) and (~close).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nano_in_nvfp4_is_as_near_to_high_precision_as_on_the_cpu(dtype):
    """By graph, through the CPU's tokens; streams in fp32 or bf16.

    Tokens cannot be the same for sure. The quantizers are exact, but one value in a million lands on the next
    code where its last bit differs, and that changes codes in all layers and tokens after it: on the CPU, an
    embedding changed by 1e-6 of itself moves the logits as far as bf16 streams do. So at most twice the CPU's
    error is allowed, and choices whose margin is more than twice the CPU's largest error are the same.
    """
    cpu, ids = nano(dtype, quantized=True), prompts()
    want, logits = decoded(cpu, ids)
    exact = forwarded(nano(torch.float32, quantized=False), ids, want)
    got = replayed(copy.deepcopy(cpu).to(GPU), ids, want)
    ours, theirs, apart = (
        a.sub(b).square().mean().sqrt() for a, b in ((got, exact), (logits, exact), (got, logits))
    )
    top = logits.topk(2, -1).values
    clear = top[..., 0] - top[..., 1] > 2 * (logits - exact).abs().max()
    changed = got.argmax(-1) != want
    print(
        f"{dtype}: rms error {ours:.3f}, on the CPU {theirs:.3f}, {apart:.3f} from it; "
        f"{changed.sum()} of {changed.numel()} choices differ, {clear.sum()} are clear"
    )
    assert ours <= 2 * theirs
    assert not changed[clear].any() and clear.float().mean() > 0.05
