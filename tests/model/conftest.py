"""transformers' DeepSeek-V4 with every tensor random, and the same weights in this project's model."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4lab.model import CSA, HCA, SLIDING, DeepseekV4, ModelConfig

# Every kind of layer and of routing; norm weights below one keep the attention's softmax, which magnifies
# rounding errors, as mild as in trained models.
TINY = {
    "vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "head_dim": 32, "partial_rotary_factor": 0.25, "q_lora_rank": 48,
    "num_experts_per_tok": 3, "n_routed_experts": 6, "layer_types": [SLIDING, CSA, HCA, CSA, HCA],
    "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 3, "compress_rates": {CSA: 4, HCA: 16}, "o_groups": 2,
    "o_lora_rank": 16, "index_n_heads": 3, "index_head_dim": 16, "index_topk": 512, "sliding_window": 8,
    "max_position_embeddings": 4096, "routed_scaling_factor": 1.7,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1,
}  # fmt: skip

_PARTS = {
    "q_a_proj": "wq_a", "q_a_norm": "q_norm", "q_b_proj": "wq_b", "kv_proj": "wkv", "o_a_proj": "wo_a",
    "o_b_proj": "wo_b", "sinks": "attn_sink", "gate_proj": "wgate", "position_bias": "ape",
    "e_score_correction_bias": "bias", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn": "attn", "mlp": "ffn", "embed_tokens": "embed", "lm_head": "head",
}  # fmt: skip


def random_theirs(seed: int = 0, **changes) -> DeepseekV4ForCausalLM:
    """A tiny model in fp32; what transformers would leave at zero or one is random too."""
    torch.manual_seed(seed)
    config = DeepseekV4Config(**{**TINY, **changes}, attn_implementation="eager")
    model = DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                experts = torch.rand(tensor.shape[0], config.n_routed_experts).argsort(-1)
                tensor.copy_(experts[:, : tensor.shape[1]])
            elif "norm" in name:
                tensor.uniform_(0.4, 0.8)
            elif name.endswith("scale"):
                tensor.uniform_(0.3, 1.2)
            elif tensor.dim() == 1 or name.endswith("position_bias"):
                tensor.normal_(0, 0.7)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model


def our_state(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their state dict under our names, written down apart from the library's own reader."""
    state = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("model.")
        name = re.sub(r"(attn|ffn)_hc\.(fn|base|scale)", r"hc_\1_\2", name).replace("hc_head.hc_", "hc_head_")
        name = name.replace("compressor.indexer.scorer.", "indexer.")
        name = name.replace("compressor.indexer.q_b_proj", "indexer.wq_b")
        name = name.replace("compressor.indexer.", "indexer.compressor.")
        if "compressor" in name:
            name = name.replace("kv_norm", "norm")
        if "shared_experts" in name:
            name = name.replace("down_proj", "w2")
        name = name.replace("experts.gate_up_proj", "experts.w13.weight")
        name = name.replace("experts.down_proj", "experts.w2.weight")
        state[".".join(_PARTS.get(part, part) for part in name.split("."))] = tensor
    for name in [n for n in state if n.endswith("shared_experts.wgate.weight")]:
        stem = name.removesuffix("wgate.weight")
        state[stem + "w13.weight"] = torch.cat((state.pop(name), state.pop(stem + "up_proj.weight")))
    return state


@functools.cache
def _pair(seed: int, yarn: bool, changes: tuple) -> tuple[DeepseekV4ForCausalLM, DeepseekV4]:
    scaling = {"rope_parameters": YARN} if yarn else {}
    theirs = random_theirs(seed, **scaling, **dict(changes))
    ours = DeepseekV4(ModelConfig.from_dict(theirs.config.to_dict()), dtype=torch.float32).eval()
    ours.load_state_dict(our_state(theirs.state_dict()))
    return theirs, ours


@pytest.fixture(scope="session")
def pair():
    """pair(seed=0, yarn=False, **changes): (theirs, ours), fp32, the same weights; do not change them."""
    return lambda seed=0, yarn=False, **changes: _pair(seed, yarn, tuple(changes.items()))


@pytest.fixture(scope="session")
def ours(pair) -> DeepseekV4:
    """This project's model alone."""
    return pair()[1]
