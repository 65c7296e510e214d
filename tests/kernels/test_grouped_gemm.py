"""The GEMM for many rows: each product where it belongs, exact where sums are, else within the bound."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels import gemm
from dsv4lab.kernels.choose import CHOICES, Prefill

from dsv4lab.gemm import GROUPED_MM, grouped_mm
from dsv4lab.gemm_arguments import operands
from dsv4lab.layouts import with_scale_layout

BF16 = torch.bfloat16
UNTOUCHED = 0x5A5A  # of every bf16 of an output before a kernel runs
SIZES = (5, 0, 130, 0, 0, 128, 31)
TILES = (*CHOICES, Prefill(256, 64), Prefill(256, 192))
EVERY_TILE = pytest.mark.parametrize("choice", TILES, ids=lambda c: f"{c.rows}x{c.columns}")


@pytest.fixture
def few_sms(monkeypatch):
    """So many SMs that each computes several tiles."""
    monkeypatch.setattr(gemm, "sm_count", lambda device: 4)


@pytest.fixture
def run(b200, monkeypatch):
    """Multiply with tiles of a choice, or those that are chosen; checks that nothing else is written."""

    def run(a, b, where, choice=None):
        if choice is not None:
            monkeypatch.setattr(gemm, "choose", lambda *sizes: choice)
        n = b.shape[-2]
        out = torch.full((where.rows + 3, n), UNTOUCHED, dtype=torch.int16).view(BF16)
        result = grouped_mm(a, b, where.offsets, where.sizes, out=out, backend="blackwell")
        assert result.shape == (where.rows, n) and result.data_ptr() == out.data_ptr()
        assert (out[where.rows :].view(torch.int16) == UNTOUCHED).all(), "wrote behind the last row"
        return result

    return run


@EVERY_TILE
def test_groups_are_exact(choice, cases, run, few_sms):
    """No sum is rounded, so that all is equal to the last bit; N and K are no multiples of any tile's."""
    where, n, k = cases.groups(SIZES, extra=128), 200, 352
    g_a = 2.0 ** torch.randint(-3, 4, (where.rows,))
    g_b = 2.0 ** torch.arange(-3.0, 4.0)
    a = cases.nvfp4((where.rows, k), 0, g_a, "token", exact=True)
    b = cases.nvfp4((len(SIZES), n, k), 1, g_b, exact=True)
    result = run(a, b, where, choice)
    exact = cases.product(a, b, where).sums
    assert torch.equal(result[where.real], exact.to(BF16)[where.real])
    # Warps without a real row store nothing: at most 31 rows of padding follow a group's last one.
    padding = ~where.real
    for _, _, stop in where.spans:
        padding[stop : -(-stop // 32) * 32] = False
    assert (result[padding].view(torch.int16) == UNTOUCHED).all()


@EVERY_TILE
def test_one_group_of_any_rows(choice, cases, run, few_sms):
    where, n, k = cases.one_group(300), 136, 608
    a, b = cases.nvfp4((300, k), 2, torch.tensor(0.37)), cases.nvfp4((n, k), 3, torch.tensor(1.3))
    cases.check(run(a, b, where, choice), cases.product(a, b, where, ulps=0.5), where)


@pytest.mark.parametrize("choice", [Prefill(128, 192), Prefill(256, 128)], ids=["192 columns", "two CTAs"])
def test_one_hot_rows_pick_values(choice, cases, run, few_sms):
    """Row i of the identity picks column i of the weights, whose values have six significant bits."""
    k, where = 320, cases.one_group(320)
    b = cases.nvfp4((416, k), 4)
    codes = 2 * torch.eye(k, dtype=torch.uint8)  # code 2 is 1.0
    ones = torch.ones(k, k // 16).to(cases.E4M3)
    identity = b.with_(codes=codes[:, 0::2] + 16 * codes[:, 1::2], block_scales=ones)
    assert torch.equal(run(identity, b, where, choice).double(), cases.values(b).T)


@pytest.mark.parametrize("weights", ["one", "group", "interleaved", "halves"])
@pytest.mark.parametrize("rows", ["tensor", "token", "group"])
def test_global_scales(rows, weights, cases, run):
    where, n, k = cases.groups((3, 40, 0)), 48, 64
    count = {"tensor": (), "token": (where.rows,), "group": (3,)}[rows]
    r = torch.Generator().manual_seed(5)
    g_a = torch.rand(count, generator=r) + 0.5
    g_b = torch.rand({"one": (), "group": (3,)}.get(weights, (3, 2)), generator=r) + 0.5
    a = cases.nvfp4((where.rows, k), 6, g_a, rows)
    b = cases.nvfp4((3, n, k), 7, g_b, interleaved=weights == "interleaved")
    cases.check(run(a, b, where, Prefill(128, 64)), cases.product(a, b, where, ulps=0.5), where)


def test_scale_layouts_give_the_same_bits(cases, run):
    where = cases.groups((60, 7))
    a, b = cases.nvfp4((where.rows, 192), 8), cases.nvfp4((2, 80, 192), 9)
    first = run(a, b, where)[where.real]
    for swizzled in ((a, with_scale_layout(b, "swizzled")), (with_scale_layout(a, "swizzled"), b)):
        assert torch.equal(run(*swizzled, where)[where.real], first)


@pytest.mark.parametrize("k", [16, 48, 272])
def test_k_that_is_no_multiple_of_32(k, cases, run):
    where = cases.one_group(9)
    for layout in ("linear", "swizzled"):
        a, b = (with_scale_layout(cases.nvfp4((rows, k), rows, exact=True), layout) for rows in (9, 24))
        linear = [with_scale_layout(t, "linear") for t in (a, b)]
        assert torch.equal(run(a, b, where), cases.product(*linear, where).sums.to(BF16))


@pytest.mark.parametrize(("n", "k"), [(64, 7168), (32, 3072), (24, 2048)])
def test_depths_of_deepseek_v4(n, k, cases, run):
    where = cases.groups((1, 0, 6))
    a = cases.nvfp4((where.rows, k), 10, torch.rand(where.rows) + 0.5, "token")
    b = cases.nvfp4((3, n, k), 11, torch.rand(3) + 0.5)
    cases.check(run(a, b, where), cases.product(a, b, where, ulps=0.5), where)


def test_many_groups_most_of_them_empty(cases, run, few_sms, b200):
    """More groups than a warp has lanes; the ones in use lie on both sides of those that it sees at once."""
    sizes = [0] * 129
    for group, size in ((0, 1), (31, 2), (32, 129), (63, 3), (100, 1), (128, 4)):
        sizes[group] = size
    where = cases.groups(sizes)
    a = cases.nvfp4((where.rows, 64), 12, exact=True)
    b = cases.nvfp4((129, 72, 64), 13, 2.0 ** torch.randint(-4, 5, (129,)), exact=True)
    result = run(a, b, where, Prefill(128, 64))
    assert torch.equal(result[where.real], cases.product(a, b, where).sums.to(BF16)[where.real])
    assert b200.runs[-1].counters["mma.mxf4nvf4"] == 7 * 2 * 4, "none is computed twice"


def test_groups_may_stand_apart(cases, run):
    """Offsets beyond the padding that groups need; what lies between belongs to nobody."""
    where = cases.groups((3, 140))
    offsets = where.offsets + torch.tensor([128, 384], dtype=torch.int32)
    apart = cases.Groups(offsets, where.sizes, 768, [(0, 0, 3), (1, 256, 396)])
    a, b = cases.nvfp4((768, 64), 14, exact=True), cases.nvfp4((2, 64, 64), 15, exact=True)
    result = run(a, b, apart)
    assert torch.equal(result[apart.real], cases.product(a, b, apart).sums.to(BF16)[apart.real])


def test_nan_goes_to_its_row_or_column_and_nowhere_else(cases, run):
    where = cases.one_group(20)
    a, b = cases.nvfp4((20, 64), 16), cases.nvfp4((40, 64), 17)
    for t, row in ((a, 3), (b, 5)):
        t.block_scales.view(torch.uint8)[row, 2] = 0x7F
    nan = run(a, b, where).isnan()
    expected = torch.zeros_like(nan)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(nan, expected)


def test_rows_behind_2_to_the_31_elements(b200):
    """Two groups 2^25 rows apart; memory in between is never touched, so that it does not exist."""
    start, n, k = 2**25, 64, 64
    rows = start + 128
    codes = torch.empty(rows, k // 2, dtype=torch.uint8)
    scales = torch.empty(rows, 4, dtype=torch.uint8)
    out = torch.empty(rows, n, dtype=BF16)
    assert out[start:].storage_offset() >= 2**31
    for row in (0, start):
        codes[row : row + 128] = 0x22  # 1.0
        scales[row : row + 128] = 0x38  # 1.0
    codes[start + 2] = 0x44  # 2.0
    weights = torch.full((2, n, k // 2), 0x22, dtype=torch.uint8)
    weight_scales = torch.full((2, 128, 4), 0x38, dtype=torch.uint8)
    e4m3 = torch.float8_e4m3fn
    GROUPED_MM.out(
        codes, scales.view(e4m3), torch.ones(()), "swizzled", "tensor", weights, weight_scales.view(e4m3),
        torch.tensor([1.0, 3.0]), "swizzled", False, torch.tensor([start, rows], dtype=torch.int32),
        torch.tensor([2, 3], dtype=torch.int32), outs=(out,), backend="blackwell",
    )  # fmt: skip
    assert out[:2].eq(64).all()
    assert out[start : start + 2].eq(3 * 64).all() and out[start + 2].eq(3 * 128).all()


def test_what_kernels_do_not_take_is_copied(cases, run):
    """Views that are not contiguous or begin anywhere, and leading dimensions."""
    wide = cases.nvfp4((12, 128), 18, torch.rand(13)[1:], "token", exact=True)
    a = wide.with_(codes=wide.codes[:, :32], block_scales=wide.block_scales[:, :4])
    b, where = cases.nvfp4((16, 64), 19, exact=True), cases.one_group(12)
    expected = cases.product(a, b, where)
    cases.check(run(a, b, where), expected, where)
    lead = a.with_(
        codes=a.codes.view(3, 4, 32), block_scales=a.block_scales.unflatten(0, (3, 4)),
        global_scale=a.global_scale.view(3, 4),
    )  # fmt: skip
    cases.check(grouped_mm(lead, b, backend="blackwell").view(12, 16), expected, where)
    strided = torch.zeros(12, 32, dtype=BF16)[:, ::2]
    grouped_mm(a, b, out=strided, backend="blackwell")
    cases.check(strided, expected, where)


def test_nothing_to_compute(cases, b200):
    before = len(b200.launches)
    a, b, where = cases.nvfp4((0, 64)), cases.nvfp4((2, 16, 64)), cases.groups((0, 0))
    assert grouped_mm(a, b, where.offsets, where.sizes, backend="blackwell").shape == (0, 16)
    assert grouped_mm(cases.nvfp4((3, 64)), cases.nvfp4((0, 64)), backend="blackwell").shape == (3, 0)
    a, b, none = cases.nvfp4((128, 64)), cases.nvfp4((0, 16, 64)), torch.empty(0, dtype=torch.int32)
    assert grouped_mm(a, b, none, none, backend="blackwell").shape == (128, 16)
    assert len(b200.launches) == before


def test_groups_without_rows_write_nothing(cases, run):
    where = cases.groups((0, 0), extra=256)
    result = run(cases.nvfp4((256, 64), 21), cases.nvfp4((2, 16, 64), 22), where)
    assert (result.view(torch.int16) == UNTOUCHED).all()


def test_refused(cases, b200):
    b = cases.nvfp4((16, 64), 23)
    with pytest.raises(ValueError, match="multiplies NVFP4 activations only, got bf16 ones"):
        grouped_mm(torch.ones(2, 64, dtype=BF16), b, backend="blackwell")
    with pytest.raises(ValueError, match="N % 8 == 0, got N = 12"):
        grouped_mm(cases.nvfp4((2, 64), 0), cases.nvfp4((12, 64), 0), backend="blackwell")
    huge = torch.empty(1, dtype=torch.uint8).expand(2**31 - 256, 32)
    with pytest.raises(ValueError, match="kernels count up to"):
        scales = torch.empty(1, dtype=cases.E4M3).expand(2**31 - 256, 4)
        gemm.prepare(huge, scales, torch.ones(()), "swizzled", "tensor", *operands(b, b, None, None)[0][5:])


def test_swizzled_weights_are_kept_and_made_anew_when_they_change(cases, run, monkeypatch):
    made = []
    swizzle = gemm.weights.reference.swizzle
    monkeypatch.setattr(gemm.weights.reference, "swizzle", lambda t: made.append(1) or swizzle(t))
    where = cases.one_group(4)
    a = with_scale_layout(cases.nvfp4((4, 64), 24, exact=True), "swizzled")
    made.clear()
    b = cases.nvfp4((32, 64), 25, exact=True)
    first = run(a, b, where)
    assert torch.equal(run(a, b, where), first) and len(made) == 1
    b.block_scales.view(torch.uint8).add_(8)  # twice as large
    assert torch.equal(run(a, b, where), 2 * first) and len(made) == 2
    del b
    assert not [t for t in gemm.weights._kept if t.shape == (32, 4)]
