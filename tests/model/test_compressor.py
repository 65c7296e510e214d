"""Compressed entries and the indexer against loops over the published formulas."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.model.cache import CompressorState
from dsv4lab.model.compressor import Compressor
from dsv4lab.model.rope import frequencies, rotate, rotation
from dsv4lab.model.step import Step

HIDDEN, DIM, EPS = 12, 8, 1e-6
ANGLE = frequencies(4, 1000.0)


def step_at(start: int, tokens: int, fixed: bool = False) -> Step:
    positions = torch.arange(start, start + tokens)
    return Step(positions, start, None, {"compressed": ANGLE}, torch.float32, fixed=fixed)


def random_compressor(ratio: int, overlap: bool) -> Compressor:
    torch.manual_seed(ratio)
    compressor = Compressor(HIDDEN, DIM, ratio, overlap=overlap, eps=EPS).requires_grad_(False)
    torch.nn.init.normal_(compressor.ape)
    torch.nn.init.uniform_(compressor.norm.weight, 0.5, 1.5)
    return compressor


def entries_slowly(c: Compressor, x: torch.Tensor) -> torch.Tensor:
    """One sequence x (T, H), token by token, in float64."""
    kv, gate = x.double() @ c.wkv.weight.double().T, x.double() @ c.wgate.weight.double().T
    entries = []
    for i in range(len(x) // c.ratio):
        values, scores = [], []
        for j in range(c.ratio):
            own = i * c.ratio + j
            if c.overlap:
                values.append(kv[own, DIM:]), scores.append(gate[own, DIM:] + c.ape[j, DIM:])
                if i:
                    (
                        values.append(kv[own - c.ratio, :DIM]),
                        scores.append(gate[own - c.ratio, :DIM] + c.ape[j, :DIM]),
                    )
            else:
                values.append(kv[own]), scores.append(gate[own] + c.ape[j])
        weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum(0)
        entry = (weights * torch.stack(values)).sum(0)
        entry = entry / (entry.square().mean() + EPS).sqrt() * c.norm.weight
        entries.append(rotate(entry.float()[None, None], rotation(torch.tensor([i * c.ratio]), ANGLE))[0, 0])
    return torch.stack(entries) if entries else torch.zeros(0, DIM)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (6, False), (1, True)])
@pytest.mark.parametrize("chunks", [None, [23], [1] * 23, [3, 1, 8, 1, 1, 9], [10, 13]])
def test_entries_follow_the_formula(ratio, overlap, chunks):
    compressor = random_compressor(ratio, overlap)
    x = torch.randn(2, 23, HIDDEN)
    if chunks is None:
        got = compressor(x, step_at(0, 23))
    else:
        state, at = CompressorState(2, ratio, DIM, overlap, 23, dtype=torch.float32, device=None), 0
        for n in chunks:
            got = compressor(x[:, at : at + n], step_at(at, n), state)
            at += n
    expected = torch.stack([entries_slowly(compressor, sequence) for sequence in x])
    assert got.shape == expected.shape == (2, 23 // ratio, DIM)
    assert (got - expected).abs().max() <= 1e-5


def test_fixed_steps_make_the_same_entries():
    compressor = random_compressor(4, True)
    x = torch.randn(2, 23, HIDDEN)
    state = CompressorState(2, 4, DIM, True, 23, dtype=torch.float32, device=None)
    for t in range(23):
        buffer = compressor(x[:, t : t + 1], step_at(t, 1, fixed=True), state)
        assert buffer is state.entries and buffer.isfinite().all()
    assert torch.allclose(buffer[:, :5], compressor(x, step_at(0, 23)), atol=1e-5)


def test_shorter_than_a_block_is_no_entry():
    assert random_compressor(4, True)(torch.randn(2, 3, HIDDEN), step_at(0, 3)).shape == (2, 0, DIM)


def test_an_entry_is_visible_once_its_block_is_complete():
    seen = step_at(0, 9).visible(4, 3)
    assert [row.tolist() for row in seen][2:5] == [[False] * 3, [True, False, False], [True, False, False]]
    assert seen[7].tolist() == [True, True, False]


@pytest.fixture
def indexer_case(pair):
    """Layer 1's indexer of a model with many heads, inputs, and its keys for 40 tokens: ten entries."""
    _, ours = pair(index_n_heads=16, index_topk=4)
    x, qr = torch.randn(2, 2, 40, 64, generator=torch.Generator().manual_seed(3))[..., :64]
    qr = qr[..., :48].contiguous()
    step = Step(torch.arange(40), 0, None, {"compressed": ours.compressed_angle}, torch.float32)
    return ours.layers[1].attn.indexer, x, qr, step


def test_scores_follow_the_formula(indexer_case):
    indexer, x, qr, step = indexer_case
    with torch.no_grad():
        keys = indexer.compressor(x, step)
        got = indexer.scores(x, qr, keys, step)
        q = (qr @ indexer.wq_b.weight.T).unflatten(-1, (16, 16))
        q = rotate(q, rotation(step.positions, step.angles["compressed"])).double()
        weight = (x @ indexer.weights_proj.weight.T).double() / 16**0.5 / 16**0.5
        expected = torch.zeros(2, 40, 10, dtype=torch.float64)
        for head in range(16):
            dots = torch.einsum("btd,bnd->btn", q[:, :, head], keys.double())
            expected += weight[:, :, head, None] * dots.relu()
    assert (got - expected).abs().max() <= 1e-5 * expected.std()


def test_the_best_visible_entries_are_chosen(indexer_case):
    indexer, x, qr, step = indexer_case
    with torch.no_grad():
        chosen = indexer(x, qr, step, None)
        scores = indexer.scores(x, qr, indexer.compressor(x, step), step)
    assert chosen.shape == (2, 40, 4)
    for b in range(2):
        for t in range(40):
            ready = (t + 1) // 4
            best = scores[b, t, :ready].argsort(descending=True)[:4].tolist()
            assert set(chosen[b, t].tolist()) - {-1} == set(best)
            assert (chosen[b, t] == -1).sum() == 4 - len(best)


def test_scoring_is_left_out_where_nothing_can_be_left_out(indexer_case, monkeypatch):
    indexer, x, qr, step = indexer_case
    monkeypatch.setattr(indexer, "scores", None)
    with torch.no_grad():
        short = Step(torch.arange(19), 0, None, step.angles, torch.float32)
        assert indexer(x[:, :19], qr[:, :19], short, None) is None  # four entries
