"""Warps, lanes and time: what runs when, where parted lanes meet, and what is said when nothing can go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import (
    AddressError,
    DeadlockError,
    EmulatorError,
    InstructionLimitError,
    KernelTrap,
    UninitialisedError,
    UnsupportedInstruction,
    device,
)
from dsv4lab.emulator.batch import Frames, bits_of, mask_of

SEEDS = pytest.mark.parametrize("seed", range(4))


def run(text, *arguments, seed=0, checks="all", **launch):
    gpu = device("sm_100a", seed=seed, checks=checks)
    arguments = [gpu.from_torch(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    done = gpu.run_ptx(text, *arguments, **launch)
    return done, arguments


def lanes(text, count=32, value=-1, **launch):
    """What each thread has stored at y[tid], given x[tid] = tid."""
    x = torch.arange(count, dtype=torch.int32)
    y = torch.full((count,), value, dtype=torch.int32)
    _, (_, y) = run(text, x, y, block=(count, 1, 1), **launch)
    return y.tolist()


STORE = """
 add.s64 %rd10, %rd2, %rd3;
 st.global.b32 [%rd10], %r9;
"""


@SEEDS
def test_lanes_that_part_meet_again(ptx_kernel, seed):
    body = """
 mov.u32 %r9, 0;
 and.b32 %r2, %r1, 3;
 setp.eq.s32 %p1, %r2, 0;
 @%p1 bra A;
 setp.eq.s32 %p2, %r2, 1;
 @%p2 bra B;
 add.s32 %r9, %r9, 7;
 bra MEET;
B:
 add.s32 %r9, %r9, 50;
 bra MEET;
A:
 setp.gt.s32 %p3, %r1, 15;
 @!%p3 bra MEET;
 add.s32 %r9, %r9, 300;
MEET:
 add.s32 %r9, %r9, 1000;
"""
    expected = [1000 + (300 * (t > 15) if t % 4 == 0 else 50 if t % 4 == 1 else 7) for t in range(70)]
    assert lanes(ptx_kernel(body + STORE), 70, seed=seed) == expected


@SEEDS
def test_a_loop_whose_lanes_leave_one_by_one(ptx_kernel, seed):
    body = """
 mov.u32 %r9, 0; mov.u32 %r8, 0;
LOOP:
 setp.ge.u32 %p1, %r8, %r1;
 @%p1 bra OUT;
 add.s32 %r8, %r8, 1;
 and.b32 %r7, %r8, 1;
 setp.eq.u32 %p2, %r7, 1;
 @%p2 bra LOOP;
 add.s32 %r9, %r9, %r8;
 bra LOOP;
OUT:
 add.s32 %r9, %r9, 1;
"""
    expected = [1 + sum(i for i in range(1, t + 1) if i % 2 == 0) for t in range(64)]
    assert lanes(ptx_kernel(body + STORE), 64, seed=seed) == expected


@SEEDS
def test_ctas_of_a_large_cluster_that_end_before_the_others_meet(ptx_kernel, seed):
    body = """
 mov.u32 %r5, %cluster_ctarank; mov.u32 %r6, %ctaid.x; mad.lo.u32 %r7, %r6, 40, %r1;
 mul.wide.u32 %rd3, %r7, 4; mov.u32 %r9, %r5;
 and.b32 %r8, %r5, 3; setp.eq.u32 %p1, %r8, 0; @%p1 bra OUT;
 barrier.cluster.arrive; barrier.cluster.wait;
 add.u32 %r9, %r9, 100;
 barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;
OUT:
"""
    y = torch.full((32 * 40,), -1, dtype=torch.int32)
    launch = {"grid": (32, 1, 1), "cluster": (16, 1, 1), "block": (40, 1, 1)}
    _, (_, y) = run(ptx_kernel(body + STORE), y, y, seed=seed, **launch)
    expected = [r if r % 4 == 0 else r + 100 for r in range(16)]
    assert y.reshape(2, 16, 40).tolist() == [[[e] * 40 for e in expected]] * 2


@SEEDS
def test_warps_that_part_meet_at_barriers_of_their_own(ptx_kernel, seed):
    body = """
 mov.u32 %r4, smem; shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r4; st.shared.b32 [%r5], %r1;
 setp.ge.u32 %p1, %r1, 512;
 @%p1 bra B;
 bar.sync 1, 512; xor.b32 %r6, %r1, 511; bar.sync 0; bra E;
B: bar.sync 2, 512; xor.b32 %r6, %r1, 1023; bar.sync 0;
E: shl.b32 %r6, %r6, 2; add.u32 %r6, %r6, %r4; ld.shared.b32 %r9, [%r6];
"""
    expected = [t ^ (511 if t < 512 else 1023) for t in range(1024)]
    assert lanes(ptx_kernel(body + STORE), 1024, shared_bytes=4096, seed=seed) == expected


@SEEDS
def test_blocks_and_grids_of_three_dimensions(ptx_kernel, seed):
    body = """
 mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y;
 mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1;
 mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ctaid.y; mov.u32 %r12, %ctaid.z;
 mov.u32 %r13, %nctaid.x; mov.u32 %r14, %nctaid.y;
 mad.lo.u32 %r15, %r12, %r14, %r11; mad.lo.u32 %r15, %r15, %r13, %r10;
 mad.lo.u32 %r9, %r15, 30, %r6; mul.wide.u32 %rd3, %r9, 4;
"""
    y = torch.full((24 * 30,), -1, dtype=torch.int32)
    _, (_, y) = run(ptx_kernel(body + STORE), y, y, seed=seed, grid=(2, 3, 4), block=(5, 3, 2))
    assert y.tolist() == list(range(720))


@SEEDS
def test_lanes_that_return_early_are_not_waited_for(ptx_kernel, seed):
    body = """
 mov.u32 %r9, 1;
 setp.lt.u32 %p1, %r1, 10;
 @!%p1 bra SKIP;
 setp.lt.u32 %p2, %r1, 5;
 @%p2 ret;
 mov.u32 %r9, 2;
SKIP:
 add.s32 %r9, %r9, 10;
"""
    expected = [-1] * 5 + [12] * 5 + [11] * 30
    assert lanes(ptx_kernel(body + STORE), 40, seed=seed) == expected


def test_a_loop_left_by_return_in_its_middle(ptx_kernel):
    body = """
 mov.u32 %r8, 0;
LOOP:
 setp.eq.u32 %p1, %r8, %r1;
 mov.u32 %r9, %r8;
 @!%p1 bra ON;
 add.s64 %rd10, %rd2, %rd3;
 st.global.b32 [%rd10], %r9;
 ret;
ON:
 add.s32 %r8, %r8, 1;
 bra LOOP;
"""
    assert lanes(ptx_kernel(body), 96) == list(range(96))


def test_registers_that_swap_in_a_loop(ptx_kernel):
    """Values that pass from register to register must not be overwritten on the way."""
    body = """
 mov.u32 %r4, 1; mov.u32 %r5, 2; mov.u32 %r6, 3; mov.u32 %r8, 0;
LOOP:
 mov.u32 %r7, %r4;
 mov.u32 %r4, %r5;
 mov.u32 %r5, %r6;
 mov.u32 %r6, %r7;
 add.s32 %r8, %r8, 1;
 setp.lt.u32 %p1, %r8, 4;
 @%p1 bra LOOP;
 mad.lo.s32 %r9, %r4, 100, %r6;
 mad.lo.s32 %r9, %r5, 10, %r9;
"""
    # Four turns of three are one turn: 2 3 1.
    assert lanes(ptx_kernel(body + STORE), 64) == [231] * 64


@SEEDS
def test_guards_keep_the_old_value(ptx_kernel, seed):
    body = """
 mov.u32 %r9, 5;
 setp.lt.u32 %p1, %r1, 8;
 @%p1 add.s32 %r9, %r9, 1;
 @!%p1 mov.u32 %r9, %r1;
 @%p1 bra ON;
 setp.lt.u32 %p2, %r1, 20;
 @%p2 add.s32 %r9, %r9, 100;
ON:
"""
    expected = [6 if t < 8 else t + 100 * (t < 20) for t in range(33)]
    assert lanes(ptx_kernel(body + STORE), 33, seed=seed) == expected


@pytest.mark.parametrize("count", [32, 33])
def test_a_guard_keeps_all_bits_of_what_was_computed_before_it(ptx_kernel, count):
    """Signed and unsigned 64 bits must not meet as floats."""
    body = """
 setp.lt.u32 %p1, %r1, 8;
 mov.b64 %rd5, 0x7123456789abcdef;
 add.s64 %rd4, %rd5, 2;
 @%p1 mov.b64 %rd4, 5;
 shr.u64 %rd5, %rd4, 32;
 cvt.u32.u64 %r8, %rd5; cvt.u32.u64 %r9, %rd4;
 xor.b32 %r9, %r9, %r8;
"""
    expected = [5 if t < 8 else (0x71234567 ^ 0x89ABCDF1) - 2**32 for t in range(count)]
    assert lanes(ptx_kernel(body + STORE), count) == expected


def test_brx_goes_to_one_of_many(ptx_kernel):
    body = """
 mov.u32 %r9, 0;
 and.b32 %r2, %r1, 3;
 TABLE: .branchtargets L0, L1, L2, L0;
 brx.idx %r2, TABLE;
L0: mov.u32 %r9, 10; bra END;
L1: mov.u32 %r9, 11; bra END;
L2: mov.u32 %r9, 12;
END: add.s32 %r9, %r9, 100;
"""
    assert lanes(ptx_kernel(body + STORE), 8) == [110, 111, 112, 110] * 2


def test_special_registers(ptx_kernel):
    body = """
 mov.u32 %r2, %tid.y; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %nctaid.x;
 mov.u32 %r6, %laneid; mov.u32 %r7, %ntid.y;
 mad.lo.u32 %r10, %r2, %r3, %r1;
 mul.lo.u32 %r11, %r3, %r7;
 mad.lo.u32 %r10, %r4, %r11, %r10;
 mul.wide.u32 %rd3, %r10, 4;
 mad.lo.u32 %r9, %r5, 1000, %r6;
 mad.lo.u32 %r9, %r2, 100000, %r9;
"""
    y = torch.zeros(3 * 80, dtype=torch.int32)
    _, (_, y) = run(ptx_kernel(body + STORE), y, y, block=(40, 2, 1), grid=(3, 1, 1))
    thread = np.arange(80)
    assert y.reshape(3, 80).tolist() == [(thread // 40 * 100000 + 3000 + thread % 32).tolist()] * 3


def test_cluster_registers(ptx_kernel):
    body = """
 mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %clusterid.x;
 mov.u32 %r6, %cluster_nctarank; mov.u32 %r7, %cluster_ctaid.y;
 mad.lo.u32 %r8, %r3, 4, %r2;
 mul.wide.u32 %rd3, %r8, 4;
 mad.lo.u32 %r9, %r5, 10, %r4;
 mad.lo.u32 %r9, %r6, 100, %r9;
 mad.lo.u32 %r9, %r7, 1000, %r9;
"""
    y = torch.zeros(8, dtype=torch.int32)
    _, (_, y) = run(ptx_kernel(body + STORE), y, y, grid=(4, 2, 1), cluster=(2, 2, 1))
    assert y.tolist() == [400, 401, 410, 411, 1402, 1403, 1412, 1413]


def test_waves_follow_one_another_until_the_grid_is_done(ptx_kernel):
    body = """
 mov.u32 %r2, %ctaid.x;
 mul.wide.u32 %rd3, %r2, 4;
 mov.u32 %r9, %r2;
"""
    y = torch.full((20_000,), -1, dtype=torch.int32)
    done, (_, y) = run(ptx_kernel(body + STORE), y, y, grid=(20_000, 1, 1))
    assert y.tolist() == list(range(20_000))
    assert done.counters["instructions.st"] == 20_000


def test_local_memory_belongs_to_its_lane(ptx_kernel):
    body = """
 .local .align 8 .b8 depot[16];
 mov.u64 %rd5, depot;
 cvta.local.u64 %rd6, %rd5;
 st.local.b32 [%rd5+4], %r1;
 ld.b32 %r9, [%rd6+4];
"""
    assert lanes(ptx_kernel(body + STORE), 64) == list(range(64))


@pytest.mark.parametrize("where", ["global", "shared"])
def test_generic_addresses_reach_global_and_shared_memory(ptx_kernel, where):
    body = {
        "global": " add.s64 %rd7, %rd1, %rd3; ld.b32 %r9, [%rd7];",
        "shared": """
 mov.u32 %r4, smem; shl.b32 %r5, %r1, 2; add.s32 %r4, %r4, %r5; cvt.u64.u32 %rd4, %r4;
 st.shared.b32 [%r4], %r1;
 cvta.shared.u64 %rd7, %rd4; ld.b32 %r9, [%rd7];
""",
    }[where]
    assert lanes(ptx_kernel(body + STORE), 32, shared_bytes=128) == list(range(32))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_vectors_are_loaded_and_stored_whole(ptx_kernel, count):
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    what = f".v{count}" if count > 1 else ""
    group = f"{{{registers}}}" if count > 1 else registers
    body = f"""
 mul.wide.u32 %rd4, %r1, {4 * count};
 add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd2, %rd4;
 ld.global{what}.b32 {group}, [%rd5];
 st.global{what}.b32 [%rd6], {group};
"""
    x = torch.randint(-(2**31), 2**31, (32 * count,), dtype=torch.int64).to(torch.int32)
    done, (x, y) = run(ptx_kernel(body), x, torch.zeros_like(x))
    assert torch.equal(x, y)
    assert done.counters["global.load_bytes"] == done.counters["global.store_bytes"] == 128 * count


@pytest.mark.parametrize(
    ("type_", "expected"), [("s8", -2), ("u8", 254), ("s16", -258), ("u16", 65278), ("b32", 0x7EFCFEFE)]
)
def test_narrow_loads_are_extended_by_their_type(ptx_kernel, type_, expected):
    body = f" add.s64 %rd7, %rd1, %rd3; ld.global.{type_} %r9, [%rd7];"
    x = torch.full((32,), 0x7EFCFEFE, dtype=torch.int32)
    _, (_, y) = run(ptx_kernel(body + STORE), x, torch.zeros_like(x))
    assert y.tolist() == [expected] * 32


@SEEDS
def test_the_seed_decides_the_order_of_conflicting_stores(ptx_kernel, seed):
    """And nothing else: two runs with one seed are equal."""
    body = " mov.u32 %r9, %ctaid.x; atom.global.exch.b32 %r8, [%rd2], %r9;"
    text = ptx_kernel(body)
    results = []
    for _ in range(2):
        y = torch.full((1,), -1, dtype=torch.int32)
        results.append(int(run(text, y, y, seed=seed, grid=(40, 1, 1))[1][1]))
    assert results[0] == results[1] and 0 <= results[0] < 40


# What a kernel must not do.


def failing(text, error, *arguments, **launch):
    with pytest.raises(error) as caught:
        run(text, *arguments, **launch)
    return caught.value


def test_an_access_outside_of_every_tensor_says_where(ptx_kernel):
    x = torch.zeros(40, dtype=torch.int32)
    body = " add.s64 %rd4, %rd1, %rd3;\n ld.global.b32 %r9, [%rd4+64];"
    error = failing(ptx_kernel(body), AddressError, x, x, block=(32, 1, 1), grid=(2, 1, 1))
    assert error.kernel == "k" and error.warp == 0 and error.lane == 24
    assert "ld.global.b32 %r9, [%rd4+64]" in str(error) and "4 bytes after the end of" in str(error)
    text = ptx_kernel(body).splitlines()
    assert text[error.line - 1].strip() == "ld.global.b32 %r9, [%rd4+64];"


def test_a_wild_pointer_is_an_error_and_never_a_crash(ptx_kernel):
    x = torch.zeros(1, dtype=torch.int32)
    for strict in (True, False):
        gpu = device("sm_100a", strict=strict)
        with pytest.raises(AddressError):
            gpu.run_ptx(ptx_kernel(" ld.global.b32 %r9, [%rd1];"), 0x123450000, gpu.from_torch(x))


def test_without_strict_the_process_s_memory_can_be_reached(ptx_kernel):
    outside = torch.arange(32, dtype=torch.int32)
    text = ptx_kernel(" add.s64 %rd4, %rd1, %rd3; ld.global.b32 %r9, [%rd4];" + STORE)
    gpu = device("sm_100a", strict=False)
    y = gpu.empty(32, torch.int32)
    gpu.run_ptx(text, outside, y)
    assert torch.equal(y, outside)
    strict = device("sm_100a")
    with pytest.raises(AddressError, match="belong to no"):
        strict.run_ptx(text, outside, strict.empty(32, torch.int32))


@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_a_misaligned_access_is_an_error(ptx_kernel, space):
    base = {"global": "%rd1", "shared": "%r2", "local": "%rd5"}[space]
    body = f"""
 .local .align 8 .b8 depot[16];
 mov.u64 %rd5, depot; mov.u32 %r2, smem;
 ld.{space}.b32 %r9, [{base}+2];
"""
    x = torch.zeros(32, dtype=torch.int32)
    error = failing(ptx_kernel(body), AddressError, x, x, shared_bytes=64, checks="none")
    assert "aligned" in str(error) and error.lane == 0


@pytest.mark.parametrize("offset", [-2000, 64, 1 << 20, 1 << 26])
def test_shared_memory_has_an_end(ptx_kernel, offset):
    body = f" mov.u32 %r2, smem; st.shared.b32 [%r2+{offset}], %r1;"
    x = torch.zeros(1, dtype=torch.int32)
    assert "shared" in str(failing(ptx_kernel(body), AddressError, x, x, shared_bytes=64))


def test_shared_memory_that_nobody_wrote_is_not_read(ptx_kernel):
    body = """
 mov.u32 %r2, smem; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3;
 setp.ne.u32 %p1, %r1, 5;
 @%p1 st.shared.b32 [%r2], %r1;
 ld.shared.b32 %r9, [%r2];
"""
    x = torch.zeros(1, dtype=torch.int32)
    error = failing(ptx_kernel(body), UninitialisedError, x, x, shared_bytes=128)
    assert error.lane == 5 and "offset 0x414" in str(error)
    run(ptx_kernel(body), x, x, shared_bytes=128, checks="none")


def test_an_endless_loop_ends_at_the_limit(ptx_kernel):
    gpu = device("sm_100a", limit=10_000)
    x = gpu.empty(1)
    with pytest.raises(InstructionLimitError, match="10000"):
        gpu.run_ptx(ptx_kernel("L: add.s32 %r9, %r9, 1; bra L;"), x, x)


def test_a_row_that_waits_keeps_its_operands(ptx_kernel):
    """Lanes that come to a shuffle one after the other, whose result takes the place of its operand."""
    body = """
 mov.u32 %r9, %r1;
 setp.lt.u32 %p1, %r1, 7;
 @%p1 bra A;
 shfl.sync.bfly.b32 %r9, %r9, 8, 31, 0xffffffff;
 bra END;
A:
 shfl.sync.bfly.b32 %r9, %r9, 8, 31, 0xffffffff;
END:
"""
    x = torch.zeros(1, dtype=torch.int32)
    error = failing(ptx_kernel(body), DeadlockError, x, x)
    assert "lanes" in str(error)
    body = """
 setp.ge.u32 %p1, %r1, 32;
 mov.u32 %r9, 5;
 @%p1 bra FEW;
 mov.u32 %r9, %r1;
 shfl.sync.bfly.b32 %r9, %r9, 1, 31, 0xffffffff;
 bra END;
FEW:
 shfl.sync.bfly.b32 %r9, %r9, 1, 31, 0x3;
END:
"""
    assert lanes(ptx_kernel(body + STORE), 34) == [t ^ 1 for t in range(32)] + [5, 5]


def test_a_spinning_warp_does_not_starve_the_one_it_waits_for(ptx_kernel):
    body = """
 setp.ge.u32 %p1, %r1, 32;
 @%p1 bra PRODUCE;
SPIN:
 ld.acquire.gpu.global.b32 %r9, [%rd2];
 setp.ne.s32 %p2, %r9, 7;
 @%p2 bra SPIN;
 bra END;
PRODUCE:
 mov.u32 %r8, 0;
WORK:
 add.s32 %r8, %r8, 1;
 setp.lt.u32 %p3, %r8, 50;
 @%p3 bra WORK;
 mov.u32 %r9, 7;
 st.release.gpu.global.b32 [%rd2], %r9;
END:
"""
    y = torch.zeros(1, dtype=torch.int32)
    _, (_, y) = run(ptx_kernel(body), y, y, block=(64, 1, 1))
    assert y.item() == 7


def test_a_trap_stops_the_launch(ptx_kernel):
    x = torch.zeros(1, dtype=torch.int32)
    error = failing(ptx_kernel(" setp.eq.u32 %p1, %r1, 40; @%p1 trap;"), KernelTrap, x, x, block=(64, 1, 1))
    assert error.warp == 1 and error.cta == (0, 0, 0)


def test_an_unknown_instruction_is_named_before_anything_runs(ptx_kernel):
    y = torch.zeros(32, dtype=torch.int32)
    body = " mov.u32 %r9, 3;" + STORE + " tex.2d.v4.f32.f32 {%f1,%f2,%f3,%f4}, [%rd1, {%f1,%f2}];"
    gpu = device("sm_100a")
    y = gpu.from_torch(y)
    with pytest.raises(
        UnsupportedInstruction, match=r"k: tex\.2d\.v4\.f32\.f32 is not emulated \[PTX line \d+"
    ):
        gpu.run_ptx(ptx_kernel(body), y, y)
    assert y.sum() == 0


def test_a_barrier_that_nobody_else_reaches_is_a_deadlock(ptx_kernel):
    body = """
 setp.ge.u32 %p1, %r1, 32;
 @%p1 bra OTHER;
 bar.sync 1, 64;
OTHER:
 bar.sync 2, 64;
"""
    x = torch.zeros(1, dtype=torch.int32)
    error = failing(ptx_kernel(body), DeadlockError, x, x, block=(64, 1, 1))
    assert "CTA (0, 0, 0) warp 0 waits at PTX line" in str(error) and "bar.sync 1, 64" in str(error)
    assert "warp 1 waits" in str(error) and error.kernel == "k"


def test_arguments_of_a_ptx_launch_are_checked(ptx_kernel):
    gpu = device("sm_100a")
    x = gpu.empty(1)
    with pytest.raises(ValueError, match="2 parameters, got 1"):
        gpu.run_ptx(ptx_kernel(""), x)
    with pytest.raises(ValueError, match="kernel must be one of k"):
        gpu.run_ptx(ptx_kernel(""), x, x, kernel="other")


@pytest.mark.parametrize(
    ("option", "value"), [("checks", ["races"]), ("mma", "fast"), ("limit", 0), ("checks", "some")]
)
def test_options_are_checked(option, value):
    with pytest.raises(ValueError, match=option):
        device("sm_100a", **{option: value})


def test_parameters_are_no_longer_readable_after_the_launch(ptx_kernel):
    gpu = device("sm_100a")
    x = gpu.from_torch(torch.zeros(1, dtype=torch.int64))
    before = len(gpu.memory.registry.extents())
    gpu.run_ptx(ptx_kernel(" mov.b64 %rd4, x; cvta.param.u64 %rd5, %rd4; st.global.b64 [%rd1], %rd5;"), x, x)
    assert len(gpu.memory.registry.extents()) == before
    with pytest.raises(EmulatorError):
        gpu.lookup(int(x), 8)


def test_products_that_ptxas_may_fuse_with_a_sum_are_counted(ptx_kernel):
    body = """
 mov.f32 %f1, 0f3F800000;
 mul.f32 %f2, %f1, %f1; add.f32 %f3, %f2, %f1;
 mul.rn.f32 %f4, %f1, %f1; add.f32 %f5, %f4, %f1;
 mul.f32 %f6, %f1, %f1; sub.rn.f32 %f7, %f6, %f1;
 mul.f32 %f8, %f1, %f1; mov.f32 %f8, %f1; sub.f32 %f9, %f8, %f1;
 mul.f32 %f10, %f1, %f1; sub.f32 %f11, %f1, %f10;
"""
    x = torch.zeros(1)
    done, _ = run(ptx_kernel(body), x, x, block=(64, 1, 1))
    assert done.counters["fusable_mul_add"] == 2 * 2


def test_lane_masks_and_bits():
    bits = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678], np.uint32)
    mask = mask_of(bits)
    assert mask[1].tolist() == [True] + [False] * 31 and mask[2, 31] and mask[3].all()
    assert (bits_of(mask) == bits).all()


def test_frames_are_used_again_and_grow():
    frames = Frames(2)
    first = frames.open(np.array([0, 1, 2]), 5, np.full(3, -1), np.full(3, 6, np.uint32))
    assert len(set(first.tolist())) == 3
    assert not len(frames.arrive(first, np.full(3, 2, np.uint32)))
    assert sorted(frames.arrive(first, np.full(3, 4, np.uint32)).tolist()) == sorted(first.tolist())
    frames.close(first)
    again = frames.open(np.array([7]), 9, np.array([-1]), np.array([1], np.uint32))
    assert again[0] in first
    inner = frames.open(np.array([7]), 8, again, np.array([1], np.uint32))
    assert not len(frames.leave(inner, np.array([1], np.uint32)))
    assert frames.expected[again[0]] == 0
