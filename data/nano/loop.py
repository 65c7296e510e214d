"""The training loop: steps, measurements, checkpoints, until the clock is up."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass

import schedule
import torch
from indexers import Indexers, fewest
from optimizer import Optimizer
from output import Destination
from text import HeldOut, Text
from torch import Tensor
from trainee import Trainee, parameters_saved_in_float32

AHEAD = 3
"""Steps the host may run ahead of the GPU."""


@dataclass(frozen=True)
class Every:
    """Seconds between lines of the log, validations, and checkpoints."""

    log: float = 5.0
    validation: float = 20.0
    checkpoint: float = 120.0


class Loop:
    """One training.

    Args:
        trainee, optimizer, text: what is trained, by what, on what.
        held_out: text to judge on.
        clock: says when it is over.
        destination: receives checkpoints.
        identity: facts of the run that a checkpoint must share to be resumed.
        every: seconds between the things that happen now and then.
    """

    def __init__(self, trainee: Trainee, optimizer: Optimizer, text: Text, held_out: HeldOut,
                 clock: schedule.Clock, destination: Destination, identity: dict, every: Every):  # fmt: skip
        self.trainee, self.optimizer, self.text, self.clock = trainee, optimizer, text, clock
        self.held_out, self.destination, self.identity, self.every = held_out, destination, identity, every
        self.step, self.bytes, self.seconds_before, self.rows = 0, 0, 0.0, []
        self.quantizing, self.reserve = False, 20.0
        self._recent = torch.zeros((), device=trainee.device)
        self._recent_steps, self._recent_bytes, self._recent_from = 0, 0, time.monotonic()
        self._events: deque = deque()
        self._last = {"log": time.monotonic(), "validation": time.monotonic(), "checkpoint": time.monotonic()}

    @property
    def seconds(self) -> float:
        """Since the beginning of the training, earlier runs of it included."""
        return self.seconds_before + time.monotonic() - self.clock.begin

    def run(self) -> None:
        """Train until the clock is up; a run that was killed after that is not trained again.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint stays.
        """
        if self.clock.done >= 1.0:
            return
        self.warm_up()
        while (progress := self.clock.progress(self.step)) < 1.0:
            self.switch(schedule.quantizes(progress))
            self.one_step(progress)
            if self._due("validation"):
                self.log(progress, self.validate())
            elif self._due("log"):
                self.log(progress)
            if self._due("checkpoint"):
                self.checkpoint(progress)
        self.log(1.0)

    def warm_up(self, steps: int = 2) -> None:
        """Compile by taking first steps, then measure what the end of the run needs and start the clock."""
        before = time.monotonic()
        progress = self.clock.done
        self.switch(schedule.quantizes(progress))
        for _ in range(steps):
            if self.clock.steps is None or self.step < self.clock.steps:
                self.one_step(progress)
        self._wait()
        print(f"first {steps} steps, compiling included: {time.monotonic() - before:.1f} s", flush=True)
        before = time.monotonic()
        self.log(progress, self.validate())
        # Five validations and two counts of picked entries, eager, and writing 16 MB end a run.
        self.reserve = 15 * (time.monotonic() - before) + 12.0
        if self.clock.seconds is not None:
            self.reserve = min(self.reserve, 0.25 * self.clock.seconds)
        self.clock.start(self.reserve + schedule.indexer_seconds(self.clock.seconds))

    def one_step(self, progress: float) -> None:
        """Forward, backward, update; nothing here waits for the GPU's result."""
        ids, targets = self.text.draw(schedule.modules_share(progress))
        loss = self.trainee.loss_sum(ids, targets) / targets.numel()
        loss.backward()
        factor = schedule.factor(progress)
        self.optimizer.step(factor, self.quantizing)
        self.trainee.balance(factor)
        self.trainee.model.zero_grad(set_to_none=True)
        self._recent += loss.detach()
        self._recent_steps += 1
        self._recent_bytes += targets.numel()
        self.bytes += targets.numel()
        self.step += 1
        self.throttle()

    def freeze(self) -> None:
        """Leave a checkpoint of the finished model, and let it compute with the weights of its file."""
        self.checkpoint(1.0)
        self.optimizer.round_to_bf16(keep=parameters_saved_in_float32(self.trainee.model))
        self._compute_in(False)

    def train_indexers(self, indexers: Indexers) -> None:
        """Train the indexers of the frozen model in what time is kept for that."""
        steps, seconds = self.clock.steps, schedule.indexer_seconds(self.clock.seconds)
        if self.clock.seconds is not None:
            left = self.clock.begin + self.clock.seconds - self.reserve - time.monotonic()
            seconds = max(0.0, min(seconds, left))
        share = schedule.modules_share(1.0)
        indexers.train(
            lambda: self.text.draw(share)[0],
            seconds,
            None if steps is None else max(2, math.ceil(schedule.INDEXERS_SHARE * steps)),
            self.throttle,
            self.every.log,
        )

    def switch(self, quantizing: bool) -> None:
        """Turn NVFP4 rounding on or off in what the model computes with."""
        if quantizing != self.quantizing:
            self._compute_in(quantizing)

    def validate(self, *, eager: bool = False) -> float:
        """Bits per byte on the held-out files, in the precision that is being trained; see `Trainee.nats`."""
        nats = self.trainee.nats(self.held_out.batches, eager=eager)
        self._last["validation"] = time.monotonic()
        return nats / math.log(2) / self.held_out.bytes

    def log(self, progress: float, validation: float | None = None) -> None:
        """One line on the screen and in the log."""
        if not self._recent_steps:
            return
        train = (self._recent / self._recent_steps).item() / math.log(2)
        if not math.isfinite(train):
            raise FloatingPointError(f"the loss is {train} at step {self.step}")
        now = time.monotonic()
        rate = self._recent_bytes / max(now - self._recent_from, 1e-9)
        self.rows.append({
            "step": self.step, "seconds": round(self.seconds, 1), "bytes_seen": self.bytes,
            "train_bits_per_byte": round(train, 4),
            "held_out_bits_per_byte": "" if validation is None else round(validation, 4),
            "learning_rate_factor": round(schedule.factor(progress), 4), "phase": schedule.phase(progress),
            "bytes_per_second": round(rate), "largest_expert_load": round(self.trainee.imbalance.item(), 3),
        })  # fmt: skip
        held_out = "" if validation is None else f"  held out {validation:.4f}"
        print(
            f"{progress:6.1%}  step {self.step}  {self.seconds:5.0f} s  {self.bytes / 1e6:6.1f} MB  "
            f"{rate / 1e6:.2f} MB/s  {schedule.phase(progress):7}  load {self.trainee.imbalance.item():.2f}  "
            f"train {train:.4f}{held_out}",
            flush=True,
        )
        self._recent.zero_()
        self._recent_steps, self._recent_bytes, self._recent_from = 0, 0, now
        self._last["log"] = now

    def checkpoint(self, progress: float) -> None:
        """Save all that `restore` needs."""
        self.destination.save_checkpoint({
            "identity": self.identity, "progress": progress, "step": self.step, "bytes": self.bytes,
            "seconds": self.seconds, "rows": self.rows, "optimizer": self.optimizer.state_dict(),
            "text": self.text.state_dict(), "buffers": self._buffers(),
        })  # fmt: skip
        self._last["checkpoint"] = time.monotonic()

    def restore(self) -> None:
        """Go on where the checkpoint was written.

        Raises:
            ValueError: it belongs to a run on other text or with other sizes.
        """
        state = self.destination.load_checkpoint(self.trainee.device)
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise ValueError(f"resume: the checkpoint's {key} differs from this run's")
        self.step, self.bytes, self.rows = state["step"], state["bytes"], state["rows"]
        self.seconds_before, self.clock.done = state["seconds"], state["progress"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.text.load_state_dict(state["text"])
        for name, buffer in self._buffers().items():
            buffer.copy_(state["buffers"][name])

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are saved, once `freeze` has rounded them."""
        kept = parameters_saved_in_float32(self.trainee.model)
        return {
            name: (t if name in kept or t.dtype == torch.int64 else t.bfloat16()).detach().cpu().clone()
            for name, t in self.trainee.model.state_dict().items()
        }

    def judge(self, counts: list[int]) -> tuple[dict[int | None, float], int | None, float]:
        """Bits per byte of exactly the weights that are saved.

        NVFP4 here is the training's rounding, with a global scale for each row and each matrix.

        Args:
            counts: of entries to try a query with.
        Returns:
            bf16 with each count and with all entries (None), the count to ship (None: all), NVFP4 with it.
        """
        bits = {}
        for count in [*counts, None]:
            self.trainee.keep(count)
            bits[count] = self.validate(eager=True)
        chosen = fewest({c: bits[c] for c in counts}, bits[None])
        self.trainee.keep(chosen)
        self._compute_in(True)
        nvfp4 = self.validate(eager=True)
        self._compute_in(False)
        return bits, chosen, nvfp4

    def _compute_in(self, quantizing: bool) -> None:
        self.quantizing = quantizing
        self.trainee.quantizing.fill_(float(quantizing))
        self.optimizer.write(quantizing)

    def _buffers(self) -> dict[str, Tensor]:
        return {f"{i}.bias": r.bias for i, r in enumerate(self.trainee.routers) if r.bias is not None}

    def _due(self, what: str) -> bool:
        return time.monotonic() - self._last[what] >= getattr(self.every, what)

    def throttle(self) -> None:
        """Wait for the step before the last few."""
        if self.trainee.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > AHEAD:
                self._events.popleft().synchronize()

    def _wait(self) -> None:
        if self.trainee.device.type == "cuda":
            torch.cuda.synchronize()
