"""What a launch did: counts, and events in the model's time for a timeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dsv4lab.emulator.launch import Launch


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time.

    Attributes:
        kind: "tma", "mma", "wait", ...
        cta: index of the CTA in its wave.
        warp: index of the warp in its CTA.
        start, end: cycles of the model's time, which says what can overlap, not how long a GPU takes.
        line: PTX line of the instruction.
        text: one line for people.
        detail: numbers that belong to its kind.
    """

    kind: str
    cta: int
    warp: int
    start: int
    end: int
    line: int
    text: str
    detail: dict[str, Any] = field(default_factory=dict)


class Trace:
    """Events of one launch, in the order in which they were noticed."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.events: list[Event] = []

    def add(
        self, kind: str, cta: int, warp: int, start: int, end: int, line: int, text: str, **detail: Any
    ) -> None:
        """Record an event; see Event."""
        self.events.append(Event(kind, int(cta), int(warp), int(start), int(end), line, text, detail))

    def __iter__(self):
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def of(self, *kinds: str) -> list[Event]:
        """Events of some kinds, by their start."""
        return sorted((e for e in self.events if e.kind in kinds), key=lambda e: (e.start, e.end))


class Counters(Counter):
    """Counts of one launch: "instructions" (of warps), "instructions.add", "tma.load_bytes", "mma.flops"."""
