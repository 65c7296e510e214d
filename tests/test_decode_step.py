"""The decode step as a graph, on the CPU: what a capture would record is recorded here, and replayed."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4lab import workspace
from dsv4lab.layers import quantize_model_
from dsv4lab.model import decode_step
from dsv4lab.model.decode_step import DecodeStep
from dsv4lab.model.generate import generate


class Graph(TorchDispatchMode):
    """Stands for a CUDA graph: replays operators on the memory they had, knowing nothing of Python's values.

    As on a GPU, reading a value while recording is an error, and recording leaves memory as it was.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about that")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, old in self.calls:
            again = function(*args, **kwargs)
            if again is None or any(r.alias_info is not None for r in function._schema.returns):
                continue  # written in place, or a view
            for to, new in zip(*(r if isinstance(r, tuple) else (r,) for r in (old, again)), strict=True):
                to.copy_(new)


class Capture:
    """Stands for torch.cuda.graph; what `memory` lists is brought back, since a capture computes nothing."""

    memory: tuple[torch.Tensor, ...] = ()
    runs = end_fails = False

    def __init__(self, graph, stream):
        self.graph = graph

    def __enter__(self):
        Capture.runs = True
        self.before = [t.clone() for t in self.memory]
        self.graph.__enter__()

    def __exit__(self, *failed):
        Capture.runs = False
        self.graph.__exit__(*failed)
        for t, before in zip(self.memory, self.before, strict=True):
            t.copy_(before)
        if self.end_fails:
            raise RuntimeError("operation failed due to a previous error during capture")


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """A CPU that passes for a GPU: where the decode step looks, and where a model would read on the host."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(decode_step, "_check_device", lambda model, cache: cache.position.device)
    for name, stand_in in {
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": Capture,
        "stream": contextlib.nullcontext, "device": contextlib.nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(workspace, "is_capturing", lambda: Capture.runs)
    monkeypatch.setattr(Capture, "memory", ())
    monkeypatch.setattr(Capture, "end_fails", False)


@pytest.fixture(scope="module", params=["bf16", "nvfp4"])
def model(request, tiny_model):
    model = copy.deepcopy(tiny_model).requires_grad_(False)
    return model if request.param == "bf16" else quantize_model_(model)


def capture(model, cache) -> DecodeStep:
    Capture.memory = (cache.position, *(t for layer in cache.layers for t in layer.tensors()))
    return DecodeStep(model, cache)


def tokens(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def fixed_steps(model, ids, cache) -> torch.Tensor:
    cache.fixed = True
    return torch.cat([model(ids[:, t : t + 1], cache) for t in range(ids.shape[1])], 1)


@pytest.mark.parametrize("prompt", [0, 1, 3, 4, 130, 255])
def test_replays_are_the_fixed_steps_bit_for_bit(model, cuda, prompt):
    """Past the ends of window and blocks, each token another: nothing of a position or token is frozen in."""
    ids = tokens(prompt + 20)
    want, got = model.new_cache(2, 300), model.new_cache(2, 300)
    if prompt:
        model(ids[:, :prompt], want), model(ids[:, :prompt], got)
    expected = fixed_steps(model, ids[:, prompt:], want)
    step = capture(model, got)
    for i in range(20):
        assert torch.equal(step(ids[:, prompt + i]), expected[:, i])
        assert got.length == got.position.item() == prompt + i + 1
    for a, b in zip(want.layers, got.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("prompt", [1, 7, 130])
def test_capture_leaves_the_sequence_as_it_was(model, cuda, prompt):
    """Whether a step or a piece of prompt comes next."""
    ids = tokens(prompt + 9)
    for chunk in (1, 9):
        want, got = model.new_cache(2, 300), model.new_cache(2, 300)
        model(ids[:, :prompt], want), model(ids[:, :prompt], got)
        capture(model, got).close()
        got.fixed = False
        assert got.length == got.position.item() == prompt
        for at in range(prompt, prompt + 9, chunk):
            piece = ids[:, at : at + chunk]
            assert torch.equal(model(piece, got), model(piece, want))


def test_one_capture_serves_many_generations(model, cuda):
    cache = model.new_cache(2, 40)
    step, buffer = capture(model, cache), None
    for seed in range(3):
        ids, want = tokens(30, seed=seed), model.new_cache(2, 40)
        cache.reset()
        model(ids[:, :20], cache), model(ids[:, :20], want)
        expected = fixed_steps(model, ids[:, 20:], want)
        got = [step(ids[:, 20 + i]).clone() for i in range(10)]
        assert torch.equal(torch.stack(got, 1), expected)
        buffer = buffer or step.logits.data_ptr()
        assert step.logits.data_ptr() == buffer


def test_generate_takes_the_graph(model, cuda, monkeypatch):
    """The same tokens as eager fixed steps; the prompt runs without, and no graph is made for one token."""
    made = []

    def counted(model, cache):
        made.append(capture(model, cache))
        return made[-1]

    monkeypatch.setattr("dsv4lab.model.generate.DecodeStep", counted)
    ids = tokens(5)
    steps = list(generate(model, ids, 1))
    assert not made
    steps = torch.stack(list(generate(model, ids, 12)), 1)
    assert len(made) == 1 and made[0]._graph is None and made[0].cache.length == 16
    cache = model.new_cache(2, 17)
    want = [model(ids, cache, last_only=True)[:, -1].argmax(-1)]
    cache.fixed = True
    while len(want) < 12:
        want.append(model(want[-1][:, None], cache)[:, -1].argmax(-1))
    assert torch.equal(steps, torch.stack(want, 1))
    list(generate(model, ids, 3, graph=False))
    assert len(made) == 1
    leaving = generate(model, ids, 5)
    next(leaving), next(leaving)
    assert made[1]._graph is not None
    leaving.close()
    assert made[1]._graph is None


def test_a_cpu_has_no_graphs(model):
    with pytest.raises(ValueError, match="graph=True needs input_ids on a CUDA device, got cpu"):
        generate(model, tokens(3), 5, graph=True)
    with pytest.raises(ValueError, match="model and cache must be on one CUDA device, got cpu and cpu"):
        DecodeStep(model, model.new_cache(1, 4))


def test_misuse_is_one_clear_error(model, cuda):
    cache = model.new_cache(2, 4)
    step = capture(model, cache)
    for bad, error, message in [
        ([1, 2], TypeError, "int64 tensor, got list"),
        (torch.ones(2), TypeError, "int64 tensor, got torch.float32"),
        (tokens(1), ValueError, r"tokens must be \(2,\) on cpu, got \(2, 1\) on cpu"),
        (tokens(1)[:1, 0], ValueError, r"got \(1,\)"),
    ]:
        with pytest.raises(error, match=message):
            step(bad)
    for _ in range(4):
        step(tokens(1)[:, 0])
    with pytest.raises(ValueError, match="4 tokens in the cache and 1 new ones exceed its max_tokens = 4"):
        step(tokens(1)[:, 0])
    with pytest.raises(ValueError, match="exceed its max_tokens = 4"):
        DecodeStep(model, cache)
    assert cache.length == cache.position.item() == 4
    step.close()
    with pytest.raises(RuntimeError, match="the decode step was closed"):
        step(tokens(1)[:, 0])


def test_what_a_replay_would_not_call_is_refused(model, cuda):
    cache = model.new_cache(1, 4)
    hook = model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no hooks or observers.*layers\.1 has one"):
        DecodeStep(model, cache)
    hook.remove()
    model.layers[0].attn.wkv.observer = lambda *_: None
    try:
        with pytest.raises(ValueError, match=r"layers\.0\.attn\.wkv has one"):
            DecodeStep(model, cache)
    finally:
        model.layers[0].attn.wkv.observer = None
    capture(model, cache)


@pytest.mark.parametrize("end_fails", [False, True])
def test_a_failed_capture_says_why_and_leaves_no_trace(model, cuda, monkeypatch, end_fails):
    """The end of a broken capture fails as well, on a GPU; what is told is what broke it."""
    forward = type(model).forward

    def reading(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return out * (1.0 if out.sum().item() < 1e30 else 2.0)

    cache = model.new_cache(2, 20)
    model(tokens(6), cache)
    monkeypatch.setattr(Capture, "end_fails", end_fails)
    monkeypatch.setattr(type(model), "forward", reading)
    with pytest.raises(RuntimeError, match=r"not be captured .*: operation not permitted.* \(graph=False"):
        capture(model, cache)
    assert not cache.fixed and cache.length == cache.position.item() == 6
    step = generate(model, tokens(6), 3, graph=False)  # the eager loop has no such limits
    assert len(list(step)) == 3


def test_scratch_memory_is_held_while_the_step_lives(model, cuda):
    space = next(m for m in model.modules() if type(m).__name__ == "Experts")
    step = capture(model, model.new_cache(2, 8))
    held = space.workspaces.on(torch.device("cpu"))
    assert held.holders == 1
    with capture(model, model.new_cache(2, 8)) as other:
        assert held.holders == 2
    assert held.holders == 1 and other.logits is None
    del step
    gc.collect()
    assert held.holders == 0


def test_scratch_memory_that_would_grow_is_named(cuda, monkeypatch, tiny_model):
    """A warm-up that leaves something out is found by the capture."""
    model = quantize_model_(copy.deepcopy(tiny_model).requires_grad_(False))
    monkeypatch.setattr(decode_step, "warmup", lambda *_, **__: workspace.Workspaces())
    with pytest.raises(RuntimeError, match=r"captured as a CUDA graph: .* would allocate under capture"):
        capture(model, model.new_cache(1, 4))
