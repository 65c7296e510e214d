"""The quantization operations as declared to torch: schemas, reference code, shapes of the results."""

from __future__ import annotations

from torch import Tensor

from dsv4lab import formats, reference
from dsv4lab.ops import register_op

_SCALE = "Tensor? global_scale, str granularity, float divisor, bool swizzled"
_RESULT = "Tensor codes, Tensor scales, Tensor g"


def scale_shape(g: Tensor | None, granularity: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the global scale of data (..., K): that of a known one, or what the granularity makes."""
    if g is not None:
        return tuple(g.shape)
    return {"tensor": (), "token": tuple(shape[:-1]), "group": tuple(shape[:1])}[granularity]


def _allocate(x: Tensor, shape, g: Tensor | None, granularity: str, swizzled: bool) -> tuple[Tensor, ...]:
    """Codes, block scales and global scale for data of a logical shape."""
    layout = "swizzled" if swizzled else "linear"
    return (
        x.new_empty((*shape[:-1], shape[-1] // 2), dtype=formats.CODE_DTYPE),
        x.new_empty(formats.scales_shape(shape, layout), dtype=formats.SCALE_DTYPE),
        x.new_empty(scale_shape(g, granularity, shape), dtype=formats.GLOBAL_DTYPE),
    )


def _fake_global_scale(x, granularity, divisor):
    return x.new_empty(scale_shape(None, granularity, x.shape), dtype=formats.GLOBAL_DTYPE)


def _fake_quantize(x, g, granularity, divisor, swizzled):
    return _allocate(x, tuple(x.shape), g, granularity, swizzled)


def _fake_rmsnorm(x, weight, eps, g, granularity, divisor, swizzled):
    rrms = x.new_empty(x.shape[:-1], dtype=formats.GLOBAL_DTYPE)
    return (*_allocate(x, tuple(x.shape), g, granularity, swizzled), rrms)


def _fake_mhc(streams, mix, weight, eps, g, granularity, divisor, swizzled):
    shape = (*streams.shape[:-2], streams.shape[-1])
    rrms = streams.new_empty(shape[:-1], dtype=formats.GLOBAL_DTYPE)
    return (*_allocate(streams, shape, g, granularity, swizzled), rrms)


def _fake_swiglu(gate_up, limit, interleaved, g, granularity, divisor, swizzled):
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return _allocate(gate_up, shape, g, granularity, swizzled)


def _fake_dequantize(codes, scales, g, granularity, swizzled, interleaved, dtype):
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype)


global_scale = register_op(
    "global_scale(Tensor x, str granularity, float divisor) -> Tensor",
    reference.global_scale,
    _fake_global_scale,
)
quantize = register_op(f"quantize(Tensor x, {_SCALE}) -> ({_RESULT})", reference.quantize, _fake_quantize)
rmsnorm_quantize = register_op(
    f"rmsnorm_quantize(Tensor x, Tensor weight, float eps, {_SCALE}) -> ({_RESULT}, Tensor rrms)",
    reference.rmsnorm_quantize,
    _fake_rmsnorm,
)
mhc_rmsnorm_quantize = register_op(
    "mhc_rmsnorm_quantize(Tensor streams, Tensor mix, Tensor weight, float eps, "
    f"{_SCALE}) -> ({_RESULT}, Tensor rrms)",
    reference.mhc_rmsnorm_quantize,
    _fake_mhc,
)
swiglu_quantize = register_op(
    f"swiglu_quantize(Tensor gate_up, float? limit, bool interleaved, {_SCALE}) -> ({_RESULT})",
    reference.swiglu_quantize,
    _fake_swiglu,
)
dequantize = register_op(
    "dequantize(Tensor codes, Tensor scales, Tensor global_scale, str granularity, bool swizzled, "
    "bool interleaved, ScalarType dtype) -> Tensor",
    reference.dequantize,
    _fake_dequantize,
)
