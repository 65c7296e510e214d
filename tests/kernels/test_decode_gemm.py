"""The GEMM for few tokens: products where they belong, nothing written elsewhere, always the same bits."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels import decode_choice, decode_gemm_sm100a, gemm
from dsv4lab.kernels.decode_choice import CHOICES, Decode, best, cycles, fits
from torch import Tensor

from dsv4lab import reference
from dsv4lab.emulator import device
from dsv4lab.formats import NVFP4Tensor, scales_shape
from dsv4lab.gemm_arguments import operands
from dsv4lab.layouts import max_group_rows

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
UNTOUCHED = 0xA5  # of every byte of an output before a kernel runs
LIMIT = 10.0
SIZES = (0, 3, 17, 0, 0, 1, 0)


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count,), UNTOUCHED, dtype=torch.uint8).view(dtype).view(shape)


def multiply(a, b, where, choice, kind="bf16", limit=LIMIT, g=0.03, layout="swizzled") -> tuple[Tensor, ...]:
    """The kernel's output, bf16 or codes and bytes of scales; checks that rows without a token stay."""
    product = gemm.prepare(*operands(a, b, where.offsets, where.sizes)[0])
    shape = (where.rows + 3, product.n // (1 if kind == "bf16" else 2))
    if kind == "nvfp4":
        codes = untouched((shape[0], shape[1] // 2), torch.uint8)
        scales = untouched(scales_shape((where.rows, shape[1]), layout), E4M3)
        tensors = (codes, scales, torch.tensor(g))
    else:
        tensors = (untouched(shape, BF16),)
    decode_gemm_sm100a.run(product, gemm.Output(kind, limit, layout == "swizzled", tensors), choice)
    others = torch.ones(len(tensors[0]), dtype=torch.bool)
    others[: where.rows] = ~where.real
    assert (tensors[0][others].view(torch.uint8) == UNTOUCHED).all(), "wrote to rows without a token"
    return (tensors[0][: where.rows], *(scales.view(torch.uint8) for scales in tensors[1:2]))


@pytest.fixture(scope="module")
def gpu(request):
    """An emulated GPU with all checks, a B200 unless a test asks for another; it compiles a kernel once."""
    with device(**{"arch": "sm_100a", "trace": False, **getattr(request, "param", {})}) as gpu:
        yield gpu


def on(*options: dict):
    """Run a test on such GPUs."""
    names = [" ".join(f"{key} {value}" for key, value in each.items()) for each in options]
    return pytest.mark.parametrize("gpu", options, indirect=True, ids=names)


@pytest.fixture(autouse=True)
def few_sms(monkeypatch):
    """So many SMs that each computes several tiles."""
    monkeypatch.setattr(decode_gemm_sm100a, "sm_count", lambda device: 4)


@pytest.mark.parametrize(
    ("rows", "choice", "n", "k"),
    [
        (1, Decode(8, 1), 128, 256),  # one stage
        (1, Decode(8, 8), 136, 2048),  # every CTA has one
        (3, Decode(8, 2), 264, 1056),  # K and N end within a tile, CTAs have unequal shares
        (8, Decode(8, 4), 8, 1024),
        (17, Decode(8, 2), 128, 576),  # three blocks of tokens
        (17, Decode(16, 1), 384, 64),  # a quarter of a stage
        (64, Decode(16, 4), 256, 1024),
        (64, Decode(64, 8), 128, 2048),
        (100, Decode(32, 2), 128, 512),
        (130, Decode(128, 2), 256, 768),
    ],
)
def test_one_group(rows, choice, n, k, cases, gpu):
    where = cases.one_group(rows)
    a = cases.nvfp4((rows, k), 0, torch.rand(rows) + 0.5, "token")
    b = cases.nvfp4((n, k), 1, torch.tensor(1.3))
    cases.check(multiply(a, b, where, choice)[0], _sums(cases, a, b, where, choice), where)


def _sums(cases, a: NVFP4Tensor, b: NVFP4Tensor, where, choice: Decode, ulps: float = 0.5):
    """In float64; every addition of a share of K rounds to nearest, as one more step does at most."""
    exact = cases.product(a, b, where, ulps)
    return cases.Exact(exact.sums, exact.error * (1 + (choice.split - 1) / -(-a.K // 64)))


@on({"mma": "hardware"})
def test_as_hardware_rounds(cases, gpu):
    where, choice = cases.one_group(5), Decode(8, 2)
    a, b = cases.nvfp4((5, 1056), 2), cases.nvfp4((136, 1056), 3)
    cases.check(multiply(a, b, where, choice)[0], _sums(cases, a, b, where, choice, 1.0), where)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(
    ("rows", "weights"),
    [("tensor", "group"), ("token", "interleaved"), ("group", "halves"), ("token", "one")],
)
def test_groups_of_which_some_are_empty(rows, weights, split, cases, gpu):
    where, n, k = cases.groups(SIZES, extra=128), 144, 576
    g_a = torch.rand({"tensor": (), "token": (where.rows,), "group": (7,)}[rows]) + 0.5
    g_b = torch.rand({"one": (), "group": (7,)}.get(weights, (7, 2))) + 0.5
    a = cases.nvfp4((where.rows, k), 4, g_a, rows)
    b = cases.nvfp4((7, n, k), 5, g_b, interleaved=weights == "interleaved")
    choice = Decode(8, split)
    cases.check(multiply(a, b, where, choice)[0], _sums(cases, a, b, where, choice), where)


@pytest.mark.parametrize("choice", [Decode(8, 1), Decode(32, 2)], ids=str)
def test_more_groups_than_lanes_that_stand_apart(choice, cases, gpu):
    sizes = [0] * 70
    sizes[3], sizes[31], sizes[32], sizes[66] = 1, 2, 9, 130
    near = cases.groups(sizes)
    shift = torch.arange(70, dtype=torch.int32) // 32 * 128
    spans = [(g, start + 128 * (g // 32), stop + 128 * (g // 32)) for g, start, stop in near.spans]
    # The last group of the 32 before ends later, so that the next one begins there.
    offsets = near.offsets + torch.cat((shift[1:], shift[-1:]))
    where = cases.Groups(offsets, near.sizes, near.rows + 256, spans)
    a = cases.nvfp4((where.rows, 512), 6, exact=True)
    b = cases.nvfp4((70, 128, 512), 7, 2.0 ** (torch.arange(70) % 5), exact=True)
    found = multiply(a, b, where, choice)[0]
    assert torch.equal(found[where.real], cases.product(a, b, where).sums.to(BF16)[where.real])


def test_no_tokens_at_all(cases, gpu):
    where = cases.groups((0, 0), extra=128)
    multiply(cases.nvfp4((128, 256)), cases.nvfp4((2, 128, 256)), where, Decode(8, 1))
    counters = gpu.runs[-1].counters
    assert "tma.loads" not in counters and "mma.mxf4nvf4" not in counters


@pytest.mark.parametrize("k", [16, 48, 272])
def test_k_that_is_no_multiple_of_32(k, cases, gpu):
    where = cases.one_group(9)
    a, b = cases.nvfp4((9, k), 8, exact=True), cases.nvfp4((24, k), 9, exact=True)
    assert torch.equal(multiply(a, b, where, Decode(8, 1))[0], cases.product(a, b, where).sums.to(BF16))


def one_hot(t: NVFP4Tensor, hot: Tensor) -> NVFP4Tensor:
    """A single value in each row of t, a power of 2; block scales elsewhere are what they were."""
    rows = torch.arange(len(hot))
    codes = torch.zeros(*t.shape, dtype=torch.uint8)
    codes[..., rows, hot] = 2  # code 2 is 1.0
    scales = t.block_scales.clone().view(torch.uint8)
    scales[..., rows, hot // 16] = (8 * (5 + rows % 5)).to(torch.uint8)
    return t.with_(codes=codes[..., 0::2] + 16 * codes[..., 1::2], block_scales=scales.view(E4M3))


@pytest.mark.parametrize(("tokens", "split"), [(8, 1), (16, 2), (32, 4), (64, 1), (128, 8)])
def test_one_hot_tokens_pick_weights_exactly(tokens, split, cases, gpu):
    """Codes, scales and blocks of tokens are in their places: 104 tokens have scales in all four columns."""
    choice = Decode(tokens, split)
    k, where = 256 * choice.split, cases.one_group(104)
    a, b = one_hot(cases.nvfp4((104, k), 10), 11 * torch.arange(104) % k), cases.nvfp4((128, k), 11)
    assert torch.equal(multiply(a, b, where, choice)[0].double(), cases.product(a, b, where).sums)


def test_one_hot_weights_pick_tokens_exactly(cases, gpu):
    where = cases.groups((40, 0, 9))
    a = cases.nvfp4((where.rows, 1024), 12)
    b = one_hot(cases.nvfp4((3, 256, 1024), 13), 3 * torch.arange(256))
    found = multiply(a, b, where, Decode(16, 2))[0]
    assert torch.equal(found.double()[where.real], cases.product(a, b, where).sums[where.real])


@pytest.mark.parametrize("split", [1, 4])
def test_exact_sums_have_no_error_but_the_last_rounding(split, cases, gpu):
    where = cases.one_group(19)
    a, b = cases.nvfp4((19, 1024), 14, exact=True), cases.nvfp4((200, 1024), 15, exact=True)
    assert torch.equal(multiply(a, b, where, Decode(8, split))[0], cases.product(a, b, where).sums.to(BF16))


def added_up(cases, a: NVFP4Tensor, b: NVFP4Tensor, order: list[int]) -> Tensor:
    """In float32: each MMA of K = 64 rounds a share of 256, then the shares are added in this order."""
    x, w = cases.values(a), cases.values(b)
    shares = []
    for first in range(0, a.K, 256):
        share = torch.zeros(a.rows, b.rows)
        for k in range(first, first + 256, 64):
            share = (share.double() + x[:, k : k + 64] @ w[:, k : k + 64].T).float()
        shares.append(share)
    total = shares[order[0]]
    for rank in order[1:]:
        total = total + shares[rank]
    return total.to(BF16)


@on(*({"seed": seed} for seed in range(3)))
@pytest.mark.parametrize("clusters", [1, 2])
def test_shares_of_k_are_added_in_the_order_of_ranks_whatever_comes_first(clusters, cases, gpu, monkeypatch):
    where, k = cases.one_group(9), 2048
    a, b = cases.nvfp4((9, k), 16), cases.nvfp4((264, k), 17)
    # What the first CTA adds the fourth one takes away: what is small is rounded between them, and not later.
    raw = [t.block_scales.view(torch.uint8) for t in (a, b)]
    raw[0].fill_(0x18)
    for t, scales in zip((a, b), raw, strict=True):
        scales[:, :16] = scales[:, 48:64] = 0x7E
        t.codes[:, 384:512] = t.codes[:, :128]
    a.codes[:, 384:512] ^= 0x88
    expected = added_up(cases, a, b, list(range(8)))
    assert (expected != added_up(cases, a, b, list(range(7, -1, -1)))).any()
    monkeypatch.setattr(decode_gemm_sm100a, "most_clusters", lambda choice, sm_count: clusters)
    assert torch.equal(multiply(a, b, where, Decode(8, 8))[0], expected)


def test_rows_behind_2_to_the_31_elements(gpu):
    """Two groups 2^25 rows apart; memory in between is never touched, so that it does not exist."""
    start, n, k = 2**25, 64, 64
    codes = torch.empty(start + 128, k // 2, dtype=torch.uint8)
    scales = torch.empty(start + 128, 4, dtype=torch.uint8)
    out = torch.empty(start + 128, n, dtype=BF16)
    for row in (0, start):
        codes[row : row + 128], scales[row : row + 128] = 0x22, 0x38  # 1.0 and 1.0
    codes[start + 2] = 0x44  # 2.0
    weights = torch.full((2, n, k // 2), 0x22, dtype=torch.uint8)
    weight_scales = torch.full((2, 128, 4), 0x38, dtype=torch.uint8).view(E4M3)
    ends, sizes = torch.tensor([start, start + 128]), torch.tensor([2, 3])
    product = gemm.prepare(
        codes, scales.view(E4M3), torch.ones(()), "swizzled", "tensor", weights, weight_scales,
        torch.tensor([1.0, 3.0]), "swizzled", False, ends.int(), sizes.int(),
    )  # fmt: skip
    decode_gemm_sm100a.run(product, gemm.Output("bf16", None, False, (out,)), Decode(8, 1))
    assert out[:2].eq(64).all()
    assert out[start : start + 2].eq(3 * 64).all() and out[start + 2].eq(3 * 128).all()


@pytest.mark.parametrize(("limit", "weights"), [(LIMIT, "interleaved"), (None, "group")])
@pytest.mark.parametrize("split", [1, 4])
def test_swiglu(split, limit, weights, cases, gpu):
    """Sums and their products with powers of 2 are exact here: what is left is the activation's error."""
    where, choice = cases.groups((3, 0, 9)), Decode(8, split)
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
    ("sizes", "n", "choice"), [((3, 0, 130), 288, Decode(32, 2)), (19, 160, Decode(8, 1))]
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
        assert torch.equal(multiply(a, b, where, Decode(8, 1), kind)[0].isnan(), expected)
    codes, scales = multiply(a, b, where, Decode(8, 1), "nvfp4", layout="linear")
    blocks = expected.unflatten(1, (5, 16)).any(2)
    assert torch.equal(scales == 0x7F, blocks)
    assert (codes.unflatten(1, (5, 8))[blocks] == 0).all()


def test_infinite_gates_and_a_nan_global_scale(cases, gpu):
    """Clamped or not, Inf gives NaN; columns of scales that fill up a chunk stay zero."""
    where = cases.one_group(3)
    large = torch.tensor(2.0**60)
    a, b = cases.nvfp4((3, 64), 24, large), cases.nvfp4((1, 160, 64), 25, large, interleaved=True)
    overflows = cases.product(a, b, where).sums.float().isinf()
    gate, up = overflows.unflatten(1, (10, 2, 8)).unbind(2)
    expected = (gate | up).flatten(1)
    assert expected.any() and not expected.all()
    assert torch.equal(multiply(a, b, where, Decode(8, 1), "swiglu")[0].isnan(), expected)
    codes, scales = multiply(a, b, where, Decode(8, 1), "nvfp4", g=float("nan"))
    scales = reference.unswizzle(scales, 128, 8)
    assert (codes == 0).all() and (scales[:3, :5] == 0x7F).all()
    assert (scales[3:] == 0).all() and (scales[:, 5:] == 0).all()


@pytest.mark.parametrize(("split", "kind"), [(1, "bf16"), (2, "swiglu")])
def test_each_weight_is_loaded_once_for_a_block_of_tokens(split, kind, cases, gpu):
    where, n, k = cases.groups((1, 0, 8, 9, 0)), 256, 1536
    a, b = cases.nvfp4((where.rows, k)), cases.nvfp4((5, n, k), interleaved=True)
    multiply(a, b, where, Decode(8, split), kind)
    counters, tiles = gpu.runs[-1].counters, n // 128 * 4
    weights, tokens = 128 * k * 9 // 16, 8 * k // 2
    # A token's scales come with those of 31 others, and of 96 in the same 16 bytes.
    assert counters["tma.load_bytes"] == tiles * (weights + tokens + 128 * k // 16)
    assert counters["mma.mxf4nvf4"] == tiles * k // 64
    assert counters["mma.flops"] == 2 * tiles * 128 * 8 * k
    assert counters["global.store_bytes"] == 2 * (n if kind == "bf16" else n // 2) * int(where.real.sum())


@on({"arch": "sm_103a"})
@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_on_the_other_blackwell(kind, cases, gpu):
    where, choice = cases.groups((3, 9)), Decode(8, 2)
    a = cases.nvfp4((where.rows, 576), 26, torch.tensor(2.0**-5), exact=True)
    b = cases.nvfp4((2, 160, 576), 27, interleaved=True, exact=True)
    found = multiply(a, b, where, choice, kind)[0][where.real]
    if kind == "bf16":
        assert torch.equal(found, cases.product(a, b, where).sums.to(BF16)[where.real])
    else:
        h = multiply(a, b, where, choice, "swiglu")[0][where.real]
        assert torch.equal(found, reference.quantize(h, torch.tensor(0.03), "tensor", 1.0, False)[0])


# The choice.


def test_fewer_stages_than_ctas_are_refused(cases, gpu):
    with pytest.raises(ValueError, match="4 CTAs cannot share K = 512"):
        multiply(cases.nvfp4((1, 512)), cases.nvfp4((8, 512)), cases.one_group(1), Decode(8, 4))
    assert fits(Decode(8, 4), 800) and not fits(Decode(8, 4), 768)


def test_choices_for_one_token():
    """148 SMs: 56 tiles of 28 stages by two CTAs each; 16 tiles by as many clusters of 8."""
    assert best(1, 7168, 7168, None, 148) == Decode(8, 2)
    assert best(1, 2048, 7168, None, 148) == Decode(8, 8)
    assert best(1, 2048, 256, None, 148) == Decode(8, 1)
    # 6 experts have 48 tiles each, which two turns of 148 SMs compute.
    assert best(max_group_rows(1, 6, 256), 6144, 7168, 256, 148) == Decode(8, 1)


def test_tiles_grow_with_the_tokens_of_a_group():
    assert [best(rows, 7168, 2048, None, 148).tokens for rows in (8, 9, 33, 100)] == [8, 16, 64, 128]
    rows = [max_group_rows(tokens, 6, 256) for tokens in (1, 64, 512, 1024)]
    assert [best(r, 6144, 7168, 256, 148).tokens for r in rows] == [8, 8, 16, 32]


def test_more_work_never_takes_less_time():
    for choice in CHOICES:
        assert decode_choice.most_clusters(choice, 148) * choice.split <= 148
        times = [cycles(choice, rows, n, 7168, None, 148) for rows in (1, 8, 64, 512) for n in (128, 8192)]
        assert times[0::2] == sorted(times[0::2]) and times[1::2] == sorted(times[1::2])
