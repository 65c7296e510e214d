"""Progress on stderr, for what takes longer than two seconds."""

from __future__ import annotations

import sys
import time

PATIENCE = 2.0
"""Seconds before anything is shown."""

INTERVAL = 10.0
"""Seconds between lines where stderr is no terminal."""


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing for what is quick.

    Args:
        label: what is being done.

    Use as a context manager; call it with the steps done, the steps in all, and what is at hand.
    """

    def __init__(self, label: str):
        self.label, self.start, self.shown, self.bar = label, time.monotonic(), 0.0, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        if now - self.start < PATIENCE:
            return
        if sys.stderr.isatty():
            self._draw(done, total, what)
        elif now - self.shown >= INTERVAL:
            self.shown = now
            print(f"{self.label}: {done} of {total} {what}".rstrip(), file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int, what: str) -> None:
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[what]}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.label, what="")
            self.bar.start()
        self.bar.update(self.task, completed=done, total=total, what=what)
