"""Operands for GEMM kernels, and what float64 says of their product."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from dsv4lab.formats import NVFP4Tensor
from dsv4lab.layouts import group_offsets

E4M3 = torch.float8_e4m3fn
U_BF16 = 2.0**-8  # rounding to bf16 is off by at most this share of the value
U_FP32 = 2.0**-24


def nvfp4(shape, seed=0, g=None, granularity=None, interleaved=False, exact=False) -> NVFP4Tensor:
    """Any codes; block scales from 2^-6 to 448 of either fraction, or `exact`, 1/2, 1 and 2 only.

    Products of `exact` operands are multiples of 1/16 and at most 144: fp32 holds the sum of 7,000 of them.
    """
    r = torch.Generator().manual_seed(seed)
    *lead, k = shape
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, generator=r)
    if exact:
        scales = 8 * torch.randint(6, 9, (*lead, k // 16), dtype=torch.uint8, generator=r)
    else:
        scales = torch.randint(8, 127, (*lead, k // 16), dtype=torch.uint8, generator=r)
    g = torch.ones(()) if g is None else g
    return NVFP4Tensor(codes, scales.view(E4M3), g, "linear", granularity, interleaved)


def values(t: NVFP4Tensor | Tensor) -> Tensor:
    """bf16 values, or code * block scale by NumPy and ml_dtypes alone, in float64."""
    if isinstance(t, Tensor):
        return t.double()
    raw = t.codes.numpy()
    nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(*raw.shape[:-1], -1).astype(np.uint8)
    codes = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = t.block_scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return torch.from_numpy(codes * np.repeat(scales, 16, -1))


@dataclass
class Groups:
    """Padded groups.

    Attributes:
        offsets, sizes: as the operations take them.
        rows: of the buffer.
        spans: (group, first row, row behind the last one) of all groups, empty ones too.
    """

    offsets: Tensor
    sizes: Tensor
    rows: int
    spans: list[tuple[int, int, int]]

    @property
    def real(self) -> Tensor:
        """(rows,) bool."""
        real = torch.zeros(self.rows, dtype=torch.bool)
        for _, start, stop in self.spans:
            real[start:stop] = True
        return real


def groups(sizes, extra=0) -> Groups:
    """Of so many real rows each; the buffer has `extra` rows behind the last one."""
    sizes = torch.tensor(sizes, dtype=torch.int32)
    offsets = group_offsets(sizes)
    starts = [0, *offsets.tolist()]
    spans = [(g, starts[g], starts[g] + n) for g, n in enumerate(sizes.tolist())]
    return Groups(offsets, sizes, starts[-1] + extra, spans)


def one_group(rows) -> Groups:
    """All rows, without offsets."""
    return Groups(None, None, rows, [(0, 0, rows)])


@dataclass
class Exact:
    """A product in float64.

    Attributes:
        sums: (rows, N), zero in padding.
        error: of an fp32 accumulation of them, at most.
    """

    sums: Tensor
    error: Tensor


def product(
    a: NVFP4Tensor | Tensor, b: NVFP4Tensor, where: Groups, ulps: float = 1.0, depth: int = 64
) -> Exact:
    """g_a g_b sum(a b), and how far tensor cores may be from it.

    Each step of K = `depth` rounds the sum so far, by `ulps` of fp32 (1/2 to nearest, 1 toward zero); it is
    at most the sum of all magnitudes. Global scales are multiplied with each other and with the sum; both
    products are rounded to nearest.
    """
    x, w = values(a), values(b).view(-1, b.shape[-2], a.shape[-1])
    n, steps = w.shape[1], -(-a.shape[-1] // depth)
    sums, error = (torch.zeros(len(x), n, dtype=torch.float64) for _ in range(2))
    for group, start, stop in where.spans:
        rows = slice(start, stop)
        g = row_scale(a, group, rows) * column_scale(b, group, n)
        sums[rows] = x[rows] @ w[group].T * g
        magnitudes = x[rows].abs() @ w[group].abs().T * g.abs()
        error[rows] = magnitudes * (steps * ulps * 2 * U_FP32) + sums[rows].abs() * 2 * U_FP32
    return Exact(sums, error)


def row_scale(a: NVFP4Tensor | Tensor, group: int, rows: slice) -> Tensor:
    """g_a, (rows or 1, 1); of bf16 values 1."""
    if isinstance(a, Tensor):
        return torch.ones(1, 1, dtype=torch.float64)
    g = a.global_scale.double()
    if a.granularity == "tensor":
        return g.view(1, 1)
    return g.view(-1, 1)[rows] if a.granularity == "token" else g[group].view(1, 1)


def column_scale(b: NVFP4Tensor, group: int, n: int) -> Tensor:
    """g_b, (N,)."""
    g = b.global_scale.double()
    if g.dim() < 2:
        return (g if g.dim() == 0 else g[group]).expand(n)
    column = torch.arange(n)
    return g[group][column // 8 % 2 if b.interleaved else (column >= n // 2).long()]


def check(found: Tensor, exact: Exact, where: Groups) -> None:
    """bf16 sums: accumulated in fp32, then rounded once."""
    rows = where.real
    bound = exact.error + U_BF16 * (exact.sums.abs() + exact.error)
    inside = (found[: where.rows].double() - exact.sums).abs() <= bound
    wrong = ~inside & rows[:, None]
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {wrong.nonzero()[0].tolist()}"


def swiglu(exact: Exact, limit: float | None) -> tuple[Tensor, Tensor]:
    """The clamped activation of interleaved gate and up in float64, and how far bf16 may be from it.

    The derivative of silu is at most 1.1. Computing it costs a few roundings, and the exponent is a rounded
    product, whose error counts in full: |gate| / 4 of them four times.
    """
    (gate, up), (d_gate, d_up) = (x.unflatten(-1, (-1, 2, 8)).unbind(-2) for x in (exact.sums, exact.error))
    gate, up, d_gate, d_up = (x.flatten(-2) for x in (gate, up, d_gate, d_up))
    if limit is not None:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    silu = gate * torch.sigmoid(gate)
    h = silu * up
    error = 1.1 * d_gate * (up.abs() + d_up) + silu.abs() * d_up + h.abs() * (4 * gate.abs() + 32) * U_FP32
    # The smallest bf16 and fp32 numbers are subnormal, and the fast reciprocal's and exponential's are not.
    return h, error + U_BF16 * (h.abs() + error) + 2.0**-120
