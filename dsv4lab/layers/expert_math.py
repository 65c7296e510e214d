"""The routed experts in high precision: differentiable, and what NVFP4 is measured against."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import inverse, sort_by_expert
from .shared_expert import swiglu


def high_precision(layer, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The experts' weighted sum (T, H) float32 for x (T, H), weights and chosen (T, k); see `Experts`."""
    algorithm = _algorithm(layer, x, chosen.shape[1])
    if algorithm == "dense":
        return _dense(layer, x, weights, chosen)
    return _sorted(layer, x, weights, chosen, _grouped if algorithm == "grouped" else _loop)


def _algorithm(layer, x: Tensor, k: int) -> str:
    if layer.algorithm != "auto":
        return layer.algorithm
    # Observers must see what experts really get, not also what they would have got.
    observed = layer.w13.observer is not None or layer.w2.observer is not None
    if observed or (not x.is_cuda and not torch.compiler.is_compiling()):
        return "loop"
    grouped = x.is_cuda and x.dtype == torch.bfloat16 and layer.experts > 2 * k
    return "grouped" if grouped else "dense"


def _dense(layer, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The routing weight is put on h in both placements: w2 is linear, so only the rounding differs."""
    per_expert = weights.new_zeros(x.shape[0], layer.experts).scatter_add(1, chosen, weights)
    x = layer.w13.operand(x)
    gate_up = F.linear(x, layer.w13.matrix(x.dtype).flatten(0, 1))
    h = swiglu(gate_up.unflatten(-1, (layer.experts, -1)), layer.limit)
    h = layer.w2.operand(h) if layer.route_weight == "after" else h
    h = (h.float() * per_expert[..., None]).to(x.dtype)
    h = layer.w2.operand(h) if layer.route_weight == "before" else h
    return (h.flatten(1) @ layer.w2.matrix(x.dtype).transpose(1, 2).flatten(0, 1)).float()


def _sorted(layer, x: Tensor, weights: Tensor, chosen: Tensor, matmul) -> Tensor:
    """Copies of the tokens stand sorted by expert, so that each expert works on one run of rows."""
    tokens, k = chosen.shape
    order, ends = sort_by_expert(chosen, layer.experts)
    x = layer.w13.operand(x)
    h = swiglu(matmul(x[order // k], layer.w13.matrix(x.dtype), ends), layer.limit)
    if layer.route_weight == "before":
        h = (h.float() * weights.flatten()[order][:, None]).to(h.dtype)
    y = matmul(layer.w2.operand(h), layer.w2.matrix(x.dtype), ends)
    y = y[inverse(order)].view(tokens, k, layer.hidden).float()
    return (y * weights[..., None]).sum(1) if layer.route_weight == "after" else y.sum(1)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (R, K) times weight (E, N, K), group e ending at row ends[e], in one kernel."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same, one product for each expert in use."""
    bounds = pairwise([0, *ends.tolist()])
    parts = [F.linear(rows[a:b], weight[e]) for e, (a, b) in enumerate(bounds) if b > a]
    return torch.cat(parts) if parts else rows.new_zeros(0, weight.shape[1])
