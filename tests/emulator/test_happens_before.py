"""Races and missing proxy fences: worked cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsv4lab.emulator.happens_before import HappensBefore, ProxyError, RaceError, check_same_instruction
from dsv4lab.emulator.vector_clocks import MOST_ACTORS, MOST_SLOTS

LANES = np.arange(32)


def make(**options) -> HappensBefore:
    """Two CTAs of four warps, clusters of one, 4-byte cells."""
    return HappensBefore(**dict(ctas=2, cluster_size=1, warps_per_cta=4, shared_bytes=4096) | options)


def synchronise(order: HappensBefore, warps, key="bar") -> None:
    """__syncthreads."""
    order.release(np.array(warps), key)
    order.complete(key)
    order.acquire(np.array(warps), key)


def lanes_access(order, warps, offsets, write, size=4, mask=None, cta=None, **more) -> None:
    """One instruction of warps; offsets broadcast to (n, 32)."""
    warps = np.array(warps)
    ctas = warps // 4 if cta is None else np.full(len(warps), cta)
    offsets = np.broadcast_to(offsets, (len(warps), 32))
    mask = np.ones((len(warps), 32), bool) if mask is None else mask
    order.access_batch("shared", warps, ctas[:, None], offsets, size, mask, write, **more)


# Warps.


@pytest.mark.parametrize("together", [False, True])
def test_a_missing_syncthreads_is_a_race(together):
    # Warp w writes bytes 128 w to 128 w + 127 of its CTA, then reads those of its neighbour.
    mine = 4 * LANES + 128 * np.arange(4)[:, None]
    order = make()
    for barrier in (True, False):
        lanes_access(order, range(4), mine, True, line=10)
        if barrier:
            synchronise(order, range(4))
            lanes_access(order, range(4), mine[::-1], False, line=11)
            synchronise(order, range(4))
    with pytest.raises(RaceError) as caught:
        if together:
            lanes_access(order, range(4), mine[::-1], False, line=11)
        else:
            order.read("shared", 0, slice(384, 512), order.generic(0, line=11))
    assert str(caught.value) == (
        f"race: shared memory of CTA 0 at offset 0x180 and {127 if together else 31} more cells: "
        "the read by warp 0 of CTA 0 (PTX line 11) and the write by warp 3 of CTA 0 (PTX line 10) are "
        "not ordered: warp 0 of CTA 0 has not waited for a barrier at which warp 3 of CTA 0 arrived after "
        "its write"
    )
    if together:
        assert (caught.value.row, caught.value.lane) == (0, 0)


def test_a_write_over_what_another_warp_still_reads_is_a_race():
    order = make(cta_index=np.array([[0, 0, 0], [5, 1, 0]]))
    lanes_access(order, [4], 4 * LANES, True)
    synchronise(order, [4, 5])
    lanes_access(order, [5], 4 * LANES, False, line=20)
    order.generic(4)
    with pytest.raises(
        RaceError, match=r"memory of CTA \(5, 1, 0\) at offset 0x7c: the write by warp 0 of CTA "
    ) as caught:
        lanes_access(order, [4], 4 * LANES, True, mask=LANES[None] == 31, line=21)
    assert (caught.value.row, caught.value.lane) == (0, 31)
    assert "the read by warp 1 of CTA (5, 1, 0) (PTX line 20)" in str(caught.value)
    synchronise(order, [4, 5])
    lanes_access(order, [4], 4 * LANES, True)


def test_an_arrival_orders_only_what_came_before_it():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    order.release(0, "k")
    lanes_access(order, [0], 4 * LANES + 128, True)
    order.complete("k")
    order.acquire(1, "k")
    lanes_access(order, [1], 4 * LANES, False)
    with pytest.raises(RaceError):
        lanes_access(order, [1], 4 * LANES + 128, False)


def test_an_acquire_sees_only_completed_phases():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    order.release(0, "k")
    order.acquire(1, "k")
    with pytest.raises(RaceError):
        lanes_access(order, [1], 4 * LANES, False)
    order.complete("k")
    order.acquire(1, "k")
    lanes_access(order, [1], 4 * LANES, False)


def test_order_passes_through_a_third_warp():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    for one, two in ((0, 1), (1, 2)):
        order.release(one, ("to", two))
        order.complete(("to", two))
        order.acquire(two, ("to", two))
    lanes_access(order, [2], 4 * LANES, True)
    with pytest.raises(RaceError):
        lanes_access(order, [1], 4 * LANES, False)


def test_rows_of_one_instruction_that_write_one_cell_are_a_race():
    order = make()
    # Two parts of one warp are no race, two warps are, and so are two cells of 4 bytes in 16.
    lanes_access(order, [1, 1], 4 * LANES, True)
    with pytest.raises(RaceError, match="at offset 0x200 and 31 more cells") as caught:
        lanes_access(order, [1, 2], 512 + 4 * LANES, True)
    assert caught.value.row in (0, 1)
    lanes_access(order, [3], 512 + 4 * LANES, False)
    mask = np.array([[3], [4]]) == LANES
    offsets = np.array([[0x440], [0x460]])
    lanes_access(order, [0, 1], offsets, True, size=32, mask=mask)
    with pytest.raises(RaceError, match="at offset 0x480 and 7 more cells: "):
        lanes_access(order, [0, 1], np.array([[0x480], [0x480]]), True, size=32, mask=mask)
    with pytest.raises(RaceError, match="at offset 0x45c: ") as caught:
        lanes_access(order, [0, 1], offsets - 4, False, mask=mask)
    assert (caught.value.row, caught.value.lane) == (1, 4)


def test_the_ctas_of_a_wave_have_memories_of_their_own_and_a_cluster_shares_them():
    order = make()
    lanes_access(order, [0, 4], 4 * LANES, True)
    order = make(cluster_size=2)
    lanes_access(order, [0], 4 * LANES, True)
    lanes_access(order, [4], 4 * LANES, True)
    with pytest.raises(
        RaceError, match=r"memory of CTA 0 .* the read by warp 0 of CTA 1 and the write by warp 0 of CTA 0"
    ):
        lanes_access(order, [4], 4 * LANES, False, cta=0)
    synchronise(order, range(8))
    lanes_access(order, [4, 0], 4 * LANES, False, cta=0)
    with pytest.raises(
        RaceError, match=r"memory of CTA 0 .* the write by warp 0 of CTA 0 and the read by warp 0 of CTA 1"
    ):
        lanes_access(order, [0], 4 * LANES, True)


def test_atomics_meet_each_other_but_not_plain_accesses():
    order = make()
    lanes_access(order, [0, 1], 0, True, atomic=True)
    lanes_access(order, [2], 0, False, atomic=True)
    with pytest.raises(
        RaceError, match="the read by warp 3 of CTA 0 and the atomic write by warp 0 of CTA 0"
    ):
        lanes_access(order, [3], 0, False)
    with pytest.raises(
        RaceError, match="the write by warp 3 of CTA 0 and the atomic read by warp 2 of CTA 0"
    ):
        lanes_access(order, [3], 0, True)
    synchronise(order, [0, 1, 3])
    lanes_access(order, [3], 0, False)
    with pytest.raises(RaceError, match="atomic read by warp 2"):
        lanes_access(order, [3], 0, True)
    with pytest.raises(RaceError, match="the atomic write by warp 0 of CTA 0 and the read by warp 3"):
        lanes_access(order, [0], 0, True, atomic=True)
    lanes_access(order, [0], 0, False, atomic=True)


# Asynchronous operations.


def load(order, stage, barrier=None):
    """A TMA load of a stage of 256 bytes by warp 0; returns the function that performs it."""
    barrier = ("mbarrier", 0, 8 * stage) if barrier is None else barrier
    access = order.asynchronous(0, barrier, what="TMA load", line=30)

    def perform():
        order.write("shared", 0, slice(1024 + 256 * stage, 1280 + 256 * stage), access)
        order.release_access(access, barrier)

    return perform


@pytest.mark.parametrize("consumer_arrives", [True, False])
@pytest.mark.parametrize("consumer", ["warps", "mma"])
def test_a_ring_of_stages(consumer, consumer_arrives):
    order = make()
    stages, rounds = 3, 4

    def consume(stage, turn):
        full, empty = ("mbarrier", 0, 8 * stage), ("mbarrier", 0, 64 + 8 * stage)
        order.complete(full)
        cells = slice(1024 + 256 * stage, 1280 + 256 * stage)
        skip = not consumer_arrives and turn == 1 and stage == 2
        if consumer == "mma":
            order.acquire(1, full)
            operands = order.asynchronous(1, ("tcgen05", 1), in_order=True, line=40)
            order.read("shared", 0, cells, operands)
            if not skip:
                order.release_access(operands, empty)
        else:
            for warp in (1, 2):
                order.acquire(warp, full)
                lanes_access(order, [warp], cells.start + 8 * LANES, False, size=8, line=40)
                if not (skip and warp == 2):
                    order.release(warp, empty)
        order.complete(empty)

    def run():
        for turn in range(rounds):
            for stage in range(stages):
                if turn:
                    order.acquire(0, ("mbarrier", 0, 64 + 8 * stage))
                order.line = 0
                load(order, stage)()
                consume(stage, turn)

    if consumer_arrives:
        run()
        return
    reader = "tcgen05 operation issued by warp 1" if consumer == "mma" else "warp 2"
    with pytest.raises(RaceError) as caught:
        run()
    assert str(caught.value).startswith(
        "race: shared memory of CTA 0 at offset 0x600 and 63 more cells: the write by the TMA load "
        "signalling the mbarrier at 0x10 of CTA 0 (PTX line 30) and the read by "
    )
    assert f"{reader} of CTA 0 (PTX line 40) are not ordered: warp 0 of CTA 0 has not waited" in str(
        caught.value
    )


def test_a_load_over_a_stage_that_is_still_read_is_a_race():
    order = make()
    load(order, 0)()
    order.complete(("mbarrier", 0, 0))
    order.acquire(1, ("mbarrier", 0, 0))
    order.read("shared", 0, slice(1024, 1280), order.generic(1, line=41))
    with pytest.raises(RaceError) as caught:
        load(order, 0)()
    assert str(caught.value).endswith(
        "warp 0 of CTA 0 has not waited before issuing its operation for a barrier at which warp 1 of CTA 0 "
        "arrived after its read"
    )


@pytest.mark.parametrize("at_once", [False, True])
def test_two_loads_into_the_same_bytes_in_one_phase_are_a_race(at_once):
    order = make()
    first = load(order, 1)
    if at_once:
        second = load(order, 1)
        first()
    else:
        first()
        second = load(order, 1)
    with pytest.raises(
        RaceError, match="has not waited for the completion of the earlier operation before issuing"
    ):
        second()
    order.complete(("mbarrier", 0, 8))
    order.acquire(0, ("mbarrier", 0, 8))
    load(order, 1)()


def test_two_loads_of_one_barrier_that_finish_in_any_order():
    order = make()
    first, second = load(order, 1, "full"), load(order, 2, "full")
    second()
    order.complete("full")
    order.acquire(1, "full")
    first()
    order.read("shared", 0, slice(1536, 1792), order.generic(1))
    with pytest.raises(RaceError):
        order.read("shared", 0, slice(1280, 1536), order.generic(1))
    order.complete("full")
    order.acquire(1, "full")
    order.read("shared", 0, slice(1280, 1536), order.generic(1))


def test_a_read_without_waiting_for_the_load_is_a_race():
    order = make()
    load(order, 0)()
    for warp in (0, 1):
        with pytest.raises(
            RaceError,
            match=f"warp {warp} of CTA 0 has not waited for the completion of the earlier operation",
        ):
            order.read("shared", 0, np.array([1028]), order.generic(warp))


@pytest.mark.parametrize("store_first", [True, False])
def test_a_write_behind_the_back_of_an_operation_is_a_race_in_either_order(store_first):
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    order.fence_async(0)
    store = order.asynchronous(0, ("bulk", 0), what="TMA store")
    steps = [
        lambda: order.read("shared", 0, slice(0, 128), store),
        lambda: lanes_access(order, [0], 4 * LANES, True),
    ]
    first, second = steps if store_first else steps[::-1]
    first()
    with pytest.raises(RaceError) as caught:
        second()
    assert str(caught.value).endswith(
        "warp 0 of CTA 0 has not waited for the completion of the earlier operation"
        if store_first
        else "warp 0 of CTA 0 did the write after issuing the operation, whose end it did not wait for"
    )


def test_an_operation_may_touch_its_cells_twice():
    order = make()
    access = order.asynchronous(0, "k")
    for cells in (slice(0, 64), slice(32, 96), np.arange(0, 96, 4)):
        order.write("shared", 0, cells, access)
        order.read("shared", 0, cells, access)
        order.write("shared", 0, cells, access, atomic=True)


def test_operations_in_order_follow_each_other_and_what_their_issuers_knew():
    order = make()
    full = slice(0, 64)
    load_access = order.asynchronous(0, "full")
    order.write("shared", 0, full, load_access)
    order.release_access(load_access, "full")
    order.complete("full")
    order.acquire(1, "full")
    first = order.asynchronous(1, "pipe", in_order=True)
    # Warp 2 has not waited for the load, but its operation comes behind one that did.
    second = order.asynchronous(2, "pipe", in_order=True)
    order.write("tensor", 0, (slice(0, 128), slice(0, 64)), first)
    order.read("shared", 0, full, second)
    order.write("tensor", 0, (slice(0, 128), slice(0, 64)), second)
    order.release_access(second, "done")
    order.complete("done")
    order.acquire(3, "done")
    order.read("tensor", 0, np.arange(64), order.generic(3))


def test_an_accumulator_read_before_the_commit_is_waited_for_is_a_race():
    order = make()
    mma = order.asynchronous(1, ("tcgen05", 1), in_order=True, what="tcgen05.mma", line=50)
    order.write("tensor", 0, (slice(0, 128), slice(32, 96)), mma)
    for _ in range(2):
        order.read("tensor", 0, (slice(0, 128), slice(32, 96)), mma)
        order.write("tensor", 0, (slice(0, 128), slice(32, 96)), mma)
    order.release_access(mma, ("mbarrier", 0, 8))
    warp = order.asynchronous(2, ("tcgen05.ld", 2), what="tcgen05.ld", line=51)
    cells = (np.arange(64, 96)[:, None] * 512 + np.arange(48, 64)).T
    for cells_of in (cells, (slice(64, 96), slice(48, 64))):
        with pytest.raises(RaceError) as caught:
            order.read("tensor", 0, cells_of, warp)
        assert str(caught.value) == (
            "race: tensor memory of CTA 0 at lane 64, column 48 and 511 more cells: the read by the "
            "tcgen05.ld issued by warp 2 of CTA 0 (PTX line 51) and the write by the tcgen05.mma issued by "
            "warp 1 of CTA 0 (PTX line 50) are not ordered: warp 2 of CTA 0 has not waited for the "
            "completion of the earlier operation before issuing its operation"
        )
    order.read("tensor", 0, (slice(64, 96), slice(96, 128)), warp)
    order.complete(("mbarrier", 0, 8))
    order.acquire(2, ("mbarrier", 0, 8))
    order.read("tensor", 0, cells, order.asynchronous(2, ("tcgen05.ld", 2)))


# Proxies.


@pytest.mark.parametrize("fence", ["none", "writer", "reader", "too early", "another warp"])
def test_a_store_through_tma_needs_a_fence(fence):
    order = make()
    if fence == "too early":
        order.fence_async(np.array([0, 1]))
    lanes_access(order, [0, 1], 4 * LANES + np.array([[0], [128]]), True, line=60)
    if fence == "writer":
        order.fence_async(np.array([0, 1]))
    if fence == "another warp":
        order.fence_async(2)
    synchronise(order, range(4))
    if fence == "reader":
        order.fence_async(3)
    store = order.asynchronous(3, ("bulk", 3), what="TMA store", line=61)
    if fence in ("writer", "reader"):
        order.read("shared", 0, slice(0, 256), store)
        return
    with pytest.raises(ProxyError) as caught:
        order.read("shared", 0, slice(0, 256), store)
    assert str(caught.value) == (
        "shared memory of CTA 0 at offset 0x0 and 63 more cells: the read by the TMA store issued by "
        "warp 3 of CTA 0 (PTX line 61) goes through the async proxy and may not see the write by warp 0 of "
        "CTA 0 (PTX line 60), which went through the generic proxy: a fence.proxy.async is missing between "
        "them"
    )


def test_a_fence_in_between_counts_and_travels_with_the_order():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    synchronise(order, [0, 1], "first")
    order.fence_async(1)
    synchronise(order, [1, 2], "second")
    order.read("shared", 0, slice(0, 128), order.asynchronous(2, "bulk"))


def test_a_fence_travels_with_an_operation():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    order.fence_async(0)
    load(order, 0)()
    order.complete(("mbarrier", 0, 0))
    order.acquire(1, ("mbarrier", 0, 0))
    order.read("shared", 0, slice(0, 128), order.asynchronous(1, "bulk"))


def test_tensor_memory_needs_no_fence():
    order = make()
    order.write("tensor", 0, slice(0, 64), order.generic(0))
    order.read("tensor", 0, slice(0, 64), order.asynchronous(0, "pipe"))


def test_a_fence_does_not_cover_what_follows_it():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    order.fence_async(0)
    lanes_access(order, [0], 4 * LANES + 128, True)
    store = order.asynchronous(0, "bulk")
    order.read("shared", 0, slice(0, 128), store)
    with pytest.raises(ProxyError, match=r"offset 0x80 and 31 more"):
        order.read("shared", 0, slice(0, 256), store)


def test_a_fence_alone_orders_nothing():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    order.fence_async(0)
    order.fence_async(1)
    with pytest.raises(RaceError):
        order.read("shared", 0, slice(0, 128), order.asynchronous(1, "bulk"))


def test_a_load_over_generic_writes_needs_a_fence_and_over_generic_reads_none():
    order = make()
    lanes_access(order, [0], 4 * LANES, True)
    with pytest.raises(ProxyError):
        order.write("shared", 0, slice(0, 128), order.asynchronous(0, "full"))
    order.fence_async(0)
    first = order.asynchronous(0, "full")
    order.write("shared", 0, slice(0, 128), first)
    order.release_access(first, "full")
    order.complete("full")
    order.acquire(0, "full")
    lanes_access(order, [0], 4 * LANES, False)
    order.write("shared", 0, slice(0, 128), order.asynchronous(0, "full"))


def test_cp_async_writes_through_the_generic_proxy():
    for fence in (True, False):
        order = make()
        copy = order.asynchronous(0, ("cp.async", 0), proxy="generic")
        order.write("shared", 0, slice(0, 128), copy)
        order.release_access(copy, "group")
        order.complete("group")
        order.acquire(0, "group")
        lanes_access(order, [0], 4 * LANES, False)
        if fence:
            order.fence_async(0)
            order.read("shared", 0, slice(0, 128), order.asynchronous(0, "wgmma", in_order=True))
        else:
            with pytest.raises(
                ProxyError, match=r"the write by the cp\.async operation issued by warp 0 of CTA 0"
            ):
                order.read("shared", 0, slice(0, 128), order.asynchronous(0, "wgmma", in_order=True))


def test_each_check_can_be_left_out():
    for checks in ({"race"}, {"proxy"}, set()):
        order = make(checks=checks)
        lanes_access(order, [0], 4 * LANES, True)
        if "race" not in checks:
            lanes_access(order, [0, 1], 128 + 4 * LANES, True)
            lanes_access(order, [1], 4 * LANES, False)
            order.read("shared", 0, slice(0, 128), order.generic(2))
        store = order.asynchronous(0, "bulk")
        if "proxy" in checks:
            with pytest.raises(ProxyError):
                order.read("shared", 0, slice(0, 128), store)
            order.fence_async(0)
        order.read("shared", 0, slice(0, 128), order.asynchronous(0, "bulk"))


# Cells.


@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16])
def test_offsets_become_cells(granularity):
    order = make(granularity=granularity)
    write, read = order.generic(0), order.generic(1)
    order.write("shared", 0, slice(48, 64), write)
    order.write("shared", 0, np.array([256, 512]), write, size=32)
    order.write("shared", 0, np.arange(1024, 2048).reshape(2, 512), write)
    inside = [48, 63, 256, 287, 512, 543, 1024, 1500, 2047]
    outside = [47, 64, 255, 288, 511, 544, 1023, 2048]
    for offset, cells in itertools.product(inside + outside, ("slice", "array", "lane")):
        where = slice(offset, offset + 1) if cells == "slice" else np.array([offset])
        try:
            if cells == "lane":
                lanes_access(order, [1], offset, False, size=1, mask=LANES[None] == 7)
            else:
                order.read("shared", 0, where, read)
            raced = False
        except RaceError as error:
            raced = True
            assert f"at offset {offset // granularity * granularity:#x}: " in str(error)
        assert raced == (offset in inside), (offset, cells)
    order.read("shared", 0, slice(64, 64), read)
    order.write("shared", 0, np.zeros(0, np.int64), read)
    lanes_access(order, [1], 48, False, mask=np.zeros((1, 32), bool))


def test_scattered_offsets_that_share_cells_are_found():
    order = make(granularity=16)
    order.write("shared", 0, np.concatenate([np.arange(256, 512), np.arange(2048, 2560)]), order.generic(0))
    for cells in (slice(0, 256), slice(512, 2048), slice(2560, 4096)):
        order.read("shared", 0, cells, order.generic(1))
    for cells in (slice(500, 520), np.arange(2400, 3000), np.array([2559]), np.array([256])):
        with pytest.raises(RaceError):
            order.read("shared", 0, cells, order.generic(1))


def test_many_readers_of_one_cell_are_all_remembered():
    order = HappensBefore(ctas=1, cluster_size=1, warps_per_cta=32, shared_bytes=1024)
    tokens = [order.asynchronous(w % 32, ("pipe", w), in_order=True) for w in range(80)]
    for w in range(32):
        order.access_batch(
            "shared", np.array([w]), np.zeros((1, 1), int), 4 * LANES[None], 4, LANES[None] >= 0, False
        )
    for token in tokens:
        order.read("shared", 0, slice(64, 256), token)
    synchronise(order, range(32))
    for w, token in enumerate(tokens):
        if w != 41:
            order.release_access(token, "all")
    order.complete("all")
    order.acquire(0, "all")
    lanes_access(order, [0], 4 * LANES, True, mask=LANES[None] < 16)
    for attempt in (
        lambda: lanes_access(order, [0], 4 * LANES, True, mask=LANES[None] >= 8),
        lambda: order.write("shared", 0, slice(32, 128), order.generic(0)),
    ):
        with pytest.raises(RaceError, match=r"at offset 0x40 .* by the pipe operation issued by warp 9 of"):
            attempt()
    order.release_access(tokens[41], "all")
    order.complete("all")
    order.acquire(0, "all")
    lanes_access(order, [0], 4 * LANES, True)


def test_actors_are_followed_while_there_are_few_enough():
    order = HappensBefore(ctas=1, cluster_size=1, warps_per_cta=2, shared_bytes=1024)
    room = order.clocks.actors
    for _ in range(2 * room):
        order.release_access(order.asynchronous(0, "one at a time"), "key")
    assert order.clocks.actors == room
    order.write("shared", 0, slice(8, 12), order.generic(0))
    first, second = (order.asynchronous(0, key) for key in ("first", "second"))
    order.write("shared", 0, slice(0, 4), first)
    order.write("shared", 0, slice(4, 8), second)
    order.release_access(first, "first")
    order.complete("first")
    order.acquire(0, "first")
    # Clocks of before there was more room still count.
    for _ in range(4 * MOST_SLOTS):
        order.asynchronous(0, "many at once")
    assert room < order.clocks.actors < 3 * MOST_SLOTS
    order.read("shared", 0, slice(0, 4), order.generic(0))
    order.release_access(second, "second")
    order.complete("second")
    order.acquire(1, "second")
    order.read("shared", 0, slice(8, 12), order.generic(1))
    with pytest.raises(RaceError):
        order.read("shared", 0, slice(4, 8), order.generic(0))
    order.acquire(0, "second")
    order.read("shared", 0, slice(4, 8), order.generic(0))
    with pytest.raises(RuntimeError, match=f"at most {MOST_ACTORS} warps and channels"):
        for i in range(MOST_ACTORS):
            order.asynchronous(0, i)


def test_lines_and_arguments():
    order = make()
    order.line = 77
    order.write("shared", 0, slice(0, 4), order.generic(0))
    with pytest.raises(
        RaceError, match=r"by warp 1 of CTA 0 \(PTX line 78\) .* by warp 0 of CTA 0 \(PTX line 77\)"
    ):
        order.read("shared", 0, slice(0, 4), order.generic(1, line=78))
    order.line = 0
    with pytest.raises(RaceError, match=r"the read by warp 1 of CTA 0 and the write by warp 0"):
        order.read("shared", 0, slice(0, 4), order.generic(1))
    with pytest.raises(ValueError, match="granularity must be 1, 2, 4, 8 or 16, got 3"):
        make(granularity=3)
    with pytest.raises(ValueError, match="ctas must be a multiple of cluster_size 4, got 2"):
        make(cluster_size=4)
    with pytest.raises(ValueError, match=r'proxy must be "async" or "generic", got .tma.'):
        order.asynchronous(0, "k", proxy="tma")


def test_lanes_of_one_instruction_store_one_value_to_one_address():
    cells = np.array([8, 4, 0, 4])
    check_same_instruction(cells, np.array([1, 2, 3, 2], np.uint32))
    with pytest.raises(RaceError, match="different values, 0x00000002 and 0x00000005, to one address"):
        check_same_instruction(cells, np.array([1, 2, 3, 5], np.uint32))
    nan = np.full(4, complex(np.nan, np.nan))
    HappensBefore.check_same_instruction(cells, nan)
    with pytest.raises(RaceError):
        check_same_instruction(cells, np.stack([np.ones(4), np.arange(4.0)], axis=1))
    check_same_instruction(np.arange(32), np.arange(32))
    check_same_instruction(np.zeros(0, int), np.zeros(0))
