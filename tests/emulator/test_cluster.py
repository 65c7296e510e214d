"""Addresses in a cluster and clusters taken out of the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import AddressError, UninitialisedError, UnsupportedInstruction, device
from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.happens_before import RaceError
from dsv4lab.emulator.isa.cluster import ClusterLaunchError

SEEDS = pytest.mark.parametrize("seed", range(3))
MEET = "barrier.cluster.arrive; barrier.cluster.wait;"


@pytest.fixture
def run(ptx_kernel):
    """run(body): what each CTA's threads store from %r100; %r5 is the address of smem, %r6 the CTA's rank."""

    def run_(body, ctas=4, block=32, seed=0):
        text = ptx_kernel(f"""
 mov.u32 %r5, smem; mov.u32 %r6, %cluster_ctarank; mad.lo.u32 %r7, %r6, {block}, %r1;
{body}
 mul.wide.u32 %rd3, %r7, 4; add.s64 %rd4, %rd2, %rd3; st.global.b32 [%rd4], %r100;
""")
        gpu = device("sm_100a", seed=seed)
        y = gpu.empty((ctas * block,), dtype=torch.int32)
        launch = {"grid": (ctas, 1, 1), "cluster": (ctas, 1, 1), "block": (block, 1, 1)}
        gpu.run_ptx(text, y, y, shared_bytes=1024, **launch)
        return y.tolist()

    return run_


def each(values) -> list[int]:
    return np.repeat(values, 32).tolist()


# mapa and getctarank ---------------------------------------------------------------------------------------


def test_an_address_in_another_cta(run):
    # Offset 0x400 of rank r is r << 24 | 0x400.
    assert run("mapa.shared::cluster.u32 %r100, %r5, 2;") == each([0x0200_0400] * 4)
    assert run("mapa.shared::cluster.u32 %r100, smem, %r6;") == each([r << 24 | 0x400 for r in range(4)])
    assert run("mapa.shared::cluster.u32 %r100, smem+12, 3;") == each([0x0300_040C] * 4)
    again = "mapa.shared::cluster.u32 %r8, %r5, 3; mapa.shared::cluster.u32 %r100, %r8, 1;"
    assert run(again) == each([0x0100_0400] * 4)
    wide = "cvt.u64.u32 %rd8, %r5; mapa.shared::cluster.u64 %rd9, %rd8, 2; cvt.u32.u64 %r100, %rd9;"
    assert run(wide) == each([0x0200_0400] * 4)
    generic = "cvt.u64.u32 %rd8, %r5; cvta.shared.u64 %rd8, %rd8; mapa.u64 %rd9, %rd8, 1;"
    assert run(f"{generic} shr.u64 %rd9, %rd9, 60; cvt.u32.u64 %r100, %rd9;") == each([1] * 4)
    assert run(f"{generic} cvt.u32.u64 %r100, %rd9;") == each([0x0100_0400] * 4)


def test_the_rank_of_an_address(run):
    assert run("getctarank.shared::cluster.u32 %r100, %r5;") == each(range(4))
    assert run("mapa.shared::cluster.u32 %r8, %r5, 3; getctarank.shared::cluster.u32 %r100, %r8;") == each(
        [3] * 4
    )
    generic = "cvt.u64.u32 %rd8, %r5; cvta.shared.u64 %rd8, %rd8; mapa.u64 %rd9, %rd8, 2;"
    assert run(f"{generic} getctarank.u64 %r100, %rd9;") == each([2] * 4)


@SEEDS
def test_memory_of_the_next_cta(run, seed):
    body = f"""
 add.u32 %r8, %r6, 1; and.b32 %r8, %r8, 3; shl.b32 %r9, %r1, 2; add.u32 %r10, %r5, %r9;
 {{map}}
 {MEET}
 ld.shared.b32 %r100, [%r10];
"""
    found = [(i - 32) % 128 for i in range(128)]
    near = "mapa.shared::cluster.u32 %r11, %r10, %r8; st.shared::cluster.b32 [%r11], %r7;"
    assert run(body.format(map=near), seed=seed) == found
    generic = (
        "cvt.u64.u32 %rd8, %r10; cvta.shared.u64 %rd8, %rd8; mapa.u64 %rd9, %rd8, %r8; st.b32 [%rd9], %r7;"
    )
    assert run(body.format(map=generic), seed=seed) == found


REACHES = {
    "ld": "ld.shared::cluster.b32 %r100, [%r11];",
    "st": "st.shared::cluster.b32 [%r11], %r7;",
    "atom": "atom.shared::cluster.add.u32 %r100, [%r11], 1;",
    "arrive": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12];",
    "st.async": "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r11], %r7, [%r12];",
    "cp.async.bulk": """
 setp.eq.u32 %p4, %r1, 0;
 @%p4 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r11], [%r10], 16, [%r12];""",
}


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_a_cta_that_has_ended_is_out_of_reach(run, reach):
    body = f"""
 shl.b32 %r9, %r1, 4; add.u32 %r10, %r5, %r9; add.u32 %r10, %r10, 64; mov.u32 %r13, 0;
 st.shared.v4.b32 [%r10], {{%r13, %r13, %r13, %r13}}; fence.proxy.async.shared::cta;
 setp.eq.u32 %p2, %r1, 0; @%p2 mbarrier.init.shared.b64 [%r5], 32;
 {MEET}
 mov.u32 %r14, %cluster_ctarank; setp.eq.u32 %p3, %r14, 1; @%p3 ret;
 mapa.shared::cluster.u32 %r11, %r10, 1; mapa.shared::cluster.u32 %r12, %r5, 1;
WORK: add.u32 %r13, %r13, 1; setp.lt.u32 %p1, %r13, 400; @%p1 bra WORK;
 {{reach}}
 barrier.cluster.arrive; barrier.cluster.wait;
"""
    with pytest.raises(
        AddressError, match="CTA rank 1 of the cluster, whose threads have all ended"
    ) as caught:
        run(body.replace("{reach}", reach))
    assert caught.value.cta in ((0, 0, 0), (2, 0, 0), (3, 0, 0)) and caught.value.warp == 0


@pytest.mark.parametrize("rank", [4, 16, 255, 256, 0xFFFFFFFF])
def test_a_rank_outside_the_cluster_reaches_nobody(run, rank):
    with pytest.raises(AddressError, match=r"rank \d+, and the cluster has 4"):
        run(f"mapa.shared::cluster.u32 %r8, %r5, {rank}; st.shared::cluster.b32 [%r8], %r7;")


@pytest.mark.parametrize(
    "text",
    [
        "mapa.shared::cta.u32 %r8, %r5, 1;",
        "mapa.global.u64 %rd8, %rd9, 1;",
        "getctarank.shared::cluster.b32 %r8, %r5;",
        "clusterlaunchcontrol.try_cancel.sync.b128 [%r5], [%r5];",
        "clusterlaunchcontrol.query_cancel.is_taken.pred.b128 %p1, %rq1;",
    ],
)
def test_forms_that_do_not_exist(run, text):
    with pytest.raises(UnsupportedInstruction, match=text.split()[0]):
        run(text)


# clusterlaunchcontrol --------------------------------------------------------------------------------------

# The CTA does its own tile, then those of clusters that it takes: it adds 1 to the tile's counter. The
# response lies at smem, its mbarrier at smem + 16; smem fills an SM, so that each SM holds one CTA.
WORKER = """
 mov.u32 %r5, smem; mov.u32 %r20, %ctaid.x; mov.u32 %r21, %ctaid.y; mov.u32 %r22, 0;
 mov.u32 %r23, %cluster_ctarank; mov.u32 %r26, %cluster_ctaid.x;
 setp.eq.u32 %p1, %r1, 0; setp.eq.and.u32 %p2, %r23, 0, %p1;
 @%p1 mbarrier.init.shared.b64 [%r5+16], 1;
 fence.mbarrier_init.release.cluster; barrier.cluster.arrive; barrier.cluster.wait;
LOOP:
 mad.lo.u32 %r24, %r21, {width}, %r20;
 mul.wide.u32 %rd8, %r24, 4; add.s64 %rd8, %rd8, %rd2;
 @%p1 red.global.add.u32 [%rd8], 1;
 @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5+16], 16;
 barrier.cluster.arrive; barrier.cluster.wait;
 {request}
 and.b32 %r25, %r22, 1;
WAIT:
 mbarrier.try_wait.parity.shared.b64 %p3, [%r5+16], %r25;
 @!%p3 bra WAIT;
 ld.shared.b128 %rq1, [%r5];
 clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, %rq1;
 {query}
 add.u32 %r20, %r20, %r26;
 fence.proxy.async.shared::cta;
 add.u32 %r22, %r22, 1;
 @%p4 bra LOOP;
"""
REQUEST = (
    "@%{p} clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes{all}.b128 "
    "[%r5], [%r5+16];"
)
AXES = "".join(
    f"clusterlaunchcontrol.query_cancel.get_first_ctaid::{axis}.b32.b128 %r2{i}, %rq1;\n"
    for i, axis in enumerate("xy")
)
VECTOR = "@%p4 clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {{%r20, %r21, %r27, _}}, %rq1;"


def tiles(ptx_kernel, grid, cluster, request, query=AXES, seed=0, change=("", "")):
    body = WORKER.format(width=grid[0], request=request, query=query.replace("{{", "{").replace("}}", "}"))
    assert change[0] in body
    gpu = device("sm_100a", seed=seed)
    y = gpu.from_torch(torch.zeros(grid[0] * grid[1], dtype=torch.int32))
    text = ptx_kernel(body.replace(*change))
    done = gpu.run_ptx(
        text, y, y, grid=(*grid, 1), cluster=(*cluster, 1), block=(64, 1, 1), shared_bytes=200_000
    )
    return y.tolist(), done


@SEEDS
@pytest.mark.parametrize("query", [AXES, VECTOR])
def test_ctas_take_clusters_until_none_is_left(ptx_kernel, query, seed):
    found, done = tiles(ptx_kernel, (31, 6), (1, 1), REQUEST.format(p="p1", all=""), query, seed)
    assert found == [1] * 186
    # 148 SMs hold a CTA each; the other 38 tiles are taken.
    assert done.counters["clusters_taken"] == 38


@SEEDS
def test_the_whole_cluster_hears_of_it(ptx_kernel, seed):
    request = REQUEST.format(p="p2", all=".multicast::cluster::all")
    found, done = tiles(ptx_kernel, (44, 5), (2, 1), request, seed=seed)
    assert found == [1] * 220
    assert done.counters["clusters_taken"] == 110 - 74


def test_nothing_is_left_to_take(ptx_kernel):
    found, done = tiles(ptx_kernel, (5, 1), (1, 1), REQUEST.format(p="p1", all=""))
    assert found == [1] * 5
    assert done.counters["clusters_taken"] == 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        # Asked again after the answer that none is left.
        (
            ("@%p4 bra LOOP;", "setp.lt.u32 %p4, %r22, 2; @%p4 bra LOOP;"),
            ClusterLaunchError,
            "must not ask again",
        ),
        # The response over the barrier itself; no word of the 16 bytes.
        (("[%r5], [%r5+16];", "[%r5+16], [%r5+16];"), (BarrierError, RaceError), "0x410"),
        (("[%r5], [%r5+16];", "[%r5+8], [%r5+16];"), AddressError, "0x408 is not aligned to 16 bytes"),
        (
            ("expect_tx.shared.b64 _, [%r5+16], 16;", "shared.b64 _, [%r5+16];"),
            UninitialisedError,
            "which nobody has written",
        ),
        # Something else than a response.
        (
            ("ld.shared.b128 %rq1, [%r5];", "mov.b128 %rq1, {%rd8, %rd2};"),
            ClusterLaunchError,
            "is no response of",
        ),
    ],
)
def test_misuse(ptx_kernel, change, error, match):
    with pytest.raises(error, match=match):
        tiles(ptx_kernel, (5, 1), (1, 1), REQUEST.format(p="p1", all=""), change=change)
