"""The quantize family on each architecture and in any order of warps."""

from __future__ import annotations

import pytest
import torch
from dsv4lab.kernels.quantize_family import IMPLEMENTATIONS

from dsv4lab import reference
from dsv4lab.emulator import device

DIVISOR, EPS = 2688.0, 1e-6
REFERENCES = {"swizzle_scales": reference.swizzle, "unswizzle_scales": reference.unswizzle}


def run(op: str, *args) -> list[torch.Tensor]:
    """The results of an operation's kernels, as bits."""
    results = REFERENCES.get(op, getattr(reference, op, None))(*args)
    outs = [torch.zeros_like(t) for t in (results if isinstance(results, tuple) else (results,))]
    IMPLEMENTATIONS[op](*args, *outs)
    return [t.view(torch.uint8) if t.dim() else t for t in outs]


def calls() -> list[tuple]:
    """A call of each operation."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 96, generator=generator).bfloat16()
    weight = torch.randn(48, generator=generator)
    norm, scale = (weight, EPS), (None, "tensor", DIVISOR, True)
    codes, scales, g = reference.quantize(values, *scale)
    return [
        ("quantize", values, *scale),
        ("global_scale", values, "token", DIVISOR),
        ("rmsnorm_quantize", values[:, :48], *norm, *scale),
        ("mhc_rmsnorm_quantize", values.view(3, 2, 48), torch.rand(3, 2, generator=generator), *norm, *scale),
        ("swiglu_quantize", values, 10.0, True, *scale),
        ("dequantize", codes, scales, g, "tensor", True, False, torch.bfloat16),
        ("swizzle_scales", torch.arange(18, dtype=torch.uint8).view(3, 6)),
        ("unswizzle_scales", scales, 3, 6),
    ]


@pytest.fixture(scope="module")
def on_hopper() -> list[list[torch.Tensor]]:
    with device("sm_90a"):
        return [run(*call) for call in calls()]


def test_each_operation_has_kernels():
    assert set(IMPLEMENTATIONS) == {call[0] for call in calls()}


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_architectures_give_the_same_bits(on_hopper, arch):
    with device(arch) as gpu:
        for call, want in zip(calls(), on_hopper, strict=True):
            assert all(map(torch.equal, run(*call), want)), call[0]
    assert gpu.counters["fusable_mul_add"] == 0


def test_any_order_of_warps_gives_the_same_bits():
    x, results = torch.randn(24, 7168).bfloat16(), []
    for seed in range(3):
        with device("sm_90a", seed=seed):
            results.append(run("quantize", x, None, "tensor", DIVISOR, True))
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))
