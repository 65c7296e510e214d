"""How far the sums of a tensor core may be from the exact ones, and how far they are.

Each block of 16 products is exact; what is rounded is the running sum, once for each instruction of K = 64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsv4lab import reference
from dsv4lab.emulator import tensor_core
from dsv4lab.formats import BLOCK, NVFP4Tensor
from dsv4lab.layouts import with_scale_layout
from dsv4lab.quantize import quantize_nvfp4

STEP = 64  # K of one block-scaled FP4 instruction
ULP = 2.0**-23  # fp32 cut toward zero loses less than this share of a value

DISTRIBUTIONS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {}


def _distribution(name: str):
    def add(function):
        DISTRIBUTIONS[name] = function
        return function

    return add


@_distribution("normal")
def _normal(rows: int, k: int, r: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, k, generator=r), torch.randn(rows, k, generator=r)


@_distribution("heavy tails")
def _heavy(rows: int, k: int, r: torch.Generator) -> tuple[Tensor, Tensor]:
    x, w = _normal(rows, k, r)
    return x / torch.rand(rows, k, generator=r).clamp_min(1e-3), w  # tails as those of 1 / u


@_distribution("blocks over decades")
def _decades(rows: int, k: int, r: torch.Generator) -> tuple[Tensor, Tensor]:
    x, w = _normal(rows, k, r)
    size = 10 ** (4 * torch.rand(rows, k // BLOCK, generator=r) - 4)
    return (x.unflatten(-1, (-1, BLOCK)) * size[..., None]).flatten(-2), w


@_distribution("all positive")
def _positive(rows: int, k: int, r: torch.Generator) -> tuple[Tensor, Tensor]:
    x, w = _normal(rows, k, r)
    return x.abs(), w.abs()


@_distribution("cancelling")
def _cancelling(rows: int, k: int, r: torch.Generator) -> tuple[Tensor, Tensor]:
    """The second half of K takes away nearly all that the first one adds."""
    x, w = _normal(rows, k // 2, r)
    return torch.cat((x, x), -1), torch.cat((w, -1.02 * w), -1)


@_distribution("large block first")
def _large_first(rows: int, k: int, r: torch.Generator) -> tuple[Tensor, Tensor]:
    """One block that dwarfs all later ones, whose low bits are then cut off at every step."""
    x, w = _positive(rows, k, r)
    x[:, :BLOCK] *= 1000
    return x, w


def operands(distribution: str, rows: int, k: int, seed: int = 0) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Quantized a and b, (rows, K) each.

    Args:
        distribution: a name in DISTRIBUTIONS.
        rows: of both.
        k: K % 64 == 0.
        seed: of the random numbers.

    Raises:
        ValueError: the name is not known, or K is no whole number of steps.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if k <= 0 or k % STEP:
        raise ValueError(f"k must be a positive multiple of {STEP}, got {k}")
    x, w = DISTRIBUTIONS[distribution](rows, k, torch.Generator().manual_seed(seed))
    return quantize_nvfp4(x), quantize_nvfp4(w)


def values(t: NVFP4Tensor) -> Tensor:
    """Code times block scale, exact in float64, without the global scale."""
    return reference.decode(t.codes, with_scale_layout(t, "linear").block_scales).double()


def parts(t: NVFP4Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values of the codes (..., K) and of the block scales (..., K / 16), float32."""
    scales = with_scale_layout(t, "linear").block_scales
    codes = reference.decode(t.codes, torch.ones_like(scales.float()).to(scales.dtype))
    return codes.float().numpy(), scales.float().numpy()


def running_sums(a: NVFP4Tensor, b: NVFP4Tensor, mode: str) -> Tensor:
    """The accumulator after each step of K = 64.

    Args:
        a: (M, K) NVFP4, K % 64 == 0.
        b: (N, K) NVFP4.
        mode: "float64", which rounds nothing; "exact", each step rounded to the nearest fp32; or "hardware",
            the published model of the tensor core, which cuts.

    Returns:
        (K / 64, M, N) float64, without the global scales.
    """
    if mode == "float64":
        x, w = (values(t).unflatten(-1, (-1, STEP)).transpose(0, 1) for t in (a, b))
        return (x @ w.transpose(1, 2)).cumsum(0)
    (x, x_scales), (w, w_scales) = parts(a), parts(b)
    total, after = None, []
    for k in range(0, a.K, STEP):
        codes, scales = slice(k, k + STEP), slice(k // BLOCK, (k + STEP) // BLOCK)
        total = tensor_core.dot(
            x[:, codes], w[:, codes], total, kind="mxf4nvf4", types=("e2m1", "e2m1"), mode=mode,
            scales_a=x_scales[:, scales], scales_b=w_scales[:, scales], scale_type="ue4m3",
        )  # fmt: skip
        after.append(torch.from_numpy(total).double())
    return torch.stack(after)


def accumulation_bound(a: NVFP4Tensor, b: NVFP4Tensor) -> Tensor:
    """How far the sums may be from the exact ones: 2^-23 sum |a b| for each step of K = 64.

    Each step cuts a partial sum to fp32, and no partial sum is larger than sum |a b|. 1.01 covers what the
    aligned addition cuts off 12 bits further down, five terms a step, and second-order terms.

    Args:
        a: (M, K) NVFP4.
        b: (N, K) NVFP4.

    Returns:
        (M, N) float64, without the global scales.
    """
    steps = -(-a.K // STEP)
    return 1.01 * steps * ULP * (values(a).abs() @ values(b).abs().T)


def output_bound(a: NVFP4Tensor, b: NVFP4Tensor, exact: Tensor) -> Tensor:
    """How far the bf16 result may be from `exact`, the product in float64 with the global scales (M, N).

    The sums' bound, two roundings of 2^-24 for the global scales, and that to bf16, 2^-8 of the value.
    """
    g = (a.global_scale.double() * b.global_scale.double()).abs()
    before = g * accumulation_bound(a, b) + 2.02 * 2.0**-24 * exact.abs()
    return 2.0**-8 * exact.abs() + (1 + 2.0**-8) * before
