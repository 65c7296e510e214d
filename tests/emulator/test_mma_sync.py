"""mma.sync: fragments against CuTe and the manual, products against NumPy and the tensor core's own model."""

from __future__ import annotations

import cutlass
import ml_dtypes
import numpy as np
import pytest
import torch
from cutlass import cute
from cutlass.cute.nvgpu import warp

from dsv4lab.emulator import UnsupportedInstruction, device
from dsv4lab.emulator.isa.fragments import accumulator_of, registers_of, rows_of
from dsv4lab.emulator.tensor_core import dot

DTYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "s8": np.int8, "u8": np.uint8, "f32": np.float32, "s32": np.int32,
}  # fmt: skip
KINDS = {"f16": "f16", "bf16": "f16", "tf32": "tf32", "e4m3": "f8f6f4", "e5m2": "f8f6f4"}
# Shape, D, A, B.
FORMS = [
    ("m16n8k8", "f32", "f16", "f16"), ("m16n8k16", "f32", "f16", "f16"), ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f16", "f16", "f16"), ("m16n8k8", "f32", "bf16", "bf16"), ("m16n8k16", "f32", "bf16", "bf16"),
    ("m16n8k4", "f32", "tf32", "tf32"), ("m16n8k8", "f32", "tf32", "tf32"),
    ("m16n8k16", "f32", "e4m3", "e5m2"), ("m16n8k32", "f32", "e5m2", "e4m3"),
    ("m16n8k32", "f16", "e4m3", "e4m3"), ("m8n8k16", "s32", "s8", "s8"), ("m16n8k16", "s32", "u8", "s8"),
    ("m16n8k32", "s32", "s8", "u8"), ("m16n8k32", "s32", "u8", "u8"),
]  # fmt: skip


# Fragments -------------------------------------------------------------------------------------------------


def test_worked_positions():
    """m16n8k16: a5 of lane 6 is row 1, column 13; c2 of lane 6 row 9, column 4."""
    a = np.zeros((1, 32, 4), np.uint32)
    a[0, 6, 2] = 0x3C00 << 16
    matrix = rows_of(tuple(np.moveaxis(a, 2, 0)), "f16", 2)
    assert np.argwhere(matrix[0]).tolist() == [[1, 13]]
    b = np.zeros((1, 32, 2), np.uint32)
    b[0, 6, 1] = 0x3C00 << 16  # b3: k = 2 * 2 + 1 + 8, n = 1
    assert np.argwhere(rows_of(tuple(np.moveaxis(b, 2, 0)), "f16", 1)[0]).tolist() == [[1, 13]]
    c = np.zeros((1, 32, 4), np.float32)
    c[0, 6, 2] = 1
    registers = tuple(np.moveaxis(c.view(np.uint32), 2, 0))
    assert np.argwhere(accumulator_of(registers, np.float32)[0]).tolist() == [[9, 4]]
    for register, same in zip(registers, registers_of(accumulator_of(registers, np.float32)), strict=True):
        np.testing.assert_array_equal(register, same)


def crd2idx(shape, stride):
    """All offsets of one mode of a CuTe layout."""
    if isinstance(shape, int):
        return np.arange(shape) * stride
    total = np.zeros(1, int)
    for extent, step in zip(shape, stride, strict=True):
        total = (total[None, :] + crd2idx(extent, step)[:, None]).reshape(-1)
    return total


@pytest.mark.parametrize(
    ("op", "type_"),
    [
        (warp.MmaF16BF16Op(cutlass.Float16, cutlass.Float32, (16, 8, 8)), "f16"),
        (warp.MmaF16BF16Op(cutlass.Float16, cutlass.Float32, (16, 8, 16)), "f16"),
        (warp.MmaTF32Op((16, 8, 4)), "tf32"),
        (warp.MmaTF32Op((16, 8, 8)), "tf32"),
        (warp.MmaFP8Op(cutlass.Float8E4M3FN, cutlass.Float32, (16, 8, 32)), "u8"),
    ],
)
def test_fragments_against_cute(op, type_):
    """CuTe's layouts of threads and values, column-major in A (16, K), B (8, K) and C (16, 8)."""
    found = []

    @cute.jit
    def host():
        mma = cute.make_tiled_mma(op)
        found.extend((x.shape, x.stride) for x in (mma.tv_layout_A, mma.tv_layout_B, mma.tv_layout_C))

    host()
    # Every element has its place as value, or what 8 bits can hold of it.
    dtypes = (DTYPES[type_], DTYPES[type_], np.float32)
    for operand, (shape, stride), dtype, tall in zip("ABC", found, dtypes, (2, 1, 2), strict=True):
        offsets = crd2idx(shape[0], stride[0])[:, None] + crd2idx(shape[1], stride[1])
        words = (offsets % 251 + 1).astype(dtype)[None].view(np.uint32)
        registers = tuple(np.moveaxis(words, 2, 0))
        got = accumulator_of(registers, dtype) if operand == "C" else rows_of(registers, type_, tall)
        expected = np.arange(offsets.size).reshape(-1, 8 * tall).T % 251 + 1
        np.testing.assert_array_equal(got[0], expected)


# Kernels ---------------------------------------------------------------------------------------------------


def fragments(matrix, each, registers):
    """What lanes hold of a matrix: (32, registers) words, by the formulas of the manual one by one."""
    tall, words = len(matrix) // 8, np.zeros((32, registers, each), matrix.dtype)
    for lane in range(32):
        for register in range(registers):
            row = lane // 4 + 8 * (register % tall)
            column = lane % 4 * each + 4 * each * (register // tall)
            words[lane, register] = matrix[row, column : column + each]
    return words.reshape(32, -1).view(np.uint32)


def run(ptx_kernel, ins, a, b, c, warps=1, mma="exact", arch="sm_100a"):
    """D registers (warps * 32, words) of one instruction on registers A, B, C (warps * 32, words)."""
    counts = [x.shape[1] for x in (a, b, c)]
    stacked = np.ascontiguousarray(np.concatenate([a, b, c], axis=1))
    total = sum(counts)
    names = [f"%r{10 + i}" for i in range(total)]
    loads = "".join(f"ld.global.b32 {name}, [%rd5+{4 * i}]; " for i, name in enumerate(names))
    groups = [names[: counts[0]], names[counts[0] : -counts[2]], names[-counts[2] :]]
    d = [f"%r{100 + i}" for i in range(counts[2])]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in (d, *groups))
    stores = "".join(f"st.global.b32 [%rd7+{4 * i}], {name}; " for i, name in enumerate(d))
    text = ptx_kernel(
        f"mul.wide.u32 %rd4, %r1, {4 * total}; add.s64 %rd5, %rd1, %rd4; {loads} {ins} {operands}; "
        f"mul.wide.u32 %rd6, %r1, {4 * len(d)}; add.s64 %rd7, %rd2, %rd6; {stores}",
        target=arch,
    )
    gpu = device(arch, mma=mma)
    x = gpu.from_torch(torch.from_numpy(stacked.view(np.int32)))
    y = gpu.from_torch(torch.zeros(warps * 32, len(d), dtype=torch.int32))
    gpu.run_ptx(text, x, y, block=(32 * warps, 1, 1))
    return y.numpy().view(np.uint32), gpu


def random(rng, name, shape, wide):
    """Values of a type: small integers, or of many exponents."""
    if name == "s32":  # near the ends of its range
        return rng.integers(2**31 - 200_000, 2**31 + 200_000, shape).astype(np.uint32).view(np.int32)
    if name in ("s8", "u8"):
        info = np.iinfo(DTYPES[name])
        return rng.integers(info.min, info.max, shape, endpoint=True).astype(DTYPES[name])
    if not wide:
        return rng.integers(-4, 5, shape).astype(DTYPES[name])
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-5, 5, shape)).astype(DTYPES[name])


def execute(ptx_kernel, form, wide, mma, warps=2, seed=0, extra="", arch="sm_100a"):
    """Random operands, what the kernel gives for them, and the device."""
    shape, d, a, b = form
    m, k = map(int, shape[1:].split("n8k"))
    rng = np.random.default_rng(seed)
    matrices = [random(rng, t, (warps, *s), wide) for t, s in ((a, (m, k)), (b, (8, k)), (d, (m, 8)))]
    words = []
    for matrix in matrices[:2]:
        each = 4 // matrix.dtype.itemsize
        words.append(np.concatenate([fragments(x, each, x.size // 32 // each) for x in matrix]))
    place = np.concatenate([_accumulator_places(m) + 8 * m * w for w in range(warps)])
    words.append(matrices[2].reshape(-1)[place].view(np.uint32))
    ins = f"mma.sync.aligned.{shape}.row.col{extra}.{d}.{a}.{b}.{d}"
    out, gpu = run(ptx_kernel, ins, *words, warps=warps, mma=mma, arch=arch)
    result = np.zeros(matrices[2].size, DTYPES[d])
    result[place] = out.view(DTYPES[d])
    return matrices, result.reshape(matrices[2].shape), gpu


def _accumulator_places(m):
    """Index in a matrix (m, 8) of the elements of each lane, as c0, c1, ... of the manual."""
    return np.array(
        [[(lane // 4 + 8 * (i // 2)) * 8 + lane % 4 * 2 + i % 2 for i in range(m // 4)] for lane in range(32)]
    )


@pytest.mark.parametrize("mma", ["exact", "hardware"])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_integers_are_exact(ptx_kernel, form, mma):
    """Small integers, where no order of additions matters; 8-bit ones of all values, wrapped around."""
    (a, b, c), d, gpu = execute(ptx_kernel, form, False, mma)
    expected = np.einsum("wmk,wnk->wmn", a.astype(np.int64), b.astype(np.int64)) + c.astype(np.int64)
    if form[1] == "s32":
        expected = (expected & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(d, expected)
    assert gpu.counters["mma." + KINDS.get(form[2], "i8")] == 2
    assert gpu.counters["mma.flops"] == 2 * 2 * a.shape[1] * 8 * a.shape[2]


@pytest.mark.parametrize("mma", ["exact", "hardware"])
@pytest.mark.parametrize("form", [f for f in FORMS if f[1] != "s32"], ids="-".join)
def test_floats_are_the_tensor_cores(ptx_kernel, form, mma):
    """Bit for bit what tensor_core says, in both modes, which differ."""
    (a, b, c), d, _ = execute(ptx_kernel, form, True, mma, seed=1)
    options = {"kind": KINDS[form[2]], "types": form[2:], "accumulator": form[1]}
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = dot(a, b, c, mode=mma, **options)
    np.testing.assert_array_equal(d, expected)
    other = dot(a, b, c, mode="exact" if mma == "hardware" else "hardware", **options)
    if form[1] == "f32":
        assert (other != expected).any()


@pytest.mark.parametrize("form", [f for f in FORMS if f[2] in ("e4m3", "e5m2")], ids="-".join)
def test_fp8_on_hopper(ptx_kernel, form):
    """It is no instruction there, and has other bits."""
    (a, b, c), d, _ = execute(ptx_kernel, form, True, "hardware", seed=1, arch="sm_90a")
    options = {"types": form[2:], "mode": "hardware", "accumulator": form[1]}
    a, b = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(d, dot(a, b, c, kind="mma_fp8_sm90", **options))
    assert (d != dot(a, b, c, kind="f8f6f4", **options)).any()
    exact = execute(ptx_kernel, form, True, "exact", seed=1, arch="sm_90a")[1]
    np.testing.assert_array_equal(exact, execute(ptx_kernel, form, True, "exact", seed=1)[1])


def test_saturation(ptx_kernel):
    """.satfinite clamps 32-bit sums."""
    (a, b, c), d, _ = execute(ptx_kernel, ("m16n8k32", "s32", "u8", "u8"), False, "exact", extra=".satfinite")
    expected = np.einsum("wmk,wnk->wmn", a.astype(np.int64), b.astype(np.int64)) + c
    assert (expected >= 2**31).any()
    np.testing.assert_array_equal(d, np.clip(expected, -(2**31), 2**31 - 1))


def test_the_accumulator_may_be_the_destination(ptx_kernel):
    """C in the registers of D, as kernels have it, twice in a row."""
    body = """
 mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
 mov.u32 %r10, 0x3C003C00;
 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r10,%r10}, {%r10}, {%f1,%f2,%f3,%f4};
 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r10,%r10}, {%r10}, {%f1,%f2,%f3,%f4};
 add.f32 %f1, %f1, %f4; add.s64 %rd4, %rd2, %rd3; st.global.f32 [%rd4], %f1;
"""
    gpu = device("sm_90a")
    y = gpu.from_torch(torch.zeros(32))
    gpu.run_ptx(ptx_kernel(body, target="sm_90a"), y, y)
    assert y.tolist() == [2 * 17.0] * 32


@pytest.mark.parametrize(
    "name",
    [
        "m8n8k4.row.col.f64.f64.f64.f64", "m16n8k32.row.col.s32.s4.s4.s32",
        "m16n8k16.row.row.f32.f16.f16.f32",
        "m16n8k16.row.col.f32.f16.bf16.f32", "m16n8k16.row.col.f16.bf16.bf16.f16",
        "m16n8k32.row.col.f32.f16.f16.f32", "m16n8k32.row.col.kind::f8f6f4.f32.e3m2.e3m2.f32",
        "m16n8k16.row.col.f32.f16.f16.f16",
    ],
)  # fmt: skip
def test_forms_that_are_not_emulated(ptx_kernel, name):
    """Named in the error."""
    four, two = "{%r10, %r11, %r12, %r13}", "{%r10, %r11}"
    with pytest.raises(UnsupportedInstruction, match=name):
        device("sm_100a").run_ptx(ptx_kernel(f"mma.sync.aligned.{name} {four}, {four}, {two}, {four};"), 0, 0)
    short = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
    with pytest.raises(UnsupportedInstruction, match="4, 4, 2 and 4 registers"):
        device("sm_100a").run_ptx(ptx_kernel(f"{short} {four}, {four}, {two}, {four};"), 0, 0)
