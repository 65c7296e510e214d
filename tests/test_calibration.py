"""Calibration records what the inputs of linears really reach; figures per layer say what went wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dsv4lab.calibration import calibrate, inspect, set_input_scales_
from dsv4lab.formats import sqnr
from dsv4lab.layers import GroupedLinear, Linear, MoE, quantize_model_, set_activation_scale_
from dsv4lab.layers.shared_expert import swiglu
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4


class Block(nn.Module):
    """A linear, a grouped linear and experts, with the tensors between them kept."""

    def __init__(self, route_weight="after"):
        super().__init__()
        self.wo_a = GroupedLinear(2, 32, 16)
        self.wo_b = Linear(32, 32)
        self.ffn = MoE(32, 16, 4, 2, route_scale=1.5, route_weight=route_weight)
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(i))
        self.requires_grad_(False)

    def forward(self, x):
        self.middle = self.wo_a(x).flatten(-2)
        self.inner = self.wo_b(self.middle)
        return self.ffn(self.inner)


def batches():
    r = torch.Generator().manual_seed(7)
    x = torch.randn(3, 6, 2, 32, generator=r) * torch.tensor([1.0, 16.0])[:, None]
    x[1] *= 2  # the largest inputs come neither first nor last
    return list(x)


@pytest.mark.parametrize("route_weight", ["after", "before"])
def test_scales_are_the_largest_inputs(route_weight):
    block, seen = Block(route_weight), {}

    def note(name, amax):
        seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

    for x in batches():
        block(x)
        note("wo_a", x.abs().amax((0, 2)))
        note("wo_b", block.middle.abs().amax())
        rows, ffn = block.inner, block.ffn
        note("ffn.experts.w13", rows.abs().amax())
        note("ffn.shared_experts.w13", rows.abs().amax())
        note("ffn.shared_experts.w2", swiglu(ffn.shared_experts.w13(rows)).abs().amax())
        weights, chosen = ffn.gate(rows)
        for t in range(len(rows)):
            for w, e in zip(weights[t], chosen[t], strict=True):
                h = swiglu(rows[t] @ ffn.experts.w13.weight[e].T)
                note("ffn.experts.w2", ((h * w) if route_weight == "before" else h).abs().amax())
    scales = calibrate(block, batches())
    assert scales.keys() == seen.keys() and scales["wo_a"].shape == (2,)
    for name, amax in seen.items():
        # one row at a time and all rows together may sum K = 32 products in another order
        torch.testing.assert_close(scales[name], amax / 2688, rtol=1e-5, atol=0, msg=name)
    assert all(layer.observer is None for layer in (block.wo_a, block.wo_b, block.ffn.experts.w2))


def test_static_refuses_without_and_works_with_calibration():
    block = Block()
    scales = calibrate(block, batches())
    model = quantize_model_(copy.deepcopy(block))
    with pytest.raises(ValueError, match="wo_a has none: calibrate"):
        set_activation_scale_(model, "static")
    set_input_scales_(model, scales)
    set_activation_scale_(model, "static")
    x = batches()[1]
    with inspect(model) as static:
        y = model(x)
    assert y.isfinite().all() and y.abs().max() > 0
    state = {k: v for k, v in model.state_dict().items() if k.endswith("input_scale")}
    assert len(state) == 6 and state["wo_a.input_scale"].shape == (2,)
    set_activation_scale_(model, "token")
    with inspect(model) as token:
        model(x)
    for (
        name
    ) in static:  # a scale for all rows instead of one a row costs little, as long as nothing saturates
        assert static[name].sqnr > token[name].sqnr - 3, name


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_calibration_sees_the_same_through_every_path(fused, quantized):
    """Weights that NVFP4 holds exactly, so that a quantized model's inputs are those of the original."""
    block = Block()
    for layer in (block.ffn.experts.w13, block.ffn.shared_experts.w13):
        layer.weight.copy_(torch.eye(32).expand_as(layer.weight))
    x = torch.ones(4, 32) * torch.tensor([1.0, 2.0, 4.0, 6.0])[:, None]
    want = calibrate(block.ffn, [x])
    if quantized:
        quantize_model_(block.ffn)
        block.ffn.experts.fused = block.ffn.shared_experts.fused = fused
        for policy in ("token", "bound"):
            set_activation_scale_(block.ffn, policy)
            got = calibrate(block.ffn, [x])
            # NVFP4 and bf16 rounding of h: 2^-8 of it; x itself is exact
            for name, scale in want.items():
                torch.testing.assert_close(got[name], scale, rtol=2.0**-8, atol=0, msg=f"{name} {policy}")
    h = torch.nn.functional.silu(torch.tensor(6.0)) * 6.0
    torch.testing.assert_close(want["shared_experts.w2"], h / 2688, rtol=1e-6, atol=0)


def test_figures_per_layer():
    layer = Linear(32, 16).requires_grad_(False)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x[3, 5] = 50.0
    model = quantize_model_(nn.ModuleDict({"a": layer}))
    for scale, clipped in (
        (x.abs().max() / 2688, 0),
        (torch.tensor(40 / 2688), 1),
        (x[3, 4].abs() / 2688, 16),
    ):
        set_input_scales_(model, {"a": scale})
        set_activation_scale_(model, "static")
        with inspect(model) as figures:
            model["a"](x[:4])
            model["a"](x[4:])
            model["a"](x[:0])
        f = figures["a"]
        assert f.amax == 50 and f.blocks == 16
        block_amax = x.view(8, 2, 16).abs().amax(-1)
        assert f.clipped == (block_amax > 2688 * scale).sum() and f.clip_rate == f.clipped / 16
        assert f.clipped == clipped or clipped == 16
        error = sqnr(x, dequantize_nvfp4(quantize_nvfp4(x, scale), torch.float32))
        assert f.sqnr == pytest.approx(error, abs=1e-6)
    with inspect(nn.ModuleDict({"high": Linear(32, 16)})) as figures:
        pass
    assert figures == {}


def test_high_precision_models_can_be_inspected_before():
    block = Block()
    for policy in ("token", "tensor"):
        set_activation_scale_(block, policy)
        with inspect(block) as figures:
            block(batches()[0])
        assert len(figures) == 6 and all(15 < f.sqnr < 30 and f.clipped == 0 for f in figures.values())


@pytest.mark.parametrize(
    ("data", "words"),
    [([], "at least one batch"), ([torch.full((2, 2, 32), torch.nan)], "the input of wo_a holds NaN or Inf")],
)
def test_bad_batches_are_refused(data, words):
    block = Block()
    with pytest.raises(ValueError, match=words):
        calibrate(block, data)
    with pytest.raises(ValueError, match="'wo_c', which is no quantizable layer"):
        set_input_scales_(block, {"wo_c": torch.tensor(1.0)})
