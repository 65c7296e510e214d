"""What a result must satisfy before it is timed: float64 formulas that share no code with an implementation.

Every bound is derived from the numeric contract; none was chosen because something passes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import AMAX_FLOOR, BLOCK, E2M1_VALUES, GLOBAL_DIVISOR, NVFP4Tensor, scales_shape

U_BF16 = 2.0**-8  # rounding to bf16 is off by at most this share of the value
BF16_ULP = 2.0**-7  # the fused operations' bf16 value is within one of these of float64
U_FP32 = 2.0**-24
# The values whose nearest E2M1 code is i lie between _TIES[i] and _TIES[i + 1].
_TIES = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, torch.inf)


class WrongResult(ValueError):
    """A result outside its bound."""


def require(what: str, ok: Tensor) -> None:
    """Refuse where `ok` is not true everywhere."""
    if not ok.all():
        raise WrongResult(f"{what} wrong in {int((~ok).sum())} of {ok.numel()} places")


def near(what: str, actual: Tensor, exact: Tensor, error: Tensor | float) -> None:
    """Refuse another shape, NaN, or a value further than `error` from the exact one."""
    if actual.shape != exact.shape:
        raise WrongResult(f"{what} must be {tuple(exact.shape)}, got {tuple(actual.shape)}")
    require(what, (actual.double() - exact).abs() <= error)


def nibbles(codes: Tensor) -> Tensor:
    """The codes (..., K) of bytes (..., K/2), the even k in the low nibble."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()


def decode64(codes: Tensor, scales: Tensor) -> Tensor:
    """code * block scale in float64, from linear scales."""
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
    return values.to(codes.device)[nibbles(codes)] * scales.double().repeat_interleave(BLOCK, -1)


def quantized(t: NVFP4Tensor, y: Tensor, slack: float = 0.0) -> None:
    """Refuse a t that is not y (T, K) float64 under a runtime scale, where y was known to a share `slack`."""
    if t.shape != tuple(y.shape):
        raise WrongResult(f"the result must be {tuple(y.shape)}, got {t.shape}")
    amax = y.abs().unflatten(-1, (-1, BLOCK)).amax(-1)
    largest = (amax.amax() if t.granularity == "tensor" else amax.amax(-1)).clamp_min(AMAX_FLOOR)
    exact = largest / GLOBAL_DIVISOR  # one fp32 division
    near("global scale", t.global_scale, exact, exact * (slack + 2 * U_FP32))
    g = t.global_scale.double().reshape(-1, 1)
    scales, wanted = t.block_scales.double(), amax / (6 * g)
    half = (wanted.log2().floor().clamp_min(-6) - 4).exp2()  # of E4M3's unit in the last place
    near("block scales", scales, wanted, half + wanted * (slack + 4 * U_FP32))
    codes, step = nibbles(t.codes), (scales * g).repeat_interleave(BLOCK, -1)
    x = torch.where(step > 0, y.abs() / step, 0.0)
    ties, room = torch.tensor(_TIES, dtype=torch.float64, device=y.device), slack + 8 * U_FP32
    magnitude = codes & 7
    require("codes", (x >= ties[magnitude] * (1 - room)) & (x * (1 - room) <= ties[magnitude + 1]))
    # what cancels almost to nothing may do so from either side
    require("signs", ((codes >= 8) == y.signbit()) | (x < room))


def encoded(t: NVFP4Tensor, y: Tensor, error: Tensor) -> None:
    """Refuse a t that is not y (T, K) float64, each value known to an absolute error, under t's one scale."""
    if t.shape != tuple(y.shape):
        raise WrongResult(f"the result must be {tuple(y.shape)}, got {t.shape}")
    g, blocks = t.global_scale.double(), (-1, (-1, BLOCK))
    wanted = y.abs().unflatten(*blocks).amax(-1) / (6 * g)
    off = error.unflatten(*blocks).amax(-1) / (6 * g) + wanted * 4 * U_FP32
    half = ((wanted + off).log2().floor().clamp_min(-6) - 4).exp2()
    near("block scales", t.block_scales.double(), wanted.clamp_max(448), half + off)
    codes, step = nibbles(t.codes), (t.block_scales.double() * g).repeat_interleave(BLOCK, -1)
    x, room = (torch.where(step > 0, value / step, 0.0) for value in (y.abs(), error))
    ties, magnitude = torch.tensor(_TIES, dtype=torch.float64, device=y.device), codes & 7
    room = room + (x + room) * 8 * U_FP32
    require("codes", (x + room >= ties[magnitude]) & (x - room <= ties[magnitude + 1]))
    require("signs", ((codes >= 8) == y.signbit()) | (x <= room))


def normalized(t: NVFP4Tensor, rrms: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Refuse a t and 1 / rms that are not those of x (T, K) float64."""
    exact = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    # K squares and as many additions of positive terms, each off by 2^-24 of the sum, then a root
    near("1 / rms", rrms, exact[:, 0], exact[:, 0] * (x.shape[-1] + 8) * U_FP32)
    quantized(t, x * exact * weight.double(), BF16_ULP)


def swizzled(actual: Tensor, scales: Tensor) -> None:
    """Refuse bytes that do not stand where the 128x4 order puts the scales (R, C), or padding not zero."""
    rows, columns = scales.shape
    shape = scales_shape((rows, columns * BLOCK), "swizzled")
    r = torch.arange(rows, device=scales.device)[:, None]
    c = torch.arange(columns, device=scales.device)
    at = (r // 128 * (shape[1] // 4) + c // 4) * 512 + r % 32 * 16 + r // 32 % 4 * 4 + c % 4
    expected = torch.zeros(shape, dtype=torch.uint8, device=scales.device)
    expected.view(-1)[at] = scales.view(torch.uint8)
    if actual.shape != expected.shape:
        raise WrongResult(f"swizzled scales must be {shape}, got {tuple(actual.shape)}")
    require("swizzled scales", actual.view(torch.uint8) == expected)


def dequantized(values: Tensor, t: NVFP4Tensor) -> None:
    """Refuse values that are not those of t (T, K) with token scales: one rounding to fp32, one to bf16."""
    exact = decode64(t.codes, t.block_scales) * t.global_scale.double()[:, None]
    near("values", values, exact, exact.abs() * (U_BF16 + 2 * U_FP32))


def product(
    d: Tensor | NVFP4Tensor, a: NVFP4Tensor | Tensor, b: NVFP4Tensor, spans: list, limit: float | None = None
) -> None:
    """Refuse a d that is not a b^T, or with a limit the SwiGLU of it; group by group, to need little memory.

    Products are exact in fp32. Each of K additions is off by at most 2^-23 of the sum of magnitudes, a unit
    in its last place, since tensor cores truncate; the factor g_a g_b costs two roundings more.

    Args:
        d: (rows, N) or (rows, N / 2) bf16, or NVFP4 of the latter's bf16 values.
        a: (rows, K) with token scales, or bf16.
        b: (G, N, K) or (N, K) with one global scale; interleaved where there is a limit.
        spans: (group, first row, end) of the rows to look at.
    """
    n, k = b.shape[-2:]
    if tuple(d.shape) != (a.shape[0], n // 2 if limit else n):
        raise WrongResult(f"the output must be {(a.shape[0], n // 2 if limit else n)}, got {tuple(d.shape)}")
    codes, scales = (t.view(-1, *t.shape[-2:]) for t in (b.codes, b.block_scales))
    for group, start, stop in spans:
        if isinstance(a, NVFP4Tensor):
            x = decode64(a.codes[start:stop], a.block_scales[start:stop])
            x *= a.global_scale[start:stop, None]
        else:
            x = a[start:stop].double()
        w = decode64(codes[group], scales[group]) * b.global_scale
        exact, error = x @ w.T, x.abs() @ w.abs().T * ((k + 2) * 2 * U_FP32)
        if limit:
            exact, error = swiglu_of(exact, error, limit)
        error = U_BF16 * exact.abs() + (1 + U_BF16) * error
        if isinstance(d, NVFP4Tensor):
            rows = d.with_(codes=d.codes[start:stop], block_scales=d.block_scales[start:stop])
            encoded(rows, exact, error)
        else:
            near(f"output of group {group}", d[start:stop], exact, error)


def swiglu64(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, L)) * clip(up, -L, L) in float64."""
    gate = gate.clamp_max(limit)
    return gate / (1 + (-gate).exp()) * up.clamp(-limit, limit)


def swiglu_of(d: Tensor, error: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The SwiGLU of exact interleaved columns, and how far it may be off where they may be by `error`.

    |silu'| <= 1.1, and a clamp takes nothing apart; silu and the product in fp32 cost a few roundings more.
    """
    (gate, up), (d_gate, d_up) = (
        t.unflatten(-1, (-1, 2, 8)).transpose(-3, -2).flatten(-2).unbind(-2) for t in (d, error)
    )
    exact, most = swiglu64(gate, up, limit), up.abs().clamp_max(limit)
    silu = swiglu64(gate, torch.full_like(up, limit), limit).abs() / limit
    return exact, 1.1 * d_gate * (most + d_up) + silu * d_up + 2.0**-20 * exact.abs()
