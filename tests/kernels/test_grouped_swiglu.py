"""The GEMM that activates its sums: SwiGLU in bf16 within a derived bound, and quantized to the bit."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels import gemm
from dsv4lab.kernels.choose import CHOICES, Prefill

from dsv4lab import gemm_arguments, reference
from dsv4lab.formats import BLOCK, NVFP4Tensor
from dsv4lab.gemm import GROUPED_MM_SWIGLU_QUANTIZE, grouped_mm_swiglu
from dsv4lab.layouts import unswizzle_scales
from dsv4lab.quantize import bound_global_scale, quantize_nvfp4

BF16 = torch.bfloat16
UNTOUCHED = 0x5A
SIZES = (5, 0, 130, 0, 31)
G_OUT = 0.037


@pytest.fixture(autouse=True)
def few_sms(monkeypatch):
    """So many SMs that each computes several tiles."""
    monkeypatch.setattr(gemm, "sm_count", lambda device: 4)


@pytest.fixture
def run(b200, monkeypatch):
    """The fused operation with tiles of a choice, or those that are chosen."""

    def run(a, b, where, choice=None, **options):
        if choice is not None:
            monkeypatch.setattr(gemm, "choose", lambda *sizes: choice)
        return grouped_mm_swiglu(a, b, where.offsets, where.sizes, backend="blackwell", **options)

    return run


def operands(cases, where, width: int, k: int, seed: int = 0, size: float = 0.008, halves: bool = True):
    """Activations and interleaved weights, such that about a quarter of the gates is clamped at 10."""
    g_a = (torch.rand(where.rows, generator=torch.Generator().manual_seed(seed)) + 0.5) * size
    groups = 1 if where.sizes is None else len(where.sizes)
    g_b = torch.rand((groups, 2) if halves else (groups,), generator=torch.Generator().manual_seed(seed + 1))
    a = cases.nvfp4((where.rows, k), seed, g_a, "token")
    return a, cases.nvfp4((groups, 2 * width, k), seed + 1, (g_b + 0.5) * size, interleaved=True)


def within(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, rows: torch.Tensor) -> None:
    wrong = ~((found.double() - expected).abs() <= bound) & rows[:, None]
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {wrong.nonzero()[0].tolist()}"


def scales(t: NVFP4Tensor) -> torch.Tensor:
    """Block scales as linear bytes, with those of rows that only swizzled scales have."""
    raw = t.block_scales.view(torch.uint8)
    if t.scale_layout == "linear":
        return raw
    rows, columns = raw.shape
    return unswizzle_scales(raw, rows, columns)


@pytest.mark.parametrize(
    ("choice", "limit"), [*((choice, 10.0) for choice in CHOICES), (Prefill(128, 64), None)], ids=str
)
def test_activation(choice, limit, cases, run):
    where = cases.groups(SIZES, extra=128)
    a, b = operands(cases, where, 104, 192)
    exact = cases.product(a, b, where, ulps=0.5)
    gates = exact.sums.unflatten(-1, (-1, 2, 8))[..., 0, :].flatten(-2)[where.real]
    assert 0.05 < (gates > 10).double().mean() < 0.45 and (gates < -88).any()
    result = run(a, b, where, choice, limit=limit)
    assert result.shape == (where.rows, 104)
    within(result, *cases.swiglu(exact, limit), where.real)


# 9 and 10 blocks: both end in the middle of 4 columns of scales, and 9 in the middle of 16 bytes of codes.
@pytest.mark.parametrize(
    ("choice", "width", "layout"),
    [
        *((choice, 144, "swizzled") for choice in CHOICES),
        (Prefill(128, 64), 144, "linear"),
        *(
            (choice, 160, layout)
            for choice in (Prefill(128, 128), Prefill(256, 256))
            for layout in ("linear", "swizzled")
        ),
    ],
    ids=str,
)
def test_quantized_as_the_bf16_values(choice, width, layout, cases, run, b200):
    """Whatever stands in padding rows of the activations; every byte of the result is written once."""
    where = cases.groups(SIZES, extra=256)
    a, b = operands(cases, where, width, 128)
    a.block_scales.view(torch.uint8)[~where.real] = 0x7F
    middle = run(a, b, where, choice)
    out = NVFP4Tensor(
        torch.full((where.rows, width // 2), UNTOUCHED, dtype=torch.uint8),
        torch.full(scale_shape(where.rows, width, layout), UNTOUCHED, dtype=torch.uint8).view(cases.E4M3),
        torch.tensor(0.0), layout, "tensor",
    )  # fmt: skip
    found = run(a, b, where, choice, output="nvfp4", global_scale=G_OUT, scale_layout=layout, out=out)
    written = b200.runs[-1].counters["global.store_bytes"]
    assert written == int(where.real.sum()) * width // 2 + found.block_scales.nbytes
    expected = quantize_nvfp4(middle, G_OUT)
    assert torch.equal(found.codes[where.real], expected.codes[where.real])
    assert (found.codes[~where.real] == UNTOUCHED).all()
    blocks = width // BLOCK
    wanted = expected.block_scales.view(torch.uint8).clone()
    wanted[~where.real] = 0
    assert torch.equal(scales(found)[:, :blocks], wanted)
    assert not scales(found)[:, blocks:].any(), "padding of columns"
    assert found.global_scale == torch.tensor(G_OUT)


def scale_shape(rows: int, width: int, layout: str) -> tuple[int, int]:
    return (rows, width // BLOCK) if layout == "linear" else (-(-rows // 128) * 128, -(-width // 64) * 4)


@pytest.mark.parametrize("choice", [Prefill(128, 128), Prefill(256, 256)], ids=["one CTA", "two CTAs"])
@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_one_group_of_any_rows(choice, layout, cases, run):
    where = cases.one_group(200)
    a, b = operands(cases, where, 48, 64, halves=False)
    middle = run(a, b, where, choice)
    within(middle, *cases.swiglu(cases.product(a, b, where, ulps=0.5), 10.0), where.real)
    # With two rows more than are needed, which stay as they are; scales come padded already.
    codes = torch.full((202, 24), UNTOUCHED, dtype=torch.uint8)
    raw = torch.full(scale_shape(202, 48, layout), UNTOUCHED, dtype=torch.uint8)
    out = NVFP4Tensor(codes, raw.view(cases.E4M3), torch.tensor(0.0), layout, "tensor")
    found = run(a, b, where, choice, output="nvfp4", scale_layout=layout, out=out)
    expected = quantize_nvfp4(middle, bound_global_scale(10.0))
    assert torch.equal(found.codes, expected.codes) and (codes[200:] == UNTOUCHED).all()
    assert torch.equal(scales(found)[:200, :3], expected.block_scales.view(torch.uint8))
    if layout == "linear":
        assert (raw[200:] == UNTOUCHED).all()
    else:
        assert not scales(found)[200:].any() and not scales(found)[:, 3:].any()


@pytest.mark.parametrize("limit", [10.0, 2.0**70, None])
def test_extremes(limit, cases, run):
    """Gates and ups of all sizes and signs; exp(-gate) overflows, and so do sums and results."""
    sizes = [0.0, 2.0**-10, 0.25, 1.0, 3.0, 96.0, 2688.0]
    signed = torch.tensor([*sizes, *(-x for x in sizes)])
    gate, up = (x.flatten() for x in torch.meshgrid(signed, signed, indexing="ij"))
    width = -(-len(gate) // 8) * 8
    gate, up = (torch.nn.functional.pad(x, (0, width - len(gate))).view(-1, 8) for x in (gate, up))
    columns = torch.stack((gate, up), 1).flatten()
    blocks = {2.0**-10: 2.0**-9, 96.0: 16.0, 2688.0: 448.0}
    scale = torch.tensor([blocks.get(abs(x), 0.5) for x in columns.tolist()])
    codes = reference.encode_e2m1(columns / scale)
    pad = torch.nn.functional.pad
    packed = reference.pack(pad(codes[:, None], (0, 63)))
    b = NVFP4Tensor(
        packed, pad(scale[:, None], (0, 3)).to(cases.E4M3), torch.ones(()), "linear", "tensor", True
    )
    rows = torch.tensor([1e-35, 1e-20, 1e-3, 0.04, 1.0, 3.0, 50.0, 1e9, 1e28, 1e35, -1e35, 1e37])
    ones = pad(torch.tensor([[0x02]], dtype=torch.uint8), (0, 31)).repeat(len(rows), 1)
    a = NVFP4Tensor(ones, torch.ones(len(rows), 4).to(cases.E4M3), rows, "linear", "token")
    where = cases.one_group(len(rows))
    exact = cases.product(a, b, where, ulps=0.5)
    assert torch.equal(exact.sums, columns.double() * rows.double()[:, None]), "the operands are as meant"
    infinite = (exact.sums.abs() >= 2.0**128).unflatten(-1, (-1, 2, 8)).any(-2).flatten(-2)
    h, bound = cases.swiglu(exact, limit)
    largest = torch.finfo(BF16).max
    too_large = h.abs() > largest * (1 + 2.0**-7)
    sure = ~infinite & (h.abs() < largest) | too_large
    found = run(a, b, where, limit=limit)
    assert found[infinite].isnan().all() and infinite.any() and not found[sure & ~infinite].isnan().any()
    assert found[too_large & ~infinite].isinf().all()
    fits = ~infinite & (h.abs() < largest)
    assert ((found.double() - h).abs() <= bound)[fits].all()
    if limit is None:
        assert (too_large & ~infinite).any()


def test_a_nan_makes_its_block_nan(cases, run):
    where = cases.one_group(20)
    a, b = operands(cases, where, 32, 64, halves=False)
    a.block_scales.view(torch.uint8)[3, 2] = 0x7F
    b.block_scales.view(torch.uint8)[0, 0, 1] = 0x7F  # the gate of column 0
    b.block_scales.view(torch.uint8)[0, 32 + 8 + 2, 1] = 0x7F  # the up of column 16 + 2
    nan = run(a, b, where).isnan()
    expected = torch.zeros_like(nan)
    expected[3], expected[:, 0], expected[:, 18] = True, True, True
    assert torch.equal(nan, expected)
    found = run(a, b, where, output="nvfp4")
    assert (scales(found) == 0x7F).all() and not found.codes.any(), "each row has a NaN in both blocks"


@pytest.mark.parametrize("g", [0.0, 2.0**-100, float("nan"), 1e-37])
def test_unusual_global_scales_of_the_output(g, cases, run, b200):
    """As `quantize` treats them: NaN and what is out of range give NaN, 0 gives the largest scale."""
    where, known = cases.one_group(20), torch.tensor(g)
    a, b = operands(cases, where, 32, 64)
    flat, _ = gemm_arguments.operands(a, b, None, None)
    # Straight to the operator: the function refuses what it can see on the host.
    codes, found = GROUPED_MM_SWIGLU_QUANTIZE(*flat, 10.0, known, "linear", backend="blackwell")
    expected, wanted, _ = reference.quantize(run(a, b, where), known, "tensor", 1.0, False)
    assert torch.equal(codes, expected)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_groups_without_rows_have_zero_scales(cases, run):
    where = cases.groups((0, 0), extra=384)
    a, b = operands(cases, where, 48, 64)
    for layout in ("linear", "swizzled"):
        found = run(a, b, where, output="nvfp4", scale_layout=layout)
        assert not found.block_scales.view(torch.uint8).any()
    a, b = operands(cases, cases.one_group(0), 48, 64)
    assert run(a, b, cases.one_group(0), output="nvfp4", scale_layout="swizzled").codes.shape == (0, 24)


def test_groups_may_stand_apart(cases, run):
    """Rows between groups have zero scales, also more of them than padding needs."""
    where = cases.groups((3, 140))
    offsets = where.offsets + torch.tensor([128, 384], dtype=torch.int32)
    apart = cases.Groups(offsets, where.sizes, 896, [(0, 0, 3), (1, 256, 396)])
    a, b = operands(cases, apart, 48, 64)
    for choice in (Prefill(128, 64), Prefill(256, 128)):
        middle = run(a, b, apart, choice)
        found = run(a, b, apart, choice, output="nvfp4", scale_layout="swizzled")
        wanted = quantize_nvfp4(middle, bound_global_scale(10.0)).block_scales.view(torch.uint8).clone()
        wanted[~apart.real] = 0
        assert torch.equal(scales(found)[:, :3], wanted)
