"""mbarrier instructions in kernels: every form, who waits for what, what is ordered, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import (
    AddressError,
    DeadlockError,
    EmulatorError,
    UninitialisedError,
    UnsupportedInstruction,
    device,
)
from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.happens_before import RaceError

SEEDS = pytest.mark.parametrize("seed", range(4))


@pytest.fixture
def run(ptx_kernel):
    """run(body, block): thread 0 initialises `counts` at smem, smem + 8, ...; returns what %r100 becomes.

    %r5 is the address of smem, %r6 the CTA's rank, %r7 the thread's index in the grid.
    """

    def run_(body, block=32, counts=(), ctas=1, seed=0, checks="all", between=None, whole=False):
        inits = "".join(
            f" mbarrier.init.shared::cta.b64 [%r5+{8 * i}], {count};\n" for i, count in enumerate(counts)
        )
        meet = "bar.sync 0;" if ctas == 1 else "barrier.cluster.arrive; barrier.cluster.wait;"
        text = ptx_kernel(f"""
 mov.u32 %r5, smem; mov.u32 %r6, %cluster_ctarank; mov.u32 %r100, -7;
 mad.lo.u32 %r7, %r6, {block}, %r1;
 setp.ne.s32 %p10, %r1, 0; @%p10 bra INITIALISED;
{inits}
INITIALISED:
 {meet if between is None else between}
{body}
 mul.wide.u32 %rd3, %r7, 4; add.s64 %rd4, %rd2, %rd3; st.global.b32 [%rd4], %r100;
""")
        gpu = device("sm_100a", seed=seed, checks=checks)
        y = gpu.empty((ctas * block,), dtype=torch.int32)
        launch = {"grid": (ctas, 1, 1), "cluster": (ctas, 1, 1), "block": (block, 1, 1)}
        done = gpu.run_ptx(text, y, y, shared_bytes=1024, **launch)
        found = y.numpy().astype(np.uint32).tolist()
        return (found, done) if whole else found

    return run_


def spin(parity: int | str, address: str = "[%r5]", label: str = "WAIT", form: str = "shared.b64") -> str:
    return f"{label}: mbarrier.try_wait.parity.{form} %p1, {address}, {parity}; @!%p1 bra {label};\n"


def pause(label: str) -> str:
    """A loop that takes a few hundred cycles."""
    return f"""
 mov.u32 %r29, 0;
{label}: add.u32 %r29, %r29, 1; setp.lt.u32 %p9, %r29, 200; @%p9 bra {label};
"""


# Arrivals and waits ----------------------------------------------------------------------------------------

# Each thread stores its number, arrives, waits, and reads its neighbour's half a block away.
EXCHANGE = """
 shl.b32 %r8, %r1, 2; add.s32 %r8, %r8, %r5;
 add.s32 %r9, %r1, 100;
 st.shared.b32 [%r8+64], %r9;
 {arrive}
 {wait}
 xor.b32 %r9, %r1, 32; shl.b32 %r9, %r9, 2; add.s32 %r9, %r9, %r5;
 ld.shared.b32 %r100, [%r9+64];
"""
ARRIVE = "mbarrier.arrive.shared.b64 _, [%r5];"
NEIGHBOURS = [100 + (i ^ 32) for i in range(64)]


@SEEDS
@pytest.mark.parametrize(
    "arrive",
    [
        ARRIVE,
        "mbarrier.arrive.shared::cta.b64 %rd9, [%r5];",
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r5], 1;",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];",
        "mbarrier.arrive.b64 _, [%rd8];",
        "mbarrier.arrive_drop.shared.b64 %rd9, [%r5];",
        "mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 0;",
    ],
)
def test_threads_exchange_values(run, arrive, seed):
    generic = "cvta.shared.u64 %rd8, %rd7;"
    body = f"cvt.u64.u32 %rd7, %r5; {generic}" + EXCHANGE.format(arrive=arrive, wait=spin(0))
    assert run(body, 64, [64], seed=seed) == NEIGHBOURS


@SEEDS
@pytest.mark.parametrize(
    "wait",
    [
        spin(0, form="acquire.cta.shared::cta.b64"),
        spin(0, form="acquire.cluster.shared::cta.b64"),
        spin("0, 10000000"),
        spin("%r20"),
        "WAIT: mbarrier.try_wait.shared.b64 %p1, [%r5], %rd9; @!%p1 bra WAIT;",
        "WAIT: mbarrier.try_wait.shared.b64 %p1, [%r5], %rd9, %r20; @!%p1 bra WAIT;",
        "WAIT: mbarrier.test_wait.shared.b64 %p1, [%r5], %rd9; @!%p1 bra WAIT;",
        "WAIT: mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r5], 0; @!%p1 bra WAIT;",
    ],
)
def test_ways_to_wait(run, wait, seed):
    body = "mov.u32 %r20, 0;" + EXCHANGE.format(arrive=ARRIVE.replace("_", "%rd9"), wait=wait)
    assert run(body, 64, [64], seed=seed) == NEIGHBOURS


def test_what_an_arrival_returns(run):
    # Lanes arrive in order: each finds one fewer pending than the one before.
    body = "mbarrier.arrive.shared.b64 %rd9, [%r5]; mbarrier.pending_count.b64 %r100, %rd9;"
    assert run(body, 32, [40]) == list(range(40, 8, -1))
    counted = body.replace("[%r5];", "[%r5], 2;")
    assert run(counted, 8, [40]) == [40, 38, 36, 34, 32, 30, 28, 26]
    partial = body.replace("arrive.shared", "arrive.noComplete.shared").replace("[%r5];", "[%r5], 3;")
    assert run(partial, 4, [40]) == [40, 37, 34, 31]
    assert run(body.replace("arrive", "arrive_drop"), 4, [40]) == [40, 39, 38, 37]


def test_one_instruction_may_complete_several_phases(run):
    # Two arrivals a phase, 32 lanes: 16 phases, so that the current one is of parity 0 again.
    body = ARRIVE + "mbarrier.test_wait.parity.shared.b64 %p1, [%r5], 1; selp.b32 %r100, 1, 0, %p1;"
    assert run(body, 32, [2]) == [1] * 32
    assert run(body, 32, [3, 1], checks=()) == [1] * 32  # 10 phases and 2 arrivals
    assert run(body, 32, [32]) == [0] * 32  # one phase


def test_dropping_out(run):
    # 32 arrivals in phase 0, 16 of them for the last time: phase 1 needs the other 16 alone.
    body = f"""
 setp.lt.u32 %p2, %r1, 16;
 @%p2 mbarrier.arrive_drop.shared.b64 _, [%r5];
 @!%p2 {ARRIVE}
 {spin(0)}
 @!%p2 {ARRIVE}
 {spin(1, label="AGAIN")}
 mov.u32 %r100, 1;
"""
    assert run(body, 32, [32]) == [1] * 32


@SEEDS
def test_bytes_are_counted(run, seed):
    # Warp 1 stands for a copy engine that brings 4 times 1000 bytes before or after they are expected.
    body = f"""
 setp.lt.u32 %p2, %r1, 32; @%p2 bra CONSUMER;
 setp.lt.u32 %p3, %r1, 36;
 @%p3 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r5], 1000;
 bra CONSUMER;
CONSUMER:
 setp.eq.u32 %p4, %r1, 0;
 @%p4 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r5], 1000;
 @%p4 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 3000;
 {spin(0)}
 mov.u32 %r100, 1;
"""
    assert run(body, 64, [1], seed=seed) == [1] * 64


@SEEDS
def test_arrivals_from_the_other_cta(run, seed):
    # Each CTA's threads arrive at the other's barrier, after they have written to its memory.
    body = f"""
 xor.b32 %r20, %r6, 1;
 mapa.shared::cluster.u32 %r21, %r5, %r20;
 shl.b32 %r8, %r1, 2; add.s32 %r22, %r21, %r8;
 st.shared::cluster.b32 [%r22+64], %r7;
 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r21];
 {spin(0, form="acquire.cluster.shared::cta.b64")}
 add.s32 %r8, %r8, %r5;
 ld.shared.b32 %r100, [%r8+64];
 barrier.cluster.arrive; barrier.cluster.wait;
"""
    assert run(body, 64, [64], ctas=2, seed=seed) == [*range(64, 128), *range(64)]


# Parking ---------------------------------------------------------------------------------------------------


def test_the_first_question_is_answered_at_once(run):
    # A peek at a phase that only the warp itself completes: no, then yes.
    body = f"""
 mbarrier.try_wait.parity.shared.b64 %p2, [%r5], 0;
 selp.b32 %r100, 10, 0, %p2;
 {ARRIVE}
 mbarrier.try_wait.parity.shared.b64 %p3, [%r5], 0;
 selp.b32 %r20, 1, 0, %p3; add.s32 %r100, %r100, %r20;
"""
    assert run(body, 32, [32]) == [1] * 32


def test_a_peek_in_a_loop_asks_for_another_phase_each_time(run):
    # Every round peeks at a phase that it completes itself afterwards, at one instruction.
    body = f"""
 mov.u32 %r20, 0; mov.u32 %r100, 0;
LOOP:
 and.b32 %r21, %r20, 1;
 mbarrier.try_wait.parity.shared.b64 %p2, [%r5], %r21;
 selp.b32 %r22, 1, 0, %p2; add.s32 %r100, %r100, %r22;
 {ARRIVE}
 add.s32 %r20, %r20, 1; setp.lt.u32 %p3, %r20, 10; @%p3 bra LOOP;
"""
    found, done = run(body, 32, [32], whole=True)
    assert found == [0] * 32
    assert done.counters["barrier.parked"] == 0


@SEEDS
def test_lanes_may_wait_for_different_barriers(run, seed):
    # Warp 0: lane i waits for barrier i % 4; warp 1 completes them one by one, with long pauses.
    steps = "".join(
        f"@%p5 mbarrier.arrive.shared.b64 _, [%r5+{8 * barrier}];\n" + pause(f"PAUSE{barrier}")
        for barrier in (2, 0, 3, 1)
    )
    body = f"""
 setp.ge.u32 %p2, %r1, 32; @%p2 bra OTHER;
 and.b32 %r20, %r1, 3; shl.b32 %r21, %r20, 3; add.s32 %r21, %r21, %r5;
 {spin(0, "[%r21]")}
 bra MEET;
OTHER:
 setp.eq.u32 %p5, %r1, 32;
 {pause("FIRST")}
 {steps}
MEET:
 mov.u32 %r100, 1;
"""
    found, done = run(body, 64, [1, 1, 1, 1], seed=seed, whole=True)
    assert found == [1] * 64
    # Fewer lanes are left each time that the warp is woken.
    waits = [e.detail["barrier"] for e in done.trace.of("wait") if "try_wait" in e.text]
    assert waits == [1040, 1024, 1048, 1032]


@SEEDS
def test_two_barriers_asked_in_turn(run, seed):
    """Asked for the first one again and again, which completes last, a warp must get round to the second."""
    body = f"""
 setp.ge.u32 %p2, %r1, 32; @%p2 bra OTHER;
 mov.u32 %r100, 0;
POLL:
 mbarrier.try_wait.parity.shared.b64 %p3, [%r5], 0;
 @%p3 bra ON;
 mbarrier.try_wait.parity.shared.b64 %p4, [%r5+8], 0;
 @%p4 mbarrier.arrive.shared.b64 _, [%r5+16];
 bra POLL;
OTHER:
 setp.ne.u32 %p5, %r1, 32;
{pause("SLOW")}
 @%p5 bra WAIT;
 mbarrier.arrive.shared.b64 _, [%r5+8];
{spin(0, "[%r5+16]")}
 @!%p5 mbarrier.arrive.shared.b64 _, [%r5];
ON: mov.u32 %r100, 5;
"""
    assert run(body, block=64, counts=(1, 1, 32), seed=seed) == [5] * 64


def test_barriers_asked_in_turn_that_nobody_completes(run):
    """With a barrier in the loop, at which warps meet again and again without getting anywhere."""
    body = """
POLL:
 mbarrier.try_wait.parity.shared.b64 %p3, [%r5], 0;
 @%p3 bra ON;
 mbarrier.try_wait.parity.shared.b64 %p3, [%r5+8], 0;
 @%p3 bra ON;
 bar.sync 0;
 bra POLL;
ON: mov.u32 %r100, 5;
"""
    with pytest.raises(DeadlockError, match="warp 1 waits at PTX line"):
        run(body, block=64, counts=(1, 1))


@SEEDS
def test_a_ring_of_stages(run, seed):
    # One warp fills two stages 20 times, the other empties them. Full barriers are at 0 and 8, empty ones at
    # 16 and 24.
    body = f"""
 mov.u32 %r20, 0; mov.u32 %r100, 0;
 setp.ge.u32 %p2, %r1, 32;
LOOP:
 and.b32 %r21, %r20, 1; shl.b32 %r22, %r21, 3; add.s32 %r22, %r22, %r5;
 shr.u32 %r23, %r20, 1; and.b32 %r23, %r23, 1; xor.b32 %r24, %r23, 1;
 and.b32 %r25, %r1, 31; shl.b32 %r26, %r21, 5; add.s32 %r25, %r25, %r26; shl.b32 %r25, %r25, 2;
 add.s32 %r25, %r25, %r5;
 @%p2 bra CONSUME;
 {spin("%r24", "[%r22+16]", "EMPTY")}
 mad.lo.u32 %r26, %r20, 100, %r1;
 st.shared.b32 [%r25+64], %r26;
 mbarrier.arrive.shared.b64 _, [%r22];
 bra NEXT;
CONSUME:
 {spin("%r23", "[%r22]", "FULL")}
 ld.shared.b32 %r26, [%r25+64];
 add.s32 %r100, %r100, %r26;
 mbarrier.arrive.shared.b64 _, [%r22+16];
NEXT:
 add.s32 %r20, %r20, 1; setp.lt.u32 %p3, %r20, 20; @%p3 bra LOOP;
"""
    found, done = run(body, 64, [32, 32, 32, 32], seed=seed, whole=True)
    assert found == [0] * 32 + [19000 + 20 * lane for lane in range(32)]
    assert done.counters["barrier.waits"] >= 40
    # A missing arrival of either side stops the ring.
    for arrival in ("mbarrier.arrive.shared.b64 _, [%r22+16];", "mbarrier.arrive.shared.b64 _, [%r22];"):
        broken = body.replace(arrival, "")
        with pytest.raises(DeadlockError, match=r"32 of 32 arrivals and 0 transaction bytes pending"):
            run(broken, 64, [32, 32, 32, 32], seed=seed)
    # Without the wait for an empty stage, or a full one, accesses meet.
    for wait in (spin("%r24", "[%r22+16]", "EMPTY"), spin("%r23", "[%r22]", "FULL")):
        assert wait in body
        with pytest.raises((RaceError, UninitialisedError)):
            run(body.replace(wait, ""), 64, [32, 32, 32, 32], seed=seed)


def test_waits_are_counted_and_traced(run):
    body = f"""
 setp.ge.u32 %p2, %r1, 32; @%p2 bra SLOW;
 {spin(0)}
 bra MEET;
SLOW:
 {pause("SLEEP")}
 {ARRIVE}
MEET:
"""
    _, done = run(body, 64, [32], whole=True)
    (event,) = [e for e in done.trace.of("wait") if "try_wait" in e.text]
    assert (event.cta, event.warp, event.detail) == (0, 0, {"barrier": 1024, "phase": 0})
    # It waits from near the start until the arrival, after 200 rounds of 3 instructions.
    assert event.start < 40 and 600 < event.end < 660
    assert done.counters["barrier.waits"] == 3  # of the two warps at bar.sync, and of this one
    assert done.counters["barrier.parked"] >= 1


# Order of accesses -----------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize(
    "change",
    [
        ("mbarrier.arrive.shared.b64", "mbarrier.arrive.relaxed.cta.shared.b64"),
        ("try_wait.parity.shared", "try_wait.parity.relaxed.cta.shared"),
        (spin(0), ""),
    ],
)
def test_without_release_and_acquire_there_is_a_race(run, change, seed):
    body = EXCHANGE.format(arrive=ARRIVE, wait=spin(0))
    assert change[0] in body
    with pytest.raises(RaceError, match="shared memory of CTA"):
        run(body.replace(*change), 64, [64], seed=seed)


@SEEDS
def test_a_barrier_must_be_initialised_before_others_use_it(run, seed):
    # By the order in which warps run, there is no barrier yet, or an initialisation that nobody waited for.
    with pytest.raises((BarrierError, RaceError), match=r"not initialised|not ordered"):
        run(EXCHANGE.format(arrive=ARRIVE, wait=spin(0)), 64, [64], between="", seed=seed)


def test_an_initialisation_made_known_by_the_relaxed_cluster_barrier(run):
    between = "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    body = EXCHANGE.format(arrive=ARRIVE, wait=spin(0))
    assert run(body, 64, [64], between=between) == NEIGHBOURS


# Misuse ----------------------------------------------------------------------------------------------------


def fails(kind, *parts):
    return pytest.raises(kind, match=".*".join(parts))


def test_refused_counts(run):
    with fails(BarrierError, "0x400 of CTA", "count of 0, which must be 1 to 1048575"):
        run("", 32, [0])
    with fails(BarrierError, "with a count of 0, which must be"):
        run("mbarrier.arrive.shared.b64 _, [%r5], 0;", 32, [32])
    with fails(BarrierError, "arrived at 1 more times: more than the 33", "PTX line") as caught:
        run(f"mbarrier.expect_tx.shared.b64 [%r5], 8; {ARRIVE}\n{ARRIVE}", 32, [33])
    assert caught.value.warp == 0 and caught.value.cta == (0, 0, 0)
    with fails(BarrierError, r"\+1048575 bytes take its transaction count to 2097150") as caught:
        run("mbarrier.expect_tx.shared.b64 [%r5], 1048575;", 32, [1])
    assert caught.value.lane == 1
    with fails(BarrierError, "waited for with parity 2, not 0 or 1"):
        run(spin(2), 32, [32])
    with fails(BarrierError, "noComplete completes its phase"):
        run("mbarrier.arrive.noComplete.shared.b64 %rd9, [%r5], 4;", 32, [40])


def test_refused_addresses(run):
    with fails(BarrierError, "0x404", "not aligned to 8"):
        run("mbarrier.init.shared.b64 [%r5+4], 1;")
    with fails(BarrierError, "0x420", "arrived at, but was not initialised"):
        run("mbarrier.arrive.shared.b64 _, [%r5+32];", 32, [1])
    with fails(AddressError, "0x100000 is not in shared memory"):
        run("mov.u64 %rd8, 0x100000; mbarrier.arrive.b64 _, [%rd8];", 32, [1])
    other = "xor.b32 %r20, %r6, 1; mapa.shared::cluster.u32 %r21, %r5, %r20;"
    with fails(AddressError, "in another CTA of the cluster, and the instruction says .shared::cta"):
        run(f"{other} mbarrier.arrive.shared::cta.b64 _, [%r21];", 32, [32], ctas=2)
    with fails(AddressError, "rank 255"):
        run(f"mapa.shared::cluster.u32 %r21, %r5, 300; {ARRIVE.replace('%r5', '%r21')}", 32, [32], ctas=2)
    with fails(AddressError, "outside"):
        run("mbarrier.init.shared.b64 [%r5+65536], 1;")


def test_a_store_over_a_live_barrier(run):
    store = "setp.eq.u32 %p2, %r1, 5; @%p2 st.shared.b32 [%r5+4], %r1; bar.sync 0;"
    with fails(BarrierError, "0x400", "was overwritten with 40000004050000"):
        run(f"{store} {ARRIVE}", 64, [64])
    # Copying a barrier makes none.
    copy = "ld.shared.b64 %rd9, [%r5]; st.shared.b64 [%r5+8], %rd9; bar.sync 0;"
    with fails(BarrierError, "0x408", "was not initialised"):
        run(f"{copy} mbarrier.arrive.shared.b64 _, [%r5+8];", 32, [32])


def test_inval_and_init_again(run):
    first = "setp.eq.u32 %p2, %r1, 0; bar.sync 0; @%p2 mbarrier.inval.shared.b64 [%r5]; "
    again = "@%p2 mbarrier.init.shared.b64 [%r5], 64; bar.sync 0;"
    exchange = EXCHANGE.format(arrive=ARRIVE, wait=spin(0))
    assert run(f"{ARRIVE} {first} {again} {exchange}", 64, [100]) == NEIGHBOURS
    with fails(BarrierError, "waited for, but was not initialised"):
        run(f"{first} bar.sync 0; {spin(0)}", 64, [100])
    middle = f"{ARRIVE} bar.sync 0; setp.eq.u32 %p2, %r1, 0; {again}"
    with fails(BarrierError, "36 of 100 arrivals", "initialised again in the middle of a phase"):
        run(middle, 64, [100])


def test_states_of_other_phases_and_barriers(run):
    arrive = "mbarrier.arrive.shared.b64 %rd9, [%r5];"
    test = "mbarrier.test_wait.shared.b64 %p1, [%r5{}], %rd9;"
    with fails(BarrierError, "with the state of 2 phases ago"):
        run(f"{arrive} {ARRIVE} {test.format('')}", 32, [32])
    with fails(BarrierError, "0x408", "with the state of another"):
        run(f"{arrive} {test.format('+8')}", 32, [32, 32])


def test_a_wrong_transaction_count(run):
    short = "setp.eq.u32 %p2, %r1, 0; @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 128;"
    with fails(DeadlockError, "parity 0 of the mbarrier", "0 of 1 arrivals and 128 transaction bytes"):
        run(f"{short} {spin(0)}", 32, [1])
    some = short + "@%p2 mbarrier.complete_tx.shared::cta.b64 [%r5], 96;"
    with fails(EmulatorError, "wrong transaction count: the kernel ends", "32 transaction bytes pending"):
        run(some, 32, [1])
    assert run(some + "mov.u32 %r100, 1;", 32, [1], checks=()) == [1] * 32


def test_bytes_that_are_announced_and_never_copied(run):
    """A producer takes the next buffer only to see that it is free."""
    take = "setp.eq.u32 %p2, %r1, 0; @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 128; "
    come = "@%p2 mbarrier.complete_tx.shared::cta.b64 [%r5], 128; "
    assert run(take + come + take + "mov.u32 %r100, 1;", 32, [1]) == [1] * 32


def test_a_deadlock_names_the_barrier_as_it_is_then(run):
    # Warp 1 waits first; warp 0 arrives with 31 of its lanes afterwards.
    body = f"""
 setp.ge.u32 %p2, %r1, 32; @%p2 bra MEET;
 nanosleep.u32 100; setp.ne.u32 %p3, %r1, 3; @%p3 {ARRIVE}
MEET:
 {spin(0)}
"""
    with fails(DeadlockError, "warp 1 waits at PTX line", "0x400", "phase 0", "1 of 32 arrivals"):
        run(body, 64, [32])


@pytest.mark.parametrize(
    "text",
    [
        "mbarrier.arrive.shared::cluster.b64 %rd9, [%r5];",
        "mbarrier.arrive.parity.shared.b64 _, [%r5];",
        "mbarrier.flip.shared.b64 [%r5];",
        "mbarrier.try_wait.expect_tx.shared.b64 %p1, [%r5], %rd9;",
    ],
)
def test_forms_that_do_not_exist(run, text):
    with fails(UnsupportedInstruction, text.split()[0]):
        run(text)
