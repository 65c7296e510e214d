"""shfl, vote, match, redux, elect, activemask: worked values, random ones against loops, lanes that part."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from dsv4lab.emulator import DeadlockError, UninitialisedError, UnsupportedInstruction, device
from dsv4lab.emulator.convergence import Convergence, ConvergenceError, together

FULL = 0xFFFFFFFF
LANES = range(32)
SEEDS = pytest.mark.parametrize("seed", range(4))


@pytest.fixture
def run(ptx_kernel):
    """run(body, *inputs): lanes have inputs[i] in %r(2 + i); returns what %r100, %r101, ... become."""

    def run_(body, *inputs, results=1, block=32, seed=0, checks="all", arch="sm_100a"):
        inputs = [np.broadcast_to(np.asarray(x, np.int64), block) for x in inputs]
        x = torch.from_numpy(np.stack([*inputs, np.zeros(block)]).astype(np.uint32).view(np.int32))
        gpu = device(arch, seed=seed, checks=checks)
        y = gpu.empty((results, block), dtype=torch.int32)
        y.fill_(-1)
        loads = "".join(
            f" add.s64 %rd4, %rd1, %rd3; ld.global.b32 %r{2 + i}, [%rd4+{4 * block * i}];\n"
            for i in range(len(inputs))
        )
        stores = "".join(
            f" add.s64 %rd4, %rd2, %rd3; st.global.b32 [%rd4+{4 * block * i}], %r{100 + i};\n"
            for i in range(results)
        )
        text = ptx_kernel(f"{loads} mov.u32 %r100, -7; mov.u32 %r101, -7;\n{body}\nEND:\n{stores}")
        gpu.run_ptx(text.replace("sm_100a", arch), gpu.from_torch(x), y, block=(block, 1, 1))
        found = [row.astype(np.uint32).tolist() for row in y.numpy()]
        return found[0] if results == 1 else found

    return run_


PREDICATE = " selp.b32 %r101, 1, 0, %p1;"


# shfl ------------------------------------------------------------------------------------------------------


def slow_shfl(mode: str, a, b, c) -> tuple[list[int], list[int]]:
    """The pseudocode of the PTX ISA, lane by lane."""
    values, inside = [], []
    for lane in LANES:
        distance, clamp, segment = b[lane] & 0x1F, c[lane] & 0x1F, c[lane] >> 8 & 0x1F
        highest = (lane & segment) | (clamp & ~segment & 0x1F)
        lowest = lane & segment
        if mode == "up":
            j = lane - distance
            ok = j >= highest
        elif mode == "down":
            j = lane + distance
            ok = j <= highest
        elif mode == "bfly":
            j = lane ^ distance
            ok = j <= highest
        else:
            j = lowest | (distance & ~segment & 0x1F)
            ok = j <= highest
        values.append(a[j if ok else lane])
        inside.append(int(ok))
    return values, inside


def test_shfl_worked_values(run):
    lane = list(LANES)
    shift = [0, *range(31)]
    assert run("shfl.sync.up.b32 %r100, %r2, 1, 0, -1;", lane) == shift
    assert run("shfl.sync.down.b32 %r100, %r2, 1, 31, -1;", lane) == [*range(1, 32), 31]
    assert run("shfl.sync.bfly.b32 %r100, %r2, 16, 31, -1;", lane) == [*range(16, 32), *range(16)]
    assert run("shfl.sync.idx.b32 %r100, %r2, 5, 31, -1;", lane) == [5] * 32
    # Segments of 8 lanes: a segment mask of 0x18 in bits 8 to 12.
    eighths = [lane // 8 * 8 + 3 for lane in LANES]
    assert run("shfl.sync.idx.b32 %r100, %r2, 3, 0x181f, -1;", lane) == eighths
    found, inside = run(f"shfl.sync.up.b32 %r100|%p1, %r2, 2, 0x1800, -1;{PREDICATE}", lane, results=2)
    assert found == [lane if lane % 8 < 2 else lane - 2 for lane in LANES]
    assert inside == [int(lane % 8 >= 2) for lane in LANES]


def test_a_butterfly_sums_a_warp(run):
    body = "".join(
        f"shfl.sync.bfly.b32 %r3, %r2, {d}, 31, -1; add.s32 %r2, %r2, %r3;\n" for d in (16, 8, 4, 2, 1)
    )
    assert run(body + "mov.u32 %r100, %r2;", list(LANES)) == [496] * 32


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl_of_random_lanes(run, mode):
    rng = np.random.default_rng(len(mode))
    for _ in range(8):
        a, b = rng.integers(0, 1 << 32, (2, 32))
        c = rng.integers(0, 32, 32) | rng.choice([0, 16, 24, 28, 30, 31], 32) << 8
        body = f"shfl.sync.{mode}.b32 %r100|%p1, %r2, %r3, %r4, -1;{PREDICATE}"
        assert run(body, a, b, c, results=2) == list(slow_shfl(mode, a.tolist(), b.tolist(), c.tolist()))


def test_shfl_into_its_own_source_and_the_sink(run):
    assert run("shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1; mov.u32 %r100, %r2;", list(LANES)) == [
        lane ^ 1 for lane in LANES
    ]
    found = run(f"shfl.sync.up.b32 _|%p1, %r2, 4, 0, -1;{PREDICATE} mov.u32 %r100, %r101;", list(LANES))
    assert found == [0] * 4 + [1] * 28


HALVES = """
 setp.lt.u32 %p2, %r1, 16;
 @%p2 bra LOW;
 shfl.sync.down.b32 %r100, %r2, 1, 31, 0xffff0000;
 bra MEET;
LOW:
 shfl.sync.idx.b32 %r100, %r2, 7, 31, 0xffff;
MEET:
"""


@SEEDS
def test_halves_of_a_warp_shuffle_among_themselves(run, seed):
    found = run(HALVES, list(LANES), seed=seed)
    assert found == [7] * 16 + [*range(17, 32), 31]


def test_a_lane_reads_one_that_does_not_take_part(run):
    wrong = HALVES.replace("idx.b32 %r100, %r2, 7", "idx.b32 %r100, %r2, 20")
    with pytest.raises(
        UninitialisedError, match=r"lane 0 reads lane 20, which does not .* \(lanes 0x0000ffff"
    ):
        run(wrong, list(LANES))
    found = run(wrong, list(LANES), checks=())
    assert found[:16] == list(range(16))  # its own value, where nobody checks


def test_a_lane_reads_one_that_its_mask_does_not_name(run):
    members = [0xFFFF] * 16 + [0xFFFF0000] * 16
    body = "shfl.sync.idx.b32 %r100, %r1, %r3, 31, %r2;"
    assert run(body, members, [5] * 16 + [21] * 16) == [5] * 16 + [21] * 16
    with pytest.raises(UninitialisedError, match="lane 3 reads lane 21, which does not take part"):
        run(body, members, [5, 5, 5, 21] * 4 + [21] * 16)


# Lanes that come one after the other -----------------------------------------------------------------------

# Lanes of %r2 0 come to S at once, lanes of 1 by another branch; lanes of 2 never do, and meet them at T.
PARTED = """
 setp.eq.s32 %p1, %r2, 0;
 @%p1 bra S;
 setp.eq.s32 %p2, %r2, 2;
 @%p2 bra T;
 mov.u32 %r5, 1;
 add.s32 %r5, %r5, 1;
S:
 {instruction}
T:
"""


@SEEDS
def test_lanes_in_different_branches_gather(run, seed):
    rng = np.random.default_rng(seed)
    way = rng.integers(0, 3, 32)
    way[:2] = 0, 1
    named = [lane for lane in LANES if way[lane] < 2]
    members = sum(1 << lane for lane in named)
    values = rng.integers(0, 1000, 32)
    body = PARTED.format(instruction=f"redux.sync.add.s32 %r100, %r3, {members:#x};")
    found = run(body, way, values, seed=seed)
    total = int(sum(values[lane] for lane in named))
    assert found == [total if lane in named else (-7) % 2**32 for lane in LANES]


@SEEDS
def test_results_across_branches_may_replace_operands(run, seed):
    way, value = [lane % 2 for lane in LANES], [100 + lane for lane in LANES]
    body = PARTED.format(instruction="shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;") + " mov.u32 %r100, %r3;"
    assert run(body, way, value, seed=seed) == [100 + (lane ^ 1) for lane in LANES]
    body = PARTED.format(instruction="redux.sync.add.u32 %r3, %r3, %r4;") + " mov.u32 %r100, %r3;"
    assert run(body, way, value, FULL, seed=seed) == [3696] * 32
    body = PARTED.format(instruction="redux.sync.add.u32 %r4, %r3, %r4;") + " mov.u32 %r100, %r4;"
    assert run(body, way, value, FULL, seed=seed) == [3696] * 32
    body = PARTED.format(instruction="shfl.sync.idx.b32 %r4, %r3, %r4, 31, -1;") + " mov.u32 %r100, %r4;"
    assert run(body, way, value, 9, seed=seed) == [109] * 32
    vote = "setp.ne.u32 %p3, %r1, %r1;\n" + PARTED.format(instruction="vote.sync.all.pred %p3, !%p3, -1;")
    assert run(vote + " selp.b32 %r100, 1, 0, %p3;", way, seed=seed) == [1] * 32


@SEEDS
def test_lanes_gather_again_and_again(run, seed):
    # Lanes leave the loop at different times; those that are left form the mask.
    body = """
 mov.u32 %r100, 0; mov.u32 %r5, 0;
LOOP:
 setp.ge.u32 %p1, %r5, %r2;
 @%p1 bra OUT;
 add.s32 %r5, %r5, 1;
 vote.sync.ballot.b32 %r6, %p1, %r3;
 shr.u32 %r3, %r3, 1;
 add.s32 %r100, %r100, 1;
 bra LOOP;
OUT:
"""
    # Lane l goes round 32 - l times, and in round k lanes 0 to 31 - k are left.
    found = run(body, [32 - lane for lane in LANES], FULL, seed=seed)
    assert found == [32 - lane for lane in LANES]


def test_lanes_that_never_come_are_a_deadlock(run):
    way = [lane % 3 for lane in LANES]
    body = PARTED.format(instruction="bar.warp.sync 0xffffffff;")
    with pytest.raises(DeadlockError, match=r"bar.warp.sync.*lanes 0x24924924 of its warp to come there too"):
        run(body, way)


def test_lanes_whose_guard_is_false_cannot_come(run):
    body = "setp.lt.u32 %p1, %r1, 8; @%p1 vote.sync.ballot.b32 %r100, %p1, 0xffff;"
    with pytest.raises(
        ConvergenceError, match=r"lanes 0x0000ffff must execute vote.sync.ballot.b32 .* guard of 0x0000ff00"
    ):
        run(body)
    assert run(body.replace("0xffff", "0xff"))[:9] == [0xFF] * 8 + [(-7) % 2**32]


def test_a_lane_outside_its_own_mask(run):
    with pytest.raises(ConvergenceError, match="mask 0x0000ffff, which does not name it") as caught:
        run("bar.warp.sync 0xffff;")
    assert caught.value.lane == 16


@SEEDS
def test_lanes_that_have_ended_are_not_waited_for(run, seed):
    body = "setp.ge.u32 %p1, %r1, 20; @%p1 ret; vote.sync.ballot.b32 %r100, !%p1, -1;"
    assert run(body, seed=seed) == [0xFFFFF] * 20 + [FULL] * 12


@SEEDS
def test_lanes_that_do_not_exist_are_not_waited_for(run, seed):
    body = "setp.eq.u32 %p1, %r2, %r2; vote.sync.ballot.b32 %r100, %p1, 0xffffffff;"
    assert run(body, 0, block=40, seed=seed) == [FULL] * 32 + [0xFF] * 8


def test_rows_that_are_parts_of_one_warp():
    # Two rows of warp 5 with lanes 0-7 and 8-15, and one of warp 6.
    parts = np.zeros((3, 32), np.bool_)
    parts[0, :8] = parts[1, 8:16] = parts[2] = True
    woken, parked = [], {}
    machine = types.SimpleNamespace(
        alive=np.full(8, FULL, np.uint32), on_exit=[], wake=woken.append, warps_per_cta=8
    )
    batch = types.SimpleNamespace(
        warps=np.array([5, 5, 6]), mask=parts, machine=machine, park=lambda row, *_: parked.update({row: _})
    )
    ins = types.SimpleNamespace(line=3, opcode="vote")
    gather = Convergence(machine).gather
    needed = np.array([0xFFFF, 0xFFFF, FULL], np.uint32)
    assert gather(batch, parts, needed, ins).tolist() == [True, True, True]
    needed[1] = 0x1FFFF
    assert gather(batch, parts, needed, ins).tolist() == [True, False, True]
    assert list(parked) == [1] and not woken

    def total(mask, value):
        assert mask.shape == (2, 32)
        return np.where(mask, value, 0).sum(1)[:, None], value + 1

    value = np.arange(96, dtype=np.int64).reshape(3, 32)
    sums, more = together(batch, parts, total, value)
    assert sums[:, 0].tolist() == [sum(range(8)) + sum(range(40, 48))] * 2 + [sum(range(64, 96))]
    assert more[0, :16].tolist() == [*range(1, 9), *range(41, 49)]


# vote, match, elect, activemask ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "every", "some", "same"),
    [([], 0, 0, 1), ([3], 0, 1, 0), (list(LANES), 1, 1, 1), (list(range(31)), 0, 1, 0)],
)
def test_votes(run, lanes, every, some, same):
    value = [int(lane in lanes) for lane in LANES]
    test = "setp.ne.s32 %p2, %r2, 0; "
    for kind, expected in (("all", every), ("any", some), ("uni", same)):
        body = f"{test} vote.sync.{kind}.pred %p1, %p2, -1; selp.b32 %r100, 1, 0, %p1;"
        assert run(body, value) == [expected] * 32, kind
    ballot = sum(1 << lane for lane in lanes)
    assert run(f"{test} vote.sync.ballot.b32 %r100, %p2, -1;", value) == [ballot] * 32
    assert run(f"{test} vote.sync.ballot.b32 %r100, !%p2, -1;", value) == [FULL ^ ballot] * 32
    # A vote into its own operand.
    body = f"{test} vote.sync.any.pred %p2, %p2, -1; selp.b32 %r100, 1, 0, %p2;"
    assert run(body, value) == [some] * 32


def test_groups_vote_by_their_own_masks(run):
    # Lanes 0-7, 8-15 and 16-31 form groups in one instruction; only lane 9 says yes.
    members = [0xFF] * 8 + [0xFF00] * 8 + [0xFFFF0000] * 16
    body = "setp.eq.u32 %p2, %r1, 9; vote.sync.any.pred %p1, %p2, %r2; selp.b32 %r100, 1, 0, %p1;"
    assert run(body, members) == [0] * 8 + [1] * 8 + [0] * 16


@SEEDS
def test_match(run, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, 32) + (1 << 31)
    masks = [sum(1 << other for other in LANES if values[other] == values[lane]) for lane in LANES]
    assert run("match.any.sync.b32 %r100, %r2, -1;", values) == masks
    wide = "mov.b64 %rd9, {%r3, %r2}; "
    assert run(wide + "match.any.sync.b64 %r100, %rd9, -1;", values, 5) == masks
    body = "match.all.sync.b32 %r100|%p1, %r2, {}; selp.b32 %r101, 1, 0, %p1;"
    assert run(body.format(-1), values, results=2) == [[0] * 32, [0] * 32]
    assert run(body.format(-1), 77, results=2) == [[FULL] * 32, [1] * 32]
    low = [9] * 16 + list(range(16))
    members = [0xFFFF] * 16 + [0xFFFF0000] * 16
    found = run(body.format("%r3"), low, members, results=2)
    assert found == [[0xFFFF] * 16 + [0] * 16, [1] * 16 + [0] * 16]


def test_the_leader_is_the_lowest_lane_of_the_mask(run):
    body = "elect.sync %r100|%p1, {};" + PREDICATE
    assert run(body.format(-1), results=2) == [[0] * 32, [1] + [0] * 31]
    branch = """
 setp.lt.u32 %p2, %r1, 20; @%p2 bra MEET;
 elect.sync %r100|%p1, 0xfff00000; selp.b32 %r101, 1, 0, %p1;
MEET:
"""
    leader, chosen = run(branch, results=2)
    assert leader[20:] == [20] * 12 and chosen[20:] == [1] + [0] * 11
    sunk = "elect.sync _|%p1, -1; selp.b32 %r100, 1, 0, %p1;"
    assert run(sunk) == [1] + [0] * 31


@SEEDS
def test_activemask(run, seed):
    assert run("activemask.b32 %r100;", seed=seed) == [FULL] * 32
    body = "setp.gt.u32 %p1, %r1, 11; @%p1 activemask.b32 %r100;"
    assert run(body, seed=seed)[12:] == [0xFFFFF000] * 20
    assert run("activemask.b32 %r100;", block=35, seed=seed)[32:] == [7] * 3


# redux -----------------------------------------------------------------------------------------------------


@SEEDS
def test_redux_of_integers(run, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 32, 32, np.uint64).astype(np.uint32)
    signed = values.view(np.int32)
    expected = {
        "add.u32": int(values.astype(np.uint64).sum()) % 2**32,
        "add.s32": int(values.astype(np.uint64).sum()) % 2**32,
        "min.u32": int(values.min()),
        "max.u32": int(values.max()),
        "min.s32": int(signed.min()) % 2**32,
        "max.s32": int(signed.max()) % 2**32,
        "and.b32": int(np.bitwise_and.reduce(values)),
        "or.b32": int(np.bitwise_or.reduce(values)),
        "xor.b32": int(np.bitwise_xor.reduce(values)),
    }
    for form, result in expected.items():
        assert run(f"redux.sync.{form} %r100, %r2, -1;", values) == [result] * 32, form
    # Every fourth lane, in four groups of one instruction.
    members = [0x11111111 << lane % 4 for lane in LANES]
    found = run("redux.sync.xor.b32 %r100, %r2, %r3;", values, members)
    groups = [int(np.bitwise_xor.reduce(values[k::4])) for k in range(4)]
    assert found == [groups[lane % 4] for lane in LANES]


NAN, INF, MINUS_ZERO = 0x7FC00123, 0x7F800000, 0x80000000


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        ("min", [bits(2), bits(-3), bits(1)], bits(-3)),
        ("max", [bits(2), bits(-3), bits(1)], bits(2)),
        ("min.abs", [bits(2), bits(-3), bits(-1)], bits(1)),
        ("max.abs", [bits(2), bits(-3), bits(-1)], bits(3)),
        ("min", [0, MINUS_ZERO, 0], MINUS_ZERO),
        ("max", [MINUS_ZERO, 0, MINUS_ZERO], 0),
        ("max", [bits(-2), NAN, bits(-3)], bits(-2)),
        ("min", [INF, NAN, NAN], INF),
        ("max.NaN", [bits(2), NAN, INF], 0x7FFFFFFF),
        ("min.abs.NaN", [bits(2), NAN | MINUS_ZERO, bits(0)], 0x7FFFFFFF),
        ("min", [NAN, NAN, NAN | MINUS_ZERO], 0x7FFFFFFF),
        ("max", [bits(1e-45), 0, bits(-1e-45)], bits(1e-45)),
    ],
)
def test_redux_of_floats(run, form, values, expected):
    lanes = [values[lane % 3] for lane in LANES]
    assert run(f"redux.sync.{form}.f32 %r100, %r2, -1;", lanes) == [expected] * 32


@pytest.mark.parametrize(
    "text",
    [
        "redux.sync.mul.u32 %r100, %r2, -1;",
        "redux.sync.add.f32 %r100, %r2, -1;",
        "redux.sync.min.abs.s32 %r100, %r2, -1;",
        "shfl.sync.left.b32 %r100, %r2, 1, 31, -1;",
        "vote.all.pred %p1, %p2;",
        "match.some.sync.b32 %r100, %r2, -1;",
    ],
)
def test_forms_that_do_not_exist(run, text):
    with pytest.raises(UnsupportedInstruction, match=text.split()[0]):
        run(text, 0)
