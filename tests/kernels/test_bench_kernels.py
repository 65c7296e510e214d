"""The benchmark on kernels: each operation is checked before it is timed, on a GPU or an emulated one."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels import decode_gemm_sm100a

from dsv4lab.bench import compiling, measure
from dsv4lab.bench.cases import KINDS, Case, tensors
from dsv4lab.bench.shapes import select
from dsv4lab.device import supports

SHAPES = ["5x64", "5x64x32", "7x64x32x6x2"]
WEIGHT_ONLY = {kind for kind in KINDS if kind.endswith("_w4a16")}


@pytest.fixture
def untimed(monkeypatch):
    """Every call takes a second."""
    monkeypatch.setattr(measure, "interleaved", lambda timers, repeats: [[1.0] * repeats for _ in timers])


def test_every_operation_that_kernels_have_is_checked(b200, untimed):
    cases = select(None, SHAPES, "blackwell", "cpu")
    assert {case.kind for case in cases} == set(KINDS) - WEIGHT_ONLY
    before = len(b200.launches)
    found = measure.bench(cases, "blackwell", repeats=2)
    assert [(m.refused, m.backend) for m in found] == [("", "blackwell")] * len(cases)
    assert len(b200.launches) >= before + len(cases)
    assert all(m.as_dict()["tb_per_s"] > 0 for m in found)


def test_weight_only_products_are_refused_by_name(b200):
    with pytest.raises(ValueError, match="cannot run grouped_mm on cpu: it multiplies NVFP4 activations"):
        select(["linear_w4a16"], ["5x64x32"], "blackwell", "cpu")
    assert Case("linear_w4a16", (5, 64, 32)).backend(None, "cpu") == "reference"


def test_a_wrong_kernel_is_not_timed(b200, untimed, monkeypatch):
    run = decode_gemm_sm100a.run

    def skips_a_column(product, output, choice):
        run(product, output, choice)
        output.tensors[0][:, -1] = 0

    monkeypatch.setattr(decode_gemm_sm100a, "run", skips_a_column)
    (found,) = measure.bench([Case("linear", (5, 64, 32))], "blackwell", repeats=1)
    assert "wrong in" in found.refused and found.seconds is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_on_a_gpu_its_kernels_are_checked_and_measured_at_the_sizes_of_a_model(tokens):
    """Checked before and after the capture; and a second run has the bits of the first."""
    name = next((name for name in ("blackwell", "hopper") if supports(name)), None)
    if name is None:
        pytest.skip("no kernels for this GPU")
    cases = select(None, [f"flash:{tokens}"], name, "cuda")
    found = measure.bench(cases, name, "cuda", repeats=3)
    assert [m.refused for m in found] == [""] * len(cases) and len(cases) >= 5
    for case in (case for case in cases if len(case.shape) < 5):  # of groups, padding may hold anything
        ready = case.ready(case.make("cuda"), name)
        runs = [[t.view(-1).view(torch.uint8) for t in tensors(case.run(ready, name))] for _ in range(2)]
        assert all(map(torch.equal, *runs))


def test_what_would_be_launched_is_noted_and_not_run(b200):
    case, before = Case("quantize_token", (5, 64)), len(b200.launches)
    kernels = compiling.noted(lambda: case.run(case.make("cpu"), "blackwell"))
    assert len(b200.launches) == before
    ((make, (form,)),) = kernels
    assert make.__name__ == "make_quantize_rows" and form.scale == "row"
    (kinds,) = kernels.values()
    assert kinds[:2] == ("Uint32", "None") and kinds[-1] == "float"
