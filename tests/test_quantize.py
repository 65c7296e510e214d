"""Quantization is bit-exact against numpy and ml_dtypes, and the defects of earlier pipelines stay away."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4lab import presets, quantize, reference
from dsv4lab.formats import NVFP4Tensor, sqnr
from dsv4lab.layouts import unswizzle_scales
from dsv4lab.ops import OPS
from dsv4lab.quantize import dequantize_nvfp4, quantize_nvfp4

F32 = np.float32
NAN_SCALE = 0x7F
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# ---------------------------------------------------------------- the oracle: numpy fp32 and ml_dtypes casts


def oracle(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes and scale bytes of fp32 x (..., K) for a global scale that broadcasts to (..., K/16)."""
    blocks = x.astype(F32).reshape(*x.shape[:-1], -1, 16)
    finite = np.isfinite(blocks).all(-1)
    with np.errstate(all="ignore"):
        scaled = np.where(finite, np.abs(blocks).max(-1) / (F32(6) * g), F32(np.nan))
        scales = np.minimum(scaled, F32(448)).astype(ml_dtypes.float8_e4m3fn)
        product = scales.astype(F32) * g
        r = np.where(product == 0, F32(0), F32(1) / product)
        y = (blocks * r[..., None]).astype(F32)
    dead = np.isnan(product)
    y = np.clip(np.where(dead[..., None], F32(0), y), F32(-6), F32(6))
    codes = y.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(x.shape) & 15
    bytes_ = np.where(np.isnan(scales.astype(F32)), NAN_SCALE, scales.view(np.uint8)).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, bytes_


def oracle_scale(x: np.ndarray, axes, divisor: float = 2688.0) -> np.ndarray:
    """max(max|x|, 1e-8) / divisor over axes, NaN for data or results out of range."""
    amax = np.abs(x.astype(F32)).max(axes)
    g = np.maximum(amax, F32(1e-8)) / F32(divisor)
    return np.where(np.isfinite(amax) & (g <= 2.0**115), g, F32(np.nan)).astype(F32)


def assert_exact(t: NVFP4Tensor, x: torch.Tensor, g: np.ndarray) -> None:
    codes, scales = oracle(x.float().cpu().numpy(), g)
    np.testing.assert_array_equal(t.block_scales.view(torch.uint8).cpu().numpy(), scales)
    np.testing.assert_array_equal(t.codes.cpu().numpy(), codes)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape and bytes, NaN included."""
    a, b = (t.cpu().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def adversarial() -> dict[str, torch.Tensor]:
    """Named inputs (rows, K) in fp32 or bf16."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 256, generator=generator)
    outlier = torch.zeros(4, 64)
    outlier[1, 17], outlier[2, 63] = 1e4, -3e-7
    poisoned = normal.clone()
    poisoned[3, 40], poisoned[9, 0], poisoned[20, 255] = math.nan, math.inf, -math.inf
    spread = normal * torch.exp2(torch.randint(-40, 40, normal.shape, generator=generator).float())
    return {
        "normal bf16": normal.bfloat16(),
        "normal fp16": normal.half(),
        "normal fp32": normal,
        "wide range": spread,
        "zeros": torch.zeros(2, 32),
        "negative zeros": torch.full((2, 32), -0.0),
        "one outlier among zeros": outlier,
        "NaN and Inf": poisoned,
        "bf16 subnormals": (every_bf16()[:128].float() * 1.0).reshape(1, 128),
        "fp32 subnormals": torch.arange(64).to(torch.int32).view(torch.float32).reshape(2, 32),
        "largest bf16": torch.full((1, 16), torch.finfo(torch.bfloat16).max),
        "tiny": normal * 1e-30,
    }


# ---------------------------------------------------------------- bit-exactness


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(adversarial()))
def test_runtime_policies_equal_the_oracle(name, device):
    x = adversarial()[name]
    for policy, axes in (("tensor", None), ("token", -1)):
        t = quantize_nvfp4(x.to(device), policy)
        g = oracle_scale(x.float().numpy(), axes)
        np.testing.assert_array_equal(t.global_scale.cpu().numpy(), g)
        assert_exact(t, x, g if axes is None else g[:, None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(adversarial()))
@pytest.mark.parametrize("g", [1.0, 2.0**-100, 2.0**115, 0.0012345, 1e-6, 77.7])
def test_known_scale_equals_the_oracle(name, g, device):
    x = adversarial()[name]
    assert_exact(quantize_nvfp4(x.to(device), g), x, F32(g))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("g", [1.0, 0.3, 2.0**-20, 1e30])
def test_every_bf16_value(g, device):
    """As the only value of its block, beside a 1, and beside its neighbours."""
    values = every_bf16()
    alone = torch.zeros(65536, 16, dtype=torch.bfloat16)
    alone[:, 5] = values
    with_one = torch.ones(65536, 16, dtype=torch.bfloat16)
    with_one[:, 10] = values
    for x in (alone, with_one, values.reshape(-1, 64)):
        assert_exact(quantize_nvfp4(x.to(device), g), x, F32(g))


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_at_every_rounding_tie(device):
    """Every tie and its fp32 neighbours, at every block scale, for powers of two g, where ties are exact."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], F32)
    near = np.concatenate([ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(9))])
    y = np.concatenate([near, -near]).reshape(2, 21)
    y = np.concatenate([y[:, :15], y[:, 6:21]], 0)  # 15 in a block, beside the largest value
    s = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
    for g in (F32(1), F32(2.0**-9), F32(2.0**30)):
        blocks = np.concatenate([np.full((4, 1), 6, F32), y], 1) * (s * g)[:, None, None]
        x = torch.from_numpy(blocks.astype(F32).reshape(126, 64))
        t = quantize_nvfp4(x.to(device), float(g))
        assert_exact(t, x, g)
        assert (t.block_scales.float().cpu().numpy() == s[:, None]).all()
    # the same in words, at scale 1
    x = torch.zeros(1, 16)
    x[0, :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    decoded = dequantize_nvfp4(quantize_nvfp4(x.to(device), 1.0), torch.float32)
    assert decoded[0, :8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("device", DEVICES)
def test_amax_at_every_e4m3_boundary(device):
    """The block's largest value where its scale is a tie between two E4M3 numbers, and one ulp beside it."""
    held = np.arange(0, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
    middle = (held[1:] + held[:-1]) / 2 * 6
    amax = np.concatenate([middle, np.nextafter(middle, F32(0)), np.nextafter(middle, F32(1e9)), held * 6])
    amax = np.concatenate([amax, np.array([448 * 6, 449 * 6, 464 * 6, 480 * 6, 1e6], F32)])
    x = torch.from_numpy(amax.astype(F32))[:, None] * torch.linspace(-1, 1, 16)
    for g in (1.0, 2.0**-30, 0.7):
        assert_exact(quantize_nvfp4((x * g).to(device), g), x * g, F32(g))


@settings(max_examples=150, deadline=None)
@given(
    bits=st.lists(st.integers(0, 65535), min_size=32, max_size=32),
    policy=st.sampled_from(["tensor", "token"]),
    divisor=st.sampled_from([2688.0, 1536.0]),
)
def test_any_bits(bits, policy, divisor):
    x = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(2, 16)
    t = quantize_nvfp4(x, policy, divisor=divisor)
    g = oracle_scale(x.float().numpy(), None if policy == "tensor" else -1, divisor)
    np.testing.assert_array_equal(t.global_scale.numpy(), g)
    assert_exact(t, x, g if policy == "tensor" else g[:, None])


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=16, max_size=16),
    g=st.floats(2.0**-100, 2.0**115, width=32),
)
def test_any_fp32_and_any_known_scale(values, g):
    x = torch.tensor(values, dtype=torch.float32).reshape(1, 16)
    assert_exact(quantize_nvfp4(x, g), x, F32(g))


def test_dequantize_is_the_exact_product_rounded_once():
    """Every code with every scale; fp32(code * s * g) from float64, where code * s is exact."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)  # 512 values a row
    scales = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    code = codes.numpy()
    values = np.stack([e2m1[code % 16], e2m1[code // 16]], -1).reshape(128, 512)
    s = scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64).repeat(16, 1)
    for g in (1.0, F32(0.0012345), 3e20):
        with np.errstate(all="ignore"):
            expected = (values * s * np.float64(F32(g))).astype(F32)
        t = NVFP4Tensor(codes, scales, torch.tensor(g, dtype=torch.float32))
        got = dequantize_nvfp4(t, torch.float32).numpy()
        np.testing.assert_array_equal(got, expected)
        assert (np.signbit(got) == np.signbit(expected))[:127].all()
        assert np.isnan(got[127]).all()
        bf16 = dequantize_nvfp4(t).float().numpy()
        np.testing.assert_array_equal(bf16, expected.astype(ml_dtypes.bfloat16).astype(F32))


# ---------------------------------------------------------------- worked examples


def test_one_block_by_hand():
    """amax 12 and g 1: scale e4m3(12 / 6) = 2, r = 1/2, so 5.2 -> 2.6 -> 3, decoded 6."""
    x = torch.zeros(1, 16)
    x[0, :6] = torch.tensor([12.0, 5.2, -7.2, 10.2, 0.5, -0.4])
    t = quantize_nvfp4(x, 1.0)
    assert t.block_scales.float().tolist() == [[2.0]]
    decoded = dequantize_nvfp4(t, torch.float32)[0, :6]
    assert decoded.tolist() == [12.0, 6.0, -8.0, 12.0, 0.0, -0.0]  # 2.6 -> 3, 3.6 -> 4, 5.1 -> 6, 0.25 -> 0
    assert t.codes[0, :3].tolist() == [0x57, 0x7E, 0x80]  # even k low: 6 and 3, -4 and 6, 0 and -0
    assert torch.signbit(decoded[5])


def test_global_scale_by_hand():
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 31] = 2688.0, -26.88
    assert quantize.global_scale(x).item() == 1.0
    torch.testing.assert_close(
        quantize.global_scale(x, "token"), torch.tensor([1.0, 0.01]), rtol=1e-7, atol=0
    )
    zeros = quantize.global_scale(torch.zeros(1, 16)).item()
    assert zeros == F32(F32(1e-8) / F32(2688))
    assert quantize.global_scale(x, divisor=1536.0).item() == 1.75
    assert quantize.bound_global_scale(10.0) == 100.0 / 2688


@pytest.mark.parametrize("limit", [0.7, 1.0, 7.0, 10.0, 31.3])
@pytest.mark.parametrize("weight", [1.0, 0.37, 2.5])
def test_bound_is_never_exceeded(limit, weight):
    """The largest h there is, in bf16 with and without the routing weight, does not pass 2688 g."""
    gate = torch.tensor([[limit, limit * 2, 1e30]])
    h = reference.swiglu(gate, -gate, limit).float().abs().amax()
    largest = max((h * weight).bfloat16().item(), h.item() * weight)
    g = quantize.bound_global_scale(limit, weight)
    assert largest <= g * 2688 * (1 + 1e-12)
    assert largest * (1 + 2**-6) > g * 2688  # and it is tight to two bf16 roundings


# ---------------------------------------------------------------- defects of earlier pipelines


def test_defect_1_e2m1_is_rounded_once():
    """2.6 -> 3, 3.6 -> 4, 5.1 -> 6; half steps and then a table would give 2, 3 and 4."""
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([6.0, 2.6, 3.6, 5.1])
    assert dequantize_nvfp4(quantize_nvfp4(x, 1.0), torch.float32)[0, :4].tolist() == [6.0, 3.0, 4.0, 6.0]
    defective = presets.quantize_preset(x, "original", 1.0)
    assert dequantize_nvfp4(defective, torch.float32)[0, :4].tolist() == [6.0, 2.0, 3.0, 4.0]


def test_defect_2_subnormal_scales_are_kept():
    """A scale between 2^-10 and 2^-9 rounds to 2^-9; exactly 2^-10 is a tie and goes to the even 0."""
    amax = torch.tensor([2.0**-10 * 1.01, 2.0**-9 * 0.99, 2.0**-9, 2.0**-10, 2.0**-11]) * 6
    x = amax[:, None] * torch.ones(16)
    t = quantize_nvfp4(x, 1.0)
    assert t.block_scales.float().flatten().tolist() == [2.0**-9, 2.0**-9, 2.0**-9, 0.0, 0.0]
    assert dequantize_nvfp4(t, torch.float32)[:3].ne(0).all()
    assert presets.quantize_preset(x, "original", 1.0).block_scales.float()[:2].eq(0).all()


class NoHostReads(TorchDispatchMode):
    """Fails on every operator that brings a value to the host or copies one to another device."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in self.FORBIDDEN:
            raise AssertionError(f"{func} reads a value on the host")
        return func(*args, **(kwargs or {}))


def policy_calls():
    x = torch.randn(4, 3, 64).bfloat16()
    weight, mix = torch.ones(64), torch.rand(4, 3)
    for policy in ("tensor", "token", "group", lambda y: y.float().abs().amax() / 2688, 0.01):
        yield lambda p=policy: quantize_nvfp4(x, p)
        yield lambda p=policy: quantize_nvfp4(x, p, scale_layout="swizzled")
        yield lambda p=policy: quantize.swiglu_quantize(x, 10.0, p)
        yield lambda p=policy: quantize.rmsnorm_quantize(x, weight, 1e-6, p)
    for policy in ("tensor", "token"):
        yield lambda p=policy: quantize.mhc_rmsnorm_quantize(x, mix, weight, 1e-6, p)
        yield lambda p=policy: dequantize_nvfp4(quantize_nvfp4(x, p))


def test_defect_3_no_policy_reads_the_data_on_the_host():
    with pytest.raises(AssertionError, match="reads a value"), NoHostReads():
        torch.ones(3).amax().item()  # the defect itself is seen
    calls = list(policy_calls())
    with NoHostReads():
        for call in calls:
            call()


def test_defect_3_inside_the_reference():
    """The operators hide their insides from a dispatch mode, so the implementations run under it by hand."""
    x, g = torch.randn(4, 64).bfloat16(), None
    weight, mix, streams = torch.ones(64), torch.rand(2, 2), torch.randn(2, 2, 64)
    for granularity in ("tensor", "token"):
        tail = (g, granularity, 2688.0, True)
        with NoHostReads():
            codes, scales, scale = reference.quantize(x, *tail)
            reference.dequantize(codes, scales, scale, granularity, True, False, torch.bfloat16)
            reference.quantize(x, torch.tensor(0.1), "tensor", 2688.0, False)
            reference.rmsnorm_quantize(x, weight, 1e-6, *tail)
            reference.mhc_rmsnorm_quantize(streams, mix, weight, 1e-6, *tail)
            reference.swiglu_quantize(x, 10.0, True, *tail)


def test_defect_3_one_graph():
    """torch.compile takes every policy without a break and gives the same bits."""

    def layer(x, weight, g):
        a = quantize_nvfp4(x, "tensor", scale_layout="swizzled")
        b = quantize_nvfp4(x, lambda y: y.float().abs().amax() / 2688)
        c, rrms = quantize.rmsnorm_quantize(x, weight, 1e-6, g)
        d = quantize.swiglu_quantize(dequantize_nvfp4(c), 10.0, "token")
        return a, b, c, rrms, dequantize_nvfp4(d), d.shape

    args = (torch.randn(5, 64).bfloat16(), torch.rand(64), torch.tensor(0.002))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args)
    for got, expected in zip(compiled, layer(*args), strict=True):
        if isinstance(expected, NVFP4Tensor):
            assert (got.scale_layout, got.granularity) == (expected.scale_layout, expected.granularity)
            parts = [
                (getattr(got, n), getattr(expected, n)) for n in ("codes", "block_scales", "global_scale")
            ]
        else:
            parts = [(got, expected)] if isinstance(expected, torch.Tensor) else []
        for a, b in parts:
            assert same_bytes(a, b)


def test_defect_4_too_small_a_scale_saturates():
    """g too small by f clips what exceeds amax / f: that loss alone bounds the SQNR, and norms shrink."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    amax, g = x.abs().max().item(), quantize.global_scale(x).item()
    decoded = {f: dequantize_nvfp4(quantize_nvfp4(x, g / f), torch.float32) for f in (1, 4, 16)}
    for f in (4, 16):
        clipped = x.clamp(-amax / f, amax / f)
        assert decoded[f].abs().max().item() == pytest.approx(amax / f, rel=1e-6)
        assert sqnr(x, decoded[f]) < sqnr(x, clipped) + 0.1
        assert decoded[f].norm() < clipped.norm() * 1.01
    # for normal data: relative error about 2^-3.4 from E2M1 steps, so 20 dB, when nothing is clipped
    assert sqnr(x, decoded[1]) > 19 > 9 > sqnr(x, decoded[4]) > sqnr(x, decoded[16])


def test_defect_5_each_group_and_row_has_its_own_scale():
    x = torch.stack([torch.full((2, 16), 6.0), torch.full((2, 16), 6e-6)])
    t = quantize_nvfp4(x, "group")
    np.testing.assert_array_equal(t.global_scale.numpy(), oracle_scale(x.numpy(), (1, 2)))
    assert sqnr(x, dequantize_nvfp4(t, torch.float32)) > 100
    one = dequantize_nvfp4(quantize_nvfp4(x, "tensor"), torch.float32)
    assert one[1].eq(0).all()  # under one scale for all, the quiet group is lost
    tokens = quantize_nvfp4(x, "token")
    assert tokens.global_scale.shape == (2, 2) and sqnr(x, dequantize_nvfp4(tokens, torch.float32)) > 100


def test_defect_5_swiglu_scale_is_of_the_product_alone():
    """A large gate beside a zero up must not reach the scale; nor may a large up beside a closed gate."""
    gate_up = torch.zeros(2, 64)
    gate_up[:, :32], gate_up[:, 32] = 9.0, 0.001
    t = quantize.swiglu_quantize(gate_up, 10.0, "tensor")
    h = reference.swiglu(gate_up[:, :32], gate_up[:, 32:], 10.0)
    assert t.shape == (2, 32)
    assert t.global_scale.item() == oracle_scale(h.float().numpy(), None)
    assert h.abs().max() < 0.01


# ---------------------------------------------------------------- non-finite data and ranges


def test_non_finite_data_never_becomes_a_number():
    for poison in (math.nan, math.inf, -math.inf):
        x = torch.ones(2, 48)
        x[1, 20] = poison
        known = quantize_nvfp4(x, 0.01)
        # 1 / (6 * 0.01) = 16.67 -> 16 = 2^4, exponent 4 + 7, no mantissa
        assert known.block_scales.view(torch.uint8)[1].tolist() == [11 << 3, NAN_SCALE, 11 << 3]
        assert known.codes[1, 8:16].eq(0).all()
        decoded = dequantize_nvfp4(known)
        assert decoded[1, 16:32].isnan().all() and decoded.isnan().sum() == 16
        assert quantize_nvfp4(x, "tensor").global_scale.isnan()
        assert dequantize_nvfp4(quantize_nvfp4(x, "tensor")).isnan().all()
        assert quantize_nvfp4(x, "token").global_scale.isnan().tolist() == [False, True]
        assert quantize.global_scale(x.unsqueeze(1), "group").isnan().tolist() == [False, True]
        with pytest.raises(ValueError, match="x holds NaN or Inf"):
            quantize_nvfp4(x, check_finite=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gate", "up"])
def test_swiglu_does_not_clamp_infinity_away(poison, where):
    gate_up = torch.ones(1, 64)
    gate_up[0, 3 if where == "gate" else 35] = poison
    decoded = dequantize_nvfp4(quantize.swiglu_quantize(gate_up, 10.0, 0.01))
    assert decoded[0, :16].isnan().all() and not decoded[0, 16:].isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_rmsnorm_of_a_poisoned_row_is_nan_throughout(poison):
    """1e30 squared exceeds fp32: 1 / rms would be 0 and the row zeros."""
    x = torch.ones(2, 32)
    x[1, 5] = poison
    t, rrms = quantize.rmsnorm_quantize(x, torch.ones(32), 1e-6, "token")
    assert dequantize_nvfp4(t).isnan().tolist() == [[False] * 32, [True] * 32]
    assert rrms.isnan().tolist() == [False, True]


@pytest.mark.parametrize("g", [2.0**-101, 2.0**116, -1.0, math.nan, math.inf])
def test_known_scale_out_of_range(g):
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="global_scale must be 0 or within"):
        quantize_nvfp4(x, g)
    if not math.isnan(g):
        for shape in ((), (4,), (4, 1)):
            with pytest.raises(ValueError, match="global_scale must be 0 or within"):
                quantize_nvfp4(x, torch.full(shape, g))
    compiled = torch.compile(quantize_nvfp4, fullgraph=True, backend="aot_eager")
    assert compiled(x, torch.tensor(g)).global_scale.isnan()  # as on a device, where nobody may look
    codes, scales, scale = reference.quantize(x, torch.tensor([g] * 4), "token", 2688.0, False)
    assert scale.isnan().all() and codes.eq(0).all()
    assert scales.view(torch.uint8).eq(NAN_SCALE).all()


def test_scale_zero_decodes_to_zero():
    x = torch.randn(2, 32)
    x[1] = 0
    t = quantize_nvfp4(x, 0.0)
    assert dequantize_nvfp4(t).eq(0).all()
    assert t.block_scales.float()[0].tolist() == [448.0, 448.0]
    assert t.block_scales.float()[1].tolist() == [0.0, 0.0]


def test_runtime_scale_beyond_the_range_is_nan():
    x = torch.full((1, 16), 3e38)
    assert quantize_nvfp4(x).global_scale.isnan()
    assert not quantize_nvfp4(x * 0.3).global_scale.isnan()


# ---------------------------------------------------------------- shapes, layouts, out


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 32), (0, 3, 32), (4, 0)])
@pytest.mark.parametrize("policy", ["tensor", "token", 0.5])
def test_empty_tensors(shape, policy):
    t = quantize_nvfp4(torch.zeros(shape), policy)
    assert t.shape == shape and t.codes.numel() == 0
    assert dequantize_nvfp4(t).shape == shape
    if policy == "token":
        assert t.global_scale.shape == shape[:-1]


def test_empty_groups_swizzled():
    t = quantize_nvfp4(torch.zeros(2, 0, 64), "group", scale_layout="swizzled")
    assert t.block_scales.shape == (2, 0, 4) and t.global_scale.tolist() == [F32(F32(1e-8) / F32(2688))] * 2
    assert dequantize_nvfp4(t).shape == (2, 0, 64)


def test_leading_dimensions_and_strides_do_not_matter():
    x = torch.randn(2, 3, 5, 32).bfloat16()
    flat = quantize_nvfp4(x.reshape(30, 32), "token")
    t = quantize_nvfp4(x, "token")
    assert t.global_scale.shape == (2, 3, 5)
    assert torch.equal(t.codes.reshape(30, 16), flat.codes)
    strided = quantize_nvfp4(x.transpose(0, 2).contiguous().transpose(0, 2), "token")
    assert torch.equal(strided.codes, t.codes)
    for part in (strided.codes, strided.block_scales, strided.global_scale):
        assert part.is_contiguous()  # as the fake implementation says
    assert quantize_nvfp4(x[0, 0, 0]).codes.shape == (16,)


@pytest.mark.parametrize("shape", [(5, 64), (130, 80), (3, 129, 32)])
def test_swizzled_scales_are_the_same_bytes_elsewhere(shape):
    x = torch.randn(shape)
    linear, swizzled = quantize_nvfp4(x, "token"), quantize_nvfp4(x, "token", scale_layout="swizzled")
    back = unswizzle_scales(swizzled.block_scales, shape[-2], shape[-1] // 16)
    assert torch.equal(back.view(torch.uint8), linear.block_scales.view(torch.uint8))
    assert torch.equal(swizzled.codes, linear.codes)
    assert torch.equal(dequantize_nvfp4(swizzled), dequantize_nvfp4(linear))


@pytest.mark.parametrize("scale_layout", ["linear", "swizzled"])
@pytest.mark.parametrize("policy", ["tensor", "token"])
def test_out_with_spare_rows(policy, scale_layout):
    x = torch.randn(130, 64)
    out = quantize_nvfp4(torch.ones(300, 64), policy, scale_layout=scale_layout)
    expected = quantize_nvfp4(x, policy, scale_layout=scale_layout)
    t = quantize_nvfp4(x, policy, scale_layout=scale_layout, out=out)
    assert t.codes.data_ptr() == out.codes.data_ptr() and t.shape == (130, 64)
    for name in ("codes", "block_scales", "global_scale"):
        assert same_bytes(getattr(t, name), getattr(expected, name))
    values = torch.full((300, 64), 7.0)
    got = dequantize_nvfp4(t, torch.float32, out=values)
    assert torch.equal(got, dequantize_nvfp4(expected, torch.float32)) and values[130:].eq(7).all()


def test_out_too_small_or_of_another_kind():
    x = torch.randn(8, 32)
    with pytest.raises(ValueError, match="out must have shape"):
        quantize_nvfp4(x, "token", out=quantize_nvfp4(x[:4], "token"))
    with pytest.raises(ValueError, match="granularity"):
        quantize_nvfp4(x, "token", out=quantize_nvfp4(x, "tensor"))
    with pytest.raises(TypeError, match="out must be"):
        dequantize_nvfp4(quantize_nvfp4(x), out=torch.empty(8, 32))


def test_out_under_compile():
    x, out = torch.randn(4, 32), quantize_nvfp4(torch.ones(6, 32), "token")

    def fill(x, out):
        return dequantize_nvfp4(quantize_nvfp4(x, "token", out=out))

    got = torch.compile(fill, fullgraph=True, backend="aot_eager")(x, out)
    assert torch.equal(got, dequantize_nvfp4(quantize_nvfp4(x, "token")))
    assert torch.equal(out.codes[:4], quantize_nvfp4(x, "token").codes)


# ---------------------------------------------------------------- weights


def test_weights_of_both_layouts_give_equal_bytes():
    w = torch.randn(3, 24, 64).bfloat16()
    for part in (w, w[0]):
        nk = quantize.quantize_weight(part, "nk")
        kn = quantize.quantize_weight(part.transpose(-1, -2).contiguous(), "kn")
        assert torch.equal(nk.codes, kn.codes) and kn.codes.is_contiguous()
        assert torch.equal(nk.block_scales.view(torch.uint8), kn.block_scales.view(torch.uint8))
        assert_exact(nk, part, oracle_scale(part.float().numpy(), None))


def test_weight_groups_and_gate_up_scales():
    w = torch.randn(3, 32, 64) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    t = quantize.quantize_weight(w, global_scale="group")
    g = oracle_scale(w.numpy(), (1, 2))
    assert_exact(t, w, g[:, None, None])
    both = torch.from_numpy(oracle_scale(w.reshape(3, 2, -1).numpy(), -1))
    t = quantize.quantize_weight(w, global_scale=both)
    assert t.granularity == "group" and t.global_scale.shape == (3, 2)
    assert_exact(t, w, both.numpy().repeat(16, 1)[:, :, None])
    assert sqnr(w[2], dequantize_nvfp4(t, torch.float32)[2]) > 19


# ---------------------------------------------------------------- fused variants


def bf16_ulp(y: torch.Tensor) -> torch.Tensor:
    """Distance between bf16 numbers around y (8 significant bits)."""
    return torch.exp2(torch.floor(torch.log2(y.abs().clamp_min(2.0**-126)))) * 2.0**-7


def test_rmsnorm_is_within_one_bf16_ulp_and_exact_from_there():
    x, weight = torch.randn(33, 256).bfloat16(), torch.randn(256).bfloat16()
    y, rrms = reference.rmsnorm(x, weight, 1e-6)
    r64 = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    y64 = x.double() * r64 * weight.double()
    assert ((y.double() - y64).abs() <= bf16_ulp(y64)).all()
    # 5 fp32 roundings and the sum's: mean of 256 squares is within 256 * 2^-24 relative
    torch.testing.assert_close(rrms.double(), r64[:, 0], rtol=300 * 2.0**-24, atol=0)
    for policy in ("tensor", "token", 0.01, lambda y: y.float().abs().amax() / 100):
        t, got_rrms = quantize.rmsnorm_quantize(x, weight, 1e-6, policy, scale_layout="swizzled")
        expected = quantize_nvfp4(y, policy, scale_layout="swizzled")
        assert torch.equal(t.codes, expected.codes) and torch.equal(got_rrms, rrms)
        assert torch.equal(t.block_scales.view(torch.uint8), expected.block_scales.view(torch.uint8))


def test_rmsnorm_eps_and_out():
    x, weight = torch.full((2, 16), 1e-4), torch.ones(16)
    for eps in (0.0, 1e-8, 1e-6):
        _, rrms = quantize.rmsnorm_quantize(x, weight, eps)
        torch.testing.assert_close(rrms, torch.full((2,), (1e-8 + eps) ** -0.5))
    out = quantize_nvfp4(torch.ones(5, 16), "token")
    t, rrms = quantize.rmsnorm_quantize(x, weight, 1e-6, "token", out=out)
    expected, expected_rrms = quantize.rmsnorm_quantize(x, weight, 1e-6, "token")
    assert torch.equal(t.codes, expected.codes) and torch.equal(rrms, expected_rrms)
    assert t.codes.data_ptr() == out.codes.data_ptr()


@pytest.mark.parametrize("n_hc", [1, 2, 3, 4])
def test_mhc_mix_is_within_one_bf16_ulp_and_exact_from_there(n_hc):
    streams, mix, weight = torch.randn(9, n_hc, 64).bfloat16(), torch.rand(9, n_hc), torch.rand(64) + 0.5
    x64 = (streams.double() * mix.double()[..., None]).sum(-2)
    r64 = (x64.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    y, _ = reference.rmsnorm(reference.mhc_mix(streams, mix), weight, 1e-6)
    y64 = x64 * r64 * weight.double()
    # cancellation in the mix: its absolute error is a few fp32 roundings of the largest term
    cancellation = 8 * 2.0**-24 * (streams.double() * mix.double()[..., None]).abs().sum(-2) * r64 * 1.5
    assert ((y.double() - y64).abs() <= bf16_ulp(y64) + cancellation).all()
    t, rrms = quantize.mhc_rmsnorm_quantize(streams, mix, weight, 1e-6, "token")
    assert torch.equal(t.codes, quantize_nvfp4(y, "token").codes)
    torch.testing.assert_close(rrms.double(), r64[:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [10.0, 1.5, None])
def test_swiglu_is_within_one_bf16_ulp_and_exact_from_there(limit):
    gate_up = (torch.randn(17, 128) * 8).bfloat16()
    gate, up = gate_up.double().chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    h64 = gate / (1 + torch.exp(-gate)) * up
    h = reference.swiglu(*gate_up.chunk(2, -1), limit)
    assert ((h.double() - h64).abs() <= bf16_ulp(h64)).all()
    runs = gate_up.reshape(17, 2, 8, 8).transpose(1, 2).reshape(17, 128)
    for policy in ("tensor", "token", lambda y: y.float().abs().amax() / 100):
        t = quantize.swiglu_quantize(gate_up, limit, policy)
        assert torch.equal(t.codes, quantize_nvfp4(h, policy).codes)
        assert torch.equal(quantize.swiglu_quantize(runs, limit, policy, interleaved=True).codes, t.codes)


@pytest.mark.parametrize("up", [10.0, -1.0, 2.0**100])
def test_swiglu_of_every_bf16_gate(up):
    """Below -88, exp(-gate) exceeds fp32, but the product does not yet fall below bf16."""
    gate = every_bf16()
    gate = gate[gate.isfinite() & (gate < 1e8)]
    g64 = gate.double()
    h64 = g64 * torch.exp(g64.clamp(max=0)) / (1 + torch.exp(-g64.abs())) * up
    h = reference.swiglu(gate, torch.full_like(gate, up), None)
    assert ((h.double() - h64).abs() <= bf16_ulp(h64)).all()
    assert torch.equal(h.signbit(), gate.signbit() ^ (up < 0))


def test_swiglu_clamps_the_gate_from_above_only():
    """silu(-20) is -4e-8, silu(-10) is -4.5e-4: a gate clamped below would show."""
    h = reference.swiglu(torch.tensor([-20.0, 20.0]), torch.tensor([-50.0, 50.0]), 10.0)
    assert h[0].item() == pytest.approx(20 / (1 + math.exp(20)) * 10, rel=2**-8)
    assert h[1].item() == 100.0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_nvfp4([1.0]), TypeError, "x must be a tensor"),
        (lambda: quantize_nvfp4(torch.ones(2, 16, dtype=torch.int32)), TypeError, "x must be bfloat16"),
        (lambda: quantize_nvfp4(torch.ones(2, 17)), ValueError, r"K % 16 == 0, got shape \(2, 17\)"),
        (lambda: quantize_nvfp4(torch.ones(())), ValueError, "K % 16 == 0"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), "row"), ValueError, "got 'row'"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), "group"), ValueError, "needs data"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), None), TypeError, "got NoneType"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), torch.ones(3)), ValueError, "3 groups"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), torch.ones(2).double()), TypeError, "float32"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), scale_layout="tiled"), ValueError, "'tiled'"),
        (lambda: quantize_nvfp4(torch.ones(2, 2, 2, 16), scale_layout="swizzled"), ValueError, "swizzled"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), divisor=0.0), ValueError, "divisor"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), backend="cuda"), ValueError, "'cuda' is unknown"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), backend="hopper"), ValueError, "'hopper' cannot run"),
        (lambda: quantize.quantize_weight(torch.ones(16, 16), "km"), ValueError, "'km'"),
        (lambda: quantize.quantize_weight(torch.ones(16)), ValueError, "2 or 3 dimensions"),
        (lambda: quantize.quantize_weight(torch.ones(16, 17), "nk"), ValueError, "K % 16"),
        (lambda: quantize.quantize_weight(torch.ones(16, 16), global_scale="token"), ValueError, "'token'"),
        (lambda: dequantize_nvfp4(torch.ones(2)), TypeError, "NVFP4Tensor"),
        (lambda: dequantize_nvfp4(quantize_nvfp4(torch.ones(2, 16)), torch.int8), TypeError, "dtype"),
        (lambda: quantize.rmsnorm_quantize(torch.ones(2, 16), torch.ones(8), 0.0), ValueError, "weight"),
        (lambda: quantize.swiglu_quantize(torch.ones(2, 48)), ValueError, "I % 16"),
        (lambda: quantize.swiglu_quantize(torch.ones(2, 64), -1.0), ValueError, "limit"),
        (lambda: quantize.bound_global_scale(math.inf), ValueError, "limit"),
        (lambda: quantize.bound_global_scale("a"), ValueError, "limit must be a positive number, got 'a'"),
        (lambda: quantize_nvfp4(torch.ones(2, 16), divisor="a"), ValueError, "divisor must be .* got 'a'"),
        (
            lambda: quantize.mhc_rmsnorm_quantize(torch.ones(2, 4, 16), None, torch.ones(16), 0.0),
            TypeError,
            "mix must be a tensor, got NoneType",
        ),
        (
            lambda: quantize.mhc_rmsnorm_quantize(
                torch.ones(2, 5, 16), torch.ones(2, 5), torch.ones(16), 0.0
            ),
            ValueError,
            "n_hc",
        ),
        (
            lambda: quantize.mhc_rmsnorm_quantize(
                torch.ones(2, 4, 16), torch.ones(2, 3), torch.ones(16), 0.0
            ),
            ValueError,
            "mix must be",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_layer_inputs_that_need_a_gradient_are_taken():
    x = torch.randn(2, 32, requires_grad=True)
    assert torch.equal(quantize_nvfp4(x).codes, quantize_nvfp4(x.detach()).codes)


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered:UserWarning")
def test_no_false_gradient_flows_through_the_codes():
    x = torch.randn(2, 32, requires_grad=True)
    t = quantize_nvfp4(x, "token")
    (dequantize_nvfp4(t, torch.float32).sum() + t.global_scale.sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # of the last term alone


def test_scale_zero_saturates_the_blocks_of_subnormals_too():
    x = torch.tensor([2.0**-149, 300 * 2.0**-149, 2.0**-127, 1.0, 0.0, math.nan])[:, None].expand(6, 16)
    for g in (0.0, torch.zeros(6)):
        t = quantize_nvfp4(x, g)
        assert t.block_scales.view(torch.uint8).flatten().tolist() == [0x7E] * 4 + [0, NAN_SCALE]
        assert torch.equal(dequantize_nvfp4(t).float()[:5], torch.zeros(5, 16)) and not t.codes.any()


# ---------------------------------------------------------------- torch.library


def op_arguments() -> dict[str, tuple]:
    """Arguments by operator; what follows a space tells cases of one operator apart."""
    x, weight = torch.randn(4, 64).bfloat16(), torch.rand(64)
    t = quantize_nvfp4(x, "token", scale_layout="swizzled")
    groups, both = torch.randn(3, 32, 64), torch.rand(3, 2)
    return {
        "global_scale token": (x, "token", 2688.0),
        "global_scale group": (groups, "group", 2688.0),
        "quantize tensor": (x, None, "tensor", 2688.0, True),
        "quantize group": (groups, None, "group", 2688.0, True),
        "quantize gate and up": (groups, both, "group", 2688.0, False),
        "quantize strided": (groups.transpose(0, 1), None, "token", 2688.0, False),
        "rmsnorm_quantize": (x, weight, 1e-6, None, "token", 2688.0, False),
        "mhc_rmsnorm_quantize": (x.view(2, 2, 64), both[:2], weight, 1e-6, None, "token", 2688.0, False),
        "swiglu_quantize": (x, 10.0, True, torch.tensor(0.1), "tensor", 2688.0, False),
        "dequantize": (t.codes, t.block_scales, t.global_scale, "token", True, False, torch.bfloat16),
    }


@pytest.mark.parametrize("case", list(op_arguments()))
@pytest.mark.parametrize("form", ["", "_out"])
def test_opcheck(case, form):
    args, name = op_arguments()[case], case.split()[0]
    if form:
        results = OPS[name](*args)
        results = results if isinstance(results, tuple) else (results,)
        args = (*args, *(torch.zeros_like(r) for r in results))
    checks = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    if all(getattr(a, "dtype", None) != torch.float8_e4m3fn for a in args):
        checks.append("test_schema")  # torch's own check cannot multiply float8 inputs
    torch.library.opcheck(getattr(torch.ops.dsv4lab, name + form).default, args, test_utils=checks)
