"""Checkpoints: every dialect read, every defect named, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4lab import checkpoint
from dsv4lab.checkpoint import CheckpointError
from dsv4lab.checkpoint.names import to_deepseek, to_transformers
from dsv4lab.model import DeepseekV4

EXPERT = "model.layers.1.ffn.experts.2.w1"
LINEAR = "model.layers.0.attn.wq_a"


def _editable(source, folder):
    """Copies a checkpoint, and returns a function that changes the copy's tensors by name."""
    shutil.copytree(source, folder)

    def edit(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return edit


@pytest.fixture
def editable(tiny_checkpoint, tmp_path):
    return _editable(tiny_checkpoint, tmp_path / "edited")


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].float(), b[name].float()), name


# ---- reading


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
        vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        q_lora_rank=32, o_groups=2, o_lora_rank=32, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2,
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


# ---- bad input


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


TID2EID = "model.layers.0.ffn.gate.tid2eid"
DEFECTS = {
    "missing expert": (drop(f"{EXPERT}.weight"), "layers.1.ffn.experts.2.w1.weight is missing"),
    "missing norm": (drop("model.norm.weight"), "norm.weight is missing"),
    "unknown": (put("model.surprise", lambda _: torch.ones(2)), "model.surprise is not one of the model"),
    "a layer too many": (put("model.layers.3.norm.weight", lambda _: torch.ones(64)), "layers.3.norm"),
    "wrong shape": (put(f"{LINEAR}.weight", lambda w: w[:16].clone()), "(16, 64), but config.json asks for"),
    "integers": (put(f"{LINEAR}.weight", lambda w: w.to(torch.int64)), "is I64, but must be BF16 or F32"),
    "fp8": (put(f"{LINEAR}.weight", lambda w: w.to(torch.float8_e4m3fn)), "must be converted to BF16 first"),
    "half": (put(f"{LINEAR}.weight", lambda w: w.half()), "is F16, but must be BF16 or F32"),
    "float ids": (put(TID2EID, lambda t: t.float()), "is F32, but must be I64"),
    "ids out of range": (put(TID2EID, lambda t: t + 2), "expert id outside 0 to 3"),
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
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoint.load(folder)


def test_sizes_whose_product_no_tensor_can_have(editable):
    folder = editable(lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 2**31 - 1, "hc_mult": 2**30}
    (folder / "config.json").write_text(json.dumps({**values, **sizes}))
    with pytest.raises(CheckpointError, match=r"config\.json: no such model can be built"):
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
    with pytest.raises(CheckpointError, match=r"is missing, but model\.safetensors\.index\.json has it here"):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps(original))
    (tmp_path / files[-1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[-1]}: no such file"):
        checkpoint.load(tmp_path)


# ---- NVFP4


@pytest.fixture(scope="session")
def nvfp4_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint quantized, with input scales; do not write to it."""
    folder = tmp_path_factory.mktemp("tiny_nvfp4") / "model"
    e = torch.arange(1, 5) * 0.001
    scales = {f"layers.{i}.ffn.experts.w13": e for i in range(3)} | {"layers.0.attn.wq_a": torch.tensor(0.5)}
    checkpoint.quantize_checkpoint(tiny_checkpoint, folder, input_scales=scales)
    return folder


@pytest.fixture
def editable_nvfp4(nvfp4_checkpoint, tmp_path):
    return _editable(nvfp4_checkpoint, tmp_path / "edited")


def test_quantized_file_is_modelopts_form(nvfp4_checkpoint, tiny_checkpoint):
    before = load_file(tiny_checkpoint / "model.safetensors")
    after = load_file(nvfp4_checkpoint / "model.safetensors")
    weight, scale = after[f"{EXPERT}.weight"], after[f"{EXPERT}.weight_scale"]
    assert weight.dtype == torch.uint8 and weight.shape == (32, 32)
    assert scale.dtype == torch.float8_e4m3fn and scale.shape == (32, 4)
    g = after[f"{EXPERT}.weight_scale_2"]
    assert g.dtype == torch.float32 and g.shape == ()
    assert g == before[f"{EXPERT}.weight"].abs().max().float() / 2688
    assert after[f"{EXPERT}.input_scale"] == torch.tensor(3) * 0.001
    assert f"{EXPERT[:-1]}2.input_scale" not in after
    quantized = {name.removesuffix("_scale") for name in after if name.endswith(".weight_scale")}
    for name, tensor in before.items():  # all else is untouched
        assert name in quantized or torch.equal(after[name], tensor), name
    assert len(quantized) == 3 * (5 + 3 + 4 * 3)
    config = json.loads((nvfp4_checkpoint / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "NVFP4"


def test_quantized_weights_decode_to_the_source_within_half_a_step(nvfp4_checkpoint, tiny_checkpoint):
    before = load_file(tiny_checkpoint / "model.safetensors")
    after = load_file(nvfp4_checkpoint / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in (LINEAR, EXPERT, "model.layers.2.attn.wo_a"):
        codes = after[f"{name}.weight"]
        code = values[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]  # even k in the low nibble
        step = (after[f"{name}.weight_scale"].float() * after[f"{name}.weight_scale_2"]).repeat_interleave(
            16, 1
        )
        # Between 4 and 6 rounding is off by up to 1 step, less below. E4M3 rounds a normal scale by at most
        # 1/16, so no value exceeds 6 / (1 - 1/16) = 6.4 steps, and saturating at 6 takes no more than 0.4.
        assert ((code * step - before[f"{name}.weight"].float()).abs() <= step * 1.0001).all()


def test_nvfp4_state_is_stacked_with_its_scales(nvfp4_checkpoint):
    _, state = checkpoint.load(nvfp4_checkpoint)
    stored = load_file(nvfp4_checkpoint / "model.safetensors")
    base = "layers.1.ffn.experts"
    assert (
        state[f"{base}.w13.weight"].shape == (4, 64, 32) and state[f"{base}.w13.weight"].dtype == torch.uint8
    )
    assert torch.equal(state[f"{base}.w13.weight"][2, :32], stored[f"{EXPERT}.weight"])
    assert torch.equal(state[f"{base}.w13.weight"][2, 32:], stored["model.layers.1.ffn.experts.2.w3.weight"])
    assert state[f"{base}.w13.weight_scale"].shape == (4, 64, 4)
    g = state[f"{base}.w13.weight_scale_2"]
    assert g.shape == (4, 2) and g[2, 0] == stored[f"{EXPERT}.weight_scale_2"]
    assert g[2, 1] == stored["model.layers.1.ffn.experts.2.w3.weight_scale_2"] != g[2, 0]
    assert state[f"{base}.w2.weight_scale_2"].shape == (4,)
    assert state["layers.1.ffn.shared_experts.w13.weight_scale_2"].shape == (2,)
    assert torch.equal(state[f"{base}.w13.input_scale"], torch.arange(1, 5) * 0.001)
    assert state["layers.0.attn.wq_a.input_scale"] == 0.5 and "layers.1.attn.wq_a.input_scale" not in state


def test_the_larger_input_scale_of_gate_and_up_is_taken(editable_nvfp4):
    folder = editable_nvfp4(put("model.layers.1.ffn.experts.2.w3.input_scale", lambda s: s * 7))
    _, state = checkpoint.load(folder)
    assert state["layers.1.ffn.experts.w13.input_scale"][2] == torch.tensor(3) * 0.001 * 7


def reciprocal(tensors):
    """The same checkpoint as compressed-tensors writes it."""
    for name in [n for n in tensors if n.endswith("weight_scale_2")]:
        base = name.removesuffix("weight_scale_2")
        tensors[f"{base}weight_global_scale"] = 1 / tensors.pop(name).reshape(1)
        tensors[f"{base}weight_packed"] = tensors.pop(f"{base}weight")
        if f"{base}input_scale" in tensors:
            tensors[f"{base}input_global_scale"] = 1 / tensors.pop(f"{base}input_scale").reshape(1)


def test_reciprocal_global_scales_are_turned_round(editable_nvfp4, nvfp4_checkpoint):
    _, expected = checkpoint.load(nvfp4_checkpoint)
    _, state = checkpoint.load(editable_nvfp4(reciprocal))
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        if name.endswith(("weight_scale_2", "input_scale")):  # two fp32 divisions: off by one ulp at most
            assert torch.allclose(tensor, expected[name], rtol=2**-23, atol=0), name
        else:
            assert torch.equal(tensor.float(), expected[name].float()), name


def byte(value):
    def change(scale):
        scale = scale.view(torch.uint8).clone()
        scale.view(-1)[5] = value
        return scale.view(torch.float8_e4m3fn)

    return change


NVFP4_DEFECTS = {
    "missing scale": (drop(f"{EXPERT}.weight_scale"), "layers.1.ffn.experts.2.w1.weight_scale is missing"),
    "missing global scale": (drop(f"{EXPERT}.weight_scale_2"), "experts.2.w1.weight_scale_2 is missing"),
    "input scale of one": (drop(f"{EXPERT}.input_scale"), "has no counterpart for the other experts"),
    "one expert in bf16": (
        lambda t: [t.pop(f"{EXPERT}.{s}") for s in ("weight_scale", "weight_scale_2", "input_scale")]
        + [t.update({f"{EXPERT}.weight": torch.zeros(32, 64)})],
        "must be both NVFP4 or both not",
    ),
    "unpacked codes": (put(f"{LINEAR}.weight", lambda w: w.repeat(1, 2)), "(32, 64), but config.json asks"),
    "scales for 32": (put(f"{LINEAR}.weight_scale", lambda s: s[:, :2].clone()), "asks for (32, 4)"),
    "scales in bf16": (put(f"{LINEAR}.weight_scale", lambda s: s.bfloat16()), "is BF16, but must be F8_E4M3"),
    "NaN scale": (put(f"{LINEAR}.weight_scale", byte(0x7F)), "holds a NaN scale"),
    "negative scale": (put(f"{LINEAR}.weight_scale", byte(0xB8)), "holds a negative scale"),
    "NaN global scale": (put(f"{LINEAR}.weight_scale_2", lambda g: g * float("nan")), "holds nan"),
    "negative global scale": (put(f"{LINEAR}.weight_scale_2", lambda g: -g), "which is no global scale"),
    "input scale zero": (put(f"{LINEAR}.input_scale", lambda g: g * 0), "is zero"),
    "input scale subnormal": (put(f"{LINEAR}.input_scale", lambda g: g * 0 + 1e-38), "is no global scale"),
    "NVFP4 head": (
        lambda t: t.update({"head.weight": torch.zeros(256, 32, dtype=torch.uint8),
                            "head.weight_scale": torch.zeros(256, 4).to(torch.float8_e4m3fn),
                            "head.weight_scale_2": torch.tensor(1.0)}),
        "kept in high precision",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", NVFP4_DEFECTS)
def test_an_nvfp4_defect_is_one_line_that_names_file_and_tensor(editable_nvfp4, defect):
    change, message = NVFP4_DEFECTS[defect]
    folder = editable_nvfp4(change)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


# ---- quantizing a checkpoint


def test_shards_stay_shards(peer, tmp_path):
    peer[0].save_pretrained(tmp_path / "source", max_shard_size="100KB")
    report = checkpoint.quantize_checkpoint(tmp_path / "source", tmp_path / "copy")
    names = [p.name for p in (tmp_path / "source").glob("*.safetensors*")]
    assert sorted(names) == sorted(p.name for p in (tmp_path / "copy").glob("*.safetensors*"))
    checkpoint.load(tmp_path / "copy")
    index = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["bytes_out"] < report["bytes_in"]


def test_quantize_refuses_what_is_quantized_or_there(nvfp4_checkpoint, tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="is NVFP4 already"):
        checkpoint.quantize_checkpoint(nvfp4_checkpoint, tmp_path / "twice")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there: exists already"):
        checkpoint.quantize_checkpoint(tiny_checkpoint, tmp_path / "there")
    with pytest.raises(CheckpointError, match="no_parent: no such folder"):
        checkpoint.quantize_checkpoint(tiny_checkpoint, tmp_path / "no_parent" / "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("change, message", [
    (put("model.norm.weight", with_nan), r"model\.norm\.weight holds NaN or Inf"),
    (put(TID2EID, lambda t: t + 2), "expert id outside 0 to 3"),
    (put(f"{LINEAR}.weight", lambda w: w * 0 + 3e38), "too large for an NVFP4 global scale"),
    (put("mtp.0.x", lambda _: torch.ones(2).double()), r"mtp\.0\.x is F64, which cannot be copied"),
])  # fmt: skip
def test_a_bad_tensor_midway_leaves_nothing(editable, tmp_path, change, message):
    folder = editable(change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.quantize_checkpoint(folder, tmp_path / "copy")
    assert not [p for p in tmp_path.iterdir() if p != folder]


def test_a_killed_run_leaves_no_destination_and_the_next_one_cleans_up(tiny_checkpoint, tmp_path):
    code = (
        "import os, signal, sys; from dsv4lab import checkpoint\n"
        "def die(i, n, name):\n    if i == n // 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.quantize_checkpoint(sys.argv[1], sys.argv[2], progress=die)"
    )
    run = subprocess.run([sys.executable, "-c", code, tiny_checkpoint, tmp_path / "copy"])
    assert run.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".copy.partial"]
    (tmp_path / ".copy.partial" / "stale.safetensors").write_text("")
    checkpoint.quantize_checkpoint(tiny_checkpoint, tmp_path / "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]


def test_two_runs_do_not_write_one_destination(tiny_checkpoint, tmp_path):
    def again(i, n, name):
        with pytest.raises(CheckpointError, match="being written by another process"):
            checkpoint.quantize_checkpoint(tiny_checkpoint, tmp_path / "copy")
        seen.append(name)

    seen = []
    checkpoint.quantize_checkpoint(tiny_checkpoint, tmp_path / "copy", progress=again)
    assert seen and (tmp_path / "copy").is_dir()


def test_memory_is_bounded_by_a_tensor(tiny_checkpoint, tmp_path, monkeypatch):
    """While one tensor is written, no other one that was read is still alive."""
    alive, most, read = weakref.WeakSet(), [], checkpoint.Checkpoint.read

    def counted(self, entry):
        tensor = read(self, entry)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(checkpoint.Checkpoint, "read", counted)
    checkpoint.quantize_checkpoint(tiny_checkpoint, tmp_path / "copy")
    assert max(most) <= 2  # the new one, and the last one until its name is bound again


# ---- writing


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
