"""Configs in both dialects, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dsv4lab.model import CSA, HCA, SLIDING, ModelConfig, Yarn

PRESETS = ["nano", "flash", "pro"]

# The names of DeepSeek's inference code, with Flash's published sizes.
FLASH = {
    "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43, "n_hash_layers": 3,
    "n_heads": 64, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 6,
    "score_func": "sqrtsoftplus", "route_scale": 1.5, "swiglu_limit": 10.0, "q_lora_rank": 1024,
    "head_dim": 512, "rope_head_dim": 64, "o_groups": 8, "o_lora_rank": 1024, "window_size": 128,
    "original_seq_len": 65536, "rope_theta": 10000, "rope_factor": 16, "beta_fast": 32, "beta_slow": 1,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "compress_rope_theta": 160000, "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0], "dtype": "fp8",
    "n_mtp_layers": 1,
}  # fmt: skip


def changed(**changes) -> dict:
    values = {**ModelConfig.nano().to_dict(), **changes}
    return {k: v for k, v in values.items() if v != "absent"}


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset):
    config = getattr(ModelConfig, preset)()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_what_we_write(preset, tmp_path):
    from transformers import AutoConfig

    config = getattr(ModelConfig, preset)()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "DeepseekV4Config"
    assert theirs.qk_rope_head_dim == config.rope_dim and theirs.layer_types == list(config.layer_types)
    assert ModelConfig.from_dict(theirs.to_dict()) == config


def test_the_names_of_deepseek():
    assert ModelConfig.from_dict(FLASH) == ModelConfig.flash()


def test_the_hub_s_flat_rope_scaling():
    flat = ModelConfig.flash().to_dict()
    del flat["rope_parameters"], flat["layer_types"], flat["mlp_layer_types"], flat["partial_rotary_factor"]
    flat |= {
        "qk_rope_head_dim": 64, "num_hash_layers": 3, "compress_ratios": FLASH["compress_ratios"],
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                         "beta_fast": 32, "beta_slow": 1},
    }  # fmt: skip
    assert ModelConfig.from_dict(flat) == ModelConfig.flash()


def test_layers_know_their_kind():
    config = ModelConfig.flash()
    assert [config.ratio(i) for i in (0, 1, 2, 3, 42)] == [0, 0, 4, 128, 4]
    assert [config.hashed(i) for i in (0, 2, 3)] == [True, True, False]
    assert [config.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)] == [2, 21, 20]
    pro = ModelConfig.pro()
    assert [pro.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)] == [0, 30, 31]


@pytest.mark.parametrize(("width", "head"), [(29 * 2, 100), (6, 10), (62, 124)])
def test_any_rotated_width_survives(width, head):
    config = dataclasses.replace(ModelConfig.nano(), head_dim=head, index_head_dim=head, rope_dim=width)
    assert ModelConfig.from_dict(config.to_dict()).rope_dim == width


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(hidden_size="absent"), "hidden_size is missing"),
        (changed(hidden_size=0), "hidden_size must be a positive integer, got 0"),
        (changed(hidden_size=2.5), "hidden_size must be a positive integer, got 2.5"),
        (changed(rms_norm_eps=0), "rms_norm_eps must be a positive number, got 0"),
        (changed(swiglu_limit=-1), "swiglu_limit must be a positive number, got -1"),
        (changed(dim=512), "hidden_size = 256 contradicts dim = 512"),
        (changed(num_hidden_layers=7), "layer_types names 6 layers, but num_hidden_layers is 7"),
        (changed(layer_types=["sliding_attention"] * 5 + ["full_attention"]), "got 'full_attention'"),
        (changed(compress_ratios=[0, 4, 128, 4, 128, 0]), "layer_types contradicts compress_ratios"),
        (changed(layer_types="absent"), "neither layer_types nor compress_ratios is given"),
        (changed(layer_types="absent", compress_ratios=[0, 4, 8, 4, 4, 4]), "may hold .*got 8"),
        (changed(layer_types="absent", compress_ratios=[0, 4]), "compress_ratios has 2 entries for 6 layers"),
        (changed(num_hash_layers=3), "mlp_layer_types contradicts num_hash_layers = 3"),
        (changed(mlp_layer_types="absent"), "neither mlp_layer_types nor num_hash_layers is given"),
        (
            changed(mlp_layer_types="absent", num_hash_layers=7),
            "num_hash_layers must lie within 0 and 6, got 7",
        ),
        (changed(o_groups=3), r"num_attention_heads \(4\) must divide into o_groups \(3\)"),
        (changed(num_experts_per_tok=9), r"num_experts_per_tok \(9\) exceeds n_routed_experts \(8\)"),
        (changed(n_shared_experts=2), "n_shared_experts must be 1, got 2"),
        (changed(index_head_dim=16), "even and at most the head width 16, got 32"),
        (changed(qk_rope_head_dim=64), "qk_rope_head_dim = 64 contradicts partial_rotary_factor = 0.25"),
        (changed(scoring_func="softmax"), "scoring_func must be 'sqrtsoftplus', got 'softmax'"),
        (changed(tie_word_embeddings=True), "tie_word_embeddings must be False, got True"),
        (changed(model_type="llama"), "model_type must be 'deepseek_v4', got 'llama'"),
        (
            changed(rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "'default' or 'yarn', got 'linear'",
        ),
        (changed(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "needs original_max_position_embed"),
        (changed(hidden_size=[256]), r"hidden_size must be a number, got \[256\]"),
        (changed(rope_theta="10000"), "rope_theta must be a number, got '10000'"),
        (changed(head_dim=float("inf")), "head_dim must be a number, got inf"),
        (changed(hidden_size=10**30), "hidden_size must be a number, got 10"),
        (changed(hidden_size=2**40), r"hidden_size must be below 2\^31"),
        (changed(layer_types=7), "layer_types must be a list of names, got 7"),
        (changed(layer_types="absent", compress_ratios=["4"]), "compress_ratios must be a list of numbers"),
        (changed(compress_rates="4"), "compress_rates must be an object, got '4'"),
        (changed(compress_rates={CSA: [4]}), "compress_rates.compressed_sparse_attention must be a number"),
        (changed(rope_parameters=3), "rope_parameters must be an object, got 3"),
        (
            changed(rope_parameters={"main": {}, "compress": "yarn"}),
            "rope_parameters.compress must be an obj",
        ),
        (
            changed(rope_parameters={"main": {"rope_theta": "x"}, "compress": {}}),
            "rope_parameters.main.rope_theta must be a number, got 'x'",
        ),
        (changed(eos_token_id="</s>"), "eos_token_id must be a token id or a list of them"),
        (changed(num_nextn_predict_layers="one"), "num_nextn_predict_layers must be a number"),
        (changed(num_hash_layers=2**62), "num_hash_layers must lie within 0 and 6"),
    ],
)
def test_contradictions_are_one_sentence(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_dict(values)
    assert str(caught.value).startswith("config: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [None, 1.277])
def test_yarn_with_a_factor_on_the_logits_is_refused(factor):
    values = ModelConfig.flash().to_dict()
    del values["rope_parameters"]["compress"]["attention_factor"]
    if factor:
        values["rope_parameters"]["compress"]["attention_factor"] = factor
    with pytest.raises(ValueError, match=r"attention_factor (must be|=) 1\.0"):
        ModelConfig.from_dict(values)


def test_several_end_tokens_survive():
    config = dataclasses.replace(ModelConfig.nano(), eos_token_id=(1, 2))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_not_a_dict():
    with pytest.raises(TypeError, match="config must be a dict, got list"):
        ModelConfig.from_dict([])


def test_configs_are_values():
    assert ModelConfig.nano() == ModelConfig.nano() and hash(ModelConfig.nano()) == hash(ModelConfig.nano())
    assert dataclasses.replace(ModelConfig.nano(), yarn=Yarn()).yarn == Yarn(16.0, 65536, 32.0, 1.0)
