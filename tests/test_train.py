"""The training script: its parts, three steps of it, and what a killed run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsv4lab import corpus
from dsv4lab.layers import fake_quantize
from dsv4lab.model import DeepseekV4, ModelConfig
from dsv4lab.model.config import CSA, HASH_MOE, HCA, MOE, SLIDING

NANO = Path(__file__).resolve().parent.parent / "data" / "nano"
TINY = ModelConfig(
    vocab_size=256, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16, rope_dim=8,
    q_lora_rank=16, o_groups=2, o_lora_rank=16, moe_intermediate_size=16, n_routed_experts=4,
    num_experts_per_tok=2, index_n_heads=2, index_head_dim=16, layer_types=(SLIDING, CSA, HCA),
    mlp_layer_types=(HASH_MOE, MOE, MOE), sliding_window=16, hca_ratio=16, max_position_embeddings=256,
    yarn=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other by plain names, as they do when train.py runs."""
    sys.path.insert(0, str(NANO))
    yield
    sys.path.remove(str(NANO))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("library"), random.Random(0)
    words = ["def", "return", "self", "import", "class", "for", "if", "else", "value", "name", "None"]
    for i in range(120):
        for path in (f"pack{i % 5}/mod{i}.py", f"test/test_{i}.py"):
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(" ".join(draw.choice(words) for _ in range(60)) + "\n")
    return root


@pytest.fixture(scope="module")
def options(library, tmp_path_factory):
    config = tmp_path_factory.mktemp("config") / "tiny.json"
    config.write_text(json.dumps(TINY.to_dict()))
    return ["--library", str(library), "--config", str(config), "--batch", "4", "--context", "64",
            "--device", "cpu", "--no-compile"]  # fmt: skip


def run(options, *more) -> int:
    from train import main

    return main([*options, *map(str, more)])


def process(options, *more) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(NANO.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, NANO / "train.py", *options, *map(str, more)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_three_steps_leave_a_model_that_loads(options, library, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(options, "--out", out, "--steps", 3) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "model.safetensors", "trained_on.txt", "training.json", "training_log.csv",
    ]  # fmt: skip
    model = DeepseekV4.from_pretrained(out)
    assert model.config == TINY
    assert model(torch.zeros(1, 20, dtype=torch.int64)).isfinite().all()
    files = corpus.library_files(library)
    listed = corpus.read_trained_on(out / "trained_on.txt")
    assert listed == {f.digest for f in files if not f.held_out}
    assert corpus.evaluation_text(library, out / "trained_on.txt").skipped == ()
    rows = list(csv.DictReader((out / "training_log.csv").open()))
    assert rows[-1]["step"] == "3"
    assert rows[-1]["bytes_seen"] == str(3 * 4 * 64)
    facts = json.loads((out / "training.json").read_text())
    printed = capsys.readouterr().out
    for precision in ("bf16", "nvfp4"):
        assert f"{facts['bits_per_byte'][precision]:.4f} bits per byte" in printed


def test_the_figure_is_that_of_the_saved_weights(options, library, tmp_path, monkeypatch):
    """With the entries that the saved indexers choose, three of at most sixteen, whatever that costs."""
    import indexers
    import train

    monkeypatch.setattr(train, "COUNTS", (3,))
    monkeypatch.setattr(indexers, "MOST_LOSS", 1.0)
    out = tmp_path / "out"
    assert run(options, "--out", out, "--steps", 25) == 0
    facts = json.loads((out / "training.json").read_text())
    said = facts["bits_per_byte"]["bf16"]
    assert facts["indexers"]["bits_per_byte_by_entries"]["3"] == said
    model, nats, count = DeepseekV4.from_pretrained(out), 0.0, 0
    assert model.config == replace(TINY, index_topk=3)
    for window in corpus.windows(corpus.evaluation_text(library, out / "trained_on.txt").files, 64):
        ids = torch.tensor(list(window.ids))
        with torch.no_grad():
            log_p = model(ids[None, :-1])[0].log_softmax(-1)
        nats -= log_p.gather(1, ids[1:, None])[window.first - 1 :].sum().item()
        count += len(window.ids) - window.first
    assert said < 5  # of 8 for a model that knows nothing: the weights matter
    # The same numbers but for bf16 sums in another order, batches against single windows.
    assert said == pytest.approx(nats / math.log(2) / count, rel=2e-3)


def test_a_killed_run_leaves_nothing_broken_and_resumes(options, tmp_path):
    out = tmp_path / "out"
    killed = process(options, "--out", out, "--steps", 100000, "--checkpoint-every", "0.5")
    try:
        deadline = time.monotonic() + 60
        while not (out / ".partial" / "checkpoint.pt").exists():
            assert killed.poll() is None, killed.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert [p.name for p in out.iterdir()] == [".partial"]
    saved = torch.load(out / ".partial" / "checkpoint.pt", weights_only=True)
    assert saved["step"] >= 2
    assert run(options, "--out", out, "--steps", saved["step"] + 2) == 2  # neither --resume nor --overwrite
    assert run(options, "--out", out, "--steps", saved["step"] + 2, "--resume") == 0
    rows = list(csv.DictReader((out / "training_log.csv").open()))
    assert int(rows[-1]["step"]) in (saved["step"] + 2, saved["step"] + 3)
    assert int(rows[-1]["bytes_seen"]) == int(rows[-1]["step"]) * 4 * 64
    assert not (out / ".partial").exists()
    DeepseekV4.from_pretrained(out)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(options, tmp_path, monkeypatch):
    """Same text, same masters, same momenta: the loss after 3 + 3 steps is that after 6."""
    import schedule
    from loop import Loop

    monkeypatch.setattr(schedule, "factor", lambda progress: 0.5)
    monkeypatch.setattr(schedule, "quantizes", lambda progress: False)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(options, "--out", whole, "--steps", 6) == 0
    one_step = Loop.one_step

    def stop_at_three(loop, progress):
        if loop.step == 3:
            raise KeyboardInterrupt
        one_step(loop, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "one_step", stop_at_three)
        assert run(options, "--out", halves, "--steps", 6) == 130
    assert run(options, "--out", halves, "--steps", 6, "--resume") == 0
    a, b = (DeepseekV4.from_pretrained(folder).state_dict() for folder in (whole, halves))
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_run_killed_while_indexers_train_does_not_train_the_model_again(options, tmp_path, monkeypatch):
    from indexers import Indexers

    out = tmp_path / "out"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Indexers, "one_step", interrupted)
        assert run(options, "--out", out, "--steps", 4) == 130
    assert [p.name for p in out.iterdir()] == [".partial"]
    saved = torch.load(out / ".partial" / "checkpoint.pt", weights_only=True)
    assert saved["progress"] == 1.0
    assert run(options, "--out", out, "--steps", 4, "--resume") == 0
    facts = json.loads((out / "training.json").read_text())
    assert facts["steps"] == saved["step"] == 4
    assert facts["indexers"]["steps"] == 2
    model = DeepseekV4.from_pretrained(out)
    assert not torch.equal(model.layers[1].attn.indexer.compressor.ape, torch.zeros(4, 32))


@pytest.fixture
def attentive():
    """A trainee whose CSA layer attends unevenly, which random weights do not."""
    from trainee import Trainee

    torch.manual_seed(0)
    trainee = Trainee(TINY, torch.device("cpu"), 64, compiled=False, kernels=False)
    for norm in (trainee.indexed[0].attn.kv_norm, trainee.indexed[0].attn.compressor.norm):
        norm.weight.data.fill_(3.0)
    return trainee


def ids_of(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(count)
    batches = [torch.randint(97, 101, (8, 65), generator=draw) for _ in range(count)]
    return [(b[:, :-1], b[:, 1:]) for b in batches]


def test_indexers_learn_where_attention_goes(attentive, monkeypatch):
    import indexers as module
    from indexers import Indexers

    monkeypatch.setattr(module, "RATE", 1e-2)
    before = {n: t.clone() for n, t in attentive.model.state_dict().items()}
    indexers, judge = Indexers(attentive), ids_of(2)
    untrained = indexers.recall(judge, [2, 4])
    batches = iter(ids_of(50))
    indexers.train(lambda: next(batches)[0], 1000.0, 50, lambda: None, log_every=1000.0)
    trained = indexers.recall(judge, [2, 4])
    assert [row["step"] for row in indexers.curve] == [1, 50]
    assert indexers.curve[-1]["kl"][0] < 0.5 * indexers.curve[0]["kl"][0]
    for count in ("2", "4"):
        chance = trained[count]["chance"]
        assert abs(untrained[count]["indexer"] - chance) < 0.25 * (1 - chance)
        assert trained[count]["indexer"] > chance + 0.6 * (1 - chance)
    for name, tensor in attentive.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".indexer." not in name), name
        assert ".indexer." not in name or torch.equal(tensor, tensor.bfloat16().to(tensor.dtype)), name


def test_recall_is_one_for_an_indexer_that_knows(attentive, monkeypatch):
    import indexers

    def knows(indexer, x, qr, step):
        return attentive.indexed[0].attn.entry_shares(x, step)[0]

    monkeypatch.setattr(indexers, "scores", knows)
    found = indexers.Indexers(attentive).recall(ids_of(1), [2])["2"]
    assert found["indexer"] == 1.0
    assert found["chance"] < 0.9


def test_leaving_out_entries_is_what_a_model_with_that_count_does(attentive):
    batches = ids_of(2)
    nats = {}
    for count in (2, None):
        attentive.keep(count)
        model = DeepseekV4(replace(TINY, index_topk=count or 16), dtype=torch.bfloat16)
        model.load_state_dict(attentive.model.state_dict())
        with torch.no_grad():
            expected = sum(
                torch.nn.functional.cross_entropy(model(i).flatten(0, 1), t.flatten(), reduction="sum")
                for i, t in batches
            )
        nats[count] = attentive.nats(batches, eager=True)
        assert nats[count] == pytest.approx(expected.item(), rel=1e-6)
    assert abs(nats[2] / nats[None] - 1) > 1e-5  # ten times what the comparison above lets pass


def test_divergence_against_torch():
    from indexers import divergence

    torch.manual_seed(0)
    visible = torch.arange(6) < torch.tensor([0, 1, 3, 6])[:, None]
    shares = torch.rand(2, 4, 6) * visible
    shares[:, 1:] /= shares[:, 1:].sum(-1, keepdim=True)
    scores = torch.randn(2, 4, 6, requires_grad=True)
    expected = 0.0
    for b in range(2):
        for t, n in ((1, 1), (2, 3), (3, 6)):
            p, log_q = shares[b, t, :n].double(), scores[b, t, :n].double().log_softmax(-1)
            expected += torch.nn.functional.kl_div(log_q, p, reduction="sum") / 6
    got = divergence(shares, scores, visible)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    got.backward()
    assert scores.grad.isfinite().all()
    assert not scores.grad[:, 0].any()


def test_the_fewest_entries_that_cost_little():
    from indexers import fewest

    assert fewest({64: 0.7020, 128: 0.7013, 256: 0.7001}, 0.7) == 128
    assert fewest({64: 0.7020}, 0.7) is None
    assert fewest({}, 0.7) is None


def test_time_ends_a_run(options, tmp_path):
    before = time.monotonic()
    assert run(options, "--out", tmp_path / "out", "--max-seconds", 6) == 0
    assert time.monotonic() - before < 12  # other work on the same cores may slow the last step
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_bad_input_is_one_line_and_code_2(options, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "model.safetensors").mkdir(parents=True)
    cases = [
        (["--out", out], "model.safetensors exists already"),
        (["--out", tmp_path / "new", "--resume"], "there is no checkpoint"),
        (["--out", tmp_path / "new", "--library", tmp_path / "nowhere"], "nowhere is not a folder"),
        (["--out", tmp_path / "new", "--config", tmp_path / "no.json"], "no.json"),
        (["--out", tmp_path / "new", "--context", "100000"], "less than a window of 100000"),
        (["--out", tmp_path / "new", "--context", "60"], "need a multiple of 16, got 60"),
        (["--out", "/proc/nano"], "cannot write in /proc/nano"),
        (["--out", tmp_path / "new", "--device", "tpu9"], "device: tpu9"),
    ]
    for more, message in cases:
        assert run(options, *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_a_wrong_argument_is_one_line_and_code_2(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(options, "--max-seconds", "-1")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "-1 is not a positive number" in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path, monkeypatch, capsys):
    from trainee import Trainee

    monkeypatch.setattr(Trainee, "balance", lambda self, factor: self.model.embed.weight.data.fill_(math.nan))
    assert run(options, "--out", tmp_path / "out", "--steps", 4, "--log-every", "0.001") == 1
    assert "the loss is nan at step" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".partial"]


def test_newton_schulz_levels_the_singular_values():
    from optimizer import orthogonalize

    torch.manual_seed(0)
    x = torch.randn(3, 32, 64) @ torch.diag(torch.logspace(0, 1, 64))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x).float()
    # The quintic maps [0.03, 1] into 0.68 .. 1.13 in five steps; bf16 adds 2^-7 of the largest.
    assert torch.linalg.svdvals(y).min() > 0.66
    assert torch.linalg.svdvals(y).max() < 1.25
    assert ((y * (u @ vh)).sum((1, 2)) / 32 > 0.8).all()  # near the polar factor, not just any rotation


def test_optimizer_writes_what_it_read_and_rounds_along_k_only_what_nvfp4_covers():
    from optimizer import Optimizer

    torch.manual_seed(0)
    model = DeepseekV4(TINY, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, matrix_rate=0.02, decay=0.1, rates={"": 1e-3})
    optimizer.write(False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    optimizer.write(True)
    changed = {n.split(".", 2)[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {
        "attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.wo_a.weight", "attn.wo_b.weight",
        "ffn.experts.w13.weight", "ffn.experts.w2.weight", "ffn.shared_experts.w13.weight",
        "ffn.shared_experts.w2.weight",
    }  # fmt: skip
    layer = model.layers[1]
    w13, was = layer.ffn.experts.w13.weight, before["layers.1.ffn.experts.w13.weight"]
    up = fake_quantize(was[2, 16:].float(), "tensor").bfloat16()
    assert torch.equal(w13[2, 16:], up)
    w2, was = layer.ffn.experts.w2.weight, before["layers.1.ffn.experts.w2.weight"]
    assert torch.equal(w2[3], fake_quantize(was[3].float(), "tensor").bfloat16())


def test_optimizer_lowers_the_loss_and_moves_every_trained_parameter():
    from optimizer import Optimizer

    torch.manual_seed(0)
    model = DeepseekV4(TINY, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, matrix_rate=0.02, decay=0.1, rates={"": 5e-3})
    ids = torch.randint(97, 110, (2, 48))
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step(1.0)
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert all(".indexer." in name for name in still)


def test_an_epoch_reads_every_window_once(library):
    from text import Pool

    files = [f for f in corpus.training_files(corpus.library_files(library)) if f.is_test]
    pool = Pool(files, 1000, 64, seed=3)
    first = [pool.take() for _ in range(pool.windows)]
    second = [pool.take() for _ in range(pool.windows)]
    for starts in (first, second):
        ordered = sorted(starts)
        assert {b - a for a, b in pairwise(ordered)} == {64}
        assert ordered[0] >= 1000
        assert ordered[-1] + 65 <= 1000 + len(pool.data)
    assert pool.windows * 64 > 0.95 * len(pool.data)
    assert first != sorted(first)
    assert first != second
    again = Pool(files, 1000, 64, seed=3)
    again.taken = len(first) + 5
    assert again.take() == second[5]


def test_batches_are_consecutive_bytes_from_both_pools(library):
    from text import Text

    files = corpus.training_files(corpus.library_files(library))
    text = Text(files, 16, 64, 0, torch.device("cpu"))
    ids, targets = text.draw(0.25)
    assert ids.shape == targets.shape == (16, 64)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    joined = bytes(text.data.tolist())
    places = [joined.index(bytes(row.tolist())) for row in ids]
    assert sum(p < len(text.modules.data) for p in places) == 4
    assert ids[0, 0] == corpus.BEGIN  # one window in sixteen begins a file
    twin = Text(files, 16, 64, 0, torch.device("cpu"))
    twin.load_state_dict(text.state_dict())
    assert torch.equal(twin.draw(0.5)[0], text.draw(0.5)[0])


def test_held_out_batches_judge_every_byte_once(library):
    from text import IGNORED, HeldOut

    files, _ = corpus.evaluation_files(corpus.library_files(library))
    held_out = HeldOut.of(files, 8, 64, torch.device("cpu"))
    targets = torch.cat([t for _, t in held_out.batches])
    judged = targets[targets != IGNORED]
    assert bytes(judged.tolist()) == b"".join(f.data for f in files)
    assert held_out.bytes == len(judged)
    assert all(t.shape == (8, 64) for _, t in held_out.batches)


def test_schedule_rises_stays_falls_and_rounds_at_its_end():
    import schedule

    assert schedule.factor(0.0) < 0.05
    assert schedule.factor(schedule.WARM_UP) == schedule.factor(schedule.DECAY_FROM - 1e-6) == 1.0
    assert schedule.factor(0.7) == pytest.approx(0.5)
    assert schedule.factor(1.0) == schedule.LAST_FACTOR
    assert [schedule.phase(p) for p in (0.0, 0.2, 0.5, 0.99)] == ["warm-up", "level", "decay", "nvfp4"]


def test_a_resumed_clock_spreads_what_is_left_over_its_own_time():
    import schedule

    clock = schedule.Clock(time.monotonic(), 10.0, None, done=0.6)
    assert clock.progress(5) == 0.6
    clock.start(reserve=2.0)
    assert clock.progress(5) == pytest.approx(0.6, abs=0.02)
    clock._start -= 4.0
    clock._end -= 4.0
    assert clock.progress(5) == pytest.approx(0.8, abs=0.02)
    with pytest.raises(ValueError, match="no time to train"):
        schedule.Clock(time.monotonic() - 9.0, 10.0, None).start(reserve=2.0)


def test_hash_layers_spread_the_text_evenly():
    from trainee import hash_table

    text = Path(corpus.__file__).read_bytes()
    table = hash_table(text, TINY)
    load = torch.zeros(TINY.n_routed_experts)
    for byte in text:
        load[table[byte]] += 1
    assert load.max() / load.mean() < 1.05
    assert all(len(set(row)) == TINY.num_experts_per_tok for row in table.tolist())


def test_the_shipped_model_is_the_preset():
    shipped = json.loads((NANO / "config.json").read_text())
    assert ModelConfig.from_dict(shipped) == ModelConfig.nano()
    assert (NANO / "model.safetensors").stat().st_size <= 16_000_000


def test_nano_fits_its_limit_and_the_format():
    config = ModelConfig.nano()
    assert set(config.layer_types) == {SLIDING, CSA, HCA}
    assert set(config.mlp_layer_types) == {HASH_MOE, MOE}
    model = DeepseekV4(config, device="meta")
    tensors = sum(t.numel() * (8 if t.dtype == torch.int64 else 2) for t in model.state_dict().values())
    # 300 names in a header of at most 120 bytes each, and about 500 values kept in float32.
    assert tensors + 300 * 120 + 500 * 2 <= 16_000_000
    for name, weight in model.state_dict().items():
        if any(part in name for part in (".wq_", ".wkv.", ".wo_", ".w13.", ".w2.")) and "indexer" not in name:
            assert weight.shape[-1] % 128 == 0, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
def test_kernels_agree_with_the_package():
    import triton_ops

    torch.manual_seed(0)
    logits, grad = 3 * torch.randn(1000, 4, 4, device="cuda"), torch.randn(1000, 4, 4, device="cuda")
    results = []
    for function in (triton_ops.sinkhorn, triton_ops.plain_sinkhorn):
        x = logits.clone().requires_grad_()
        y = function(x, 20, 1e-6)
        y.backward(grad)
        results += [y.detach(), x.grad]
    # 39 divisions of values up to one, half an ulp each, in both.
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=2 * 39 * 2**-24)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=16 * 39 * 2**-24)
    x = torch.randn(500, 256, device="cuda").exp().bfloat16()
    on = torch.ones((), device="cuda")
    assert torch.equal(triton_ops.fake_quantize(x, on), fake_quantize(x))
    assert torch.equal(triton_ops.fake_quantize(x, on * 0), x)
