"""Tokens to padded groups of rows, one group an expert, and back; all on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import SCALE_DTYPE, NVFP4Tensor, scales_shape
from ..layouts import from_torch_offsets, max_group_rows, padded_rows, swizzle_scales, with_scale_layout


class Route(NamedTuple):
    """Where the copies of each token go.

    slot: (T * k,) int64, the row of the buffer that the j-th copy of token t, index t k + j, stands in.
    offsets, sizes: (E,) int32, padded ends of the experts' groups, and their real rows.
    rows: of the buffer, enough for any routing.
    copies: k.
    """

    slot: Tensor
    offsets: Tensor
    sizes: Tensor
    rows: int
    copies: int


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """Raise unless ids are integers within 0 .. count - 1; their values are looked at on the CPU only."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} must be an int32 or int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}"
        )
    known = type(ids) is Tensor and ids.is_cpu and not torch.compiler.is_compiling()
    if not known or not ids.numel():
        return
    low, high = (end.item() for end in torch.aminmax(ids))
    if low < 0 or high >= count:
        raise ValueError(f"{name} must lie within 0 and {count - 1}, got {low if low < 0 else high}")


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Copies in the order of their experts, earlier tokens first: (order (T k,) int64, ends (E,) int32)."""
    by_expert, order = torch.sort(chosen.flatten(), stable=True)
    ids = torch.arange(experts, device=chosen.device)
    return order, torch.searchsorted(by_expert, ids, right=True, out_int32=True)


def inverse(order: Tensor, values: Tensor | None = None) -> Tensor:
    """Where each element of a permutation came to stand, or `values` brought back to the original order."""
    values = torch.arange(order.shape[0], device=order.device) if values is None else values
    return torch.empty_like(values).scatter_(0, order, values)


def dispatch(chosen: Tensor, experts: int) -> Route:
    """Plan the groups for expert ids (T, k) int64, without waiting for the device."""
    tokens, k = chosen.shape
    order, ends = sort_by_expert(chosen, experts)
    offsets, sizes = from_torch_offsets(ends)
    slot = inverse(order, padded_rows(sizes, tokens * k))
    return Route(slot, offsets, sizes, max_group_rows(tokens, k, experts), k)


def place(
    x: Tensor | NVFP4Tensor, route: Route, copies: int, scratch=None, scale_layout: str = "linear"
) -> Tensor | NVFP4Tensor:
    """Put rows into the padded buffer.

    Args:
        x: (T, K) of which every row goes to `copies` = k places, or (T k, K) with copies = 1; bf16, or NVFP4
            with one global scale or one a row.
        route: from dispatch.
        copies: how often each row is written.
        scratch: scratch(name, shape, dtype) gives memory to use, None allocates.
        scale_layout: of the result.

    Returns:
        (rows, K); block scales of padding are zero, all else in it is undefined.
    """
    if isinstance(x, Tensor):
        return _scatter("values", x, route, copies, scratch)
    x = with_scale_layout(x, "linear")
    codes = _scatter("codes", x.codes, route, copies, scratch)
    scales = _scatter("scales", x.block_scales.view(torch.uint8), route, copies, scratch, zero=True)
    g = x.global_scale
    if x.granularity == "token":
        g = _scatter("global", g.reshape(-1), route, copies, scratch)
    if scale_layout == "swizzled":
        shape = scales_shape((route.rows, x.K), scale_layout)
        out = None if scratch is None else scratch("swizzled", shape, torch.uint8)
        scales = swizzle_scales(scales, out=out)
    return NVFP4Tensor(codes, scales.view(SCALE_DTYPE), g, scale_layout, x.granularity)


def _scatter(name: str, x: Tensor, route: Route, copies: int, scratch, zero: bool = False) -> Tensor:
    shape = (route.rows, *x.shape[1:])
    buffer = x.new_empty(shape) if scratch is None else scratch(name, shape, x.dtype)
    if zero:
        buffer.zero_()
    rows = x if copies == 1 else x.repeat_interleave(copies, 0)
    return buffer.index_copy_(0, route.slot, rows)


def combine(y: Tensor, weights: Tensor | None, route: Route) -> Tensor:
    """Sum the copies of each token in float32, in the order of its choices.

    Args:
        y: (rows, H), results in the padded buffer.
        weights: (T, k) float32, or None where the sum is plain.

    Returns:
        (T, H) float32.
    """
    copies = y[route.slot].unflatten(0, (route.slot.shape[0] // route.copies, route.copies)).float()
    return copies.sum(1) if weights is None else (copies * weights[..., None]).sum(1)
