"""Logic, shifts, bit fields, counting and byte permutations against their definitions in the PTX manual."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsv4lab.emulator.isa.registry import UnsupportedInstruction, build

LETTERS = {16: "h", 32: "r", 64: "w"}
FULL = 0xFFFFFFFF


@pytest.fixture
def run(lanes):
    return lanes.execute


def words(bits, seed, count=400):
    rng = np.random.default_rng(seed)
    edges = [0, 1, (1 << bits) - 1, 1 << bits - 1, 0x5555555555555555 % (1 << bits), (1 << bits - 1) - 1]
    some = [
        int(x) >> int(s)
        for x, s in zip(rng.integers(0, 1 << 63, count), rng.integers(0, 40, count), strict=True)
    ]
    return [edges[int(i)] if i < len(edges) else x % (1 << bits)
            for i, x in zip(rng.integers(0, 12, count), some, strict=True)]  # fmt: skip


def amounts(seed, count=400):
    rng = np.random.default_rng(seed)
    return [int(x) for x in rng.choice([*range(70), 255, 256 + 3, FULL], count)]


def signed(value, bits):
    return value - (1 << bits) if value >> bits - 1 else value


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(run, bits):
    x, most = LETTERS[bits], (1 << bits) - 1
    a, b = words(bits, 1), words(bits, 2)
    for op, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        found = run(f"{op}.b{bits} {x}0, {x}1, {x}2", **{f"{x}1": a, f"{x}2": b})
        assert found.tolist() == [function(m, n) for m, n in zip(a, b, strict=True)]
    assert run(f"not.b{bits} {x}0, {x}1", **{f"{x}1": a}).tolist() == [most - m for m in a]
    assert run(f"cnot.b{bits} {x}0, {x}1", **{f"{x}1": a}).tolist() == [int(m == 0) for m in a]


def test_logic_on_predicates(run):
    a, b = [True, True, False, False], [True, False, True, False]
    assert run("and.pred p0, p1, p2", p1=a, p2=b).tolist() == [True, False, False, False]
    assert run("or.pred p0, p1, !p2", p1=a, p2=b).tolist() == [True, True, False, True]
    assert run("xor.pred p0, p1, p2", p1=a, p2=b).tolist() == [False, True, True, False]
    assert run("not.pred p0, p1", p1=a).tolist() == [False, False, True, True]


def test_lop3_does_every_table(run):
    """0xf0, 0xcc and 0xaa run through all eight combinations, so that the result is the table itself."""
    for table in range(256):
        assert run(f"lop3.b32 r0, r1, r2, r3, {table}", r1=[0xF0], r2=[0xCC], r3=[0xAA])[0] & 0xFF == table
        a, b, c = ([x * 0x01010101] for x in (0xF0, 0xCC, 0xAA))
        assert run(f"lop3.b32 r0, r1, r2, r3, {table}", r1=a, r2=b, r3=c)[0] == table * 0x01010101


def test_lop3_worked(run):
    """Tables of the manual: a & b & c, a | b | c, a & b & ~c, (a & b | c) ^ a."""
    a, b, c = words(32, 1), words(32, 2), words(32, 3)
    for table, function in (
        (0x80, lambda a, b, c: a & b & c), (0xFE, lambda a, b, c: a | b | c),
        (0x40, lambda a, b, c: a & b & ~c), (0x1A, lambda a, b, c: (a & b | c) ^ a),
    ):  # fmt: skip
        found = run(f"lop3.b32 r0, r1, r2, r3, {table}", r1=a, r2=b, r3=c)
        assert found.tolist() == [function(*row) & FULL for row in zip(a, b, c, strict=True)]
    value, p = run(
        "lop3.or.b32 r0|p0, r1, r2, r3, 0x80, p4",
        r1=[1, 1, 1],
        r2=[1, 2, 2],
        r3=[1, 1, 1],
        p4=[False, False, True],
    )
    assert value.tolist() == [1, 0, 0]
    assert p.tolist() == [True, False, True]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_clamp(run, bits):
    x = LETTERS[bits]
    a, n = words(bits, 1), amounts(2)
    pairs = list(zip(a, n, strict=True))
    registers = {f"{x}1": a, "r2": n}
    most = (1 << bits) - 1
    assert run(f"shl.b{bits} {x}0, {x}1, r2", **registers).tolist() == [
        m << min(s, 64) & most for m, s in pairs
    ]
    assert run(f"shr.u{bits} {x}0, {x}1, r2", **registers).tolist() == [m >> min(s, 64) for m, s in pairs]
    assert run(f"shr.b{bits} {x}0, {x}1, r2", **registers).tolist() == [m >> min(s, 64) for m, s in pairs]
    found = run(f"shr.s{bits} {x}0, {x}1, r2", **registers)
    assert found.tolist() == [signed(m, bits) >> min(s, 64) & most for m, s in pairs]


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shifts(run, mode):
    a, b, n = words(32, 1), words(32, 2), amounts(3)
    rows = [
        (hi << 32 | lo, min(s, 32) if mode == "clamp" else s & 31) for lo, hi, s in zip(a, b, n, strict=True)
    ]
    registers = {"r1": a, "r2": b, "r3": n}
    left = run(f"shf.l.{mode}.b32 r0, r1, r2, r3", **registers)
    assert left.tolist() == [(both << s) >> 32 & FULL for both, s in rows]
    right = run(f"shf.r.{mode}.b32 r0, r1, r2, r3", **registers)
    assert right.tolist() == [both >> s & FULL for both, s in rows]


def bfe(a, b, c, bits, is_signed):
    """Bit by bit, as in the manual."""
    msb, pos, length = bits - 1, b & 0xFF, c & 0xFF
    sign = a >> min(pos + length - 1, msb) & 1 if is_signed and length else 0
    taken = [(a >> pos + i & 1) if i < length and pos + i <= msb else sign for i in range(bits)]
    return sum(bit << i for i, bit in enumerate(taken))


def bfi(a, b, c, d, bits):
    pos, length = c & 0xFF, d & 0xFF
    for i in range(length):
        if pos + i < bits:
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return b


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(run, bits):
    x = LETTERS[bits]
    a, b, c, d = words(bits, 1), amounts(2), amounts(3), words(bits, 4)
    registers = {f"{x}1": a, "r2": b, "r3": c}
    for kind in "us":
        found = run(f"bfe.{kind}{bits} {x}0, {x}1, r2, r3", **registers)
        assert found.tolist() == [bfe(*row, bits, kind == "s") for row in zip(a, b, c, strict=True)]
    found = run(f"bfi.b{bits} {x}0, {x}1, {x}4, r2, r3", **registers, **{f"{x}4": d})
    assert found.tolist() == [bfi(*row, bits) for row in zip(a, d, b, c, strict=True)]


def test_bit_fields_worked(run):
    assert run("bfe.u32 r0, r1, 8, 4", r1=[0xABCDEF12]).tolist() == [0xF]
    assert run("bfe.s32 r0, r1, 8, 4", r1=[0xABCDEF12]).tolist() == [FULL]
    assert run("bfi.b32 r0, r1, r2, 4, 8", r1=[0xAB], r2=[FULL]).tolist() == [0xFFFFFABF]
    assert run("bmsk.clamp.b32 r0, r1, r2", r1=[4, 0, 31, 32], r2=[8, 32, 5, 1]).tolist() == [
        0xFF0,
        FULL,
        1 << 31,
        0,
    ]
    assert run("bmsk.wrap.b32 r0, r1, r2", r1=[36, 0], r2=[8, 32]).tolist() == [0xFF0, 0]
    assert run("szext.clamp.s32 r0, r1, r2", r1=[0xFF, 0x7F, 0xFF, 5], r2=[8, 8, 40, 0]).tolist() == [
        FULL,
        0x7F,
        0xFF,
        0,
    ]
    assert run("szext.wrap.u32 r0, r1, r2", r1=[0xFFFF, 0xFFFF], r2=[8, 40]).tolist() == [0xFF, 0xFF]


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(run, bits):
    x = LETTERS[bits]
    a = [*words(bits, 1), *(1 << i for i in range(bits)), *((1 << i) - 1 for i in range(bits))]
    registers = {f"{x}1": a}
    assert run(f"popc.b{bits} r0, {x}1", **registers).tolist() == [m.bit_count() for m in a]
    assert run(f"clz.b{bits} r0, {x}1", **registers).tolist() == [bits - m.bit_length() for m in a]
    reverse = [int(f"{m:0{bits}b}"[::-1], 2) for m in a]
    assert run(f"brev.b{bits} {x}0, {x}1", **registers).tolist() == reverse
    for kind in "us":
        flipped = [(1 << bits) - 1 - m if kind == "s" and m >> bits - 1 else m for m in a]
        places = [m.bit_length() - 1 for m in flipped]
        assert run(f"bfind.{kind}{bits} r0, {x}1", **registers).tolist() == [p & FULL for p in places]
        shifts = [bits - 1 - p if p >= 0 else FULL for p in places]
        assert run(f"bfind.shiftamt.{kind}{bits} r0, {x}1", **registers).tolist() == shifts


def fns(mask, base, offset):
    """As the manual's loop."""
    if offset == 0:
        return base if mask >> base & 1 else FULL
    position, count, step = base, 0, 1 if offset > 0 else -1
    while 0 <= position < 32:
        count += mask >> position & 1
        if mask >> position & 1 and count == abs(offset):
            return position
        position += step
    return FULL


def test_find_nth_set(run):
    rng = np.random.default_rng(1)
    masks = words(32, 1)
    bases, offsets = (
        [int(x) for x in rng.integers(low, high, len(masks))] for low, high in ((0, 32), (-6, 7))
    )
    found = run("fns.b32 r0, r1, r2, r3", r1=masks, r2=bases, r3=offsets)
    assert found.tolist() == [fns(*row) for row in zip(masks, bases, offsets, strict=True)]


def prmt(a, b, selector):
    octets = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
    chosen = [octets[selector >> 4 * i & 7] for i in range(4)]
    replicated = [0xFF * (x >> 7) if selector >> 4 * i & 8 else x for i, x in enumerate(chosen)]
    return sum(x << 8 * i for i, x in enumerate(replicated))


def test_permutations(run):
    """Selectors that differ between lanes, that are the same in all, and constants."""
    a, b, c = words(32, 1), words(32, 2), [x & 0xFFFF for x in words(32, 3)]
    rows = list(zip(a, b, c, strict=True))
    assert run("prmt.b32 r0, r1, r2, r3", r1=a, r2=b, r3=c).tolist() == [prmt(*row) for row in rows]
    for selector in (0x5410, 0x7632, 0x3210, 0x0123, 0x7531, 0x5140, 0x7362, 0x4444, 0xBA98, 0x8C19):
        expected = [prmt(m, n, selector) for m, n, _ in rows]
        assert run(f"prmt.b32 r0, r1, r2, {selector}", r1=a, r2=b).tolist() == expected
        assert run("prmt.b32 r0, r1, r2, r3", r1=a, r2=b, r3=[selector] * len(a)).tolist() == expected


# The table of the manual: byte numbers of d.b3 ... d.b0 for each value of c & 3.
MODES = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


@pytest.mark.parametrize(("mode", "c"), list(itertools.product(MODES, range(4))))
def test_permutation_modes(run, mode, c):
    expected = int("".join(f"{16 * int(digit) + 15:02x}" for digit in MODES[mode][c]), 16)
    a, b = [0x3F2F1F0F], [0x7F6F5F4F]
    assert run(f"prmt.b32.{mode} r0, r1, r2, {c}", r1=a, r2=b).tolist() == [expected]
    assert run(f"prmt.b32.{mode} r0, r1, r2, r3", r1=a, r2=b, r3=[c + 4]).tolist() == [expected]


@pytest.mark.parametrize(
    "text", ["and.s32 r0, r1, r2", "shl.s32 r0, r1, r2", "popc.b16 r0, h1", "shf.l.b32 r0, r1, r2, r3"]
)
def test_what_ptx_does_not_have_is_refused(lanes, text):
    with pytest.raises((UnsupportedInstruction, ValueError)):
        build(lanes.parse(text))
