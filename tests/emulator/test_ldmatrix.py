"""ldmatrix and stmatrix: worked positions, CuTe's thread-value layouts, and both in a kernel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cutlass import Float16, Uint8, cute
from cutlass.cute.nvgpu import warp

from dsv4lab.emulator import AddressError, DeadlockError, UnsupportedInstruction, device
from dsv4lab.emulator.convergence import ConvergenceError
from dsv4lab.emulator.isa.ldmatrix import Form, table
from dsv4lab.emulator.isa.warp_wide import kept
from dsv4lab.emulator.ptx import Register

# CuTe's atom, its type, and the form that it becomes.
ATOMS = [
    (op(trans, count), Float16, Form(name, "m8n8", count, trans, "b16"))
    for op, name in ((warp.LdMatrix8x8x16bOp, "ldmatrix"), (warp.StMatrix8x8x16bOp, "stmatrix"))
    for trans in (False, True)
    for count in (1, 2, 4)
]
ATOMS += [
    (warp.LdMatrix16x16x8bOp(True, count), Uint8, Form("ldmatrix", "m16n16", count, True, "b8"))
    for count in (1, 2)
]
ATOMS += [
    (warp.StMatrix16x8x8bOp(True, count), Uint8, Form("stmatrix", "m16n8", count, True, "b8"))
    for count in (1, 2, 4)
]
ATOMS += [
    (warp.LdMatrix8x16x8bOp(False, count, bits), Uint8, Form("ldmatrix", "m8n16", count, False, type_))
    for count in (1, 2, 4)
    for bits, type_ in ((4, "b4x16_p64"), (6, "b6x16_p32"))
]


def offsets(layout):
    """A layout (threads, values) with its nested shape, as an array."""

    def mode(shape, stride):
        if isinstance(shape, int):
            return np.arange(shape) * stride
        total = np.zeros(1, int)
        for extent, step in zip(shape, stride, strict=True):
            total = (total[None, :] + mode(extent, step)[:, None]).reshape(-1)
        return total

    shape, stride = layout
    return mode(shape[0], stride[0])[:, None] + mode(shape[1], stride[1])


@pytest.mark.parametrize(
    ("op", "type_", "form"), ATOMS, ids=lambda p: "-".join(map(str, p)) if isinstance(p, Form) else ""
)
def test_tables_against_cute(op, type_, form):
    """CuTe's layouts of registers and of rows map to the same matrix elements."""
    found = []

    @cute.jit
    def host():
        atom = cute.make_copy_atom(op, type_)
        for layout in (atom.layout_src_tv, atom.layout_dst_tv):
            found.append((layout.shape, layout.stride))

    host()
    registers, rows = (offsets(layout) for layout in (found if form.op == "stmatrix" else found[::-1]))
    width = 2 if form.type == "b16" else 1
    places = table(form).reshape(form.registers, 32, 4 // width, width)[..., 0]
    assert rows.shape[1] * width == 16
    # The matrix element at a place in the rows is the one that the register holds.
    elements = rows[places // 16, places % 16 // width]
    expected = registers.reshape(32, form.registers, 4 // width).swapaxes(0, 1)
    np.testing.assert_array_equal(elements, expected)


def test_worked_positions():
    """Lane 5 of an 8x8 matrix: row 1, columns 2 and 3; transposed rows 2 and 3, column 1."""
    plain = table(Form("ldmatrix", "m8n8", 4, False, "b16"))
    assert plain[0, 5].tolist() == [16 + 4, 16 + 5, 16 + 6, 16 + 7]
    assert plain[3, 31].tolist() == [31 * 16 + b for b in (12, 13, 14, 15)]
    trans = table(Form("ldmatrix", "m8n8", 4, True, "b16"))
    assert trans[0, 5].tolist() == [2 * 16 + 2, 2 * 16 + 3, 3 * 16 + 2, 3 * 16 + 3]
    square = table(Form("ldmatrix", "m16n16", 2, True, "b8"))
    assert square[1, 5].tolist() == [row * 16 + 1 + 8 for row in (4, 5, 6, 7)]
    assert square[2, 0].tolist() == [row * 16 for row in (16, 17, 18, 19)]
    assert table(Form("stmatrix", "m16n8", 1, True, "b8"))[0, 5].tolist() == [33, 49, 41, 57]


BODY = """
 // lane i stores 16 bytes of x into row (5 i) % 32 of shared memory, and gives that row's address
 mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd1, %rd4;
 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd5];
 mul.lo.u32 %r2, %r1, 5; and.b32 %r2, %r2, 31; shl.b32 %r2, %r2, 4;
 mov.u32 %r3, smem; add.u32 %r3, %r3, %r2;
 cvt.u64.u32 %rd6, %r3; cvta.shared.u64 %rd7, %rd6;
 {first}
 bar.warp.sync -1;
 {second}
 add.s64 %rd8, %rd2, %rd4;
 st.global.v4.b32 [%rd8], {{%r20, %r21, %r22, %r23}};
"""
FILL = "st.shared.v4.b32 [%r3], {%r10, %r11, %r12, %r13};"
READ = "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r3];"
CLEAR = "".join(f"mov.u32 %r{i}, 0; " for i in range(20, 24))
ZERO = CLEAR + "st.shared.v4.b32 [%r3], {%r20, %r21, %r22, %r23};"


def run(ptx_kernel, first, second, seed=0, threads=32):
    """x (32, 16) random bytes, and y after the kernel."""
    rng = np.random.default_rng(seed)
    gpu = device("sm_100a", seed=seed)
    x = gpu.from_torch(torch.from_numpy(rng.integers(0, 256, (32, 16)).astype(np.uint8)))
    y = gpu.from_torch(torch.zeros(32, 16, dtype=torch.uint8))
    text = ptx_kernel(BODY.format(first=first, second=second))
    gpu.run_ptx(text, x, y, shared_bytes=512, block=(threads, 1, 1))
    return x.numpy(), y.numpy(), gpu


@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_in_a_kernel(ptx_kernel, count, trans, space):
    """8x8 matrices as NumPy cuts them out of the rows, all state spaces."""
    targets = ", ".join(f"%r{20 + i}" for i in range(count))
    address = "%rd7" if not space else "%r3"
    form = f"m8n8.x{count}{'.trans' if trans else ''}{space}.b16"
    load = f"ldmatrix.sync.aligned.{form} {{{targets}}}, [{address}];"
    x, y, gpu = run(ptx_kernel, FILL, CLEAR + load)
    matrices = x.view(np.uint16).reshape(4, 8, 8)
    if trans:
        matrices = matrices.swapaxes(1, 2)
    fragments = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32).T.copy()
    fragments[:, count:] = 0
    np.testing.assert_array_equal(y.view(np.uint32), fragments)
    assert gpu.counters["shared.load_bytes"] == 128 * count


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_in_a_kernel(ptx_kernel, count, trans):
    """What ldmatrix would read back."""
    sources = ", ".join(f"%r{10 + i}" for i in range(count))
    form = f"m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    store = f"stmatrix.sync.aligned.{form} [%r3], {{{sources}}};"
    x, y, _ = run(ptx_kernel, ZERO, f"{store} bar.warp.sync 0xffffffff; {READ}")
    matrices = np.ascontiguousarray(x.view(np.uint32).T).view(np.uint16).reshape(4, 8, 8)
    if trans:
        matrices = matrices.swapaxes(1, 2)
    expected = np.ascontiguousarray(matrices).view(np.uint8).reshape(32, 16).copy()
    expected[8 * count :] = 0
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("count", [1, 2])
def test_transposed_bytes_in_a_kernel(ptx_kernel, count, bits):
    """16x16 matrices of 8-bit elements, or of packed ones in the low bits."""
    targets = ", ".join(f"%r{20 + i}" for i in range(2 * count))
    type_ = {4: "b8x16.b4x16_p64", 6: "b8x16.b6x16_p32", 8: "b8"}[bits]
    load = f"ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.{type_} {{{targets}}}, [%r3];"
    x, y, _ = run(ptx_kernel, FILL, CLEAR + load)
    packed = np.array([int.from_bytes(row.tobytes(), "little") for row in x], object)
    codes = np.array([[word >> bits * i & (1 << bits) - 1 for i in range(16)] for word in packed], np.uint8)
    for lane, register, byte in [(0, 0, 0), (5, 0, 2), (5, 1, 3), (31, 2, 1), (17, 3, 0)]:
        row, column = 4 * (lane % 4) + byte, lane // 4 + 8 * (register % 2)
        inside = register < 2 * count
        assert y[lane, 4 * register + byte] == (codes[16 * (register // 2) + row, column] if inside else 0)


def test_bytes_stored_transposed_in_a_kernel(ptx_kernel):
    """A 16x8 fragment of bytes, as an accumulator's, becomes eight rows that are its columns."""
    store = "stmatrix.sync.aligned.m16n8.x2.trans.shared.b8 [%r3], {%r10, %r11};"
    x, y, _ = run(ptx_kernel, ZERO, f"{store} bar.warp.sync 0xffffffff; {READ}")
    for lane in range(32):
        for matrix in range(2):
            for e in range(4):
                row, column = lane // 4 + 8 * (e // 2), 2 * (lane % 4) + e % 2
                assert y[8 * matrix + column, row] == x[lane, 4 * matrix + e]
    assert (y[16:] == 0).all()


def test_the_address_may_be_a_destination(ptx_kernel):
    """Registers are read before they are written."""
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r21, %r22, %r23}, [%r3]; mov.u32 %r20, %r3;"
    x, y, _ = run(ptx_kernel, FILL, load)
    fragments = x.view(np.uint16).reshape(4, 8, 8).copy().view(np.uint32).reshape(4, 32).T
    np.testing.assert_array_equal(y.view(np.uint32), fragments)


def test_parked_rows_keep_their_destinations():
    """They execute again, and what is written may be read."""
    destination, unused = Register("%r1", "b32", 0), Register("%r2", "b32", 1)
    machine = SimpleNamespace(registers=[np.arange(64, dtype=np.uint32).reshape(2, 32), None])

    class Rows(SimpleNamespace):
        def __len__(self):
            return 2

    batch = Rows(machine=machine, parked={1: "why"}, warps=np.array([1, 0]))
    new = np.full((2, 32), -1, np.int32)
    first, second = kept(batch, ((destination, "s32"), (unused, "s32")), (new, new))
    assert first.dtype == np.int32
    assert first[0].tolist() == [-1] * 32
    assert first[1].tolist() == list(range(32))
    assert (second == -1).all()


# Errors ----------------------------------------------------------------------------------------------------


def test_rows_must_be_aligned(ptx_kernel):
    """To 16 bytes, whatever is read of them."""
    load = "add.u32 %r3, %r3, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r3];"
    with pytest.raises(AddressError, match="not aligned to 16 bytes") as caught:
        run(ptx_kernel, FILL, load)
    assert caught.value.lane == 0


ONE = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r3];"


def test_addresses_of_other_lanes_are_not_looked_at(ptx_kernel):
    """x1 takes those of lanes 0 to 7."""
    wild = "setp.gt.u32 %p1, %r1, 7; @%p1 mov.u32 %r3, 0x7ffffff1; "
    x, y, _ = run(ptx_kernel, FILL, CLEAR + wild + ONE)
    assert (y[:, :4].reshape(8, 16) == x[:8]).all()


def test_lanes_that_are_missing(ptx_kernel):
    """All 32 must come."""
    with pytest.raises(DeadlockError, match="lanes 0xffffff00 of its warp to come there too"):
        run(ptx_kernel, FILL, f"setp.gt.u32 %p1, %r1, 7; @%p1 bra END; {ONE} END:")
    with pytest.raises(ConvergenceError, match="guard of 0xffffff00 is false"):
        run(ptx_kernel, FILL, f"setp.le.u32 %p1, %r1, 7; @%p1 {ONE}")
    with pytest.raises(ConvergenceError, match="takes all 32 lanes of a warp, and 8"):
        run(ptx_kernel, FILL, ONE, threads=8)


@pytest.mark.parametrize(
    "form",
    ["ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r20, %r21}, [%r3];",
     "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {%r20, %r21, %r22, %r23}, [%r3];",
     "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r20}, [%r3];",
     "stmatrix.sync.aligned.m16n8.x1.shared.b8 [%r3], {%r20};"],
)  # fmt: skip
def test_forms_that_do_not_exist(ptx_kernel, form):
    """Refused with their name."""
    with pytest.raises(UnsupportedInstruction, match="matrix"):
        run(ptx_kernel, FILL, form)
