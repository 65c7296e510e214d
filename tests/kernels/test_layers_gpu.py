"""Layers and the shipped model on a GPU's kernels: captured once, and equal to eager bit for bit."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dsv4lab import corpus, ops
from dsv4lab.calibration import calibrate
from dsv4lab.device import supports
from dsv4lab.layers import GroupedLinear, MoE, quantize_model_, set_activation_scale_, warmup
from dsv4lab.layers.whole_model import quantizable_layers
from dsv4lab.model import DeepseekV4
from dsv4lab.model.decode_step import DecodeStep
from dsv4lab.model.generate import encode_bytes

pytestmark = pytest.mark.gpu
GPU = "cuda"
NANO = corpus.TRAINED_ON.parent


@pytest.fixture(scope="module", autouse=True)
def backend():
    """Kernels, whatever the defaults are."""
    for name in ("hopper", "blackwell"):
        if supports(name):
            with ops.use_backend(name):
                yield name
            return
    pytest.skip("no kernels for this GPU")


@contextmanager
def no_waits():
    """Every wait of the host for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def tokens(count: int, hidden: int, seed: int) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator(GPU).manual_seed(seed), device=GPU).bfloat16()


@torch.no_grad()
def captured_equals_eager(layer, inputs) -> None:
    """Replays with other inputs give what eager calls give; neither waits for the GPU."""
    x = inputs(0).clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        held = warmup(layer, x.shape[0]).on(torch.device(GPU, torch.cuda.current_device()))
        layer(x)
    with held.hold():
        with torch.cuda.graph(graph, stream=stream):
            result = layer(x)
        seen = []
        for seed in range(1, 6):
            new = inputs(seed)
            with no_waits():
                x.copy_(new)
                graph.replay()
                eager = layer(new)
            assert result.isfinite().all() and same(result, eager), seed
            seen.append(result.clone())
    assert not same(seen[0], seen[1])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", ["token", "bound", "tensor"])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_a_whole_moe_layer(count, policy, fused):
    torch.manual_seed(0)
    moe = MoE(1024, 512, 64, 6, dtype=torch.bfloat16, device=GPU).requires_grad_(False)
    quantize_model_(moe)
    set_activation_scale_(moe, policy)
    moe.experts.fused = fused
    captured_equals_eager(moe, lambda seed: tokens(count, 1024, seed))


@pytest.mark.parametrize("count", [1, 64])
def test_bf16_activations(backend, count):
    if backend == "blackwell":
        pytest.skip("the blackwell backend refuses them")
    torch.manual_seed(0)
    moe = MoE(1024, 512, 16, 6, dtype=torch.bfloat16, device=GPU).requires_grad_(False)
    quantize_model_(moe)
    for _, layer in quantizable_layers(moe):
        layer.activation_dtype = "bf16"
    captured_equals_eager(moe, lambda seed: tokens(count, 1024, seed))


@pytest.mark.parametrize("policy", ["token", "group"])
def test_wo_a(policy):
    torch.manual_seed(0)
    layer = GroupedLinear(8, 512, 128, dtype=torch.bfloat16, device=GPU).requires_grad_(False)
    quantize_model_(layer)
    set_activation_scale_(layer, policy)
    captured_equals_eager(layer, lambda seed: tokens(3 * 8, 512, seed).view(3, 8, 512))


def ids_of(text: str) -> Tensor:
    return torch.tensor([encode_bytes(text)], device=GPU)


def nano(policy: str) -> DeepseekV4:
    model = DeepseekV4.from_pretrained(NANO, dtype=torch.bfloat16).requires_grad_(False).to(GPU)
    scales = calibrate(model, [ids_of("def kernels(x):\n    return x\n" * 4)])
    quantize_model_(model, calibration=scales)
    set_activation_scale_(model, policy)
    return model


@pytest.mark.parametrize("policy", ["token", "static"])
@torch.no_grad()
def test_the_whole_decode_step_of_nano(policy):
    """Its replays, with other tokens each time, against eager steps of a cache of their own."""
    model = nano(policy)
    ids = torch.randint(32, 127, (2, 90), generator=torch.Generator().manual_seed(0)).to(GPU)
    want, got = model.new_cache(2, 120), model.new_cache(2, 120)
    model(ids[:, :50], want), model(ids[:, :50], got)
    want.fixed = True
    with DecodeStep(model, got) as step:
        for t in range(50, 90):
            with no_waits():
                logits = step(ids[:, t])
                eager = model(ids[:, t : t + 1], want)[:, -1]
            assert torch.equal(logits, eager), t


def test_a_copy_of_a_model_has_the_same_bits():
    model = nano("token")
    ids = ids_of("import torch\n")
    with torch.no_grad():
        assert torch.equal(model(ids), copy.deepcopy(model)(ids))
