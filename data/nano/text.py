"""The training text as one tensor on the device, and batches cut out of it.

Two pools, the library's modules and its tests, each one run of bytes in which every file follows a `BEGIN`
byte. A pool is read in epochs: a grid of windows laid at a random offset, in random order, so that no byte
comes twice before all have come once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4lab.corpus import BEGIN, LibraryFile, windows

IGNORED = -100


class Pool:
    """One kind of text, read in shuffled epochs.

    Args:
        files: of the pool.
        start: where the pool begins in the tensor that all pools share.
        context: T, tokens in a window.
        seed: of all choices; the n-th epoch is the same in every run.
    """

    def __init__(self, files: list[LibraryFile], start: int, context: int, seed: int):
        self.context, self.seed, self.first = context, seed, start
        files = list(files)
        random.Random(seed).shuffle(files)
        self.data = b"".join(bytes([BEGIN]) + f.data for f in files)
        sizes = [1 + len(f.data) for f in files]
        begins = [start]
        for size in sizes[:-1]:
            begins.append(begins[-1] + size)
        last = start + len(self.data) - context - 1
        self.file_starts = [b for b in begins if b <= last]
        if not self.file_starts:
            raise ValueError(f"library: {len(self.data)} bytes of text are less than a window of {context}")
        self.taken, self._epoch, self._starts = 0, -1, []

    @property
    def windows(self) -> int:
        """Windows in an epoch, the same in each."""
        return max(1, (len(self.data) - self.context) // self.context - 1)

    def take(self) -> int:
        """The place of the next window."""
        epoch, index = divmod(self.taken, self.windows)
        if epoch != self._epoch:
            draw = random.Random(f"{self.seed} {epoch}")
            room = len(self.data) - self.context - 1 - (self.windows - 1) * self.context
            offset = draw.randint(0, max(0, min(self.context, room)))
            self._starts = [self.first + offset + i * self.context for i in range(self.windows)]
            draw.shuffle(self._starts)
            self._epoch = epoch
        self.taken += 1
        return self._starts[index]


class Text:
    """Batches of windows from the library's modules and its tests.

    Args:
        files: to train on.
        batch: B, windows in a batch.
        context: T.
        seed: of all choices.
        device: of the text.

    One window in sixteen begins where a file begins, since that is where a reader of files begins.
    """

    def __init__(self, files: Iterable[LibraryFile], batch: int, context: int, seed: int, device):
        files = list(files)
        self.batch, self.context, self.device, self.drawn = batch, context, device, 0
        self.modules = Pool([f for f in files if not f.is_test], 0, context, seed)
        tests = [f for f in files if f.is_test]
        self.tests = Pool(tests, len(self.modules.data), context, seed + 1) if tests else None
        data = self.modules.data + (self.tests.data if tests else b"")
        self.bytes = len(data)
        self.data = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        self.seed = seed
        self._within = torch.arange(context + 1, device=device)

    def draw(self, modules_share: float) -> tuple[Tensor, Tensor]:
        """The next batch: ids (B, T) and the bytes that follow them (B, T), both int64.

        Args:
            modules_share: of windows from the library's modules; the others come from its tests.
        """
        draw = random.Random(f"{self.seed} {self.drawn} batch")
        self.drawn += 1
        modules = self.batch if self.tests is None else round(self.batch * modules_share)
        starts = [self.modules.take() for _ in range(modules)]
        starts += [self.tests.take() for _ in range(self.batch - modules)]
        for i in range(0, self.batch, 16):
            pool = self.modules if i < modules else self.tests
            starts[i] = draw.choice(pool.file_starts)
        at = torch.tensor(starts)
        if self.device.type == "cuda":
            at = at.pin_memory().to(self.device, non_blocking=True)
        rows = self.data[at[:, None] + self._within].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def state_dict(self) -> dict:
        return {
            "drawn": self.drawn,
            "modules": self.modules.taken,
            "tests": self.tests.taken if self.tests else 0,
        }

    def load_state_dict(self, state: dict) -> None:
        self.drawn, self.modules.taken = state["drawn"], state["modules"]
        if self.tests:
            self.tests.taken = state["tests"]


@dataclass(frozen=True)
class HeldOut:
    """Text to judge a model on.

    Args:
        batches: pairs of ids (B, T) and targets (B, T), `IGNORED` where a byte is context or padding.
        bytes: judged in all.
    """

    batches: list[tuple[Tensor, Tensor]]
    bytes: int

    @classmethod
    def of(cls, files: list[LibraryFile], batch: int, context: int, device) -> HeldOut:
        """All windows of the files, overlapping by half, in batches of full size."""
        cut = list(windows(files, context))
        count = math.ceil(len(cut) / batch) * batch
        ids = torch.full((count, context), BEGIN, dtype=torch.int64)
        targets = torch.full((count, context), IGNORED, dtype=torch.int64)
        for i, window in enumerate(cut):
            row = torch.frombuffer(bytearray(window.ids), dtype=torch.uint8).long()
            ids[i, : len(row) - 1] = row[:-1]
            targets[i, window.first - 1 : len(row) - 1] = row[window.first :]
        pairs = zip(ids.split(batch), targets.split(batch), strict=True)
        return cls([(i.to(device), t.to(device)) for i, t in pairs], sum(len(f.data) for f in files))
