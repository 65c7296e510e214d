"""Checkpoints: every dialect read, every defect named, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4lab import checkpoint
from dsv4lab.checkpoint import CheckpointError
from dsv4lab.checkpoint.names import to_deepseek, to_transformers
from dsv4lab.model import DeepseekV4

EXPERT = "model.layers.1.ffn.experts.2.w1"
LINEAR = "model.layers.0.attn.wq_a"


@pytest.fixture
def editable(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, and a function that changes its tensors by name."""
    folder = tmp_path / "edited"
    shutil.copytree(tiny_checkpoint, folder)

    def edit(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return edit


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].float(), b[name].float()), name


# ---- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["transformers", "deepseek"])
def test_save_then_load_gives_the_same_tensors(tiny_model, tmp_path, dialect):
    checkpoint.save(tiny_model.config, tiny_model.state_dict(), tmp_path / "m", dialect=dialect)
    config, state = checkpoint.load(tmp_path / "m")
    assert config == tiny_model.config
    assert_same_state(state, tiny_model.state_dict())


def test_float32_weights_keep_their_bits(tiny_config, tmp_path):
    model = DeepseekV4(tiny_config, dtype=torch.float32)
    checkpoint.save(tiny_config, model.state_dict(), tmp_path / "m")
    loaded = DeepseekV4.from_pretrained(tmp_path / "m")
    assert loaded.embed.weight.dtype == torch.float32
    assert_same_state(loaded.state_dict(), model.state_dict())


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A random tiny model that transformers made and saved, and what it answers to some ids."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(1)
    config = DeepseekV4Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, q_lora_rank=32,
        o_groups=2, o_lora_rank=32, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"], index_n_heads=2, index_head_dim=16, index_topk=64,
        max_position_embeddings=512,
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("peer")
    ids = torch.randint(0, 96, (2, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids).logits
    return model, folder, ids, expected


@pytest.mark.parametrize("shards", [1, 4])
def test_what_transformers_saves_gives_its_logits(peer, tmp_path, shards):
    model, _, ids, expected = peer
    model.save_pretrained(tmp_path, max_shard_size="100GB" if shards == 1 else "100KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    with torch.no_grad():
        logits = DeepseekV4.from_pretrained(tmp_path)(ids)
    # Two fp32 implementations: 1e-5 of the standard deviation is what parity allows.
    assert (logits - expected).abs().max() <= 1e-5 * expected.std()


def test_transformers_reads_what_save_writes(tiny_config, tmp_path):
    from transformers import DeepseekV4ForCausalLM

    ours = DeepseekV4(tiny_config, dtype=torch.float32).eval()
    checkpoint.save(tiny_config, ours.state_dict(), tmp_path / "m")
    theirs = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 5 % 256
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() <= 1e-5 * b.std()


def test_names_of_the_dialects_invert_each_other(tiny_checkpoint):
    for name in load_file(tiny_checkpoint / "model.safetensors"):
        assert to_transformers(to_deepseek(name)) == name
    assert to_deepseek("model.layers.3.attn.norm.weight") == "layers.3.attn.kv_norm.weight"
    assert to_deepseek("model.layers.3.attn.compressor.norm.weight") == "layers.3.attn.compressor.norm.weight"
    assert to_deepseek("model.hc_head.hc_fn") == "hc_head_fn"


def test_draft_layers_are_known_and_left_out(editable, tiny_model):
    folder = editable(lambda t: t.update({"mtp.0.e_proj.weight": torch.zeros(3, 3, dtype=torch.int8)}))
    assert_same_state(checkpoint.load(folder)[1], tiny_model.state_dict())


def test_progress_names_every_tensor(tiny_checkpoint):
    seen = []
    _, state = checkpoint.load(tiny_checkpoint, progress=lambda *step: seen.append(step))
    assert [step[2] for step in seen] == list(state)
    assert {step[1] for step in seen} == {len(state)} and [step[0] for step in seen] == list(
        range(len(state))
    )


# ---- bad input ------------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


DEFECTS = {
    "missing expert": (drop(f"{EXPERT}.weight"), "layers.1.ffn.experts.2.w1.weight is missing"),
    "missing norm": (drop("model.norm.weight"), "norm.weight is missing"),
    "unknown": (put("model.surprise", lambda _: torch.ones(2)), "model.surprise is not one of the model"),
    "one layer too many": (put("model.layers.3.attn_norm.weight", lambda _: torch.ones(64)), "layers.3.attn_norm"),
    "wrong shape": (put(f"{LINEAR}.weight", lambda w: w[:16].clone()), "shape (16, 64), but config.json asks for (32, 64)"),
    "integer weight": (put(f"{LINEAR}.weight", lambda w: w.to(torch.int64)), "is I64, but must be BF16 or F32"),
    "fp8 weight": (put(f"{LINEAR}.weight", lambda w: w.to(torch.float8_e4m3fn)), "must be converted to BF16 first"),
    "half weight": (put(f"{LINEAR}.weight", lambda w: w.half()), "is F16, but must be BF16 or F32"),
    "float ids": (put("model.layers.0.ffn.gate.tid2eid", lambda t: t.float()), "is F32, but must be I64"),
    "ids out of range": (put("model.layers.0.ffn.gate.tid2eid", lambda t: t + 2), "expert id outside 0 to 3"),
    "NaN": (put(f"{LINEAR}.weight", with_nan), "holds NaN or Inf"),
    "two names for one": (put("norm.weight", lambda _: torch.ones(64)), "means the same as"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_line_that_names_file_and_tensor(editable, defect):
    change, message = DEFECTS[defect]
    folder = editable(change)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_truncated_file(editable):
    folder = editable(lambda tensors: None)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        checkpoint.load(folder)
    os.truncate(file, 5)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content, message", [
    ("{", "config.json: not JSON"),
    ("[]", "config.json: needs a JSON object"),
    ('{"hidden_size": 64}', "config.json: .* is missing"),
])  # fmt: skip
def test_bad_config(editable, content, message):
    folder = editable(lambda tensors: None)
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


def test_config_that_contradicts_the_weights(editable):
    folder = editable(lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "n_routed_experts": 3}))
    with pytest.raises(CheckpointError, match="config.json"):
        checkpoint.load(folder)


def test_missing_folder_and_files(editable, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        checkpoint.load(tmp_path / "nowhere")
    folder = editable(lambda tensors: None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        checkpoint.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        checkpoint.load(folder)


def test_index_that_lies(peer, tmp_path):
    peer[0].save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    files = sorted(set(original["weight_map"].values()))
    wrong = {"weight_map": {name: files[0] for name in original["weight_map"]}}
    index.write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match="is missing, but model.safetensors.index.json has it here"):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps(original))
    (tmp_path / files[-1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[-1]}: no such file"):
        checkpoint.load(tmp_path)


# ---- writing --------------------------------------------------------------------------------------------------


def test_save_keeps_an_existing_model_unless_told(tiny_model, tmp_path):
    config, state = tiny_model.config, tiny_model.state_dict()
    checkpoint.save(config, state, tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_ino
    with pytest.raises(CheckpointError, match="holds a model already"):
        checkpoint.save(config, state, tmp_path)
    checkpoint.save(config, state, tmp_path, replace=True)
    assert (tmp_path / "model.safetensors").stat().st_ino != before  # renamed, not written over
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_where_nothing_can_be_written(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        checkpoint.save(tiny_model.config, tiny_model.state_dict(), tmp_path / "file" / "model")
