"""Decoding with NVFP4 layers: what is exact, what agrees up to rounding, and what depends on the batch."""

from __future__ import annotations

import copy

import pytest
import torch

from dsv4lab.calibration import calibrate
from dsv4lab.formats import NVFP4Tensor
from dsv4lab.layers import quantizable_layers, quantize_model_, set_activation_scale_
from dsv4lab.model import CSA, HCA, SLIDING, DeepseekV4, ModelConfig

LENGTH = 45
CHUNKS = {"tokens": [1] * LENGTH, "after": [9, 4, 3, 1, 16, 12], "long": [20, 1, 24]}
CONFIG = ModelConfig(
    vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, rope_dim=8,
    q_lora_rank=48, o_groups=2, o_lora_rank=16, moe_intermediate_size=48, n_routed_experts=6,
    num_experts_per_tok=3, layer_types=(SLIDING, CSA, HCA), mlp_layer_types=("hash_moe", "moe", "moe"),
    csa_ratio=4, hca_ratio=16, sliding_window=8, index_n_heads=3, index_head_dim=16, yarn=None,
    max_position_embeddings=64,
)  # fmt: skip


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def run(model, ids, chunks):
    cache, parts, at = model.new_cache(*ids.shape), [], 0
    for n in chunks:
        parts.append(model(ids[:, at : at + n], cache))
        at += n
    return torch.cat(parts, 1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    """(high precision, NVFP4) with one set of weights, streams in one dtype or the other.

    Sublayers add a tenth to the streams, so that an error is carried on and not blown up.
    """
    torch.manual_seed(0)
    exact = DeepseekV4(CONFIG, dtype=request.param).eval()
    for name, parameter in exact.named_parameters():
        if parameter.dim() > 1:
            gain = 0.1 if name.endswith(("wo_b.weight", "w2.weight")) else 1.0
            torch.nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
    scales = calibrate(copy.deepcopy(exact), [tokens()])
    return exact, quantize_model_(copy.deepcopy(exact), calibration=scales)


@pytest.mark.parametrize("policy", ["token", "static", "bound"])
def test_chunks_agree(models, policy):
    """A code that rounds to its neighbour is worth 12 mean squared errors of the rounding (step^2 / 12).

    With fp32 streams, values differ by accumulation order: 1e-6 of themselves at most, so that one code in
    ten thousand may flip: sqrt(12e-4) = 3.5 % of what quantization does to the logits. With bf16 streams,
    values differ by 2^-8 of themselves, a code's step is a quarter of a typical value, and 2 % may flip:
    sqrt(0.24) = 50 %.
    """
    exact, model = models
    set_activation_scale_(model, policy)
    with torch.no_grad():
        whole = model(tokens())
        effect = rms(whole - exact(tokens()))
    share = 0.035 if model.embed.weight.dtype == torch.float32 else 0.5
    assert effect > 0.02 * rms(whole)
    for chunks in CHUNKS.values():
        assert rms(run(model, tokens(), chunks) - whole) <= share * effect


def test_under_the_tensor_policy_a_token_depends_on_its_batch(models):
    """Its one global scale is that of the loudest token of the call: chunks and batch mates change codes."""
    exact, model = models
    set_activation_scale_(model, "tensor")
    with torch.no_grad():
        whole = model(tokens())
        effect = rms(whole - exact(tokens()))
        assert rms(run(model, tokens(), CHUNKS["tokens"]) - whole) > 0.5 * effect
        assert rms(model(tokens()[:1]) - whole[:1]) > 0.5 * effect


@pytest.mark.parametrize("policy", ["token", "static", "bound", "tensor"])
def test_codes_of_a_row_are_exact_where_its_scale_is_its_own(models, policy):
    """Bit for bit, for every linear that takes rows, beside a row a hundred times louder."""
    _, model = models
    given = set_activation_scale_(model, policy)
    g = torch.Generator().manual_seed(3)
    for name, layer in quantizable_layers(model):
        if name.endswith("wo_a"):  # its rows come in groups
            continue
        x = torch.randn(4, layer.K, generator=g).to(torch.bfloat16)
        x[3] *= 100
        together, alone = layer.quantize_input(x), layer.quantize_input(x[:3])
        same = torch.equal(together.codes[:3], alone.codes)
        same &= torch.equal(together.block_scales[:3].view(torch.uint8), alone.block_scales.view(torch.uint8))
        assert same == (given[name] != "tensor"), name


def test_one_quantization_serves_two_linears_exactly(models):
    """An observer makes each linear quantize for itself; the results are the same bits."""
    _, model = models
    set_activation_scale_(model, "token")
    calls = []
    with torch.no_grad():
        shared = model(tokens())
        for layer in model.layers:
            layer.attn.wkv.observer = lambda *seen: calls.append(seen)
        try:
            alone = model(tokens())
        finally:
            for layer in model.layers:
                layer.attn.wkv.observer = None
    assert len(calls) == 3 and torch.equal(shared, alone)


@pytest.mark.parametrize(("policy", "shared"), [("token", True), ("tensor", True), ("static", False)])
def test_static_scales_are_each_linear_s_own(models, policy, shared):
    _, model = models
    set_activation_scale_(model, policy)
    attention, seen = model.layers[0].attn, []
    handles = [
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(isinstance(inputs[0], NVFP4Tensor)))
        for linear in (attention.wq_a, attention.wkv)
    ]
    with torch.no_grad():
        model(tokens())
    for handle in handles:
        handle.remove()
    assert seen == [shared, shared]


def test_streams_keep_their_dtype(models):
    exact, model = models
    seen = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype)) for layer in model.layers
    ]
    with torch.no_grad():
        assert model(tokens()).dtype == torch.float32
    for handle in handles:
        handle.remove()
    assert seen == [exact.embed.weight.dtype] * 3


def test_what_becomes_nvfp4(models):
    _, model = models
    attention = {f"attn.{n}" for n in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")}
    experts = {f"ffn.{e}.{w}" for e in ("experts", "shared_experts") for w in ("w13", "w2")}
    expected = {f"layers.{i}.{name}" for i in range(3) for name in attention | experts}
    assert {name for name, _ in quantizable_layers(model)} == expected
    assert {n.rsplit(".", 1)[0] for n, b in model.named_buffers() if b.dtype == torch.uint8} == expected
