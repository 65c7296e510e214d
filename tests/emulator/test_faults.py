"""What kernels must not do, done by one warp of many: the error names the kernel, CTA, warp, lane and line.

Four CTAs of two warps run the same code in one batch; only in CTA 2 does warp 1, or lane 5 of it, go wrong.
"""

from __future__ import annotations

import pytest
import torch

from dsv4lab.emulator import (
    AddressError,
    DeadlockError,
    EmulatorError,
    KernelTrap,
    UninitialisedError,
    device,
)
from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.convergence import ConvergenceError
from dsv4lab.emulator.happens_before import ProxyError, RaceError
from dsv4lab.emulator.tensor_memory import TensorMemoryError

CTA, WARP, LANE = (2, 0, 0), 1, 5
# %p10: that lane; %p11: that warp; %p12: one lane of each. %r20: smem, %r21: the thread's 64 bytes of it,
# %r22: the warp's 2048; %rd11: the thread's 64 bytes of x, %rd12: its local memory. %r30 and %rd30 are 0 but
# in that lane; %r23, %rd13, %rd12, %rd16 (%r23 as generic address) and %rd17 (%rd12) have them added.
START = """
 .local .align 16 .b8 depot[16];
 mov.u64 %rd12, depot;
 mov.u32 %r2, %ctaid.x; shr.u32 %r3, %r1, 5; mov.u32 %r4, %laneid;
 setp.eq.u32 %p1, %r2, 2; setp.eq.and.u32 %p11, %r3, 1, %p1; setp.eq.and.u32 %p10, %r4, 5, %p11;
 setp.eq.u32 %p12, %r4, 0;
 mov.u32 %r20, smem; mad.lo.u32 %r21, %r1, 64, %r20; mad.lo.u32 %r22, %r3, 2048, %r20;
 mul.wide.u32 %rd11, %r1, 64; add.s64 %rd11, %rd11, %rd1;
 mov.u32 %r31, {narrow}; selp.b32 %r30, %r31, 0, %p10;
 mov.b64 %rd31, {wide}; selp.b64 %rd30, %rd31, 0, %p10;
 add.u32 %r23, %r21, %r30; add.s64 %rd13, %rd11, %rd30; add.s64 %rd12, %rd12, %rd30;
 mov.b64 %rd14, 0; cvt.u64.u32 %rd15, %r23; cvta.shared.u64 %rd16, %rd15; cvta.local.u64 %rd17, %rd12;
"""
CLEAR = "st.shared.v2.b64 [%r21], {%rd14, %rd14}; st.shared.v2.b64 [%r21+16], {%rd14, %rd14}; bar.sync 0;\n"
BARRIER = "@%p12 mbarrier.init.shared.b64 [%r22], 1; bar.warp.sync -1;\n"
ALLOC = """
 setp.ne.u32 %p13, %r3, 0;
 @%p13 bra ON;
 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20], 32;
ON: bar.sync 0; ld.shared.b32 %r12, [%r20]; shl.b32 %r13, %r3, 21; add.u32 %r12, %r12, %r13;
 bar.sync 0;
"""
FREE = """
 bar.sync 0;
 @%p13 bra FREED;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r12, 32;
FREED:
"""
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
BULK_OUT = "cp.async.bulk.global.shared::cta.bulk_group"
FAR = {"narrow": 1 << 20, "wide": 1 << 40}
ODD = {"narrow": 1, "wide": 1}


def fault(text, ptx_kernel, narrow=0, wide=0, checks="all", **launch):
    """The error of a body, and the text of the PTX line that it names."""
    gpu = device("sm_100a", checks=checks)
    x = gpu.from_torch(torch.zeros(1024, dtype=torch.int32))
    source = ptx_kernel(START.replace("{narrow}", str(narrow)).replace("{wide}", str(wide)) + text)
    with pytest.raises(EmulatorError) as caught:
        gpu.run_ptx(source, x, x, grid=(4, 1, 1), block=(64, 1, 1), shared_bytes=4096, **launch)
    error = caught.value
    assert error.kernel == "k" and str(error).startswith("k: ")
    return error, source.splitlines()[error.line - 1] if error.line else ""


def named(error, lane):
    """Whether an error says who did it, in its attributes and in words."""
    who = f"CTA {CTA}, warp {WARP}" + (f", lane {lane}" if lane is not None else "")
    assert (error.cta, error.warp, error.lane) == (CTA, WARP, lane), str(error)
    assert f"k: {who}: " in str(error) and f"[PTX line {error.line}: " in str(error)


ACCESSES = {
    "ld.global": "ld.global.b32 %r9, [%rd13];",
    "ld.global.v8": "ld.global.v8.b32 {%r50, %r51, %r52, %r53, %r54, %r55, %r56, %r57}, [%rd13];",
    "st.global": "st.global.v2.b32 [%rd13], {%r9, %r9};",
    "ld": "ld.b32 %r9, [%rd13];",
    "ld of shared": "ld.b32 %r9, [%rd16];",
    "st of shared": "st.b32 [%rd16], %r9;",
    "st of local": "st.b32 [%rd17], %r9;",
    "ld.shared": "ld.shared.b32 %r9, [%r23];",
    "st.shared": "st.shared.v4.b32 [%r23], {%r9, %r9, %r9, %r9};",
    "ld.local": "ld.local.b32 %r9, [%rd12];",
    "st.local": "st.local.b16 [%rd12], %rs1;",
    "atom.global": "atom.global.add.u32 %r9, [%rd13], 1;",
    "red.global": "red.global.add.u64 [%rd13], 1;",
    "atom.shared": "atom.shared.add.u32 %r9, [%r23], 1;",
    "red.shared": "red.shared.add.u32 [%r23], 1;",
    "atom": "atom.add.u32 %r9, [%rd16], 1;",
    "cp.async from": "cp.async.ca.shared.global [%r21], [%rd13], 16;",
    "cp.async to": "cp.async.ca.shared.global [%r23], [%rd11], 16;",
    "ldmatrix": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r50, %r51, %r52, %r53}, [%r23];",
    "stmatrix": "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r23], {%r50, %r51, %r52, %r53};",
    "mbarrier.init": "mbarrier.init.shared.b64 [%r23], 1;",
    "bulk from": f"@%p10 mbarrier.init.shared.b64 [%r22], 1; @%p10 {BULK} [%r21], [%rd13], 16, [%r22];",
    "bulk to": f"@%p10 mbarrier.init.shared.b64 [%r22], 1; @%p10 {BULK} [%r23], [%rd11], 16, [%r22];",
    "bulk out": f"@%p10 {BULK_OUT} [%rd13], [%r21], 16;",
    "bulk out of": f"@%p10 {BULK_OUT} [%rd11], [%r23], 16;",
}


@pytest.mark.parametrize("wrong", [FAR, ODD], ids=["far", "odd"])
@pytest.mark.parametrize("text", ACCESSES.values(), ids=ACCESSES)
def test_an_address_of_one_lane(text, wrong, ptx_kernel):
    error, line = fault(CLEAR + text, ptx_kernel, **wrong, checks=["initialised"])
    assert isinstance(error, (AddressError, BarrierError))
    assert line.strip() == text.strip()
    named(error, LANE)


OF_LANES = {
    "shared memory nobody wrote": (
        UninitialisedError, "@!%p10 st.shared.b32 [%r21], %r1;\n ld.shared.b32 %r9, [%r21];"),
    "shared memory nobody wrote, copied out": (
        UninitialisedError, f"@%p10 {BULK_OUT} [%rd11], [%r21], 16;"),
    "shared memory nobody wrote, in matrices": (
        UninitialisedError,
        "@!%p10 st.shared.v2.b64 [%r21], {%rd14, %rd14};\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r50, %r51, %r52, %r53}, [%r21];"),
    "two warps, one address": (
        RaceError,
        "setp.eq.u32 %p13, %r1, 0; @%p13 st.shared.b32 [%r20+4], 1;\n@%p10 ld.shared.b32 %r9, [%r20+4];"),
    "a rank outside the cluster": (
        AddressError, "mapa.shared::cluster.u32 %r9, %r21, %r30; @%p10 ld.shared::cluster.b32 %r9, [%r9];"),
    "a cluster barrier waited for before the arrival": (
        BarrierError, "@!%p10 barrier.cluster.arrive; @%p10 barrier.cluster.wait;"),
    "a cluster barrier arrived at twice": (
        BarrierError, "barrier.cluster.arrive; @%p10 barrier.cluster.arrive;"),
    "a trap": (KernelTrap, "@%p10 trap;"),
    "a branch table's end": (
        EmulatorError, "T: .branchtargets L0, L1;\n brx.idx %r30, T;\nL0: add.u32 %r9, %r9, 1;\nL1:"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), OF_LANES.values(), ids=OF_LANES)
def test_what_one_lane_does(kind, text, ptx_kernel):
    error, line = fault(text, ptx_kernel, narrow=9)
    assert isinstance(error, kind)
    assert "%p10" in line or "%r30" in line or line.split()[0] in text.splitlines()[-1]
    named(error, LANE)


OF_WARPS = {
    "two lanes, one address, two values": (
        RaceError, "@%p11 st.shared.b32 [%r20+8], %r1;"),
    "an mbarrier nobody initialised": (
        BarrierError, "@%p11 mbarrier.arrive.shared.b64 _, [%r22];"),
    "an mbarrier that is overwritten": (
        BarrierError, f"{BARRIER} @%p10 st.shared.b64 [%r22], %rd14; bar.warp.sync -1;\n"
        "@%p10 mbarrier.arrive.shared.b64 _, [%r22];"),
    "more arrivals than an mbarrier expects": (
        BarrierError, f"{BARRIER} @%p11 mbarrier.arrive.shared.b64 _, [%r22], 2;"),
    "more bytes than an mbarrier can count": (
        BarrierError, f"{BARRIER} @%p11 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r22], 1048575;\n"
        "@%p11 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r22], 1048575;"),
    "a count that is no multiple of a warp": (
        BarrierError, "@%p11 bar.sync 1, 33;"),
    "a count that others do not name": (
        BarrierError, "selp.b32 %r50, 32, 64, %p11;\nbar.sync 1, 64;\nbar.arrive 2, 64; bar.sync 2, %r50;"),
    "a barrier that does not exist": (
        BarrierError, "selp.b32 %r50, 16, 1, %p11;\nbar.sync %r50, 32;"),
    "lanes kept from a shuffle by their guard": (
        ConvergenceError, "@!%p10 shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;"),
    "tensor memory nobody wrote": (
        UninitialisedError, ALLOC + "@%p11 bra WRONG;\nbra RIGHT;\n"
        "WRONG: tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r12];\nRIGHT:" + FREE),
    "tensor memory nobody allocated": (
        TensorMemoryError, ALLOC + "@%p11 add.u32 %r12, %r12, 32;\n"
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r12], {%r50};" + FREE),
    "tensor memory of another warp's lanes": (
        TensorMemoryError, ALLOC + "@%p11 sub.u32 %r12, %r12, 2097152;\n"
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r12], {%r50};" + FREE),
    "tensor memory that was freed": (
        TensorMemoryError, ALLOC + FREE + "bar.sync 0; @%p11 bra WRONG;\nbra RIGHT;\n"
        "WRONG: tcgen05.st.sync.aligned.32x32b.x1.b32 [%r12], {%r50};\nRIGHT:"),
    "tensor memory that is freed twice": (
        TensorMemoryError, ALLOC + FREE + "bar.sync 0; @%p11 bra WRONG;\nbra RIGHT;\n"
        "WRONG: tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r12, 32;\nRIGHT:"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), OF_WARPS.values(), ids=OF_WARPS)
def test_what_one_warp_does(kind, text, ptx_kernel):
    error, line = fault(text, ptx_kernel)
    assert isinstance(error, kind), str(error)
    assert line
    named(error, error.lane)


def test_generic_writes_that_the_async_proxy_may_not_see(ptx_kernel):
    text = CLEAR + f"@!%p11 fence.proxy.async.shared::cta;\n@%p10 {BULK_OUT} [%rd11], [%r21], 16;"
    error, line = fault(text, ptx_kernel)
    assert isinstance(error, ProxyError) and BULK_OUT in line
    named(error, LANE)


def test_bytes_that_an_mbarrier_still_expects_at_the_end(ptx_kernel):
    text = BARRIER + (
        " @%p10 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r22], 16;\n"
        " @%p10 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r22], 8;"
    )
    error, line = fault(text, ptx_kernel)
    assert isinstance(error, BarrierError) and "wrong transaction count" in str(error)
    assert "expect_tx" in line
    named(error, None)


def test_tensor_memory_that_is_not_freed(ptx_kernel):
    text = ALLOC + " setp.eq.or.u32 %p13, %r2, 2, %p13;" + FREE
    error, line = fault(text, ptx_kernel)
    assert isinstance(error, TensorMemoryError) and "tcgen05.alloc" in line
    assert (error.cta, error.warp) == (CTA, 0) and "k: CTA (2, 0, 0), warp 0: the CTA ends" in str(error)


def test_a_deadlock_names_who_waits_where_for_what(ptx_kernel):
    text = BARRIER.replace(" 1;", " 32;") + (
        " @!%p11 mbarrier.arrive.shared.b64 _, [%r22];\n"
        "WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r22], 0;\n @!%p1 bra WAIT;"
    )
    error, _ = fault(text, ptx_kernel)
    assert isinstance(error, DeadlockError)
    assert "CTA (2, 0, 0) warp 1 waits at PTX line" in str(error) and "mbarrier.try_wait" in str(error)
    assert "shared address 0xc00" in str(error) and "32 of 32 arrivals" in str(error)
    assert "CTA (1, 0, 0)" not in str(error)
