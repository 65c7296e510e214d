"""The NVFP4 operand refuses what does not fit together, and survives pytrees, compile, copies and pickle."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils import _pytree

from dsv4lab import formats
from dsv4lab.formats import NVFP4Tensor, ceil_to, scales_shape, sqnr
from dsv4lab.quantize import quantize_nvfp4


def make(lead=(4,), k=32, g=(), scales=None, **fields) -> NVFP4Tensor:
    scales = (*lead, k // 16) if scales is None else scales
    return NVFP4Tensor(
        torch.zeros((*lead, k // 2), dtype=torch.uint8),
        torch.zeros(scales).to(torch.float8_e4m3fn),
        torch.ones(g),
        **fields,
    )


def test_constants_are_those_of_the_formats():
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert tuple(e2m1[:8]) == formats.E2M1_VALUES
    assert ml_dtypes.finfo(ml_dtypes.float4_e2m1fn).max == formats.E2M1_MAX == 6
    e4m3 = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn)
    assert (e4m3.max, e4m3.smallest_subnormal, e4m3.smallest_normal) == (
        formats.E4M3_MAX,
        formats.E4M3_MIN,
        formats.E4M3_MIN_NORMAL,
    )
    assert formats.GLOBAL_DIVISOR == 2688 and formats.FOUR_OVER_SIX_DIVISOR == 1536


def test_range_of_g_keeps_every_step_normal():
    """6 g, s g and 1 / (s g) at both ends, for the least and largest scale."""
    for g in (formats.GLOBAL_MIN, formats.GLOBAL_MAX):
        for s in (formats.E4M3_MIN, formats.E4M3_MAX):
            for value in (6 * g, s * g, 1 / (s * g)):
                assert 2.0**-126 <= value < 2.0**128


@pytest.mark.parametrize(
    ("lead", "g", "expected"),
    [
        ((4,), (), "tensor"),
        ((4,), (4,), "token"),
        ((4,), (4, 1), "token"),
        ((4,), (3,), "group"),
        ((4,), (1, 2), "group"),
        ((3, 4), (3, 4), "token"),
        ((3, 4), (3,), "group"),
        ((3, 4), (3, 2), "group"),
        ((3, 2), (3, 2), "token"),
        ((2, 3, 4), (2, 3, 4), "token"),
        ((), (), "tensor"),
        ((), (1,), "token"),
    ],
)
def test_granularity_is_inferred(lead, g, expected):
    assert make(lead, g=g).granularity == expected


def test_stated_granularity_wins_where_shapes_agree_with_it():
    assert make((3, 2), g=(3, 2), granularity="group").granularity == "group"
    assert make((4,), g=(4,), granularity="group").granularity == "group"
    with pytest.raises(ValueError, match="does not fit granularity 'token'"):
        make((4,), g=(3,), granularity="token")
    with pytest.raises(ValueError, match="does not fit any granularity"):
        make((), g=(3,))


def test_shapes_and_sizes():
    t = make((3, 5), k=64)
    assert (t.shape, t.K, t.rows, t.device) == ((3, 5, 64), 64, 15, torch.device("cpu"))
    assert t.nbytes == 15 * 32 + 15 * 4 + 4  # 4.5 bits a value, and g
    assert scales_shape((130, 80), "swizzled") == (256, 8)
    assert [ceil_to(n, 128) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(4, 16)}, TypeError, "codes must be torch.uint8, got torch.float32"),
        ({"codes": None}, TypeError, "codes must be a tensor, got NoneType"),
        ({"block_scales": torch.zeros(4, 2)}, TypeError, "block_scales must be torch.float8_e4m3fn"),
        (
            {"global_scale": torch.zeros((), dtype=torch.float64)},
            TypeError,
            "global_scale must be torch.float32",
        ),
        ({"global_scale": torch.zeros((), device="meta")}, ValueError, "global_scale is on meta"),
        ({"codes": torch.zeros(4, 12, dtype=torch.uint8)}, ValueError, r"K % 16 == 0, got shape \(4, 12\)"),
        ({"codes": torch.zeros(5, 16, dtype=torch.uint8)}, ValueError, r"block_scales must be \(5, 2\)"),
        ({"scale_layout": "swizzled"}, ValueError, r"block_scales must be \(128, 4\)"),
        ({"scale_layout": "blocked"}, ValueError, "got 'blocked'"),
        ({"granularity": "row"}, ValueError, "got 'row'"),
        (
            {"global_scale": torch.ones(4, 3), "granularity": None},
            ValueError,
            r"shape \(4, 3\) does not fit any granularity",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(make(), **change)


def test_swizzled_needs_matrices():
    make((130,), scales=(256, 4), scale_layout="swizzled")
    make((3, 130), scales=(3, 256, 4), scale_layout="swizzled")
    with pytest.raises(ValueError, match="scale_layout='swizzled' needs"):
        make((2, 3, 130), scales=(2, 3, 256, 4), scale_layout="swizzled")


def test_frozen_and_unequal_by_value():
    t = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.scale_layout = "swizzled"
    assert t != make() and len({t, t}) == 1


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    parts = ("codes", "block_scales", "global_scale")
    equal = all(
        torch.equal(getattr(a, p).flatten().view(torch.uint8), getattr(b, p).flatten().view(torch.uint8))
        for p in parts
    )
    return equal and all(
        getattr(a, m) == getattr(b, m) for m in ("scale_layout", "granularity", "interleaved")
    )


def test_pytree_keeps_the_description():
    t = quantize_nvfp4(torch.randn(4, 32), "token").with_(interleaved=True)
    assert same(_pytree.tree_map(torch.clone, t), t)
    assert _pytree.tree_map(lambda v: v.dtype, t).codes is torch.uint8  # leaves may be anything
    leaves, spec = _pytree.tree_flatten({"a": [t]})
    assert len(leaves) == 3 and same(_pytree.tree_unflatten(leaves, spec)["a"][0], t)


def test_copies_and_pickle():
    t = quantize_nvfp4(torch.randn(4, 32), "token")
    assert same(copy.deepcopy(t), t) and same(pickle.loads(pickle.dumps(t)), t) and same(t.to("cpu"), t)
    assert t.to("meta").device.type == "meta"


def test_whole_graph_with_operands_in_and_out():
    def step(t: NVFP4Tensor, x: torch.Tensor):
        made = quantize_nvfp4(x, "token").with_(interleaved=True)
        return made, t.with_(global_scale=t.global_scale * 2), t.codes.float() * t.global_scale[:, None]

    t, x = quantize_nvfp4(torch.randn(4, 32), "token"), torch.randn(4, 32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(t, x), step(t, x), strict=True):
        assert same(got, expected) if isinstance(expected, NVFP4Tensor) else torch.equal(got, expected)


def test_sqnr_by_hand():
    x = torch.tensor([3.0, 4.0])
    assert sqnr(x, torch.tensor([3.0, 3.5])) == pytest.approx(10 * math.log10(25 / 0.25))  # 20 dB
    assert sqnr(x, x) == math.inf and sqnr(x * 0, x) == -math.inf
    assert math.isnan(sqnr(x, torch.tensor([3.0, math.nan])))
    with pytest.raises(ValueError, match="approximation must have"):
        sqnr(x, x[:1])


def test_sqnr_sums_in_float64():
    """Squares of 1e30 exceed fp32."""
    x = torch.full((100,), 1e30)
    y = x.clone()
    y[0] = 0
    assert sqnr(x, y) == pytest.approx(20, rel=1e-12)
