"""Mixing of the residual streams against loops over the published formulas, in float64."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.model.hyper_connections import (
    close_streams,
    collapse_head,
    head_weights,
    mixing_weights,
    open_streams,
    sinkhorn,
)

EPS = 1e-6


def logits(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sinkhorn_loops(matrix, iterations):
    """One (4, 4) list of lists, in Python floats."""
    a = []
    for row in matrix.double().tolist():
        e = [torch.tensor(v, dtype=torch.float64).exp().item() for v in row]
        a.append([v / sum(e) + EPS for v in e])
    for i in range(iterations):
        if i:
            a = [[v / (sum(row) + EPS) for v in row] for row in a]
        columns = [sum(row[k] for row in a) + EPS for k in range(4)]
        a = [[v / c for v, c in zip(row, columns, strict=True)] for row in a]
    return torch.tensor(a, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("grad", [False, True], ids=["flat", "broadcast"])
def test_sinkhorn_is_the_published_iteration(iterations, grad):
    matrix = logits(7, 3, 4, 4) * 3
    with torch.set_grad_enabled(grad):
        got = sinkhorn(matrix, iterations, EPS)
    # Each of 2 * 20 divisions and sums rounds by 2^-24, and scaling passes errors on without growth.
    expected = torch.stack([sinkhorn_loops(m, iterations) for m in matrix.view(-1, 4, 4)]).view(matrix.shape)
    assert ((got - expected) / expected).abs().max() <= 5 * 2 * iterations * 2**-24 + 2e-6


def test_sinkhorn_balances_rows_and_columns():
    a = sinkhorn(logits(50, 4, 4), 20, EPS)
    assert (a.sum(-2) - 1).abs().max() <= 4 * EPS  # columns come last: off by eps alone
    assert (a.sum(-1) - 1).abs().max() <= 1e-3
    once = sinkhorn(logits(50, 4, 4), 1, EPS)
    assert (once.sum(-1) - 1).abs().max() > 0.05


def test_sinkhorn_backward_is_that_of_the_iteration():
    matrix = logits(3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: sinkhorn(m, 5, EPS), matrix)


def streams_and_weights(hidden=24):
    g = torch.Generator().manual_seed(2)
    streams = torch.randn(2, 5, 4, hidden, generator=g)
    fn, base = torch.randn(24, 4 * hidden, generator=g) * 0.1, torch.randn(24, generator=g)
    return streams, fn, base, torch.tensor([0.7, 1.3, 0.9])


def test_open_and_close_follow_the_formula():
    streams, fn, base, scale = streams_and_weights()
    x, post, mix = open_streams(streams, fn, base, scale, iterations=20, eps=EPS, rms_eps=EPS)
    y = logits(2, 5, 24, seed=5)
    closed = close_streams(streams, y, post, mix)
    for b, t in ((0, 0), (1, 4)):
        h, f, s0 = streams[b, t].double(), fn.double(), scale.double()
        v = h.flatten()
        m = (f @ v) / (v.square().mean() + EPS).sqrt()
        pre = torch.sigmoid(m[:4] * s0[0] + base[:4]) + EPS
        after = 2 * torch.sigmoid(m[4:8] * s0[1] + base[4:8])
        a = sinkhorn_loops((m[8:] * s0[2] + base[8:]).view(4, 4), 20)
        expected_x = sum(pre[i] * h[i] for i in range(4))
        expected = torch.stack([after[k] * y[b, t] + sum(a[j, k] * h[j] for j in range(4)) for k in range(4)])
        assert (x[b, t] - expected_x).abs().max() <= 1e-5
        assert (closed[b, t] - expected).abs().max() <= 1e-5


def test_mixing_sums_over_the_first_index():
    # With A[0, 1] = 1 alone, stream 1 receives stream 0 and nothing else moves.
    streams = logits(1, 1, 4, 8)
    mix = torch.zeros(1, 1, 4, 4)
    mix[..., 0, 1] = 1
    new = close_streams(streams, torch.zeros(1, 1, 8), torch.ones(1, 1, 4), mix)
    assert torch.equal(new[0, 0, 1], streams[0, 0, 0]) and not new[0, 0, [0, 2, 3]].any()


def test_head_has_no_balancing():
    streams, fn, base, _ = streams_and_weights()
    scale = torch.tensor([1.1])
    got = collapse_head(streams, fn[:4], base[:4], scale, eps=EPS, rms_eps=EPS)
    v = streams.double().flatten(-2)
    m = v @ fn[:4].double().T / (v.square().mean(-1, keepdim=True) + EPS).sqrt()
    pre = torch.sigmoid(m * 1.1 + base[:4]) + EPS
    assert (got - (pre[..., None] * streams).sum(-2)).abs().max() <= 1e-5


def test_bf16_streams_are_mixed_in_float32():
    streams, fn, base, scale = streams_and_weights()
    streams = streams.bfloat16()
    x, post, mix = open_streams(streams, fn, base, scale, iterations=20, eps=EPS, rms_eps=EPS)
    x32, post32, mix32 = open_streams(streams.float(), fn, base, scale, iterations=20, eps=EPS, rms_eps=EPS)
    assert torch.equal(x, x32.bfloat16()) and torch.equal(post, post32) and torch.equal(mix, mix32)


def test_starting_weights_read_the_mean_and_keep_streams_apart():
    start = mixing_weights(4, 16)
    streams = logits(1, 1, 4, 16)
    x, post, mix = open_streams(
        streams, start["fn"], start["base"], start["scale"] * 0, iterations=20, eps=EPS, rms_eps=EPS
    )
    assert torch.allclose(x, streams.mean(-2), atol=1e-5) and torch.allclose(post, torch.ones(4))
    assert (mix.diagonal(dim1=-2, dim2=-1) > 0.8).all()
    assert {k: tuple(v.shape) for k, v in head_weights(4, 16).items()} == {
        "fn": (4, 64), "base": (4,), "scale": (1,),
    }  # fmt: skip
