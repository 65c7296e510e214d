"""Barriers of CTAs and clusters: in kernels, and named barriers against a slow model."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from dsv4lab.emulator import DeadlockError, UnsupportedInstruction, device
from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.convergence import ConvergenceError
from dsv4lab.emulator.happens_before import RaceError
from dsv4lab.emulator.named_barriers import ALL, NamedBarriers

SEEDS = pytest.mark.parametrize("seed", range(4))
MEET = "barrier.cluster.arrive; barrier.cluster.wait;"


@pytest.fixture
def run(ptx_kernel):
    """run(body, block): returns what %r100 becomes in each thread.

    %r5 is the address of smem, %r6 the CTA's rank, %r7 the thread's index in the grid, %r8 that of the warp.
    """

    def run_(body, block=32, ctas=1, seed=0, checks="all", whole=False):
        text = ptx_kernel(f"""
 mov.u32 %r5, smem; mov.u32 %r6, %cluster_ctarank; mov.u32 %r100, -7;
 mad.lo.u32 %r7, %r6, {block}, %r1; shr.u32 %r8, %r1, 5;
{body}
 mul.wide.u32 %rd3, %r7, 4; add.s64 %rd4, %rd2, %rd3; st.global.b32 [%rd4], %r100;
""")
        gpu = device("sm_100a", seed=seed, checks=checks)
        y = gpu.empty((ctas * block,), dtype=torch.int32)
        y.fill_(-1)
        launch = {"grid": (ctas, 1, 1), "cluster": (ctas, 1, 1), "block": (block, 1, 1)}
        done = gpu.run_ptx(text, y, y, shared_bytes=4096, **launch)
        return (y.tolist(), done) if whole else y.tolist()

    return run_


def fails(kind, *parts):
    return pytest.raises(kind, match=".*".join(parts))


# bar.sync --------------------------------------------------------------------------------------------------

# Ten rounds: each thread shows its neighbours a number, and adds up what the thread two warps further shows.
ROUNDS = """
 mov.u32 %r20, 0; mov.u32 %r100, 0;
 shl.b32 %r21, %r1, 2; add.s32 %r21, %r21, %r5;
 add.u32 %r22, %r1, 64; and.b32 %r22, %r22, 127; shl.b32 %r22, %r22, 2; add.s32 %r22, %r22, %r5;
LOOP:
 mad.lo.u32 %r23, %r20, 1000, %r1;
 st.shared.b32 [%r21], %r23;
 {first}
 ld.shared.b32 %r23, [%r22];
 add.u32 %r100, %r100, %r23;
 {second}
 add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, 10; @%p1 bra LOOP;
"""
SUMS = [45000 + 10 * ((i + 64) % 128) for i in range(128)]


@SEEDS
@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "bar.sync 15, 128;",
        "barrier.sync 3;",
        "barrier.cta.sync.aligned 3, 128;",
        "barrier.sync.aligned %r30, %r31;",
        "bar.red.popc.u32 %r32, 1, %p9;",
        "bar.arrive 2, 256; bar.sync 2, 256;",
    ],
)
def test_a_barrier_between_rounds(run, barrier, seed):
    setup = "mov.u32 %r30, 7; mov.u32 %r31, 128; setp.eq.u32 %p9, %r1, 0;\n"
    body = setup + ROUNDS.format(first=barrier, second="bar.sync 0;")
    if "256" in barrier:
        with fails(
            BarrierError, "thread count is 256, and must be a multiple of 32 from 32 to the CTA's 128"
        ):
            run(body, 128, seed=seed)
        return
    assert run(body, 128, seed=seed) == SUMS
    alternating = ROUNDS.format(first=barrier, second=barrier)
    assert run(setup + alternating, 128, seed=seed) == SUMS


@SEEDS
@pytest.mark.parametrize("missing", ["first", "second"])
def test_without_the_barrier_there_is_a_race(run, missing, seed):
    there = {"first": "bar.sync 0;", "second": "bar.sync 0;", missing: ""}
    with pytest.raises(RaceError):
        run(ROUNDS.format(**there), 128, seed=seed, checks=("race",))


@SEEDS
def test_producers_arrive_and_consumers_wait(run, seed):
    # The example of the PTX ISA, both ways: warps 0 and 1 write, 2 and 3 read, for ten rounds.
    body = """
 mov.u32 %r20, 0; mov.u32 %r100, 0;
 and.b32 %r21, %r1, 63; shl.b32 %r21, %r21, 2; add.s32 %r21, %r21, %r5;
 setp.ge.u32 %p2, %r1, 64;
LOOP:
 @%p2 bra CONSUMER;
 mad.lo.u32 %r22, %r20, 100, %r1;
 st.shared.b32 [%r21], %r22;
 bar.arrive 0, 128;
 bar.sync 1, 128;
 bra NEXT;
CONSUMER:
 bar.sync 0, 128;
 ld.shared.b32 %r22, [%r21];
 add.u32 %r100, %r100, %r22;
 bar.arrive 1, 128;
NEXT:
 add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, 10; @%p1 bra LOOP;
"""
    assert run(body, 128, seed=seed) == [0] * 64 + [4500 + 10 * i for i in range(64)]
    with pytest.raises(RaceError):
        run(body.replace("bar.sync 0, 128;", "bar.arrive 0, 128;"), 128, seed=seed, checks=("race",))


@SEEDS
def test_groups_of_warps_at_barriers_of_their_own(run, seed):
    # Pairs of warps meet at barrier 1 + pair, each a different number of times.
    body = """
 shr.u32 %r20, %r8, 1; add.u32 %r21, %r20, 1;
 mov.u32 %r100, 0;
LOOP:
 barrier.sync.aligned %r21, 64;
 add.u32 %r100, %r100, 1;
 setp.le.u32 %p1, %r100, %r20; @%p1 bra LOOP;
 bar.sync 0;
"""
    assert run(body, 256, seed=seed) == [1 + i // 64 for i in range(256)]


@SEEDS
def test_more_warps_come_than_one_phase_takes(run, seed):
    # Any two of the four warps make a phase.
    found, done = run("bar.sync 1, 64; mov.u32 %r100, 1;", 128, seed=seed, whole=True)
    assert found == [1] * 128
    assert done.counters["barrier.waits"] == 4
    with fails(DeadlockError, "barrier 1 of CTA", r"phase 1, 32 of 64 threads have arrived"):
        run("bar.sync 1, 64;", 96, seed=seed)


@SEEDS
def test_warps_that_have_ended_are_not_waited_for(run, seed):
    early = "setp.eq.u32 %p1, %r8, 1; @%p1 ret; "
    late = "setp.eq.u32 %p1, %r8, 1; @%p1 bra OUT; bar.sync 0; bar.sync 0; OUT: mov.u32 %r100, 1;"
    assert run(early + "bar.sync 0; mov.u32 %r100, 1;", 96, seed=seed) == [1] * 32 + [-1] * 32 + [1] * 32
    assert run(late, 96, seed=seed) == [1] * 96
    with fails(DeadlockError, "barrier 0 of CTA", "64 of 96 threads"):
        run(early + "bar.sync 0, 96;", 96, seed=seed)


@SEEDS
def test_lanes_that_have_ended_or_never_were_are_not_waited_for(run, seed):
    early = "setp.gt.u32 %p1, %r1, 40; @%p1 ret; "
    for barrier in ("bar.sync 0;", "barrier.sync 0, 64;"):
        found = run(early + f"{barrier} mov.u32 %r100, 1;", 50, seed=seed)
        assert found == [1] * 41 + [-1] * 9


# Lanes 0 to 7 go one way. Of the others, which go the second, 8 to 15 end, and both ways meet behind it.
PARTED = """
 setp.lt.u32 %p1, %r1, 8; @%p1 bra FIRST;
 mov.u32 %r20, 0; setp.lt.u32 %p2, %r1, 16;
 {pause}
 @%p2 ret;
 {second}
 mov.u32 %r100, 2;
 bra MEET;
FIRST:
 {first}
 mov.u32 %r100, 1;
MEET:
"""
PAUSE = "bar.warp.sync 0xffffff00;" * 20


@SEEDS
@pytest.mark.parametrize("pause", ["", PAUSE])
def test_lanes_that_end_while_others_wait_for_them(run, pause, seed):
    ended = [1] * 8 + [-1] * 8 + [2] * 16
    for barrier in ("barrier.sync 0;", "barrier.cta.arrive 0, 32;", MEET):
        body = PARTED.format(pause=pause, first=barrier, second=barrier)
        assert run(body, 32, seed=seed) == ended, barrier
    body = PARTED.format(pause=pause, first="bar.warp.sync 0xffff;", second="")
    assert run(body, 32, seed=seed) == ended


@SEEDS
def test_lanes_come_to_an_unaligned_barrier_by_two_branches(run, seed):
    body = """
 setp.lt.u32 %p2, %r1, 37;
 @%p2 bra LOW;
 barrier.sync 4, 64;
 mov.u32 %r100, 2;
 bra MEET;
LOW:
 barrier.sync 4, 64;
 mov.u32 %r100, 1;
MEET:
"""
    assert run(body, 64, seed=seed) == [1] * 37 + [2] * 27
    # The aligned form wants all lanes of a warp at one instruction: warp 1 cannot.
    with fails(DeadlockError, "warp 1", "to come there too"):
        run(body.replace("barrier.sync", "barrier.sync.aligned"), 64, seed=seed)


# bar.red ---------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("block", [128, 100])
def test_reductions(run, block, seed):
    for true in ([], [3, 40, 99], list(range(99)), list(range(block))):
        table = "\n".join(f"setp.eq.or.u32 %p1, %r1, {i}, %p1;" for i in true[:5])
        if len(true) > 5:
            table = f"setp.lt.u32 %p1, %r1, {len(true)};"
        setup = f"setp.ne.u32 %p1, %r1, %r1; {table}\n"
        for op, value in (
            ("popc.u32 %r100", len(true)),
            ("and.pred %p2", int(len(true) == block)),
            ("or.pred %p2", int(bool(true))),
        ):
            to = "" if "popc" in op else " selp.b32 %r100, 1, 0, %p2;"
            for count in ("", " 128,"):
                body = f"{setup} bar.red.{op}, 0,{count} %p1;{to}"
                assert run(body, block, seed=seed) == [value] * block, body
            negated = block - value if "popc" in op else None
            if negated is not None:
                assert run(f"{setup} bar.red.{op}, 0, !%p1;", block, seed=seed) == [negated] * block


@SEEDS
def test_reductions_follow_each_other(run, seed):
    # Round k counts the threads below 10 * k, into the predicate's own register too.
    body = """
 mov.u32 %r20, 0; mov.u32 %r100, 0;
LOOP:
 mul.lo.u32 %r21, %r20, 10;
 setp.lt.u32 %p1, %r1, %r21;
 bar.red.popc.u32 %r22, 0, %p1;
 mad.lo.u32 %r100, %r22, %r20, %r100;
 bar.red.or.pred %p1, 1, %p1;
 selp.b32 %r23, 1000000, 0, %p1; add.u32 %r100, %r100, %r23;
 add.u32 %r20, %r20, 1; setp.lt.u32 %p3, %r20, 8; @%p3 bra LOOP;
"""
    assert run(body, 96, seed=seed) == [7_000_000 + sum(10 * k * k for k in range(8))] * 96


def test_a_warp_opens_a_barrier_for_itself(run):
    """Two warps take turns by a barrier of each: warp 0 arrives at its own for the turn before the first."""
    text = """
 setp.eq.u32 %p1, %r8, 0; mov.u32 %r20, 0; add.u32 %r21, %r8, 1; sub.u32 %r22, 2, %r8; mov.u32 %r100, 0;
 @%p1 bar.arrive 1, 64;
TURN: bar.sync %r21, 64; ld.shared.u32 %r23, [%r5]; add.u32 %r23, %r23, 1; bar.warp.sync -1;
 st.shared.u32 [%r5], %r23; bar.arrive %r22, 64; mad.lo.u32 %r100, %r100, 10, %r23;
 add.u32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 3; @%p2 bra TURN;
 @%p1 bar.sync 1, 64;
"""
    start = "setp.eq.u32 %p1, %r1, 0; mov.u32 %r20, 0; @%p1 st.shared.u32 [%r5], %r20; bar.sync 0;"
    for seed in range(4):
        assert run(start + text, 64, seed=seed) == [135] * 32 + [246] * 32


# Refused ---------------------------------------------------------------------------------------------------


def test_refused_barriers_and_counts(run):
    for number in (16, -1):
        with fails(BarrierError, f"barrier {number} is none of the barriers 0 to 15"):
            run(f"mov.u32 %r20, {number}; barrier.sync %r20;")
    for count in (0, 33, 96):
        with fails(BarrierError, "barrier 1", f"thread count is {count}, and must be a multiple of 32"):
            run(f"bar.sync 1, {count};", 64)
    with fails(BarrierError, "do not agree on the barrier and thread count of barrier.sync"):
        run("barrier.sync %r1;")
    split = "setp.eq.u32 %p1, %r8, 0; @%p1 bra A; {} bra B; A: {} B:"
    with fails(
        BarrierError, "barrier 1 of CTA", "it is for (64|96) threads, and a warp comes to it for (64|96)"
    ):
        run(split.format("bar.sync 1, 64;", "bar.sync 1;"), 96)
    assert run(split.format("bar.sync 1, 96;", "bar.sync 1;") + "mov.u32 %r100, 1;", 96) == [1] * 96
    with fails(BarrierError, "bar.red meets bar.sync or bar.arrive in one phase"):
        run(split.format("bar.sync 1, 64;", "bar.red.popc.u32 %r20, 1, 64, %p1;"), 64)
    with fails(BarrierError, "the warp arrives a second time in one phase") as caught:
        run("setp.eq.u32 %p1, %r8, 1; @%p1 bar.arrive 1, 96; @%p1 bar.arrive 1, 96;", 96)
    assert caught.value.warp == 1
    with fails(ConvergenceError, "bar.sync together, but the guard of 0x0000ff00 is false"):
        run("sub.u32 %r20, %r1, 8; setp.ge.u32 %p1, %r20, 8; @%p1 bar.sync 0;")


@pytest.mark.parametrize(
    "text",
    [
        "bar.arrive 1;",
        "bar.red.xor.pred %p1, 0, %p2;",
        "barrier.cluster.wait.relaxed;",
        "barrier.cluster.arrive.acquire;",
        "barrier.cluster.sync;",
        "bar.wait 0;",
    ],
)
def test_forms_that_do_not_exist(run, text):
    with fails(UnsupportedInstruction, text.split()[0].strip(";")):
        run(text)


def test_a_deadlock_says_what_is_missing(run):
    with fails(DeadlockError, "warp 0 waits at PTX line", "bar.sync 2, 64", "phase 0, 32 of 64 threads have"):
        run("setp.eq.u32 %p1, %r8, 1; @%p1 bra OUT; bar.sync 2, 64; OUT:", 64)


FULL = 0xFFFFFFFF

# Named barriers against a slow model -----------------------------------------------------------------------


class Slow:
    """One barrier of one CTA, a warp at a time."""

    def __init__(self, warps: int) -> None:
        self.living = warps
        self.phase, self.come, self.needed = 0, [], None

    def arrive(self, warp: int, threads: int) -> None:
        self.needed = threads
        self.come.append(warp)
        self.settle()

    def settle(self) -> None:
        if self.needed is not None and len(self.come) >= (
            self.living if self.needed == ALL else self.needed // 32
        ):
            self.phase, self.come, self.needed = self.phase + 1, [], None


def fake_machine(ctas: int, per_cta: int) -> types.SimpleNamespace:
    woken: list = []
    return types.SimpleNamespace(
        ctas=ctas, warps=ctas * per_cta, warps_per_cta=per_cta, on_exit=[], order=None, woken=woken,
        wake=woken.append, time=np.zeros(ctas * per_cta, np.int64), checks=frozenset({"barriers"}),
        cta_index=np.zeros((ctas, 3), np.int64), alive=np.full(ctas * per_cta, FULL, np.uint32),
    )  # fmt: skip


def test_the_last_missing_lanes_of_a_warp_end():
    machine = fake_machine(1, 2)
    barriers = NamedBarriers(machine)
    barriers.come(0, 1, FULL, ALL)
    barriers.come(0, 0, 0x0000FFFF, ALL)
    barriers.come(0, 0, 0x00FF0000, ALL)
    assert not barriers.passes(0, 1, FULL, True)
    machine.alive[0] = 0x00FFFFFF
    for function in machine.on_exit:
        function(np.array([0]))
    assert machine.woken == [("bar", 0, 0)]
    assert barriers.passes(0, 1, FULL, True)
    assert barriers.passes(0, 0, 0x0000FFFF, True)
    # The lanes that have passed come again before the others have passed.
    barriers.come(0, 0, 0x0000FFFF, ALL)
    assert not barriers.passes(0, 0, 0x0000FFFF, True)
    assert barriers.passes(0, 0, 0x00FF0000, True)


@pytest.mark.parametrize("seed", range(10))
def test_random_arrivals_against_the_slow_model(seed):
    rng = np.random.default_rng(seed)
    ctas, per_cta = 3, 5
    machine = fake_machine(ctas, per_cta)
    woken, machine.time = machine.woken, rng.integers(0, 100, ctas * per_cta)
    fast = NamedBarriers(machine)
    slow = [Slow(per_cta) for _ in range(ctas)]
    # Every CTA uses the barrier with a count of its own, and some warps end on the way.
    threads = [ALL, 64, 96]
    waiting: dict[int, int] = {}
    alive = set(range(ctas * per_cta))
    for _ in range(60):
        free = np.array([w for w in alive if w not in waiting], np.int64)
        chosen = rng.permutation(free)[: rng.integers(0, len(free) + 1)]
        for warp in chosen.tolist():
            waiting[warp] = slow[warp // per_cta].phase
            slow[warp // per_cta].arrive(warp, threads[warp // per_cta])
            fast.come(3, warp, FULL, threads[warp // per_cta])
        for warp in sorted(waiting):
            passed = fast.passes(3, warp, FULL, True)
            assert passed == (slow[warp // per_cta].phase > waiting[warp])
            if passed:
                del waiting[warp]
        for cta in range(ctas):
            assert f"phase {slow[cta].phase}, {32 * len(slow[cta].come)} of" in fast.describe(3, cta)
        if rng.integers(0, 8) == 0 and len(alive) > 9:
            ended = next((w for w in sorted(alive) if w not in waiting and w < per_cta), None)
            if ended is not None:
                alive.discard(ended)
                machine.alive[ended] = 0
                slow[0].living -= 1
                slow[0].settle()
                for function in machine.on_exit:
                    function(np.array([ended]))
    assert len(woken) == sum(s.phase for s in slow)
    assert {key for key in woken} <= {("bar", cta, 3) for cta in range(ctas)}


# The barrier of a cluster ----------------------------------------------------------------------------------

# Each thread writes its number into the next CTA's memory, for some rounds; then everybody reads.
CLUSTER = """
 add.u32 %r20, %r6, 1; and.b32 %r20, %r20, 3;
 mapa.shared::cluster.u32 %r21, %r5, %r20;
 shl.b32 %r22, %r1, 2; add.u32 %r23, %r22, %r21; add.u32 %r22, %r22, %r5;
 mov.u32 %r24, 0; mov.u32 %r100, 0;
LOOP:
 mad.lo.u32 %r25, %r24, 1000, %r7;
 st.shared::cluster.b32 [%r23], %r25;
 {first}
 ld.shared.b32 %r25, [%r22];
 add.u32 %r100, %r100, %r25;
 {second}
 add.u32 %r24, %r24, 1; setp.lt.u32 %p1, %r24, 5; @%p1 bra LOOP;
"""
CLUSTER_SUMS = [10000 + 5 * ((i - 64) % 256) for i in range(256)]


@SEEDS
@pytest.mark.parametrize(
    "meet",
    [
        MEET,
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        "setp.lt.u32 %p3, %r1, 13; @%p3 barrier.cluster.arrive; @!%p3 barrier.cluster.arrive;"
        "barrier.cluster.wait;",
    ],
)
def test_ctas_of_a_cluster_meet(run, meet, seed):
    body = CLUSTER.format(first=meet, second=meet)
    assert run(body, 64, ctas=4, seed=seed) == CLUSTER_SUMS


@SEEDS
@pytest.mark.parametrize(
    "broken",
    [
        {"first": ""},
        {"second": ""},
        {"first": MEET.replace("arrive", "arrive.relaxed")},
        {"second": "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"},
    ],
)
def test_without_the_cluster_barrier_there_is_a_race(run, broken, seed):
    body = CLUSTER.format(**{"first": MEET, "second": MEET, **broken})
    with pytest.raises(RaceError):
        run(body, 64, ctas=4, seed=seed, checks=("race",))


@SEEDS
def test_work_between_arrival_and_wait(run, seed):
    # Threads of the next phase arrive while others still wait for this one.
    body = """
 mov.u32 %r20, 0;
LOOP:
 barrier.cluster.arrive;
 add.u32 %r20, %r20, 1;
 setp.lt.u32 %p1, %r7, 40; @%p1 bra SHORT;
 add.u32 %r21, %r20, 1; add.u32 %r21, %r21, 1; add.u32 %r21, %r21, 1;
SHORT:
 barrier.cluster.wait;
 setp.lt.u32 %p1, %r20, 20; @%p1 bra LOOP;
 mov.u32 %r100, %r20;
"""
    assert run(body, 64, ctas=4, seed=seed) == [20] * 256


@SEEDS
def test_ended_threads_count_as_arrived(run, seed):
    out = "setp.eq.u32 %p1, %r6, 1; @%p1 ret; "
    assert run(out + MEET + "mov.u32 %r100, 1;", 64, ctas=2, seed=seed) == [1] * 64 + [-1] * 64
    some = "setp.eq.u32 %p1, %r8, 1; @%p1 bra OUT; " + MEET + " OUT: mov.u32 %r100, 1;"
    assert run(some, 64, ctas=2, seed=seed) == [1] * 128


def test_misuse_of_the_cluster_barrier(run):
    with fails(BarrierError, r"cluster that begins with CTA \(0, 0, 0\)", "waited for without an arrival"):
        run("barrier.cluster.wait;", 64, ctas=2)
    with fails(BarrierError, r"phase 0, \d+ of 128", "waited for without an arrival") as caught:
        run("setp.ne.u32 %p1, %r1, 70; @%p1 bra A; barrier.cluster.wait; A:" + MEET, 128)
    assert (caught.value.warp, caught.value.lane) == (2, 6)
    with fails(BarrierError, "phase 1", "waited for without an arrival"):
        run(MEET + "barrier.cluster.wait;", 64, ctas=2)
    with fails(BarrierError, "is arrived at again before it was waited for"):
        run("setp.eq.u32 %p1, %r6, 0; @%p1 barrier.cluster.arrive; @%p1 barrier.cluster.arrive;", 64, ctas=2)
    with fails(DeadlockError, "barrier of the cluster", "phase 0, 127 of 128 threads have arrived"):
        body = "setp.ne.u32 %p1, %r7, 70; @%p1 barrier.cluster.arrive; @%p1 barrier.cluster.wait; bar.sync 0;"
        run(
            body.replace("bar.sync 0;", "W: setp.eq.u32 %p2, %r7, 70; @%p2 bar.warp.sync 0xffffffff;"),
            64,
            ctas=2,
        )
