"""Decoding through the cache: every chunking agrees, buffers stay in place, misuse is one clear error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv4lab.model import Cache, DeepseekV4, ModelConfig

# Window 8, blocks of 4 and 16. Chunks end before, at and after each kind of boundary.
CHUNKS = {
    "tokens": [1] * 70,
    "window": [8] * 8 + [6],
    "before": [3, 4, 8, 15, 1, 16, 23],
    "after": [5, 4, 8, 16, 17, 20],
    "long": [33, 1, 1, 35],
}


def tokens(batch: int, length: int, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(7))


def run(model, ids, chunks, cache=None):
    cache, parts, at = cache or model.new_cache(len(ids), ids.shape[1]), [], 0
    for n in chunks:
        parts.append(model(ids[:, at : at + n], cache))
        at += n
    assert cache.length == cache.position.item() == at
    return torch.cat(parts, 1)


@pytest.fixture(scope="module", params=[512, 4], ids=["all", "top4"])
def model(request, pair) -> DeepseekV4:
    """Where every entry is attended to, and where the indexer leaves some out."""
    return pair(index_n_heads=16, index_topk=request.param)[1]


@pytest.fixture(scope="module")
def whole(model):
    with torch.no_grad():
        return model(tokens(2, 70))


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_any_size_agree(model, whole, chunks):
    # Twice the distance of the whole forward from the exact result, which test_transformer bounds.
    assert (run(model, tokens(2, 70), chunks) - whole).abs().max() <= 2e-5 * whole.std()


def test_fixed_steps_agree(model, whole):
    ids, cache = tokens(2, 70), model.new_cache(2, 70)
    cache.fixed = True
    assert (run(model, ids, [1] * 70, cache) - whole).abs().max() <= 2e-5 * whole.std()


def test_fixed_steps_never_move_or_resize(model):
    """What a CUDA graph needs: same buffers, and operations of the same shapes at every position."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            if "layers" not in str(function):
                self.seen.append((str(function), shapes))
            return function(*args, **(kwargs or {}))

    attention, cache, ids = model.layers[1].attn, model.new_cache(1, 70), tokens(1, 70)
    cache.fixed = True
    where = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    x, seen = torch.randn(1, 1, 64), []
    for t in range(40):
        step = model._step(ids[:, t : t + 1], cache)
        with torch.no_grad(), Shapes() as shapes:
            attention(x, step, cache.layers[1])
        cache.advance(1)
        seen.append(shapes.seen)
    assert all(s == seen[0] for s in seen)
    assert not [
        f for f, _ in seen[0] if "_local_scalar_dense" in f or "nonzero" in f
    ]  # would wait for the device
    assert where == [t.data_ptr() for layer in cache.layers for t in layer.tensors()]


def test_sequences_of_a_batch_are_alone(model, whole):
    for b in range(2):
        alone = run(model, tokens(2, 70)[b : b + 1], CHUNKS["before"])
        assert (alone[0] - whole[b]).abs().max() <= 2e-5 * whole.std()


def test_reset_forgets(model):
    ids = tokens(2, 70)
    cache = model.new_cache(2, 70)
    first = run(model, ids, CHUNKS["before"], cache)
    cache.reset()
    assert torch.equal(run(model, ids, CHUNKS["before"], cache), first)


def test_bf16_chunks_differ_by_rounding_alone(pair):
    """As far from each other as from fp32, give or take: at most twice the error of the whole forward."""
    exact = pair()[1]
    ids = tokens(2, 70)
    model = DeepseekV4(exact.config, dtype=torch.bfloat16).eval()
    model.load_state_dict(exact.state_dict())
    with torch.no_grad():
        reference, whole = exact(ids), model(ids)
    error = (whole - reference).square().mean()
    for chunks in CHUNKS.values():
        assert (run(model, ids, chunks) - whole).square().mean() <= 4 * error


def test_caches_need_no_gradient(ours):
    cache = ours.new_cache(1, 8)
    assert not ours(tokens(1, 4), cache).requires_grad and ours(tokens(1, 4)).requires_grad


def test_nbytes_counts_every_buffer():
    config = dataclasses.replace(ModelConfig.nano(), index_topk=512)  # as many as there are: no indexer
    got = Cache(config, 2, 1024, dtype=torch.bfloat16, device="meta").nbytes
    window = 128 * 128
    csa = 8 * 256 * 2 + 257 * 128
    hca = 128 * 128 * 2 + 9 * 128
    assert got == 2 * 2 * (6 * window + 3 * csa + hca)


def test_indexer_keeps_keys_only_where_it_may_choose():
    config = dataclasses.replace(ModelConfig.nano(), index_topk=512)
    short, long = (Cache(config, 1, n, device="meta").layers[2] for n in (2048, 2052))
    assert short.indexer is None and long.indexer.entries.shape == (1, 514, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "batch must be at least 1, got 0"),
        ((1, 0), "max_tokens must lie within 1 and the model's 4096 positions, got 0"),
        ((1, 4097), "max_tokens must lie within 1 and the model's 4096 positions, got 4097"),
    ],
)
def test_bad_sizes(ours, arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.new_cache(*arguments)


def test_bad_use_leaves_the_cache_as_it_was(ours):
    cache = ours.new_cache(2, 8)
    ours(tokens(2, 5), cache)
    with pytest.raises(ValueError, match="5 tokens in the cache and 4 new ones exceed its max_tokens = 8"):
        ours(tokens(2, 4), cache)
    with pytest.raises(ValueError, match="hold 1 sequences, but the cache was made for 2"):
        ours(tokens(1, 1), cache)
    assert cache.length == cache.position.item() == 5
    ours(tokens(2, 3), cache)
