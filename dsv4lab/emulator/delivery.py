"""Copies into shared memory: which CTAs get the data, which mbarriers are told, and when that happens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.copy_engine import CopyEngines, Issue
from dsv4lab.emulator.errors import AddressError

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access

Place = tuple[int, int]


def receivers(
    issue: Issue, target: Place, signal: Place, mask: int | None = None, pair: bool = False
) -> list[Place]:
    """(CTA that gets the data, CTA whose mbarrier is told) of each destination of a copy.

    Args:
        target, signal: (CTA, offset) of the operands dstMem and mbar.
        mask: ranks in the cluster, a bit each, that get the data at the same offset; None without multicast.
        pair: cta_group::2: the mbarrier may lie in either CTA of the pair. With multicast the mbarriers in
            the CTAs of all pairs are told whose rank is even or odd as that of `signal` is.
    Raises:
        AddressError: for a mask beyond the cluster, or an mbarrier in a CTA where it must not be.
    """
    machine = issue.machine
    first = issue.cta - issue.cta % machine.cluster_size
    data, bar = target[0] - first, signal[0] - first
    if data != bar and not (pair and data // 2 == bar // 2):
        where = "the same pair of CTAs" if pair else "the same CTA"
        raise AddressError(
            f"operand mbar lies in the CTA of rank {bar} and dstMem in that of rank {data}: "
            f"they must be in {where}"
        )
    if mask is None:
        return [(target[0], signal[0])]
    if mask >> machine.cluster_size:
        raise AddressError(
            f"operand ctaMask {mask:#x} names CTAs beyond the {machine.cluster_size} of the cluster"
        )
    ranks = [rank for rank in range(machine.cluster_size) if mask >> rank & 1]
    return [(first + rank, first + (rank - rank % 2 + bar % 2 if pair else rank)) for rank in ranks]


def deliver(
    issue: Issue,
    where: list[Place],
    bar: int,
    nbytes: int,
    end: int,
    fetch: Callable[[], Any],
    put: Callable[[int, Any, Access | None], None],
) -> None:
    """Let data come to each destination some time later, at each by itself.

    Args:
        where: of `receivers`.
        bar: offset of the mbarriers.
        nbytes: transaction bytes that each is told of.
        end: model time at which the data is there.
        fetch: reads the source; called once.
        put: writes (CTA, what was fetched, token for the race checker).
    """
    machine, serial = issue.machine, issue.machine.state(CopyEngines).serial()
    fetched: list[Any] = []

    def arrive(cta: int, told: int, access: Access | None) -> None:
        if not fetched:
            fetched.append(fetch())
        put(cta, fetched[0], access)
        machine.state(Barriers).complete_tx(told, bar, nbytes, access, end)

    for cta, told in where:
        access = machine.access_async(issue.warp, ("mbarrier", told, bar))
        issue.later(("tma", serial, cta), partial(arrive, cta, told, access))
