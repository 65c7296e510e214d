"""Compile what cases will launch, several kernels at a time, before anything is measured.

Each kernel takes seconds in one thread. So the cases are run once with launches only noted, and processes of
their own compile what was noted and leave it on disk, from where measuring loads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context

import torch

from . import rivals
from .cases import Case

PEER_JOBS = 8
"""Processes in which peers compile; each holds memory of the GPU."""
FEW = 4
"""Kernels that are compiled where they are called."""


def compile_first(
    cases: Sequence[Case],
    backend: str | None,
    device: torch.device,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    peers: Sequence[str] = (),
    jobs: int | None = None,
) -> int:
    """Compile for a GPU; nothing to do elsewhere.

    Args:
        cases, backend, device, peers: as of `measure.bench`; peers compile, and keep, what they first run.
        progress: called with kernels done, kernels in all, and the name of one.
        jobs: processes; None takes as many as there are cores, but at most 16.

    Returns:
        The number of kernels.
    """
    if device.type != "cuda":
        return 0
    kernels = needed(cases, backend, device, progress)
    compile_all(kernels, device, progress, jobs)
    _compile_peers(cases, peers, device, progress)
    return len(kernels)


def _compile_peers(cases: Sequence[Case], peers: Sequence[str], device: torch.device, progress) -> None:
    wanted = [(name, case) for case in cases for name in peers if name in rivals.names_of(case, peers)]
    if len(wanted) < FEW:
        return
    jobs = min(PEER_JOBS, os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_run_peer, name, case, str(device)) for name, case in wanted]
        for done, future in enumerate(as_completed(waiting)):
            progress(done, len(wanted), future.result())


@torch.no_grad()
def _run_peer(name: str, case: Case, device: str) -> str:
    given = case.make(device)
    with suppress(Exception):  # measuring finds out
        rivals.prepare(name, case, given, given, 0, "reference")()
        torch.cuda.synchronize()
    return name


def compile_all(
    kernels: dict,
    device: torch.device,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    jobs: int | None = None,
) -> None:
    """Compile what was `noted` to disk, if it is for a GPU and not there yet."""
    from dsv4lab.kernels.launch import on_disk

    if device.type != "cuda":
        return
    kernels = {key: kinds for key, kinds in kernels.items() if not on_disk(*key, device)}
    jobs = min(jobs or min(os.cpu_count() or 1, 16), len(kernels))
    if jobs < FEW:
        return  # a process of its own takes longer to begin
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_compile, *key, kinds, str(device)) for key, kinds in kernels.items()]
        for done, future in enumerate(as_completed(waiting)):
            progress(done, len(kernels), future.result())


def needed(
    cases: Sequence[Case],
    backend: str | None,
    device: torch.device,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict:
    """The kernels of all cases that kernels run."""
    kernels = {}
    for i, case in enumerate(cases):
        name = case.backend(backend, device)
        if name in ("hopper", "blackwell"):
            progress(i, len(cases), f"looking at {case.kind} {case.size}")
            kernels |= _of_case(case, name, device)
    return kernels


def noted(call: Callable[[], object]) -> dict:
    """What a call would launch, as `launch.noting` has it."""
    from dsv4lab.kernels.launch import noting

    with noting() as kernels, torch.no_grad():
        call()
    return kernels


def _of_case(case: Case, backend: str, device: torch.device) -> dict:
    def run() -> None:
        given = case.make(device)
        ready = case.ready(given, backend)
        case.run(ready, backend)
        if "unfused" in rivals.names_of(case):
            rivals.prepare("unfused", case, given, ready, 0, backend)()

    try:
        return noted(run)
    except torch.OutOfMemoryError:  # which measuring will say, too
        return {}


def _compile(make: Callable, config: tuple, kinds: tuple[str, ...], device: str) -> str:
    from dsv4lab.kernels.launch import compile_to_disk

    compile_to_disk(make, config, kinds, torch.device(device))
    return make.__module__.rpartition(".")[2]
