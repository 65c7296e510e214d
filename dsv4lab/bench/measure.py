"""Measure operations: check the result first, then time it beside a baseline, and write down where and when.

On a GPU a CUDA graph runs the operation on sets of inputs in turn, which together exceed the L2 cache (unless
they are so small that MAX_SETS do not), so that each finds its inputs in memory. On a CPU it is called again
and again. The operation and its baseline take turns, so that what the machine does meanwhile hits both.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..roofline import floor_seconds
from . import rivals
from .cases import Case, tensors
from .checks import WrongResult

REPEATS = 25
MAX_SETS = 64
"""Sets of inputs at most."""
MIN_CALLS, ENOUGH = 32, 5e-3
"""Calls in a CUDA graph at least, whose own launch would show otherwise; unless fewer take ENOUGH seconds."""

Call = Callable[[], object]
Times = tuple[float, float, float]
"""p20, p50 and p80 of a call in seconds."""


@dataclass(frozen=True)
class Measurement:
    """A case as it was measured, or why it was not.

    Args:
        case: which.
        backend: what ran it.
        device: the device's name.
        seconds: of a call.
        rivals: the same of each rival, the baseline first; None for one that failed or was wrong.
        bytes, flops: that the operation needs.
        rotated: bytes of all sets of inputs and results that took turns; 0 where there was one.
        refused: why the case was not measured, empty otherwise.
    """

    case: Case
    backend: str
    device: str
    seconds: Times | None = None
    rivals: dict[str, Times | None] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    rotated: int = 0
    refused: str = ""

    def as_dict(self) -> dict:
        """Plain data, times in microseconds; None for what was not measured or is not known."""
        p20, p50, p80 = self.seconds or (None,) * 3
        baseline = rivals.names_of(self.case)[0]
        times = self.rivals.get(baseline)
        return {
            "op": self.case.kind,
            "shape": self.case.size,
            "backend": self.backend,
            "p20_us": micro(p20),
            "p50_us": micro(p50),
            "p80_us": micro(p80),
            **self._rates(p50),
            "baseline": baseline,
            "baseline_us": micro(times and times[1]),
            "speedup": times[1] / p50 if times else None,
            "others": {
                name: {"p50_us": micro(found and found[1]), "speedup": found[1] / p50 if found else None}
                for name, found in self.rivals.items()
                if name != baseline
            },
            "refused": self.refused or None,
        }

    def _rates(self, p50: float | None) -> dict:
        floor = floor_seconds(self.device, self.bytes, self.flops, self.case.fp4) if p50 else None
        return {
            "bytes": self.bytes if p50 else None,
            "flops": self.flops if p50 else None,
            "rotated_bytes": self.rotated if p50 else None,
            "tb_per_s": short(self.bytes / p50 / 1e12) if p50 else None,
            "tflops": short(self.flops / p50 / 1e12) if p50 and self.flops else None,
            "floor_us": micro(floor),
            "share_of_floor": short(floor / p50) if floor else None,
        }

    def rows(self) -> list[dict]:
        """A row for the operation and one for each rival but the baseline, which is in all of them."""
        ours = self.as_dict()
        rows = [ours]
        for name, found in self.rivals.items():
            if name != ours["baseline"] and found:
                times = dict(zip(("p20_us", "p50_us", "p80_us"), map(micro, found), strict=True))
                shown = f"{self.backend} unfused" if name == "unfused" else name
                rows.append({**ours, **self._rates(found[1]), **times, "backend": shown})
        return rows


def micro(seconds: float | None) -> float | None:
    """Microseconds, to a nanosecond."""
    return None if seconds is None else round(seconds * 1e6, 3)


def short(x: float) -> float:
    """To four digits."""
    return float(f"{x:.4g}")


def bench(
    cases: Sequence[Case],
    backend: str | None = None,
    device: torch.device | str = "cpu",
    repeats: int = REPEATS,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    peers: Sequence[str] = (),
    keep: Callable[[Measurement], object] = lambda m: None,
) -> list[Measurement]:
    """Measure cases one after the other.

    Args:
        cases: see `shapes.select`.
        backend: None takes each operation's default on the device.
        device: where.
        repeats: how many times are taken of each, from 1 on.
        progress: called with cases done, cases in all, and the name of the next.
        peers: names in rivals.PEERS, measured where they have the operation, on a GPU.
        keep: called with each measurement as soon as it is there.

    Returns:
        One measurement for each case. A wrong result is never timed: its measurement says what is wrong, as
        does that of a case for which the memory is too small.
    """
    device, found = torch.device(device), []
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    for i, case in enumerate(cases):
        progress(i, len(cases), f"{case.kind} {case.size}")
        result = Measurement(case, case.backend(backend, device), device_name(device))
        try:
            with torch.no_grad(), current:
                found.append(measure(result, device, repeats, peers))
        except (WrongResult, MemoryError, torch.OutOfMemoryError) as error:
            found.append(replace(result, refused=" ".join(str(error).split())))
        keep(found[-1])
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what graphs held is of no use to the next case
    return found


def measure(m: Measurement, device: torch.device, repeats: int, peers: Sequence[str] = ()) -> Measurement:
    """Check one case, then fill in what it takes."""
    case, backend = m.case, m.backend
    check_memory(case, device)
    given = case.make(device)
    ready = case.ready(given, backend)
    result = case.run(ready, backend)
    case.check(given, result, backend)
    work_bytes, flops = case.work(given, result)
    sets, prepared = [given], [ready]
    if device.type == "cuda":
        sets += [case.make(device, seed) for seed in range(1, rotation(device, work_bytes))]
        prepared += [case.ready(s, backend) for s in sets[1:]]
    ours, others = [partial(case.run, s, backend) for s in prepared], {}
    both = list(zip(sets, prepared, strict=True))
    for name in rivals.names_of(case, peers if device.type == "cuda" else ()):
        others[name] = rivals.calls(name, case, both, result, work_bytes, backend)
    right = {name: calls for name, calls in others.items() if calls}
    if device.type == "cuda":
        graph = Replay(ours)
        case.check(sets[-1], graph.poisoned(), backend)
        timers = [graph.seconds, *(Replay(calls).seconds for calls in right.values())]
    else:
        timers = [partial(wall_seconds, calls[0]) for calls in (ours, *right.values())]
    ours, *theirs = map(percentiles, interleaved(timers, repeats))
    rotated = work_bytes * len(sets) if len(sets) > 1 else 0
    times = dict(zip(right, theirs, strict=True))
    rivalry = {name: times.get(name) for name in others}
    return replace(m, seconds=ours, rivals=rivalry, bytes=work_bytes, flops=flops, rotated=rotated)


def interleaved(timers: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """The seconds that each timer gives in turn with the others, after two rounds that do not count."""
    rounds = [[timer() for timer in timers] for _ in range(repeats + 2)][2:]
    return [list(times) for times in zip(*rounds, strict=True)]


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, linear between neighbours."""
    shares = torch.tensor((0.2, 0.5, 0.8), dtype=torch.float64)
    return tuple(torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist())


def wall_seconds(call: Call) -> float:
    """How long a call takes by the clock on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Replay:
    """A CUDA graph of calls in turn.

    Args:
        calls: at least one, each on data of its own; they go round until there are MIN_CALLS.
    """

    def __init__(self, calls: Sequence[Call]):
        self._synchronized(calls[0])  # compiles and allocates what is not to be captured
        enough = min(MIN_CALLS, ENOUGH / self._synchronized(calls[0]))
        rounds = math.ceil(enough / len(calls))
        self.count = len(calls) * rounds
        self.graph, self.results = torch.cuda.CUDAGraph(), [None] * len(calls)
        with torch.cuda.graph(self.graph):
            for i in range(self.count):  # results of a round stay, so that they take turns as well
                self.results[i % len(calls)] = calls[i % len(calls)]()

    @staticmethod
    def _synchronized(call: Call) -> float:
        torch.cuda.synchronize()
        return wall_seconds(lambda: (call(), torch.cuda.synchronize()))

    def poisoned(self):
        """What a replay writes last, over bytes of 0xFF: nothing that an earlier run has left."""
        for tensor in tensors(self.results):
            tensor.view(-1).view(torch.uint8).fill_(255)
        self.graph.replay()
        return self.results[-1]

    def seconds(self) -> float:
        """The time of one call in a replay; an earlier replay keeps the GPU busy until all is queued."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.count


def rotation(device: torch.device, work_bytes: int) -> int:
    """How many sets together are three times the L2 cache, but no more than MAX_SETS."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, math.ceil(3 * l2 / work_bytes))


def check_memory(case: Case, device: torch.device) -> None:
    """Refuse on a CPU what the system would kill us for; CUDA raises its own error.

    Raises:
        MemoryError: the case needs more than is free.
    """
    table = Path("/proc/meminfo")
    if device.type == "cuda" or not table.exists():
        return
    free = next(int(line.split()[1]) for line in table.read_text().splitlines() if "MemAvailable" in line)
    if case.memory > free * 1024:
        raise MemoryError(f"needs about {case.memory / 2**30:.0f} GiB, {free / 2**20:.0f} GiB are free")


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"
