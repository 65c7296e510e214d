"""Tensor copies in kernels: loads, stores, reductions, multicast, pairs of CTAs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import AddressError, DeadlockError, EmulatorError, UnsupportedInstruction, device
from dsv4lab.emulator.happens_before import RaceError
from dsv4lab.emulator.swizzle import swizzle
from dsv4lab.emulator.tensormap import TensorMap, TensorMapError

SEEDS = range(6)
TILE = 1024  # offset in the dynamic shared memory at which tiles lie; the barrier is at its start
START = """
 mov.u32 %r5, smem; add.s32 %r6, %r5, 1024; cvta.param.u64 %rd4, map;
 setp.ne.s32 %p10, %r1, 0; @%p10 bra INITIALISED;
 mbarrier.init.shared::cta.b64 [%r5], 1; fence.mbarrier_init.release.cluster;
INITIALISED:
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p11, [%r5], 0; @!%p11 bra WAIT;\n"
# Each thread stores the 4 bytes at its place of the tile, `step` threads later again.
COPY_OUT = """
 mov.u32 %r20, %r1;
COPY: setp.ge.u32 %p12, %r20, {words}; @%p12 bra COPIED;
 mul.lo.u32 %r21, %r20, 4; add.u32 %r22, %r6, %r21; ld.shared.b32 %r23, [%r22];
 cvt.u64.u32 %rd20, %r21; add.s64 %rd21, %rd2, %rd20; st.global.b32 [%rd21], %r23;
 add.u32 %r20, %r20, {threads}; bra COPY;
COPIED:
"""
PARAMETERS = ".u64 x, .u64 y, .align 64 .b8 map[128]"
LOAD = "cp.async.bulk.tensor.{n}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.{n}d.global.shared::cta.tile.bulk_group"


def expect(nbytes):
    return f" @!%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {nbytes};\n"


class Kernel:
    """Runs PTX with the tensor x, bytes y and the descriptor `map` of x."""

    def __init__(self, ptx_kernel):
        self.ptx = ptx_kernel

    def __call__(self, body, x, out=4096, arch="sm_100a", seed=0, checks="all", block=128, ctas=1, **fields):
        gpu = device(arch, seed=seed, checks=checks)
        self.x = gpu.from_torch(torch.from_numpy(x))
        self.y = gpu.empty((ctas, out), torch.uint8)
        address = fields.pop("address", self.x.data_ptr())
        self.map = TensorMap(address=address, **fields)
        body = (
            START + ("bar.sync 0;" if ctas == 1 else "barrier.cluster.arrive; barrier.cluster.wait;") + body
        )
        text = self.ptx(body, PARAMETERS, target=arch).replace(".align 16 .b8 smem", ".align 1024 .b8 smem")
        launch = {"grid": (ctas, 1, 1), "cluster": (ctas, 1, 1), "block": (block, 1, 1)}
        descriptor = fields.pop("descriptor", self.map.encode())
        self.run = gpu.run_ptx(text, self.x, self.y, descriptor, shared_bytes=1024 + 16 * 1024, **launch)
        return self.y.numpy()


@pytest.fixture
def kernel(ptx_kernel):
    return Kernel(ptx_kernel)


def numbers(*shape, dtype=np.uint16):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


# Loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_a_box_of_every_rank(kernel, rank):
    """uint16 tensors (..., 4, 4, 16), box 8 by 2 by 2 ... at coordinates (8, 1, 2, 1, 2)."""
    x = numbers(*[4] * (rank - 1), 16)
    at = (8, 1, 2, 1, 2)[:rank]
    box = (8, *[2] * (rank - 1))
    strides = tuple(32 * 4**i for i in range(rank - 1))
    nbytes = 16 * 2 ** (rank - 1)
    coordinates = ", ".join(map(str, at))
    body = expect(nbytes) + f" @!%p10 {LOAD.format(n=rank)} [%r6], [%rd4, {{{coordinates}}}], [%r5];\n"
    y = kernel(
        body + WAIT + COPY_OUT.format(threads=32, words=nbytes // 4),
        x, block=32, element="u16", shape=x.shape[::-1], strides=strides, box=box,
    )  # fmt: skip
    expected = x[tuple(slice(c, c + b) for c, b in zip(at, box, strict=True))[::-1]]
    np.testing.assert_array_equal(y[0, :nbytes].view(np.uint16), expected.reshape(-1))
    assert kernel.run.counters["tma.loads"] == 1
    assert kernel.run.counters["tma.load_bytes"] == nbytes


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("seed", SEEDS)
def test_swizzled_and_partly_outside(kernel, arch, seed):
    """Coordinates in registers, a cache policy, 100 rows of which 30 are inside the tensor."""
    x = numbers(50, 64)
    body = (
        f""" mov.u32 %r10, 0; mov.u32 %r11, 20; mov.b64 %rd9, 0;
{expect(100 * 128)} @!%p10 {LOAD.format(n=2)}.L2::cache_hint [%r6], [%rd4, {{%r10, %r11}}], [%r5], %rd9;
"""
        + WAIT
        + COPY_OUT.format(threads=128, words=100 * 32)
    )
    y = kernel(
        body, x, 100 * 128, arch, seed, element="f16", shape=(64, 50), strides=(128,), box=(64, 100),
        swizzle="128B",
    )  # fmt: skip
    expected = np.zeros((100, 64), np.uint16)
    expected[:30] = x[20:]
    places = swizzle("128B", np.arange(100 * 128))
    np.testing.assert_array_equal(y[0][places], expected.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_data_that_is_not_waited_for(kernel, seed):
    """A read before the barrier's phase is over is a race; unchecked, it finds what was there before."""
    x = numbers(8, 8)
    fields = {"element": "u16", "shape": (8, 8), "strides": (16,), "box": (8, 8), "block": 32}
    load = f" st.shared.b32 [%r6], 77; fence.proxy.async; bar.sync 0; {expect(128)}"
    load += f" @!%p10 {LOAD.format(n=2)} [%r6], [%rd4, {{0, 0}}], [%r5];\n"
    out = " ld.shared.b32 %r23, [%r6]; st.global.b32 [%rd2], %r23;\n"
    y = kernel(load + out + WAIT, x, seed=seed, checks="none", **fields)
    assert y[0, :4].view(np.uint32) == 77
    with pytest.raises(RaceError, match="asynchronous copy signalling the mbarrier"):
        kernel(load + out + WAIT, x, seed=seed, **fields)


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast(kernel, seed):
    """CTA 0 of 4 sends to CTAs 1 and 3: data and completion at the same offsets of both."""
    x = numbers(8, 8)
    body = f"""
 mov.u32 %r7, %cluster_ctarank; and.b32 %r8, %r7, 1; setp.ne.s32 %p5, %r8, 1; @%p5 bra SEND;
{expect(128)}{WAIT}
 mul.lo.u32 %r9, %r7, 4096; cvt.u64.u32 %rd10, %r9; add.s64 %rd2, %rd2, %rd10;
{COPY_OUT.format(threads=32, words=32)}
 bra END;
SEND: setp.ne.s32 %p6, %r7, 0; @%p6 bra END; mov.b16 %rs1, 10;
 @!%p10 {LOAD.format(n=2)}.multicast::cluster [%r6], [%rd4, {{0, 0}}], [%r5], %rs1;
END: barrier.cluster.arrive; barrier.cluster.wait;
"""
    y = kernel(body, x, seed=seed, ctas=4, block=32, element="u16", shape=(8, 8), strides=(16,), box=(8, 8))
    for rank in (1, 3):
        np.testing.assert_array_equal(y[rank, :128].view(np.uint16), x.reshape(-1))
    assert (y[[0, 2]] == 0xFF).all()
    assert kernel.run.counters["tma.load_bytes"] == 128


PAIR = """
 mov.u32 %r7, %cluster_ctarank; and.b32 %r8, %r5, 0xFEFFFFFF; mov.b16 %rs1, {mask};
 setp.ne.s32 %p5, %r7, 1; @%p5 bra WAITING;
 @!%p10 {load} [%r6], [%rd4, {{0, 0}}], [%r8]{operand};
WAITING: setp.ne.s32 %p6, %r7, 0; @%p6 bra END;
 {expect}{wait}
END: barrier.cluster.arrive; barrier.cluster.wait;
 mul.lo.u32 %r9, %r7, 4096; cvt.u64.u32 %rd10, %r9; add.s64 %rd2, %rd2, %rd10;
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("multicast", [False, True])
def test_a_pair_of_ctas_signals_one_barrier(kernel, seed, multicast):
    """CTA 1 loads into its own memory, and with multicast into both, and tells the barrier of CTA 0."""
    x = numbers(8, 8)
    load = LOAD.format(n=2) + (".multicast::cluster" if multicast else "") + ".cta_group::2"
    pair = PAIR.format(
        load=load,
        operand=", %rs1" if multicast else "",
        mask=3,
        expect=expect(256 if multicast else 128),
        wait=WAIT,
    )
    got = "" if multicast else " setp.eq.s32 %p6, %r7, 0; @%p6 ret;\n"
    y = kernel(
        pair + got + COPY_OUT.format(threads=32, words=32), x, seed=seed, ctas=2, block=32, element="u16",
        shape=(8, 8), strides=(16,), box=(8, 8),
    )  # fmt: skip
    for rank in (0, 1) if multicast else (1,):
        np.testing.assert_array_equal(y[rank, :128].view(np.uint16), x.reshape(-1))
    if not multicast:
        with pytest.raises(AddressError, match="mbar lies in the CTA of rank 0 and dstMem in that of rank 1"):
            kernel(
                pair.replace(".cta_group::2", ""), x, ctas=2, block=32, element="u16", shape=(8, 8),
                strides=(16,), box=(8, 8),
            )  # fmt: skip


def test_gather4(kernel):
    """Four rows of a matrix, the last one outside of it."""
    x = numbers(16, 16)
    load = LOAD.format(n=2).replace("tile", "tile::gather4")
    body = expect(64) + f" @!%p10 {load} [%r6], [%rd4, {{8, 5, 2, 9, 16}}], [%r5];\n"
    fields = {"element": "u16", "shape": (16, 16), "strides": (32,), "block": 32}
    y = kernel(body + WAIT + COPY_OUT.format(threads=32, words=16), x, box=(8, 1), **fields)
    found = y[0, :64].view(np.uint16).reshape(4, 8)
    np.testing.assert_array_equal(found, [*x[[5, 2, 9], 8:], np.zeros(8)])
    with pytest.raises(TensorMapError, match="box of one row"):
        kernel(body, x, box=(8, 2), **fields)


# Stores and reductions -------------------------------------------------------------------------------------

# Thread t writes the number t, of 4 bytes, at its place in a tile of 32 by 4, and all wait for it.
FILL = """
 mul.lo.u32 %r21, %r1, 4; add.u32 %r22, %r6, %r21; st.shared.b32 [%r22], %r1;
 fence.proxy.async.shared::cta; bar.sync 0;
"""
MATRIX = {"element": "u32", "shape": (8, 16), "strides": (32,), "box": (8, 16)}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_store(kernel, seed):
    x = np.zeros((16, 8), np.uint32)
    body = FILL + f" @!%p10 {STORE.format(n=2)} [%rd4, {{0, 4}}], [%r6];\n"
    body += " @!%p10 cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\n"
    kernel(body, x, seed=seed, **MATRIX)
    expected = np.zeros((16, 8), np.uint32)
    expected[4:] = numbers(12, 8)
    np.testing.assert_array_equal(kernel.x.numpy(), expected)
    assert kernel.run.counters["tma.stores"] == 1
    assert kernel.run.counters["tma.store_bytes"] == 512


def test_a_store_nobody_waits_for_is_completed(kernel):
    x = np.zeros((16, 8), np.uint32)
    kernel(FILL + f" @!%p10 {STORE.format(n=2)} [%rd4, {{0, 0}}], [%r6];\n", x, **MATRIX)
    np.testing.assert_array_equal(kernel.x.numpy(), numbers(16, 8))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_source_may_change_after_a_wait_for_the_reading(kernel, seed):
    x = np.zeros((16, 8), np.uint32)
    store = (
        FILL + f" @!%p10 {STORE.format(n=2)} [%rd4, {{0, 0}}], [%r6]; @!%p10 cp.async.bulk.commit_group;\n"
    )
    change = " bar.sync 0; st.shared.b32 [%r22], 99;\n"
    kernel(store + " cp.async.bulk.wait_group.read 0;\n" + change, x, seed=seed, **MATRIX)
    np.testing.assert_array_equal(kernel.x.numpy(), numbers(16, 8))
    for wait in ("", " cp.async.bulk.wait_group.read 1;\n"):
        with pytest.raises(RaceError, match="not ordered"):
            kernel(store + wait + change, x, seed=seed, **MATRIX)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_written_is_there_after_a_wait(kernel, seed):
    body = (
        FILL
        + f""" @%p10 bra END; {STORE.format(n=2)} [%rd4, {{0, 0}}], [%r6];
 cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
 ld.global.b32 %r30, [%rd1+508]; st.global.b32 [%rd2], %r30;
END:
"""
    )
    y = kernel(body, np.zeros((16, 8), np.uint32), seed=seed, **MATRIX)
    assert y[0, :4].view(np.uint32) == 127


def test_groups_are_waited_for_in_order(kernel):
    """wait_group 1 after three groups: the first two are read, the last may be changed only later."""
    x = np.zeros((3, 16, 8), np.uint32)
    fields = {"element": "u32", "shape": (8, 16, 3), "strides": (32, 512), "box": (8, 4, 1)}
    stores = "".join(
        f" {STORE.format(n=3)} [%rd4, {{0, 0, {i}}}], [%r6+{128 * i}]; cp.async.bulk.commit_group;\n"
        for i in range(3)
    )
    body = FILL + f" @%p10 bra END;\n{stores} cp.async.bulk.wait_group.read 1;\n"
    for place in (0, 128):
        kernel(body + f" st.shared.b32 [%r6+{place}], 1000;\nEND:\n", x, **fields)
        for i in range(3):
            expected = numbers(16, 8, dtype=np.uint32)[4 * i : 4 * i + 4]
            np.testing.assert_array_equal(kernel.x.numpy()[i, :4], expected)
    with pytest.raises(RaceError):
        kernel(body + " st.shared.b32 [%r6+256], 1000;\nEND:\n", x, **fields)


@pytest.mark.parametrize("operation", ["add", "min", "max", "inc", "dec", "and", "or", "xor"])
def test_reductions(kernel, operation):
    x = (numbers(16, 8, dtype=np.uint32) * 7919) % 200
    form = STORE.format(n=2).replace("cp.async", "cp.reduce.async").replace(".tile", f".{operation}.tile")
    body = FILL + f" @!%p10 {form} [%rd4, {{0, 0}}], [%r6]; cp.async.bulk.commit_group;\n"
    kernel(body + " cp.async.bulk.wait_group 0;\n", x, **MATRIX)
    new = numbers(16, 8, dtype=np.uint32)
    ways = {
        "add": x + new, "min": np.minimum(x, new), "max": np.maximum(x, new), "and": x & new, "or": x | new,
        "xor": x ^ new, "inc": np.where(x >= new, 0, x + 1),
        "dec": np.where((x == 0) | (x > new), new, x - np.uint32(1)),
    }  # fmt: skip
    np.testing.assert_array_equal(kernel.x.numpy(), ways[operation])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_lane_of_a_warp_copies(kernel, seed):
    """Without elect.sync an instruction is executed 32 times: seen on an H200, where a sum was 32-fold."""
    x = np.zeros((16, 8), np.uint32)
    store = f" {STORE.format(n=2)} [%rd4, {{0, 0}}], [%r6];\n"
    wait = " cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\n"
    body = " setp.ge.u32 %p4, %r1, 32; @%p4 bra END;\n{}END:\n"
    add = store.replace("cp.async", "cp.reduce.async").replace(".tile", ".add.tile")
    kernel(FILL + body.format(add + wait), x, seed=seed, **MATRIX)
    np.testing.assert_array_equal(kernel.x.numpy(), 32 * numbers(16, 8, dtype=np.uint32))
    assert kernel.run.counters["tma.stores"] == 32
    kernel(FILL + body.format(store + wait + " st.shared.b32 [%r22], 5;\n"), x, seed=seed, **MATRIX)
    np.testing.assert_array_equal(kernel.x.numpy(), numbers(16, 8))
    assert (kernel.run.counters["tma.stores"], kernel.run.counters["tma.store_bytes"]) == (32, 32 * 512)
    assert kernel.run.trace.of("tma")[0].text == "store of 16 x 8 u32 at (0, 0), by 32 lanes"


def test_a_reduction_that_the_type_does_not_have(kernel):
    form = STORE.format(n=2).replace("cp.async", "cp.reduce.async").replace(".tile", ".min.tile")
    with pytest.raises(EmulatorError, match=r"the reduction min takes elements of .*, got f32"):
        kernel(
            FILL + f" @!%p10 {form} [%rd4, {{0, 0}}], [%r6];\n", numbers(16, 8, dtype=np.float32),
            **(MATRIX | {"element": "f32"}),
        )  # fmt: skip


def test_scatter4(kernel):
    x = np.zeros((16, 16), np.uint32)
    form = STORE.format(n=2).replace("tile", "tile::scatter4")
    body = FILL + f" @!%p10 {form} [%rd4, {{8, 5, 2, 9, 20}}], [%r6]; cp.async.bulk.commit_group;\n"
    kernel(body, x, element="u32", shape=(16, 16), strides=(64,), box=(8, 1))
    expected = np.zeros((16, 16), np.uint32)
    expected[[5, 2, 9], 8:] = numbers(3, 8)
    np.testing.assert_array_equal(kernel.x.numpy(), expected)


def test_a_prefetch_does_nothing(kernel):
    body = " cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd4, {0, 0}]; prefetch.tensormap [%rd4];\n"
    kernel(body, np.zeros((16, 8), np.uint32), **MATRIX)


# Compiled kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_kernel_of_cute_dsl(kernels, arch, seed):
    from cutlass.cute.runtime import from_dlpack

    with device(arch, seed=seed) as gpu:
        source = gpu.from_torch(torch.arange(256 * 96, dtype=torch.float32).reshape(256, 96))
        target = gpu.empty((64, 32))
        kernels.fetch_tile(from_dlpack(source, assumed_align=128), from_dlpack(target))
        counters = gpu.counters
    torch.testing.assert_close(target, source[:64, :32], rtol=0, atol=0)
    assert (counters["tma.loads"], counters["tma.load_bytes"]) == (1, 64 * 32 * 4)


# What is refused -------------------------------------------------------------------------------------------

BOX = LOAD.format(n=2)
LINE = LOAD.format(n=1)
IM2COL = LOAD.format(n=3).replace("tile", "im2col")
MANY = BOX + ".multicast::cluster"
SAVE = STORE.format(n=2)
REFUSED = [
    (BOX + " [%r6+64], [%rd4, {0, 0}], [%r5]", AddressError, "dstMem: the shared .* not a multiple of 128"),
    (BOX + " [%r6], [%rd4, {0, 0}], [%r5+4]", AddressError, "operand mbar: .* multiple of 8"),
    (BOX + " [%r6+16256], [%rd4, {0, 0}], [%r5]", AddressError, "operand dstMem: the 512 bytes from"),
    (BOX + " [%r6], [%rd4+4, {0, 0}], [%r5]", AddressError, "operand tensorMap: .* multiple of 64"),
    (BOX + " [%r6], [%rd4, {2, 0}], [%r5]", TensorMapError, "0 must be a multiple of 4 for u32, got 2"),
    (LINE + " [%r6], [%rd4, {0}], [%r5]", TensorMapError, "of rank 2, the instruction one of 1"),
    (MANY + " [%r6], [%rd4, {0, 0}], [%r5], %rs1", AddressError, "ctaMask 0x6 names CTAs beyond the 1"),
    (BOX + " [%r6], [%rd5, {0, 0}], [%r5]", AddressError, "tensorMap: .* is not in global memory"),
    (BOX + " [%r6], [%rd1, {0, 0}], [%r5]", TensorMapError, "no TMA descriptor"),
    (BOX + " [%r6], [%rd4, {0, 0}], [%r5+8]", EmulatorError, "the mbarrier .* was not initialised"),
    (IM2COL + " [%r6], [%rd4, {0, 0, 0}], [%r5], {%rs1}", UnsupportedInstruction, "im2col"),
    (SAVE + " [%rd4, {0, -1}], [%r6]", TensorMapError, r"of a store must not be negative, got \(0, -1\)"),
    (SAVE + " [%rd4, {0, 0}], [%r6+16]", AddressError, "operand srcMem: .* multiple of 128"),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "error", "message"), REFUSED)
def test_refused(kernel, instruction, error, message):
    body = FILL + " mov.b16 %rs1, 6; cvta.shared.u64 %rd5, 1024;\n"
    body = body.replace("cvta.shared.u64 %rd5, 1024", "mov.b64 %rd6, 1024; cvta.shared.u64 %rd5, %rd6")
    with pytest.raises(error, match=message) as caught:
        kernel(body + f" @!%p10 {instruction};\n", np.zeros((16, 8), np.uint32), **MATRIX)
    assert "PTX line" in str(caught.value)
    if error is not UnsupportedInstruction:
        assert (caught.value.cta, caught.value.warp, caught.value.lane) == ((0, 0, 0), 0, 0)


def test_a_tensor_that_reaches_beyond_its_memory(kernel):
    """An error only where bytes outside are touched."""
    x = np.zeros((16, 8), np.uint32)
    fields = MATRIX | {"shape": (8, 64), "box": (8, 8)}
    for row, good in ((8, True), (9, False)):
        body = expect(256) + f" @!%p10 {LOAD.format(n=2)} [%r6], [%rd4, {{0, {row}}}], [%r5];\n" + WAIT
        if good:
            kernel(body, x, **fields)
        else:
            with pytest.raises(AddressError, match="belong to no registered tensor"):
                kernel(body, x, **fields)


def test_a_wrong_transaction_count(kernel):
    load = f" @!%p10 {LOAD.format(n=2)} [%r6], [%rd4, {{0, 0}}], [%r5];\n"
    with pytest.raises(DeadlockError, match="16 transaction bytes pending"):
        kernel(expect(528) + load + WAIT, np.zeros((16, 8), np.uint32), **MATRIX)


# The timeline ----------------------------------------------------------------------------------------------


def test_trace(kernel):
    body = expect(512) + f" @!%p10 {LOAD.format(n=2)} [%r6], [%rd4, {{0, 0}}], [%r5];\n" + WAIT
    kernel(body, np.zeros((16, 8), np.uint32), block=32, **MATRIX)
    (event,) = kernel.run.trace.of("tma")
    assert (event.cta, event.warp, event.detail["bytes"], event.detail["at"]) == (0, 0, 512, (0, 0))
    assert event.text == "load of 16 x 8 u32 at (0, 0)"
    assert event.end - event.start == 600 + -(-512 // 28)
    (wait,) = kernel.run.trace.of("wait")
    assert wait.end == event.end
