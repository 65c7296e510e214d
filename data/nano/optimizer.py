"""The optimizer of the nano model: Muon for matrices, AdamW for everything else, float32 masters for both.

The model computes with bf16 parameters; they are copies, written anew after each step, of float32 masters
kept here. That makes quantization-aware training of the weights free: the copy is rounded to NVFP4, the
gradient found there moves the master, which is what "straight through" means.

Source of the matrix update: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv4lab.layers import GroupedLinear, Router, Weight, fake_quantize

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near one.

    Args:
        matrices: (n, R, C), R <= C.
    Returns:
        (n, R, C) bf16. The quintic iteration leaves singular values within about 0.7 .. 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


@dataclass(frozen=True)
class Piece:
    """A parameter seen as `count` matrices (N, K), each with N and K exchanged where N > K.

    Args:
        parameter: (N', K) or (E, N', K).
        count: of matrices.
        quantized: whether the package's NVFP4 pipeline quantizes it.
    """

    parameter: nn.Parameter
    count: int
    quantized: bool

    @property
    def rows(self) -> int:
        return self.parameter.numel() // (self.count * self.parameter.shape[-1])

    @property
    def turned(self) -> bool:
        return self.rows > self.parameter.shape[-1]

    @property
    def key(self) -> tuple:
        """Pieces with the same key stand in one stack."""
        return (*sorted((self.rows, self.parameter.shape[-1])), self.turned, self.quantized)

    @property
    def gain(self) -> float:
        """A tall matrix needs larger steps for the same change of its outputs."""
        return max(1.0, self.rows / self.parameter.shape[-1]) ** 0.5

    def matrices(self, tensor: Tensor) -> Tensor:
        """`tensor`, shaped as the parameter, as (count, R, C) with R <= C."""
        view = tensor.reshape(self.count, self.rows, -1)
        return view.mT if self.turned else view

    def shaped(self, matrices: Tensor) -> Tensor:
        """The inverse."""
        return (matrices.mT if self.turned else matrices).reshape(self.parameter.shape)


class Stack:
    """All matrices of one shape, updated together: a few batched products, not hundreds of small ones."""

    def __init__(self, pieces: list[Piece]):
        self.pieces = pieces
        first = pieces[0]
        self.gain, self.turned, self.quantized = first.gain, first.turned, first.quantized
        self.master = torch.cat([p.matrices(p.parameter.detach().float()) for p in pieces])
        self.momentum = torch.zeros_like(self.master)

    def step(self, rate: float, decay: float, momentum: float) -> None:
        grad = torch.cat([p.matrices(p.parameter.grad) for p in self.pieces]).float()
        self.momentum.lerp_(grad, 1 - momentum)
        update = orthogonalize(grad.lerp_(self.momentum, momentum))
        self.master.mul_(1 - rate * decay).add_(update, alpha=-rate * self.gain)

    def write(self, quantize: bool) -> None:
        """Copies the masters into the parameters, rounded to NVFP4 along K where asked."""
        value = self.master
        if quantize and self.quantized:
            value = fake_quantize(value.mT, "matrix").mT if self.turned else fake_quantize(value, "matrix")
        parts = value.split([p.count for p in self.pieces])
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.parameter.data.copy_(piece.shaped(part))


class Optimizer:
    """Steps every parameter of the model that takes part in its loss.

    Args:
        model: on its device; parameters that stay out of training have `requires_grad` off.
        matrix_rate: Muon's peak learning rate.
        decay: weight decay of the matrices.
        rates: AdamW's peak rates by what a parameter's name contains; the first that fits, "" fits all.
    """

    def __init__(self, model: nn.Module, *, matrix_rate: float, decay: float, rates: dict[str, float]):
        self.matrix_rate, self.decay, self.momentum = matrix_rate, decay, 0.95
        pieces = _pieces(model)
        groups: dict[tuple, list[Piece]] = {}
        for piece in pieces:
            groups.setdefault(piece.key, []).append(piece)
        self.stacks = [Stack(group) for group in groups.values()]
        taken = {id(p.parameter) for p in pieces}
        rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
        self.names, self.small = [n for n, _ in rest], [p for _, p in rest]
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.small]
        groups = [
            {"params": [m], "peak": _rate(n, rates)} for (n, _), m in zip(rest, self.masters, strict=True)
        ]
        fused = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(_merged(groups), lr=0.0, betas=(0.9, 0.97), eps=1e-10, weight_decay=0.0,
                                      fused=fused)  # fmt: skip

    @torch.no_grad()
    def step(self, factor: float, quantize: bool = False) -> None:
        """Updates masters from the gradients, then the parameters from the masters.

        Args:
            factor: of the peak learning rates.
            quantize: whether the matrices of NVFP4 layers are rounded to it in the copy.
        """
        for stack in self.stacks:
            stack.step(self.matrix_rate * factor, self.decay, self.momentum)
        grads = [p.grad for p in self.small]
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        self.adam.step()
        self.write(quantize)

    @torch.no_grad()
    def write(self, quantize: bool = False) -> None:
        """Writes the masters into the model's parameters."""
        for stack in self.stacks:
            stack.write(quantize)
        torch._foreach_copy_([p.data for p in self.small], [m.data for m in self.masters])

    @torch.no_grad()
    def round_to_bf16(self, keep: set[str]) -> None:
        """Rounds the masters to what a bf16 file holds.

        Args:
            keep: names of parameters that stay as they are.
        """
        for stack in self.stacks:
            stack.master.copy_(stack.master.bfloat16())
        for name, master in zip(self.names, self.masters, strict=True):
            if name not in keep:
                master.copy_(master.bfloat16())

    def state_dict(self) -> dict:
        return {
            "stacks": [{"master": s.master, "momentum": s.momentum} for s in self.stacks],
            "masters": [m.data for m in self.masters],
            "adam": self.adam.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for stack, saved in zip(self.stacks, state["stacks"], strict=True):
            stack.master.copy_(saved["master"])
            stack.momentum.copy_(saved["momentum"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.write()


def _pieces(model: nn.Module) -> list[Piece]:
    """The linears that NVFP4 covers, and the compressors' projections, which it does not; no router."""
    pieces = []
    for name, module in model.named_modules():
        if isinstance(module, Weight) and not isinstance(module, Router):
            stacked = module.weight.shape[0] if module.weight.dim() == 3 else 1
            groups = module.groups if isinstance(module, GroupedLinear) else 1
            pieces.append(Piece(module.weight, stacked * module.parts * groups, module.nvfp4))
        elif isinstance(module, nn.Linear) and ".compressor." in name and module.weight.requires_grad:
            pieces.append(Piece(module.weight, 1, False))
    return pieces


def _rate(name: str, rates: dict[str, float]) -> float:
    """The rate of the first key that the parameter's name contains."""
    return next(rate for key, rate in rates.items() if key in name)


def _merged(groups: list[dict]) -> list[dict]:
    """One group for each rate: each costs a launch."""
    merged: dict[float, list] = {}
    for group in groups:
        merged.setdefault(group["peak"], []).extend(group["params"])
    return [{"params": params, "peak": peak} for peak, params in merged.items()]
