"""mbarrier objects: phases worked by hand, random histories against a slow model, every misuse."""

from __future__ import annotations

import types
from collections import Counter

import numpy as np
import pytest

from dsv4lab.emulator.barriers import BarrierError, Barriers
from dsv4lab.emulator.mbarrier_state import MAX_COUNT, pending_count

AT = (0, 1024)


class Shared:
    """Shared memory that checks nothing."""

    some_ended = False

    def __init__(self, ctas: int) -> None:
        self.bytes = np.zeros((ctas, 4096), np.uint8)
        self.reads: list[tuple[int, int, object]] = []

    def write_range(self, cta, start, data, by):
        self.bytes[cta, start : start + len(data)] = data

    def read_range(self, cta, start, nbytes, by):
        self.reads.append((cta, start, by))
        return self.bytes[cta, start : start + nbytes]


class Order:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def __getattr__(self, name):
        return lambda *arguments: self.told.append((name, *arguments))


def machine(ctas: int = 4, cluster: int = 2, order: Order | None = None) -> types.SimpleNamespace:
    woken: list = []
    return types.SimpleNamespace(
        shared=Shared(ctas), cluster_size=cluster, order=order, at_end=[], woken=woken, wake=woken.append,
        instruction_now=lambda: None, blamed=lambda error, *_: error,
        checks=frozenset({"barriers"}), time=np.zeros(8, np.int64), access=lambda warp: ("access", warp),
        cta_index=np.array([[c, 0, 0] for c in range(ctas)]), counters=Counter(),
    )  # fmt: skip


@pytest.fixture
def barriers() -> Barriers:
    return Barriers(machine())


# Worked histories ------------------------------------------------------------------------------------------


def test_a_phase_is_complete_when_all_have_arrived(barriers):
    barriers.init(*AT, 3)
    # Phase 0 is not complete; the phase before it, of parity 1, counts as complete.
    assert not barriers.completed(*AT, 0)
    assert barriers.completed(*AT, 1)
    tokens = [barriers.arrive(*AT) for _ in range(3)]
    assert [pending_count(t) for t in tokens] == [3, 2, 1]
    assert barriers.completed(*AT, 0)
    assert not barriers.completed(*AT, 1)
    assert barriers.phase(*AT) == 1
    assert barriers.machine.woken == [("mbarrier", *AT)]
    assert all(barriers.completed_token(*AT, t) for t in tokens)
    assert not barriers.completed_token(*AT, barriers.arrive(*AT))


def test_a_phase_waits_for_its_bytes(barriers):
    barriers.init(*AT, 1)
    barriers.expect_tx(*AT, 4096)
    barriers.arrive(*AT)
    assert not barriers.completed(*AT, 0)
    barriers.complete_tx(*AT, 4000)
    assert not barriers.completed(*AT, 0)
    barriers.complete_tx(*AT, 96)
    assert barriers.completed(*AT, 0)


def test_bytes_may_come_before_they_are_expected(barriers):
    barriers.init(*AT, 1)
    barriers.complete_tx(*AT, 128)
    assert "-128 transaction bytes" in barriers.describe(*AT)
    barriers.expect_tx(*AT, 128)
    assert not barriers.completed(*AT, 0)
    barriers.arrive(*AT)
    assert barriers.completed(*AT, 0)


def test_more_bytes_than_expected_complete_nothing(barriers):
    barriers.init(*AT, 1)
    barriers.expect_tx(*AT, 100)
    barriers.complete_tx(*AT, 120)
    barriers.arrive(*AT)
    assert not barriers.completed(*AT, 0)
    assert "0 of 1 arrivals and -20 transaction bytes pending" in barriers.describe(*AT)


def test_dropped_arrivals_are_not_expected_again(barriers):
    barriers.init(*AT, 3)
    barriers.arrive(*AT, 2, drop=True)
    assert not barriers.completed(*AT, 0)  # this phase still expects three
    barriers.arrive(*AT)
    assert barriers.completed(*AT, 0)
    barriers.arrive(*AT)
    assert barriers.completed(*AT, 1)  # the next one only one


def test_more_pending_arrivals_are_waited_for_in_this_phase_only(barriers):
    barriers.init(*AT, 1)
    barriers.add_pending(*AT)
    barriers.arrive(*AT)
    assert not barriers.completed(*AT, 0)
    barriers.arrive(*AT)
    assert barriers.completed(*AT, 0)
    barriers.arrive(*AT)
    assert barriers.completed(*AT, 1)


def test_the_time_of_completion_is_that_of_the_latest_arrival(barriers):
    barriers.init(*AT, 2)
    barriers.expect_tx(*AT, 16)
    barriers.arrive(*AT, time=50)
    barriers.complete_tx(*AT, 16, time=70)
    barriers.arrive(*AT, time=60)
    assert barriers.acquire(*AT, 3) == 70
    assert barriers.machine.time.tolist() == [0, 0, 0, 70, 0, 0, 0, 0]
    barriers.arrive(*AT, 2, time=65)
    assert barriers.acquire(*AT, 3) == 65  # the next phase starts anew
    assert barriers.machine.time[3] == 70


def test_barriers_are_told_apart_by_cta_and_address(barriers):
    for cta, offset in ((0, 1024), (0, 1032), (1, 1024), (2, 1024)):
        barriers.init(cta, offset, 1)
    barriers.arrive(1, 1024)
    assert [barriers.phase(c, o) for c, o in ((0, 1024), (0, 1032), (1, 1024), (2, 1024))] == [0, 0, 1, 0]


def test_another_key_is_woken_once(barriers):
    barriers.init(*AT, 1)
    barriers.also_wake(*AT, "row")
    barriers.arrive(*AT)
    barriers.arrive(*AT)
    assert barriers.machine.woken == [("mbarrier", *AT), "row", ("mbarrier", *AT)]


def test_the_bytes_in_memory_follow_the_state(barriers):
    memory = barriers.machine.shared.bytes
    barriers.init(*AT, 2)
    seen = [memory[0, 1024:1032].tobytes()]
    for change in (
        lambda: barriers.expect_tx(*AT, 5),
        lambda: barriers.arrive(*AT),
        lambda: barriers.complete_tx(*AT, 5),
        lambda: barriers.arrive(*AT, drop=True),
    ):
        change()
        seen.append(memory[0, 1024:1032].tobytes())
    assert len(set(seen)) == 5
    # Valid bit, parity 1, no bytes, one arrival expected and pending.
    assert int.from_bytes(seen[-1], "little") == 0xC000_0000_0010_0001
    barriers.inval(*AT)
    assert not memory[0, 1024:1032].any()
    barriers.init(*AT, 7)


# Random histories ------------------------------------------------------------------------------------------


def slow_phase(expected: int, history: list[tuple[str, int]]) -> int:
    """The phase that a history leads to, by counting from the start each time."""
    phase, arrived, tx = 0, 0, 0
    due, dropped = expected, 0
    for what, count in history:
        if what in ("arrive", "drop"):
            arrived += count
            dropped += count if what == "drop" else 0
        else:
            tx += count
        if arrived == due and tx == 0:
            phase, arrived = phase + 1, 0
            due, dropped = due - dropped, 0
    return phase


@pytest.mark.parametrize("seed", range(20))
def test_a_random_history_against_the_slow_model(seed):
    rng = np.random.default_rng(seed)
    barriers = Barriers(machine())
    expected = int(rng.integers(3, 9))
    barriers.init(*AT, expected)
    history: list[tuple[str, int]] = []
    due = expected
    for phase_before in range(12):
        drop = int(rng.integers(0, 2)) if due > 2 else 0
        sizes = rng.integers(1, 500, rng.integers(0, 5)).tolist()
        todo = [("arrive", 1)] * (due - drop) + [("drop", 1)] * drop
        todo += [("tx", n) for n in sizes] + [("tx", -n) for n in sizes]
        # An arrival last keeps the phase open until all bytes are accounted for, in whatever order they come.
        last = todo.pop(0)
        for what, count in [*(todo[i] for i in rng.permutation(len(todo))), last]:
            token = None
            if what == "tx":
                (barriers.expect_tx if count > 0 else barriers.complete_tx)(*AT, abs(count))
            else:
                token = barriers.arrive(*AT, count, drop=what == "drop")
            history.append((what, count))
            phase = slow_phase(expected, history)
            assert barriers.phase(*AT) == phase
            assert [barriers.completed(*AT, p) for p in (0, 1)] == [phase % 2 == 1, phase % 2 == 0]
            if token is not None:
                assert barriers.completed_token(*AT, token) == (phase > phase_before)
        due -= drop
        assert barriers.phase(*AT) == phase_before + 1
    assert len(barriers.machine.woken) == 12


# Order of accesses -----------------------------------------------------------------------------------------


def test_arrivals_publish_and_waits_take_up():
    order = Order()
    barriers = Barriers(machine(order=order))
    key = ("mbarrier", *AT)
    barriers.init(*AT, 3, warp=0)
    barriers.expect_tx(*AT, 16)
    barriers.arrive(*AT, warp=2)
    barriers.arrive(*AT, warp=3, release=False)
    barriers.arrive(*AT, access="commit")
    barriers.complete_tx(*AT, 16, "copy")
    barriers.acquire(*AT, 5)
    barriers.acquire(*AT, 6, acquire=False)
    assert order.told == [
        ("release", 2, key), ("release_access", "commit", key), ("release_access", "copy", key),
        ("complete", key), ("acquire", 5, key),
    ]  # fmt: skip


def test_the_first_use_by_a_warp_is_checked_against_the_initialisation():
    barriers = Barriers(machine(cluster=1, order=Order()))
    reads = barriers.machine.shared.reads
    barriers.init(*AT, 9, warp=0)
    barriers.arrive(*AT, warp=2)
    barriers.arrive(*AT, warp=2)
    barriers.completed(*AT, 0, warp=3)
    barriers.complete_tx(*AT, 8)
    assert reads == [(*AT, ("access", 2)), (*AT, ("access", 3))]
    barriers.orders_unseen()
    barriers.arrive(*AT, warp=4)
    assert len(reads) == 2


# Misuse ----------------------------------------------------------------------------------------------------


def fails(*parts: str):
    return pytest.raises(BarrierError, match=".*".join(parts))


def test_init_refuses(barriers):
    with fails("0x404 of CTA", "not aligned to 8 bytes"):
        barriers.init(0, 1028, 1)
    for count in (0, MAX_COUNT + 1, 2**31):
        with fails("0x400 of CTA", f"count of {count}, which must be 1 to 1048575"):
            barriers.init(*AT, count)
    barriers.init(*AT, MAX_COUNT)
    barriers.arrive(*AT)
    with fails("phase 0, parity 0, 1048574 of 1048575", "initialised again in the middle of a phase"):
        barriers.init(*AT, 1)


def test_init_may_be_repeated_between_phases_and_over_other_data(barriers):
    barriers.init(*AT, 2)
    barriers.init(*AT, 3)
    barriers.arrive(*AT)
    barriers.machine.shared.bytes[0, 1024:1032] = 7
    barriers.init(*AT, 3)
    assert barriers.phase(*AT) == 0


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda b: b.arrive(3, 1024), "arrived at"),
        (lambda b: b.expect_tx(3, 1024, 8), "told to expect bytes"),
        (lambda b: b.complete_tx(3, 1024, 8), "told of completed bytes"),
        (lambda b: b.completed(3, 1024, 0), "waited for"),
        (lambda b: b.completed_token(3, 1024, 0), "waited for"),
        (lambda b: b.inval(3, 1024), "invalidated"),
        (lambda b: b.add_pending(3, 1024), "given more pending arrivals"),
    ],
)
def test_a_barrier_must_be_there_and_whole(barriers, use, name):
    # CTA 3 is the second of its cluster: its address as the cluster sees it has rank 1.
    with fails(r"0x1000400 of CTA \(3, 0, 0\)", name, "was not initialised"):
        use(barriers)
    barriers.init(3, 1024, 2)
    barriers.machine.shared.bytes[3, 1026] ^= 1
    with fails("0x1000400", name, "was overwritten with 0200210000000080"):
        use(barriers)


def test_too_many_arrivals(barriers):
    barriers.init(*AT, 2)
    with fails("2 of 2 arrivals", "3 more times", "more than the 2"):
        barriers.arrive(*AT, 3)
    barriers.expect_tx(*AT, 16)
    barriers.arrive(*AT, 2)
    with fails("0 of 2 arrivals and 16 transaction bytes", "arrived at 1 more times"):
        barriers.arrive(*AT)
    for count in (0, MAX_COUNT + 1):
        with fails(f"count of {count}, which must be 1 to 1048575"):
            barriers.arrive(*AT, count)


def test_everybody_has_dropped_out(barriers):
    barriers.init(*AT, 1)
    barriers.arrive(*AT, drop=True)
    assert barriers.completed(*AT, 0)
    with fails("phase 1", "0 of 0 arrivals", "more than the 0"):
        barriers.arrive(*AT)


def test_the_transaction_count_has_a_range(barriers):
    barriers.init(*AT, 1)
    barriers.expect_tx(*AT, MAX_COUNT)
    with fails("1048575 transaction bytes", r"\+1 bytes take its transaction count to 1048576"):
        barriers.expect_tx(*AT, 1)
    barriers.complete_tx(*AT, MAX_COUNT)
    barriers.complete_tx(*AT, MAX_COUNT)
    with fails(r": -1 bytes take its transaction count to -1048576, beyond -1048575"):
        barriers.complete_tx(*AT, 1)


def test_no_complete_must_not_complete(barriers):
    barriers.init(*AT, 2)
    barriers.arrive(*AT, complete=False)
    with fails("1 of 2 arrivals", "noComplete completes its phase"):
        barriers.arrive(*AT, complete=False)


def test_waits_name_a_parity_or_a_recent_state(barriers):
    barriers.init(*AT, 1)
    barriers.init(0, 1032, 1)
    with fails("waited for with parity 2, not 0 or 1"):
        barriers.completed(*AT, 2)
    token = barriers.arrive(*AT)
    with fails("0x408", "with the state of another"):
        barriers.completed_token(0, 1032, token)
    barriers.arrive(*AT)
    with fails("phase 2", "with the state of 2 phases ago"):
        barriers.completed_token(*AT, token)


def test_bytes_outstanding(barriers):
    barriers.init(*AT, 1)
    barriers.expect_tx(*AT, 4096)
    barriers.arrive(*AT)
    barriers.complete_tx(*AT, 4095)
    (at_end,) = barriers.machine.at_end
    with fails("1 transaction bytes pending", "invalidated with transaction bytes outstanding"):
        barriers.inval(*AT)
    with fails("wrong transaction count: the kernel ends", "0 of 1 arrivals and 1 transaction bytes"):
        at_end()
    barriers.machine.checks = frozenset()
    at_end()
    barriers.machine.checks = frozenset({"barriers"})
    barriers.complete_tx(*AT, 1)
    at_end()
