"""cp.async in kernels: sizes, zero fill, groups, mbarriers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import AddressError, DeadlockError, EmulatorError, UnsupportedInstruction, device
from dsv4lab.emulator.happens_before import RaceError

SEEDS = pytest.mark.parametrize("seed", range(4))
# Each thread has 16 bytes of x (%rd5), of shared memory (%r6) and of y (%rd6).
START = """
 mov.u32 %r5, smem; mul.lo.u32 %r7, %r1, 16; add.u32 %r6, %r5, %r7; add.u32 %r6, %r6, 64;
 cvt.u64.u32 %rd4, %r7; add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd2, %rd4;
"""
OUT = (
    " ld.shared.v4.b32 {%r30, %r31, %r32, %r33}, [%r6]; st.global.v4.b32 [%rd6], {%r30, %r31, %r32, %r33};\n"
)
ZERO = " mov.b32 %r40, 0; st.shared.v4.b32 [%r6], {%r40, %r40, %r40, %r40};\n"
COPY = " cp.async.cg.shared.global [%r6], [%rd5], 16;\n"
ALL = " cp.async.wait_all;\n"


@pytest.fixture
def run(ptx_kernel):
    """run(body, x): what threads have stored in y, of the size of x, four words each."""

    def run_(body, x, seed=0, checks="all", threads=None, parameters=".u64 x, .u64 y"):
        gpu = device("sm_90a", seed=seed, checks=checks)
        x = gpu.from_torch(torch.from_numpy(np.ascontiguousarray(x)))
        y = gpu.empty(tuple(x.shape), x.dtype)
        threads = threads or x.numel() // 4
        text = ptx_kernel(START + body, parameters, target="sm_90a")
        run_.last = gpu.run_ptx(text, x, y, block=(threads, 1, 1), shared_bytes=64 + 16 * threads)
        return y.numpy()

    return run_


def words(threads=64, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, (threads, 4), dtype=np.uint32)


# Data ------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes(run, seed, size):
    x = words()
    parts = "".join(
        f" cp.async.ca.shared.global [%r6+{i}], [%rd5+{i}], {size};\n" for i in range(0, 16, size)
    )
    np.testing.assert_array_equal(run(parts + ALL + OUT, x, seed=seed), x)
    assert run.last.counters["cp_async.bytes"] == x.nbytes


def test_hints_are_ignored(run):
    x = words()
    form = "cp.async.cg.shared::cta.global.L2::cache_hint.L2::128B [%r6], [%rd5], 16, %rd9;\n"
    np.testing.assert_array_equal(run(" mov.b64 %rd9, 7; " + form + ALL + OUT, x), x)


@SEEDS
def test_fewer_source_bytes_than_destination_bytes(run, seed):
    """Thread t is given t % 17 bytes; the others become zero, and with none the address is not looked at."""
    x = words(68)
    body = """
 rem.u32 %r8, %r1, 17; setp.eq.u32 %p1, %r8, 0; selp.b64 %rd5, 16, %rd5, %p1;
 cp.async.ca.shared.global [%r6], [%rd5], 16, %r8;
"""
    expected = x.view(np.uint8).reshape(68, 16).copy()
    for thread in range(68):
        expected[thread, thread % 17 :] = 0
    np.testing.assert_array_equal(run(body + ALL + OUT, x, seed=seed), expected.view(np.uint32))


def test_an_ignored_source(run):
    """The predicate: odd threads get zeros."""
    x = words()
    body = " and.b32 %r8, %r1, 1; setp.eq.u32 %p1, %r8, 1;\n" + COPY.replace("16;", "16, %p1;")
    expected = x.copy()
    expected[1::2] = 0
    np.testing.assert_array_equal(run(body + ALL + OUT, x), expected)


def test_guarded_and_parted_lanes(run):
    """Only threads below 5 copy, one of them later than the others."""
    x = words(32)
    body = (
        ZERO
        + f"""
 setp.lt.u32 %p1, %r1, 5; setp.eq.u32 %p2, %r1, 3; @%p2 bra LATER;
 @%p1 {COPY.strip()}
LATER: @%p2 {COPY.strip()}
"""
    )
    expected = x.copy()
    expected[5:] = 0
    np.testing.assert_array_equal(run(body + ALL + OUT, x), expected)


# Groups ----------------------------------------------------------------------------------------------------


@SEEDS
def test_data_is_not_there_before_the_wait(run, seed):
    x = words()
    stale = run(ZERO + COPY + OUT, x, seed=seed, checks="none")
    assert not stale.all()
    with pytest.raises(RaceError, match=r"cp\.async operation issued by warp"):
        run(ZERO + COPY + OUT, x, seed=seed)


GROUPS = """
 cp.async.ca.shared.global [%r6], [%rd5], 4; cp.async.commit_group;
 cp.async.ca.shared.global [%r6+4], [%rd5+4], 4; cp.async.commit_group;
 cp.async.ca.shared.global [%r6+8], [%rd5+8], 8; cp.async.commit_group;
"""


@SEEDS
@pytest.mark.parametrize("most", [0, 1, 2, 3, 7])
def test_groups(run, seed, most):
    """wait_group N leaves the last N groups out: what they bring is a race."""
    x = words()
    out = " ld.shared.b32 %r30, [%r6+{at}]; st.global.b32 [%rd6], %r30;\n"
    for group, at in enumerate((0, 4, 8)):
        body = GROUPS + f" cp.async.wait_group {most};\n" + out.format(at=at)
        if group < 3 - most:
            np.testing.assert_array_equal(run(body, x, seed=seed)[:, 0], x[:, at // 4])
        else:
            with pytest.raises((RaceError, EmulatorError), match=r"not ordered|nobody has written"):
                run(body, x, seed=seed)


def test_a_wait_performs_no_more_than_it_waits_for(run):
    """Seldom does chance bring a later group's data early; mostly it is stale."""
    x = words(32)
    fresh = 0
    for seed in range(10):
        y = run(ZERO + GROUPS + " cp.async.wait_group 1;\n" + OUT, x, seed=seed, checks="none")
        np.testing.assert_array_equal(y[:, :2], x[:, :2])
        fresh += bool(y[:, 2:].any())
    assert fresh < 5


def test_empty_groups_count(run):
    x = words()
    body = COPY + " cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;\n"
    np.testing.assert_array_equal(run(body + OUT, x), x)


def test_other_warps_need_a_barrier(run):
    """Each thread reads what the thread 32 further on has copied."""
    x = words()
    body = (
        COPY + ALL + " {barrier} xor.b32 %r8, %r7, 512; add.u32 %r6, %r5, %r8; add.u32 %r6, %r6, 64;\n" + OUT
    )
    y = run(body.replace("{barrier}", "bar.sync 0;"), x)
    np.testing.assert_array_equal(y, np.roll(x, 32, 0))
    with pytest.raises(EmulatorError, match=r"not ordered|nobody has written"):
        run(body.replace("{barrier}", ""), x)


# mbarriers -------------------------------------------------------------------------------------------------

BARRIER = """
 setp.ne.s32 %p10, %r1, 0; @%p10 bra INITIALISED; mbarrier.init.shared.b64 [%r5], {count};
INITIALISED: bar.sync 0;
"""
TAKE = """
WAIT: mbarrier.try_wait.parity.shared.b64 %p11, [%r5], 0; @!%p11 bra WAIT;
 xor.b32 %r8, %r7, 512; add.u32 %r6, %r5, %r8; add.u32 %r6, %r6, 64;
"""


@SEEDS
def test_a_barrier_waits_for_the_copies(run, seed):
    """.noinc: the arrivals are those that the barrier expects."""
    x = words()
    body = (
        BARRIER.format(count=64) + COPY + " cp.async.mbarrier.arrive.noinc.shared.b64 [%r5];\n" + TAKE + OUT
    )
    np.testing.assert_array_equal(run(body, x, seed=seed), np.roll(x, 32, 0))


@SEEDS
def test_arrivals_that_add_themselves(run, seed):
    """Without .noinc the barrier expects as many arrivals more; the threads arrive on their own besides."""
    x = words()
    body = BARRIER.format(count=64) + COPY + " cp.async.mbarrier.arrive.shared.b64 [%r5];\n"
    arrive = " mbarrier.arrive.shared.b64 _, [%r5];\n"
    np.testing.assert_array_equal(run(body + arrive + TAKE + OUT, x, seed=seed), np.roll(x, 32, 0))
    with pytest.raises(DeadlockError, match="64 of 64 arrivals"):
        run(body + TAKE + OUT, x, seed=seed)


def test_without_copies_the_arrival_is_at_once(run):
    body = BARRIER.format(count=64) + " cp.async.mbarrier.arrive.noinc.shared.b64 [%r5];\n" + TAKE
    run(body, words())


@SEEDS
def test_copies_after_the_arrival_do_not_count(run, seed):
    x = words()
    arrive = " cp.async.mbarrier.arrive.noinc.shared.b64 [%r5];\n"
    with pytest.raises((RaceError, EmulatorError), match=r"not ordered|nobody has written"):
        run(BARRIER.format(count=64) + arrive + COPY + TAKE + OUT, x, seed=seed)


# What is refused -------------------------------------------------------------------------------------------

REFUSED = [
    ("cp.async.ca.shared.global [%r6+4], [%rd5], 8", "operand dst: .* is not a multiple of 8"),
    ("cp.async.ca.shared.global [%r6], [%rd5+2], 4", "operand src: .* is not a multiple of 4"),
    ("cp.async.cg.shared.global [%r6+4096], [%rd5], 16", "operand dst: .* 16 bytes lie outside the CTA's"),
    ("cp.async.cg.shared.global [%r6], [%rd5+1024], 16", "belong to no registered tensor"),
    ("cp.async.ca.shared.global [%r6], [%rd5], 4, 5", "operand src-size must be at most cp-size 4, got 5"),
    ("cp.async.ca.shared.global [%r6], [%rd5+1024], 4, 3", r"the 3 byte\(s\) at .* belong to no"),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "message"), REFUSED)
def test_refused(run, instruction, message):
    body = f" setp.eq.u32 %p1, %r1, 37; @%p1 {instruction};\n"
    with pytest.raises(EmulatorError, match=message) as caught:
        run(body + ALL, words())
    assert (caught.value.warp, caught.value.lane) == (1, 5)
    assert instruction in str(caught.value) or "wait_all" in str(caught.value)


@pytest.mark.parametrize(
    "instruction",
    ["cp.async.cg.shared.global [%r6], [%rd5], 8", "cp.async.ca.shared.global [%r6], [%rd5], 12",
     "cp.async.ca.shared::cluster.global [%r6], [%rd5], 4", "cp.sync.bulk"],
)  # fmt: skip
def test_unsupported(run, instruction):
    with pytest.raises(UnsupportedInstruction, match=r"is not emulated"):
        run(f" {instruction};\n", words())


def test_an_address_of_another_cta(run):
    with pytest.raises(AddressError, match="operand dst"):
        run(" or.b32 %r6, %r6, 0x1000000;" + COPY, words())
