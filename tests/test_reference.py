"""The pieces of the reference against ml_dtypes and definitions, one at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4lab import reference

F32 = np.float32


def e2m1_code(values: np.ndarray) -> np.ndarray:
    return np.clip(values, F32(-6), F32(6)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def test_e2m1_codes_of_every_upper_half():
    """All fp32 numbers whose lower 16 bits are 0, 1 or all ones: every bf16, and every neighbour of a tie."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    values = np.concatenate([upper, upper | 1, upper | 0xFFFF]).view(F32)
    values = values[~np.isnan(values)]
    got = reference.encode_e2m1(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(got.astype(np.uint8), e2m1_code(values))


@pytest.mark.slow
def test_e2m1_codes_of_every_fp32():
    for start in range(0, 2**32, 2**24):
        values = np.arange(start, start + 2**24, dtype=np.uint64).astype(np.uint32).view(F32)
        values = np.where(np.isnan(values), F32(0), values)
        got = reference.encode_e2m1(torch.from_numpy(values)).numpy().astype(np.uint8)
        assert (got == e2m1_code(values)).all()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),  # ties
        (0.26, 0.5), (2.6, 3.0), (3.6, 4.0), (5.1, 6.0), (3.4, 3.0), (4.9, 4.0), (1.6, 1.5),
        (6.0, 6.0), (7.0, 6.0), (1e30, 6.0), (0.0, 0.0), (1e-40, 0.0),
    ],
)  # fmt: skip
def test_e2m1_by_hand(value, expected):
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    code = int(reference.encode_e2m1(torch.tensor([value]))[0])
    assert values[code] == expected
    assert int(reference.encode_e2m1(torch.tensor([-value]))[0]) == code + 8


def test_torch_casts_to_e4m3_as_ml_dtypes_does():
    """The block scale relies on torch's cast: every non-negative bf16 up to 448, and fp32 neighbours."""
    upper = np.arange(0x43E1, dtype=np.uint32) << 16
    values = np.concatenate([upper, upper | 1, upper | 0xFFFF]).view(F32)
    values = np.minimum(values, F32(448))
    got = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    nan = torch.tensor([float("nan")]).to(torch.float8_e4m3fn).view(torch.uint8)
    assert nan.item() == 0x7F


class CastsToE4M3(TorchDispatchMode):
    """Keeps the largest value that was cast to E4M3."""

    largest = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float8_e4m3fn:
            self.largest = max(self.largest, args[0].nan_to_num(0.0).max().item())
        return func(*args, **(kwargs or {}))


def test_scales_are_clamped_before_the_cast():
    """torch 2.11 casts what exceeds 464 to NaN, 2.13 saturates: the bits must not depend on it."""
    x = torch.tensor([[1.0] * 16, [1e6] * 16, [1e38] * 16])
    with CastsToE4M3() as casts:
        _, scales, _ = reference.quantize(x, torch.tensor(0.1), "tensor", 2688.0, False)
    assert casts.largest == 448.0 and scales.float()[1:].eq(448).all()


def test_pack_and_decode_are_inverse():
    """Every byte, under a scale of one."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    values = reference.decode(codes, torch.ones(1, 32).to(torch.float8_e4m3fn))
    assert torch.equal(reference.pack(reference.encode_e2m1(values)), codes)
    assert values[0, :4].tolist() == [0.0, 0.0, 0.5, 0.0]  # bytes 0x00 and 0x01: the even k is the low nibble


def test_decode_is_exact_in_bf16():
    """Every code under every scale has at most 6 significant bits."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
    values = reference.decode(codes, scales)
    assert torch.equal(values.bfloat16().float(), values)


def test_block_amax_marks_what_is_not_finite():
    x = torch.ones(1, 64)
    x[0, 17], x[0, 40], x[0, 50] = float("nan"), float("inf"), -3.0
    got = reference.block_amax(x)
    assert got.isnan().tolist() == [[False, True, True, False]] and got[0, 3] == 3


def test_zero_global_scale_keeps_zero_blocks_finite():
    """0 / (6 * 0) would be NaN; the scale is 0, and 448 where the block is not zero."""
    x = torch.tensor([[0.0] * 16, [1e-38] * 16])
    _, scales, _ = reference.quantize(x, torch.zeros(()), "tensor", 2688.0, False)
    assert scales.float().flatten().tolist() == [0.0, 448.0]
