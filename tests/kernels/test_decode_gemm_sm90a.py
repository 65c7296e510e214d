"""Hopper's GEMM for few tokens: products where they belong, nothing elsewhere, always the same bits."""

from __future__ import annotations

import functools

import pytest
import torch
from dsv4lab.kernels import decode_gemm_sm90a, gemm, hopper_gemm
from dsv4lab.kernels.decode_sm90a_choice import Decode
from dsv4lab.kernels.decode_sm90a_form import DEPTH, Form
from dsv4lab.kernels.decode_sm90a_mainloop import place_in_ring
from torch import Tensor

from dsv4lab import reference
from dsv4lab.emulator import device
from dsv4lab.formats import NVFP4Tensor, scales_shape
from dsv4lab.gemm_arguments import operands

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
UNTOUCHED = 0xA5  # of every byte of an output before a kernel runs
LIMIT = 10.0
SIZES = (0, 3, 17, 0, 0, 1, 0)


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count,), UNTOUCHED, dtype=torch.uint8).view(dtype).view(shape)


def multiply(a, b, where, choice, kind="bf16", limit=LIMIT, g=0.03, layout="swizzled") -> tuple[Tensor, ...]:
    """The kernel's output, bf16 or codes and bytes of scales; checks that rows without a token stay."""
    product = hopper_gemm.prepare(*operands(a, b, where.offsets, where.sizes)[0])
    shape = (where.rows + 3, product.n // (1 if kind == "bf16" else 2))
    if kind == "nvfp4":
        codes = untouched((shape[0], shape[1] // 2), torch.uint8)
        scales = untouched(scales_shape((where.rows, shape[1]), layout), E4M3)
        tensors = (codes, scales, torch.tensor(g))
    else:
        tensors = (untouched(shape, BF16),)
    decode_gemm_sm90a.run(product, gemm.Output(kind, limit, layout == "swizzled", tensors), choice)
    others = torch.ones(len(tensors[0]), dtype=torch.bool)
    others[: where.rows] = ~where.real
    assert (tensors[0][others].view(torch.uint8) == UNTOUCHED).all(), "wrote to rows without a token"
    return (tensors[0][: where.rows], *(scales.view(torch.uint8) for scales in tensors[1:2]))


def bf16(shape, seed=0, exact=False) -> Tensor:
    """Normal values, or `exact`: multiples of 1/2 up to 6."""
    r = torch.Generator().manual_seed(seed)
    if exact:
        return (torch.randint(-12, 13, shape, generator=r) / 2).to(BF16)
    return torch.randn(shape, generator=r).to(BF16)


def sums(cases, a: NVFP4Tensor | Tensor, b: NVFP4Tensor, where, choice: Decode, ulps: float = 0.5):
    """In float64; adding up the sums of warps and CTAs rounds as often as there are of them."""
    exact = cases.product(a, b, where, ulps, depth=16)
    return cases.Exact(exact.sums, exact.error * (1 + choice.along * choice.split * 16 / a.shape[-1]))


def swizzled(a: NVFP4Tensor) -> NVFP4Tensor:
    return a.with_(block_scales=reference.swizzle(a.block_scales), scale_layout="swizzled")


@pytest.fixture(scope="module")
def gpu(request):
    """An emulated H200 with all checks; it compiles a kernel once."""
    with device(**{"arch": "sm_90a", "trace": False, **getattr(request, "param", {})}) as gpu:
        yield gpu


def on(*options: dict):
    """Run a test on such GPUs."""
    names = [" ".join(f"{key} {value}" for key, value in each.items()) for each in options]
    return pytest.mark.parametrize("gpu", options, indirect=True, ids=names)


@pytest.fixture(autouse=True)
def few_sms(monkeypatch):
    """So many SMs that each computes several tiles."""
    monkeypatch.setattr(decode_gemm_sm90a, "sm_count", lambda device: 4)


@pytest.mark.parametrize(
    ("rows", "choice", "n", "k"),
    [
        (1, Decode(2, 4, 2, 8, 1), 128, 128),  # a step: one warp has nothing to do
        (1, Decode(2, 4, 2, 8, 4), 136, 1024),
        (3, Decode(1, 3, 3, 8, 2), 264, 1056),  # K and N end within a tile, CTAs have unequal shares
        (8, Decode(1, 7, 2, 8, 4), 8, 384),  # a CTA without a step
        (17, Decode(2, 1, 4, 8, 1), 128, 576),  # three blocks of tokens
        (17, Decode(5, 1, 2, 16, 2), 384, 64),
        (9, Decode(7, 1, 3, 16, 1), 448, 2048),  # tiles that begin in the middle of a chunk of scales
        (40, Decode(2, 2, 2, 32, 4), 256, 1024),
        (3, Decode(2, 1, 2, 8, 2), 264, 8192),
    ],
    ids=str,
)
def test_one_group_of_bf16(rows, choice, n, k, cases, gpu):
    where, a, b = cases.one_group(rows), bf16((rows, k)), cases.nvfp4((n, k), 1, torch.tensor(1.3))
    cases.check(multiply(a, b, where, choice)[0], sums(cases, a, b, where, choice), where)


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize(
    ("granularity", "weights", "choice"),
    [
        ("tensor", "group", Decode(2, 2, 3, 8, 1)),
        ("token", "interleaved", Decode(3, 2, 2, 16, 2)),
        ("group", "halves", Decode(3, 1, 2, 8, 2)),
    ],
)
def test_groups_of_which_some_are_empty(granularity, weights, choice, layout, cases, gpu):
    where, n, k = cases.groups(SIZES, extra=128), 144, 576
    g_a = torch.rand({"tensor": (), "token": (where.rows,), "group": (7,)}[granularity]) + 0.5
    g_b = torch.rand((7,) if weights == "group" else (7, 2)) + 0.5
    a = cases.nvfp4((where.rows, k), 4, g_a, granularity)
    b = cases.nvfp4((7, n, k), 5, g_b, interleaved=weights == "interleaved")
    found = multiply(swizzled(a) if layout == "swizzled" else a, b, where, choice)[0]
    cases.check(found, sums(cases, a, b, where, choice), where)


def test_more_steps_than_stages(cases, gpu):
    where, choice = cases.one_group(3), Decode(2, 1, 3, 8, 2, ctas=2)
    a, b = bf16((3, 16384)), cases.nvfp4((72, 16384), 2)
    cases.check(multiply(a, b, where, choice)[0], sums(cases, a, b, where, choice), where)


@pytest.mark.parametrize(("along", "steps"), [(3, 7), (4, 3), (2, 8)])
def test_a_stage_has_steps_of_one_turn_only_round_after_round(along, steps):
    """Who waits for a stage has had it in the round before: parities of rounds two apart are equal."""
    form, rounds = Form(2, 1, along, 8, ctas=2), {}
    for count in range(9):
        for step in range(steps):
            slot, round_ = place_in_ring(form, step, steps, count)
            assert slot // form.depth == step % along and slot < form.stages
            assert round_ == rounds.get(slot, -1) + 1
            rounds[slot] = round_


@on({"mma": "hardware"})
def test_as_hardware_rounds(cases, gpu):
    where, choice = cases.one_group(5), Decode(2, 2, 2, 8, 2)
    a, b = bf16((5, 1056)), cases.nvfp4((136, 1056), 3)
    cases.check(multiply(a, b, where, choice)[0], sums(cases, a, b, where, choice, 1.0), where)


@pytest.mark.parametrize("k", [16, 48, 272])
@pytest.mark.parametrize("activations", ["bf16", "linear", "swizzled"])
def test_k_that_is_no_multiple_of_32(k, activations, cases, gpu):
    where, b = cases.one_group(9), cases.nvfp4((24, k), 9, exact=True)
    a = bf16((9, k), 8, True) if activations == "bf16" else cases.nvfp4((9, k), 8, exact=True)
    given = swizzled(a) if activations == "swizzled" else a
    found = multiply(given, b, where, Decode(1, 2, 2, 8, 1))[0]
    assert torch.equal(found, cases.product(a, b, where).sums.to(BF16))


@pytest.mark.parametrize("choice", [Decode(4, 2, 1, 8, 1), Decode(2, 1, 2, 32, 2)], ids=str)
def test_one_hot_tokens_pick_weights_exactly(choice, cases, gpu):
    """Every code and every scale but that of NaN, in their places."""
    where, n, k = cases.one_group(64), 256, 512
    b = cases.nvfp4((n, k), 11)
    b.block_scales.view(torch.uint8).view(-1)[:127] = torch.arange(127)
    b.codes[0, :128] = torch.arange(0, 256, 2)
    hot = 8 * torch.arange(64) + torch.arange(64) % 8
    a = torch.nn.functional.one_hot(hot, k).to(BF16)
    assert torch.equal(multiply(a, b, where, choice)[0].double(), cases.values(b)[:, hot].T)


def test_one_hot_weights_pick_tokens_exactly(cases, gpu):
    where, n, k = cases.groups((40, 0, 9)), 256, 1024
    a, b = cases.nvfp4((where.rows, k), 12), cases.nvfp4((3, n, k), 13)
    hot = 3 * torch.arange(n)
    codes = torch.zeros(3, n, k, dtype=torch.uint8)
    codes[:, torch.arange(n), hot] = 2  # code 2 is 1.0
    b.block_scales.view(torch.uint8).fill_(0x38)  # 1.0
    b = b.with_(codes=codes[..., 0::2] + 16 * codes[..., 1::2])
    found = multiply(a, b, where, Decode(1, 4, 3, 16, 2))[0]
    assert torch.equal(found.double()[where.real], cases.values(a)[:, hot][where.real])


def added_up(x: Tensor, w: Tensor, ranks: list[int], warps: list[int]) -> Tensor:
    """In float32, of 12 steps that 4 CTAs of 3 warps share: MMAs, then warps, then CTAs in this order."""

    def share(step: int) -> Tensor:
        total = torch.zeros(len(x), len(w))
        for i in range(8):
            # What an MMA has: of each quarter of the step four values, those of two pairs.
            k = [32 * t + 8 * (i // 2) + 2 * (i % 2) + j for t in range(4) for j in (0, 4, 1, 5)]
            k = torch.tensor(k) + step * DEPTH
            total = (total.double() + x[:, k] @ w[:, k].T).float()
        return total

    def in_order(parts: list[Tensor]) -> Tensor:
        return functools.reduce(torch.add, parts)

    return in_order([in_order([share(3 * rank + warp) for warp in warps]) for rank in ranks]).to(BF16)


@on(*({"seed": seed} for seed in range(3)))
def test_sums_are_added_in_the_order_of_warps_and_ranks_whatever_comes_first(cases, gpu):
    where, k = cases.one_group(3), 12 * DEPTH
    a, b = bf16((3, k), 16), cases.nvfp4((72, k), 17)
    # What the first warp adds one of the third CTA takes away: what is small is rounded between them only.
    a[:, :DEPTH] *= 2.0**20
    a.view(3, 12, DEPTH)[:, 7] = -a[:, :DEPTH]
    for tensor in (b.codes, b.block_scales.view(torch.uint8)):
        steps = tensor.view(72, 12, -1)
        steps[:, 7] = steps[:, 0]
    x, w = a.double(), cases.values(b)
    ranks, warps = [0, 1, 2, 3], [0, 1, 2]
    expected = added_up(x, w, ranks, warps)
    assert (expected != added_up(x, w, ranks[::-1], warps)).any()
    assert (expected != added_up(x, w, ranks, warps[::-1])).any()
    assert torch.equal(multiply(a, b, where, Decode(2, 1, 3, 8, 4))[0], expected)


@pytest.mark.parametrize(("limit", "weights"), [(LIMIT, "interleaved"), (None, "group")])
@pytest.mark.parametrize("choice", [Decode(3, 1, 2, 8, 1), Decode(2, 2, 2, 16, 4)], ids=str)
def test_swiglu(choice, limit, weights, cases, gpu):
    """Sums and their products with powers of 2 are exact here: what is left is the activation's error."""
    where = cases.groups((3, 0, 9))
    g_b = 2.0 ** torch.arange(-2, 1)
    if weights == "interleaved":
        g_b = torch.stack((g_b, 1 / g_b), 1)
    a = cases.nvfp4((where.rows, 1024), 18, torch.tensor(2.0**-5), exact=True)
    b = cases.nvfp4((3, 144, 1024), 19, g_b, interleaved=True, exact=True)
    exact = cases.Exact(cases.product(a, b, where).sums, torch.zeros(where.rows, 144))
    h, bound = (x[where.real] for x in cases.swiglu(exact, limit))
    found = multiply(a, b, where, choice, "swiglu", limit)[0][where.real].double()
    assert (h.abs() > LIMIT).any() and (h.abs() < 1).any()
    assert ((found - h).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["swizzled", "linear"])
@pytest.mark.parametrize(
    ("sizes", "n", "choice"),
    [
        ((3, 0, 130), 288, Decode(2, 3, 2, 32, 2)),
        (19, 160, Decode(2, 2, 2, 8, 1)),
        (9, 32, Decode(2, 4, 2, 16, 4)),
    ],
)
def test_quantized_activations_are_those_of_the_reference(sizes, n, choice, layout, cases, gpu):
    """To the bit, given the bf16 that the other kernel stores; block scales of padding are zero."""
    where = cases.one_group(sizes) if isinstance(sizes, int) else cases.groups(sizes, extra=128)
    a = cases.nvfp4((where.rows, 576), 20, torch.rand(where.rows) * 0.01, "token")
    b = cases.nvfp4((len(where.spans), n, 576), 21, interleaved=True)
    h = multiply(a, b, where, choice, "swiglu")[0][where.real]
    codes, scales = multiply(a, b, where, choice, "nvfp4", layout=layout)
    want_codes, want_scales, _ = reference.quantize(h, torch.tensor(0.03), "tensor", 1.0, False)
    assert torch.equal(codes[where.real], want_codes)
    all_scales = torch.zeros(where.rows, n // 32, dtype=torch.uint8)
    all_scales[where.real] = want_scales.view(torch.uint8)
    want = reference.swizzle(all_scales.view(E4M3)) if layout == "swizzled" else all_scales
    assert torch.equal(scales, want.view(torch.uint8))
    # Each byte is written once, so that no order of zeros and scales matters.
    written = gpu.runs[-1].counters["global.store_bytes"]
    assert written == want.numel() + int(where.real.sum()) * n // 4


def test_nan_stays_where_it_is(cases, gpu):
    """A NaN block scale of token 1 and of weight 20, which is up 4 of the second 16."""
    where, a = cases.one_group(3), cases.nvfp4((3, 256), 22, torch.tensor(0.01))
    b = cases.nvfp4((1, 160, 256), 23, interleaved=True)
    for t, row in ((a, 1), (b, 20)):
        t.block_scales.view(torch.uint8)[..., row, 3] = 0x7F
    for kind, width, column in (("bf16", 160, 20), ("swiglu", 80, 12)):
        expected = torch.zeros(3, width, dtype=torch.bool)
        expected[1], expected[:, column] = True, True
        assert torch.equal(multiply(a, b, where, Decode(2, 2, 2, 8, 1), kind)[0].isnan(), expected)
    codes, scales = multiply(a, b, where, Decode(2, 2, 2, 8, 1), "nvfp4", layout="linear")
    blocks = expected.unflatten(1, (5, 16)).any(2)
    assert torch.equal(scales == 0x7F, blocks)
    assert (codes.unflatten(1, (5, 8))[blocks] == 0).all()
    values = bf16((3, 256))
    values[1, 100] = float("nan")
    expected = torch.zeros(3, 160, dtype=torch.bool)
    expected[1], expected[:, 20] = True, True
    assert torch.equal(multiply(values, b, where, Decode(2, 2, 2, 8, 1))[0].isnan(), expected)


def test_rows_behind_2_to_the_31_elements(gpu):
    """Two groups 2^25 rows apart; memory in between is never touched, so that it does not exist."""
    start, n, k = 2**25, 64, 64
    values = torch.empty(start + 128, k, dtype=BF16)
    out = torch.empty(start + 128, n, dtype=BF16)
    for row in (0, start):
        values[row : row + 128] = 1.0
    values[start + 2] = 2.0
    weights = torch.full((2, n, k // 2), 0x22, dtype=torch.uint8)  # 1.0
    weight_scales = torch.full((2, 128, 4), 0x38, dtype=torch.uint8).view(E4M3)  # 1.0
    ends, sizes = torch.tensor([start, start + 128]), torch.tensor([2, 3])
    product = hopper_gemm.prepare(
        values, None, None, "linear", "tensor", weights, weight_scales, torch.tensor([1.0, 3.0]), "swizzled",
        False, ends.int(), sizes.int(),
    )  # fmt: skip
    decode_gemm_sm90a.run(product, gemm.Output("bf16", None, False, (out,)), Decode(2, 2, 2, 8, 1))
    assert out[:2].eq(64).all()
    assert out[start : start + 2].eq(3 * 64).all() and out[start + 2].eq(3 * 128).all()


@pytest.mark.parametrize("choice", [Decode(2, 2, 2, 8, 1), Decode(2, 4, 2, 8, 4)], ids=str)
def test_each_weight_is_loaded_once_for_a_block_of_tokens(choice, cases, gpu):
    """And none of groups without tokens; activations once by every tile of weights."""
    where, n, k = cases.groups((1, 0, 8, 9, 0)), 256, 1536
    a, b = bf16((where.rows, k)), cases.nvfp4((5, n, k))
    multiply(a, b, where, choice)
    features = 16 * choice.mmas * choice.across
    counters, tiles, blocks = gpu.runs[-1].counters, n // features, 4
    scales = 128 * k // 16  # of the whole chunk that a tile's rows are in
    assert counters["tma.load_bytes"] == blocks * tiles * (features * k // 2 + scales + 8 * k * 2)
    assert counters["mma.flops"] == 2 * blocks * n * 8 * k
    assert counters["global.store_bytes"] == 2 * n * int(where.real.sum())
