"""What products cost, from the emulator's counters: bytes, MMAs and instructions, and the model of a B200."""

from __future__ import annotations

import json
import math

import pytest
import torch
from dsv4lab.kernels import choose, cost, decode_form, gemm, launch, uses
from dsv4lab.kernels.choose import Prefill
from dsv4lab.kernels.decode_choice import Decode
from dsv4lab.kernels.nvfp4_tile_gemm import nvfp4_tile_gemm

from dsv4lab import grouped_mm
from dsv4lab.bench.cases import Case
from dsv4lab.cli import main
from dsv4lab.emulator import device
from dsv4lab.formats import NVFP4Tensor
from dsv4lab.layouts import group_offsets

STAGE, MMA_DEPTH, CHUNK = 256, 64, 128  # K of a stage and of an MMA; rows of a chunk of block scales
SHORT, LONG = 1024, 3072  # K, for the difference between both


def zeros(*shape: int) -> NVFP4Tensor:
    """A tensor that holds zeros: what a product costs does not depend on values."""
    q = uses.nvfp4(*shape)
    q.codes.zero_()
    q.block_scales.view(torch.uint8).zero_()
    return q


def run(function, *arguments, **options):
    """(counters, configuration of the kernel) of a function that launches one kernel."""
    with device("sm_100a", checks="none", trace=False) as gpu:
        function(*arguments, **options)
        ((_, config),) = launch.compiled_for(gpu)
    return gpu.counters, config[0]


def operand_bytes(rows: int, columns: int) -> int:
    """Of a stage of a tile: codes of 128 bytes a row, and whole chunks of 16 block scales a row."""
    chunks = math.ceil(rows / CHUNK) + math.ceil(columns / CHUNK)
    return (rows + columns) * STAGE // 2 + chunks * CHUNK * STAGE // 16


@pytest.fixture(scope="module")
def plain():
    """Instructions that the kernel with one tile for each CTA needs for a step of K: about 190."""
    short, long = (run(nvfp4_tile_gemm, zeros(128, k), zeros(128, k), stages=4)[0] for k in (SHORT, LONG))
    per_step = (long["instructions"] - short["instructions"]) / ((LONG - SHORT) / STAGE)
    assert 150 < per_step < 250
    assert short["tma.load_bytes"] == operand_bytes(128, 128) * SHORT // STAGE
    return per_step


@pytest.mark.parametrize("choice", choose.CHOICES, ids=str)
def test_a_tile_s_main_loop(choice, plain, monkeypatch):
    """Each operand byte once, the ideal number of MMAs, and no more instructions than the plain kernel needs
    for a tile, or for as much as its tile is."""
    monkeypatch.setattr(gemm, "choose", lambda *_: choice)
    counted = {}
    for k in (SHORT, LONG):
        a, b = zeros(choice.rows, k), zeros(choice.columns, k)
        counted[k], form = run(grouped_mm, a, b, backend="blackwell")
        assert (form.rows, form.columns) == (choice.rows, choice.columns)
        assert counted[k]["tma.load_bytes"] == operand_bytes(form.rows, form.columns) * k // STAGE
        assert counted[k]["mma.mxf4nvf4"] == k // MMA_DEPTH
        assert counted[k]["mma.flops"] == 2 * form.rows * form.columns * k
        assert counted[k]["tma.store_bytes"] == 2 * form.rows * form.columns
    instructions = counted[LONG]["instructions"] - counted[SHORT]["instructions"]
    per_step = instructions / ((LONG - SHORT) / STAGE)
    assert per_step <= plain * max(1, form.rows * form.columns / 128**2)


def grouped(sizes: list[int], n: int, k: int):
    """Counters of a product of groups with so many rows, and its form."""
    counts = torch.tensor(sizes, dtype=torch.int32)
    offsets = group_offsets(counts)
    a, b = zeros(max(int(offsets[-1]), 128), k), zeros(len(sizes), n, k)
    return run(grouped_mm, a, b, offsets, counts, backend="blackwell")


CHOICES = [Prefill(128, 64), Prefill(256, 256), Decode(8, 1), Decode(128, 2)]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("sizes", [[130, 0, 1, 128], [0, 0, 260, 0], [256]], ids=str)
def test_groups_cost_what_their_tiles_cost(sizes, choice, monkeypatch):
    monkeypatch.setattr(gemm, "choose", lambda *_: choice)
    n, k = 192, 512
    counters, form = grouped(sizes, n, k)
    columns = form.columns if isinstance(choice, Prefill) else decode_form.FEATURES
    tiles = sum(math.ceil(size / form.rows) for size in sizes) * math.ceil(n / columns)
    assert counters["tma.load_bytes"] == tiles * operand_bytes(form.rows, columns) * k // STAGE
    assert counters["mma.mxf4nvf4"] == tiles * k // MMA_DEPTH
    assert counters["mma.flops"] == tiles * 2 * form.rows * columns * k


def test_empty_groups_cost_no_loads_and_no_products():
    few, _ = grouped([100], 128, 512)
    many, _ = grouped([0] * 20 + [100] + [0] * 11, 128, 512)
    for name in ("tma.loads", "tma.load_bytes", "mma.mxf4nvf4", "tcgen05.cp_bytes"):
        assert few[name] == many[name] > 0
    none, _ = grouped([0, 0, 0], 128, 512)
    assert none["tma.loads"] == none["mma.mxf4nvf4"] == 0


# ---- the model


def counted(**changes) -> cost.Cost:
    values = {"ctas": 148, "sm_count": 148, "instructions": 1, "fetched": 1, "multiplied": 0, "bytes": 0,
              "flops": 0}  # fmt: skip
    return cost.Cost(Case("linear", (1, 64, 128)), **(values | changes))


def test_the_model_takes_the_larger_of_two_times():
    assert counted(bytes=16 * 10**12).seconds == pytest.approx(2)  # 8 TB/s
    assert counted(multiplied=18 * 10**15).seconds == pytest.approx(2)  # 9 PFLOPS
    assert counted(multiplied=18 * 10**15, ctas=37).seconds == pytest.approx(8)  # of a quarter of the GPU
    assert counted(multiplied=18 * 10**15, ctas=296).seconds == pytest.approx(2)
    both = counted(multiplied=18 * 10**15, bytes=24 * 10**12).as_dict()
    assert both["model_b200_us"] == pytest.approx(3e6) and both["bound_by"] == "memory"
    assert counted(multiplied=10**15, bytes=1).as_dict()["bound_by"] == "tensor cores"


def test_a_product_is_checked_and_counted():
    found = cost.count(Case("grouped_mm_swiglu", (5, 256, 128, 4, 2)))
    case = found.case
    given = case.make("cpu")
    assert (found.bytes, found.flops) == case.work(given, case.run(given, "reference"))
    assert found.multiplied >= found.flops == 2 * 5 * 2 * 128 * 256 and found.instructions > 1000
    assert found.fetched > 0 and found.ctas >= 1 and found.sm_count == 148


def test_the_command_says_that_it_is_a_model(capsys):
    assert main(["kernels", "--cost", "--shapes", "3x64x128"]) == 0
    title, header, _, line = capsys.readouterr().out.splitlines()
    assert "a model of a B200" in title and "nothing was measured" in title
    assert header.split()[:2] == ["op", "shape"] and line.split()[:2] == ["linear", "3x64x128"]
    assert main(["kernels", "--cost", "--shapes", "3x64x128", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "nothing was measured" in printed["model"] and printed["results"][0]["bound_by"]
