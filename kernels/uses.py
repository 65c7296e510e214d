"""What the kernels are for: the operations of the models, at their sizes, on tensors that hold nothing.

Which kernel an operation takes, and which configuration of it, is decided where the operation is called. So
to list them all, all operations are called, on a GPU that keeps launches instead of executing them. That
costs no memory either: nobody touches what `torch.empty` reserves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4lab.formats import BLOCK, SCALE_DTYPE, NVFP4Tensor, scales_shape
from dsv4lab.gemm import grouped_mm, grouped_mm_swiglu
from dsv4lab.layouts import max_group_rows, swizzle_scales, unswizzle_scales
from dsv4lab.model import ModelConfig
from dsv4lab.quantize import (
    dequantize_nvfp4,
    global_scale,
    mhc_rmsnorm_quantize,
    quantize_nvfp4,
    rmsnorm_quantize,
    swiglu_quantize,
)

MODELS = {"nano": ModelConfig.nano, "flash": ModelConfig.flash, "pro": ModelConfig.pro}
SIZES = (("flash", 1), ("flash", 16), ("flash", 128), ("flash", 4096), ("pro", 16), ("nano", 1), ("nano", 16))
"""A model and tokens: one, a batch of decoding, a tile, a prompt."""

STREAMS, EPS = 4, 1e-6
LAYOUTS = ("linear", "swizzled")
POLICIES = ("token", "tensor", torch.ones(()))
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Use:
    """An operation at a size.

    Args:
        name: of it, such as "flash linear 16x4096x1024", T x K x N.
        call: it; takes a keyword `backend`.
        weight_only: whether it multiplies bf16 activations, for which Blackwell has no kernels.
    """

    name: str
    call: Callable[..., object]
    weight_only: bool = False


def uses(sizes: Iterable[tuple[str, int]] = SIZES) -> Iterator[Use]:
    """All of them."""
    for model, t in sizes:
        config = MODELS[model]()
        for part in (linears, experts, norms, activations, conversions):
            for use in part(config, t):
                yield dataclasses.replace(use, name=f"{model} {use.name}")


def linears(c: ModelConfig, t: int) -> Iterator[Use]:
    """The products of a layer that each token takes part in."""
    heads, low_rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    hidden, width = c.hidden_size, c.moe_intermediate_size
    for k, n in dict.fromkeys((
        (hidden, c.q_lora_rank), (c.q_lora_rank, heads), (hidden, c.head_dim), (low_rank, hidden),
        (width, hidden),
    )):  # fmt: skip
        b = nvfp4(n, k)
        yield Use(f"linear {t}x{k}x{n}", partial(grouped_mm, nvfp4(t, k, granularity="token"), b))
        yield Use(f"w4a16 linear {t}x{k}x{n}", partial(grouped_mm, _empty(t, k), b), weight_only=True)
    a = nvfp4(t, hidden)
    yield from _swiglus(f"shared expert {t}x{hidden}x{2 * width}", a, nvfp4(2 * width, hidden, woven=True))
    k, n = heads // c.o_groups, c.o_lora_rank
    rows = c.o_groups * (-(-t // 128) * 128)
    groups = (_numbers(c.o_groups), _numbers(c.o_groups))
    b = nvfp4(c.o_groups, n, k, granularity="group")
    yield Use(f"wo_a {t}x{k}x{n}x{c.o_groups}", partial(grouped_mm, nvfp4(rows, k), b, *groups))


def experts(c: ModelConfig, t: int) -> Iterator[Use]:
    """The products of the routed experts."""
    count, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    rows = max_group_rows(t, c.num_experts_per_tok, count)
    groups = (_numbers(count), _numbers(count))
    a, b = nvfp4(rows, width, granularity="token"), nvfp4(count, hidden, width, granularity="group")
    yield Use(f"experts {t}x{width}x{hidden}x{count}", partial(grouped_mm, a, b, *groups))
    name, a = f"experts {t}x{hidden}x{2 * width}x{count}", nvfp4(rows, hidden)
    b = nvfp4(count, 2 * width, hidden, granularity="group")
    yield Use(name, partial(grouped_mm, a, b.with_(global_scale=_floats(count, 2)), *groups))
    for scale in ((count,), (count, 2)):
        woven = b.with_(global_scale=_floats(*scale), interleaved=True)
        yield from _swiglus(name, a, woven, *groups)


def _swiglus(name: str, a: NVFP4Tensor, b: NVFP4Tensor, *groups: Tensor) -> Iterator[Use]:
    for options in (
        {}, {"limit": None}, *({"output": "nvfp4", "scale_layout": layout} for layout in LAYOUTS),
    ):  # fmt: skip
        yield Use(f"swiglu of {name}", partial(grouped_mm_swiglu, a, b, *groups, **options))


def norms(c: ModelConfig, t: int) -> Iterator[Use]:
    """What makes a layer's input: two forms of a norm, or none."""
    size, x, weight = f"{t}x{c.hidden_size}", _empty(t, c.hidden_size), _empty(c.hidden_size, dtype=FP32)
    streams, mix = _empty(t, STREAMS, c.hidden_size), _empty(t, STREAMS, dtype=FP32)
    for policy in POLICIES:
        options = {"global_scale": policy, "scale_layout": "swizzled"}
        yield Use(f"quantize {size}", partial(quantize_nvfp4, x, **options))
        yield Use(f"rmsnorm_quantize {size}", partial(rmsnorm_quantize, x, weight, EPS, **options))
        mixed = partial(mhc_rmsnorm_quantize, streams, mix, weight, EPS, **options)
        yield Use(f"mhc_rmsnorm_quantize {size}", mixed)


def activations(c: ModelConfig, t: int) -> Iterator[Use]:
    """SwiGLU where it is not part of the product before it."""
    size, gate_up = f"{t}x{c.moe_intermediate_size}", _empty(t, 2 * c.moe_intermediate_size)
    forms = [(policy, c.swiglu_limit, False) for policy in POLICIES]
    for policy, limit, woven in (*forms, ("token", c.swiglu_limit, True), ("token", None, False)):
        options = {"global_scale": policy, "scale_layout": "swizzled", "interleaved": woven}
        yield Use(f"swiglu_quantize {size}", partial(swiglu_quantize, gate_up, limit, **options))


def conversions(c: ModelConfig, t: int) -> Iterator[Use]:
    """Other tensors to NVFP4 and back."""
    k, groups = c.hidden_size, c.o_groups
    size, x = f"{t}x{k}", _empty(t, k)
    for values in (x, _empty(t, k, dtype=FP32)):
        yield Use(f"quantize {size}", partial(quantize_nvfp4, values, "token"))
    yield Use(f"quantize {groups}x{size}", partial(quantize_nvfp4, _empty(groups, t, k), "group"))
    for policy in ("token", "tensor"):
        yield Use(f"global_scale {size}", partial(global_scale, x, policy))
        yield Use(f"dequantize {size}", partial(dequantize_nvfp4, nvfp4(t, k, granularity=policy)))
    q = nvfp4(groups, t, k, granularity="group", layout="linear")
    yield Use(f"dequantize {groups}x{size}", partial(dequantize_nvfp4, q))
    scales = _empty(t, k // BLOCK, dtype=SCALE_DTYPE)
    yield Use(f"swizzle {size}", partial(swizzle_scales, scales))
    swizzled = _empty(*scales_shape((t, k), "swizzled"), dtype=SCALE_DTYPE)
    yield Use(f"unswizzle {size}", partial(unswizzle_scales, swizzled, *scales.shape))


def nvfp4(
    *shape: int, granularity: str = "tensor", layout: str = "swizzled", woven: bool = False
) -> NVFP4Tensor:
    """A tensor of that shape (..., K)."""
    scale = {"tensor": (), "token": shape[:-1], "group": shape[:1]}[granularity]
    codes = _empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
    scales = _empty(*scales_shape(shape, layout), dtype=SCALE_DTYPE)
    return NVFP4Tensor(codes, scales, _floats(*scale), layout, granularity, woven)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _floats(*shape: int) -> Tensor:
    return torch.ones(shape)


def _numbers(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)
