"""Hopper's GEMM for many tokens: products where they belong, exact where sums are, always the same bits."""

from __future__ import annotations

import re

import pytest
import torch
from dsv4lab.kernels import gemm, grouped_gemm_sm90a, hopper_gemm, sass
from dsv4lab.kernels.gemm_sm90a_choice import CHOICES as CHOSEN
from dsv4lab.kernels.gemm_sm90a_choice import Many, best
from torch import Tensor

from dsv4lab.emulator import device
from dsv4lab.formats import NVFP4Tensor, scales_shape
from dsv4lab.gemm_arguments import operands
from dsv4lab.layouts import unswizzle_scales, with_scale_layout
from dsv4lab.quantize import quantize_nvfp4

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
UNTOUCHED = 0xA5  # of every byte of an output before a kernel runs
LIMIT, G_OUT = 10.0, 0.037
SIZES = (5, 0, 130, 0, 0, 128, 31)
CHOICES = (
    Many(64, 2, 64),
    Many(32, 1, 128),
    Many(96, 1, 64, split=2),  # K ends within a CTA's share, chunks of block scales are shared by tiles
    Many(64, 2, 64, split=4),
    Many(192, 2, 64),  # registers are moved, tiles reach into the next group
    Many(64, 1, 256, split=2),
    Many(64, 2, 128, halves=2),  # four warpgroups, of which two multiply each half of a stage
    Many(128, 1, 256, halves=2, split=2),
    Many(256, 2, 64, split=2),
)
EVERY = pytest.mark.parametrize("choice", CHOICES, ids=str)


@pytest.fixture(scope="module")
def gpu(request):
    """An emulated H200 with all checks; it compiles a kernel once. The parameter seeds what comes first."""
    with device("sm_90a", trace=False, seed=getattr(request, "param", 0)) as gpu:
        yield gpu


@pytest.fixture(autouse=True)
def few_sms(monkeypatch):
    """So many SMs that each computes several tiles."""
    monkeypatch.setattr(grouped_gemm_sm90a, "sm_count", lambda device: 4)


def bf16(shape, seed=0, exact=False) -> Tensor:
    """Normal values, or `exact`: multiples of 1/2 up to 6."""
    r = torch.Generator().manual_seed(seed)
    if exact:
        return (torch.randint(-12, 13, shape, generator=r) / 2).to(BF16)
    return torch.randn(shape, generator=r).to(BF16)


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count,), UNTOUCHED, dtype=torch.uint8).view(dtype).view(shape)


def multiply(a, b, where, choice, kind="bf16", limit=LIMIT, layout="swizzled") -> tuple[Tensor, ...]:
    """The kernel's output, bf16 or codes and bytes of scales; checks which rows are written."""
    product = hopper_gemm.prepare(*operands(a, b, where.offsets, where.sizes)[0])
    shape = (where.rows + 3, product.n // (1 if kind == "bf16" else 2))
    if kind == "nvfp4":
        codes = untouched((shape[0], shape[1] // 2), torch.uint8)
        scales = untouched(scales_shape((where.rows, shape[1]), layout), E4M3)
        tensors = (codes, scales, torch.tensor(G_OUT))
    else:
        tensors = (untouched(shape, BF16),)
    output = gemm.Output(kind, None if kind == "bf16" else limit, layout == "swizzled", tensors)
    grouped_gemm_sm90a.run(product, output, choice)
    others = torch.ones(len(tensors[0]), dtype=torch.bool)
    for _, start, stop in where.spans:
        # TMA stores 32 rows at a time, and none behind the buffer.
        end = stop if kind == "nvfp4" else start - (start - stop) // 32 * 32
        others[start : min(end, where.rows)] = False
    assert (tensors[0][others].view(torch.uint8) == UNTOUCHED).all(), "wrote to rows without a token"
    return (tensors[0][: where.rows], *(scales.view(torch.uint8) for scales in tensors[1:2]))


def sums(cases, a: NVFP4Tensor | Tensor, b: NVFP4Tensor, where, choice: Many, ulps: float = 0.5):
    """In float64; the sums of CTAs that share K are rounded as often as there are of them."""
    exact = cases.product(a, b, where, ulps, depth=16)
    return cases.Exact(exact.sums, exact.error * (1 + choice.split * 16 / a.shape[-1]))


def within(found: Tensor, expected: Tensor, bound: Tensor, rows: Tensor) -> None:
    wrong = ~((found.double() - expected).abs() <= bound) & rows[:, None]
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {wrong.nonzero()[0].tolist()}"


def gated(cases, where, width: int, k: int):
    """Activations and interleaved weights, such that about a quarter of the gates is clamped."""
    groups = 1 if where.sizes is None else len(where.sizes)
    g_b = (torch.rand((groups, 2), generator=torch.Generator().manual_seed(1)) + 0.5) * 0.02
    return bf16((where.rows, k)), cases.nvfp4((groups, 2 * width, k), 1, g_b, interleaved=True)


@EVERY
def test_one_group_of_any_rows(choice, cases, gpu):
    """Neither tokens, features nor K are multiples of a tile's."""
    where, n, k = cases.one_group(300), 200, 352
    a, b = bf16((300, k)), cases.nvfp4((n, k), 1, torch.tensor(1.3))
    cases.check(multiply(a, b, where, choice)[0], sums(cases, a, b, where, choice), where)


@EVERY
def test_groups_are_exact(choice, cases, gpu):
    """No sum is rounded, so that all is equal to the last bit."""
    where, n, k = cases.groups(SIZES, extra=128), 136, 320
    a = bf16((where.rows, k), 2, exact=True)
    b = cases.nvfp4((len(SIZES), n, k), 3, 2.0 ** torch.arange(-3.0, 4.0), exact=True)
    found = multiply(a, b, where, choice)[0]
    assert torch.equal(found[where.real], cases.product(a, b, where).sums.to(BF16)[where.real])


@pytest.mark.parametrize("choice", [CHOICES[0], CHOICES[6]], ids=str)
def test_one_hot_rows_pick_values(choice, cases, gpu):
    """Row i of the identity picks column i of the weights: every code with block scales of every size."""
    k, where = 256, cases.one_group(256)
    b = cases.nvfp4((136, k), 4)
    b.block_scales.view(torch.uint8)[:127, 3] = torch.arange(127, dtype=torch.uint8)
    b.codes[:, 24:32] = torch.arange(0, 256, 33, dtype=torch.uint8)
    found = multiply(torch.eye(k, dtype=BF16), b, where, choice)[0]
    assert torch.equal(found.double(), cases.values(b).T)


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize(
    ("granularity", "weights", "choice"),
    [
        ("tensor", "group", Many(64, 2, 64)),
        ("token", "interleaved", Many(64, 2, 64, split=2)),
        ("group", "halves", Many(32, 1, 128)),
    ],
)
def test_nvfp4_activations(granularity, weights, choice, layout, cases, gpu):
    where, n, k = cases.groups((3, 140, 0)), 144, 192
    g_a = torch.rand({"tensor": (), "token": (where.rows,), "group": (3,)}[granularity]) + 0.5
    g_b = torch.rand((3,) if weights == "group" else (3, 2)) + 0.5
    a = with_scale_layout(cases.nvfp4((where.rows, k), 5, g_a, granularity), layout)
    b = cases.nvfp4((3, n, k), 6, g_b, interleaved=weights == "interleaved")
    found = multiply(a, b, where, choice)[0]
    cases.check(found, sums(cases, with_scale_layout(a, "linear"), b, where, choice), where)


@pytest.mark.parametrize("choice", CHOICES[::2], ids=str)
def test_activation(choice, cases, gpu):
    where = cases.groups((5, 0, 130, 31), extra=128)
    a, b = gated(cases, where, 104, 272)
    exact = sums(cases, a, b, where, choice)
    gates = exact.sums.unflatten(-1, (-1, 2, 8))[..., 0, :].flatten(-2)[where.real]
    assert 0.05 < (gates > LIMIT).double().mean() < 0.45
    found = multiply(a, b, where, choice, "swiglu")[0]
    within(found, *cases.swiglu(exact, LIMIT), where.real)


# 9 blocks end in the middle of 4 columns of scales and of 16 bytes of codes.
@pytest.mark.parametrize(
    ("choice", "width", "layout"),
    [
        *((choice, 144, "swizzled") for choice in CHOICES[1::2]),
        (Many(64, 2, 64), 144, "linear"),
        (Many(192, 2, 64), 160, "linear"),
        (Many(64, 2, 64, split=4), 160, "swizzled"),
    ],
    ids=str,
)
def test_quantized_as_the_bf16_values(choice, width, layout, cases, gpu):
    where = cases.groups((5, 0, 130, 31), extra=256)
    a, b = gated(cases, where, width, 272)
    middle = multiply(a, b, where, choice, "swiglu")[0]
    codes, scales = multiply(a, b, where, choice, "nvfp4", layout=layout)
    expected = quantize_nvfp4(middle, G_OUT)
    assert torch.equal(codes[where.real], expected.codes[where.real])
    wanted = expected.block_scales.view(torch.uint8).clone()
    wanted[~where.real] = 0
    if layout == "swizzled":
        scales = unswizzle_scales(scales, *scales.shape)
    assert torch.equal(scales[:, : width // 16], wanted)
    assert not scales[:, width // 16 :].any(), "padding of columns"


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_one_group_is_quantized(layout, cases, gpu):
    where, choice = cases.one_group(200), Many(32, 1, 128)
    a, b = gated(cases, where, 48, 64)
    middle = multiply(a, b, where, choice, "swiglu")[0]
    codes, scales = multiply(a, b, where, choice, "nvfp4", layout=layout)
    expected = quantize_nvfp4(middle, G_OUT)
    if layout == "swizzled":
        scales = unswizzle_scales(scales, *scales.shape)
        assert not scales[200:].any() and not scales[:, 3:].any()
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scales[:200, :3], expected.block_scales.view(torch.uint8))


def test_nan_goes_to_its_row_or_column_and_nowhere_else(cases, gpu):
    """NaN block scales in both rows of a thread, and a NaN or Inf of a token."""
    where = cases.one_group(40)
    a, b = bf16((40, 128), 7), cases.nvfp4((72, 128), 8)
    a[3, 70], a[11, 5] = float("nan"), float("nan")
    for row, block in ((5, 2), (13, 3), (64, 7)):
        b.block_scales.view(torch.uint8)[row, block] = 0x7F
        b.codes[row, 8 * block : 8 * block + 8] = 0x22 if row == 5 else 0
    found = multiply(a, b, where, Many(64, 2, 64))[0]
    nan = torch.zeros_like(found, dtype=torch.bool)
    nan[[3, 11]], nan[:, [5, 13, 64]] = True, True
    assert torch.equal(found.isnan(), nan)


@pytest.mark.parametrize("gpu", range(3), indirect=True)
def test_sums_are_added_in_the_order_of_ranks_whatever_comes_first(cases, gpu):
    where, choice = cases.one_group(64), Many(64, 2, 64, split=4)
    a, b = bf16((64, 256), 9, exact=True), cases.nvfp4((128, 256), 10, exact=True)
    # What the first CTA adds the third one takes away: what is small is rounded between them only.
    a[:, :64] *= 2.0**20
    a[:, 128:192] = -a[:, :64]
    b.codes[:, 64:96], b.block_scales[:, 8:12] = b.codes[:, :32], b.block_scales[:, :4]
    x, w = a.double().unflatten(1, (4, 64)), cases.values(b).unflatten(1, (4, 64))
    parts = torch.einsum("trk,nrk->rtn", x, w)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    found = multiply(a, b, where, choice)[0]
    assert torch.equal(found, total.to(BF16)) and not torch.equal(found, parts.sum(0).to(BF16))


def test_groups_without_rows_write_nothing(cases, gpu):
    where = cases.groups((0, 0), extra=256)
    a, b = bf16((256, 64)), cases.nvfp4((2, 64, 64), 11)
    multiply(a, b, where, Many(64, 2, 64))


@pytest.mark.parametrize("k", [16, 48])
@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
def test_k_that_is_no_multiple_of_32(k, activations, cases, gpu):
    where, b = cases.one_group(40), cases.nvfp4((24, k), 12, exact=True)
    a = bf16((40, k), 13, True) if activations == "bf16" else cases.nvfp4((40, k), 13, exact=True)
    found = multiply(a, b, where, Many(64, 2, 64))[0]
    assert torch.equal(found, cases.product(a, b, where).sums.to(BF16))


def test_a_cta_without_a_stage_is_refused(cases, gpu):
    where, b = cases.one_group(40), cases.nvfp4((24, 128), 14)
    with pytest.raises(ValueError, match="4 CTAs cannot share K = 128, which is less than 64 for each"):
        multiply(bf16((40, 128)), b, where, Many(64, 2, 64, split=4))


@pytest.mark.parametrize("choice", CHOSEN, ids=str)
def test_choices_have_shared_memory_for_a_ring(choice):
    """Sums that are exchanged stand where the ring was."""
    form = choice.form
    assert form.stages >= 2 and form.stages * form.stage_bytes >= form.parts_bytes
    assert form.stored % 8 == 0 and form.split <= 8


def test_choices_suit_the_sizes():
    rows = {tokens: best(tokens, 6144, 7168, None, 132, False)[0].rows for tokens in (32, 64, 128, 4096)}
    assert rows == {32: 32, 64: 64, 128: 128, 4096: 256}
    assert best(64, 4096, 4096, None, 132, False)[0].split == 2, "there are fewer tiles than SMs"
    assert best(64, 64, 64, None, 132, False)[0].split == 1, "K is a single stage"
    bf16, nvfp4 = (best(64, 6144, 7168, None, 132, dequantizes)[1] for dequantizes in (False, True))
    assert bf16 < nvfp4


def written(instruction: sass.Instruction) -> set[int]:
    """Registers that an instruction writes, by its first operand."""
    first = re.match(r"R(\d+)\b", instruction.operands)
    if not first or instruction.name in ("STS", "STG", "STL", "HGMMA", "SYNCS"):
        return set()
    wide = {"128": 4, "64": 2, "WIDE": 2}
    count = max((wide.get(modifier, 1) for modifier in instruction.opcode.split(".")), default=1)
    return set(range(int(first[1]), int(first[1]) + count))


@pytest.mark.parametrize(
    "choice", [Many(256, 2, 64), Many(64, 2, 256, halves=2, split=2), Many(128, 2, 128, split=2)], ids=str
)
def test_registers_of_mmas_in_flight_are_left_alone(choice, cases, gpu):
    """What the assembler makes of the main loop, which it forgets the MMAs of at the end of each round."""
    where, b = cases.one_group(8), cases.nvfp4((8, 512), 15)
    multiply(bf16((8, 512)), b, where, choice)
    (code,) = sass.read(gpu.launches[-1].module.cubin).values()
    loop = code.loop_with("HGMMA")
    mmas = [i for i, instruction in enumerate(loop) if instruction.name == "HGMMA"]
    assert len(mmas) == 4 * choice.form.own_slices and not code.count("LDL", "STL")
    for start in mmas:
        a = int(loop[start].operands.split(",")[1][1:])
        for instruction in (*loop[start + 1 :], *loop):
            if instruction.matches("WARPGROUP.DEPBAR"):
                break
            assert not written(instruction) & set(range(a, a + 4)), f"{loop[start]}, then {instruction}"
