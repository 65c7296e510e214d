"""Scratch memory: one for all layers, never grown where a graph would keep the old address."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dsv4lab import workspace
from dsv4lab.layers import Linear, MoE, quantize_model_, warmup
from dsv4lab.workspace import Workspace, Workspaces


@pytest.fixture
def capture(monkeypatch):
    """Switches the capture check on, as it stands while a CUDA graph records."""

    def start():
        monkeypatch.setattr(workspace, "is_capturing", lambda: True)

    return start


def model(layers=1):
    blocks = [MoE(32, 16, 4, 2) for _ in range(layers)]
    for i, p in enumerate(p for b in blocks for p in b.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    return quantize_model_(nn.Sequential(Linear(32, 32), *blocks).requires_grad_(False))


def rows(tokens, seed=0):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_results_do_not_depend_on_the_workspace():
    m = model(3)
    want = {n: m(rows(n)) for n in (1, 7, 300)}
    warmup(m, 300)
    for n in (300, 1, 7, 300):  # a large step leaves its values behind for the small ones
        assert torch.equal(m(rows(n)), want[n])


def test_one_workspace_serves_all_layers():
    one, many = warmup(model(1), 64), warmup(model(5), 64)
    device = torch.device("cpu")
    assert one.on(device).nbytes == many.on(device).nbytes > 0
    m = model(5)
    assert warmup(m, 64) is warmup(m, 128)
    assert len({id(b.experts.workspaces) for b in m[1:]}) == 1


def test_a_step_within_the_warm_up_allocates_nothing_of_its_own(capture):
    m = model(2)
    want = m(rows(64))
    buffers = warmup(m, 64).on(torch.device("cpu"))
    before = {name: b.data_ptr() for name, b in buffers._buffers.items()}
    capture()
    assert torch.equal(m(rows(64)), want) and m(rows(1)).shape == (1, 32)
    assert {name: b.data_ptr() for name, b in buffers._buffers.items()} == before


def test_a_capture_that_would_allocate_or_compile_raises(capture):
    cold, warm = model(), model()
    warmup(warm, 8)
    capture()
    with pytest.raises(RuntimeError, match=r"would allocate under capture: call warmup\(model, max_tokens\)"):
        cold(rows(8))
    with pytest.raises(RuntimeError, match=r"cannot grow to .* while a capture runs"):
        warm(rows(600))
    with pytest.raises(RuntimeError, match="call it before"):
        warmup(warm, 600)


def test_no_growth_while_a_graph_holds_the_memory():
    m = model()
    space = warmup(m, 8).on(torch.device("cpu"))
    with space.hold(), space.hold():
        m(rows(8))
        with pytest.raises(RuntimeError, match=r"while 2 graph\(s\) hold it"):
            m(rows(600))
    m(rows(600))
    with pytest.raises(ValueError, match="max_tokens must be positive, got 0"):
        warmup(m, 0)


def test_copies_have_a_workspace_of_their_own():
    m = model(2)
    warmup(m, 8)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        spaces = {b.experts.workspaces for b in other[1:]}
        assert len(spaces) == 1 and m[1].experts.workspaces not in spaces
        assert spaces.pop().on(torch.device("cpu")).nbytes == 0
        assert torch.equal(other(rows(8)), m(rows(8)))


def test_buffers_by_name():
    space = Workspace("cpu")
    a = space.get("a", (4, 3), torch.float32)
    assert space.get("a", (2, 2), torch.bfloat16).data_ptr() == a.data_ptr()
    assert space.get("b", (4, 3), torch.float32).data_ptr() != a.data_ptr()
    assert space.get("a", (5, 3), torch.float32).shape == (5, 3) and space.nbytes == 60 + 48
    assert space.get("c", (0, 3), torch.uint8).shape == (0, 3)
    both = Workspaces()
    assert both.on(torch.device("cpu")) is both.on(torch.device("cpu"))
    assert not workspace.is_capturing()
