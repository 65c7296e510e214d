"""st.async and red.async: data and its mbarrier in another CTA of the cluster."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import AddressError, EmulatorError, UninitialisedError, UnsupportedInstruction, device
from dsv4lab.emulator.happens_before import RaceError

SEEDS = pytest.mark.parametrize("seed", range(4))
WAIT = "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r5], 0; @!%p1 bra WAIT;"


@pytest.fixture
def run(ptx_kernel):
    """run(send, receive, nbytes): each thread of a cluster of two sends to the other CTA, waits and receives.

    %r5 is the address of smem with an mbarrier that expects `nbytes`, %r8 the other CTA's; %r9 and %r10 are
    16 * %tid.x further there and here, beyond the barrier. What the threads store is %r100.
    """

    def run_(send, receive, nbytes, wait=WAIT, before="", seed=0, checks="all"):
        body = f"""
 mov.u32 %r5, smem; mov.u32 %r6, %cluster_ctarank; mad.lo.u32 %r7, %r6, 64, %r1; xor.b32 %r8, %r6, 1;
 mapa.shared::cluster.u32 %r8, %r5, %r8;
 shl.b32 %r9, %r1, 4; add.u32 %r10, %r9, %r5; add.u32 %r9, %r9, %r8;
 add.u32 %r9, %r9, 64; add.u32 %r10, %r10, 64;
 setp.eq.u32 %p2, %r1, 0;
 @%p2 mbarrier.init.shared.b64 [%r5], 1;
 @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], {nbytes};
 {before}
 fence.mbarrier_init.release.cluster; barrier.cluster.arrive; barrier.cluster.wait;
 {send}
 {wait}
 {receive}
 barrier.cluster.arrive; barrier.cluster.wait;
 mul.wide.u32 %rd3, %r7, 4; add.s64 %rd4, %rd2, %rd3; st.global.b32 [%rd4], %r100;
"""
        gpu = device("sm_100a", seed=seed, checks=checks)
        y = gpu.empty((128,), dtype=torch.int32)
        launch = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "block": (64, 1, 1)}
        gpu.run_ptx(ptx_kernel(body), y, y, shared_bytes=2048, **launch)
        return y.numpy()

    return run_


OTHER = np.array([(i + 64) % 128 for i in range(128)])
TO = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"


@SEEDS
@pytest.mark.parametrize(
    ("send", "receive", "each", "expected"),
    [
        (".b32 [%r9], %r7, [%r8];", "ld.shared.b32 %r100, [%r10];", 4, OTHER),
        (".u32 [%r9+4], %r7, [%r8];", "ld.shared.b32 %r100, [%r10+4];", 4, OTHER),
        (".b64 [%r9], %rd9, [%r8];", "ld.shared.b32 %r100, [%r10+4];", 8, OTHER * 3),
        (".f32 [%r9], %f1, [%r8];", "ld.shared.b32 %r100, [%r10];", 4, OTHER * 3),
        (".v2.s32 [%r9], {%r7, %r11}, [%r8];", "ld.shared.b32 %r100, [%r10+4];", 8, OTHER * 3),
        (".v2.b64 [%r9], {%rd8, %rd9}, [%r8];", "ld.shared.b32 %r100, [%r10+12];", 16, OTHER * 3),
        (".v4.b32 [%r9], {%r7, 5, %r11, 7}, [%r8];", "ld.shared.b32 %r100, [%r10+8];", 16, OTHER * 3),
    ],
)
def test_stores_arrive_with_their_bytes(run, send, receive, each, expected, seed):
    values = (
        "mul.lo.u32 %r11, %r7, 3; mov.b64 %rd8, {%r11, %r7}; mov.b64 %rd9, {%r7, %r11}; mov.b32 %f1, %r11;"
    )
    for form in (TO, TO.replace(".weak", "")):
        found = run(values + form + send, receive, 64 * each, seed=seed)
        assert found.tolist() == expected.tolist()


def test_generic_addresses(run):
    to_generic = "cvt.u64.u32 %rd8, %r9; cvta.shared::cluster.u64 %rd8, %rd8; "
    to_generic += "cvt.u64.u32 %rd9, %r8; cvta.shared::cluster.u64 %rd9, %rd9; "
    send = to_generic + "st.async.mbarrier::complete_tx::bytes.b32 [%rd8], %r7, [%rd9];"
    assert run(send, "ld.shared.b32 %r100, [%r10];", 256).tolist() == OTHER.tolist()


@SEEDS
@pytest.mark.parametrize(
    ("form", "start", "value", "expected"),
    [
        ("add.u32", 1000, "%r1", 1000 + 63 * 32),
        ("add.s32", 5, "-3", 5 - 3 * 64),
        ("min.u32", 1000, "%r1", 0),
        ("min.s32", 7, "%r12", -50),
        ("max.u32", 7, "%r12", -1),
        ("max.s32", -9, "%r12", 13),
        ("inc.u32", 10, "1000", 74),
        ("inc.u32", 10, "63", 10),  # 11 to 63, then 0 to 10: 64 steps round
        ("dec.u32", 10, "100", 47),  # down to 0, then from 100
        ("and.b32", -1, "%r13", -1 << 3),
        ("or.b32", 0, "%r14", 127),
        ("xor.b32", 1 << 20, "%r14", 1 << 20 | 126),  # bit 0 is flipped ten times, bits 1 to 6 nine times
        ("add.u64", -1, "%rd9", 2 * 64 - 1),
    ],
)
def test_reductions_are_atomic(run, form, start, value, expected, seed):
    # %r12 from -50 to 13, %r13 is all ones but one of the low 3 bits, %r14 is 2**(tid % 7).
    setup = """
 sub.s32 %r12, %r1, 50; rem.u32 %r13, %r1, 3; mov.u32 %r15, 1; shl.b32 %r13, %r15, %r13; not.b32 %r13, %r13;
 rem.u32 %r14, %r1, 7; shl.b32 %r14, %r15, %r14; mov.u64 %rd9, 2;
"""
    nbytes = 8 if "64" in form else 4
    before = f"mov.u64 %rd8, {start % 2**64}; @%p2 st.shared.b64 [%r5+32], %rd8;"
    op = f"red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{form}"
    send = f"{op} [%r8+32], {value}, [%r8];"
    found = run(setup + send, "ld.shared.b32 %r100, [%r5+32];", 64 * nbytes, before=before, seed=seed)
    assert found.tolist() == [expected] * 128


@SEEDS
def test_without_the_wait_nothing_has_come_or_it_is_a_race(run, seed):
    """Or the other CTA has ended when it comes."""
    send = TO + ".b32 [%r9], %r7, [%r8];"
    with pytest.raises((RaceError, UninitialisedError, AddressError)):
        run(send, "ld.shared.b32 %r100, [%r10];", 256, wait="", seed=seed)
    # A buffer that the other CTA may still be reading.
    again = f"{WAIT} ld.shared.b32 %r100, [%r10]; {send}"
    with pytest.raises((RaceError, AddressError), match=r"st.async|asynchronous"):
        run(send, "", 256, wait=again, seed=seed, checks=("race",))


def fails(error, match):
    return pytest.raises(error, match=match)


def test_misuse(run):
    receive = "ld.shared.b32 %r100, [%r10];"
    with fails(AddressError, "data goes to the CTA of rank 1, and the mbarrier is in that of 0"):
        run("setp.eq.u32 %p3, %r6, 0; @%p3 " + TO + ".b32 [%r9], %r7, [%r5];", receive, 256)
    with fails(AddressError, "is not aligned to the 8 bytes stored"):
        run(TO + ".v2.b32 [%r9+4], {%r7, %r7}, [%r8];", receive, 512)
    with fails(AddressError, "rank 7, and the cluster has 2"):
        run(f"mapa.shared::cluster.u32 %r9, %r5, 7; {TO}.b32 [%r9], %r7, [%r8];", receive, 256)
    with fails(AddressError, "outside"):
        run(TO + ".b32 [%r9+65536], %r7, [%r8];", receive, 256)
    with fails(EmulatorError, "0 of 1 arrivals and 64 transaction bytes"):
        run("setp.gt.u32 %p3, %r1, 15; @%p3 " + TO + ".b32 [%r9], %r7, [%r8];", receive, 256)
    with fails(EmulatorError, "was not initialised"):
        run(TO + ".b32 [%r9], %r7, [%r8+8];", receive, 256)


@pytest.mark.parametrize(
    "text",
    [
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b16 [%r9], %rs1, [%r8];",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v8.b32 [%r9], {%r1, %r1, %r1, %r1}, [%r8];",
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.f32 [%r9], %f1, [%r8];",
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.and.u32 [%r9], %r1, [%r8];",
    ],
)
def test_forms_that_do_not_exist(run, text):
    with fails(UnsupportedInstruction, text.split()[0]):
        run(text, "", 256)
