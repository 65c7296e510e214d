"""Trains the lightning indexers to predict where a finished model attends.

The training before this attends to every compressed entry, so nothing moves the indexers. Here the model
stays as it is, and an indexer's scores, as a softmax over the entries that a query may see, learn how the
layer's attention is shared out among them.

Source: the first stage of the indexer's training in DeepSeek-V3.2's report.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from text import IGNORED
from torch import Tensor
from trainee import Trainee

from dsv4lab.model.indexer import Indexer
from dsv4lab.model.step import Step

RATE = 5e-3
WARM_UP, DECAY_FROM = 0.05, 0.4
COUNTS = (64, 128, 256)
"""Entries that a query may be left with, tried in this order."""
MOST_LOSS = 0.002
"""Of the bits per byte with all entries: the first count that costs less is shipped."""


def divergence(shares: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """KL(shares || softmax of scores) over visible entries, the mean over the queries that see any: () nats.

    Args:
        shares: (B, T, n) float32, sums to one where an entry is visible, else zero.
        scores: (B, T, n) float32.
        visible: (T, n) bool.
    """
    # Finite, so that a query without entries gives zero times something and not NaN.
    log_p = scores.masked_fill(~visible, -1e30).log_softmax(-1)
    total = (shares * (shares.clamp(min=1e-30).log() - log_p)).sum()
    return total / (shares.shape[0] * visible.any(-1).sum())


def scores(indexer: Indexer, x: Tensor, qr: Tensor, step: Step) -> Tensor:
    """The indexer's scores (B, T, n) of all entries, computed in its own dtype; see `Indexer.scores`."""
    dtype = indexer.wq_b.weight.dtype
    x, qr = x.to(dtype), qr.to(dtype)
    return indexer.scores(x, qr, indexer.compressor(x, step), step)


def factor(progress: float) -> float:
    """Of the peak learning rate."""
    return min(1.0, progress / WARM_UP + 0.02, max(0.0, 1 - progress) / (1 - DECAY_FROM))


class Indexers:
    """The training of all indexers of a model, each by itself, from float32 masters.

    Args:
        trainee: has finished its own training and computes in bf16.
    """

    def __init__(self, trainee: Trainee):
        self.trainee, self.layers = trainee, trainee.indexed
        self.masters = [copy.deepcopy(a.attn.indexer).float().requires_grad_(True) for a in self.layers]
        self.adam = None
        if self.masters:
            parameters = [p for m in self.masters for p in m.parameters()]
            self.adam = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.steps, self.curve, self._recent = 0, [], []

    def train(
        self, draw: Callable[[], Tensor], seconds: float, steps: int | None, throttle: Callable[[], None],
        log_every: float = 5.0,
    ) -> None:  # fmt: skip
        """Step until time or steps are up, then write the masters into the model, rounded to bf16.

        Args:
            draw: gives ids (B, T) of the next batch.
            seconds, steps: whichever ends first; None for no limit of steps.
            throttle: called after each step, so that the host does not run ahead of the device.
            log_every: seconds.
        Raises:
            FloatingPointError: the divergence is not finite.
        """
        if not self.layers:
            return
        self.one_step(draw(), factor(0.0))  # compiles, where a resumed run has not yet
        self._log(0.0)
        begin = last = time.monotonic()
        progress = 0.0
        while progress < 1.0:
            self.one_step(draw(), factor(progress))
            throttle()
            now = time.monotonic()
            by_steps = self.steps / steps if steps else 0.0
            progress = min(1.0, max((now - begin) / seconds if seconds > 0 else 1.0, by_steps))
            if progress == 1.0 or now - last >= log_every:
                self._log(progress)
                last = now
        self.write()

    def one_step(self, ids: Tensor, factor: float) -> None:
        """One update of every indexer from a batch of ids (B, T)."""
        step = self.trainee.step(ids)
        inputs = self.trainee.attention_inputs(ids)
        self._recent = []
        for layer, master, x in zip(self.layers, self.masters, inputs, strict=True):
            with torch.no_grad():
                shares, qr = layer.attn.entry_shares(x, step)
            loss = divergence(
                shares, scores(master, x, qr, step), step.visible(master.ratio, shares.shape[-1])
            )
            loss.backward()
            self._recent.append(loss.detach())
        for group in self.adam.param_groups:
            group["lr"] = RATE * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.steps += 1

    @torch.no_grad()
    def write(self) -> None:
        """Copy the masters into the model, rounded to what a bf16 file holds."""
        for layer, master in zip(self.layers, self.masters, strict=True):
            for parameter, value in zip(layer.attn.indexer.parameters(), master.parameters(), strict=True):
                parameter.copy_(value.bfloat16())

    @torch.no_grad()
    def recall(self, batches: list[tuple[Tensor, Tensor]], counts: list[int]) -> dict[str, dict[str, float]]:
        """How much of the attention that the best entries get is got by those the model's indexers pick.

        Args:
            batches: of ids and targets (B, T); queries whose target is `IGNORED` do not count.
            counts: how many entries are picked; queries that see no more than that do not count.
        Returns:
            For each count "indexer", the mean over queries and layers, "chance", what picks at random would
            get, and "best", the share of the attention to all entries that the best ones get.
        """
        sums = torch.zeros(len(counts), 4, dtype=torch.float64, device=self.trainee.device)
        for ids, targets in batches:
            step = self.trainee.step(ids)
            inputs = self.trainee.attention_inputs(ids, eager=True)
            for layer, x in zip(self.layers, inputs, strict=True):
                shares, qr = layer.attn.entry_shares(x, step)
                visible = step.visible(layer.attn.ratio, shares.shape[-1])
                found = scores(layer.attn.indexer, x, qr, step).masked_fill(~visible, -math.inf)
                seen = visible.sum(-1).expand(targets.shape)
                for i, count in enumerate(counts):
                    rows = (targets != IGNORED) & (seen > count)
                    best = shares[rows].topk(count).values.sum(-1)
                    picked = shares[rows].gather(-1, found[rows].topk(count).indices).sum(-1)
                    chance = count / seen[rows] / best
                    sums[i] += torch.stack([(picked / best).sum(), chance.sum(), best.sum(), rows.sum()])
        names = ("indexer", "chance", "best")
        rows = {str(c): (s[:3] / s[3]).tolist() for c, s in zip(counts, sums, strict=True) if s[3]}
        return {c: {n: round(v, 4) for n, v in zip(names, r, strict=True)} for c, r in rows.items()}

    def _log(self, progress: float) -> None:
        values = [value.item() for value in self._recent]
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(f"the indexers' divergence is {values} at their step {self.steps}")
        self.curve.append({"step": self.steps, "kl": [round(value, 4) for value in values]})
        print(f"{progress:6.1%}  indexers  step {self.steps}  divergence "
              + "  ".join(f"{value:.4f}" for value in values), flush=True)  # fmt: skip


def fewest(bits: dict[int, float], every: float) -> int | None:
    """The smallest count of entries whose bits per byte stay near those with every entry, or None."""
    return next((count for count in sorted(bits) if bits[count] < every * (1 + MOST_LOSS)), None)
