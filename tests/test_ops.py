"""One declaration makes an operator with its out form, its fake and a table of backends."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import ops
from dsv4lab.ops import OPS, first_rows, register_implementation, register_op, resolve_backend


def _reference(x, factor):
    return x * factor, x.sum(-1)


def _fake(x, factor):
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


scale_sum = register_op(
    "test_scale_sum(Tensor x, float factor) -> (Tensor y, Tensor total)", _reference, _fake
)
negate = register_op("test_negate(Tensor x) -> Tensor", torch.neg, torch.empty_like)


@pytest.fixture
def backend():
    """A backend that exists for one test: it runs on CPU and marks its results."""
    ops.register_backend("testing", lambda device: None if device.type == "cpu" else "it knows CPUs only")
    yield "testing"
    del ops.BACKENDS["testing"]
    for op in OPS.values():
        op.implementations.pop("testing", None)


def test_one_declaration_makes_both_forms():
    x = torch.randn(3, 4)
    y, total = scale_sum(x, 2.0)
    assert torch.equal(y, x * 2) and torch.equal(total, x.sum(-1))
    out_y, out_total = torch.full((5, 4), 9.0), torch.full((3,), 9.0)
    assert scale_sum.out(x, 2.0, outs=(out_y, out_total)) is None
    assert torch.equal(out_y[:3], y) and torch.equal(out_total, total) and out_y[3:].eq(9).all()
    assert OPS["test_scale_sum"] is scale_sum
    schema = str(torch.ops.dsv4lab.test_scale_sum_out.default._schema)
    assert schema.endswith("Tensor(a!) out_y, Tensor(b!) out_total, *, str? backend=None) -> ()")


def test_fake_and_meta():
    y, total = scale_sum(torch.empty(3, 4, device="meta"), 1.0)
    assert (y.shape, total.shape, y.device.type) == ((3, 4), (3,), "meta")


@pytest.mark.parametrize("form", ["", "_out"])
@pytest.mark.parametrize("name", ["test_scale_sum", "test_negate"])
def test_opcheck(name, form):
    args = (torch.randn(3, 4),) if name == "test_negate" else (torch.randn(3, 4), 2.0)
    outs = OPS[name](*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.library.opcheck(getattr(torch.ops.dsv4lab, name + form).default, (*args, *(outs if form else ())))


def test_whole_graph_of_both_forms():
    def step(x):
        y, total = scale_sum(x, 3.0, backend="reference")
        out = torch.zeros(5, 4)
        negate.out(y, outs=(out,))
        return out[:3], total

    x = torch.randn(3, 4)
    for got, expected in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x), strict=True
    ):
        assert torch.equal(got, expected)


def test_unknown_and_unavailable_backends_never_fall_back(backend):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="backend 'cuda' is unknown; known are blackwell, hopper, reference"):
        negate(x, backend="cuda")
    with pytest.raises(ValueError, match="backend 'hopper' cannot run test_negate on cpu"):
        negate(x, backend="hopper")
    with pytest.raises(ValueError, match="'blackwell' cannot run"):
        negate.out(x, outs=(x.clone(),), backend="blackwell")
    with pytest.raises(ValueError, match="'testing' cannot run test_negate on cpu: it has no implementation"):
        negate(x, backend=backend)
    with pytest.raises(ValueError, match="on cuda:0: it knows CPUs only"):
        resolve_backend(backend, "cuda:0", "test_negate")


def test_a_backend_joins_in_either_form(backend):
    x = torch.randn(3, 4)

    def fill(x, factor, y, total):
        y.fill_(factor)
        total.fill_(-factor)

    register_implementation("test_scale_sum", backend, out=fill)
    register_implementation("test_negate", backend, function=lambda x: torch.full_like(x, 7))
    y, total = scale_sum(x, 5.0, backend=backend)  # allocated by the fake, then filled
    assert y.eq(5).all() and total.eq(-5).all() and y.shape == x.shape
    out = torch.zeros(6, 4)
    negate.out(x, outs=(out,), backend=backend)
    assert out[:3].eq(7).all() and out[3:].eq(0).all()
    with pytest.raises(ValueError, match="needs function or out"):
        register_implementation("test_negate", backend)


def test_the_default_is_the_first_that_can(backend):
    assert resolve_backend(None, "cpu", "test_negate") == "reference"
    register_implementation("test_negate", backend, function=torch.neg)
    assert list(ops.BACKENDS)[-1] == "reference"
    assert resolve_backend(None, "cpu", "test_negate") == backend
    assert resolve_backend(None, "cuda", "test_negate") == "reference"
    assert resolve_backend(None, "cpu", "test_scale_sum") == "reference"


def test_first_rows():
    out = torch.zeros(4, 3)
    assert first_rows(out, (4, 3)) is out
    assert first_rows(out, (2, 3)).shape == (2, 3)
    for shape in ((5, 3), (2, 2), (4,)):
        with pytest.raises(ValueError, match="out must have shape"):
            first_rows(out, shape)


def test_a_backend_can_be_named_for_a_block():
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="'ampere' is unknown"), ops.use_backend("ampere"):
        pass
    with ops.use_backend("blackwell"), pytest.raises(ValueError, match="'blackwell' cannot run"):
        ops.resolve_backend(None, x.device, "quantize")
    with ops.use_backend("reference"):
        assert ops.resolve_backend(None, "cpu", "quantize") == "reference"
        # What a call names counts for more.
        with pytest.raises(ValueError, match="'hopper' cannot run"):
            ops.resolve_backend("hopper", "cpu", "quantize")
    assert ops.resolve_backend(None, "cpu", "quantize") == "reference"


def test_a_backend_may_refuse_arguments(backend):
    """Then another one runs them, but for one that was named."""

    def refuses(x):
        return "it takes matrices only" if x.dim() != 2 else None

    register_implementation("test_negate", backend, function=lambda x: x + 7, refuses=refuses)
    assert negate(torch.zeros(2, 4)).eq(7).all() and negate(torch.ones(4)).eq(-1).all()
    out = torch.zeros(3)
    negate.out(torch.ones(2), outs=(out,))
    assert out.tolist() == [-1, -1, 0]
    with pytest.raises(ValueError, match="'testing' cannot run test_negate on cpu: it takes matrices only"):
        negate(torch.zeros(4), backend=backend)
    assert resolve_backend(None, "cpu", "test_negate") == backend
    assert resolve_backend(None, "cpu", "test_negate", (torch.zeros(4),)) == "reference"
