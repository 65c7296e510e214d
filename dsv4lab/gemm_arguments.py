"""What the grouped GEMM asks of its arguments, and the flat form in which its operators take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import BLOCK, NVFP4Tensor
from .ops import first_rows
from .policies import bound_global_scale, scale_argument


def known_scale(global_scale, limit: float | None, device: torch.device) -> Tensor:
    """The global scale of an NVFP4 output as a tensor, by default the bound that the clamp implies."""
    if global_scale is None:
        if limit is None:
            raise ValueError("global_scale is needed for NVFP4 output: without a limit nothing bounds it")
        global_scale = bound_global_scale(limit)
    if isinstance(global_scale, Tensor) and global_scale.dim():
        raise ValueError(f"global_scale must be one number for the output, got {tuple(global_scale.shape)}")
    g, _ = scale_argument(global_scale, (1, BLOCK), device)
    if g is None:
        raise ValueError(f"global_scale must be known beforehand, got the policy {global_scale!r}")
    return g


def matrix(b: NVFP4Tensor) -> tuple[int, int, int]:
    """(G, N, K) of the weights."""
    return b.shape if len(b.shape) == 3 else (1, *b.shape)


def operands(a, b, offsets, sizes) -> tuple[tuple, tuple[int, ...]]:
    """The operator's arguments, checked, and the leading dimensions that the result shall have."""
    if not isinstance(b, NVFP4Tensor):
        raise TypeError(f"b must be an NVFP4Tensor, got {type(b).__name__}")
    if len(b.shape) not in (2, 3):
        raise ValueError(f"b must be (G, N, K) or (N, K), got {b.shape}")
    if not isinstance(a, NVFP4Tensor | Tensor):
        raise TypeError(f"a must be an NVFP4Tensor or a bf16 tensor, got {type(a).__name__}")
    _check_weight_scale(b)
    groups, _, k = matrix(b)
    if len(a.shape) < 1 or a.shape[-1] != k:
        raise ValueError(f"a must have K = {k} as b has, got shape {tuple(a.shape)}")
    if a.device != b.device:
        raise ValueError(f"a is on {a.device}, but b is on {b.device}")
    _check_groups(a, groups, offsets, sizes)
    weights = (b.codes, b.block_scales, b.global_scale, b.scale_layout, b.interleaved)
    return (*_activation(a, groups), *weights, offsets, sizes), tuple(a.shape[:-1])


def _activation(a: NVFP4Tensor | Tensor, groups: int) -> tuple:
    """Codes or bf16 values as (rows, K), scales, global scale, layout, granularity."""
    if isinstance(a, Tensor):
        if a.dtype != torch.bfloat16:
            raise TypeError(f"a must be bf16 where it is not NVFP4, got {a.dtype}")
        return a.reshape(-1, a.shape[-1]), None, None, "linear", "tensor"
    if a.interleaved:
        raise ValueError("a is marked as interleaved, which only the rows of gate/up weights can be")
    g = a.global_scale
    if a.granularity == "group" and tuple(g.shape) != (groups,):
        raise ValueError(f"a must have a global scale for each of {groups} groups, got {tuple(g.shape)}")
    if a.granularity == "token":
        g = g.reshape(-1)
    scales = a.block_scales
    if a.scale_layout == "linear":
        scales = scales.reshape(-1, scales.shape[-1])
    elif len(a.shape) != 2:
        raise ValueError(f"a must be (rows, K) where its scales are swizzled, got {a.shape}")
    return a.codes.reshape(-1, a.codes.shape[-1]), scales, g, a.scale_layout, a.granularity


def _check_weight_scale(b: NVFP4Tensor) -> None:
    groups, n, _ = matrix(b)
    shape = tuple(b.global_scale.shape)
    if shape not in ((), (groups,), (groups, 2)):
        raise ValueError(f"b must have a global scale (), ({groups},) or ({groups}, 2), got {shape}")
    unit = 16 if b.interleaved else 2 if len(shape) == 2 else 1
    if n % unit:
        raise ValueError(f"b must have N % {unit} == 0 for gate and up rows, got N = {n}")


def _check_groups(a, groups: int, offsets: Tensor | None, sizes: Tensor | None) -> None:
    if offsets is None and sizes is None:
        if groups != 1:
            raise ValueError(f"offsets and sizes are needed for the {groups} groups of b")
        return
    for name, t in (("offsets", offsets), ("sizes", sizes)):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(t).__name__}: both offsets and sizes are needed"
            )
        if t.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {t.dtype}")
        if tuple(t.shape) != (groups,):
            raise ValueError(
                f"{name} must have shape ({groups},), one for each group of b, got {tuple(t.shape)}"
            )
        if t.device != a.device:
            raise ValueError(f"{name} is on {t.device}, but a is on {a.device}")
    if len(a.shape) != 2 or a.shape[0] % 128:
        raise ValueError(
            f"a must be (rows, K) with rows % 128 == 0 where offsets are given, got {tuple(a.shape)}"
        )


def check_out(out: Tensor, shape: tuple[int, int], lead: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a bf16 tensor, got {type(out).__name__}")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, but b is on {device}")
    if len(lead) != 1:
        raise ValueError(f"out needs a of shape (rows, K), got leading dimensions {lead}")
    if out.dtype != torch.bfloat16:
        raise TypeError(f"out must be bf16, got {out.dtype}")
    first_rows(out, shape)
