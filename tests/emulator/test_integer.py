"""Integer arithmetic against Python's integers, of every width, and worked values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import device
from dsv4lab.emulator.isa.registry import UnsupportedInstruction, build

TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")
LETTERS = {16: "h", 32: "r", 64: "w"}


@pytest.fixture
def run(lanes):
    return lanes.execute


def width(type_):
    return int(type_[1:])


def wrapped(value, type_):
    """An integer in the range of a type."""
    bits = width(type_)
    value %= 1 << bits
    return value - (1 << bits) if type_[0] == "s" and value >> bits - 1 else value


def samples(type_, seed, count=300):
    """Integers of a type: limits, small ones, any."""
    rng = np.random.default_rng(seed)
    bits = width(type_)
    edges = [0, 1, 2, -1, -2, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits) - 1, 3, 100]
    some = [
        int(x) >> int(s)
        for x, s in zip(rng.integers(0, 1 << 63, count), rng.integers(0, 63, count), strict=True)
    ]
    chosen = [edges[i] for i in rng.integers(0, len(edges), count)]
    return [wrapped(int(a if pick else b) * int(sign), type_) for a, b, pick, sign in
            zip(chosen, some, rng.random(count) < 0.4, rng.choice([1, -1], count), strict=True)]  # fmt: skip


def check(run, opcode, types, result, function):
    """An instruction on samples of its source types against a function of Python's integers."""
    names = [f"{LETTERS[width(t)]}{i}" for i, t in enumerate(types)]
    values = [samples(t, i) for i, t in enumerate(types)]
    found = run(
        f"{opcode} {LETTERS[width(result)]}8, {', '.join(names)}", **dict(zip(names, values, strict=True))
    )
    expected = [function(*row) % (1 << width(result)) for row in zip(*values, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("t", TYPES)
def test_sums_and_products(run, t):
    bits = width(t)
    check(run, f"add.{t}", [t] * 2, t, lambda a, b: a + b)
    check(run, f"sub.{t}", [t] * 2, t, lambda a, b: a - b)
    check(run, f"mul.lo.{t}", [t] * 2, t, lambda a, b: a * b)
    check(run, f"mul.hi.{t}", [t] * 2, t, lambda a, b: a * b >> bits)
    check(run, f"mad.lo.{t}", [t] * 3, t, lambda a, b, c: a * b + c)
    check(run, f"mad.hi.{t}", [t] * 3, t, lambda a, b, c: (a * b >> bits) + c)
    check(run, f"min.{t}", [t] * 2, t, min)
    check(run, f"max.{t}", [t] * 2, t, max)
    check(run, f"sad.{t}", [t] * 3, t, lambda a, b, c: c + abs(a - b))


@pytest.mark.parametrize("t", TYPES[:4])
def test_wide_products(run, t):
    wide = f"{t[0]}{2 * width(t)}"
    check(run, f"mul.wide.{t}", [t] * 2, wide, lambda a, b: a * b)
    check(run, f"mad.wide.{t}", [t, t, wide], wide, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("t", TYPES)
def test_division_rounds_toward_zero(run, t):
    """And all bits are set where the divisor is zero, in the remainder too."""

    def quotient(a, b):
        return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    check(run, f"div.{t}", [t] * 2, t, quotient)
    check(run, f"rem.{t}", [t] * 2, t, lambda a, b: -1 if b == 0 else a - b * quotient(a, b))


def test_division_worked(run):
    assert run("div.s32 r0, r1, r2", r1=[-7, 7, -(2**31), 5], r2=[2, -2, -1, 0]).view(np.int32).tolist() == [
        -3, -3, -(2**31), -1,
    ]  # fmt: skip
    assert run("rem.s32 r0, r1, r2", r1=[-7, 7, -7], r2=[2, -2, 5]).view(np.int32).tolist() == [-1, 1, -2]
    assert run("div.u32 r0, r1, r2", r1=[0xFFFFFFFF, 10], r2=[1, 0xFFFFFFFF]).tolist() == [0xFFFFFFFF, 0]


@pytest.mark.parametrize("t", ["s16", "s32", "s64"])
def test_signs(run, t):
    check(run, f"neg.{t}", [t], t, lambda a: -a)
    check(run, f"abs.{t}", [t], t, abs)


def test_saturation(run):
    def clamp(value):
        return min(max(value, -(2**31)), 2**31 - 1)

    check(run, "add.sat.s32", ["s32"] * 2, "s32", lambda a, b: clamp(a + b))
    check(run, "sub.sat.s32", ["s32"] * 2, "s32", lambda a, b: clamp(a - b))
    check(run, "mad.hi.sat.s32", ["s32"] * 3, "s32", lambda a, b, c: clamp((a * b >> 32) + c))
    check(run, "min.relu.s32", ["s32"] * 2, "s32", lambda a, b: max(min(a, b), 0))
    check(run, "max.relu.s32", ["s32"] * 2, "s32", lambda a, b: max(a, b, 0))


@pytest.mark.parametrize("t", ["u32", "s32"])
def test_products_of_24_bits(run, t):
    def low(value):
        value &= 0xFFFFFF
        return value - (1 << 24) if t == "s32" and value >> 23 else value

    check(run, f"mul24.lo.{t}", [t] * 2, t, lambda a, b: low(a) * low(b))
    check(run, f"mul24.hi.{t}", [t] * 2, t, lambda a, b: low(a) * low(b) >> 16)
    check(run, f"mad24.lo.{t}", [t] * 3, t, lambda a, b, c: low(a) * low(b) + c)


@pytest.mark.parametrize(("op", "function"), [("add", lambda a, b: a + b), ("min", min), ("max", max)])
@pytest.mark.parametrize("t", ["u16", "s16"])
def test_packed_halves(run, op, function, t):
    def both(a, b):
        parts = [(wrapped(a >> s, t), wrapped(b >> s, t)) for s in (0, 16)]
        return sum(function(*part) % 65536 << 16 * i for i, part in enumerate(parts))

    check(run, f"{op}.{t}x2", ["u32"] * 2, "u32", both)


def test_packed_relu(run):
    found = run("max.relu.s16x2 r0, r1, r2", r1=[0xFFFF0005, 0x8000FFFE], r2=[0xFFFE0003, 0x7FFFFFFF])
    assert found.tolist() == [0x00000005, 0x7FFF0000]


@pytest.mark.parametrize("atype", ["u32", "s32"])
@pytest.mark.parametrize("btype", ["u32", "s32"])
def test_dot_products(run, atype, btype):
    def part(value, index, bits, type_):
        return wrapped(value >> bits * index, f"{type_[0]}{bits}")

    def four(a, b, c):
        return c + sum(part(a, i, 8, atype) * part(b, i, 8, btype) for i in range(4))

    def two(first):
        return lambda a, b, c: c + sum(part(a, i, 16, atype) * part(b, first + i, 8, btype) for i in range(2))

    check(run, f"dp4a.{atype}.{btype}", ["u32"] * 3, "u32", four)
    check(run, f"dp2a.lo.{atype}.{btype}", ["u32"] * 3, "u32", two(0))
    check(run, f"dp2a.hi.{atype}.{btype}", ["u32"] * 3, "u32", two(2))


def test_128_bits_with_the_carry(ptx_kernel):
    """add.cc with addc and sub.cc with subc over four words; mad.lo.cc with madc.hi."""
    body = """
 mov.u32 %r10, 0xffffffff; mov.u32 %r11, 0xffffffff; mov.u32 %r12, %r1; mov.u32 %r13, 5;
 mov.u32 %r20, %r1;        mov.u32 %r21, 0;          mov.u32 %r22, 0xffffffff; mov.u32 %r23, 1;
 add.cc.u32 %r30, %r10, %r20; addc.cc.u32 %r31, %r11, %r21;
 addc.cc.u32 %r32, %r12, %r22; addc.u32 %r33, %r13, %r23;
 sub.cc.u32 %r40, %r30, %r20; subc.cc.u32 %r41, %r31, %r21;
 subc.cc.u32 %r42, %r32, %r22; subc.u32 %r43, %r33, %r23;
 mad.lo.cc.u32 %r50, %r10, %r1, %r10; madc.hi.u32 %r51, %r10, %r1, 0;
 mul.wide.u32 %rd10, %r1, 40; add.s64 %rd10, %rd2, %rd10;
 st.global.b32 [%rd10], %r30; st.global.b32 [%rd10+4], %r31; st.global.b32 [%rd10+8], %r32;
 st.global.b32 [%rd10+12], %r33; st.global.b32 [%rd10+16], %r40; st.global.b32 [%rd10+20], %r41;
 st.global.b32 [%rd10+24], %r42; st.global.b32 [%rd10+28], %r43; st.global.b32 [%rd10+32], %r50;
 st.global.b32 [%rd10+36], %r51;
"""
    gpu = device("sm_100a")
    y = gpu.from_torch(torch.zeros(32, 10, dtype=torch.int32))
    gpu.run_ptx(ptx_kernel(body), y, y)
    words = y.numpy().view(np.uint32).astype(object)
    joined = [
        [sum(int(w) << 32 * i for i, w in enumerate(part)) for part in (row[:4], row[4:8], row[8:])]
        for row in words
    ]
    for lane, (total, difference, product) in enumerate(joined):
        a = 0xFFFFFFFF | 0xFFFFFFFF << 32 | lane << 64 | 5 << 96
        b = lane | 0xFFFFFFFF << 64 | 1 << 96
        assert total == (a + b) % (1 << 128)
        assert difference == a
        assert product == 0xFFFFFFFF * lane + 0xFFFFFFFF


@pytest.mark.parametrize(
    "text",
    [
        "mul.wide.s64 w0, w1, w2",
        "add.sat.u32 r0, r1, r2",
        "min.relu.u32 r0, r1, r2",
        "neg.u32 r0, r1",
        "mul.lo.u16x2 r0, r1, r2",
        "rem.f32 r0, r1, r2",
        "dp4a.s64.s32 r0, r1, r2, r3",
        "add.cc.u16 h0, h1, h2",
    ],
)
def test_what_ptx_does_not_have_is_refused(lanes, text):
    with pytest.raises(UnsupportedInstruction, match=text.split()[0].replace(".", r"\.")):
        build(lanes.parse(text))
