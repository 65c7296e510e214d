"""tcgen05.alloc, .ld, .st, .cp and .commit, executed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dsv4lab.emulator.errors import AddressError, DeadlockError, UninitialisedError
from dsv4lab.emulator.happens_before import RaceError
from dsv4lab.emulator.isa.registry import UnsupportedInstruction
from dsv4lab.emulator.isa.tcgen05_layouts import fragment
from dsv4lab.emulator.tensor_memory import TensorMemoryError

path = Path(__file__).with_name("tcgen05_text.py")
spec = importlib.util.spec_from_file_location("tcgen05_text", path)
text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text)


def vector(count, first=20):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


# Registers --------------------------------------------------------------------------------------------------


def fill(columns):
    """Store word (lane, column) of x to all cells of some columns."""
    lines = [f" mul.lo.u32 %r6, %r1, {4 * columns};", " cvt.u64.u32 %rd5, %r6;", " add.u64 %rd5, %rd5, %rd1;"]
    for start in range(0, columns, 8):
        lines += [f" ld.global.b32 %r{20 + i}, [%rd5+{4 * (start + i)}];" for i in range(8)]
        lines.append(f" tcgen05.st.sync.aligned.32x32b.x8.b32 [%r11+{start}], {vector(8)};")
    return "\n".join([*lines, " tcgen05.wait::st.sync.aligned;"])


def words_of(pattern, cells):
    """Cells (128, columns) that the registers of four warps hold: (registers, 128)."""
    lane, column = pattern // 512, pattern % 512
    return np.concatenate([cells[32 * warp :][lane, column] for warp in range(4)], axis=1)


def registers_to_y(count):
    lines = [" add.u64 %rd5, %rd2, %rd3;"]
    lines += [f" st.global.b32 [%rd5+{512 * i}], %r{20 + i};" for i in range(count)]
    return "\n".join(lines)


FORMS = [
    ("32x32b", 1, 0),
    ("32x32b", 16, 0),
    ("16x64b", 4, 0),
    ("16x128b", 2, 0),
    ("16x256b", 4, 0),
    ("16x256b", 2, 16),
    ("16x32bx2", 8, 0),
]


@pytest.mark.parametrize("shape, repeat, lane", FORMS)
def test_loads(ptx_kernel, shape, repeat, lane):
    split = ", 11" if shape == "16x32bx2" else ""
    pattern = fragment(shape, repeat, False, 11) + lane * 512 + 3
    load = f"tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {vector(len(pattern))}, [%r7]{split};"
    body = f"{fill(64)}\n add.u32 %r7, %r11, {lane << 16 | 3};\n {load}\n{registers_to_y(len(pattern))}"
    x = noise(128, 64)
    y, _ = text.run(text.program(body, ptx_kernel), x, 128 * len(pattern))
    np.testing.assert_array_equal(y.reshape(-1, 128), words_of(pattern, x))


@pytest.mark.parametrize("shape, repeat, lane", FORMS)
def test_stores(ptx_kernel, shape, repeat, lane):
    split = ", 11" if shape == "16x32bx2" else ""
    pattern = fragment(shape, repeat, False, 11) + lane * 512 + 3
    body = fill(64) + "\n add.u64 %rd6, %rd2, %rd3;"
    for i in range(len(pattern)):
        body += f"\n mad.lo.u32 %r{20 + i}, %r1, 1000, {i};"
    body += f"\n add.u32 %r7, %r11, {lane << 16 | 3};"
    body += f"\n tcgen05.st.sync.aligned.{shape}.x{repeat}.b32 [%r7]{split}, {vector(len(pattern))};"
    body += "\n tcgen05.wait::st.sync.aligned;\n" + text.load(64, 150)
    x = noise(128, 64)
    y, _ = text.run(text.program(body, ptx_kernel), x, 128 * 64)
    expected = x.copy()
    for thread in range(128):
        for register, cell in enumerate(pattern[:, thread % 32]):
            expected[thread // 32 * 32 + cell // 512, cell % 512] = 1000 * thread + register
    np.testing.assert_array_equal(y.reshape(128, 64), expected)


def test_packed_loads_take_the_low_halves_of_two_columns(ptx_kernel):
    body = f"{fill(16)}\n tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {vector(4)}, [%r11+2];\n"
    x = noise(128, 16)
    y, _ = text.run(text.program(body + registers_to_y(4), ptx_kernel), x, 128 * 4)
    low = x & 0xFFFF
    np.testing.assert_array_equal(y.reshape(4, 128), (low[:, 2:10:2] | low[:, 3:10:2] << 16).T)


def test_unpacked_stores_fill_two_columns(ptx_kernel):
    body = "\n".join(f" mov.b32 %r{20 + i}, {0xBEEF0000 + 0x1000 * i + 7:#x};" for i in range(4))
    body += f"\n tcgen05.st.sync.aligned.32x32b.x4.unpack::16b.b32 [%r11], {vector(4)};"
    body += "\n tcgen05.wait::st.sync.aligned;\n" + text.load(8)
    y, _ = text.run(text.program(body, ptx_kernel), None, 128 * 8)
    expected = [7, 0xBEEF, 0x1007, 0xBEEF, 0x2007, 0xBEEF, 0x3007, 0xBEEF]
    assert (y.reshape(128, 8) == expected).all()


@pytest.mark.parametrize(
    "form, expected",
    [
        ("max.f32", lambda x: np.fmax.reduce(x.view(np.float32), axis=1)),
        ("min.f32", lambda x: np.fmin.reduce(x.view(np.float32), axis=1)),
        ("min.abs.f32", lambda x: np.fmin.reduce(np.abs(x.view(np.float32)), axis=1)),
        ("max.NaN.f32", lambda x: np.maximum.reduce(x.view(np.float32), axis=1)),
        ("min.u32", lambda x: x.min(axis=1)),
        ("max.s32", lambda x: x.view(np.int32).max(axis=1)),
    ],
)
def test_loads_that_reduce(ptx_kernel, form, expected):
    load = f"tcgen05.ld.red.sync.aligned.32x32b.x8.{form} {vector(8)}, %r60, [%r11];"
    body = f"{fill(8)}\n {load}\n add.u64 %rd5, %rd2, %rd3;\n st.global.b32 [%rd5], %r60;"
    x = noise(128, 8) & 0xBFFFFFFF  # no NaN
    x[3, 4] = 0xFFC00001
    x[5] = 0x7FC00000
    y, _ = text.run(text.program(body, ptx_kernel), x, 128)
    with np.errstate(invalid="ignore"):
        right = expected(x)
    np.testing.assert_array_equal(y.view(right.dtype), right)
    if "f32" in form:
        assert y[5] == 0x7FFFFFFF


def test_a_reduction_tells_zeros_apart(ptx_kernel):
    values = " mov.b32 %r20, 0;\n mov.b32 %r21, 0x80000000;"
    store = "\n tcgen05.st.sync.aligned.32x32b.x2.b32 [%r11], {%r20, %r21};\n tcgen05.wait::st.sync.aligned;"
    loads = "".join(
        f"\n tcgen05.ld.red.sync.aligned.32x32b.x2.{op}.f32 {{%r22, %r23}}, %r{place}, [%r11];"
        for op, place in (("min", 20), ("max", 21))
    )
    y, _ = text.run(text.program(values + store + loads + registers_to_y(2), ptx_kernel), None, 256)
    assert (y.reshape(2, 128) == [[0x80000000], [0]]).all()


def test_a_warp_reaches_only_its_own_lanes(ptx_kernel):
    body = f" add.u32 %r7, %r10, 0;\n tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7], {vector(1)};"
    with pytest.raises(TensorMemoryError, match=r"lane 0 is executed by warp .* can reach lanes (32|64|96)"):
        text.run(text.program(body, ptx_kernel))


@pytest.mark.parametrize("lane", [8, 16, 32])
def test_a_fragment_stays_in_the_quarter(ptx_kernel, lane):
    body = f" add.u32 %r7, %r11, {lane << 16};\n tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7], {vector(1)};"
    with pytest.raises(TensorMemoryError, match="can reach lanes"):
        text.run(text.program(body, ptx_kernel))


def test_all_lanes_of_a_warp_take_part(ptx_kernel):
    body = f" @!%p2 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {vector(1)};"
    with pytest.raises(TensorMemoryError, match="some lanes of a warp"):
        text.run(text.program(body, ptx_kernel))
    body = f" add.u32 %r7, %r11, %r1;\n tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7], {vector(1)};"
    with pytest.raises(TensorMemoryError, match="different addresses"):
        text.run(text.program(body, ptx_kernel))


def test_a_load_of_cells_nobody_wrote_is_named(ptx_kernel):
    with pytest.raises(UninitialisedError, match=r"warp 0.* first in lane 0, column 0.*tcgen05\.ld"):
        text.run(text.program(text.load(8), ptx_kernel), None, 1024)


def test_a_load_after_a_store_needs_the_wait(ptx_kernel):
    store = f" tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {vector(1)};"
    load = f" tcgen05.ld.sync.aligned.32x32b.x1.b32 {vector(1, 30)}, [%r11];"
    with pytest.raises(RaceError):
        text.run(text.program(f"{store}\n{load}", ptx_kernel))
    text.run(text.program(f"{store}\n tcgen05.wait::st.sync.aligned;\n{load}", ptx_kernel))


def test_forms_that_are_refused(ptx_kernel):
    for form in ("ld.sync.aligned.32x32b.x2.b32 {%r20}, [%r11]", "shift.cta_group::1.down [%r11]"):
        with pytest.raises(UnsupportedInstruction, match="line"):
            text.run(text.program(f" tcgen05.{form};", ptx_kernel))


# Allocation -------------------------------------------------------------------------------------------------


def test_memory_must_be_freed(ptx_kernel):
    with pytest.raises(TensorMemoryError, match="ends without freeing its tensor memory: 64 columns at 0x0"):
        text.run(text.program("", ptx_kernel, columns=64, free=False))
    text.run(text.program("", ptx_kernel, columns=64, free=False), checks=())


def test_memory_is_not_used_after_it_is_freed(ptx_kernel):
    body = """
 @%p1 bra FREED;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;
FREED:
 bar.sync 0;
 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {%r20};
"""
    with pytest.raises(TensorMemoryError, match="column 0 of tensor memory was freed"):
        text.run(text.program(body, ptx_kernel, columns=32, free=False))


def test_an_allocation_waits_for_columns(ptx_kernel):
    # Warp 1 can have its columns only when warp 0 gives its own back.
    body = """
 setp.ne.u32 %p5, %r2, 1;
 @%p5 bra OTHERS;
 add.u32 %r6, %r5, 16;
 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r6], 512;
 ld.shared.b32 %r7, [%r6];
 st.global.b32 [%rd2], %r7;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 512;
OTHERS:
 @%p1 bra END;
 mov.u32 %r6, 0;
AGAIN:
 add.u32 %r6, %r6, 1;
 setp.lt.u32 %p6, %r6, 300;
 @%p6 bra AGAIN;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 512;
 bra END;
"""
    for seed in range(4):
        y, _ = text.run(text.program(body, ptx_kernel, permit=False), None, 1, seed=seed)
        assert y[0] == 0


def test_an_allocation_that_never_gets_columns(ptx_kernel):
    body = """
 @%p1 bra OTHERS;
 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 512;
OTHERS:
"""
    match = "waits at PTX line .* for 512 free columns of tensor memory; allocated are 512 columns at 0x0"
    with pytest.raises(DeadlockError, match=match):
        text.run(text.program(body, ptx_kernel, permit=False))


def test_an_address_goes_through_a_generic_pointer(ptx_kernel):
    body = """
 @%p1 bra OTHERS;
 cvt.u64.u32 %rd7, %r5;
 cvta.shared.u64 %rd7, %rd7;
 tcgen05.alloc.cta_group::1.sync.aligned.b32 [%rd7+16], 64;
 ld.shared.b32 %r7, [%r5+16];
 st.global.b32 [%rd2], %r7;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 64;
OTHERS:
"""
    y, _ = text.run(text.program(body, ptx_kernel, columns=64, permit=False), None, 1)
    assert y[0] == 64


def test_a_pair_allocates_and_frees_together(ptx_kernel):
    body = " mul.wide.u32 %rd5, %r4, 4;\n add.u64 %rd5, %rd5, %rd2;\n st.global.b32 [%rd5], %r10;"
    for seed in range(4):
        y, _ = text.run(text.program(body, ptx_kernel, group=2), None, 2, ctas=2, seed=seed)
        assert y.tolist() == [0, 0]


def test_one_of_a_pair_alone_waits_for_ever(ptx_kernel):
    source = text.program("", ptx_kernel, group=2, columns=64)
    alone = source.replace(" @%p1 bra ALLOCATED;", " @%p1 bra ALLOCATED;\n @%p3 bra ALLOCATED;")
    with pytest.raises(DeadlockError, match=r"tcgen05\.alloc of 64 columns in the peer CTA"):
        text.run(alone, ctas=2)
    alone = source.replace(" @%p1 bra END;", " @%p1 bra END;\n @%p3 bra END;")
    with pytest.raises(DeadlockError, match=r"tcgen05\.dealloc of 64 columns in the peer CTA"):
        text.run(alone, ctas=2)


def test_a_pair_agrees_on_the_columns(ptx_kernel):
    source = text.program("", ptx_kernel, group=2, columns=64)
    source = source.replace("[%r5], 64;", "[%r5], %r9;")
    source = source.replace(
        " @%p1 bra ALLOCATED;", " @%p1 bra ALLOCATED;\n add.u32 %r9, %r4, 1;\n shl.b32 %r9, %r9, 5;"
    )
    with pytest.raises(TensorMemoryError, match=r"allocate (32 and 64|64 and 32) columns together"):
        text.run(source, ctas=2)


def test_all_instructions_have_one_cta_group(ptx_kernel):
    source = text.program("", ptx_kernel).replace("permit.cta_group::1", "permit.cta_group::2")
    with pytest.raises(TensorMemoryError, match=r"group::2 in a kernel that has others with .cta_group::1"):
        text.run(source, ctas=2)
    with pytest.raises(TensorMemoryError, match=r"in a cluster of 1 CTA"):
        text.run(text.program("", ptx_kernel, group=2))


# Copies from shared memory ----------------------------------------------------------------------------------


def copied(ptx_kernel, form, words, columns=4, group=1, lane=0, **descriptor):
    """Cells (CTAs, 128, columns) after a copy to column 4 of `words` (CTAs, n) of shared memory."""
    body = "" if form[0] != "4" else cleared(columns)
    copy = f" add.u32 %r7, %r10, {lane << 16 | 4};\n mov.b64 %rd7, {text.matrix_descriptor(0, **descriptor)};"
    copy += f"\n tcgen05.cp.cta_group::{group}.{form} [%r7], %rd7;"
    body += text.committed(copy, group, ", %rs1" if group == 2 else "") + text.load(columns, first=4)
    source = text.program(f" mov.b16 %rs1, 3;\n{body}", ptx_kernel, words=words.shape[1], group=group)
    y, _ = text.run(source, words, len(words) * 128 * columns, ctas=len(words))
    return y.reshape(len(words), 128, columns)


def cleared(columns):
    """Store zeros to columns from 4 on."""
    stores = "".join(
        f" tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11+{4 + i}], {{%r20}};\n" for i in range(columns)
    )
    return f" mov.b32 %r20, 0;\n{stores} tcgen05.wait::st.sync.aligned;\n bar.sync 0;\n"


def source_rows(words, rows, chunks=1, leading=0, stride=128):
    """Rows of a K-major matrix without swizzle: words (rows, 4 * chunks)."""
    chunk = words.reshape(-1, 4)
    row = np.arange(rows)
    first = row % 8 + row // 8 * (stride // 16)
    return np.concatenate([chunk[first + i * leading // 16] for i in range(chunks)], axis=1)


def test_copies_of_scales_to_all_quarters(ptx_kernel):
    words = noise(1, 256)
    found = copied(ptx_kernel, "32x128b.warpx4", words, stride=128)
    # Row 9, the second of the second group of eight, goes to lanes 9, 41, 73 and 105.
    assert (found[0, [9, 41, 73, 105]] == words[0, 36:40]).all()
    np.testing.assert_array_equal(found[0], np.tile(source_rows(words[0], 32), (4, 1)))
    found = copied(ptx_kernel, "32x128b.warpx4", words, stride=256)
    np.testing.assert_array_equal(found[0], np.tile(source_rows(words[0], 32, stride=256), (4, 1)))


def test_copies_to_pairs_of_quarters(ptx_kernel):
    words = noise(1, 256)
    rows = source_rows(words[0], 64)
    found = copied(ptx_kernel, "64x128b.warpx2::02_13", words, stride=128)
    np.testing.assert_array_equal(found[0], np.concatenate([rows, rows]))
    found = copied(ptx_kernel, "64x128b.warpx2::01_23", words, stride=128)
    np.testing.assert_array_equal(found[0], np.concatenate([rows[:32], rows[:32], rows[32:], rows[32:]]))


def test_copies_of_all_lanes(ptx_kernel):
    words = noise(1, 1024)
    found = copied(ptx_kernel, "128x128b", words, stride=128)
    np.testing.assert_array_equal(found[0], source_rows(words[0], 128))
    found = copied(ptx_kernel, "128x256b", words, 8, stride=128, leading=2048)
    np.testing.assert_array_equal(found[0], source_rows(words[0], 128, 2, 2048))


def test_a_copy_through_a_swizzle(ptx_kernel):
    words = noise(1, 1024)
    found = copied(ptx_kernel, "128x256b", words, 8, stride=256, swizzle=6)
    chunks = words[0].reshape(-1, 2, 4)
    # Of the rows 4 to 7 in each eight the two chunks change places.
    swapped = np.arange(128) % 8 >= 4
    right = np.where(swapped[:, None, None], chunks[:, ::-1], chunks).reshape(128, 8)
    np.testing.assert_array_equal(found[0], right)


def test_a_copy_to_one_lane_of_each_quarter(ptx_kernel):
    words = noise(1, 128)
    found = copied(ptx_kernel, "4x256b", words, 8, lane=31, stride=128, leading=128)
    expected = np.zeros((128, 8), np.uint32)
    expected[31::32] = source_rows(words[0], 4, 2, 128)
    np.testing.assert_array_equal(found[0], expected)


def test_each_cta_of_a_pair_copies_its_own(ptx_kernel):
    words = noise(2, 128)
    found = copied(ptx_kernel, "32x128b.warpx4", words, group=2, stride=128)
    for cta in range(2):
        np.testing.assert_array_equal(found[cta], np.tile(source_rows(words[cta], 32), (4, 1)))


@pytest.mark.parametrize("form, bits, shift", [("b8x16.b4x16_p64", 4, 2), ("b8x16.b6x16_p32", 6, 0)])
def test_copies_that_unpack_small_floats(ptx_kernel, form, bits, shift):
    words = noise(1, 512)
    found = copied(ptx_kernel, f"128x128b.{form}", words, stride=128)
    for lane in (0, 77):
        chunk = int.from_bytes(words[0, 4 * lane : 4 * lane + 4].tobytes(), "little")
        elements = [(chunk >> bits * i & (1 << bits) - 1) << shift for i in range(16)]
        assert found[0, lane].view(np.uint8).tolist() == elements


def test_a_copy_begins_at_lane_0(ptx_kernel):
    with pytest.raises(TensorMemoryError, match=r"tcgen05\.cp to lane 16"):
        copied(ptx_kernel, "128x128b", noise(1, 512), lane=16, stride=128)


def test_a_copy_reads_only_what_was_written(ptx_kernel):
    with pytest.raises(UninitialisedError, match=r"shared memory .*tcgen05\.cp"):
        copied(ptx_kernel, "128x128b", noise(1, 384), stride=128)


# Commit -----------------------------------------------------------------------------------------------------


def test_a_load_that_does_not_wait_for_the_commit_is_a_race(ptx_kernel):
    body = text.committed(
        f" mov.b64 %rd7, {text.matrix_descriptor(0, stride=128)};\n"
        " tcgen05.cp.cta_group::1.32x128b.warpx4 [%r10], %rd7;"
    )
    waited = text.program(body + text.load(4), ptx_kernel, words=128)
    text.run(waited, noise(128), 512)
    early = waited.replace(" @!%p4 bra WAITING;", "")
    with pytest.raises((RaceError, UninitialisedError)):
        text.run(early, noise(128), 512)


def test_a_commit_arrives_at_the_ctas_of_its_mask(ptx_kernel):
    body = " mov.b16 %rs1, 3;\n" + text.committed("", 2, ", %rs1")
    text.run(text.program(body, ptx_kernel, group=2), ctas=2)
    one = body.replace("%rs1, 3", "%rs1, 1")
    with pytest.raises(DeadlockError, match=r"CTA \(1, 0, 0\) warp"):
        text.run(text.program(one, ptx_kernel, group=2), ctas=2)
    with pytest.raises(AddressError, match="CTA mask 0x4 in a cluster of 2"):
        text.run(text.program(body.replace("%rs1, 3", "%rs1, 4"), ptx_kernel, group=2), ctas=2)


def test_a_commit_through_a_generic_address(ptx_kernel):
    body = text.committed("").replace(
        ".shared::cluster.b64 [%r5+8]", ".b64 [%rd7]"
    ).replace(" tcgen05.commit", " cvt.u64.u32 %rd7, %r5;\n cvta.shared.u64 %rd7, %rd7;\n"
              " add.u64 %rd7, %rd7, 8;\n tcgen05.commit")  # fmt: skip
    text.run(text.program(body, ptx_kernel))
