"""Instruction descriptors of tcgen05.mma, against values that CuTe DSL emits and fields set by hand."""

from __future__ import annotations

import pytest

from dsv4lab.emulator.instruction_descriptor import decode
from dsv4lab.emulator.matrix_descriptor import DescriptorError

# Bits as CuTe DSL 4.8.1 writes them into PTX.
EMITTED = [
    ("f16", 1, 135266320, dict(m=128, n=64, k=16, a="f16", b="f16", d="f32")),
    ("f16", 1, 135266304, dict(m=128, n=64, k=16, a="f16", b="f16", d="f16")),
    ("f16", 1, 135364624, dict(m=128, n=64, mn_major_a=True, mn_major_b=True)),
    ("f16", 1, 135274512, dict(m=128, n=64, negate_a=True)),
    ("f16", 2, 135266320, dict(m=128, n=64, k=16)),
    ("f16", 2, 269485200, dict(m=256, n=64, k=16, a="bf16", b="bf16", d="f32")),
    ("tf32", 1, 68159760, dict(m=64, n=64, k=8, a="tf32", b="tf32", d="f32")),
    ("i8", 1, 135267496, dict(m=128, n=64, k=32, a="s8", b="s8", d="s32", saturate=True)),
    ("f8f6f4", 1, 135267344, dict(m=128, n=64, k=32, a="e4m3", b="e5m2", d="f32")),
    ("mxf8f6f4", 1, 143654912, dict(m=128, n=64, k=32, a="e4m3", b="e4m3", scale="ue8m0")),
    ("mxf4nvf4", 1, 143656064, dict(m=128, n=64, k=64, a="e2m1", b="e2m1", scale="ue8m0")),
    ("mxf4nvf4", 1, 138413184, dict(m=128, n=256, k=64, a="e2m1", b="e2m1", scale="ue4m3")),
    ("mxf4nvf4", 2, 272630912, dict(m=256, n=256, k=64, scale_id_a=0, scale_id_b=0)),
]
_PLAIN = dict(negate_a=False, negate_b=False, mn_major_a=False, mn_major_b=False, saturate=False)


def word(**fields):
    """Bits from fields by name, (value, lowest bit)."""
    places = {
        "sparse": 2, "saturate": 3, "d": 4, "sfb": 4, "a": 7, "b": 10, "neg_a": 13, "neg_b": 14, "mn_a": 15,
        "mn_b": 16, "n": 17, "scale": 23, "m": 24, "sfa": 29, "k": 31,
    }  # fmt: skip
    shifts = {"n": 3, "m": 4}
    return sum((value >> shifts.get(name, 0)) << places[name] for name, value in fields.items())


@pytest.mark.parametrize("kind, ctas, bits, expected", EMITTED)
def test_descriptors_that_cute_emits(kind, ctas, bits, expected):
    found = decode(bits, kind, ctas)
    expected = _PLAIN | expected
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    "kind, k, types",
    [
        ("f16", 16, {0: "f16", 1: "bf16"}),
        ("tf32", 8, {2: "tf32"}),
        ("f8f6f4", 32, {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}),
        ("i8", 32, {0: "u8", 1: "s8"}),
    ],
)
def test_types_of_plain_kinds(kind, k, types):
    d = 2 if kind == "i8" else 1
    for code in range(8):
        bits = word(d=d, a=code, b=code, n=16, m=128)
        if code in types:
            found = decode(bits, kind, 1)
            assert (found.types, found.k, found.d) == ((types[code],) * 2, k, "s32" if d == 2 else "f32")
        else:
            with pytest.raises(DescriptorError, match=f"type of A {code}"):
                decode(bits, kind, 1)


def test_mixed_types():
    assert decode(word(d=0, a=5, b=1, n=8, m=64), "f8f6f4", 1).types == ("e2m1", "e5m2")
    assert decode(word(d=2, a=1, b=0, n=8, m=64), "i8", 1).types == ("s8", "u8")
    with pytest.raises(DescriptorError, match="must be the same"):
        decode(word(d=1, a=1, b=0, n=8, m=64), "f16", 1)


def test_accumulators():
    assert decode(word(d=0, n=8, m=64), "f16", 1).d == "f16"
    for kind, d in (("f16", 2), ("tf32", 0), ("i8", 1)):
        with pytest.raises(DescriptorError, match=f"type of D {d}"):
            decode(word(d=d, a=2 if kind == "tf32" else 0, b=2 if kind == "tf32" else 0, n=16, m=64), kind, 1)
    with pytest.raises(DescriptorError, match="fp16 accumulator of bf16"):
        decode(word(d=0, a=1, b=1, n=8, m=64), "f16", 1)


def test_flags():
    found = decode(word(d=1, neg_a=1, mn_b=1, n=256, m=128), "f16", 1)
    assert (found.negate_a, found.negate_b, found.mn_major_a, found.mn_major_b) == (True, False, False, True)
    found = decode(word(d=1, neg_b=1, mn_a=1, n=256, m=128), "f16", 1)
    assert (found.negate_a, found.negate_b, found.mn_major_a, found.mn_major_b) == (False, True, True, False)
    assert decode(word(d=2, saturate=1, n=16, m=128), "i8", 1).saturate
    with pytest.raises(DescriptorError, match="saturate"):
        decode(word(d=1, saturate=1, n=16, m=128), "f16", 1)
    with pytest.raises(DescriptorError, match="negate"):
        decode(word(d=2, neg_a=1, n=16, m=128), "i8", 1)
    with pytest.raises(DescriptorError, match="transposed B of type e2m1"):
        decode(word(d=1, mn_b=1, b=5, n=16, m=128), "f8f6f4", 1)


def test_scaled_kinds():
    found = decode(word(a=0, b=4, n=24, m=128, scale=1, sfa=3, sfb=1), "mxf8f6f4", 1)
    assert (found.types, found.k, found.scale, found.d) == (("e4m3", "e3m2"), 32, "ue8m0", "f32")
    assert (found.scale_id_a, found.scale_id_b) == (3, 1)
    found = decode(word(a=1, b=1, n=48, m=256, scale=1, sfa=2, sfb=0), "mxf4", 2)
    assert (found.m, found.n, found.k, found.scale_id_a, found.scale_id_b) == (256, 48, 64, 2, 0)
    assert decode(word(a=1, b=1, n=48, m=256, k=1), "mxf4nvf4", 2).k == 96
    assert decode(word(a=1, b=1, n=48, m=128), "mxf4nvf4", 2).scale == "ue4m3"


@pytest.mark.parametrize(
    "kind, fields, match",
    [
        ("mxf8f6f4", dict(n=8, m=128), "type of scales 0"),
        ("mxf4", dict(a=1, b=1, n=8, m=128), "type of scales 0"),
        ("mxf4", dict(a=5, b=1, n=8, m=128, scale=1), "type of A 5"),
        ("mxf8f6f4", dict(n=8, m=128, scale=1, k=1), "reserved bits 31"),
        ("mxf8f6f4", dict(n=8, m=64, scale=1), "reserved bits 24"),
        ("mxf4", dict(a=1, b=1, n=8, m=256, scale=1), "M = 256"),
    ],
)
def test_refused_scaled_descriptors(kind, fields, match):
    with pytest.raises(DescriptorError, match=match):
        decode(word(**fields), kind, 1)


@pytest.mark.parametrize("bit", [0, 1, 6, 23, 29, 30, 31])
def test_reserved_bits(bit):
    with pytest.raises(DescriptorError, match="reserved"):
        decode(word(d=1, n=64, m=128) | 1 << bit, "f16", 1)


def test_sparsity_is_refused():
    with pytest.raises(DescriptorError, match="sparsity"):
        decode(word(d=1, n=64, m=128, sparse=1), "f16", 1)


@pytest.mark.parametrize(
    "kind, ctas, m, n, allowed",
    [
        ("f16", 1, 64, 8, True),
        ("f16", 1, 32, 8, False),
        ("f16", 1, 256, 8, False),
        ("f16", 1, 128, 0, False),
        ("f16", 1, 128, 264, False),
        ("f16", 2, 64, 16, False),
        ("f16", 2, 128, 16, True),
        ("f16", 2, 256, 24, False),
        ("i8", 1, 64, 8, True),
        ("i8", 1, 64, 24, True),
        ("i8", 1, 64, 40, False),
        ("i8", 2, 128, 32, True),
        ("i8", 2, 128, 16, False),
    ],
)
def test_shapes(kind, ctas, m, n, allowed):
    bits = word(d=2 if kind == "i8" else 1, m=m, n=n)
    if allowed:
        found = decode(bits, kind, ctas)
        assert (found.m, found.n) == (m, n)
    else:
        with pytest.raises(DescriptorError, match=r"[MN] = "):
            decode(bits, kind, ctas)


def test_transposed_bytes_come_in_sixteens():
    decode(word(d=1, mn_b=1, n=48, m=128), "f8f6f4", 1)
    with pytest.raises(DescriptorError, match="multiple of 16"):
        decode(word(d=1, mn_b=1, n=24, m=128), "f8f6f4", 1)
    with pytest.raises(DescriptorError, match="multiple of 32"):
        decode(word(d=1, mn_b=1, n=48, m=128), "f8f6f4", 2)
