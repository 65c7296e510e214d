"""wgmma: every type, layout and form in a kernel against NumPy; its groups, its errors; CuTe's GEMM."""

# No annotations from __future__: cute.kernel reads them as types.
from itertools import pairwise

import cutlass
import ml_dtypes
import numpy as np
import pytest
import torch
from cutlass import cute, memory
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from dsv4lab.emulator import DeadlockError, UnsupportedInstruction, device
from dsv4lab.emulator.isa.fragments import accumulator_of, rows_of
from dsv4lab.emulator.matrix_descriptor import decode_wgmma, element_offsets
from dsv4lab.emulator.race_errors import ProxyError, RaceError
from dsv4lab.emulator.tensor_core import dot
from dsv4lab.emulator.warpgroups import WarpgroupError

DTYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "s8": np.int8, "u8": np.uint8, "f32": np.float32, "s32": np.int32,
}  # fmt: skip
KINDS = {"f16": "f16", "bf16": "f16", "tf32": "tf32", "e4m3": "wgmma_fp8", "e5m2": "wgmma_fp8"}
SWIZZLES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
A_AT, B_AT, SHARED = 1024, 1024 + 16384, 1024 + 16384 + 32768


def layout(rows, k, size, major, swizzle):
    """Leading and stride byte offsets of atoms without gaps, and the bytes that the matrix spans."""
    width = {"none": 16, "32B": 32, "64B": 64, "128B": 128}[swizzle]
    if major == "K":
        return (128 * (rows // 8), 128) if swizzle == "none" else (16, 8 * width)
    across = -(-rows * size // width)
    if swizzle == "none":
        return 128 * across, 128
    return 8 * width, 8 * width * across


class Case:
    """One mma_async with its operands.

    Attributes:
        a, b, c: matrices (64, K), (N, K), (64, N) of their types.
    """

    def __init__(
        self, n, a, b, d, *, major_a="K", major_b="K", swizzle="128B", wide=False, registers=False, extra="",
        signs=(1, 1), accumulate=True,
    ):  # fmt: skip
        rng = np.random.default_rng(0)
        self.n, self.types, self.registers = n, (a, b, d), registers
        self.k = 32 // np.dtype(DTYPES[a]).itemsize
        self.a, self.b = (random(rng, t, (r, self.k), wide) for t, r in ((a, 64), (b, n)))
        self.c = random(rng, d, (64, n), wide)
        self.majors, self.swizzle, self.extra = (major_a, major_b), swizzle, extra
        self.signs, self.accumulate = signs, accumulate

    def descriptor(self, side):
        """Descriptor with its start address, and the matrix as bytes of shared memory from there."""
        matrix = (self.a, self.b)[side]
        size = matrix.dtype.itemsize
        leading, stride = layout(len(matrix), self.k, size, self.majors[side], self.swizzle)
        start = (A_AT, B_AT)[side]
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[self.swizzle] << 62

    def image(self):
        """Shared memory from byte 1024 on, with both matrices."""
        image = np.zeros(SHARED, np.uint8)
        for side, matrix in enumerate((self.a, self.b)):
            size = matrix.dtype.itemsize
            where = element_offsets(
                decode_wgmma(self.descriptor(side)), *matrix.shape, 8 * size, self.majors[side]
            )
            image[where[..., None] + np.arange(size)] = matrix.view(np.uint8).reshape(*matrix.shape, size)
        return image[1024:]

    def instruction(self, d, a, b, predicate):
        a_, b_, d_ = self.types
        name = f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}{self.extra}.{d_}.{a_}.{b_}"
        options = [] if d_ == "s32" else list(map(str, self.signs))
        if self.k == 16:
            majors = self.majors[1:] if self.registers else self.majors
            options += ["1" if major == "MN" else "0" for major in majors]
        return f"{name} {', '.join([d, a, b, predicate, *options])};"

    def expected(self, mode="exact"):
        """D as the tensor core computes it."""
        a, b = (x.astype(np.float32) * s for x, s in zip((self.a, self.b), self.signs, strict=True))
        c = self.c if self.accumulate else np.zeros_like(self.c)
        if self.types[2] == "s32":
            total = self.a.astype(np.int64) @ self.b.astype(np.int64).T + c
            if self.extra:
                return np.clip(total, -(2**31), 2**31 - 1)
            return (total & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        types = self.types[:2]
        return dot(a, b, c, kind=KINDS[types[0]], types=types, mode=mode, accumulator=self.types[2])


def random(rng, name, shape, wide):
    """Values of a type: small integers, or of many exponents; 32-bit integers near the ends of the range."""
    if name == "s32":
        return rng.integers(2**31 - 200_000, 2**31 + 200_000, shape).astype(np.uint32).view(np.int32)
    if name in ("s8", "u8"):
        info = np.iinfo(DTYPES[name])
        return rng.integers(info.min, info.max, shape, endpoint=True).astype(DTYPES[name])
    if not wide:
        return rng.integers(-4, 5, shape).astype(DTYPES[name])
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-5, 5, shape)).astype(DTYPES[name])


def places_d(n):
    """Index in D (64, N) of what each of 128 threads holds, as d0, d1, ... of the manual: (128, N / 2)."""
    thread, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row * n + 8 * (i // 4) + 2 * (thread % 4) + i % 2


def words_a(a):
    """Four registers of each of 128 threads for A (64, K), by the formulas of the manual."""
    each = 4 // a.dtype.itemsize
    words = np.zeros((128, 4, each), a.dtype)
    for thread in range(128):
        for register in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 2)
            column = thread % 4 * each + 4 * each * (register // 2)
            words[thread, register] = a[row, column : column + each]
    return words.reshape(128, -1).view(np.uint32)


START = """
 // copy the image from x to shared memory
 mov.u32 %r2, %r1; mov.u32 %r8, smem; cvt.u64.u32 %rd10, %r8;
COPY:
 mul.wide.u32 %rd4, %r2, 16; add.s64 %rd5, %rd1, %rd4; ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd5];
 add.s64 %rd6, %rd10, %rd4; st.shared.v4.b32 [%rd6], {%r3, %r4, %r5, %r6};
 add.u32 %r2, %r2, 128; setp.lt.u32 %p1, %r2, COUNT; @%p1 bra COPY;
 fence.proxy.async.shared::cta;
 bar.sync 0;
"""
FENCE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


def run(ptx_kernel, case, body=None, mma="exact", seed=0, start=START, checks="all"):
    """D of the kernel, and the device. `body` may use {mma}, the instruction."""
    d_words = case.c.reshape(-1)[places_d(case.n)].view(np.uint32)
    a_words = words_a(case.a) if case.registers else np.zeros((128, 0), np.uint32)
    words = np.ascontiguousarray(np.concatenate([d_words, a_words], axis=1))
    count = d_words.shape[1]
    names = [f"%r{20 + i}" for i in range(words.shape[1])]
    loads = "".join(f"ld.global.b32 {name}, [%rd8+{4 * i}]; " for i, name in enumerate(names))
    stores = "".join(f"st.global.b32 [%rd8+{4 * i}], {name}; " for i, name in enumerate(names[:count]))
    a = "{" + ", ".join(names[count:]) + "}" if case.registers else "%rd20"
    ins = case.instruction("{" + ", ".join(names[:count]) + "}", a, "%rd21", "%p2")
    body = (body or f"{FENCE} {{mma}} {COMMIT} {WAIT}").format(mma=ins)
    text = ptx_kernel(
        f"mul.wide.u32 %rd7, %r1, {4 * words.shape[1]}; add.s64 %rd8, %rd2, %rd7; {loads}"
        f"{start.replace('COUNT', str((SHARED - 1024) // 16))}"
        f"mov.b64 %rd20, {case.descriptor(0)}; mov.b64 %rd21, {case.descriptor(1)};"
        f"setp.eq.u32 %p2, {int(case.accumulate)}, 1; {body} {stores}",
        target="sm_90a",
    )
    gpu = device("sm_90a", mma=mma, seed=seed, checks=checks)
    x = gpu.from_torch(torch.from_numpy(case.image()))
    y = gpu.from_torch(torch.from_numpy(words.view(np.int32)))
    gpu.run_ptx(text, x, y, block=(128, 1, 1), shared_bytes=SHARED - 1024)
    out = np.ascontiguousarray(y.numpy()[:, :count]).view(case.c.dtype)
    result = np.zeros(case.c.size, case.c.dtype)
    result[places_d(case.n)] = out
    return result.reshape(case.c.shape), gpu


# Fragments -------------------------------------------------------------------------------------------------


def test_worked_positions():
    """m64n16: d5 of thread 38 (warp 1, lane 6) is row 16 + 1, column 8 + 5; d7 eight rows further down."""
    places = places_d(16)
    assert divmod(int(places[38, 5]), 16) == (17, 13)
    assert divmod(int(places[38, 7]), 16) == (25, 13)
    words = np.zeros((4, 32, 8), np.float32)
    words[1, 6, 5] = 1
    total = accumulator_of(tuple(np.moveaxis(words.view(np.uint32), 2, 0)), np.float32)
    assert np.argwhere(total.reshape(64, 16)).tolist() == [[17, 13]]


def crd2idx(shape, stride):
    """All offsets of one mode of a CuTe layout."""
    if isinstance(shape, int):
        return np.arange(shape) * stride
    total = np.zeros(1, int)
    for extent, step in zip(shape, stride, strict=True):
        total = (total[None, :] + crd2idx(extent, step)[:, None]).reshape(-1)
    return total


@pytest.mark.parametrize("n", [8, 72, 256])
def test_fragments_against_cute(n):
    """CuTe's layouts of A in registers and of D."""
    found = []

    @cute.jit
    def host():
        op = warpgroup.MmaF16BF16Op(
            cutlass.Float16, cutlass.Float32, (64, n, 16), warpgroup.OperandSource.RMEM,
            OperandMajorMode.K, OperandMajorMode.K,
        )  # fmt: skip
        mma = cute.make_tiled_mma(op)
        found.extend((x.shape, x.stride) for x in (mma.tv_layout_A, mma.tv_layout_C))

    with device("sm_90a"):
        host()
    (a_shape, a_stride), (c_shape, c_stride) = found
    a = (crd2idx(a_shape[0], a_stride[0])[:, None] + crd2idx(a_shape[1], a_stride[1])).astype(np.float16)
    registers = tuple(np.moveaxis(a.view(np.uint32).reshape(4, 32, 4), 2, 0))
    expected = np.arange(64 * 16).reshape(16, 64).T
    np.testing.assert_array_equal(rows_of(registers, "f16", 2).reshape(64, 16), expected)
    c = crd2idx(c_shape[0], c_stride[0])[:, None] + crd2idx(c_shape[1], c_stride[1])
    registers = tuple(np.moveaxis(c.astype(np.float32).view(np.uint32).reshape(4, 32, -1), 2, 0))
    expected = np.arange(64 * n).reshape(n, 64).T
    np.testing.assert_array_equal(accumulator_of(registers, np.float32).reshape(64, n), expected)


# Types, layouts, forms -------------------------------------------------------------------------------------

TYPES = [
    ("f16", "f16", "f32"), ("f16", "f16", "f16"), ("bf16", "bf16", "f32"), ("tf32", "tf32", "f32"),
    ("e4m3", "e5m2", "f32"), ("e5m2", "e5m2", "f16"), ("s8", "u8", "s32"), ("u8", "u8", "s32"),
]  # fmt: skip


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("mma", ["exact", "hardware"])
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_types(ptx_kernel, types, mma, registers):
    """Bit for bit what tensor_core says, with A in shared memory or registers."""
    for wide in (False, True):
        case = Case(16, *types, wide=wide, registers=registers, swizzle="32B")
        d, gpu = run(ptx_kernel, case, mma=mma)
        np.testing.assert_array_equal(d, case.expected(mma))
        kind = {"s8": "i8", "u8": "i8", "e4m3": "f8f6f4", "e5m2": "f8f6f4", "bf16": "f16"}.get(
            types[0], types[0]
        )
        assert gpu.counters[f"mma.{kind}"] == 1
        assert gpu.counters["mma.flops"] == 2 * 64 * 16 * case.k
        if not wide and types[2] != "s32":
            product = case.a.astype(np.float64) @ case.b.astype(np.float64).T
            np.testing.assert_array_equal(d, product + case.c)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("majors", [("K", "K"), ("MN", "K"), ("K", "MN"), ("MN", "MN")], ids="-".join)
@pytest.mark.parametrize("n", [8, 64, 256])
def test_layouts(ptx_kernel, n, majors, swizzle):
    """Every swizzle and major-ness that 16-bit types have."""
    case = Case(n, "bf16", "bf16", "f32", major_a=majors[0], major_b=majors[1], swizzle=swizzle)
    d, _ = run(ptx_kernel, case)
    np.testing.assert_array_equal(d, case.expected())


def test_transposed_b_with_a_in_registers(ptx_kernel):
    """The form with one transpose."""
    case = Case(64, "f16", "f16", "f32", major_b="MN", registers=True)
    np.testing.assert_array_equal(run(ptx_kernel, case)[0], case.expected())


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
def test_signs(ptx_kernel, signs, registers):
    """imm-scale of -1 negates an operand."""
    case = Case(8, "f16", "f16", "f32", signs=signs, registers=registers)
    expected = signs[0] * signs[1] * (case.a.astype(float) @ case.b.astype(float).T) + case.c
    np.testing.assert_array_equal(run(ptx_kernel, case)[0], expected)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_without_accumulation(ptx_kernel, types):
    """A false scale-d: D is not read."""
    case = Case(24, *types, accumulate=False)
    if types[2] != "s32":
        case.c[:] = np.nan
    np.testing.assert_array_equal(run(ptx_kernel, case)[0], case.expected())


def test_saturation(ptx_kernel):
    """.satfinite clamps 32-bit sums."""
    case = Case(32, "u8", "u8", "s32", extra=".satfinite")
    d, _ = run(ptx_kernel, case)
    np.testing.assert_array_equal(d, case.expected())
    assert (d == 2**31 - 1).any()


# Groups and order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_two_in_a_row(ptx_kernel, seed):
    """The accumulator of one is that of the next; groups in any number."""
    case = Case(64, "f16", "f16", "f32")
    body = f"{FENCE} {{mma}} {COMMIT} {{mma}} {{mma}} {COMMIT} wgmma.wait_group.sync.aligned 1; {WAIT}"
    d, gpu = run(ptx_kernel, case, body, seed=seed)
    np.testing.assert_array_equal(d, 3 * (case.a.astype(float) @ case.b.astype(float).T) + case.c)
    assert gpu.counters["wgmma.waits"] == 8
    events = gpu.trace.of("mma")
    assert [(e.warp, e.detail) for e in events] == [(0, {"m": 64, "n": 64, "k": 16})] * 3
    assert [e.end - e.start for e in events] == [64 * 64 * 16 // 2048] * 3
    # One behind the other, although they were issued at once; the wait lasts until the last has ended.
    assert all(a.end <= b.start for a, b in pairwise(events))
    assert {e.end for e in gpu.trace.of("wait") if "wait_group" in e.text} >= {events[-1].end}


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_warps_that_come_apart(ptx_kernel, seed, registers):
    """Warps of different speed: those that come first wait for the others, and all compute the same."""
    case = Case(16, "f16", "f16", "f32", registers=registers)
    slow = """
 shr.u32 %r9, %r1, 5; mul.lo.u32 %r9, %r9, 7;
SPIN: setp.eq.u32 %p3, %r9, 0; @%p3 bra READY; sub.u32 %r9, %r9, 1; bra SPIN;
READY:
"""
    again = slow.replace("SPIN", "S2").replace("READY", "R2")
    body = f"{slow} {FENCE} {{mma}} {again} {{mma}} {COMMIT} {WAIT}"
    d, gpu = run(ptx_kernel, case, body, seed=seed)
    np.testing.assert_array_equal(d, 2 * (case.a.astype(float) @ case.b.astype(float).T) + case.c)
    assert gpu.counters["mma.f16"] == 2


def test_a_warp_that_does_not_come(ptx_kernel):
    """The deadlock says which."""
    case = Case(8, "f16", "f16", "f32")
    body = f"setp.ge.u32 %p3, %r1, 96; @%p3 bra END; {FENCE} {{mma}} {COMMIT} {WAIT} END: bar.sync 1;"
    with pytest.raises(DeadlockError, match=r"the other warps of its warpgroup \(3 of the CTA\)"):
        run(ptx_kernel, case, body)


def test_warps_that_do_not_agree(ptx_kernel):
    """On the descriptor, or on scale-d."""
    case = Case(8, "f16", "f16", "f32")
    body = f"setp.ge.u32 %p3, %r1, LIMIT; @%p3 add.s64 %rd21, %rd21, 2; {FENCE} {{mma}} {COMMIT} {WAIT}"
    with pytest.raises(WarpgroupError, match="warps of a warpgroup do not agree"):
        run(ptx_kernel, case, body.replace("LIMIT", "96"))
    with pytest.raises(WarpgroupError, match="lanes of a warp do not agree"):
        run(ptx_kernel, case, body.replace("LIMIT", "5"))


def test_missing_fences(ptx_kernel):
    """Of wgmma, and of the proxy that wrote the operands."""
    case = Case(8, "f16", "f16", "f32")
    with pytest.raises(WarpgroupError, match=r"no wgmma\.fence") as caught:
        run(ptx_kernel, case, f"{{mma}} {COMMIT} {WAIT}")
    assert caught.value.line
    with pytest.raises(ProxyError):
        run(ptx_kernel, case, start=START.replace("fence.proxy.async.shared::cta;", ""))
    with pytest.raises(RaceError):
        run(ptx_kernel, case, start=START.replace("bar.sync 0;", ""), checks={"race"})


def test_every_warp_must_have_waited(ptx_kernel):
    """Not only the first one of the warpgroup knows that the operands are there."""
    case = Case(8, "f16", "f16", "f32")
    one = "setp.lt.u32 %p3, %r1, 32; @!%p3 bar.arrive 1, 128; @%p3 bar.sync 1, 128;"
    with pytest.raises(RaceError):
        run(ptx_kernel, case, start=START.replace("bar.sync 0;", one), checks={"race"})


def test_operands_that_are_overwritten(ptx_kernel):
    """Before the group is waited for it is a race, afterwards it is not."""
    case = Case(256, "f16", "f16", "f32", major_b="MN")
    over = "mul.wide.u32 %rd4, %r1, 16; add.s64 %rd6, %rd10, %rd4; bar.sync 0; st.shared.b32 [%rd6], %r3;"
    d, _ = run(ptx_kernel, case, f"{FENCE} {{mma}} {COMMIT} {WAIT} {over}")
    np.testing.assert_array_equal(d, case.expected())
    with pytest.raises(RaceError):
        run(ptx_kernel, case, f"{FENCE} {{mma}} {COMMIT} {over} {WAIT}")
    one_left = f"{{mma}} {COMMIT} {{mma}} {COMMIT} wgmma.wait_group.sync.aligned 1;"
    with pytest.raises(RaceError):
        run(ptx_kernel, case, f"{FENCE} {one_left} {over} {WAIT}")


# Which 16 bytes of A, 2048 bytes long, a lane (%r7) of a warp (%r9) is to copy, for %r10.
OWN_ROWS = {
    # 32 bytes a row.
    "K": "shl.b32 %r10, %r9, 5; add.u32 %r10, %r10, %r7;",
    # 128 bytes for each k: of its 8 chunks the warp's two, at places that the swizzle decides.
    "MN": """
 shr.u32 %r10, %r7, 1; and.b32 %r11, %r10, 7; shl.b32 %r10, %r10, 3; and.b32 %r12, %r7, 1;
 shl.b32 %r9, %r9, 1; add.u32 %r12, %r12, %r9; xor.b32 %r12, %r12, %r11; add.u32 %r10, %r10, %r12;
""",
}


@pytest.mark.parametrize("major", ["K", "MN"])
def test_a_warp_reads_its_rows_of_a(ptx_kernel, major):
    """A warp that has written the rows of A which are its own needs no other warp's word; for B it does."""
    copy = """
 mul.wide.u32 %rd4, %r10, 16; add.s64 %rd5, %rd1, %rd4; ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd5];
 add.s64 %rd6, %rd10, %rd4; st.shared.v4.b32 [%rd6], {%r3, %r4, %r5, %r6};
"""
    start = f"""
 and.b32 %r7, %r1, 31; shr.u32 %r9, %r1, 5; mov.u32 %r8, smem; cvt.u64.u32 %rd10, %r8;
 setp.ge.u32 %p3, %r1, 64; @%p3 bra COPIED; add.u32 %r10, %r1, {(B_AT - 1024) // 16}; {copy}
COPIED: fence.proxy.async.shared::cta; bar.sync 0;
 {OWN_ROWS[major]} {copy} fence.proxy.async.shared::cta;
"""
    case = Case(8, "f16", "f16", "f32", major_a=major, swizzle="32B" if major == "K" else "128B")
    d, _ = run(ptx_kernel, case, start=start)
    np.testing.assert_array_equal(d, case.expected())
    with pytest.raises(RaceError):
        run(ptx_kernel, case, start=start.replace("bar.sync 0;", ""), checks={"race"})
    with pytest.raises(RaceError):
        run(
            ptx_kernel,
            case,
            start=start.replace("shr.u32 %r9, %r1, 5;", "shr.u32 %r9, %r1, 5; xor.b32 %r9, %r9, 1;"),
        )


@pytest.mark.parametrize("seed", range(4))
def test_one_warp_waits_for_all_four(ptx_kernel, seed):
    """A warp that has waited may overwrite what the others read; what they did before, it does not know."""
    case = Case(64, "f16", "f16", "f32", swizzle="32B")
    slow = """
 shr.u32 %r9, %r1, 5; mul.lo.u32 %r9, %r9, 7;
SPIN: setp.eq.u32 %p3, %r9, 0; @%p3 bra READY; sub.u32 %r9, %r9, 1; bra SPIN;
READY: mul.wide.u32 %rd4, %r1, 16; add.s64 %rd6, %rd10, %rd4;
"""
    # 128 threads, 16 bytes each: rows of A, and of B, that other warps have read.
    over = "st.shared.b32 [%rd6], %r1; st.shared.b32 [%rd6+16384], %r1;"
    d, _ = run(ptx_kernel, case, f"{slow} {FENCE} {{mma}} {COMMIT} {WAIT} {over}", seed=seed)
    np.testing.assert_array_equal(d, case.expected())
    before = "st.shared.b32 [%rd6+4096], %r1;"
    after = "xor.b32 %r9, %r1, 32; mul.wide.u32 %rd4, %r9, 16; add.s64 %rd6, %rd10, %rd4;"
    after += " ld.shared.b32 %r9, [%rd6+4096];"
    with pytest.raises(RaceError):
        run(ptx_kernel, case, f"{slow} {before} {FENCE} {{mma}} {COMMIT} {WAIT} {after}", seed=seed)


def test_operations_nobody_waits_for(ptx_kernel):
    """Not committed, or committed and not waited for."""
    case = Case(8, "f16", "f16", "f32")
    with pytest.raises(WarpgroupError, match="has not committed"):
        run(ptx_kernel, case, f"{FENCE} {{mma}} {WAIT}")
    with pytest.raises(WarpgroupError, match="has not waited for"):
        run(ptx_kernel, case, f"{FENCE} {{mma}} {COMMIT} {{mma}} {COMMIT} wgmma.wait_group.sync.aligned 1;")


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("m64n8k16.f32.f16.bf16", "1, 1, 0, 0"), ("m64n8k16.f32.tf32.tf32", "1, 1"),
        ("m64n12k16.f32.f16.f16", "1, 1, 0, 0"), ("m64n40k32.s32.s8.s8", ""),
        ("m64n8k16.f16.bf16.bf16", "1, 1, 0, 0"), ("m64n8k32.f32.e4m3.e4m3", "1, 1, 0, 0"),
        ("m64n8k16.f32.f16.f16", "2, 1, 0, 0"), ("m64n8k256.s32.b1.b1.and.popc", ""),
        ("m64n16k16.f32.f16.f16", "1, 1, 0, 0"),
    ],
)  # fmt: skip
def test_forms_that_do_not_exist(ptx_kernel, name, operands):
    """Refused with their name."""
    tail = f", {operands}" if operands else ""
    text = f"wgmma.mma_async.sync.aligned.{name} {{%r3, %r4, %r5, %r6}}, %rd20, %rd21, %p2{tail};"
    with pytest.raises(UnsupportedInstruction, match=name):
        device("sm_90a").run_ptx(ptx_kernel(text, target="sm_90a"), 0, 0)


# CuTe ------------------------------------------------------------------------------------------------------


KIND = warpgroup.SmemLayoutAtomKind
ATOMS = {
    "K": (KIND.K_INTER, KIND.K_SW32, KIND.K_SW64, KIND.K_SW128),
    "MN": (KIND.MN_INTER, KIND.MN_SW32, KIND.MN_SW64, KIND.MN_SW128),
}
DEPTH = 4  # instructions along K


@cute.kernel
def _tile_kernel(
    mma: cute.TiledMma, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, layout_a: cute.ComposedLayout,
    layout_b: cute.ComposedLayout,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    smem = memory.SmemAllocator()
    sa = smem.allocate_tensor(a.element_type, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(b.element_type, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    for i in cutlass.range(cute.size(a) // 128, unroll=1):
        row, k = (i * 128 + thread) % 64, (i * 128 + thread) // 64
        sa[row, k] = a[row, k]
    for i in cutlass.range(cute.size(b) // 128, unroll=1):
        row, k = (i * 128 + thread) % b.shape[0], (i * 128 + thread) // b.shape[0]
        sb[row, k] = b[row, k]
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()
    part = mma.get_slice(thread)
    cra = mma.make_fragment_A(part.partition_A(sa))
    crb = mma.make_fragment_B(part.partition_B(sb))
    target = part.partition_C(c)
    total = cute.make_rmem_tensor(target.shape, c.element_type)
    warpgroup.fence()
    for k in cutlass.range_constexpr(DEPTH):
        mma.set(warpgroup.Field.ACCUMULATE, k > 0)
        cute.gemm(mma, total, cra[(None, None, k)], crb[(None, None, k)], total)
    warpgroup.commit_group()
    warpgroup.wait_group(0)
    cute.autovec_copy(total, target)


def tile_gemm(element, n, kind_a, kind_b):
    """A host function of pointers to A (64, K), B (n, K) and C (64, n), all row-major."""
    k = DEPTH * 32 * 8 // element.width
    majors = [
        OperandMajorMode.K if kind.name.startswith("K") else OperandMajorMode.MN for kind in (kind_a, kind_b)
    ]

    @cute.jit
    def host(a: cute.Pointer, b: cute.Pointer, c: cute.Pointer):
        mma = hopper_helpers.make_trivial_tiled_mma(
            element, element, majors[0], majors[1], c.dtype, (1, 1, 1), (64, n)
        )
        ta, tb, tc = (
            cute.make_tensor(p, cute.make_layout(shape, stride=(shape[1], 1)))
            for p, shape in ((a, (64, k)), (b, (n, k)), (c, (64, n)))
        )
        la = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind_a, element), (64, k), (0, 1))
        lb = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind_b, element), (n, k), (1, 0))
        _tile_kernel(mma, ta, tb, tc, la, lb).launch(grid=(1, 1, 1), block=(128, 1, 1))

    return host


# Type, accumulator, atoms of A and B.
TILES = [("f16", "f32", a, b) for i, a in enumerate(ATOMS["K"] + ATOMS["MN"]) for b in
         ((ATOMS["K"] + ATOMS["MN"])[(3 * i + 1) % 8], (ATOMS["MN"] + ATOMS["K"])[i])]  # fmt: skip
TILES += [("s8", "s32", a, b) for a, b in zip(ATOMS["K"], ATOMS["K"][::-1], strict=True)]
ELEMENTS = {"f16": cutlass.Float16, "s8": cutlass.Int8}


@pytest.mark.parametrize(("type_", "accumulator", "kind_a", "kind_b"), TILES, ids=str)
def test_layouts_of_cute(ptx_kernels, type_, accumulator, kind_a, kind_b):
    """CuTe's own layouts and descriptors, each major-ness and swizzle for A and for B."""
    rng = np.random.default_rng(1)
    n, k = 128, DEPTH * 32 // np.dtype(DTYPES[type_]).itemsize
    a, b = (torch.from_numpy(random(rng, type_, (rows, k), False)) for rows in (64, n))
    out = {"f32": (torch.float32, cutlass.Float32), "s32": (torch.int32, cutlass.Int32)}[accumulator]
    with device("sm_90a") as gpu:
        a, b, c = gpu.from_torch(a), gpu.from_torch(b), gpu.from_torch(torch.zeros(64, n, dtype=out[0]))
        types = (ELEMENTS[type_], ELEMENTS[type_], out[1])
        pointers = [ptx_kernels.pointer(t, x.data_ptr()) for t, x in zip(types, (a, b, c), strict=True)]
        function = tile_gemm(ELEMENTS[type_], n, kind_a, kind_b)
        cute.compile(function, *pointers)(*pointers)
    assert torch.equal(c.double(), a.double() @ b.double().T)


@pytest.mark.parametrize("seed", range(2))
def test_a_gemm_of_cute(ptx_kernels, seed):
    """The kernel that other tests parse: TMA, mbarrier, wgmma; against torch."""
    torch.manual_seed(seed)
    a, b = torch.randint(-8, 9, (64, 256)).half(), torch.randint(-8, 9, (64, 256)).half()
    with device("sm_90a", seed=seed) as gpu:
        a, b, c = gpu.from_torch(a), gpu.from_torch(b), gpu.from_torch(torch.zeros(64, 64))
        pointers = [ptx_kernels.pointer(t, x.data_ptr()) for t, x in
                    ((ptx_kernels.HALF, a), (ptx_kernels.HALF, b), (ptx_kernels.SINGLE, c))]  # fmt: skip
        cute.compile(ptx_kernels.hopper_gemm, *pointers, cutlass.Int32(256))(*pointers, cutlass.Int32(256))
        assert torch.equal(c, a.float() @ b.float().T)
