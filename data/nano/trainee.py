"""The nano model made ready for training: its first weights and its forward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from text import IGNORED
from torch import Tensor, nn

from dsv4lab.layers import Router, Weight, fake_quantize
from dsv4lab.model import DeepseekV4, ModelConfig, hyper_connections
from dsv4lab.model.step import Step

BALANCE_RATE = 1e-3
"""Step of the router's bias, which only chooses; the value DeepSeek-V3 was trained with."""


class Trainee:
    """A model with what training adds to it: counters in the routers, a switch for NVFP4 activations.

    Args:
        config: sizes.
        device: to train on.
        context: T of every batch.
        compiled: whether blocks are compiled, one graph for each kind of block.
        kernels: whether Sinkhorn and the rounding run as the kernels of triton_ops, CUDA only.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device, context: int, *, compiled: bool, kernels: bool
    ):
        self.model = DeepseekV4(config, device=device, dtype=torch.bfloat16)
        self.context, self.device, self.kernels = context, device, kernels
        self.quantizing = torch.zeros((), device=device)
        self.routers = [m for m in self.model.modules() if isinstance(m, Router)]
        self.indexed = [layer for layer in self.model.layers if layer.attn.indexer is not None]
        self.keep(None)
        self._freeze_indexers()
        self._round_activations(kernels)
        for router in self.routers:
            router.load = torch.zeros(router.experts, device=device)
            router.register_forward_hook(_count)
        self.imbalance = torch.zeros((), device=device)
        self.known = self._positions()
        if kernels:
            from triton_ops import sinkhorn

            hyper_connections.sinkhorn = sinkhorn
        self._head = self._head_loss
        if compiled:
            torch._dynamo.config.recompile_limit = 16
            for layer in self.model.layers:
                layer.compile(dynamic=False, fullgraph=True)
            self._head = torch.compile(self._head_loss, dynamic=False, fullgraph=True)

    def loss_sum(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Sum of -ln p over the targets that are not `IGNORED`: () float32.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64, the bytes that follow.
        """
        *_, streams = self._through(ids)
        return self._head(streams, targets)

    def nats(self, batches: list[tuple[Tensor, Tensor]], *, eager: bool = False) -> float:
        """Sum of -ln p over batches, without training on them.

        Compiled, gradients stay on, since the graph without them is another one and half a minute away.

        Args:
            batches: of ids and targets.
            eager: do not run the compiled blocks: needed where entries have been left out.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for ids, targets in batches:
            if eager:
                with torch.no_grad():
                    *_, streams = self._through(ids, eager=True)
                    total += self._head_loss(streams, targets)
            else:
                total += self.loss_sum(ids, targets).detach()
        for router in self.routers:
            router.load.zero_()
        return total.item()

    def attention_inputs(self, ids: Tensor, *, eager: bool = False) -> list[Tensor]:
        """What the attention of each layer with an indexer reads, (B, T, H) each, without gradients."""
        inputs = []
        for layer, streams in zip(self.model.layers, self._through(ids, eager), strict=False):
            if layer in self.indexed:
                with torch.no_grad():
                    mixing = (layer.hc_attn_fn, layer.hc_attn_base, layer.hc_attn_scale)
                    x, _, _ = hyper_connections.open_streams(streams.detach(), *mixing, **layer.mixing)
                    inputs.append(layer.attn_norm(x))
        for router in self.routers:
            router.load.zero_()
        return inputs

    def step(self, ids: Tensor) -> Step:
        """Positions of whole windows, with what is known about them."""
        step = self.model._step(ids, None)
        step._known = self.known
        return step

    def keep(self, count: int | None) -> None:
        """Let a query attend to `count` compressed entries that the indexers choose, or to all; eagerly."""
        every = max(self.context // self.model.config.csa_ratio, 1)
        for layer in self.indexed:
            layer.attn.indexer.topk = every if count is None else count

    def _through(self, ids: Tensor, eager: bool = False) -> Iterator[Tensor]:
        """The streams (B, T, n, H) before each layer, and after the last."""
        model, step = self.model, self.step(ids)
        streams = model.embed(ids)[:, :, None].expand(-1, -1, model.config.hc_mult, -1).contiguous()
        yield streams
        for layer in model.layers:
            streams = (layer.forward if eager else layer)(streams, step)
            yield streams

    @torch.no_grad()
    def balance(self, factor: float) -> None:
        """Moves each router's bias towards experts that got less than their share; DeepSeek-V3's way."""
        worst = self.imbalance.zero_()
        for router in self.routers:
            mean = router.load.mean()
            torch.maximum(worst, router.load.max() / mean, out=worst)
            if router.bias is not None:
                router.bias.add_((mean - router.load).sign(), alpha=BALANCE_RATE * factor)
            router.load.zero_()

    def _head_loss(self, streams: Tensor, targets: Tensor) -> Tensor:
        logits = self.model._logits(streams, False)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _freeze_indexers(self) -> None:
        """While every entry is kept, nothing would move them; see indexers.py."""
        for name, parameter in self.model.named_parameters():
            if ".indexer." in name:
                parameter.requires_grad_(False)

    def _round_activations(self, kernels: bool) -> None:
        if kernels:
            from triton_ops import fake_quantize as kernel
        on = self.quantizing

        def rounded(x: Tensor) -> Tensor:
            return kernel(x, on) if kernels else torch.where(on != 0, fake_quantize(x), x)

        for module in self.model.modules():
            if isinstance(module, Weight) and module.nvfp4:
                module.activation_transform = rounded

    @torch.no_grad()
    def _positions(self) -> dict:
        """Masks and rotations of positions 0 .. T - 1, the same in every batch."""
        ids = torch.zeros(1, self.context, dtype=torch.int64, device=self.device)
        step = self.model._step(ids, None)
        streams = self.model.embed(ids)[:, :, None].expand(-1, -1, self.model.config.hc_mult, -1)
        for layer in self.model.layers:
            streams = layer(streams, step)
        for router in self.routers:
            router.load.zero_()
        return step._known


@torch.no_grad()
def _count(router: Router, inputs: tuple, output: tuple) -> None:
    chosen = output[1].reshape(-1, 1) == torch.arange(router.experts, device=output[1].device)
    router.load.add_(chosen.sum(0))


@torch.no_grad()
def first_weights(model: DeepseekV4, text: bytes) -> None:
    """What differs from the package's random weights.

    Sublayers write little at first; each reads mostly from a stream of its own, which makes the streams
    differ; hash layers send every byte value to fixed experts so that all are used alike on `text`.

    Args:
        model: with random weights.
        text: to count bytes in.
    """
    n = model.config.hc_mult
    model.head.weight.mul_(0.1)
    for i, layer in enumerate(model.layers):
        layer.attn.wo_b.weight.mul_(0.25)
        layer.ffn.experts.w2.weight.mul_(0.25)
        layer.ffn.shared_experts.w2.weight.mul_(0.25)
        for j, base in enumerate((layer.hc_attn_base, layer.hc_ffn_base)):
            main = (2 * i + j) % n
            share = torch.full((n,), 0.4 / max(n - 1, 1), device=base.device)
            share[main] = 0.6
            base[:n] = torch.log(share / (1 - share))
    table = hash_table(text, model.config)
    for layer in model.layers:
        if layer.ffn.gate.tid2eid is not None:
            layer.ffn.gate.tid2eid.copy_(table)
    model.hc_head_base.fill_(-math.log(max(n - 1, 1e-3)))


def hash_table(text: bytes, config: ModelConfig) -> Tensor:
    """Experts of each token id, (V, k) int64: the most frequent id first takes those with the least load."""
    counts = Counter(text)
    load = [0.0] * config.n_routed_experts
    table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
    for token in sorted(range(config.vocab_size), key=lambda t: (-counts[t], t)):
        experts = sorted(range(len(load)), key=lambda e: (load[e], e))[: config.num_experts_per_tok]
        for expert in experts:
            load[expert] += counts[token] + 0.5
        table[token] = torch.tensor(sorted(experts))
    return table


def parameters_saved_in_float32(model: nn.Module) -> set[str]:
    """Small tensors that every published checkpoint keeps in float32."""
    kept = (".attn_sink", "_base", "_scale", ".gate.bias")
    return {name for name in model.state_dict() if name.endswith(kept)}
