"""The GEMM for few tokens: products where they belong, nothing written elsewhere, always the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import pytest
import torch
from dsv4lab.kernels.decode_form import Form
from dsv4lab.kernels.decode_gemm_sm100a import make
from dsv4lab.kernels.launch import As, launch
from torch import Tensor

from dsv4lab import emulator, reference
from dsv4lab.formats import SCALE_DTYPE, scales_shape
from dsv4lab.layouts import group_offsets

CODE = cutlass.Float4E2M1FN
UNTOUCHED = 0xA5  # of every byte of an output before a kernel runs
LIMIT = 10.0


@dataclass
class Problem:
    """Operands of a product; a's rows are padded for groups where there are sizes.

    Attributes:
        a, sfa, b, sfb: codes and linear block scales as bytes, b with groups.
        g_a, g_b: global scales.
    """

    a: Tensor
    sfa: Tensor
    b: Tensor
    sfb: Tensor
    g_a: Tensor
    g_b: Tensor
    sizes: list[int] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, K and groups."""
        return self.b.shape[1], 2 * self.b.shape[2], self.b.shape[0]

    def rows(self) -> list[tuple[int, int]]:
        """Group and row of every real token."""
        if self.sizes is None:
            return [(0, row) for row in range(len(self.a))]
        starts = [0, *group_offsets(torch.tensor(self.sizes, dtype=torch.int32)).tolist()]
        return [(g, starts[g] + i) for g, size in enumerate(self.sizes) for i in range(size)]

    def values(self) -> tuple[Tensor, Tensor]:
        """Decoded a (rows, K) and b (groups, N, K), without global scales."""
        pairs = ((self.a, self.sfa), (self.b, self.sfb))
        return tuple(reference.decode(codes, s.view(SCALE_DTYPE)).double() for codes, s in pairs)

    def factor(self, interleaved: bool) -> Tensor:
        """g_a g_b of every real token and feature."""
        n, rows = self.shape[0], self.rows()
        feature = torch.arange(n)
        half = feature // 8 % 2 if interleaved else (feature >= n // 2).long()
        factors = []
        for group, row in rows:
            g_a = (
                self.g_a if self.g_a.dim() == 0 else self.g_a[row if len(self.g_a) == len(self.a) else group]
            )
            g_b = self.g_b if self.g_b.dim() == 0 else self.g_b[group]
            factors.append(g_a.double() * (g_b[half] if g_b.dim() else g_b).double().expand(n))
        return torch.stack(factors)

    def exact(self, interleaved: bool = True) -> tuple[Tensor, Tensor]:
        """The product of every real token in float64, and that of magnitudes, with global scales."""
        a, b = self.values()
        pairs = [(a[row], b[group]) for group, row in self.rows()]
        factor = self.factor(interleaved)
        sums = torch.stack([b @ a for a, b in pairs]), torch.stack([b.abs() @ a.abs() for a, b in pairs])
        return sums[0] * factor, sums[1] * factor.abs()


def rnd(shape: tuple[int, ...], seed: int, low: int, high: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def problem(
    tokens: int | list[int], n: int, k: int, exact: bool = False, seed: int = 0, g_a="one", g_b="one"
) -> Problem:
    """Any codes, and scales from 2**-6 to 8; with `exact` such that sums are whole numbers below 2**24 / 64.

    Args:
        tokens: of one group, or of each.
        g_a: "one", "token" or "group".
        g_b: "one", "group" or "halves".
    """
    sizes = tokens if isinstance(tokens, list) else None
    groups = len(sizes) if sizes else 1
    rows = sum(-(-size // 128) * 128 for size in sizes) + 128 if sizes else tokens
    # Codes of 0, .5, 1, 1.5; scales 1 and 2, of which 0x38 and 0x40 are the bits.
    a, b = (rnd(shape, seed + i, 0, 256) for i, shape in enumerate(((rows, k // 2), (groups, n, k // 2))))
    if exact:
        a, b = a & 0xBB, b & 0xBB
    scales = []
    for i, shape in enumerate(((rows, k // 16), (groups, n, k // 16))):
        scales.append(8 * rnd(shape, seed + 2 + i, 7, 9) if exact else rnd(shape, seed + 2 + i, 8, 81))
    global_scales = {
        "one": torch.tensor(0.5),
        "token": 2.0 ** torch.arange(rows).remainder(5),
        "group": 2.0 ** torch.arange(groups),
        "halves": torch.tensor([0.5, 4.0]) * 2.0 ** torch.arange(groups)[:, None],
    }  # fmt: skip
    given = Problem(a, scales[0], b, scales[1], global_scales[g_a], global_scales[g_b], sizes)
    if sizes:
        # Padding: codes of anything, scales zero.
        padding = torch.ones(rows, dtype=torch.bool)
        padding[[row for _, row in given.rows()]] = False
        given.sfa[padding] = 0
    return given


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((count,), UNTOUCHED, dtype=torch.uint8).view(dtype).view(shape)


def run(
    form: Form, p: Problem, clusters: int = 2, g: float = 0.03, limit: float = LIMIT
) -> tuple[Tensor, ...]:
    """Call the kernel; the output as (rows, N) or (rows, I) bf16, or codes and block scales."""
    n, k, groups = p.shape
    rows, width = len(p.a), n if form.output == "bf16" else n // 2
    scales = [reference.swizzle(s.view(SCALE_DTYPE)) for s in (p.sfa, p.sfb)]
    offsets = sizes = None
    if p.sizes is not None:
        sizes = torch.tensor(p.sizes, dtype=torch.int32)
        offsets = group_offsets(sizes)
    if form.output == "nvfp4":
        layout = "swizzled" if form.swizzled else "linear"
        outs = (
            untouched((rows, width // 2), torch.uint8),
            untouched(scales_shape((rows, width), layout), torch.uint8),
        )
        targets = (*outs, torch.tensor([g]))
    else:
        outs = (untouched((rows, width), torch.bfloat16),)
        targets = (*outs, None, None)
    by_row = p.g_a.dim() == 1 and len(p.g_a) == rows
    steps = (int(by_row), int(p.g_a.dim() == 1 and not by_row), (0, 1, 2)[p.g_b.dim()])
    launch(make, (form,), [
        As(p.a, CODE), As(p.b, CODE), *scales, p.g_a.reshape(-1), p.g_b.reshape(-1), offsets, sizes, *targets,
        rows, n, k, groups, *steps, LIMIT, clusters,
    ])  # fmt: skip
    return outs


def real(p: Problem, out: Tensor) -> Tensor:
    """The rows of tokens; nothing has been written to the others."""
    rows = [row for _, row in p.rows()]
    others = torch.ones(len(out), dtype=torch.bool)
    others[rows] = False
    assert (out[others].contiguous().view(torch.uint8) == UNTOUCHED).all()
    return out[rows]


def bound(form: Form, p: Problem, magnitudes: Tensor, exact: Tensor, ulps: float) -> Tensor:
    """Every MMA of K = 64 rounds a sum to fp32, by `ulps` at most, and so does every addition of shares of K;
    scaling rounds three times more (the product of the global scales, that with the sum, bf16)."""
    steps = 4 * -(-p.shape[1] // 256) * ulps * 2.0**-23 + (form.split - 1) * 2.0**-24
    fp32 = magnitudes * steps * (1 + 2.0**-20) + exact.abs() * 2 * 2.0**-24
    return fp32 * (1 + 2.0**-8) + exact.abs() * 2.0**-8


def check(form: Form, p: Problem, ulps: float = 0.5, interleaved: bool = True, **options) -> None:
    exact, magnitudes = p.exact(interleaved)
    out = real(p, run(form, p, **options)[0]).double()
    assert ((out - exact).abs() <= bound(form, p, magnitudes, exact, ulps)).all()


@pytest.fixture
def gpu():
    with emulator.device("sm_100a", trace=False) as gpu:
        yield gpu


@pytest.mark.parametrize(
    ("tokens", "block", "split", "n", "k"),
    [
        (1, 8, 1, 128, 256),  # one stage
        (1, 8, 8, 136, 2048),  # every CTA has one
        (3, 8, 2, 264, 1088),  # K and N end within a tile, CTAs have unequal shares
        (8, 8, 4, 8, 1024),
        (17, 8, 2, 128, 576),  # three blocks of tokens
        (17, 16, 1, 384, 64),  # a quarter of a stage
        (64, 16, 4, 256, 1024),
        (64, 64, 8, 128, 2048),
        (100, 32, 2, 128, 512),
        (130, 128, 2, 256, 768),
    ],
)
def test_products(gpu, tokens, block, split, n, k):
    check(Form(block, split), problem(tokens, n, k, g_a="token"))


def test_products_as_hardware_rounds_them():
    """Sums are cut off towards zero: one unit instead of half of one."""
    with emulator.device("sm_100a", mma="hardware", trace=False):
        check(Form(8, 2), problem(5, 136, 1088), ulps=1)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(
    ("g_a", "g_b", "column_scale"),
    [("one", "group", "one"), ("token", "halves", "interleaved"), ("group", "halves", "halves")],
)
def test_groups_of_which_some_are_empty(gpu, g_a, g_b, column_scale, split):
    p = problem([0, 3, 17, 0, 0, 1, 0], 144, 576, g_a=g_a, g_b=g_b)
    check(Form(8, split, True, column_scale=column_scale), p, interleaved=column_scale == "interleaved")


def test_more_groups_than_lanes(gpu):
    sizes = [0] * 70
    sizes[3], sizes[31], sizes[32], sizes[66] = 1, 2, 9, 130
    check(Form(16, 2, True), problem(sizes, 128, 512, g_a="token", g_b="group"), clusters=3)


def test_no_tokens_at_all(gpu):
    p = problem([0, 0], 128, 256)
    assert (run(Form(8, 2, True), p)[0].view(torch.uint8) == UNTOUCHED).all()
    assert "tma.loads" not in gpu.counters and "mma.mxf4nvf4" not in gpu.counters


@pytest.mark.parametrize(("block", "split"), [(8, 1), (16, 2), (32, 4), (64, 1), (128, 8)])
def test_one_hot_tokens_pick_weights_exactly(gpu, block, split):
    """Token t has a single 1, at k = t: every code, scale and token block must be in its place."""
    k, n, tokens = 256 * split, 128, torch.arange(104)
    p = problem(104, n, k)
    hot = 11 * tokens % k
    codes = torch.zeros(104, k, dtype=torch.uint8)
    codes[tokens, hot] = 2  # code 2 is 1.0
    p.a = codes[:, 0::2] + 16 * codes[:, 1::2]
    # A power of 2 in the one block that counts, and in others what would show.
    p.sfa = rnd(tuple(p.sfa.shape), 5, 8, 81)
    p.sfa[tokens, hot // 16] = 8 * (5 + tokens.remainder(5)).to(torch.uint8)
    exact, _ = p.exact()
    assert torch.equal(run(Form(block, split), p)[0].double(), exact)


def test_one_hot_weights_pick_tokens_exactly(gpu):
    """Feature n has a single 1, at k = 3 n."""
    k, n = 1024, 256
    p = problem([40, 0, 9], n, k)
    codes = torch.zeros(3, n, k, dtype=torch.uint8)
    codes[:, torch.arange(n), 3 * torch.arange(n)] = 2
    p.b = codes[..., 0::2] + 16 * codes[..., 1::2]
    p.sfb[:, torch.arange(n), 3 * torch.arange(n) // 16] = 8 * (5 + torch.arange(n).remainder(5)).to(
        torch.uint8
    )
    exact, _ = p.exact()
    assert torch.equal(real(p, run(Form(16, 2, True), p)[0]).double(), exact)


@pytest.mark.parametrize("split", [1, 4])
def test_whole_numbers_have_no_error_but_the_last_rounding(gpu, split):
    p = problem(19, 200, 1024, exact=True)
    exact, _ = p.exact()
    assert torch.equal(run(Form(8, split), p)[0], exact.to(torch.bfloat16))


def added_up(p: Problem, order: list[int]) -> Tensor:
    """Sums of a single group in float32: each MMA of K = 64 rounds once, then a share each to the others."""
    a, b = p.values()
    shares = []
    for rank in range(len(order)):
        share = torch.zeros(len(a), b.shape[1])
        for k in range(256 * rank, 256 * (rank + 1), 64):
            share = (share.double() + a[:, k : k + 64] @ b[0, :, k : k + 64].T).float()
        shares.append(share)
    total = shares[order[0]]
    for rank in order[1:]:
        total = total + shares[rank]
    return (total * (p.g_a * p.g_b)).to(torch.bfloat16)


def test_shares_of_k_are_added_in_the_order_of_ranks_whatever_comes_first():
    p = problem(9, 136, 2048)
    # What the first CTA adds the fourth one takes away: what is small is rounded between them, and not later.
    p.sfa[:] = 0x18
    p.sfa[:, :16], p.sfb[:, :, :16] = 0x7E, 0x7E
    p.a[:, 384:512], p.sfa[:, 48:64] = p.a[:, :128] ^ 0x88, 0x7E
    p.b[:, :, 384:512], p.sfb[:, :, 48:64] = p.b[:, :, :128], 0x7E
    expected, others = added_up(p, list(range(8))), added_up(p, list(range(7, -1, -1)))
    assert (expected != others).any()
    for seed, clusters in ((0, 1), (1, 3), (2, 2), (3, 3)):
        with emulator.device("sm_100a", seed=seed, trace=False):
            assert torch.equal(run(Form(8, 8), p, clusters)[0], expected)


def float64_swiglu(p: Problem, clamped: bool) -> Tensor:
    gate, up = (x.flatten(-2) for x in p.exact()[0].unflatten(-1, (-1, 2, 8)).unbind(-2))
    if clamped:
        gate, up = gate.clamp_max(LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize(("clamped", "column_scale"), [(True, "interleaved"), (False, "one")])
@pytest.mark.parametrize("split", [1, 4])
def test_swiglu_is_within_a_unit_of_bf16(gpu, clamped, column_scale, split):
    """Sums are exact here, and so is their product with powers of 2."""
    g_b = "halves" if column_scale == "interleaved" else "group"
    p = problem([3, 0, 9], 144, 1024, exact=True, g_b=g_b)
    p.g_a = torch.tensor(2.0**-4)
    exact = float64_swiglu(p, clamped)
    form = Form(8, split, True, "swiglu", column_scale, clamped)
    out = real(p, run(form, p)[0]).double()
    _, exponent = torch.frexp(exact)
    assert (exact.abs() > LIMIT).any() and (exact.abs() < 1).any()
    assert ((out - exact).abs() <= 2.0 ** (exponent - 8).double()).all()


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize(("tokens", "n", "split"), [([3, 0, 130], 288, 2), (19, 160, 1)])
def test_quantized_activations_are_those_of_the_reference(gpu, tokens, n, split, swizzled):
    """To the bit, given the bf16 that the other kernel stores; block scales of padding are zero."""
    p = problem(tokens, n, 576, g_a="token")
    grouped = p.sizes is not None
    h = run(Form(8, split, grouped, "swiglu", "one", True), p)[0]
    codes, scales = run(Form(8, split, grouped, "nvfp4", "one", True, swizzled), p)
    rows = [row for _, row in p.rows()]
    want_codes, want_scales, _ = reference.quantize(h[rows], torch.tensor(0.03), "tensor", 1.0, False)
    assert torch.equal(real(p, codes), want_codes)
    all_scales = torch.zeros(len(p.a), n // 32, dtype=torch.uint8)
    all_scales[rows] = want_scales.view(torch.uint8)
    want = reference.swizzle(all_scales.view(SCALE_DTYPE)) if swizzled else all_scales
    assert torch.equal(scales, want.view(torch.uint8))


def test_nan_and_infinity_stay_where_they_are(gpu):
    """A NaN block scale of token 1 and of feature 20; infinite gates; a NaN global scale of the output."""
    p = problem(3, 160, 256)
    p.sfa[1, 3] = p.sfb[0, 20, 5] = 0x7F
    out = run(Form(8), p)[0]
    expected = torch.zeros(3, 160, dtype=torch.bool)
    expected[1], expected[:, 20] = True, True
    assert torch.equal(out.isnan(), expected)
    h = run(Form(8, output="swiglu", clamped=True), p)[0]
    expected = torch.zeros(3, 80, dtype=torch.bool)
    expected[1], expected[:, 12] = True, True  # feature 20 is up 4 of the second 16
    assert torch.equal(h.isnan(), expected)
    codes, scales = run(Form(8, output="nvfp4", clamped=True, swizzled=False), p)
    assert torch.equal(scales == 0x7F, expected.unflatten(1, (5, 16)).any(2))
    assert (codes.unflatten(1, (5, 8))[scales == 0x7F] == 0).all()
    p.g_b = torch.tensor(2.0**120)
    p.sfa[1, 3] = p.sfb[0, 20, 5] = 8
    assert run(Form(8, output="swiglu", clamped=True), p)[0].isnan().any(), "Inf is no large number"
    codes, scales = run(Form(8, output="nvfp4", clamped=True), p, g=float("nan"))
    assert (codes == 0).all()
    linear = reference.unswizzle(scales, 128, 8)
    assert (linear[:3, :5] == 0x7F).all() and (linear[3:] == 0).all() and (linear[:, 5:] == 0).all()


def test_each_weight_is_loaded_once_for_a_block_of_tokens(gpu):
    n, k, sizes = 256, 1536, [1, 0, 8, 9, 0]
    for split, output in ((1, "bf16"), (2, "swiglu")):
        form = Form(8, split, True, output)
        run(form, problem(sizes, n, k), clusters=3)
        counters = gpu.runs[-1].counters
        tiles = n // 128 * sum(-(-size // 8) for size in sizes)
        weights = tiles * 128 * k * 9 // 16
        # A token's scales come with those of 31 others.
        tokens = tiles * (8 * k // 2 + 32 * k // 16 * 4)
        assert counters["tma.load_bytes"] == weights + tokens
        assert counters["mma.mxf4nvf4"] == tiles * k // 64
        assert counters["mma.flops"] == 2 * tiles * 128 * 8 * k
        width = n if output == "bf16" else n // 2
        assert counters["global.store_bytes"] == 2 * width * sum(sizes)


@pytest.mark.parametrize("output", ["bf16", "nvfp4"])
def test_for_the_other_blackwell(output):
    with emulator.device("sm_103a", trace=False):
        p = problem([3, 9], 160, 576, exact=True)
        outs = run(Form(8, 2, True, output, clamped=True), p)
        if output == "bf16":
            assert torch.equal(real(p, outs[0]), p.exact()[0].to(torch.bfloat16))
        else:
            h = real(p, run(Form(8, 2, True, "swiglu", clamped=True), p)[0])
            want = reference.quantize(h, torch.tensor(0.03), "tensor", 1.0, False)[0]
            assert torch.equal(real(p, outs[0]), want)
