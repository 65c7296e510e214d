"""Two operations of the model as single GPU kernels, for training only.

Sinkhorn's 39 normalizations of a 4 x 4 matrix per token, and NVFP4's rounding of activations, are many small
kernels when written with torch; a compiler that unrolls them takes longer than it saves in a run of eight
minutes. Values agree with the package's own functions, `dsv4lab.model.hyper_connections.sinkhorn` and
`dsv4lab.layers.fake_quantize`: to rounding for the first, exactly for the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4lab.model.hyper_connections import sinkhorn as plain_sinkhorn  # noqa: F401  what the kernel stands for

STREAMS = 4
_TOKENS = 64  # matrices a program handles


@triton.jit
def _sinkhorn_forward(x_ptr, out_ptr, sums_ptr, tokens, eps, PASSES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    four = tl.arange(0, 4)
    inside = token < tokens
    at = token[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    sums_at = token[:, None] * 4 + four[None, :]
    a = tl.load(x_ptr + at, mask=inside[:, None, None], other=0.0)
    a = tl.exp(a - tl.max(a, axis=2)[:, :, None])
    a = a / tl.sum(a, axis=2)[:, :, None] + eps
    for i in range(PASSES):
        columns = tl.sum(a, axis=1) + eps
        tl.store(sums_ptr + (2 * i) * tokens * 4 + sums_at, columns, mask=inside[:, None])
        a = a / columns[:, None, :]
        if i < PASSES - 1:
            rows = tl.sum(a, axis=2) + eps
            tl.store(sums_ptr + (2 * i + 1) * tokens * 4 + sums_at, rows, mask=inside[:, None])
            a = a / rows[:, :, None]
    tl.store(out_ptr + at, a, mask=inside[:, None, None])


@triton.jit
def _sinkhorn_backward(grad_ptr, out_ptr, sums_ptr, dx_ptr, tokens, eps,
                       PASSES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # A pass made a' = a / s with s = sum(a) + eps. Backwards a = a' s, and da = (da' - sum(da' a')) / s.
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    four = tl.arange(0, 4)
    inside = token < tokens
    at = token[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    sums_at = token[:, None] * 4 + four[None, :]
    a = tl.load(out_ptr + at, mask=inside[:, None, None], other=0.25)
    d = tl.load(grad_ptr + at, mask=inside[:, None, None], other=0.0)
    for j in range(PASSES):
        i = PASSES - 1 - j
        if i < PASSES - 1:
            rows = tl.load(sums_ptr + (2 * i + 1) * tokens * 4 + sums_at, mask=inside[:, None], other=1.0)
            d = (d - tl.sum(d * a, axis=2)[:, :, None]) / rows[:, :, None]
            a = a * rows[:, :, None]
        columns = tl.load(sums_ptr + (2 * i) * tokens * 4 + sums_at, mask=inside[:, None], other=1.0)
        d = (d - tl.sum(d * a, axis=1)[:, None, :]) / columns[:, None, :]
        a = a * columns[:, None, :]
    p = a - eps
    tl.store(dx_ptr + at, p * (d - tl.sum(d * p, axis=2)[:, :, None]), mask=inside[:, None, None])


@torch.library.custom_op("nano::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    tokens = logits.numel() // 16
    out = torch.empty_like(logits)
    sums = logits.new_empty(2 * iterations - 1, tokens, 4)
    grid = (triton.cdiv(tokens, _TOKENS),)
    _sinkhorn_forward[grid](logits, out, sums, tokens, eps, PASSES=iterations, BLOCK=_TOKENS, num_warps=4)
    return out, sums


@_sinkhorn.register_fake
def _(logits, iterations, eps):
    out = logits.new_empty(logits.shape)
    return out, logits.new_empty(2 * iterations - 1, logits.numel() // 16, 4)


@torch.library.custom_op("nano::sinkhorn_backward", mutates_args=())
def _sinkhorn_grad(grad: Tensor, out: Tensor, sums: Tensor, iterations: int, eps: float) -> Tensor:
    grad, out = grad.contiguous(), out.contiguous()
    tokens = out.numel() // 16
    dx = torch.empty_like(out)
    grid = (triton.cdiv(tokens, _TOKENS),)
    _sinkhorn_backward[grid](grad, out, sums, dx, tokens, eps, PASSES=iterations, BLOCK=_TOKENS, num_warps=4)
    return dx


@_sinkhorn_grad.register_fake
def _(grad, out, sums, iterations, eps):
    return out.new_empty(out.shape)


def _sinkhorn_setup(ctx, inputs, output):
    _, ctx.iterations, ctx.eps = inputs
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _sinkhorn_autograd(ctx, grad, _):
    out, sums = ctx.saved_tensors
    return _sinkhorn_grad(grad, out, sums, ctx.iterations, ctx.eps), None, None


_sinkhorn.register_autograd(_sinkhorn_autograd, setup_context=_sinkhorn_setup)


def sinkhorn(matrix: Tensor, iterations: int, eps: float) -> Tensor:
    """`hyper_connections.sinkhorn` in one kernel each way.

    Args:
        matrix: (..., 4, 4) float32 logits on CUDA.
        iterations: at least 1.
        eps: added to the softmax and to every divisor.
    """
    if matrix.shape[-2:] != (STREAMS, STREAMS) or matrix.dtype != torch.float32:
        raise ValueError(f"matrix must be (..., 4, 4) float32, got {tuple(matrix.shape)} {matrix.dtype}")
    return _sinkhorn(matrix, iterations, eps)[0]


@triton.jit
def _div(a, b):
    return tl.math.div_rn(a, b)


@triton.jit
def _round_even(v):
    # Adding and taking off 1.5 * 2^23 leaves the nearest even integer of |v| < 2^22.
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _round_e4m3(s):
    # s in 0 .. 448. Its spacing is 2^(exponent - 3), at least 2^-9; an addition rounds to a multiple of it.
    exponent = tl.maximum(s.to(tl.int32, bitcast=True) >> 23, 121)
    large = ((exponent - 3) << 23).to(tl.float32, bitcast=True) * 12582912.0
    return (s + large) - large


@triton.jit
def _fake_quantize_kernel(x_ptr, out_ptr, on_ptr, rows, divisor, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None, None] * K + tl.arange(0, K // 16)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    inside = (row < rows)[:, None, None]
    stored = tl.load(x_ptr + at, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    magnitude = tl.abs(x)
    amax = tl.max(magnitude, axis=2)
    top = tl.max(amax, axis=1)[:, None]
    g = _div(tl.maximum(top, 1e-8), tl.zeros_like(top) + divisor)
    scale = _round_e4m3(tl.minimum(_div(amax, 6.0 * g), 448.0))
    step = scale * g
    inverse = tl.where(step == 0.0, 0.0, _div(tl.zeros_like(step) + 1.0, tl.where(step == 0.0, 1.0, step)))
    v = magnitude * inverse[:, :, None]
    fine = _round_even(v * 2.0) * 0.5
    code = tl.where(v < 2.0, fine, tl.where(v < 4.0, _round_even(v), _round_even(v * 0.5) * 2.0))
    code = tl.minimum(code, 6.0)
    value = code * scale[:, :, None] * g[:, :, None]
    value = tl.where(x < 0.0, -value, value)
    quantized = value.to(stored.dtype)
    on = tl.load(on_ptr) != 0.0
    tl.store(out_ptr + at, tl.where(on, quantized, stored), mask=inside)


@torch.library.custom_op("nano::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, on: Tensor, divisor: float) -> Tensor:
    x = x.contiguous()
    k = x.shape[-1]
    rows = x.numel() // k
    out = torch.empty_like(x)
    block = max(1, 2048 // k)
    grid = (triton.cdiv(rows, block),)
    # Fused with the addition that rounds it, a product is not rounded itself: 1 value in 6,000 was wrong.
    options = {"num_warps": 4, "enable_fp_fusion": False}
    _fake_quantize_kernel[grid](x, out, on, rows, divisor, K=k, BLOCK=block, **options)
    return out


@_fake_quantize.register_fake
def _(x, on, divisor):
    return x.new_empty(x.shape)


def _straight_through(ctx, grad):
    return grad, None, None


_fake_quantize.register_autograd(_straight_through, setup_context=lambda ctx, inputs, output: None)


def fake_quantize(x: Tensor, on: Tensor, divisor: float = 2688.0) -> Tensor:
    """NVFP4's rounding with a global scale for each row where `on` is not zero, else a copy.

    Args:
        x: (..., K) on CUDA, K a power of two from 16 to 2048.
        on: () float32 on the same device: switching costs no new compilation.
        divisor: of the row's amax.
    """
    k = x.shape[-1]
    if not 16 <= k <= 2048 or k & (k - 1):
        raise ValueError(f"x must have a last dimension that is a power of two in 16 .. 2048, got {k}")
    return _fake_quantize(x, on, divisor)
