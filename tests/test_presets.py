"""Each preset equals its library's recipe, written out here in numpy; the table says where they differ."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4lab import presets
from dsv4lab.formats import sqnr
from dsv4lab.presets import PRESETS, from_reciprocal, quantize_preset, to_reciprocal
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4

F32 = np.float32
MAX = np.finfo(F32).max


def e4m3(s: np.ndarray) -> np.ndarray:
    return np.minimum(s.astype(F32), F32(448)).astype(ml_dtypes.float8_e4m3fn).astype(F32)


def modelopt(x, a, amax):
    g = amax / F32(2688)
    s = a / (F32(6) * g)
    s = e4m3(np.maximum(np.where(s == 0, F32(1), s), F32(2.0**-9)))
    return s, x / (s * g)[..., None]


def torchao(x, a, amax):
    g = amax / F32(2688)
    s = e4m3(np.clip(a / F32(6) / g, F32(2.0**-6), F32(448)))
    return s, x / (s * g)[..., None]


def flashinfer(x, a, amax):
    e = F32(2688) / amax
    s = e4m3(e * (a * (F32(1) / F32(6))))
    return s, x * np.where(s == 0, F32(0), F32(1) / (s * (F32(1) / e)))[..., None]


def transformer_engine(x, a, amax):
    e = F32(2688) / amax
    s = e4m3(a * (e * (F32(1) / F32(6))))
    return s, x * np.minimum(F32(1) / (s * (F32(1) / e)), MAX)[..., None]


RECIPES = {
    "modelopt": modelopt,
    "torchao": torchao,
    "flashinfer": flashinfer,
    "transformer_engine": transformer_engine,
}


def data() -> torch.Tensor:
    """Normal values, a zero block, blocks down to 2^-24 of the largest, -0, and a tiny block."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator)
    x *= torch.exp2(-torch.randint(0, 24, (64, 16), generator=generator).float()).repeat_interleave(16, 1)
    x[0, :16] = 0.0
    x[1, :16] = -0.0
    x[2, :16] = x.abs().max() * 2.0**-30
    return x.bfloat16()


def codes_of(t) -> np.ndarray:
    packed = t.codes.numpy()
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize("name", list(RECIPES))
def test_preset_equals_its_recipe(name):
    x = data()
    blocks = x.float().numpy().reshape(64, 16, 16)
    a = np.abs(blocks).max(-1)
    with np.errstate(all="ignore"):
        s, y = RECIPES[name](blocks, a, a.max())
    codes = np.clip(np.nan_to_num(y), -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    t = quantize_preset(x, name)
    np.testing.assert_array_equal(t.block_scales.float().numpy(), s)
    got, expected = codes_of(t), codes.reshape(64, 256)
    if name == "modelopt":  # it takes the sign from x < 0
        expected = np.where(x.float().numpy() == 0, 0, expected)
    np.testing.assert_array_equal(got, expected)


def test_our_own_preset_is_the_pipeline():
    for x in (data(), torch.randn(8, 64), torch.zeros(1, 16)):
        t, expected = quantize_preset(x, "dsv4lab"), quantize_nvfp4(x)
        assert torch.equal(t.codes, expected.codes) and torch.equal(t.global_scale, expected.global_scale)
        assert torch.equal(t.block_scales.view(torch.uint8), expected.block_scales.view(torch.uint8))


def test_original_rounds_twice():
    """2.6 -> 2.5 -> 2, 3.6 -> 3.5 -> 3, 5.1 -> 5 -> 4, and a scale of 0.99 * 2^-9 is dropped."""
    x = torch.zeros(2, 16)
    x[0, :8] = torch.tensor([6.0, 2.6, 3.6, 5.1, 2.8, 3.8, 5.3, 0.3])
    x[1] = 6 * 2.0**-9 * 0.99
    t = quantize_preset(x, "original", 1.0)
    decoded = dequantize_nvfp4(t, torch.float32)
    assert decoded[0, :8].tolist() == [6.0, 2.0, 3.0, 4.0, 3.0, 4.0, 6.0, 0.5]
    assert t.block_scales.float()[1].item() == 0.0 and decoded[1].eq(0).all()


def test_where_the_libraries_differ():
    """g is 1 here; scales of a zero block, of one at 3 * 2^-9 (amax / 76458) and of one at 2^-12."""
    x = torch.zeros(4, 16)
    x[0], x[2], x[3] = 2688.0, 6 * 3 * 2.0**-9, 6 * 2.0**-12
    scales = {name: quantize_preset(x, name).block_scales.float()[1:, 0].tolist() for name in PRESETS}
    assert scales["modelopt"] == [1.0, 3 * 2.0**-9, 2.0**-9]
    assert scales["torchao"] == [2.0**-6, 2.0**-6, 2.0**-6]
    for name in ("dsv4lab", "original", "flashinfer", "flashinfer_exact", "transformer_engine"):
        assert scales[name] == [0.0, 3 * 2.0**-9, 0.0]
    saturated = quantize_preset(x, "transformer_engine")
    assert codes_of(saturated)[3].tolist() == [7] * 16  # saturated under a scale of 0
    assert dequantize_nvfp4(saturated)[3].eq(0).all()
    assert codes_of(quantize_preset(x, "flashinfer"))[3].tolist() == [0] * 16


def test_negative_zero():
    x = torch.full((1, 16), -0.0)
    x[0, 0] = 1.0
    assert codes_of(quantize_preset(x, "dsv4lab"))[0, 1:].tolist() == [8] * 15
    assert codes_of(quantize_preset(x, "modelopt"))[0, 1:].tolist() == [0] * 15


def test_four_over_six_takes_the_better_block_maximum():
    """amax 6 with the rest at 4.5: on 6 they round to 4, on 4 (scale 1.5) they are 3 exactly."""
    x = torch.full((1, 16), 4.5)
    x[0, 0] = 6.0
    t = quantize_preset(x, "four_over_six", 1.0)
    assert t.block_scales.float().item() == 1.5
    assert torch.equal(dequantize_nvfp4(t, torch.float32), x)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain = quantize_nvfp4(x, divisor=1536.0)
    chosen = quantize_preset(x, "four_over_six")
    assert torch.equal(chosen.global_scale, plain.global_scale)
    error = [
        (dequantize_nvfp4(t, torch.float32) - x).square().reshape(64, 16, 16).sum(-1) for t in (chosen, plain)
    ]
    assert (error[0] <= error[1] * (1 + 1e-5)).all() and (error[0] < error[1] * 0.9).any()


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_usable_quantizer(name):
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    t = quantize_preset(x, name)
    assert sqnr(x, dequantize_nvfp4(t, torch.float32)) > (18 if name == "original" else 20)
    for empty in (torch.zeros(2, 32), torch.zeros(0, 32)):
        assert dequantize_nvfp4(quantize_preset(empty, name)).eq(0).all()


def test_table_has_a_row_a_preset_and_plain_values():
    rows = presets.table()
    assert [row["name"] for row in rows] == list(PRESETS)
    directions = {row["name"]: row["global_scale"] for row in rows}
    assert directions["flashinfer"] == "encode" and directions["modelopt"] == "decode"
    assert all(isinstance(v, str | float | bool | tuple) for row in rows for v in row.values())


# ---------------------------------------------------------------- scale direction


def test_reciprocals_are_inverse():
    assert from_reciprocal(2688.0) == 1 / 2688 and to_reciprocal(0.25) == 4.0
    g = torch.tensor([0.5, 1e-3])
    torch.testing.assert_close(from_reciprocal(to_reciprocal(g)), g, rtol=2.0**-23, atol=0)
    for bad in (0.0, -1.0, float("inf"), float("nan"), 1e38):
        with pytest.raises(ValueError, match="global"):
            from_reciprocal(bad)
    assert from_reciprocal(torch.tensor([0.0, -1.0, 1e38])).isnan().all()


@pytest.mark.parametrize("amax", [1e-3, 4.0, 100.0, 1e6])
def test_the_wrong_direction_is_seen(amax):
    """A reciprocal in place of g loses the signal; the adapter brings it back.

    Quantizing with it does no harm while E4M3's range covers (amax / 2688)^2, as for 100; decoding always
    does.
    """
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x *= amax / x.abs().max()
    encode = 2688 / x.abs().max()
    right = quantize_nvfp4(x, from_reciprocal(encode))
    assert sqnr(x, dequantize_nvfp4(right, torch.float32)) > 19
    assert sqnr(x, dequantize_nvfp4(right.with_(global_scale=encode), torch.float32)) < 1
    wrong = sqnr(x, dequantize_nvfp4(quantize_nvfp4(x, encode), torch.float32))
    assert wrong > 19 if amax == 100 else wrong < 1


def test_the_wrong_direction_out_of_range_is_refused():
    """An encode scale of 2^116, from data around 2^-105, is no decode scale; nor the other way round."""
    with pytest.raises(ValueError, match="global_scale must be 0 or within"):
        quantize_nvfp4(torch.ones(1, 16), 2.0**116)
    with pytest.raises(ValueError, match="global_scale must be 0 or within"):
        from_reciprocal(2.0**101)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_preset(torch.ones(1, 16), "mx"), "preset must be one of"),
        (lambda: quantize_preset(torch.ones(1, 15), "torchao"), "K % 16"),
        (lambda: quantize_preset(torch.full((1, 16), float("nan")), "torchao"), "NaN or Inf"),
        (lambda: quantize_preset(torch.ones(1, 16), "torchao", -1.0), "global_scale must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
