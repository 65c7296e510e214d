"""The defects of the pipeline that this one replaces, each shown absent.

Numbers 1 and 2, rounding to E2M1 twice and zeroing blocks whose scale E4M3 still holds, are tests of the
quantizer. Here is what can go wrong around it, as far as it shows without a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsv4lab import ops, quantize_nvfp4
from dsv4lab.calibration import calibrate, inspect, set_input_scales_
from dsv4lab.formats import sqnr
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
from dsv4lab.layers.shared_expert import swiglu
from dsv4lab.layouts import interleave_gate_up
from dsv4lab.quantize import dequantize_nvfp4, quantize_weight, swiglu_quantize


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer, seed=0):
    r = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=r)
    return layer.requires_grad_(False)


class Tower(nn.Module):
    """Linears one after the other with a residual, as in a transformer."""

    def __init__(self, depth=6):
        super().__init__()
        self.blocks = nn.ModuleList(SharedExpert(64, 64) for _ in range(depth))
        self.head = Linear(64, 64, nvfp4=False)
        filled(self)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(F.rms_norm(x, (64,)))
        return self.head(F.rms_norm(x, (64,)))


# 3. Host synchronizations


@pytest.mark.parametrize("policy", ["token", "tensor", "bound", "static", "group"])
def test_3_no_layer_reads_a_value_on_the_host(policy):
    """On the meta device there are no values: any read of one, any shape that depends on one, raises."""
    model = nn.ModuleDict(
        {"moe": MoE(32, 16, 4, 2), "wo_a": GroupedLinear(2, 32, 16), "wo_b": Linear(32, 32)}
    )
    quantize_model_(filled(model))
    for layer in model.modules():
        if hasattr(layer, "set_input_scale"):
            layer.set_input_scale(0.1)
    set_activation_scale_(model, policy)
    model.to("meta")
    x = torch.empty(7, 32, dtype=torch.bfloat16, device="meta")
    assert model["moe"](x).shape == (7, 32) and model["wo_b"](x).shape == (7, 32)
    assert model["wo_a"](x[:, None].expand(7, 2, 32)).shape == (7, 2, 16)


def test_3_the_reference_reads_no_sizes_where_they_live_on_a_device(monkeypatch):
    monkeypatch.setattr("dsv4lab.reference_gemm._host_knows_sizes", lambda offsets: False)
    monkeypatch.setattr("dsv4lab.layers.experts.check_ids", lambda *ids: None)  # reads them on the CPU only
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, name=name: pytest.fail(f"{name} reads from the device")
        )
    moe = quantize_model_(filled(MoE(32, 16, 4, 2)))
    assert moe(normal(5, 32)).shape == (5, 32)


# 4. input_scale smaller than amax / 2688


def test_4_a_small_input_scale_shrinks_magnitudes_layer_after_layer_and_shows():
    tower, x = Tower(), normal(16, 64, seed=1)
    want = tower(x)
    scales = calibrate(tower, [x])
    model = quantize_model_(copy.deepcopy(tower))
    good = sqnr(want, model(x))
    set_activation_scale_(model, "token")
    damage, clip = {}, {}
    for shrink in (1, 4, 16):
        set_input_scales_(model, {n: s / shrink for n, s in scales.items()})
        set_activation_scale_(model, "static")
        with inspect(model) as figures:
            damage[shrink] = sqnr(want, model(x))
        clip[shrink] = max(f.clip_rate for f in figures.values())
    # Calibrated scales are as good as runtime ones; a few blocks exceed what calibration saw.
    assert damage[1] > good - 3 and clip[1] < 0.05
    # 4 and 16 times too small, the blocks above saturate: the outputs shrink, and layers add up
    assert damage[1] > damage[4] + 6 and damage[4] > damage[16] + 2 and clip[4] > 0.5
    assert model.blocks[0](x).norm() < tower.blocks[0](x).norm() / 8
    held = x * (scales["blocks.0.w13"] * 2688 / x.abs().amax())  # what calibration saw
    q = quantize_nvfp4(held, scales["blocks.0.w13"] / 16)
    saturated = dequantize_nvfp4(q, torch.float32)
    assert saturated.abs().max() < held.abs().max() / 15
    large = held.view(16, 4, 16).abs().amax(-1) > held.abs().max() / 16
    assert (saturated.view(16, 4, 16).norm(dim=-1) < held.view(16, 4, 16).norm(dim=-1))[large].all()


# 5. One scale for all groups, one row's scale for all rows, both SwiGLU halves


def test_5_every_group_of_wo_a_has_a_scale_of_its_own():
    """2^20 apart, one scale for both groups makes the small one's block scales zero."""
    layer = filled(GroupedLinear(2, 64, 32))
    x = normal(9, 2, 64) * torch.tensor([1.0, 2.0**-20])[:, None]
    want = layer(x)
    layer.quantize_()
    error = {}
    for policy in ("group", "token", "tensor"):
        layer.activation_scale = policy
        y = layer(x)
        error[policy] = sqnr(want[:, 1], y[:, 1])
        assert sqnr(want[:, 0], y[:, 0]) > 15
    assert min(error["group"], error["token"]) > 15 and error["tensor"] < 1


def test_5_every_row_is_decoded_under_its_own_scale():
    layer, x = filled(Linear(64, 32)), normal(6, 64) * torch.logspace(-4, 4, 6)[:, None]
    layer.quantize_()
    y = layer(x)
    for i in range(6):  # K = 64 products of like size: exact in float32, so one row alone gives the same bits
        assert torch.equal(layer(x[i : i + 1])[0], y[i])


def test_5_swiglu_writes_its_half_and_its_amax_is_of_that_half():
    """A gate of 10 with small ups: amax over the gate as well would be 1,000 times too large."""
    gate, up = torch.full((4, 16), 10.0), normal(4, 16).clamp(-1, 1) / 100
    h = swiglu(torch.cat((gate, up), -1).bfloat16())
    q = swiglu_quantize(torch.cat((gate, up), -1).bfloat16(), 10.0, "tensor")
    assert q.shape == (4, 16) and torch.equal(q.global_scale, h.abs().amax().float() / torch.tensor(2688.0))
    expert, x = filled(SharedExpert(16, 16)), torch.full((4, 16), 6.0)
    expert.w13.weight.copy_(torch.cat((torch.eye(16) * 2, torch.eye(16) / 64)))
    quantize_model_(expert, "tensor")
    with inspect(expert) as figures:
        expert(x)
    assert figures["w2"].amax == pytest.approx(10 / (1 + 2.718281828**-10) * 6 / 64, rel=2.0**-8)
    assert grouped_mm_swiglu(quantize_nvfp4(x), expert.w13.nvfp4_weight()).shape == (4, 16)


# 6. Interleaved weights


def test_6_scales_move_with_the_rows_they_belong_to():
    """Every row has another magnitude, so a code under a neighbour's scale is off by a power of two."""
    w = normal(2, 64, 32) * 2.0 ** torch.arange(64)[:, None].remainder(13)
    b = quantize_weight(
        w, global_scale=torch.tensor([8.0, 8.0])
    )  # a power of two keeps products exact in bf16
    moved = dequantize_nvfp4(interleave_gate_up(b), torch.float32)
    assert torch.equal(moved, interleave_gate_up(dequantize_nvfp4(b, torch.float32)))
    x = torch.eye(32).bfloat16()

    def second(t):
        parts = {"codes": t.codes[1], "block_scales": t.block_scales[1], "global_scale": t.global_scale[1]}
        return t.with_(**parts, granularity="tensor")

    gate, up = grouped_mm(x, second(b)).float().chunk(2, -1)
    fused = grouped_mm_swiglu(x, second(interleave_gate_up(b)), limit=None)
    # one product each, exact in bf16: only silu is left to differ, by bf16's rounding, subnormal or not
    torch.testing.assert_close(
        fused.double(), F.silu(gate.double()) * up.double(), rtol=2.0**-8, atol=2.0**-134
    )


def test_6_fused_can_be_switched_after_the_weights_were_laid_out():
    moe, x = quantize_model_(filled(MoE(32, 16, 4, 2))), normal(5, 32)
    for policy in ("token", "bound"):
        set_activation_scale_(moe, policy)
        results = {}
        for fused in (True, False, True, False):
            moe.experts.fused = moe.shared_experts.fused = fused
            y = moe(x)
            assert torch.equal(results.setdefault(fused, y), y)
        # bf16 rounds gate and up in between where they are not fused: 2^-8 each, which moves some codes of h
        assert sqnr(results[True], results[False]) > 25
    with pytest.raises(ValueError, match="b must be interleaved"):
        grouped_mm_swiglu(x.bfloat16(), moe.shared_experts.w13.nvfp4_weight())


def test_6_calibration_of_interleaved_weights_sees_pairs_not_halves():
    expert, x = filled(SharedExpert(32, 32)), normal(9, 32)
    expert.w13.weight[:32] *= 4  # gates and ups of unlike size
    quantize_model_(expert, activation_dtype="bf16")
    want = calibrate(expert, [x])["w2"]
    expert.fused = False
    # h of unfused weights, gate and up rounded to bf16 before: three times 2^-8
    torch.testing.assert_close(calibrate(expert, [x])["w2"], want, rtol=3 * 2.0**-8, atol=0)
    halves = dequantize_nvfp4(expert.w13.nvfp4_weight(), torch.float32)
    right = swiglu(x.bfloat16().float() @ halves.T).abs().amax() / 2688
    wrong = swiglu(x.bfloat16().float() @ interleave_gate_up(halves).T).abs().amax() / 2688
    torch.testing.assert_close(want, right, rtol=2 * 2.0**-8, atol=0)
    assert abs(wrong - right) > 0.1 * right


@pytest.mark.parametrize("fused", [True, False])
def test_6_gate_and_up_have_their_own_weight_scale(fused):
    """Up 2^-18 below gate: one scale for both would flush it to zero."""
    expert, x = filled(SharedExpert(64, 32)), normal(9, 64)
    expert.w13.weight[32:] *= 2.0**-18
    want = expert(x)
    quantize_model_(expert)
    expert.fused = fused
    ratio = expert.w13.weight_scale_2[0] / expert.w13.weight_scale_2[1]
    assert 2.0**17 < ratio < 2.0**19 and sqnr(want, expert(x)) > 10
    moe = filled(MoE(64, 32, 4, 2))
    moe.experts.w13.weight[:, 32:] *= 2.0**-18
    moe.shared_experts.w2.weight.zero_()
    want = moe(x)
    quantize_model_(moe)
    moe.experts.fused = fused
    assert sqnr(want, moe(x)) > 10


# 7. Buffers


def test_7_memory_does_not_grow_with_the_number_of_layers():
    """What runs through warm-up and captures is in test_workspace."""
    sizes = []
    for depth in (1, 6):
        model = quantize_model_(filled(nn.Sequential(*(MoE(32, 16, 4, 2) for _ in range(depth)))))
        warmup(model, 64)
        spaces = {m.experts.workspaces for m in model}
        sizes.append(sum(s.on(torch.device("cpu")).nbytes for s in spaces))
    assert sizes[0] == sizes[1]


def test_7_the_static_scale_arrives_in_the_kernel():
    expert, x = filled(SharedExpert(32, 16)), normal(5, 32)
    scales = calibrate(expert, [x])
    want = expert(x)
    quantize_model_(expert, "static", scales)
    assert sqnr(want, expert(x)) > 10
    q = expert.w13.quantize_input(x)
    assert torch.equal(q.global_scale, scales["w13"])
    expert.w13.set_input_scale(scales["w13"] * 2)
    assert torch.equal(expert.w13.quantize_input(x).global_scale, scales["w13"] * 2)


# 8. Stale results and fakes


def test_8_results_follow_inputs_and_weights_that_change_in_place():
    moe = quantize_model_(filled(MoE(32, 16, 4, 2)))
    other = quantize_model_(filled(MoE(32, 16, 4, 2), 1))
    warmup(moe, 16)
    x = normal(5, 32)
    first = moe(x)
    x.copy_(normal(5, 32, seed=2))
    assert torch.equal(moe(x), moe(x.clone())) and not torch.equal(moe(x), first)
    moe.load_state_dict(other.state_dict())  # copies into the codes that were decoded before
    assert torch.equal(moe(x), other(x))
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), other(x))
    moe.load_state_dict(quantize_model_(filled(MoE(32, 16, 4, 2))).state_dict())
    x.copy_(normal(5, 32))
    assert torch.equal(compiled(x), first)


def test_8_every_operator_has_a_fake():
    """Shapes of fakes and results are compared in the tests of their modules."""
    assert {"grouped_mm", "grouped_mm_swiglu", "grouped_mm_swiglu_quantize"} <= ops.OPS.keys()
    for op in ops.OPS.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsv4lab::{op.name}", "Meta"), op.name
