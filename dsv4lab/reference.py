"""Every quantization operation in plain torch: runs on any device and defines the bits kernels must give.

All arithmetic is IEEE fp32 with one rounding a step. Divisors are tensors on the data's device, because CUDA
divides by a Python scalar through its reciprocal. Nothing here reads a value on the host.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4lab import formats
from dsv4lab.formats import BLOCK, E2M1_MAX, E4M3_MAX, SCALE_DTYPE

NAN = math.nan
# Smallest fp32 number: stands in for 6 g where g is 0, so that a zero block has scale 0, not that of 0 / 0.
_SUBNORMAL = 2.0**-149


def quantize(
    x: Tensor, global_scale: Tensor | None, granularity: str, divisor: float, swizzled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale of x (..., K); the last is computed where None is given."""
    x = x.contiguous()  # results of elementwise operators take the strides of their input
    amax = block_amax(x)
    g = runtime_scale(amax, granularity, divisor) if global_scale is None else checked_scale(global_scale)
    rows_g = row_scales(g, granularity, x.shape[:-1])
    divisors = (rows_g * E2M1_MAX).clamp_min(_SUBNORMAL)
    # The stand-in is no small divisor for a subnormal amax, whose quotient by 0 is Inf like any other's.
    quotients = (amax / divisors).masked_fill_((rows_g == 0) & (amax > 0), E4M3_MAX)
    scales = quotients.clamp_max_(E4M3_MAX).to(SCALE_DTYPE)
    # r = 1 / (s g), 0 where s g is 0, and NaN for the blocks that must decode to NaN
    r = (scales.float() * rows_g).reciprocal_().nan_to_num_(NAN, 0.0, 0.0)
    codes = encode_e2m1((x.unflatten(-1, (-1, BLOCK)) * r.unsqueeze(-1)).nan_to_num_(0.0)).flatten(-2)
    return pack(codes), swizzle(scales) if swizzled else scales, g


def block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block of 16, fp32 (..., K/16); NaN where the block holds a NaN or Inf."""
    return x.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float().nan_to_num(NAN, NAN)


def global_scale(x: Tensor, granularity: str, divisor: float) -> Tensor:
    """g = max(max|x|, 1e-8) / divisor over the tensor, each row or each x[i]."""
    return runtime_scale(block_amax(x.contiguous()), granularity, divisor)


def runtime_scale(amax: Tensor, granularity: str, divisor: float) -> Tensor:
    """The global scale from the blocks' amax (..., K/16); NaN where a block is or where it is too large."""
    first = {"tensor": 0, "token": amax.dim() - 1, "group": 1}[granularity]
    # An empty reduction has no maximum; its scale is that of zeros.
    reduced = (
        amax.amax(tuple(range(first, amax.dim()))) if amax.numel() else amax.new_zeros(amax.shape[:first])
    )
    g = reduced.clamp_min(formats.AMAX_FLOOR) / amax.new_full((), divisor)
    return g.masked_fill_(g > formats.GLOBAL_MAX, NAN)


def checked_scale(g: Tensor) -> Tensor:
    """A known global scale as it is where it is 0 or in range, else NaN."""
    return g.masked_fill(~((g >= formats.GLOBAL_MIN) & (g <= formats.GLOBAL_MAX) | (g == 0)), NAN)


def row_scales(g: Tensor, granularity: str, lead: torch.Size, interleaved: bool = False) -> Tensor:
    """The global scale in a shape that broadcasts against (*lead, K/16)."""
    if granularity == "tensor":
        return g
    if granularity == "token":
        return g.reshape(*lead, 1)
    if g.dim() == 1:
        return g.reshape(-1, *[1] * len(lead))
    rows, half = lead[-1], lead[-1] // 2
    if interleaved:
        spread = g[:, None, :, None].expand(-1, rows // 16, 2, 8)
    else:
        spread = g[:, :, None].expand(-1, 2, half)
    return spread.reshape(*lead, 1)


def encode_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 code of each fp32 value, ties to even, saturating; as fp32, sign in bit 3, zeros too.

    E2M1 is three uniform grids: steps of 1/2 up to 2 (codes 0 to 4), of 1 to 4 (codes 4 to 6), of 2 to 6.
    Away from its own range each grid counts too far, so the least of the three codes is the right one. Equal
    steps make `round`, half to even, the one rounding that happens.
    """
    a = x.abs().clamp_max_(E2M1_MAX)
    halves, ones, twos = (a * 2).round_(), a.round().add_(2), a.mul_(0.5).round_().add_(4)
    magnitude = torch.minimum(torch.minimum(halves, ones), twos)
    return magnitude.add_(x.signbit(), alpha=8)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte (..., K) -> uint8 (..., K/2), the even k in the low nibble."""
    return torch.add(codes[..., 0::2], codes[..., 1::2], alpha=16).to(torch.uint8)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two values (256, 2) in every byte of codes."""
    values = torch.tensor([*formats.E2M1_VALUES, *(-v for v in formats.E2M1_VALUES)])
    byte = torch.arange(256)
    return torch.stack((values[byte % 16], values[byte // 16]), -1).to(device)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """code * block scale in fp32 (..., K), from linear scales: exact, and exact in bf16 too."""
    values = F.embedding(codes.int(), _pairs(codes.device)).unflatten(-2, (-1, BLOCK // 2)).flatten(-2)
    return (values * scales.float().unsqueeze(-1)).flatten(-2)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    granularity: str,
    swizzled: bool,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(code * block scale) * g, rounded once to fp32 and once to dtype."""
    if swizzled:
        scales = unswizzle(scales, codes.shape[-2], codes.shape[-1] * 2 // BLOCK)
    g = row_scales(global_scale, granularity, codes.shape[:-1], interleaved)
    return decode(codes, scales).mul_(g).to(dtype)


def swizzle(scales: Tensor) -> Tensor:
    """Scales (..., R, C) in the 128x4 order, padded with zeros to (..., ceil128(R), ceil4(C))."""
    rows, columns = scales.shape[-2:]
    *lead, padded_rows, padded_columns = formats.scales_shape(
        (*scales.shape[:-1], columns * BLOCK), "swizzled"
    )
    padded = F.pad(scales.view(torch.uint8), (0, padded_columns - columns, 0, padded_rows - rows))
    # row = 128 a + 32 j + i, column = 4 b + c -> byte ((a, b), i, j, c)
    tiles = padded.reshape(*lead, padded_rows // 128, 4, 32, padded_columns // 4, 4)
    order = tiles.movedim(-2, -4).transpose(-3, -2)
    return order.reshape(*lead, padded_rows, padded_columns).view(scales.dtype)


def unswizzle(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of swizzle: (..., ceil128(rows), ceil4(columns)) -> (..., rows, columns)."""
    *lead, padded_rows, padded_columns = swizzled.shape
    tiles = swizzled.view(torch.uint8).reshape(*lead, padded_rows // 128, padded_columns // 4, 32, 4, 4)
    order = tiles.transpose(-3, -2).movedim(-4, -2)
    linear = order.reshape(*lead, padded_rows, padded_columns)[..., :rows, :columns]
    return linear.contiguous().view(swizzled.dtype)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x * rrms * weight in fp32, rounded once to bf16, and rrms = 1 / sqrt(mean(x^2) + eps), fp32 (...)."""
    x = x.contiguous().float()
    # A row whose mean square overflows or holds Inf becomes NaN, not zeros.
    mean = x.square().mean(-1, keepdim=True).nan_to_num_(NAN, NAN)
    rrms = mean.add_(eps).rsqrt_()
    return (x * rrms).mul_(weight.float()).to(torch.bfloat16), rrms.squeeze(-1)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm to bf16, then quantize; also 1 / rms."""
    y, rrms = rmsnorm(x, weight, eps)
    return (*quantize(y, global_scale, granularity, divisor, swizzled), rrms)


def mhc_mix(streams: Tensor, mix: Tensor) -> Tensor:
    """Weighted sum of the residual streams (..., n_hc, H) by mix (..., n_hc), in fp32 (..., H)."""
    return (streams.float() * mix.float().unsqueeze(-1)).sum(-2)


def mhc_rmsnorm_quantize(
    streams: Tensor,
    mix: Tensor,
    weight: Tensor,
    eps: float,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mHC mix in fp32, RMSNorm to bf16, then quantize; also 1 / rms."""
    x = mhc_mix(streams, mix)
    return rmsnorm_quantize(x, weight, eps, global_scale, granularity, divisor, swizzled)


def split_gate_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up (..., I) from (..., 2I), either halves or alternating runs of 8."""
    if not interleaved:
        return gate_up.chunk(2, -1)
    runs = gate_up.unflatten(-1, (-1, 2, 8))
    return runs[..., 0, :].flatten(-2), runs[..., 1, :].flatten(-2)


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(min(gate, L)) * clip(up, -L, L) in fp32, rounded once to bf16; NaN or Inf in gives NaN out."""
    gate, up = gate.float().nan_to_num(NAN, NAN, NAN), up.float().nan_to_num(NAN, NAN, NAN)
    if limit is not None:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    # sigmoid(gate) from e = exp(-|gate| / 2), which goes into both factors: exp(-gate) is Inf below -88,
    # where the product is still a number that bf16 can hold.
    e = gate.abs().mul_(-0.5).exp_()
    numerator = torch.where(gate < 0, e, 1.0)
    return (gate * (numerator / (1 + e * e))).mul_(numerator * up).to(torch.bfloat16)


def swiglu_quantize(
    gate_up: Tensor,
    limit: float | None,
    interleaved: bool,
    global_scale: Tensor | None,
    granularity: str,
    divisor: float,
    swizzled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clamped SwiGLU to bf16, then quantize."""
    h = swiglu(*split_gate_up(gate_up, interleaved), limit)
    return quantize(h, global_scale, granularity, divisor, swizzled)
