"""Layers whose products read swizzled block scales: the same bits, and weights that are moved once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dsv4lab import workspace
from dsv4lab.calibration import calibrate, inspect
from dsv4lab.gemm import GROUPED_MM, GROUPED_MM_SWIGLU, GROUPED_MM_SWIGLU_QUANTIZE
from dsv4lab.layers import (
    GroupedLinear,
    Linear,
    MoE,
    SharedExpert,
    activation,
    quantize_model_,
    set_activation_scale_,
    warmup,
)
from dsv4lab.layers.grouped_linear import _padded_groups
from dsv4lab.layouts import deinterleave_gate_up, swizzle_scales, unswizzle_scales, with_scale_layout
from dsv4lab.ops import Implementation
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4


@pytest.fixture
def swizzled(monkeypatch):
    """A function after whose call plain torch reads block scales as kernels do."""
    return lambda: monkeypatch.setattr(activation, "scale_layout_of", lambda *_: "swizzled")


@pytest.fixture
def layouts(monkeypatch):
    """The layouts of both operands in every product so far."""
    seen = []
    for op in (GROUPED_MM, GROUPED_MM_SWIGLU, GROUPED_MM_SWIGLU_QUANTIZE):
        run = op.implementations["reference"].function

        def looked_at(*args, run=run):
            seen.append((args[3], args[8]))
            return run(*args)

        made = Implementation(looked_at, op.implementations["reference"].out)
        monkeypatch.setitem(op.implementations, "reference", made)
    return seen


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantized(layer, seed=0):
    """Random weights in NVFP4."""
    for i, p in enumerate(layer.parameters()):
        torch.nn.init.normal_(
            p, std=p.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(100 * seed + i)
        )
    return quantize_model_(layer.requires_grad_(False))


def made(name: str, policy: str = "token"):
    """A layer of that name, quantized under a policy, and an input (T, ...) for any T."""
    kind, _, how = name.partition(" ")
    before = {"route_weight": "before"} if how == "before" else {}
    layer, shape = {
        "linear": lambda: (Linear(80, 48), (80,)),
        "batch": lambda: (Linear(80, 48), (3, 80)),
        "wo_a": lambda: (GroupedLinear(3, 80, 32), (3, 80)),
        "shared": lambda: (SharedExpert(80, 48), (2, 80)),
        "moe": lambda: (MoE(80, 48, 6, 2, **before), (80,)),
        "gate": lambda: (MoE(80, 48, 6, 2, nvfp4_gate=True), (80,)),
    }[kind]()
    layer = quantized(layer)
    if how == "unfused":
        for m in layer.modules():
            if hasattr(m, "fused"):
                m.fused = False
    scales = calibrate(layer, [seeded(40, *shape, seed=5)])
    quantize_model_(layer, policy, scales)
    return layer, lambda tokens: seeded(tokens, *shape)


KINDS = ["linear", "batch", "wo_a", "shared", "shared unfused", "moe", "moe unfused", "moe before", "gate"]


@pytest.mark.parametrize("policy", ["token", "tensor", "static", "bound", "group"])
@pytest.mark.parametrize("name", KINDS)
def test_results_are_the_same_bits(name, policy, swizzled, layouts):
    """SwiGLU between unfused products is another float32 formula there, with the same bf16 here."""
    layer, x = made(name, policy)
    want = [layer(x(tokens)) for tokens in (0, 1, 9, 130)]
    assert set(layouts) == {("linear", "linear")}
    layouts.clear()
    swizzled()
    for y in want:
        assert torch.equal(layer(x(y.shape[0])), y)
    assert set(layouts) == {("swizzled", "swizzled")}  # nothing is left for a kernel to move


def test_quantized_activations_come_in_either_layout(swizzled, layouts):
    named = {name: made(name) for name in ("linear", "wo_a", "shared", "moe")}
    inputs = {name: quantize_nvfp4(x(7), "token") for name, (_, x) in named.items()}
    want = {name: layer(inputs[name]) for name, (layer, _) in named.items()}
    swizzled()
    for name, (layer, _) in named.items():
        layouts.clear()
        q = inputs[name]
        assert torch.equal(layer(q), want[name])
        if name in ("linear", "moe"):
            layouts.clear()
            assert torch.equal(layer(with_scale_layout(q, "swizzled")), want[name])
        if name != "shared":  # which cannot swizzle scales of (7, 2, 80) as they are
            assert set(layouts) == {("swizzled", "swizzled")}


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("tokens", [5, 128, 130])
def test_padding_of_groups_has_scales_of_zero(tokens, layout):
    q = quantize_nvfp4(seeded(3, tokens, 80), "token", scale_layout=layout)
    rows, offsets, sizes = _padded_groups(q)
    padded = -(-tokens // 128) * 128
    assert offsets.tolist() == [padded, 2 * padded, 3 * padded] and sizes.tolist() == [tokens] * 3
    values = dequantize_nvfp4(rows.with_(global_scale=torch.ones(()), granularity="tensor"), torch.float32)
    want = dequantize_nvfp4(q.with_(global_scale=torch.ones(()), granularity="tensor"), torch.float32)
    values = values.view(3, padded, 80)
    assert torch.equal(values[:, :tokens], want) and not values[:, tokens:].any()
    assert torch.equal(rows.global_scale.view(3, padded)[:, :tokens], q.global_scale)


def test_observers_see_real_rows_alone(swizzled):
    """What lies in padding must not be calibrated on."""
    layer, x = made("moe")
    want = calibrate(layer, [x(9)])
    with inspect(layer) as seen:
        layer(x(9))
    swizzled()
    with inspect(layer) as again:
        layer(x(9))
    assert calibrate(layer, [x(9)]) == want and again == seen


# Weights


def test_weights_are_moved_once_and_where_they_are(swizzled):
    layer, x = made("moe")
    y, plain = layer(x(5)), copy.deepcopy(layer)
    before = layer.state_dict()
    swizzled()
    assert torch.equal(layer(x(5)), y)
    for name in ("experts", "shared_experts"):
        scales, linear = (getattr(m, name).w13.weight_scale for m in (layer, plain))
        assert scales.dtype == torch.uint8 and torch.equal(scales, swizzle_scales(linear))
    addresses = {name: b.data_ptr() for name, b in layer.named_buffers()}
    layer(x(5))
    assert {name: b.data_ptr() for name, b in layer.named_buffers()} == addresses
    # scales (80, 3) are padded to (128, 4); there is no second copy of them
    assert sum(b.nbytes for b in layer.experts.w2.buffers()) == 6 * (80 * 24 + 128 * 4) + 7 * 4
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x(5)), y)


@pytest.mark.parametrize("fused", [False, True])
def test_moved_weights_load_in_place(fused, swizzled):
    """A graph that holds the addresses must see the new weights, in whatever form they come."""
    layer, x = made("moe")
    new, high = quantized(MoE(80, 48, 6, 2), seed=1), MoE(80, 48, 6, 2).requires_grad_(False)
    new_from_high = quantize_model_(copy.deepcopy(high))
    for moe in (layer, new, new_from_high):
        moe.experts.fused = moe.shared_experts.fused = fused
    want, want_from_high = new(x(5)), new_from_high(x(5))
    swizzled()
    layer(x(5))
    before = {name: b.data_ptr() for name, b in layer.named_buffers() if "input_scale" not in name}
    for state, y in ((high, want_from_high), (new, want)):
        layer.load_state_dict(state.state_dict())
        assert {name: dict(layer.named_buffers())[name].data_ptr() for name in before} == before
        assert torch.equal(layer(x(5)), y)


def test_moved_weights_can_be_interleaved_and_moved_back(swizzled):
    layer, x = made("shared")
    w13 = layer.w13
    linear = deinterleave_gate_up(w13.weight_scale)
    swizzled()
    layer(x(2))
    layer.fused = False
    assert torch.equal(unswizzle_scales(w13.weight_scale, 96, 5), linear)
    w13.set_scale_layout("linear")
    assert torch.equal(w13.weight_scale, linear)


def test_a_warm_up_moves_all_weights(swizzled, monkeypatch):
    """Also those of layers that are like another and need no run of their own."""
    layer, x = made("moe")
    y = layer(x(5))
    model, linear = torch.nn.ModuleList([layer, copy.deepcopy(layer)]), quantized(Linear(80, 48))
    swizzled()
    warmup(model, 5)
    monkeypatch.setattr(workspace, "is_capturing", lambda: True)
    assert torch.equal(model[0](x(5)), y) and torch.equal(model[1](x(5)), y)
    with pytest.raises(RuntimeError, match=r"scales would be moved under capture: call warmup\(model"):
        linear(x(5))


def test_a_warm_up_runs_one_of_each_kind(monkeypatch):
    """At its largest size and the powers of two; the parts of an expert run inside it."""
    model = torch.nn.ModuleList(
        quantized(m) for m in (Linear(80, 48), Linear(80, 48), Linear(80, 64), SharedExpert(80, 48))
    )
    model.append(copy.deepcopy(model[0]))
    set_activation_scale_(model[4], "tensor")
    ran = []
    for cls in (Linear, SharedExpert):
        forward = cls.forward

        def counted(self, x, forward=forward):
            ran.append((self, x.shape[0]))
            return forward(self, x)

        monkeypatch.setattr(cls, "forward", counted)
    warmup(model, 5)
    assert [n for m, n in ran if m is model[0]] == [5, 4, 2, 1]
    assert {m for m, _ in ran} == {model[0], model[2], model[3], model[3].w2, model[4]}
    ran.clear()
    warmup(model, 5, tokens=())
    assert {n for _, n in ran} == {5}


def test_layers_compile_with_swizzled_scales(swizzled):
    swizzled()
    for name in ("wo_a", "moe"):
        layer, x = made(name)
        want = layer(x(5))
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x(5)), want)
