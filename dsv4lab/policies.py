"""Global-scale policies as arguments: what a caller may pass, checked, and the scale that a clamp proves.

A policy is "tensor", "token" or "group" (computed from the data, on the device), a known scale (a float or a
float32 tensor, decode direction), or a callable that makes one of these from the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsv4lab import formats, reference
from dsv4lab.formats import GLOBAL_DIVISOR

Policy = str | float | Tensor | Callable[[Tensor], "str | float | Tensor"]


def scale_argument(
    value: str | float | Tensor, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, str]:
    """A policy that is no callable, as (known scale or None, granularity) for data of shape (..., K).

    Returns:
        A known scale is float32 on the device: () for "tensor", (...) for "token", (G,) or (G, 2) for
        "group".

    Raises:
        TypeError: no policy, or a tensor of another dtype.
        ValueError: unknown name, a shape or device that does not fit, a known scale out of range.
    """
    if isinstance(value, str):
        _check_name(value, shape)
        return None, value
    if isinstance(value, Tensor):
        return _known_tensor(value, shape, device)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"global_scale must be a name, number, tensor or callable, got {type(value).__name__}"
        )
    return torch.full((), known_scale(value), dtype=torch.float32, device=device), "tensor"


def known_scale(g: float) -> float:
    """g itself.

    Raises:
        ValueError: g is neither 0 nor within 2^-100 .. 2^115.
    """
    if g == 0 or formats.GLOBAL_MIN <= g <= formats.GLOBAL_MAX:
        return float(g)
    raise ValueError(f"global_scale must be 0 or within 2^-100 .. 2^115 (it is amax / 2688), got {g}")


def check_divisor(divisor: float) -> float:
    """The divisor itself; at most 1e22, so that 1e-8 / divisor, the least runtime scale, is in range."""
    if not isinstance(divisor, int | float) or not 0 < divisor <= 1e22:
        raise ValueError(f"divisor must be a positive number of at most 1e22, got {divisor!r}")
    return float(divisor)


def check_limit(limit: float) -> float:
    """The SwiGLU limit itself, positive and finite."""
    if not (isinstance(limit, int | float) and math.isfinite(limit) and limit > 0):
        raise ValueError(f"limit must be a positive number, got {limit!r}")
    return float(limit)


def bound_global_scale(limit: float, weight_max: float = 1.0, divisor: float = GLOBAL_DIVISOR) -> float:
    """The global scale that a SwiGLU clamped at L cannot saturate: L^2 sigmoid(L), in bf16, / divisor.

    Args:
        limit: L > 0, finite.
        weight_max: largest routing weight, where that is multiplied in before quantizing.
        divisor: as in `quantize_nvfp4`.

    Returns:
        g in decode direction; 100.0 / 2688 for L = 10.
    """
    limit = check_limit(limit)
    if not (math.isfinite(weight_max) and weight_max > 0):
        raise ValueError(f"weight_max must be a positive number, got {weight_max!r}")
    # 2^-20 covers the fp32 roundings of silu and the product; then up to the next bf16, because h is bf16.
    peak = _bf16_above(limit * limit / (1 + math.exp(-limit)) * (1 + 2**-20))
    return known_scale(_bf16_above(peak * weight_max) / check_divisor(divisor))


def _bf16_above(value: float) -> float:
    """The smallest number of 8 significant bits that is not below value."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.ceil(mantissa * 256), exponent - 8)


def _check_name(name: str, shape: tuple[int, ...]) -> None:
    if name not in formats.GRANULARITIES:
        raise ValueError(f"global_scale must be 'tensor', 'token', 'group' or a known scale, got {name!r}")
    if name == "group" and len(shape) < 3:
        raise ValueError(f"global_scale='group' needs data (G, R, K), got shape {tuple(shape)}")


def _known_tensor(g: Tensor, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, str]:
    if g.dtype != torch.float32:
        raise TypeError(f"global_scale must be a float32 tensor, got {g.dtype}")
    if g.device != device:
        raise ValueError(f"global_scale must be on {device} like the data, got {g.device}")
    lead = tuple(shape[:-1])
    granularity = formats.scale_granularity(lead, tuple(g.shape))
    check_groups(granularity, g, shape)
    _check_range_on_host(g)
    return (g.reshape(lead) if granularity == "token" else g), granularity


def check_groups(granularity: str, g: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a scale for groups that are no dimension of the data: which row is whose would be unknown."""
    if granularity != "group":
        return
    if len(shape) < 3 and g.shape[0] != 1:
        raise ValueError(f"a global_scale for {g.shape[0]} groups needs data (G, R, K), got {tuple(shape)}")
    if g.dim() == 2 and shape[-2] % 2:
        raise ValueError(f"a global_scale for gate and up needs an even number of rows, got {shape[-2]}")


def _check_range_on_host(g: Tensor) -> None:
    """Raise for a scale out of range where looking needs no synchronisation; NaN means non-finite data."""
    plain = type(g) is Tensor or type(g) is torch.nn.Parameter
    if torch.compiler.is_compiling() or g.device.type != "cpu" or not plain:
        return
    if g.dim():
        wrong = reference.checked_scale(g).isnan() & ~g.isnan()
        g = g[wrong][0] if wrong.any().tolist() else g.new_zeros(())
    value = g.tolist()
    if not math.isnan(value):
        known_scale(value)
