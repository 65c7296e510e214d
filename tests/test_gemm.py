"""The grouped GEMM against float64 of operands that ml_dtypes decodes, within derived bounds."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4lab import decoded, gemm, reference_gemm
from dsv4lab.formats import NVFP4Tensor
from dsv4lab.gemm import grouped_mm, grouped_mm_swiglu
from dsv4lab.layouts import group_offsets, interleave_gate_up, with_scale_layout
from dsv4lab.quantize import bound_global_scale, quantize_nvfp4

E4M3 = torch.float8_e4m3fn
U_BF16 = 2.0**-8  # rounding to bf16 is off by at most this share of the value
U_FP32 = 2.0**-24


@pytest.fixture(params=["host knows the sizes", "sizes stay on the device"])
def path(request, monkeypatch):
    """Both ways of the reference: over the groups in use, and over tiles without reading sizes."""
    if request.param.startswith("sizes"):
        monkeypatch.setattr(reference_gemm, "_host_knows_sizes", lambda offsets: False)
        # A few tiles at a time, so that chunks are crossed.
        monkeypatch.setattr(reference_gemm, "_TILE_BYTES", 3 * 4 * 80 * 48)


def random_nvfp4(shape, g=None, seed=0, granularity=None, interleaved=False) -> NVFP4Tensor:
    """Any codes, block scales between 2^-6 and 448 of either fraction, global scale 1 unless given."""
    r = torch.Generator().manual_seed(seed)
    *lead, k = shape
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, generator=r)
    scales = torch.randint(8, 127, (*lead, k // 16), dtype=torch.uint8, generator=r).view(E4M3)
    g = torch.ones(()) if g is None else g
    return NVFP4Tensor(codes, scales, g, "linear", granularity, interleaved)


def oracle_values(t: NVFP4Tensor) -> np.ndarray:
    """code * block scale in float64, by NumPy and ml_dtypes alone."""
    raw = t.codes.numpy()
    nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(*raw.shape[:-1], -1).astype(np.uint8)
    codes = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = t.block_scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return codes * np.repeat(scales, 16, -1)


def groups(sizes, extra=0):
    """offsets, sizes, rows of the buffer, and the (group, first row, last row) of those that hold tokens."""
    sizes = torch.tensor(sizes, dtype=torch.int32)
    offsets = group_offsets(sizes)
    starts = [0, *offsets.tolist()]
    spans = [(g, starts[g], starts[g] + n) for g, n in enumerate(sizes.tolist())]
    return offsets, sizes, int(offsets[-1]) + extra, spans


def product64(a, b, g_a, g_b, k):
    """Exact D and how far float32 may be from it, before the rounding to bf16.

    A product of two decoded values has at most 12 significant bits and is exact in float32. Each of the K - 1
    additions, in any order, is off by at most 2^-24 of a partial sum, which sum |a b| bounds; the factor
    g_a g_b costs two roundings more. 1.01 covers the second-order terms.
    """
    scale = g_a * g_b
    return a @ b.T * scale, 1.01 * (k + 1) * U_FP32 * (np.abs(a) @ np.abs(b).T) * scale


def assert_within(actual: torch.Tensor, exact: np.ndarray, error: np.ndarray):
    off = np.abs(actual.double().numpy() - exact)
    assert (off <= U_BF16 * np.abs(exact) + (1 + U_BF16) * error).all(), off.max()


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
@pytest.mark.parametrize("k", [16, 80, 272])
def test_one_hot_rows_read_the_weight_out_exactly(k, layout, path):
    """Row i is 1 at k = i, so D is the weight itself: its layout shows with no tolerance at all."""
    eye = NVFP4Tensor(
        quantize_nvfp4(torch.eye(k), 1.0).codes, torch.full((k, k // 16), 1.0).to(E4M3), torch.ones(())
    )
    # 1.0 / (6 * 1) rounds to another scale, so codes of 1 under a scale of 1 are put in by hand
    codes = torch.zeros(k, k // 2, dtype=torch.uint8)
    codes[torch.arange(k), torch.arange(k) // 2] = torch.tensor([0x02, 0x20], dtype=torch.uint8).repeat(
        k // 2
    )
    rows = -(-k // 128) * 128
    pad = torch.nn.functional.pad
    scales = pad(eye.block_scales.view(torch.uint8), (0, 0, 0, rows - k)).view(E4M3)
    a = with_scale_layout(NVFP4Tensor(pad(codes, (0, 0, 0, rows - k)), scales, torch.ones(())), layout)
    b = random_nvfp4((2, 48, k))
    offsets, sizes = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([0, k], dtype=torch.int32)
    y = grouped_mm(a, with_scale_layout(b, layout), offsets, sizes)
    np.testing.assert_array_equal(y[:k].double().numpy(), oracle_values(b)[1].T)


@pytest.mark.parametrize("g_a", ["tensor", "token", "group", "bf16"])
@pytest.mark.parametrize("g_b", [(), (6,), (6, 2)])
def test_groups_within_the_derived_bound(g_a, g_b, path):
    k, n = 80, 48
    offsets, sizes, rows, spans = groups([0, 1, 127, 128, 129, 0], extra=128)
    r = torch.Generator().manual_seed(1)
    scale_a = {"tensor": (), "token": (rows,), "group": (6,), "bf16": ()}[g_a]
    scale_a = torch.rand(scale_a, generator=r) * 0.01 + 1e-4
    scale_b = torch.rand(g_b, generator=r) * 0.01 + 1e-4
    a = random_nvfp4((rows, k), scale_a, 2, None if g_a == "bf16" else g_a)
    b = random_nvfp4((6, n, k), scale_b, 3, "group" if g_b else "tensor")
    values, weights = oracle_values(a), oracle_values(b)
    if g_a == "bf16":
        scale_a = torch.ones(())
        y = grouped_mm(torch.tensor(values, dtype=torch.bfloat16), b, offsets, sizes)
    else:
        y = grouped_mm(a, b, offsets, sizes)
    assert y.shape == (rows, n) and y.dtype == torch.bfloat16
    by_row = np.broadcast_to(scale_a.double().numpy(), (rows,)) if g_a != "group" else None
    by_group = np.broadcast_to(
        scale_b.double().numpy().reshape(6 if g_b else 1, -1), (6, 2 if len(g_b) == 2 else 1)
    )
    for g, first, last in spans:
        of_a = scale_a.double().numpy()[g] if g_a == "group" else by_row[first:last, None]
        of_b = np.repeat(by_group[g], n // by_group.shape[1])
        assert_within(y[first:last], *product64(values[first:last], weights[g], of_a, of_b, k))


def test_one_group_takes_leading_dimensions():
    x = random_nvfp4((2, 3, 48), torch.rand(2, 3) + 0.5, granularity="token")
    b = random_nvfp4((32, 48), torch.full((), 0.25), 5)
    y = grouped_mm(x, b)
    assert y.shape == (2, 3, 32)
    g_a = x.global_scale.double().numpy().reshape(6, 1)
    exact = product64(oracle_values(x).reshape(6, 48), oracle_values(b), g_a, 0.25, 48)
    assert_within(y.view(6, 32), *exact)
    assert torch.equal(grouped_mm(x.with_(global_scale=x.global_scale[..., None]), b), y)
    one_group = grouped_mm(random_nvfp4((4, 48), torch.ones(1), granularity="group"), b)
    assert torch.equal(one_group, grouped_mm(random_nvfp4((4, 48)), b))


def swiglu64(gate, up, d_gate, d_up, limit):
    """h in float64 and how far float32 may be off: |silu'| <= 1.1; silu costs a few float32 roundings."""
    clip = (lambda v, low: v) if limit is None else (lambda v, low: np.clip(v, low, limit))
    gate, up = clip(gate, -np.inf), clip(up, None if limit is None else -limit)
    silu = gate / (1 + np.exp(-gate))
    error = 1.1 * d_gate * (np.abs(up) + d_up) + np.abs(silu) * d_up + 2.0**-20 * np.abs(silu * up)
    return silu * up, error + 1e-37


@pytest.mark.parametrize("limit", [10.0, 0.5, None])
def test_swiglu_within_the_derived_bound(limit, path):
    """Gate and up have global scales 64 apart; many values reach the clamp at 10."""
    k, i = 80, 24
    offsets, sizes, rows, spans = groups([0, 1, 127, 0, 129])
    g_b = torch.tensor([[1.0, 64.0], [3.0, 0.25], [1.0, 1.0], [2.0, 1.0], [1.0, 8.0]]) * 2.0**-17
    a = random_nvfp4((rows, k), torch.rand(rows) + 0.5, 2, "token")
    b = random_nvfp4((5, 2 * i, k), g_b, 3, "group")
    y = grouped_mm_swiglu(a, interleave_gate_up(b), offsets, sizes, limit=limit)
    assert y.shape == (rows, i)
    values, weights, clamped = oracle_values(a), oracle_values(b), 0
    for g, first, last in spans:
        g_a = a.global_scale.double().numpy()[first:last, None]
        gate, up = (
            product64(values[first:last], part, g_a, float(g_b[g, j]), k)
            for j, part in enumerate(np.split(weights[g], 2))
        )
        exact, error = swiglu64(gate[0], up[0], gate[1], up[1], limit)
        assert_within(y[first:last], exact, error)
        clamped += (gate[0] > 10).sum() + (np.abs(up[0]) > 10).sum()
    assert clamped > 500


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_nvfp4_output_is_the_bf16_output_quantized_under_the_bound(layout, path):
    offsets, sizes, rows, spans = groups([5, 0, 130], extra=128)
    a = random_nvfp4((rows, 48), torch.full((rows,), 2.0**-8), granularity="token")
    b = interleave_gate_up(random_nvfp4((3, 64, 48), torch.full((3, 2), 2.0**-10), 1, "group"))
    h = grouped_mm_swiglu(a, b, offsets, sizes)
    q = grouped_mm_swiglu(a, b, offsets, sizes, output="nvfp4", scale_layout=layout)
    assert q.scale_layout == layout and float(q.global_scale) == np.float32(bound_global_scale(10.0))
    q, padding = with_scale_layout(q, "linear"), torch.ones(rows, dtype=torch.bool)
    for _, first, last in spans:
        want = quantize_nvfp4(h[first:last], bound_global_scale(10.0))
        assert torch.equal(q.codes[first:last], want.codes)
        assert torch.equal(q.block_scales[first:last].view(torch.uint8), want.block_scales.view(torch.uint8))
        padding[first:last] = False
    assert h[spans[2][1] : spans[2][2]].abs().max() == 100  # the clamp was reached, and the bound is tight
    assert not q.block_scales.view(torch.uint8)[padding].any()


def test_out_takes_more_rows_and_equals_the_result():
    offsets, sizes, rows, spans = groups([3, 129])
    live = torch.cat([torch.arange(first, last) for _, first, last in spans])
    a = random_nvfp4((rows, 48), torch.full((), 2.0**-8))
    b = random_nvfp4((2, 64, 48), torch.full((), 2.0**-8), 1)
    out = torch.empty(rows + 7, 64, dtype=torch.bfloat16)
    y = grouped_mm(a, b, offsets, sizes, out=out)
    assert y.data_ptr() == out.data_ptr() and y.shape == (rows, 64)
    assert torch.equal(y[live], grouped_mm(a, b, offsets, sizes)[live])
    b = interleave_gate_up(b)
    y = grouped_mm_swiglu(a, b, offsets, sizes, out=out[:, :32].contiguous())
    assert torch.equal(y[live], grouped_mm_swiglu(a, b, offsets, sizes)[live])
    space = random_nvfp4((rows + 128, 32))
    q = grouped_mm_swiglu(a, b, offsets, sizes, output="nvfp4", global_scale=0.5, out=space)
    want = grouped_mm_swiglu(a, b, offsets, sizes, output="nvfp4", global_scale=0.5)
    assert q.codes.data_ptr() == space.codes.data_ptr() and q.shape == (rows, 32) and q.global_scale == 0.5
    assert torch.equal(q.codes[live], want.codes[live])


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48)])
def test_empty_activations(shape):
    a, b = random_nvfp4(shape), random_nvfp4((32, 48))
    assert grouped_mm(a, b).shape == (*shape[:-1], 32)
    assert grouped_mm_swiglu(a, interleave_gate_up(b)).shape == (*shape[:-1], 16)
    q = grouped_mm_swiglu(a, interleave_gate_up(b), output="nvfp4")
    assert q.shape == (*shape[:-1], 16)


def test_all_groups_empty(path):
    none = torch.zeros(3, dtype=torch.int32)
    b = random_nvfp4((3, 32, 48))
    assert grouped_mm(random_nvfp4((0, 48)), b, none, none).shape == (0, 32)
    assert grouped_mm(random_nvfp4((256, 48)), b, none, none).shape == (256, 32)


def test_nan_stays_nan_and_infinity_does_not_hide_behind_the_clamp():
    a, b = random_nvfp4((4, 48), torch.full((), 2.0**-8)), random_nvfp4((32, 48), torch.full((), 2.0**-8))
    scales = a.block_scales.view(torch.uint8).clone()
    scales[2, 1] = 0x7F
    y = grouped_mm(a.with_(block_scales=scales.view(E4M3)), b)
    assert y.isnan().all(1).tolist() == [False, False, True, False] and y[[0, 1, 3]].isfinite().all()
    x = torch.ones(2, 48, dtype=torch.bfloat16)
    x[1, 5] = torch.inf
    ones = NVFP4Tensor(
        torch.full((32, 24), 0x22, dtype=torch.uint8), torch.ones(32, 3).to(E4M3), torch.ones(())
    )
    y = grouped_mm_swiglu(x, interleave_gate_up(ones))
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_decoded_weights_follow_changes_and_die_with_their_codes():
    a, b = random_nvfp4((4, 48)), random_nvfp4((32, 48), seed=3)
    gc.collect()
    before = grouped_mm(a, b)
    kept = len(decoded._kept)
    assert torch.equal(grouped_mm(a, b), before) and len(decoded._kept) == kept
    b.codes.bitwise_xor_(0x88)  # the sign of every value
    assert torch.equal(grouped_mm(a, b), -before)
    b.block_scales.view(torch.uint8).add_(8)  # an exponent more, where there is room for one
    room = random_nvfp4((32, 48), seed=3).block_scales.view(torch.uint8) < 119
    assert room.any() and not torch.equal(grouped_mm(a, b), -before)
    del b
    gc.collect()
    assert len(decoded._kept) == kept - 1


def test_codes_that_meet_other_scales_are_decoded_anew():
    a, b = random_nvfp4((4, 48)), random_nvfp4((32, 48), seed=3)
    for byte in [56, 64, 72, 48] * 50:  # a new tensor each time, which may stand where the last one stood
        scales = torch.full((32, 3), byte, dtype=torch.uint8).view(E4M3)
        again = b.with_(block_scales=scales)
        y = grouped_mm(a, again)
        assert torch.equal(y, grouped_mm(a, again.with_(codes=b.codes.clone())))
        del scales, again


def test_weights_are_decoded_once_in_inference_mode_too():
    a, b = random_nvfp4((4, 48)), random_nvfp4((32, 48), seed=3)
    want = grouped_mm(a, b)
    kept = decoded._kept[b.codes].values
    with torch.inference_mode():
        again = b.with_(block_scales=b.block_scales.view(torch.uint8).view(E4M3))
        assert torch.equal(grouped_mm(a, again), want)
        fresh = random_nvfp4((32, 48), seed=3)  # made here: never kept, as nothing would tell of a change
        assert torch.equal(grouped_mm(a, fresh), want) and fresh.codes not in decoded._kept
    assert decoded._kept[b.codes].values is kept and not kept.is_inference()


def test_operators_and_their_fakes_agree():
    offsets, sizes, rows, _ = groups([3, 129])
    a, b = random_nvfp4((rows, 48)), random_nvfp4((2, 64, 48))
    for layout in ("linear", "swizzled"):
        flat, _ = gemm.operands(with_scale_layout(a, layout), with_scale_layout(b, layout), offsets, sizes)
        plain = (*flat[:9], False, *flat[10:])
        pairs = (*flat[:9], True, *flat[10:])
        for op, arguments in (
            (gemm.GROUPED_MM, plain),
            (gemm.GROUPED_MM_SWIGLU, (*pairs, 10.0)),
            (gemm.GROUPED_MM_SWIGLU_QUANTIZE, (*pairs, None, torch.tensor(0.5), layout)),
        ):
            operator = getattr(torch.ops.dsv4lab, op.name).default
            torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
            results, fakes = op(*arguments), op.fake(*arguments)
            if op is not gemm.GROUPED_MM_SWIGLU_QUANTIZE:
                results, fakes = [results], [fakes]
            for real, fake in zip(results, fakes, strict=True):
                assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_compiles_as_one_graph():
    offsets, sizes, rows, _ = groups([3, 125])
    a = random_nvfp4((rows, 48), torch.full((rows,), 2.0**-6), granularity="token")
    b = random_nvfp4((2, 64, 48), torch.full((2, 2), 2.0**-12), 1, "group", interleaved=True)
    w2 = random_nvfp4((2, 48, 32), torch.full((2,), 2.0**-6), 2, "group")

    def both(a, b, w2):
        return grouped_mm(grouped_mm_swiglu(a, b, offsets, sizes, output="nvfp4"), w2, offsets, sizes)

    y, want = torch.compile(both, fullgraph=True)(a, b, w2), both(a, b, w2)
    assert torch.equal(y[:3], want[:3]) and torch.equal(y[128:253], want[128:253])


GOOD = {
    "a": random_nvfp4((256, 48)),
    "b": random_nvfp4((2, 32, 48)),
    "offsets": torch.tensor([128, 256], dtype=torch.int32),
    "sizes": torch.tensor([5, 7], dtype=torch.int32),
}
PAIRS = random_nvfp4((2, 16, 48), interleaved=True)


def grouped_activation(n):
    return random_nvfp4((256, 48), torch.ones(n), granularity="group")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"a": "text"}, TypeError, "a must be an NVFP4Tensor or a bf16 tensor, got str"),
        ({"a": torch.ones(256, 48)}, TypeError, "a must be bf16 .* got torch.float32"),
        ({"a": random_nvfp4((256, 64))}, ValueError, r"a must have K = 48 .* \(256, 64\)"),
        ({"a": random_nvfp4((250, 48))}, ValueError, r"rows % 128 == 0 .* \(250, 48\)"),
        ({"a": random_nvfp4((2, 128, 48))}, ValueError, r"a must be \(rows, K\)"),
        ({"a": grouped_activation(3)}, ValueError, r"2 groups, got \(3,\)"),
        ({"a": random_nvfp4((256, 48), interleaved=True)}, ValueError, "a is marked as interleaved"),
        ({"b": torch.ones(2, 32, 48)}, TypeError, "b must be an NVFP4Tensor, got Tensor"),
        ({"b": random_nvfp4((1, 2, 32, 48))}, ValueError, r"b must be \(G, N, K\) or \(N, K\)"),
        ({"b": random_nvfp4((2, 32, 48), torch.ones(2, 32))}, ValueError, r"\(2, 2\), got \(2, 32\)"),
        ({"b": random_nvfp4((2, 33, 48), torch.ones(2, 2))}, ValueError, "N % 2 == 0 .* got N = 33"),
        ({"b": random_nvfp4((2, 40, 48), interleaved=True)}, ValueError, "N % 16 == 0 .* got N = 40"),
        ({"offsets": None, "sizes": None}, ValueError, "offsets and sizes are needed for the 2 groups"),
        ({"offsets": None}, TypeError, "offsets must be a tensor, got NoneType"),
        ({"sizes": torch.tensor([5, 7])}, TypeError, "sizes must be int32, got torch.int64"),
        ({"sizes": torch.ones(3, dtype=torch.int32)}, ValueError, r"sizes must have shape \(2,\)"),
        ({"sizes": torch.tensor([5, 129], dtype=torch.int32)}, ValueError, "got 129 for group 1"),
        ({"offsets": torch.tensor([100, 256], dtype=torch.int32)}, ValueError, "got 100 after 0 for group 0"),
        ({"offsets": torch.tensor([128, 384], dtype=torch.int32)}, ValueError, "got 384 after 128"),
        ({"out": torch.empty(256, 32)}, TypeError, "out must be bf16, got torch.float32"),
        ({"out": torch.empty(255, 32, dtype=torch.bfloat16)}, ValueError, r"out must .* \(256, 32\)"),
        ({"out": torch.empty(256, 32, dtype=torch.bfloat16, device="meta")}, ValueError, "out is on meta"),
        ({"backend": "hopper"}, ValueError, "hopper.*cannot run grouped_mm on cpu"),
        ({"a": random_nvfp4((256, 48)).to("meta")}, ValueError, "a is on meta, but b is on cpu"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, words):
    grouped_mm(**GOOD)
    with pytest.raises(error, match=words):
        grouped_mm(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"b": GOOD["b"]}, ValueError, "b must be interleaved"),
        ({"limit": 0}, ValueError, "limit must be a positive number, got 0"),
        ({"limit": float("nan")}, ValueError, "limit must be a positive number, got nan"),
        ({"output": "fp8"}, ValueError, "output must be .* got 'fp8'"),
        ({"global_scale": 1.0}, ValueError, 'global_scale is for output="nvfp4"'),
        ({"output": "nvfp4", "limit": None}, ValueError, "global_scale is needed"),
        ({"output": "nvfp4", "global_scale": 1e-37}, ValueError, "global_scale must be"),
        ({"output": "nvfp4", "global_scale": torch.ones(2)}, ValueError, r"global_scale must .*\(2,\)"),
        ({"output": "nvfp4", "scale_layout": "odd"}, ValueError, "scale_layout must be"),
        ({"output": "nvfp4", "b": PAIRS}, ValueError, "I % 16 == 0 .* I = 8"),
        ({"output": "nvfp4", "out": torch.empty(1)}, TypeError, "out must be an NVFP4Tensor"),
        ({"output": "nvfp4", "out": random_nvfp4((256, 16)).to("meta")}, ValueError, "out is on meta, but"),
        ({"limit": float("inf")}, ValueError, "limit must be a positive number, got inf"),
    ],
)  # fmt: skip
def test_bad_swiglu_arguments_are_named(change, error, words):
    good = {**GOOD, "b": GOOD["b"].with_(interleaved=True)}
    grouped_mm_swiglu(**good)
    with pytest.raises(error, match=words):
        grouped_mm_swiglu(**{**good, **change})
