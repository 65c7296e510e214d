"""Whole layers and the shipped model on Blackwell's kernels, in the emulator.

Each operation that they call is compared with the reference for the operands that it got (see referee). What
stands between the operations is the same code for every backend.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from dsv4lab.kernels.launch import compiled_for

from dsv4lab import corpus, ops
from dsv4lab.calibration import calibrate
from dsv4lab.layers import (
    GroupedLinear,
    Linear,
    MoE,
    SharedExpert,
    quantize_model_,
    set_activation_scale_,
    warmup,
)
from dsv4lab.model import DeepseekV4
from dsv4lab.model.generate import encode_bytes, generate

NANO = corpus.TRAINED_ON.parent


@pytest.fixture(scope="module")
def gpu(b200):
    """The emulated GPU; its checks can be switched off with `unchecked`."""
    b200.options = dataclasses.replace(b200.options, trace=False)
    importlib.import_module("dsv4lab.kernels.blackwell")
    return b200


@pytest.fixture
def unchecked(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "options", dataclasses.replace(gpu.options, checks=frozenset()))


@pytest.fixture
def referee(gpu, cases, monkeypatch):
    spec = importlib.util.spec_from_file_location("referee", Path(__file__).with_name("referee.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    watching = module.Referee(cases)
    watching.watch(monkeypatch, "blackwell")
    return watching


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def made(name: str, policy: str):
    """A layer at nano's sizes, in high precision, and quantized under a policy; the shape of a token."""
    kind, _, how = name.partition(" ")
    bf16 = {"dtype": torch.bfloat16}
    before = {"route_weight": "before"} if how == "before" else {}
    layer, shape = {
        "linear": lambda: (Linear(256, 128, **bf16), (256,)),
        "ugly": lambda: (Linear(80, 24, **bf16), (3, 80)),
        "wo_a": lambda: (GroupedLinear(2, 256, 128, **bf16), (2, 256)),
        "shared": lambda: (SharedExpert(256, 128, **bf16), (256,)),
        "moe": lambda: (MoE(256, 128, 8, 4, route_scale=1.5, **before, **bf16), (256,)),
    }[kind]()
    for i, p in enumerate(layer.requires_grad_(False).parameters()):
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(i))
    exact = copy.deepcopy(layer)
    scales = calibrate(layer, [seeded(40, *shape, seed=5)])
    quantize_model_(layer, policy, scales)
    for m in layer.modules():
        if how == "unfused" and hasattr(m, "fused"):
            m.fused = False
    return exact, layer, shape


LAYERS = [
    ("linear", "token", 1),
    ("linear", "tensor", 130),
    ("linear", "static", 5),
    ("ugly", "token", 2),
    ("wo_a", "token", 1),
    ("wo_a", "group", 130),
    ("wo_a", "tensor", 5),
    ("shared", "token", 1),
    ("shared", "bound", 5),
    ("shared unfused", "token", 5),
    ("shared unfused", "bound", 130),
    ("moe", "token", 1),
    ("moe", "bound", 5),
    ("moe", "tensor", 5),
    ("moe unfused", "token", 5),
    ("moe before", "bound", 5),
]


@pytest.mark.parametrize(("name", "policy", "tokens"), LAYERS)
def test_layers(name, policy, tokens, referee):
    """Sums differ by 1e-6 at most, so that one code in ten thousand between two products may flip, which is
    worth 12 mean squared errors of the rounding (step^2 / 12)."""
    exact, layer, shape = made(name, policy)
    x = seeded(tokens, *shape)
    want = layer(x)
    with ops.use_backend("blackwell"):
        got = layer(x)
        assert layer(x[:0]).shape == (0, *want.shape[1:])
    effect = (exact(x).float() - want.float()).square().mean()
    assert (got.float() - want.float()).square().mean() <= 12e-4 * effect
    assert torch.equal(layer(x), want)  # with its weights' scales moved, and back on the CPU
    products = {op for op in referee.calls if op.startswith("grouped_mm")}
    assert products and referee.layouts == {(op, "swizzled", "swizzled") for op in products}
    if "moe" in name or "shared" in name:
        fused = {"bound": "grouped_mm_swiglu_quantize"}.get(policy, "grouped_mm_swiglu")
        fused = "grouped_mm_swiglu" if "before" in name else fused
        assert (fused in products) == ("unfused" not in name)
        assert ("swiglu_quantize" in referee.calls) == ("unfused" in name)


def test_one_quantization_serves_routed_and_shared_experts(referee):
    _, layer, _ = made("moe", "token")
    with ops.use_backend("blackwell"):
        layer(seeded(3, 256))
    # x, and the inputs of both second products; the copies' scales are gathered, then swizzled
    assert referee.calls == {
        "quantize": 3, "unswizzle_scales": 1, "swizzle_scales": 1, "grouped_mm_swiglu": 2, "grouped_mm": 2,
    }  # fmt: skip


def test_weight_only_is_refused(gpu):
    _, layer, _ = made("linear", "token")
    layer.activation_dtype = "bf16"
    with ops.use_backend("blackwell"), pytest.raises(ValueError, match="NVFP4 activations only, got bf16"):
        layer(seeded(2, 256))


def test_after_a_warm_up_nothing_is_compiled(gpu, monkeypatch):
    """For no number of tokens; launches are not executed here."""
    monkeypatch.setattr(gpu, "executor", lambda launch: None)
    names = (("linear", "token"), ("wo_a", "token"), ("shared", "bound"), ("moe", "token"))
    model = torch.nn.ModuleDict({name: made(name, policy)[1] for name, policy in names})
    with ops.use_backend("blackwell"):
        warmup(model, 160)
        before = set(compiled_for(gpu))
        for tokens in (*range(1, 20), 31, 33, 63, 65, 127, 129, 160):
            for name, layer in model.items():
                layer(seeded(tokens, 2, 256) if name == "wo_a" else seeded(tokens, 256))
    assert set(compiled_for(gpu)) == before


# The shipped model


@pytest.fixture(scope="module")
def prompt():
    return torch.tensor([encode_bytes("The quick brown fox")])


@pytest.fixture(scope="module")
def models():
    """In bf16, and in NVFP4."""
    exact = DeepseekV4.from_pretrained(NANO).requires_grad_(False)
    return exact, quantize_model_(copy.deepcopy(exact))


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def step(model, prompt):
    """Logits of the token after a prompt, decoded as one step; the prompt is prefilled in plain torch."""
    cache = model.new_cache(1, 64)
    with ops.use_backend("reference"):
        model(prompt[:, :-1], cache)
    return model(prompt[:, -1:], cache)


@pytest.mark.parametrize("policy", ["token", "bound"])
def test_a_decode_step(policy, models, prompt, referee):
    """All of it: 6 layers of 5 linears and the experts' 2 and 2 products, with all checks of the emulator.

    Values differ by accumulation order before they are rounded to bf16; 2 % of the codes may flip, which is
    worth sqrt(0.02 * 12) = 50 % of what quantization does to the logits.
    """
    exact, model = models
    set_activation_scale_(model, policy)
    with torch.no_grad():
        want, effect = step(model, prompt), rms(step(model, prompt) - step(exact, prompt))
        with ops.use_backend("blackwell"):
            got = step(model, prompt)
    assert effect > 0 and rms(got - want) <= 0.5 * effect
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert sum(n for op, n in referee.calls.items() if op.startswith("grouped_mm")) == 6 * 9
    assert {layouts[1:] for layouts in referee.layouts} == {("swizzled", "swizzled")}


def test_tokens_are_those_of_the_reference(models, prompt, unchecked):
    """Prefill and greedy decoding."""
    _, model = models
    set_activation_scale_(model, "token")
    want = torch.cat(list(generate(model, prompt, 4)))
    with ops.use_backend("blackwell"):
        assert torch.equal(torch.cat(list(generate(model, prompt, 4))), want)
