"""Figures about attention and mHC draw at their sliders' ends and say what is true."""

from __future__ import annotations

import warnings

import pytest
import torch

from dsv4lab import plots
from dsv4lab.model import CSA, HCA, SLIDING, ModelConfig
from dsv4lab.model.hyper_connections import close_streams

KINDS = ["sliding", "CSA", "HCA"]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(0))


def drawn(picture: plots.Picture) -> plots.Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.png.startswith(b"\x89PNG")
    assert picture.caption.endswith(".")
    return picture


def named(axes) -> dict[str, list[float]]:
    return {n.get_label(): list(n.get_ydata()) for n in axes.lines if not n.get_label().startswith("_")}


@pytest.mark.parametrize("kind", [SLIDING, HCA, CSA])
@pytest.mark.parametrize("window, ratio", [(1, 2), (8, 8), (3, 16), (16, 4)])
def test_a_query_reaches_its_window_and_complete_blocks(kind, window, ratio):
    query, token = torch.arange(32)[:, None], torch.arange(32)
    expected = (token <= query) & (token > query - window)
    if kind != SLIDING:
        expected |= token < (query + 1) // ratio * ratio
    assert torch.equal(plots.reach(kind, window, ratio, 32), expected)


def test_a_chosen_entry_reaches_its_block_and_the_one_before_it():
    window, ratio, tokens = 4, 4, 64
    seen = plots.reach(CSA, window, ratio, tokens, topk=1)
    blocks = seen[40:, : 40 - window].unflatten(1, (-1, ratio))
    assert torch.equal(blocks.any(-1), blocks.all(-1))  # whole blocks at a time
    found = blocks.any(-1).sum(-1)
    assert found.max() <= 4 and found.median() <= 2  # more where a change also changed the choice
    assert not (seen & ~plots.reach(CSA, window, ratio, tokens)).any()


@pytest.mark.parametrize("window", [1, 32])
@pytest.mark.parametrize("ratio", [2, 32])
@pytest.mark.parametrize("topk", [1, None])
def test_reached_at_the_sliders_ends(window, ratio, topk):
    picture = drawn(plots.reached(window, ratio, topk, 32))
    assert ("HCA misses nothing" in picture.caption) is (window >= ratio - 1)
    assert all(len(axes.images) == 1 for axes in picture.axes)


def test_mass_is_the_softmax_of_all_scores_and_the_sink():
    r = torch.Generator().manual_seed(1)
    q, near, far = (torch.randn(*shape, generator=r) for shape in ((1, 3, 2, 8), (1, 5, 8), (1, 4, 8)))
    mask, sink = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([-1.0, 2.0])
    scores = torch.einsum("bthd,bnd->bthn", q, torch.cat((near, far), 1))
    scores[..., 5:].masked_fill_(~mask[None, :, None], float("-inf"))
    weights = torch.cat((scores, sink[None, None, :, None].expand(1, 3, 2, 1)), -1).softmax(-1)
    expected = torch.stack((weights[..., :5].sum(-1), weights[..., 5:9].sum(-1), weights[..., 9]), -1)
    got = plots.attention_mass(q, [(near, None), (far, mask)], sink)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_mass_of_a_model(tiny_model, ids):
    calls = plots.attention_calls(tiny_model, ids)
    masses = [plots.attention_mass(*call) for call in calls]
    assert [m.shape[-1] for m in masses] == [2, 3, 3]
    assert all(torch.allclose(m.sum(-1), torch.ones(())) and m.min() > -1e-5 for m in masses)
    (axes,) = drawn(plots.mass_by_layer(masses, KINDS)).axes
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    assert tops == pytest.approx([100] * 12, abs=0.01)


def test_recording_leaves_the_model_as_it_was(tiny_model, ids):
    with torch.no_grad():
        before = tiny_model(ids[None])
        plots.attention_calls(tiny_model, ids), plots.mixing_calls(tiny_model, ids)
        assert torch.equal(tiny_model(ids[None]), before)


def test_sink_weights_are_a_softmax_with_one_more_score():
    scores = torch.tensor([[1.0, 2.0, -3.0], [0.0, 0.0, 0.0]])
    expected = torch.cat((scores, torch.full((2, 1), 1.5)), 1).softmax(-1)
    torch.testing.assert_close(plots.sink_weights(scores, 1.5), expected)


@pytest.mark.parametrize("sink", [-6.0, 12.0])
@pytest.mark.parametrize("match", [0.0, 12.0])
def test_sinks_at_the_sliders_ends(sink, match):
    bars, curve = drawn(plots.sinks(sink, match)).axes
    for container in bars.containers:
        assert sum(bar.get_height() for bar in container) == pytest.approx(100, abs=1e-3)
    assert all(y == sorted(y) for y in named(curve).values())


@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("angle", [0.01, 1.0])
def test_rope_arrows_at_the_sliders_ends(shift, angle):
    drawn(plots.rope_arrows(shift, angle))


def test_only_the_output_turned_back_stays():
    caption = plots.rope_arrows(10, 0.3).caption
    first, second = (float(part.split()[0].rstrip(";.")) for part in caption.split("by ")[-3::2])
    assert first > 1 and second < 1e-5


def test_a_mean_forgets_the_needle_and_a_gate_keeps_it():
    for ratio in (1, 4, 16, 128):
        mean, place = plots.needle_likeness(ratio, 0.0)
        assert len(mean) == 256 // ratio
        assert abs(mean[place // ratio] - ratio**-0.5) < 0.15
        assert plots.needle_likeness(ratio, 8.0)[0][place // ratio] > 0.99


@pytest.mark.parametrize("ratio", [1, 128])
@pytest.mark.parametrize("gate", [0.0, 8.0])
def test_needle_at_the_sliders_ends(ratio, gate):
    _, curve = drawn(plots.needle(ratio, gate)).axes
    assert len(named(curve)) == 3


def test_choices_grow_to_everything_and_none_beats_the_most_attended(tiny_model, ids):
    seen = []
    hook = tiny_model.layers[1].attn.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    with torch.no_grad():
        tiny_model(ids[None])
    hook.remove()
    shares = plots.choice_shares(tiny_model.layers[1].attn, *seen, last=64)
    best = shares["the most attended"]
    for values in shares.values():
        assert len(values) == 64 and (values.diff() > -1e-5).all()
        assert float(values[-1]) == pytest.approx(1, abs=1e-4)
        assert (best >= values - 1e-5).all()
    (axes,) = drawn(plots.entry_choices(shares, 16, "layer 1")).axes
    assert list(named(axes)) == list(shares)


def test_kept_bytes_are_the_published_ones():
    size = plots.kept_bytes(ModelConfig.pro(), 2**20)
    assert (size["entries"] + size["indexer keys"]) / 2**30 == pytest.approx(9.62, abs=0.005)
    flash = plots.kept_bytes(ModelConfig.flash(), 2**20)
    assert (flash["entries"] + flash["indexer keys"]) / 2**30 == pytest.approx(6.72, abs=0.005)
    assert plots.v32_bytes(2**20) / 2**30 == pytest.approx(83.9, abs=0.05)


def test_kept_bytes_are_those_of_the_cache(tiny_model):
    size = plots.kept_bytes(tiny_model.config, 320)
    assert sum(size.values()) == tiny_model.new_cache(1, 320).nbytes


def test_a_step_reads_the_window_chosen_entries_and_all_indexer_keys():
    c = ModelConfig.flash()
    n = 100_000
    sliding, csa, hca = 128, 128 + 512, 128 + n // 128
    vectors = 2 * sliding + 21 * csa + 20 * hca
    assert plots.read_bytes(c, n) == 2 * (512 * vectors + 128 * 21 * (n // 4))
    assert plots.read_bytes(c, 64) == 2 * 512 * (43 * 64 + 21 * 16)  # short: every entry, and no indexer


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("ratios", [(1, 4, 16, 16), (64, 1024, 4096, 4096)])
def test_kv_growth_at_the_sliders_ends(name, ratios):
    left, right = drawn(plots.kv_growth(name, *ratios)).axes
    assert len(named(left)["all"]) == len(named(right)["read"]) == 11


@pytest.mark.parametrize("iterations", [1, 50])
@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_sinkhorn_steps_at_the_sliders_ends(iterations, spread):
    *_, curve = drawn(plots.sinkhorn_steps(iterations, spread, seed=3)).axes
    assert f"spread {spread:g}" in named(curve)


def test_more_iterations_balance_rows_and_columns_always_are():
    logits = plots.mixing_logits(2.0, 20)
    found = [plots.imbalance(logits, n) for n in (1, 5, 50)]
    assert found[0][0] > found[1][0] > found[2][0]
    assert all(columns < 1e-5 for _, columns in found)


def test_only_free_matrices_stretch_without_end():
    found = plots.mixing_gains(2.0)
    assert found["free"].max() > 50
    assert found["softmax of rows"].max() <= 2 + 1e-6  # √n
    assert found["Sinkhorn"].max() < 1.001


@pytest.mark.parametrize("spread", [0.5, 8.0])
@pytest.mark.parametrize("iterations", [1, 20])
def test_stream_gains_at_the_sliders_ends(spread, iterations):
    (axes,) = drawn(plots.stream_gains(spread, iterations)).axes
    assert list(named(axes)) == ["free", "softmax of rows", "Sinkhorn"]


def test_mixing_calls_are_what_the_model_does(tiny_model, ids):
    calls = plots.mixing_calls(tiny_model, ids)
    assert len(calls) == 6 and calls[0].mix.shape == (256, 4, 4)
    first, second = calls[:2]
    mixed = close_streams(first.streams.float(), torch.zeros(256, 64), first.post, first.mix)
    rest = second.streams.float() - mixed  # post times one y for all four streams
    values = torch.linalg.svdvals(rest)
    assert (values[:, 1] < 0.05 * values[:, 0]).all()  # bf16 streams
    sizes, made_of = drawn(plots.stream_mixing(calls, 5)).axes
    assert len(named(sizes)) == 4 and len(made_of.texts) == 20
