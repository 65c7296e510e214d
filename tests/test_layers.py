"""The layers in high precision against the formulas, and in NVFP4 against products taken by hand."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from dsv4lab.formats import NVFP4Tensor
from dsv4lab.gemm import grouped_mm
from dsv4lab.layers import (
    Experts,
    GroupedLinear,
    Linear,
    MoE,
    Router,
    SharedExpert,
    Weight,
    fake_quantize,
    fake_quantize_model_,
    quantize_model_,
    set_activation_scale_,
)
from dsv4lab.layers.dispatch import dispatch, place
from dsv4lab.layouts import with_scale_layout
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4

U_BF16, U_FP32 = 2.0**-8, 2.0**-24


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def frozen(layer, seed=0):
    """Normal weights that no gradient follows."""
    r = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=r)
    return layer.requires_grad_(False)


# High precision


def expert_by_formula(x, w13, w2, limit):
    """One expert in float64: gate clamped only above, up on both sides."""
    gate, up = (x.double() @ w13.double().T).chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate / (1 + torch.exp(-gate)) * up) @ w2.double().T


@pytest.mark.parametrize("route_weight", ["after", "before"])
@pytest.mark.parametrize("algorithm", ["loop", "grouped", "dense"])
def test_experts_sum_what_each_expert_gives(algorithm, route_weight):
    """Expert 3 gets no token, expert 0 all of them; limit 1 clamps many values."""
    layer = frozen(Experts(6, 32, 16, limit=1.0, route_weight=route_weight))
    layer.algorithm = algorithm
    x, weights = seeded(20, 32), seeded(20, 3, seed=1).abs()
    chosen = torch.stack([torch.tensor([0, *torch.randperm(5)[:2].add(1).tolist()]) for _ in range(20)])
    chosen[chosen == 3] = 5
    chosen[:, 2] = torch.where(chosen[:, 1] == chosen[:, 2], 4 - chosen[:, 1].clamp(max=2), chosen[:, 2])
    y = layer(x, weights, chosen)
    want, size = torch.zeros(20, 32, dtype=torch.float64), torch.zeros(20, 32, dtype=torch.float64)
    for t in range(20):
        for w, e in zip(weights[t], chosen[t], strict=True):
            part = expert_by_formula(x[t], layer.w13.weight[e], layer.w2.weight[e], 1.0)
            want[t] += w * part
            size[t] += w  # |h| <= 1 here, so sum |h w2| <= the l1 norm of w2's row
    rows = layer.w2.weight.abs().double().sum(-1).max()
    # K = 32 and 16 steps, silu and products; h's error of at most 40 * 2^-24 * sum|x w13| enters w2 linearly
    reach = 1 + (x.abs().double() @ layer.w13.weight.abs().double().flatten(0, 1).T).max()
    assert ((y - want).abs() <= 60 * U_FP32 * reach * rows * size).all()
    assert (y - want).abs().max() > 0 or algorithm == "loop"


def test_experts_learn_alike_by_every_algorithm():
    x, weights, chosen = seeded(12, 32), seeded(12, 2, seed=1).abs(), torch.arange(24).view(12, 2) % 4
    grads = {}
    for algorithm in ("loop", "grouped", "dense"):
        layer = Experts(4, 32, 16)
        frozen(layer).requires_grad_(True)
        layer.algorithm = algorithm
        w = weights.clone().requires_grad_(True)
        layer(x, w, chosen).square().sum().backward()
        grads[algorithm] = [layer.w13.weight.grad, layer.w2.weight.grad, w.grad]
    for algorithm in ("grouped", "dense"):
        for got, want in zip(grads[algorithm], grads["loop"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_router_scores_choose_and_weigh():
    layer = frozen(Router(16, 5, 2, route_scale=1.5))
    x = seeded(7, 16)
    layer.bias[2] += 9  # expert 2 is always chosen, its weight does not change
    weights, chosen = layer(x)
    for t in range(7):
        s = [math.sqrt(math.log1p(math.exp(z))) for z in (x[t].double() @ layer.weight.double().T).tolist()]
        best = max((e for e in range(5) if e != 2), key=lambda e: s[e])
        assert set(chosen[t].tolist()) == {2, best}
        want = [1.5 * s[e] / (s[2] + s[best]) for e in chosen[t].tolist()]
        torch.testing.assert_close(weights[t].double(), torch.tensor(want).double(), rtol=1e-6, atol=0)
    assert weights.dtype == torch.float32 and chosen.dtype == torch.int64


def test_router_in_half_precision_keeps_its_bias_and_scores_in_float32():
    layer = frozen(Router(16, 5, 2)).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    x = seeded(3, 16, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).float()(x.float())[0]
    assert torch.equal(layer(x)[0], exact)


def test_hash_router_looks_tokens_up():
    layer = frozen(Router(16, 6, 2, vocab_size=10))
    assert layer.bias is None and layer.tid2eid.shape == (10, 2)
    layer.tid2eid.copy_(torch.arange(20).view(10, 2) % 6)
    ids = torch.tensor([[3, 9, 0]])
    weights, chosen = layer(seeded(3, 16), ids)
    assert torch.equal(chosen, layer.tid2eid[ids[0]])
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    with pytest.raises(ValueError, match="token_ids is needed"):
        layer(seeded(3, 16))
    with pytest.raises(ValueError, match=r"token_ids must hold 3 ids.* \(2,\)"):
        layer(seeded(3, 16), ids[0, :2])


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.tensor([0, 1, -1]), ValueError, "token_ids must lie within 0 and 9, got -1"),  # not the last
        (torch.tensor([0, 10, 1]), ValueError, "token_ids must lie within 0 and 9, got 10"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "token_ids must be .* got torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "token_ids must be .* got torch.bool"),
        (torch.tensor([0, 1, 2], dtype=torch.uint8), TypeError, "token_ids must be .* got torch.uint8"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "token_ids is on meta, but"),
    ],
)
def test_token_ids_that_no_table_has_are_refused(ids, error, words):
    layer = frozen(Router(16, 6, 2, vocab_size=10))
    assert torch.equal(layer(seeded(3, 16), torch.tensor([9, 0, 1]).int())[1], layer.tid2eid[[9, 0, 1]])
    with pytest.raises(error, match=words):
        layer(seeded(3, 16), ids)


def test_codes_load_as_float4_too_and_integers_do_not():
    state = quantized_linear().state_dict()
    codes = state["weight"]
    for layer in (Linear(80, 48), quantized_linear()):
        layer.load_state_dict({**state, "weight": codes.view(torch.float4_e2m1fn_x2)})
        assert layer.weight.dtype == torch.uint8 and torch.equal(layer.weight, codes)
        with pytest.raises(TypeError, match=r"weight must be .* got torch\.int32"):
            layer.load_state_dict({**state, "weight": codes.int()})


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("expert", [-1, 6])
def test_experts_that_do_not_exist_are_refused(expert, quantized):
    """Their rows would stand in no group, and whatever is in memory there would be the result."""
    layer, weights = frozen(Experts(6, 32, 16)), torch.ones(2, 2)
    layer = quantize_model_(layer) if quantized else layer
    with pytest.raises(ValueError, match=f"chosen must lie within 0 and 5, got {expert}"):
        layer(seeded(2, 32), weights, torch.tensor([[0, 1], [expert, 2]]))
    with pytest.raises(TypeError, match=r"chosen must be .* got torch\.float32"):
        layer(seeded(2, 32), weights, weights)


def test_all_scores_underflowing_give_no_nan():
    layer = Router(16, 5, 2).requires_grad_(False)
    layer.weight.fill_(-100.0)
    assert layer(torch.ones(2, 16))[0].isfinite().all()


def test_swiglu_clamps_the_gate_only_above():
    expert = SharedExpert(16, 16, limit=2.0).requires_grad_(False)
    expert.w13.weight.copy_(torch.cat((torch.eye(16), torch.eye(16))))
    expert.w2.weight.copy_(torch.eye(16))
    x = torch.tensor([-30.0, -3.0, -1.0, 1.0, 3.0] + [0.0] * 11)
    want = [g / (1 + math.exp(-g)) * max(-2, min(2, u)) for g, u in ((min(v, 2.0), v) for v in x.tolist())]
    torch.testing.assert_close(expert(x).double(), torch.tensor(want).double(), rtol=1e-6, atol=1e-12)


# Training hooks


@pytest.mark.parametrize(("policy", "known"), [("token", "token"), ("tensor", "tensor"), ("matrix", "group")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantization_gives_the_values_of_the_real_one(policy, known, dtype):
    x = seeded(3, 5, 64, dtype=dtype) * torch.logspace(-6, 6, 64).to(dtype)
    x[1, 2] = 0
    want = dequantize_nvfp4(quantize_nvfp4(x, known), dtype)
    assert torch.equal(fake_quantize(x, policy), want)


def test_fake_quantization_passes_gradients_straight_through():
    for dtype in (torch.float32, torch.bfloat16):
        x = seeded(4, 32, dtype=dtype).requires_grad_(True)
        grad = seeded(4, 32, seed=1, dtype=dtype)
        fake_quantize(x).backward(grad)
        assert torch.equal(x.grad, grad)


def test_fake_quantized_model_computes_what_the_quantized_one_does():
    """Weight-only, one linear: fake weights in bf16 against codes, within the GEMM's bound."""
    layers = {"a": Linear(64, 32, dtype=torch.bfloat16), "b": Linear(64, 8, nvfp4=False)}
    model = frozen(torch.nn.ModuleDict(layers))
    x = seeded(5, 64, dtype=torch.bfloat16)
    real = copy.deepcopy(model)
    quantize_model_(real, activation_dtype="bf16")
    assert real["a"].quantized and not real["b"].quantized
    fake_quantize_model_(model, activation=None)
    assert model["b"].weight_transform is None
    fake = model["a"].matrix(torch.float32)
    assert torch.equal(fake.bfloat16(), model["a"].matrix(torch.bfloat16).detach())
    size = x.double().abs() @ fake.double().abs().T
    exact = x.double() @ dequantize_nvfp4(real["a"].nvfp4_weight(), torch.float32).double().T
    assert ((real["a"](x).double() - exact).abs() <= U_BF16 * exact.abs() + 1.01 * 66 * U_FP32 * size).all()
    fake_quantize_model_(model, activation="token")
    assert torch.equal(model["a"].operand(x), fake_quantize(x))


def test_fake_quantized_gate_and_up_have_scales_of_their_own():
    expert = frozen(SharedExpert(32, 16))
    expert.w13.weight[16:] *= 2.0**-12
    fake_quantize_model_(expert, activation=None)
    q = copy.deepcopy(expert)
    quantize_model_(q)
    q.fused = False
    want = dequantize_nvfp4(q.w13.nvfp4_weight(), torch.float32)
    assert torch.equal(expert.w13.matrix(torch.float32), want)


# One linear in NVFP4


def quantized_linear(n=48, k=80, **kwargs):
    layer = frozen(Linear(k, n, **kwargs))
    layer.quantize_()
    return layer


@pytest.mark.parametrize("policy", ["token", "tensor", "static", "bound", "callable"])
def test_linear_is_the_product_of_what_it_quantized(policy):
    layer, x = quantized_linear(), seeded(2, 3, 80, dtype=torch.bfloat16)
    layer.set_input_scale(0.03)
    layer.activation_bound = 0.05 * 2688
    scale = {"static": 0.03, "bound": 0.05, "callable": 0.07}.get(policy, policy)
    layer.activation_scale = (lambda x: 0.07) if policy == "callable" else policy
    want = grouped_mm(quantize_nvfp4(x, scale), layer.nvfp4_weight())
    assert torch.equal(layer(x), want) and want.shape == (2, 3, 48)
    assert torch.equal(layer(x.float()), want.float())
    assert layer(x[:0]).shape == (0, 3, 48)


def test_linear_takes_a_quantized_activation_with_its_own_scale():
    layer, x = quantized_linear(), seeded(5, 80, dtype=torch.bfloat16)
    q = quantize_nvfp4(x, 0.125)
    assert torch.equal(layer(q), grouped_mm(q, layer.nvfp4_weight()))
    assert torch.equal(layer(with_scale_layout(q, "swizzled")), layer(q))
    shared = layer.quantize_input(x)
    assert shared.granularity == "token" and torch.equal(layer(shared), layer(x))
    high = frozen(Linear(80, 48))
    assert high.quantize_input(x) is x
    torch.testing.assert_close(high(q), F.linear(dequantize_nvfp4(q, torch.float32), high.weight))


def test_weight_only_leaves_the_activation_alone():
    layer, x = quantized_linear(), seeded(5, 80, dtype=torch.bfloat16)
    layer.activation_dtype = "bf16"
    assert torch.equal(layer(x), grouped_mm(x, layer.nvfp4_weight()))


def test_static_and_bound_refuse_without_their_scale():
    layer = quantized_linear()
    layer.activation_scale = "static"
    with pytest.raises(ValueError, match="no input_scale: calibrate first"):
        layer(seeded(2, 80))
    layer.activation_scale = "bound"
    with pytest.raises(ValueError, match="nothing bounds this layer's input"):
        layer(seeded(2, 80))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(seeded(2, 64)), ValueError, r"x must have shape \(..., 80\), got \(2, 64\)"),
        (lambda m: m(torch.ones(2, 80, dtype=torch.int32)), TypeError, "x must be floating point"),
        (lambda m: m([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda m: setattr(m, "activation_scale", "row"), ValueError, "activation_scale .* got 'row'"),
        (lambda m: setattr(m, "activation_scale", "group"), ValueError, "activation_scale must be"),
        (lambda m: setattr(m, "activation_dtype", "fp8"), ValueError, "activation_dtype .* got 'fp8'"),
        (lambda m: m.quantize_(), RuntimeError, "quantized already"),
        (lambda m: Router(16, 4, 2)(seeded(2, 3, 16)), ValueError, r"x must be \(T, 16\), got \(2, 3, 16\)"),
        (lambda m: Router(16, 4, 5), ValueError, "top_k must lie within 1 and experts = 4, got 5"),
        (lambda m: Experts(4, 16, 16, route_weight="both"), ValueError, "route_weight must be .* got 'both'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(quantized_linear())


# wo_a


@pytest.mark.parametrize("policy", ["token", "tensor", "group", "static", "static group"])
@pytest.mark.parametrize("tokens", [0, 1, 127, 129])
def test_grouped_linear_is_one_linear_a_group(tokens, policy):
    """Groups 2^10 apart. A linear alone, fed the group's codes, must give the group's result bit for bit."""
    layer, x = frozen(GroupedLinear(3, 48, 16)), seeded(tokens, 3, 48, dtype=torch.bfloat16)
    x *= torch.tensor([1.0, 2.0**-10, 2.0**10])[:, None].bfloat16()
    layer.quantize_()
    scales = {"static": torch.tensor(3.0), "static group": torch.tensor([2.0**-9, 2.0**-19, 2.0])}
    layer.set_input_scale(scales.get(policy))
    layer.activation_scale = policy.split()[0]
    y = layer(x)
    assert y.shape == (tokens, 3, 16)
    weight = layer.nvfp4_weight()
    whole = quantize_nvfp4(x, "tensor").global_scale if tokens else None
    for g in range(3):
        alone = {"token": "token", "group": "tensor", "tensor": whole, "static": 3.0,
                 "static group": scales["static group"][g]}[policy]  # fmt: skip
        if tokens:
            q = quantize_nvfp4(x[:, g], alone)
            b = NVFP4Tensor(weight.codes[g], weight.block_scales[g], weight.global_scale)
            # K = 48 and scales within 2^8 of each other: every sum is exact in float32, whatever its order
            assert torch.equal(y[:, g], grouped_mm(q, b))


def test_grouped_linear_takes_every_form_of_its_weight():
    made = frozen(GroupedLinear(3, 48, 16, dtype=torch.bfloat16))
    dense, x = made.weight.clone(), seeded(5, 3, 48, dtype=torch.bfloat16)
    want = torch.einsum("tgk,grk->tgr", x.double(), dense.view(3, 16, 48).double())
    size = torch.einsum("tgk,grk->tgr", x.double().abs(), dense.view(3, 16, 48).double().abs())
    # one rounding of the result, and K float32 additions
    assert ((made(x).double() - want).abs() <= U_BF16 * want.abs() + 1.01 * 49 * U_FP32 * size).all()
    other = GroupedLinear(3, 48, 16, dtype=torch.bfloat16)
    other.load_state_dict({"weight": dense.view(3, 16, 48).transpose(1, 2)})
    assert torch.equal(other.weight, dense)
    made.quantize_()
    state = made.state_dict()
    assert state["weight"].shape == (48, 24) and state["weight_scale"].shape == (48, 3)
    other.load_state_dict(state)
    assert torch.equal(other(x), made(x))
    state["weight_scale_2"] = state["weight_scale_2"] * torch.tensor([1.0, 2.0, 4.0])
    other.load_state_dict(state)
    assert torch.equal(other(x), made(x) * torch.tensor([1.0, 2.0, 4.0])[:, None].bfloat16())


def test_grouped_linear_takes_quantized_activations():
    layer, x = frozen(GroupedLinear(3, 48, 16)), seeded(2, 5, 3, 48, dtype=torch.bfloat16)
    layer.quantize_()
    assert torch.equal(layer(quantize_nvfp4(x, "token")), layer(x))
    layer.activation_scale = "tensor"
    assert torch.equal(layer(quantize_nvfp4(x, "tensor")), layer(x))
    layer.activation_dtype = "bf16"
    assert layer(x).shape == (2, 5, 3, 16)
    with pytest.raises(ValueError, match=r"x must be \(..., 3, 48\), got \(2, 48\)"):
        layer(seeded(2, 48))


# Experts. Structured operands make every step exact, so that layouts and glue are compared bit for bit.


def structured_expert(hidden, inter, seed):
    """Rows with one power of two: each output is one product. Gates of a positive input exceed the clamp."""
    r = torch.Generator().manual_seed(seed)

    def one_hot(rows, columns, exponents):
        w = torch.zeros(rows, columns)
        spots = torch.randint(0, columns, (rows,), generator=r)
        w[torch.arange(rows), spots] = 2.0 ** torch.randint(*exponents, (rows,), generator=r)
        return w

    gate, up = one_hot(inter, hidden, (4, 5)), one_hot(inter, hidden, (-2, 0))
    return torch.cat((gate, up)), one_hot(hidden, inter, (-1, 2))


def structured_moe(**kwargs):
    moe = MoE(32, 16, 5, 2, route_scale=1.5, vocab_size=8, **kwargs).requires_grad_(False)
    for e in range(5):
        moe.experts.w13.weight[e], moe.experts.w2.weight[e] = structured_expert(32, 16, e)
    moe.shared_experts.w13.weight[:], moe.shared_experts.w2.weight[:] = structured_expert(32, 16, 9)
    return moe


def positive_codes(*shape, seed=0):
    """Values 1 to 6 that NVFP4 holds exactly under a scale that a 6 in each block fixes."""
    values = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = values[torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(seed))]
    x[..., ::16] = 6
    return x.bfloat16()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("activation", ["token", "tensor", "bound", "static", "bf16"])
@pytest.mark.parametrize("route_weight", ["after", "before"])
def test_moe_is_its_experts_one_by_one(route_weight, activation, fused):
    """Against single experts in float32 on exact values; what is quantized between is quantized by hand."""
    moe = structured_moe(route_weight=route_weight)
    weights13, weights2 = moe.experts.w13.weight.clone(), moe.experts.w2.weight.clone()
    shared13, shared2 = moe.shared_experts.w13.weight.clone(), moe.shared_experts.w2.weight.clone()
    quantize_model_(moe, activation_dtype="bf16" if activation == "bf16" else "nvfp4")
    moe.experts.fused = moe.shared_experts.fused = fused
    if activation != "bf16":
        for layer in (moe.experts.w13, moe.experts.w2, moe.shared_experts.w13, moe.shared_experts.w2):
            layer.set_input_scale(0.04)
        set_activation_scale_(moe, activation)
    x, ids = positive_codes(9, 32), torch.tensor([0, 1, 2, 3, 0, 0, 5, 6, 7])
    weights, chosen = moe.gate(x, ids)

    def hidden(w13, rows):
        gate, up = (rows.float() @ w13.T).chunk(2, -1)
        assert (gate > 10).all()
        return (F.silu(gate.clamp(max=10)) * up.clamp(-10, 10)).bfloat16()

    def second(h, layer):
        if activation == "bf16":
            return h.float()
        scale = layer.global_scale_of() if activation in ("bound", "static") else activation
        return dequantize_nvfp4(quantize_nvfp4(h, scale), torch.float32)

    rows = second(x, moe.experts.w13)
    # every copy of every token, so that a scale over the tensor sees what the layer's does
    token, expert = torch.arange(9).repeat_interleave(2), chosen.flatten()
    h = torch.cat([hidden(weights13[e], rows[t : t + 1]) for t, e in zip(token, expert, strict=True)])
    if route_weight == "before":
        h = (h.float() * weights.flatten()[:, None]).bfloat16()
    h = second(h, moe.experts.w2)
    y = torch.stack([(h[i] @ weights2[e].T).bfloat16().float() for i, e in enumerate(expert)]).view(9, 2, 32)
    y = (y * weights[..., None] if route_weight == "after" else y).sum(1)
    shared = second(hidden(shared13, rows), moe.shared_experts.w2) @ shared2.T
    want = (y + shared.bfloat16().float()).bfloat16()
    assert torch.equal(moe(x, ids), want)


@pytest.mark.parametrize("sizes", [(0, 1, 127, 128, 129), (385, 0, 0, 0, 0), (0, 0, 0, 0, 0)])
def test_dispatch_fills_padded_groups(sizes):
    tokens = sum(sizes)
    chosen = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))[torch.randperm(tokens)][:, None]
    route = dispatch(chosen, 5)
    padded = [-(-n // 128) * 128 for n in sizes]
    assert route.offsets.tolist() == torch.tensor(padded).cumsum(0).tolist()
    assert route.sizes.tolist() == list(sizes)
    assert route.rows >= sum(padded) and route.rows % 128 == 0
    x = quantize_nvfp4(seeded(tokens, 32), "token")
    buffer = place(x, route, 1)
    start, free = 0, torch.ones(route.rows, dtype=torch.bool)
    for e, n in enumerate(sizes):
        rows, own = slice(start, start + n), (chosen[:, 0] == e).nonzero()[:, 0]
        assert torch.equal(buffer.codes[rows], x.codes[own])  # in the order of the tokens
        assert torch.equal(buffer.global_scale[rows], x.global_scale[own])
        free[rows] = False
        start += padded[e]
    assert not buffer.block_scales.view(torch.uint8)[free].any()


def test_static_buffer_holds_the_worst_routing():
    """Every expert with one token more than a multiple of 128 needs the most padding there is."""
    chosen = torch.arange(5).repeat_interleave(129)[:, None]
    route = dispatch(chosen, 5)
    assert route.rows == int(route.offsets[-1])


def test_moe_accepts_a_quantized_activation():
    moe = frozen(MoE(32, 16, 4, 2))
    moe.gate.weight.zero_()
    moe.gate.bias.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # the gate must not matter here
    quantize_model_(moe)
    x = seeded(2, 3, 32, dtype=torch.bfloat16)
    for layout in ("linear", "swizzled"):
        q = with_scale_layout(quantize_nvfp4(x.view(6, 32), "token"), layout)
        assert torch.equal(moe(q), moe(x).view(6, 32))
    assert torch.equal(moe(quantize_nvfp4(x, "token")), moe(x))
    assert moe(x[:0]).shape == (0, 3, 32)


def test_nvfp4_gate_is_an_option():
    assert not quantize_model_(frozen(MoE(32, 16, 4, 2))).gate.quantized
    moe = quantize_model_(frozen(MoE(32, 16, 4, 2, nvfp4_gate=True)))
    x = seeded(5, 32, dtype=torch.bfloat16)
    logits = grouped_mm(quantize_nvfp4(x, "token"), moe.gate.nvfp4_weight()).float()
    scores = F.softplus(logits).sqrt()
    assert torch.equal(moe.gate(x)[1], scores.topk(2).indices)
    assert moe.to(torch.bfloat16).gate.bias.dtype == torch.float32


# Checkpoints and the manners of modules


def expert_state(moe):
    return {k: v for k, v in moe.state_dict().items() if "expert" in k}


@pytest.mark.parametrize("fused", [True, False])
def test_state_dict_has_gate_before_up_whatever_the_layout(fused):
    made = frozen(MoE(32, 16, 4, 2))
    gate_up = quantize_nvfp4(made.experts.w13.weight.view(8, 16, 32), "group")
    quantize_model_(made)
    made.experts.fused = made.shared_experts.fused = fused
    state = made.state_dict()
    assert torch.equal(state["experts.w13.weight"], gate_up.codes.view(4, 32, 16))
    assert torch.equal(state["experts.w13.weight_scale_2"], gate_up.global_scale.view(4, 2))
    assert state["shared_experts.w13.weight_scale_2"].shape == (2,)
    bytes_ = [v for k, v in state.items() if "expert" in k and not k.endswith("_2")]
    assert len(bytes_) == 8 and {v.dtype for v in bytes_} == {torch.uint8}
    for start in (frozen(MoE(32, 16, 4, 2), 1), quantize_model_(frozen(MoE(32, 16, 4, 2), 1))):
        start.experts.fused = not fused
        start.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in start.state_dict().items())
        start.experts.fused = start.shared_experts.fused = fused
        assert torch.equal(start(seeded(5, 32)), made(seeded(5, 32)))


def test_a_quantized_layer_quantizes_the_weight_it_is_given():
    high, layer = frozen(MoE(32, 16, 4, 2), 1), quantize_model_(frozen(MoE(32, 16, 4, 2)))
    layer.experts.w2.set_input_scale(0.5)
    layer.load_state_dict(high.state_dict())
    want = quantize_model_(high)
    assert torch.equal(layer(seeded(5, 32)), want(seeded(5, 32))) and layer.experts.w2.input_scale == 0.5


def test_scales_of_checkpoints_come_in_several_shapes():
    moe = quantize_model_(frozen(MoE(32, 16, 4, 2)))
    state = moe.state_dict()
    state["experts.w13.weight_scale_2"] = state["experts.w13.weight_scale_2"][:, 0].clone()
    state["experts.w13.input_scale"] = torch.tensor([0.1, 0.4, 0.2, 0.3])
    state["shared_experts.w2.weight_scale_2"] = state["shared_experts.w2.weight_scale_2"].view(1)
    state["shared_experts.w2.input_scale"] = torch.tensor([0.7])
    scales = state["shared_experts.w13.weight_scale"]
    state["shared_experts.w13.weight_scale"] = scales.view(torch.float8_e4m3fn)
    moe.load_state_dict(state)
    both = moe.experts.w13.weight_scale_2
    assert both.shape == (4, 2) and torch.equal(both[:, 0], both[:, 1])
    assert moe.experts.w13.static_scale() == torch.tensor(0.4)
    assert moe.shared_experts.w2.input_scale.shape == ()
    del state["shared_experts.w2.input_scale"]  # a scale that the checkpoint lacks must not survive
    moe.load_state_dict(state)
    assert moe.shared_experts.w2.input_scale is None
    with pytest.raises(RuntimeError, match="size mismatch"):
        moe.load_state_dict({**state, "experts.w2.weight": state["experts.w2.weight"][:3]})
    with pytest.raises(RuntimeError, match="weight_scale_2"):
        moe.load_state_dict({k: v for k, v in state.items() if k != "experts.w2.weight_scale_2"})


def test_buffers_survive_whatever_happens_to_modules(tmp_path):
    moe, x = quantize_model_(frozen(MoE(32, 16, 4, 2))), seeded(6, 32, dtype=torch.bfloat16)
    moe.experts.w2.weight_scale_2.mul_(2.0**-30)  # below what half precision holds
    moe.experts.w2.set_input_scale(2.0**-30)
    want, state = moe(x), expert_state(moe)
    torch.save(moe, tmp_path / "moe.pt")
    others = {
        "half": copy.deepcopy(moe).half(),
        "to": copy.deepcopy(moe).to(torch.float64),
        "bfloat16": copy.deepcopy(moe).bfloat16().float(),
        "deepcopy": copy.deepcopy(moe),
        "pickle": pickle.loads(pickle.dumps(moe)),
        "file": torch.load(tmp_path / "moe.pt", weights_only=False),
    }
    for name, other in others.items():
        for key, value in expert_state(other).items():
            assert value.dtype == state[key].dtype and torch.equal(value, state[key]), (name, key)
        if name in ("deepcopy", "pickle", "file"):
            assert torch.equal(other(x), want), name
    meta = copy.deepcopy(moe).to("meta")
    assert meta(x.to("meta")).shape == (6, 32)
    meta = MoE(32, 16, 4, 2, device="meta")
    quantize_model_(meta)
    assert meta.experts.w13.weight.dtype == torch.uint8 and meta.experts.w13.weight.device.type == "meta"
    meta.to_empty(device="cpu").load_state_dict(moe.state_dict())
    assert torch.equal(meta(x), want)


def test_weights_made_in_inference_mode_count_their_changes():
    """Decoded copies are kept until the codes change, which tensors of inference mode do not tell."""
    first, second = (quantize_model_(frozen(MoE(32, 16, 4, 2), seed)) for seed in (0, 1))
    x = seeded(5, 32)
    with torch.inference_mode():
        moe = quantize_model_(frozen(MoE(32, 16, 4, 2)))
        moe.experts.fused = False
        moe.experts.fused = True
        assert not any(b.is_inference() for n, b in moe.experts.named_buffers() if not n.endswith("_2"))
        assert torch.equal(moe(x), first(x))
        moe.load_state_dict(second.state_dict())
        assert torch.equal(moe(x), second(x))


def test_model_helpers_say_what_they_did():
    moe = frozen(MoE(32, 16, 4, 2))
    named = []
    quantize_model_(moe, "bound", {"experts.w2": torch.tensor(0.25)}, progress=named.append)
    assert named == ["experts.w13", "experts.w2", "shared_experts.w13", "shared_experts.w2"]
    assert moe.experts.w2.activation_scale == "bound" and moe.experts.w13.activation_scale == "token"
    assert moe.experts.w2.input_scale == 0.25
    with pytest.raises(ValueError, match=r"experts\.w13 has none: calibrate"):
        set_activation_scale_(moe, "static")
    assert moe.experts.w2.activation_scale == "bound"  # nothing was changed half-way
    with pytest.raises(ValueError, match="'gate', which is no quantizable layer"):
        quantize_model_(moe, calibration={"gate": torch.tensor(1.0)})
    with pytest.raises(RuntimeError, match="both or neither"):
        half = frozen(Experts(4, 32, 16))
        half.w13.quantize_()
        half(seeded(2, 32), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    assert all(isinstance(m, Weight) for m in (moe.experts.w13, moe.gate))


@pytest.mark.parametrize("quantized", [False, True])
def test_every_layer_compiles_as_one_graph(quantized):
    layers = {
        "linear": (Linear(32, 48), seeded(5, 32)),
        "grouped": (GroupedLinear(2, 32, 16), seeded(5, 2, 32)),
        "shared": (SharedExpert(32, 16), seeded(5, 32)),
        "moe": (MoE(32, 16, 4, 2), seeded(5, 32)),
    }
    for name, (layer, x) in layers.items():
        frozen(layer)
        if quantized:
            quantize_model_(layer)
        # Tracing and functionalization are what could fail; their result runs eagerly, with the same bits.
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(y, layer(x)) or not quantized, name
        # High precision takes another algorithm for experts there: K = 32 steps and less of float32 each.
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
