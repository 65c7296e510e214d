"""What the tensor cores of an NVIDIA H200 gave for every type of mma.sync and wgmma, bit for bit.

Recorded on 2026-11-21 with driver 580.159.04, from kernels as in test_mma_sync and test_wgmma, one
instruction each. Operands: "wide" normal values of 20 binary orders; "bits" random bits, of bf16, tf32 and
fp32 with exponents from -23 to 23; "cancel" those with exponents from -7 to 5; "special" with infinities, NaN
and zeros among them; "zero" zeros of both signs and a few ones.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator.tensor_core import dot, dot_integer

DTYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "s8": np.int8, "u8": np.uint8, "f32": np.float32, "s32": np.int32,
}  # fmt: skip
KINDS = {"f16": "f16", "bf16": "f16", "tf32": "tf32"}


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).with_name("h200_tensor_cores.npz")) as file:
        return dict(file)


@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
@pytest.mark.parametrize("operands", ["wide", "bits", "cancel", "special", "zero"])
def test_the_hardware_mode_gives_the_bits_of_an_h200(recorded, instruction, operands):
    """Of every form that PTX has of it."""
    wrong, count = [], 0
    for i, name in enumerate(recorded["names"].tolist()):
        op, *types, how = name.split()
        if (op, how) != (instruction, operands):
            continue
        a, b, c, d = (
            recorded[f"{key}{i}"].view(DTYPES[t]) for key, t in zip("abcd", [*types, types[2]], strict=True)
        )
        found = _multiply(op, a, b, c, types)
        different = int((found.view(recorded[f"d{i}"].dtype) != recorded[f"d{i}"]).sum())
        count += 1
        if different:
            wrong.append(f"{name}: {different} of {d.size}")
    assert not wrong
    assert count >= (2 if operands == "cancel" else 11 if instruction == "mma" else 6)


def _multiply(op, a, b, c, types):
    if types[2] == "s32":
        return dot_integer(a, b, c)
    kind = KINDS.get(types[0], {"mma": "mma_fp8_sm90", "wgmma": "wgmma_fp8"}[op])
    a, b = a.astype(np.float32), b.astype(np.float32)
    return dot(a, b, c, kind=kind, types=tuple(types[:2]), mode="hardware", accumulator=types[2])
