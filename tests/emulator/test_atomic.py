"""Atomic operations: every lane counts once, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.emulator import UnsupportedInstruction, device

SEEDS = pytest.mark.parametrize("seed", range(3))


def run(text, *arguments, seed=0, **launch):
    gpu = device("sm_100a", seed=seed)
    arguments = [gpu.from_torch(a) for a in arguments]
    gpu.run_ptx(text, *arguments, **launch)
    return arguments


@SEEDS
@pytest.mark.parametrize("op", ["atom", "red"])
def test_a_histogram_counts_every_thread(ptx_kernel, op, seed):
    target = "%r9, " if op == "atom" else ""
    body = f"""
 rem.u32 %r2, %r1, 3; mul.wide.u32 %rd4, %r2, 4; add.s64 %rd5, %rd2, %rd4;
 {op}.global.add.u32 {target}[%rd5], 1;
"""
    y = torch.zeros(4, dtype=torch.int32)
    _, y = run(ptx_kernel(body), y, y, block=(100, 1, 1), grid=(3, 1, 1), seed=seed)
    assert y.tolist() == [102, 99, 99, 0]


@SEEDS
def test_each_lane_gets_the_value_before_its_own(ptx_kernel, seed):
    body = """
 atom.global.add.u32 %r9, [%rd1], 1;
 mul.wide.u32 %rd4, %r9, 4; add.s64 %rd5, %rd2, %rd4;
 st.global.b32 [%rd5], %r1;
"""
    x, y = torch.zeros(1, dtype=torch.int32), torch.full((64,), -1, dtype=torch.int32)
    x, y = run(ptx_kernel(body), x, y, block=(64, 1, 1), seed=seed)
    assert x.item() == 64 and sorted(y.tolist()) == list(range(64))
    # Chance orders them.
    assert y.tolist() != list(range(64))


def one(ptx_kernel, ins, old, dtype, new, type_="b32"):
    """What one thread's atomic leaves in memory, and what it returns."""
    body = f"""
 ld.global.{type_} {{R}}, [%rd2];
 setp.eq.u32 %p1, %r1, 0;
 @%p1 {ins};
 @%p1 st.global.{type_} [%rd2+8], {{D}};
"""
    registers = {"b32": ("%r4", "%r9"), "b64": ("%rd4", "%rd9")}[type_]
    body = body.format(R=registers[0], D=registers[1])
    x = torch.tensor([old, old], dtype=dtype)
    y = torch.tensor([new] * 4, dtype=dtype)
    x, y = run(ptx_kernel(body), x, y)
    at = 8 // y.element_size()
    assert y[at] == old
    return x[0].item()


@pytest.mark.parametrize(
    ("op", "old", "new", "expected"),
    [
        ("add.u32", 5, 7, 12),
        ("min.s32", -5, 7, -5),
        ("min.u32", -5, 7, 7),
        ("max.s32", -5, 7, 7),
        ("max.u32", -5, 7, -5),
        ("and.b32", 12, 10, 8),
        ("or.b32", 12, 10, 14),
        ("xor.b32", 12, 10, 6),
        ("exch.b32", 12, 10, 10),
        ("inc.u32", 9, 10, 10),
        ("inc.u32", 10, 10, 0),
        ("dec.u32", 0, 10, 10),
        ("dec.u32", 11, 10, 10),
        ("dec.u32", 10, 10, 9),
    ],
)
def test_integer_operations(ptx_kernel, op, old, new, expected):
    """Worked by hand from the PTX ISA's definitions of atom."""
    ins = f"atom.global.{op} %r9, [%rd1], %r4"
    assert one(ptx_kernel, ins, old, torch.int32, new) == expected


@pytest.mark.parametrize(("compare", "expected"), [(3, 8), (4, 3)])
def test_compare_and_swap(ptx_kernel, compare, expected):
    ins = f"atom.global.cas.b32 %r9, [%rd1], {compare}, %r4"
    assert one(ptx_kernel, ins, 3, torch.int32, 8) == expected


def test_64_bits(ptx_kernel):
    ins = "atom.global.add.u64 %rd9, [%rd1], %rd4"
    assert one(ptx_kernel, ins, 2**40, torch.int64, 2**41 + 1, "b64") == 2**40 + 2**41 + 1


def test_float_sums(ptx_kernel):
    body = " mov.f32 %f1, 0f3F000000; red.global.add.f32 [%rd2], %f1;"
    y = torch.ones(1)
    assert run(ptx_kernel(body), y, y)[1].item() == 17.0


@pytest.mark.parametrize(("type_", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_packed_halves_are_summed_apart(ptx_kernel, type_, dtype):
    body = f" ld.global.b32 %r4, [%rd1]; red.global.add.noftz.{type_} [%rd2], %r4;"
    x, y = torch.tensor([0.5, 3.0], dtype=dtype), torch.tensor([1.0, -6.0], dtype=dtype)
    assert run(ptx_kernel(body), x, y)[1].tolist() == [17.0, 90.0]


def test_bf16_sums_round_to_nearest_even(ptx_kernel):
    body = """
 setp.eq.u32 %p1, %r1, 0; ld.global.b32 %r4, [%rd1];
 @%p1 red.global.add.noftz.bf16x2 [%rd2], %r4;
"""
    generator = np.random.default_rng(0)
    for a, b in generator.normal(size=(40, 2, 2)).astype(np.float32) * 2.0 ** generator.integers(
        -8, 8, (40, 1, 2)
    ):
        x, y = (torch.from_numpy(v).to(torch.bfloat16) for v in (a, b))
        expected = x + y
        assert torch.equal(run(ptx_kernel(body), x, y)[1], expected)


def test_vectors_of_floats(ptx_kernel):
    body = " mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000; red.global.add.v2.f32 [%rd2], {%f1, %f2};"
    y = torch.zeros(2)
    assert run(ptx_kernel(body), y, y)[1].tolist() == [32.0, 64.0]


def test_shared_counters_belong_to_their_cta(ptx_kernel):
    body = """
 mov.u32 %r2, smem;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 st.shared.b32 [%r2], 0;
 bar.sync 0;
 atom.shared.add.u32 %r9, [%r2], 2;
 bar.sync 0;
 ld.shared.b32 %r9, [%r2];
 mov.u32 %r3, %ctaid.x; mul.wide.u32 %rd4, %r3, 4; add.s64 %rd5, %rd2, %rd4;
 @%p1 st.global.b32 [%rd5], %r9;
"""
    y = torch.zeros(5, dtype=torch.int32)
    _, y = run(ptx_kernel(body), y, y, grid=(5, 1, 1), block=(96, 1, 1), shared_bytes=16)
    assert y.tolist() == [192] * 5


def test_an_operation_that_does_not_exist_is_refused(ptx_kernel):
    with pytest.raises(UnsupportedInstruction, match=r"red\.global\.min\.bf16x2"):
        run(ptx_kernel(" red.global.min.bf16x2 [%rd2], %r4;"), torch.zeros(1), torch.zeros(1))
