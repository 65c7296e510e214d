"""mHC: n parallel residual streams, mixed by weights computed from the streams themselves."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mixing_weights(n: int, hidden: int, *, device=None) -> dict[str, Tensor]:
    """Starting weights of a block's mixing, float32: read the streams' mean, keep the streams apart.

    Args:
        n, hidden: streams and their width H.

    Returns:
        fn (2n + n*n, n*H), base (2n + n*n,), scale (3,); rows for pre, post, then the matrix row by row.
    """
    weights = _weights(2 * n + n * n, n * hidden, 3, device)
    weights["base"][:n] = -math.log(n - 1) if n > 1 else 7.0
    weights["base"][2 * n :].view(n, n).fill_diagonal_(3.0)
    return weights


def head_weights(n: int, hidden: int, *, device=None) -> dict[str, Tensor]:
    """Starting weights of the head's mixing: fn (n, n*H), base (n,), scale (1,)."""
    return _weights(n, n * hidden, 1, device)


def _weights(rows: int, columns: int, scales: int, device) -> dict[str, Tensor]:
    made = {"dtype": torch.float32, "device": device}
    fn = nn.init.uniform_(torch.empty(rows, columns, **made), -(columns**-0.5), columns**-0.5)
    return {"fn": fn, "base": torch.zeros(rows, **made), "scale": torch.full((scales,), 0.1, **made)}


def sinkhorn(matrix: Tensor, iterations: int, eps: float) -> Tensor:
    """Scale a positive matrix towards rows and columns that sum to one, columns last.

    Args:
        matrix: (..., n, n) float32 logits; a softmax over each row makes them positive.
        iterations: of (rows, columns); the softmax is the first pass over the rows.
        eps: added to the softmax and to every divisor.

    Returns:
        (..., n, n) float32.
    """
    matrix = matrix.softmax(-1) + eps
    if matrix.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _sinkhorn_flat(matrix, iterations, eps)
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def _sinkhorn_flat(matrix: Tensor, iterations: int, eps: float) -> Tensor:
    """The same in two operations a pass, since a step of decoding costs operations, not arithmetic.

    A product with ones and zeros puts each entry's row (or column) sum plus eps in its place.
    """
    n = matrix.shape[-1]
    rows, columns, bias = _summing(n, eps)
    flat = matrix.reshape(-1, n * n)
    sums = torch.addmm(bias, flat, columns)
    flat = flat / sums
    for _ in range(iterations - 1):
        flat.div_(torch.addmm(bias, flat, rows, out=sums))
        flat.div_(torch.addmm(bias, flat, columns, out=sums))
    return flat.view(matrix.shape)


@lru_cache
def _summing(n: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    eye, ones = torch.eye(n), torch.ones(n, n)
    return torch.kron(eye, ones), torch.kron(ones, eye), torch.full((n * n,), eps)


def _logits(streams: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    """fn applied to all streams together, normalized: (..., n, H) to (..., outputs), float32."""
    flat = streams.flatten(-2).float()
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    return F.linear(flat, fn.float()) * scale


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """The weighted sum of the streams (..., n, H) with weights (..., n), in the streams' dtype."""
    return (streams.float() * pre[..., None]).sum(-2).to(streams.dtype)


def open_streams(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float,
                 rms_eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a sublayer reads from the streams, and the weights that bring its result back.

    Args:
        streams: (..., n, H).
        fn, base, scale: as `mixing_weights` describes.
        iterations, eps: of the Sinkhorn scaling.
        rms_eps: of the normalization of the streams.

    Returns:
        The input (..., H) in the streams' dtype, post (..., n) and mix (..., n, n), both float32.
    """
    n = streams.shape[-2]
    base, scale = base.float(), scale.float()
    pre, post, mix = _logits(streams, fn, rms_eps).split((n, n, n * n), -1)
    pre = torch.addcmul(base[:n], pre, scale[0]).sigmoid() + eps
    post = torch.addcmul(base[n : 2 * n], post, scale[1]).sigmoid() * 2
    mix = torch.addcmul(base[2 * n :], mix, scale[2]).unflatten(-1, (n, n))
    return collapse(streams, pre), post, sinkhorn(mix, iterations, eps)


def close_streams(streams: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """New stream k = post[k] * y + sum over j of mix[j, k] * stream j.

    Args:
        streams: (..., n, H).
        y: (..., H), the sublayer's result.
        post, mix: (..., n) and (..., n, n) float32, from `open_streams`.

    Returns:
        (..., n, H) in the streams' dtype.
    """
    old = streams.float()
    new = y.float()[..., None, :] * post[..., None]
    for j in range(streams.shape[-2]):
        new = torch.addcmul(new, mix[..., j, :, None], old[..., j, None, :])
    return new.to(streams.dtype)


def collapse_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float,
                  rms_eps: float) -> Tensor:  # fmt: skip
    """The streams' weighted sum before the last norm.

    Args:
        streams: (..., n, H).
        fn, base, scale: as `head_weights` describes.

    Returns:
        (..., H) in the streams' dtype.
    """
    logits = _logits(streams, fn, rms_eps)
    return collapse(streams, torch.addcmul(base.float(), logits, scale.float()).sigmoid() + eps)
