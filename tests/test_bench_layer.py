"""The benchmark of a layer: whose time is whose, what must be read, and a model of one layer to run."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from dsv4lab.bench import layer
from dsv4lab.layers import quantize_model_
from dsv4lab.model import CSA, ModelConfig


@pytest.fixture(scope="module")
def model():
    made = layer.one_layer(ModelConfig.nano(), torch.device("cpu"))
    return quantize_model_(made)


def test_own_times_leave_out_what_is_inside():
    spent = {"": 10.0, "attn": 6.0, "attn.wq_a": 1.0, "attn.wo_a": 2.0, "ffn": 3.0}
    assert layer.own_times(spent) == {"": 1, "attn": 3, "attn.wq_a": 1, "attn.wo_a": 2, "ffn": 3}
    assert sum(layer.own_times(spent).values()) == 10


def test_parts_name_modules_of_a_block_once(model):
    names = [name for modules in layer.PARTS.values() for name in modules]
    assert len(names) == len(set(names))
    assert all(layer._module(model.layers[0], name) is not None for name in names)


def test_a_layer_has_every_kind_of_weight_in_nvfp4_and_runs(model):
    block = model.layers[0]
    assert model.config.num_hidden_layers == 1 and model.config.layer_types == (CSA,)
    for name in ("attn.wq_a", "attn.wo_a", "ffn.experts.w13", "ffn.shared_experts.w2"):
        assert layer._module(block, name).quantized, name
    cache = model.new_cache(2, 64)
    model(torch.randint(256, (2, 5)), cache)
    cache.fixed = True
    logits = model(torch.randint(256, (2, 1)), cache)
    assert logits.isfinite().all() and logits.std() > 0.1


def test_bytes_are_those_of_the_weights(model):
    c, sizes = model.config, layer.touched_bytes(model, 1)
    # Codes of four bits, a byte of scale for 16 of them, and a global scale.
    assert sizes["attn.wq_a"] == c.hidden_size * c.q_lora_rank * 9 // 16 + 4
    expert = 3 * c.hidden_size * c.moe_intermediate_size * 9 // 16 + 12  # three matrices
    share = c.num_experts_per_tok / c.n_routed_experts
    assert sizes["ffn.experts"] == pytest.approx(share * c.n_routed_experts * expert, abs=1)
    assert layer.touched_bytes(model, 64)["ffn.experts"] > sizes["ffn.experts"]
    whole = sum(t.nbytes for t in (*model.layers[0].parameters(), *model.layers[0].buffers()))
    assert sum(sizes.values()) == whole - (1 - share) * c.n_routed_experts * expert


def test_forward_is_as_before_after_it_was_timed(model):
    block = model.layers[0]
    with layer.timed(block, ["attn.wq_a", "", "no.such"]) as events:
        assert "forward" in block.__dict__ and not events  # nothing was captured
    assert "forward" not in block.__dict__ and "forward" not in block.attn.wq_a.__dict__


@pytest.mark.gpu
def test_on_a_gpu_parts_add_up(tmp_path, monkeypatch):
    file = tmp_path / "layers.csv"
    monkeypatch.setattr(sys, "argv", ["layer", "--presets", "nano", "--tokens", "2", "--csv", str(file)])
    layer.main()
    with file.open() as stream:
        times = {row["part"]: float(row["p50_us"]) for row in csv.DictReader(stream)}
    assert set(times) == {*layer.PARTS, "step"}
    parts = sum(us for part, us in times.items() if part != "step")
    assert 0.5 * times["step"] < parts < 1.5 * times["step"]
