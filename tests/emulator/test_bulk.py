"""Bulk copies of plain bytes in kernels: every direction, reductions, masks, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import AddressError, UnsupportedInstruction, device
from dsv4lab.emulator.happens_before import ProxyError, RaceError

SEEDS = pytest.mark.parametrize("seed", range(4))
# The barrier is at smem, data from smem + 1024 on; %r7 is the rank, %p10 false in thread 0 alone.
START = """
 mov.u32 %r5, smem; add.s32 %r6, %r5, 1024; mov.u32 %r7, %cluster_ctarank;
 setp.ne.s32 %p10, %r1, 0; @%p10 bra INITIALISED;
 mbarrier.init.shared::cta.b64 [%r5], 1; fence.mbarrier_init.release.cluster;
INITIALISED: barrier.cluster.arrive; barrier.cluster.wait;
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p11, [%r5], 0; @!%p11 bra WAIT;\n"
# Each of 32 threads stores 4 bytes of shared memory at its place of y.
OUT = """
 mul.lo.u32 %r21, %r1, 4; add.u32 %r22, %r6, %r21; ld.shared.b32 %r23, [%r22];
 mad.lo.u32 %r24, %r7, 128, %r21; cvt.u64.u32 %rd20, %r24; add.s64 %rd21, %rd2, %rd20;
 st.global.b32 [%rd21], %r23;
"""
# Each of 32 threads writes 4 bytes of x there.
IN = """
 add.s64 %rd10, %rd1, %rd3; ld.global.b32 %r20, [%rd10]; mul.lo.u32 %r21, %r1, 4;
 add.u32 %r22, %r6, %r21; st.shared.b32 [%r22], %r20; fence.proxy.async.shared::cta; bar.sync 0;
"""
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
SEND = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"
FINISH = " cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\n"


def expect(nbytes):
    return f" @!%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {nbytes};\n"


@pytest.fixture
def run(ptx_kernel):
    """run(body, x, y): PTX on 32 threads of each CTA; returns the tensors after it."""

    def run_(body, x, y, ctas=1, seed=0, checks="all", arch="sm_100a"):
        gpu = device(arch, seed=seed, checks=checks)
        tensors = [gpu.from_torch(torch.from_numpy(np.ascontiguousarray(a))) for a in (x, y)]
        text = ptx_kernel(START + body, target=arch)
        launch = {"grid": (ctas, 1, 1), "cluster": (ctas, 1, 1)}
        run_.last = gpu.run_ptx(text, *tensors, shared_bytes=2048, **launch)
        return [t.numpy() for t in tensors]

    return run_


def words(count=32, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)


# Loads -----------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("space", ["shared::cta", "shared::cluster"])
def test_a_load(run, seed, space):
    x, y = words(40), np.zeros(32, np.uint32)
    load = LOAD.replace("shared::cluster", space)
    body = expect(128) + f" mov.b32 %r9, 128; @!%p10 {load} [%r6], [%rd1+16], %r9, [%r5];\n" + WAIT + OUT
    _, y = run(body, x, y, seed=seed)
    np.testing.assert_array_equal(y, x[4:36])
    assert run.last.counters["bulk.bytes"] == 128
    (event,) = run.last.trace.of("tma")
    assert event.text == "bulk load of 128 bytes" and event.end > event.start


def test_a_load_of_nothing(run):
    """As on an H200: no byte is moved and the phase completes."""
    body = f" @!%p10 {LOAD} [%r6], [%rd1], 0, [%r5]; @!%p10 mbarrier.arrive.shared::cta.b64 _, [%r5];\n"
    run(body + WAIT, words(), words())


@SEEDS
def test_multicast(run, seed):
    """CTA 0 of 4 loads for CTAs 0 and 2."""
    x, y = words(), np.zeros((4, 32), np.uint32)
    body = f"""
 and.b32 %r8, %r7, 1; setp.ne.s32 %p5, %r8, 0; @%p5 bra END; {expect(128)}
 setp.ne.s32 %p6, %r7, 0; mov.b16 %rs1, 5; @%p6 bra WAIT;
 @!%p10 {LOAD}.multicast::cluster [%r6], [%rd1], 128, [%r5], %rs1;
{WAIT}{OUT}
END: barrier.cluster.arrive; barrier.cluster.wait;
"""
    _, y = run(body, x, y, ctas=4, seed=seed)
    np.testing.assert_array_equal(y, [x, 0 * x, x, 0 * x])


@SEEDS
def test_a_copy_to_another_cta(run, seed):
    """CTA 1 sends what it holds to CTA 0, whose barrier counts the bytes."""
    x, y = words(), np.zeros((2, 32), np.uint32)
    body = f"""
 setp.eq.s32 %p5, %r7, 0; @%p5 bra RECEIVE; {IN}
 mapa.shared::cluster.u32 %r8, %r5, 0; add.s32 %r9, %r8, 1024;
 @!%p10 {SEND} [%r9], [%r6], 128, [%r8];
 bra END;
RECEIVE: {expect(128)}{WAIT}{OUT}
END: barrier.cluster.arrive; barrier.cluster.wait;
"""
    _, y = run(body, x, y, ctas=2, seed=seed)
    np.testing.assert_array_equal(y, [x, 0 * x])
    with pytest.raises(AddressError, match="mbar lies in the CTA of rank 1 and dstMem in that of rank 0"):
        run(body.replace("128, [%r8]", "128, [%r5]"), x, y, ctas=2)


@SEEDS
@pytest.mark.parametrize(
    ("form", "dtype", "function"),
    [("add.u32", np.uint32, np.add), ("min.s32", np.int32, np.minimum),
     ("xor.b32", np.uint32, np.bitwise_xor),
     ("add.u64", np.uint64, np.add), ("max.u32", np.uint32, np.maximum)],
)  # fmt: skip
def test_reductions_in_another_cta(run, seed, form, dtype, function):
    """Three CTAs reduce into the fourth, at once and into the same bytes."""
    x, y = words(), np.zeros((4, 32), np.uint32)
    body = f"""
{IN} barrier.cluster.arrive; barrier.cluster.wait;
 setp.eq.s32 %p5, %r7, 0; @%p5 bra RECEIVE;
 mapa.shared::cluster.u32 %r8, %r5, 0; add.s32 %r9, %r8, 1024;
 @!%p10 cp.reduce.{SEND.partition(".")[2]}.{form} [%r9], [%r6], 128, [%r8];
 bra END;
RECEIVE: {expect(384)}{WAIT}{OUT}
END: barrier.cluster.arrive; barrier.cluster.wait;
"""
    _, y = run(body, x, y, ctas=4, seed=seed)
    expected = x.view(dtype)
    for _ in range(3):
        expected = function(expected, x.view(dtype))
    np.testing.assert_array_equal(y[0].view(dtype), expected)


# Stores ----------------------------------------------------------------------------------------------------


@SEEDS
def test_a_store(run, seed):
    x, y = words(), np.zeros(40, np.uint32)
    _, y = run(IN + f" @!%p10 {STORE} [%rd2+16], [%r6], 128;\n" + FINISH, x, y, seed=seed)
    np.testing.assert_array_equal(y, [*[0] * 4, *x, *[0] * 4])


def test_a_store_of_chosen_bytes(run):
    """Bits 0 and 15 of the mask: the first and the last byte of each 16."""
    x, y = words(), np.zeros(32, np.uint32)
    body = IN + f" mov.b16 %rs1, 0x8001; mov.b64 %rd9, 0; @!%p10 {STORE}.L2::cache_hint.cp_mask"
    _, y = run(body + " [%rd2], [%r6], 128, %rd9, %rs1;\n" + FINISH, x, y)
    expected = np.zeros((8, 16), np.uint8)
    expected[:, [0, 15]] = x.view(np.uint8).reshape(8, 16)[:, [0, 15]]
    np.testing.assert_array_equal(y.view(np.uint8).reshape(8, 16), expected)


@pytest.mark.parametrize("form", ["add.u32", "add.f32", "add.noftz.f16", "max.s64", "and.b64", "inc.u32"])
def test_reductions_in_global_memory(run, form):
    x, y = words(seed=1) >> np.uint32(8), words(seed=2) >> np.uint32(8)
    reduce = STORE.replace("cp", "cp.reduce", 1) + f".{form}"
    _, found = run(IN + f" @!%p10 {reduce} [%rd2], [%r6], 128;\n" + FINISH, x, y)
    ways = {
        "add.u32": lambda: y + x, "add.f32": lambda: y.view(np.float32) + x.view(np.float32),
        "add.noftz.f16": lambda: y.view(np.float16) + x.view(np.float16), "and.b64": lambda: y & x,
        "max.s64": lambda: np.maximum(y.view(np.int64), x.view(np.int64)),
        "inc.u32": lambda: np.where(y >= x, 0, y + 1).astype(np.uint32),
    }  # fmt: skip
    with np.errstate(all="ignore"):
        expected = ways[form]()
    found = found.view(expected.dtype)
    nan = np.isnan(expected) if expected.dtype.kind == "f" else np.zeros(expected.shape, bool)
    np.testing.assert_array_equal(found[~nan], expected[~nan])


@SEEDS
def test_stores_by_every_lane(run, seed):
    """32 lanes store 16 bytes each, commit a group each and wait for their own."""
    x, y = words(128), np.zeros(128, np.uint32)
    body = f"""
 mul.lo.u32 %r21, %r1, 16; add.u32 %r22, %r6, %r21; cvt.u64.u32 %rd5, %r21; add.s64 %rd6, %rd1, %rd5;
 ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd6]; st.shared.v4.b32 [%r22], {{%r30, %r31, %r32, %r33}};
 fence.proxy.async.shared::cta; add.s64 %rd7, %rd2, %rd5;
 {STORE} [%rd7], [%r22], 16; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
 mov.b32 %r30, 0; st.shared.b32 [%r22], %r30;
"""
    _, y = run(body, x, y, seed=seed)
    np.testing.assert_array_equal(y, x)


# Order -----------------------------------------------------------------------------------------------------


def test_a_store_without_the_proxy_fence(run):
    body = IN.replace("fence.proxy.async.shared::cta;", "") + f" @!%p10 {STORE} [%rd2], [%r6], 128;\n"
    with pytest.raises(ProxyError, match=r"fence\.proxy\.async is missing"):
        run(body + FINISH, words(), words())


def test_a_load_over_data_that_another_warp_may_still_read(run):
    """The load is issued before the reads are known to be over."""
    body = IN + f" @!%p10 {LOAD} [%r6], [%rd1], 128, [%r5]; ld.shared.b32 %r30, [%r22];\n"
    with pytest.raises(RaceError, match="not ordered"):
        run(body + expect(128) + WAIT, words(), words())


# What is refused -------------------------------------------------------------------------------------------

REFUSED = [
    (f"{LOAD} [%r6], [%rd1], 24, [%r5]", "operand size must be a multiple of 16 bytes, got 24"),
    (f"{LOAD} [%r6], [%rd1+8], 32, [%r5]", "operand srcMem: the global address .* is not a multiple of 16"),
    (f"{LOAD} [%r6+4], [%rd1], 32, [%r5]", "operand dstMem: the shared address .* is not a multiple of 16"),
    (f"{LOAD} [%r6+1008], [%rd1], 32, [%r5]", "operand dstMem: the 32 bytes from .* do not end within"),
    (f"{LOAD} [%r6], [%rd1+112], 32, [%r5]", r"the 32 byte\(s\) at .* belong to no registered tensor"),
    (f"{STORE} [%rd2+4], [%r6], 32", "operand dstMem: the global address .* is not a multiple of 16"),
    (f"{STORE} [%rd2], [%r6], 8", "operand size must be a multiple of 16 bytes, got 8"),
    (f"{STORE} [%rd2+112], [%r6], 32", r"the 32 byte\(s\) at .* belong to no registered tensor"),
    ("cp.async.bulk.prefetch.L2.global [%rd1], 8", "operand size must be a multiple of 16 bytes, got 8"),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "message"), REFUSED)
def test_refused(run, instruction, message):
    with pytest.raises(AddressError, match=message) as caught:
        run(IN + f" @!%p10 {instruction};\n", words(), words())
    assert (caught.value.cta, caught.value.warp, caught.value.lane) == ((0, 0, 0), 0, 0)


REDUCE = SEND.replace("cp", "cp.reduce", 1)
UNSUPPORTED = [
    f"{REDUCE}.add.f32 [%r6], [%r6], 16, [%r5]",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.mul.f32 [%rd2], [%r6], 16",
    f"{LOAD}.ignore_oob [%r6], [%rd1], 16, 1, 1, [%r5]",
]


@pytest.mark.parametrize("instruction", UNSUPPORTED)
def test_unsupported(run, instruction):
    with pytest.raises(UnsupportedInstruction, match=r"cp\..* is not emulated"):
        run(f" {instruction};\n", words(), words())
