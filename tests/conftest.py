"""A tiny model with every layer type, and a checkpoint of it, for all tests."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import checkpoint
from dsv4lab.model import CSA, HCA, SLIDING, DeepseekV4, ModelConfig


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Byte-level, random; contractions are multiples of 32, contexts short."""
    return ModelConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, rope_dim=8,
        q_lora_rank=32, o_groups=2, o_lora_rank=32, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, layer_types=(SLIDING, CSA, HCA), mlp_layer_types=("hash_moe", "moe", "moe"),
        index_n_heads=2, index_head_dim=16, index_topk=64, max_position_embeddings=320, yarn=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> DeepseekV4:
    """Shared by all tests of a process: copy it before changing it."""
    torch.manual_seed(0)
    model = DeepseekV4(tiny_config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # normal, so that no two matrices have the same largest value
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """A folder with the tiny model in bf16, named as transformers does; do not write to it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    checkpoint.save(tiny_model.config, tiny_model.state_dict(), folder)
    return folder
