"""How the GEMM for many rows runs: in any order of warps, with tensor cores' arithmetic, at what cost."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels import gemm
from dsv4lab.kernels.choose import CHOICES, Prefill
from dsv4lab.kernels.gemm_form import Form

from dsv4lab.emulator import device
from dsv4lab.gemm import grouped_mm, grouped_mm_swiglu

EVERY_TILE = pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c.rows}x{c.columns}")
ONE_AND_TWO = pytest.mark.parametrize(
    "choice", [Prefill(128, 128), Prefill(128, 256), Prefill(256, 256)], ids=lambda c: f"{c.rows}x{c.columns}"
)


@pytest.fixture
def tiles(monkeypatch):
    """Takes a choice of tiles and how many SMs there are."""

    def use(choice, sms):
        monkeypatch.setattr(gemm, "choose", lambda *sizes: choice)
        monkeypatch.setattr(gemm, "sm_count", lambda device: sms)

    return use


@EVERY_TILE
def test_any_order_of_warps_gives_the_same_bits(choice, cases, tiles):
    """Several tiles for each CTA or pair: both accumulators come into use again, whole and in part."""
    tiles(choice, choice.ctas)
    where = cases.groups((2, 0, 130))
    a = cases.nvfp4((where.rows, 320), 0, torch.rand(where.rows), "token")
    b = cases.nvfp4((3, 336, 320), 1, torch.rand(3))
    results = []
    for seed in range(3):
        with device("sm_100a", seed=seed):
            results.append(grouped_mm(a, b, where.offsets, where.sizes, backend="blackwell")[where.real])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    found = torch.zeros(where.rows, 336, dtype=torch.bfloat16)
    found[where.real] = results[0]
    cases.check(found, cases.product(a, b, where, ulps=0.5), where)


@ONE_AND_TWO
@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_arithmetic_of_tensor_cores(arch, choice, cases, tiles):
    """Sums cut toward zero; what is cut below 2^-35 of the largest addend is far less than a unit of fp32."""
    tiles(choice, 2)
    where = cases.groups((40, 3))
    a = cases.nvfp4((where.rows, 576), 2, torch.tensor(0.01))
    b = cases.nvfp4((2, 32, 576), 3, torch.rand(2, 2) / 100, interleaved=True)
    with device(arch, mma="hardware"):
        sums = grouped_mm(a, b, where.offsets, where.sizes, backend="blackwell")
        h = grouped_mm_swiglu(a, b, where.offsets, where.sizes, backend="blackwell")
    exact = cases.product(a, b, where, ulps=1.0 + 2.0**-8)
    cases.check(sums, exact, where)
    wanted, bound = cases.swiglu(exact, 10.0)
    assert ((h.double() - wanted).abs() <= bound)[where.real].all()


@EVERY_TILE
def test_loads_and_products_are_the_ideal_ones(choice, cases, tiles):
    """Each tile loads what it multiplies once, 4.5 bits a value, and multiplies K = 64 an instruction."""
    tiles(choice, 4)
    n, k = 768, 512
    where = cases.groups((0, 130, 0, 5))
    a, b = cases.nvfp4((where.rows, k), 4), cases.nvfp4((4, n, k), 5)
    with device("sm_100a") as gpu:
        grouped_mm(a, b, where.offsets, where.sizes, backend="blackwell")
        counters = gpu.runs[-1].counters
    high = sum(-(-size // choice.rows) for size in where.sizes.tolist())
    count = high * n // choice.columns
    # Scales of weights come in chunks of 128 rows, of which a tile of 64 or 192 columns has a half.
    chunks = -(-choice.columns // 128) * 128
    codes, scales = (choice.rows + choice.columns) * k // 2, (choice.rows + chunks) * k // 16
    assert counters["tma.load_bytes"] == count * (codes + scales)
    assert counters["mma.mxf4nvf4"] == count * k // 64
    assert counters["mma.flops"] == 2 * high * choice.rows * n * k
    # Of strips of 32 rows without a real one nothing is stored.
    assert counters["tma.store_bytes"] == (5 + 1) * 32 * n * 2
    assert counters["global.store_bytes"] == 0


def test_empty_groups_cost_nothing(cases, tiles):
    """32 of them or none, apart from the words that say so: the instructions are the same."""
    tiles(Prefill(128, 128), 2)
    seen = []
    for sizes in ((40, 130), (0,) * 7 + (40,) + (0,) * 12 + (130,) + (0,) * 11):
        where = cases.groups(sizes)
        a, b = cases.nvfp4((where.rows, 256), 6), cases.nvfp4((len(sizes), 128, 256), 7)
        with device("sm_100a") as gpu:
            grouped_mm(a, b, where.offsets, where.sizes, backend="blackwell")
            counters = gpu.runs[-1].counters
        parts = (
            "tma.load_bytes",
            "mma.mxf4nvf4",
            "instructions.shfl",
            "instructions.ld",
            "global.store_bytes",
        )
        seen.append({part: counters[part] for part in parts})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("choice", [Prefill(128, 192), Prefill(128, 256), Prefill(256, 256)], ids=str)
def test_a_tile_is_stored_while_the_next_one_is_multiplied(choice, cases, tiles):
    """In the model's time the second tile's first product comes before half of the first tile is stored."""
    tiles(choice, choice.ctas)
    where = cases.one_group(choice.rows)
    a, b = cases.nvfp4((where.rows, 512), 8), cases.nvfp4((2 * choice.columns, 512), 9)
    with device("sm_100a") as gpu:
        grouped_mm(a, b, backend="blackwell")
        products = gpu.trace.of("mma")
        waits = [e for e in gpu.trace.of("wait") if e.warp < 4 and "mbarrier.try_wait" in e.text]
    assert len(products) == 2 * 512 // 64
    begin = min(event.end for event in waits)
    back = min(event.start for event in waits if event.start > begin)
    assert products[len(products) // 2].start < (begin + back) / 2
    # They are where the accumulators are.
    form = Form(choice.rows, choice.columns)
    assert {event.detail["column"] for event in products} == {0, form.accumulator_columns}


def test_memories_of_every_form():
    """Two accumulators and block scales fit into tensor memory, at least three stages into shared memory."""
    for choice in CHOICES:
        for output in ("bf16", "swiglu", "nvfp4"):
            form = Form(choice.rows, choice.columns, output=output)
            chunks = -(-choice.columns // 128)
            assert form.sfa_column + 16 == form.sfb_column and form.sfb_column + 16 * chunks == 512
            last = form.accumulator_columns + form.columns
            assert last <= form.sfa_column and (form.accumulator_columns >= form.columns or form.overlaps)
            # Columns that both accumulators have are in the slice that is read first.
            assert form.columns - form.accumulator_columns <= 64
            assert form.stages >= 3
            assert form.stages * form.stage_bytes + form.store_bytes <= 232448 - 2048
