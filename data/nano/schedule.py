"""How far a run is, and what follows from that: learning rate, text, rounding."""

from __future__ import annotations

import time
from dataclasses import dataclass

WARM_UP = 0.02
DECAY_FROM = 0.4
QUANTIZE_FROM = 0.85
LAST_FACTOR = 0.02
INDEXERS_SHARE, INDEXERS_SECONDS = 0.1, 40.0
"""Of the run's time that the indexers' training takes at its end, and at most."""
MODULES_SHARE = (0.4375, 0.5)
"""Windows from the library's modules rather than its tests, before and after the decay begins; modules are
0.39 of the text, but all that is evaluated."""


def factor(progress: float) -> float:
    """Of the peak learning rate: a short warm-up, level, then a straight line down."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.02)
    if progress < DECAY_FROM:
        return 1.0
    return max(LAST_FACTOR, (1 - progress) / (1 - DECAY_FROM))


def quantizes(progress: float) -> bool:
    """Whether this part of the run rounds weights and activations to NVFP4."""
    return progress >= QUANTIZE_FROM


def phase(progress: float) -> str:
    if quantizes(progress):
        return "nvfp4"
    return "warm-up" if progress < WARM_UP else "level" if progress < DECAY_FROM else "decay"


def indexer_seconds(seconds: float | None) -> float:
    """What the indexers' training may take of a run."""
    return INDEXERS_SECONDS if seconds is None else min(INDEXERS_SECONDS, INDEXERS_SHARE * seconds)


def modules_share(progress: float) -> float:
    return MODULES_SHARE[progress >= DECAY_FROM]


@dataclass
class Clock:
    """Progress from 0 to 1 by time, by steps, or by whichever is ahead.

    Args:
        begin: when the run began, by time.monotonic().
        seconds: from then on, all that the run may take; None for no limit.
        steps: of the whole training; None for no limit.
        done: progress that an earlier run had made.

    Time counts from `start`, after compiling, and stops early enough for what `reserve` is kept for.
    """

    begin: float
    seconds: float | None
    steps: int | None
    done: float = 0.0
    _start: float | None = None
    _end: float = 0.0

    def start(self, reserve: float) -> None:
        """Begin to count.

        Args:
            reserve: seconds needed after the last step.
        Raises:
            ValueError: no time is left.
        """
        now = time.monotonic()
        self._start = now
        if self.seconds is not None:
            self._end = self.begin + self.seconds - reserve
            if self._end <= now:
                gone = now - self.begin
                raise ValueError(
                    f"max-seconds: {self.seconds:.0f} leave no time to train: {gone:.0f} are gone, saving "
                    f"needs {reserve:.0f}"
                )

    def progress(self, step: int) -> float:
        """0 at the start, 1 when the run is over."""
        if self._start is None:
            return self.done
        by_steps = step / self.steps if self.steps else 0.0
        if self.seconds is None:
            return min(1.0, by_steps)
        by_time = (time.monotonic() - self._start) / (self._end - self._start)
        return min(1.0, max(self.done + (1 - self.done) * by_time, by_steps))
