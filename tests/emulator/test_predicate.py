"""Comparisons and choices: on ordered and unordered operands, combined, with two results."""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest

from dsv4lab.emulator.isa.registry import UnsupportedInstruction, build

ORDERED = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
NAN = float("nan")
VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), NAN]
PAIRS = list(itertools.product(VALUES, repeat=2))


@pytest.fixture
def run(lanes):
    return lanes.execute


def unordered(a, b):
    return a != a or b != b


def expected_of(name, a, b):
    """What the PTX manual says of a comparison of floats."""
    if name in ("num", "nan"):
        return unordered(a, b) == (name == "nan")
    if name in ORDERED:
        return not unordered(a, b) and ORDERED[name](a, b)
    return unordered(a, b) or ORDERED[name.removesuffix("u")](a, b)


@pytest.mark.parametrize("name", [*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_floats(run, lanes, name):
    a, b = (np.array(side) for side in zip(*PAIRS, strict=True))
    expected = [expected_of(name, x, y) for x, y in PAIRS]
    single, half = np.float32, np.float16
    assert run(f"setp.{name}.f32 p0, r1, r2", r1=a.astype(single), r2=b.astype(single)).tolist() == expected
    assert run(f"setp.{name}.f64 p0, w1, w2", w1=a, w2=b).tolist() == expected
    assert run(f"setp.{name}.f16 p0, h1, h2", h1=a.astype(half), h2=b.astype(half)).tolist() == expected
    a16, b16 = ((x.astype(single).view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    assert run(f"setp.{name}.bf16 p0, h1, h2", h1=a16, h2=b16).tolist() == expected
    mask = run(f"set.{name}.u32.f32 r0, r1, r2", r1=a.astype(single), r2=b.astype(single))
    assert mask.tolist() == [0xFFFFFFFF * e for e in expected]


@pytest.mark.parametrize("name", ["lt", "neu"])
def test_packed_halves_set_two_predicates(run, name):
    a, b = (
        np.array(side).astype(np.float16).view(np.uint16).astype(np.uint32)
        for side in zip(*PAIRS, strict=True)
    )
    low, high = run(f"setp.{name}.f16x2 p0|p1, r1, r2", r1=a | a[::-1] << 16, r2=b | b[::-1] << 16)
    expected = [expected_of(name, x, y) for x, y in PAIRS]
    assert low.tolist() == expected
    assert high.tolist() == expected[::-1]
    mask = run(f"set.{name}.u32.f16x2 r0, r1, r2", r1=a | a[::-1] << 16, r2=b | b[::-1] << 16)
    assert mask.tolist() == [
        0xFFFF * x | 0xFFFF0000 * y for x, y in zip(expected, expected[::-1], strict=True)
    ]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_integers(run, bits):
    values = [0, 1, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1]
    pairs = list(itertools.product(values, repeat=2))
    letter = {16: "h", 32: "r", 64: "w"}[bits]
    registers = {f"{letter}{i + 1}": list(side) for i, side in enumerate(zip(*pairs, strict=True))}

    def signed(x):
        return x - (1 << bits) if x >> bits - 1 else x

    for name, compare in ORDERED.items():
        text = f"setp.{name}.{{}}{bits} p0, {letter}1, {letter}2"
        assert run(text.format("s"), **registers).tolist() == [
            compare(signed(a), signed(b)) for a, b in pairs
        ]
        assert run(text.format("u"), **registers).tolist() == [compare(a, b) for a, b in pairs]
    for name, like in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        text = f"setp.{name}.u{bits} p0, {letter}1, {letter}2"
        assert run(text, **registers).tolist() == [ORDERED[like](a, b) for a, b in pairs]


@pytest.mark.parametrize(
    ("how", "combine"), [("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)]
)
def test_combined_with_a_predicate(run, how, combine):
    """p = (a < b) op c, q = !(a < b) op c; `!c` and the sink."""
    a, b, c = [1, 1, 2, 2], [2, 2, 1, 1], [True, False, True, False]
    less = [True, True, False, False]
    p, q = run(f"setp.lt.{how}.s32 p0|p1, r1, r2, p3", r1=a, r2=b, p3=c)
    assert p.tolist() == [combine(t, x) for t, x in zip(less, c, strict=True)]
    assert q.tolist() == [combine(not t, x) for t, x in zip(less, c, strict=True)]
    p = run(f"setp.lt.{how}.s32 p0, r1, r2, !p3", r1=a, r2=b, p3=c)
    assert p.tolist() == [combine(t, not x) for t, x in zip(less, c, strict=True)]
    q = run(f"setp.lt.{how}.s32 _|p1, r1, r2, p3", r1=a, r2=b, p3=c)
    assert q.tolist() == [combine(not t, x) for t, x in zip(less, c, strict=True)]


def test_a_second_result_without_a_combination(run):
    p, q = run("setp.ge.s32 p0|p1, r1, r2", r1=[1, 2, 3], r2=[2, 2, 2])
    assert (p.tolist(), q.tolist()) == ([False, True, True], [True, False, False])


def test_flushed_comparisons(run, lanes):
    tiny = lanes.f32(2.0**-130, -(2.0**-149))
    assert run("setp.eq.f32 p0, r1, r2", r1=tiny, r2=lanes.f32(0, 0)).tolist() == [False, False]
    assert run("setp.eq.ftz.f32 p0, r1, r2", r1=tiny, r2=lanes.f32(0, 0)).tolist() == [True, True]


def test_set_gives_numbers(run, lanes):
    a, b = lanes.f32(1, 3, NAN), lanes.f32(2, 2, 2)
    assert run("set.lt.f32.f32 r0, r1, r2", r1=a, r2=b).view(np.float32).tolist() == [1, 0, 0]
    assert run("set.lt.s32.f32 r0, r1, r2", r1=a, r2=b).tolist() == [0xFFFFFFFF, 0, 0]
    assert run("set.lt.and.u32.s32 r0, r1, r2, p3", r1=[1, 1], r2=[2, 2], p3=[True, False]).tolist() == [
        0xFFFFFFFF,
        0,
    ]
    assert run("set.geu.f16.f16 h0, h1, h2", h1=lanes.f16([1, 2]), h2=lanes.f16([2, 2])).tolist() == [
        0,
        0x3C00,
    ]


def test_choices(run, lanes):
    p = [True, False]
    assert run("selp.b16 h0, h1, h2, p3", h1=[1, 2], h2=[3, 4], p3=p).tolist() == [1, 4]
    assert run("selp.b32 r0, r1, -1, p3", r1=[1, 2], p3=p).tolist() == [1, 0xFFFFFFFF]
    assert run("selp.b64 w0, w1, w2, p3", w1=[1, 2], w2=[3, 1 << 63], p3=p).tolist() == [1, 1 << 63]
    assert run("selp.f32 r0, r1, r2, p3", r1=[0x7F800001, 2], r2=[3, 0xFFC12345], p3=p).tolist() == [
        0x7F800001,
        0xFFC12345,
    ]
    assert run("slct.b32.s32 r0, r1, r2, r3", r1=[1] * 3, r2=[2] * 3, r3=[0, -1, 7]).tolist() == [1, 2, 1]
    c = lanes.f32(-0.0, -1, NAN, 2.0**-140, -(2.0**-140))
    assert run("slct.b32.f32 r0, r1, r2, r3", r1=[1] * 5, r2=[2] * 5, r3=c).tolist() == [1, 2, 2, 1, 2]
    assert run("slct.ftz.b32.f32 r0, r1, r2, r3", r1=[1] * 5, r2=[2] * 5, r3=c).tolist() == [1, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "setp.lo.s32 p0, r1, r2",
        "setp.lt.b32 p0, r1, r2",
        "setp.num.s32 p0, r1, r2",
        "setp.lt.s32 p0, r1, r2, p3",
        "selp.f16 h0, h1, h2, p3",
    ],
)
def test_what_ptx_does_not_have_is_refused(lanes, text):
    with pytest.raises(UnsupportedInstruction):
        build(lanes.parse(text))
