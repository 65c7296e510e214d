"""The shipped model: transformers computes the same logits from the same files, and it keeps its promises."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dsv4lab import corpus
from dsv4lab.layers import quantizable_layers
from dsv4lab.model import DeepseekV4

NANO = corpus.TRAINED_ON.parent
BOUND = 1e-4  # of the logits' standard deviation; fp32 rounding through six layers


@pytest.fixture(scope="module")
def text():
    """Real text, of the kind that the model knows: (2, 400), at most 100 compressed entries."""
    files = sorted(corpus.evaluation_text().files, key=lambda f: -len(f.data))[:2]
    return torch.tensor([[corpus.BEGIN, *f.data[:399]] for f in files])


@pytest.fixture(scope="module")
def theirs(text):
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, attn_implementation="eager")
    assert (
        text.shape[1] // 4 <= model.config.index_topk
    )  # near-ties of the indexer's top-k are not the subject
    with torch.no_grad():
        return model.eval()(text).logits


@pytest.fixture(scope="module")
def ours():
    return DeepseekV4.from_pretrained(NANO, dtype=torch.float32)


def _assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= BOUND * want.std()
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_logits_are_those_of_transformers(ours, theirs, text):
    with torch.no_grad():
        _assert_same(ours(text), theirs)


def test_logits_are_those_of_transformers_when_decoding(ours, theirs, text):
    """A prefill that ends within a window and a block, then a token at a time over the next boundaries."""
    cache = ours.new_cache(2, text.shape[1])
    parts = [ours(text[:, :250], cache)] + [ours(text[:, t : t + 1], cache) for t in range(250, 400)]
    _assert_same(torch.cat(parts, 1), theirs)


def test_weights_are_bf16_and_small():
    path = NANO / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    matrices = [n for n in dtypes if n.endswith(".weight") and "norm" not in n]
    assert matrices and {dtypes[n] for n in matrices} == {"BF16"}


def test_every_nvfp4_contraction_is_a_multiple_of_128(ours):
    widths = {name: layer.K for name, layer in quantizable_layers(ours)}
    assert (
        len(widths) == 9 * 6
    )  # wq_a, wq_b, wkv, wo_a, wo_b, and two products each of routed and shared experts
    assert not {name: k for name, k in widths.items() if k % 128}
