"""Attention against sums written out key by key, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4lab.model import CSA, SLIDING, DeepseekV4
from dsv4lab.model.attention import attend
from dsv4lab.model.step import Step
from dsv4lab.model.window import block_keys

WINDOW, DIM, HEADS = 8, 16, 3


def step_at(start: int, tokens: int, fixed: bool = False) -> Step:
    return Step(torch.arange(start, start + tokens), start, None, {}, torch.float32, fixed=fixed)


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend_slowly(q, keys, seen, sink):
    """One query, head by head: q (heads, D), keys (n, D), seen (n,) bool."""
    out = []
    for head, vector in enumerate(q.double()):
        scores = [(vector @ k).item() for k in keys.double()]
        weights = [math.exp(s) if ok else 0.0 for s, ok in zip(scores, seen.tolist(), strict=True)]
        total = sum(weights) + math.exp(sink[head].item())
        out.append(sum(w / total * k for w, k in zip(weights, keys.double(), strict=True)))
    return torch.stack(out)


def test_sink_takes_weight_and_gives_no_value():
    q, keys, sink = random(1, 1, HEADS, DIM), random(1, 4, DIM, seed=1), random(HEADS, seed=2)
    got = attend(q, [(keys, None)], sink)
    expected = attend_slowly(q[0, 0], keys[0], torch.ones(4, dtype=torch.bool), sink)
    assert (got[0, 0] - expected).abs().max() <= 1e-5
    assert attend(q, [(keys, None)], sink + 100).abs().max() <= 1e-30


def test_no_visible_key_gives_zero():
    q, keys, sink = random(1, 2, HEADS, DIM), random(1, 4, DIM, seed=1), random(HEADS, seed=2)
    mask = torch.tensor([[False] * 4, [True] * 4])
    got = attend(q, [(keys, mask)], sink)
    assert torch.equal(got[0, 0], torch.zeros(HEADS, DIM)) and got[0, 1].abs().max() > 0.1


def test_huge_scores_do_not_overflow():
    q, keys = 1e4 * random(1, 1, HEADS, DIM), random(1, 4, DIM, seed=1)
    got = attend(q, [(keys[:, :2], None), (keys[:, 2:], None)], torch.zeros(HEADS))
    best = (q[0, 0] @ keys[0].T).argmax(-1)
    assert torch.allclose(got[0, 0], keys[0][best], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16, 29])
@pytest.mark.parametrize("start", [None, 0, 3, 8, 21])
def test_blocks_are_the_sliding_window(tokens, start):
    """`start` tokens came before and wait in the ring; entries beyond the window are a second set of keys."""
    before = start or 0
    keys, entries = random(2, before + tokens, DIM), random(2, 6, DIM, seed=3)
    seen = random(tokens, 6, seed=4) > 0
    q, sink = random(2, tokens, HEADS, DIM, seed=5), random(HEADS, seed=6)
    ring = None
    if start is not None:
        ring = torch.full((2, WINDOW, DIM), 1e3)  # rows never written must not be seen
        for p in range(before):
            ring[:, p % WINDOW] = keys[:, p]
    part = block_keys(keys[:, before:], step_at(before, tokens), WINDOW, ring)
    assert part[0].shape[1] <= 2 * WINDOW  # not T
    more = part[1].shape[0] - tokens
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, more)), torch.nn.functional.pad(seen, (0, 0, 0, more))
    got = attend(padded[0], [part, (entries, padded[1])], sink)[:, :tokens]
    for b in range(2):
        for t in range(tokens):
            p = before + t
            first = max(0, p - WINDOW + 1)
            all_keys = torch.cat((keys[b, first : p + 1], entries[b]))
            visible = torch.cat((torch.ones(p + 1 - first, dtype=torch.bool), seen[t]))
            expected = attend_slowly(q[b, t], all_keys, visible, sink)
            assert (got[b, t] - expected).abs().max() <= 2e-5
    if ring is not None:
        for p in range(max(0, before + tokens - WINDOW), before + tokens):
            assert torch.equal(ring[:, p % WINDOW], keys[:, p])


def test_leaving_out_the_inverse_rotation_is_seen(pair, monkeypatch):
    """Without it an output depends on where the sequence starts; with it, on distances alone."""
    from dsv4lab.model import attention as module

    _, ours = pair()
    layer = ours.layers[0].attn  # sliding: no compressed entries, whose blocks have fixed places
    x = random(1, 6, 64)

    def result(start: int) -> torch.Tensor:
        angles = {"sliding": ours.sliding_angle, "compressed": ours.compressed_angle}
        step = Step(torch.arange(start, start + 6), 0, None, angles, torch.float32)
        with torch.no_grad():
            return layer(x, step)

    right = result(0)
    assert (result(1000) - right).abs().max() <= 1e-4 * right.std()  # angles of 1000 are good to 6e-5
    kept = module.rotate
    monkeypatch.setattr(module, "rotate", lambda y, by, inverse=False: y.float() if inverse else kept(y, by))
    wrong = result(0)
    assert (wrong - right).abs().max() > 0.1 * right.std()
    assert (result(1000) - wrong).abs().max() > 0.1 * right.std()


def test_grouped_output_is_a_block_diagonal_matrix(ours):
    wo_a = ours.layers[0].attn.wo_a
    o = random(2, 3, 2, 64)
    dense = torch.block_diag(*wo_a.weight.detach().view(2, 16, 64))
    with torch.no_grad():
        got = wo_a(o)
    assert got.shape == (2, 3, 2, 16)
    assert torch.allclose(got.flatten(2), o.flatten(2) @ dense.T, atol=64 * 2**-24)


def test_shares_of_entries_against_a_loop(tiny_config):
    torch.manual_seed(0)
    model = DeepseekV4(tiny_config, dtype=torch.float32)
    index = tiny_config.layer_types.index(CSA)
    attn, tokens = model.layers[index].attn, 3 * tiny_config.sliding_window
    attn.attn_sink.data = 3 * random(tiny_config.num_attention_heads, seed=1)
    attn.kv_norm.weight.data *= 4  # uneven weights
    attn.compressor.norm.weight.data *= 4
    x = random(2, tokens, tiny_config.hidden_size)
    step = model._step(torch.zeros(2, tokens, dtype=torch.int64), None)
    with torch.no_grad():
        got, qr = attn.entry_shares(x, step)
        same, q, kv = attn._project(x, step)
        entries = attn.compressor(x, step)
    assert torch.equal(qr, same) and got.shape == (2, tokens, tokens // attn.ratio)
    for b in range(2):
        for t in range(tokens):
            visible, first = (t + 1) // attn.ratio, max(0, t - attn.window + 1)
            keys = torch.cat((entries[b, :visible], kv[b, first : t + 1]))
            scores = (q[b, t].double() @ keys.double().T).exp()
            weights = scores / (scores.sum(-1, keepdim=True) + attn.attn_sink.double().exp()[:, None])
            mass = weights[:, :visible].sum(0)
            # float32 scores of a few units, 2^-23 each, and the exponential of their error.
            torch.testing.assert_close(got[b, t, : len(mass)].double(), mass / mass.sum(), rtol=0, atol=1e-5)
            assert not got[b, t, len(mass) :].any()


def test_shares_need_entries_and_whole_blocks(tiny_config):
    model = DeepseekV4(tiny_config, dtype=torch.float32)
    step = model._step(torch.zeros(1, 5, dtype=torch.int64), None)
    sliding, csa = (model.layers[tiny_config.layer_types.index(kind)].attn for kind in (SLIDING, CSA))
    with pytest.raises(ValueError, match="no compressed entries"):
        sliding.entry_shares(torch.zeros(1, 5, tiny_config.hidden_size), step)
    with pytest.raises(ValueError, match=r"a multiple of \d+ tokens, got 5"):
        csa.entry_shares(torch.zeros(1, 5, tiny_config.hidden_size), step)
