"""The TMA engine: worked boxes, and random ones against an oracle that goes element by element."""

from __future__ import annotations

import itertools
import random

import ml_dtypes
import numpy as np
import pytest

from dsv4lab.emulator import tma
from dsv4lab.emulator.errors import AddressError
from dsv4lab.emulator.extents import Extent, Registry
from dsv4lab.emulator.global_memory import GlobalMemory
from dsv4lab.emulator.shared import SharedMemory
from dsv4lab.emulator.tensormap import TensorMap, TensorMapError
from dsv4lab.emulator.tensormap_fields import ELEMENTS
from dsv4lab.emulator.tma_shared import read_shared, write_shared

SIZE = 64 * 1024
EMPTY = 0xEE
# Oracle of the swizzles: atoms of a 128-byte line, and by which bits of the line number they are permuted.
LINES = {
    "none": (16, 0, 1), "32B": (16, 1, 1), "64B": (16, 3, 1), "128B": (16, 7, 1), "128B_atom32B": (32, 3, 1),
    "128B_atom32B_flip8B": (32, 3, 1), "128B_atom64B": (64, 1, 1),
}  # fmt: skip
SPANS = {"none": None, "32B": 32, "64B": 64}


class Tensor:
    """Random bytes in the process's memory, 64-byte aligned and registered."""

    def __init__(self, nbytes, seed=0):
        self.buffer = np.random.default_rng(seed).integers(0, 256, nbytes + 64, dtype=np.uint8)
        first = -self.buffer.ctypes.data % 64
        self.bytes = self.buffer[first : first + nbytes]
        self.address = self.bytes.ctypes.data
        self.registry = Registry()
        self.registry.add(Extent("t", self.address, nbytes, "bytes"))
        self.memory = GlobalMemory(self.registry)


def box_of(**fields):
    return tma.box_of(TensorMap(**fields).encode())


def shared_memory():
    shared = SharedMemory(1, 1, SIZE, False, None)
    shared.bytes[:] = EMPTY
    return shared


def place(mode, offset):
    """Where the byte at a linear offset goes: by lines and atoms, not by bits of the address."""
    atom, mask, _ = LINES[mode]
    line, inside = divmod(offset, 128)
    number, rest = divmod(inside, atom)
    if mode.endswith("flip8B") and line % 2:
        rest ^= 8
    return line * 128 + (number ^ (line & mask)) * atom + rest


def elements(tm):
    """(index in the tile innermost first, offset in shared memory before the swizzle) of each element."""
    counts = [-(-n // s) for n, s in zip(tm.box, (1, *tm.element_strides[1:]), strict=True)]
    bits = ELEMENTS[tm.element].bits
    row = counts[0] * bits // 8
    pitch = SPANS.get(tm.swizzle, 128) or row
    for outer in itertools.product(*(range(n) for n in counts[:0:-1])):
        outer, number = outer[::-1], 0
        for i, n in reversed(list(enumerate(counts[1:]))):
            number = number * n + outer[i]
        for first in range(counts[0]):
            yield (first, *outer), number * pitch + first * bits // 8


def oracle_load(tm, memory_bytes, coordinates, start):
    """Shared memory after a load; whole-byte elements."""
    shared = np.full(SIZE, EMPTY, np.uint8)
    size = ELEMENTS[tm.element].bits // 8
    for index, linear in elements(tm):
        at = [
            c + j * (s if i else 1)
            for i, (c, j, s) in enumerate(zip(coordinates, index, tm.element_strides, strict=True))
        ]
        if all(0 <= x < n for x, n in zip(at, tm.shape, strict=True)):
            source = at[0] * size + sum(x * s for x, s in zip(at[1:], tm.strides, strict=True))
            value = memory_bytes[source : source + size]
        else:
            value = np.frombuffer(b"\xf7\x7f" * 4, np.uint8)[:size] if tm.fill == "nan" else np.zeros(size)
        for k in range(size):
            shared[place(tm.swizzle, start + linear + k)] = value[k]
    return shared


def random_map(rng, address, limit, element, swizzle, fill="zero"):
    """A tensor of any rank that spans at most `limit` bytes."""
    while (found := _random_map(rng, address, element, swizzle, fill)).span > limit:
        pass
    return found


def _random_map(rng, address, element, swizzle, fill):
    size = ELEMENTS[element].bits // 8
    rank = rng.randint(1, 5)
    span = {"none": 256, "32B": 32, "64B": 64}.get(swizzle, 128)
    inner = rng.randrange(16, min(span, 256 * size) + 1, 16) // size
    box = [inner] + [rng.randint(1, 5) for _ in range(rank - 1)]
    shape = [rng.randint(1, 2 * inner + 3)] + [rng.randint(1, 7) for _ in range(rank - 1)]
    strides, reach = [], -(-shape[0] * size // 16) * 16
    for n in shape[1:]:
        reach += rng.choice([0, 0, 16, 48])
        strides.append(reach)
        reach *= n
    steps = [1] + [rng.choice([1, 1, 2, 3]) for _ in range(rank - 1)]
    return TensorMap(
        address, element, tuple(shape), tuple(strides), tuple(box), tuple(steps), swizzle, fill=fill
    )


def random_coordinates(rng, tm, boxes):
    """Where a box may start, from so many boxes before the tensor on; the first a multiple of 16 bytes."""
    coordinates = [rng.randint(boxes * b, n) for b, n in zip(tm.box, tm.shape, strict=True)]
    unit = 128 // ELEMENTS[tm.element].bits
    return [coordinates[0] // unit * unit, *coordinates[1:]]


# Worked boxes ----------------------------------------------------------------------------------------------


def test_a_box_of_128_bytes_by_8_rows():
    """Chunk c of row r of a 128B-swizzled tile lies at chunk c ^ (r % 8)."""
    tensor = Tensor(16 * 256)
    tensor.bytes[:] = np.repeat(np.arange(256), 16).astype(np.uint8)  # each 16 bytes: their number
    box = box_of(
        address=tensor.address, element="f16", shape=(128, 16), strides=(256,), box=(64, 8), swizzle="128B"
    )
    shared = shared_memory()
    write_shared(box, shared, 0, 2048, tma.load(box, tensor.memory, (64, 3)), None)
    chunks = shared.bytes[0, 2048 : 2048 + 1024].reshape(8, 8, 16)
    for row in range(8):
        for chunk in range(8):
            assert (chunks[row, chunk ^ row] == 16 * (3 + row) + 8 + chunk).all()
    assert chunks[1, :, 0].tolist() == [73, 72, 75, 74, 77, 76, 79, 78]
    assert (shared.bytes[0, :2048] == EMPTY).all() and (shared.bytes[0, 3072:] == EMPTY).all()


def test_outside_is_filled_element_by_element():
    """Rows of 13 elements from coordinate 8 on: five elements and zeros, from negative rows on."""
    tensor = Tensor(7 * 32)
    values = np.arange(7 * 16, dtype=np.uint16).reshape(7, 16)
    tensor.bytes[:] = values.view(np.uint8).reshape(-1)
    box = box_of(address=tensor.address, element="u16", shape=(13, 7), strides=(32,), box=(8, 4))
    tile = tma.load(box, tensor.memory, (8, -2)).view(np.uint16)
    inside = [[8, 9, 10, 11, 12, 0, 0, 0], [24, 25, 26, 27, 28, 0, 0, 0]]
    assert tile.tolist() == [[0] * 8, [0] * 8, *inside]
    assert box.nbytes == 64  # what is filled counts as transaction bytes
    wide = box_of(address=tensor.address, element="u16", shape=(13, 7), strides=(32,), box=(24, 2))
    tile = tma.load(wide, tensor.memory, (-8, 6)).view(np.uint16)
    assert tile.tolist() == [[0] * 8 + list(range(96, 109)) + [0] * 3, [0] * 24]
    for far in ((-(2**31), 0), (2**31 - 1, 0), (0, 7), (16, 0), (-8, 0)):
        assert not tma.load(box, tensor.memory, far).any()


@pytest.mark.parametrize("element", ["f16", "bf16", "f32", "f64", "f32.ftz", "tf32"])
def test_nan_fill_has_the_bits_of_hardware(element):
    tensor = Tensor(256)
    tensor.bytes[:] = 0
    box = box_of(
        address=tensor.address, element=element, shape=(4, 2), strides=(64,), box=(16, 2), fill="nan"
    )
    tile = tma.load(box, tensor.memory, (0, 1))
    size = ELEMENTS[element].bits // 8
    assert not tile[0, : 4 * size].any()
    assert (tile[0, 4 * size :].view(np.uint16) == 0x7FF7).all() and (tile[1].view(np.uint16) == 0x7FF7).all()
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}.get(element, np.float32)
    assert np.isnan(tile[1].view(dtype)).all()


def test_tf32_is_rounded_as_an_h200_does():
    """Inputs and what an H200 loaded."""
    pairs = {
        0x00000001: 0x00000000, 0x80000001: 0x80000000, 0x007FFFFF: 0x00800000, 0x3F801000: 0x3F800000,
        0x3F800FFF: 0x3F800000, 0x3F801001: 0x3F802000, 0x3F803000: 0x3F804000, 0x7FC12345: 0x7FFFE000,
        0x7F812345: 0x7FFFE000, 0x7F800000: 0x7F800000, 0xFF7FFFFF: 0xFF800000, 0x00801000: 0x00800000,
        0x00001FFF: 0x00002000, 0x007FF000: 0x00800000, 0x3F800000: 0x3F800000, 0x3F802000: 0x3F802000,
    }  # fmt: skip
    tensor = Tensor(64)
    tensor.bytes[:] = np.array(list(pairs), np.uint32).view(np.uint8)
    for element in ("tf32", "tf32.ftz", "f32", "f32.ftz"):
        box = box_of(address=tensor.address, element=element, shape=(16,), strides=(), box=(16,))
        found = tma.load(box, tensor.memory, (0,)).view(np.uint32)[0].tolist()
        assert found == list(pairs.values() if element.startswith("tf32") else pairs)


def test_rows_narrower_than_the_swizzle_lie_a_span_apart():
    """64B swizzle, rows of 32 bytes: seen on an H200, with the chunk numbers written out."""
    tensor = Tensor(32 * 128)
    tensor.bytes[:] = np.repeat(np.arange(256), 16).astype(np.uint8)
    box = box_of(
        address=tensor.address, element="u8", shape=(128, 32), strides=(128,), box=(32, 10), swizzle="64B"
    )
    assert box.nbytes == 320
    shared = shared_memory()
    write_shared(box, shared, 0, 0, tma.load(box, tensor.memory, (0, 0)), None)
    chunks = shared.bytes[0].reshape(-1, 16)
    seen = "0 1 . . 8 9 . . 17 16 . . 25 24 . . . . 32 33 . . 40 41 . . 49 48 . . 57 56 64 65 . . 72 73 . ."
    for chunk, expected in zip(chunks, seen.split(), strict=False):
        assert (chunk == (EMPTY if expected == "." else int(expected))).all()
    assert (chunks[40:] == EMPTY).all()
    assert (read_shared(box, shared, 0, 0, None) == tma.load(box, tensor.memory, (0, 0))).all()


# Random boxes ----------------------------------------------------------------------------------------------

WHOLE = [name for name, element in ELEMENTS.items() if element.bits >= 8 and not name.startswith("tf32")]


@pytest.mark.parametrize("swizzle", LINES)
def test_random_loads(swizzle):
    rng = random.Random(f"load {swizzle}")
    tensor = Tensor(40_000)
    ranks = set()
    for _ in range(40):
        element = rng.choice(WHOLE)
        fill = rng.choice(["zero", "nan"]) if element[0] in "fb" else "zero"
        tm = random_map(rng, tensor.address, 40_000, element, swizzle, fill)
        ranks.add(tm.rank)
        box = tma.box_of(tm.encode())
        coordinates = random_coordinates(rng, tm, -2)
        start = 128 * rng.randint(0, 16)
        shared = shared_memory()
        tile = tma.load(box, tensor.memory, coordinates)
        write_shared(box, shared, 0, start, tile, None)
        expected = oracle_load(tm, tensor.bytes, coordinates, start)
        np.testing.assert_array_equal(shared.bytes[0], expected, err_msg=f"{tm} {coordinates} {start}")
        np.testing.assert_array_equal(read_shared(box, shared, 0, start, None), tile)
        assert box.nbytes == len(list(elements(tm))) * ELEMENTS[element].bits // 8
        assert start + box.shared_bytes <= SIZE
    assert ranks == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("swizzle", LINES)
def test_random_stores(swizzle):
    """What is outside the tensor keeps its value, but for the rest of 16 bytes in which a row ends."""
    rng = random.Random(f"store {swizzle}")
    for _ in range(25):
        tensor = Tensor(20_000)
        element = rng.choice(WHOLE)
        size = ELEMENTS[element].bits // 8
        tm = random_map(rng, tensor.address, 20_000 - 16, element, swizzle)
        box = tma.box_of(tm.encode())
        coordinates = random_coordinates(rng, tm, 0)
        start = 128 * rng.randint(0, 16)
        shared = shared_memory()
        shared.bytes[0] = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
        expected, count = tensor.bytes.copy(), 0
        for index, linear in elements(tm):
            at = [c + j * s for c, j, s in zip(coordinates, index, (1, *tm.element_strides[1:]), strict=True)]
            width = -(-tm.shape[0] * size // 16) * 16 // size
            if all(x < n for x, n in zip(at, (width, *tm.shape[1:]), strict=True)):
                target = at[0] * size + sum(x * s for x, s in zip(at[1:], tm.strides, strict=True))
                count += size
                for k in range(size):
                    expected[target + k] = shared.bytes[0, place(swizzle, start + linear + k)]
        written = tma.store(box, tensor.memory, coordinates, read_shared(box, shared, 0, start, None))
        np.testing.assert_array_equal(tensor.bytes, expected, err_msg=f"{tm} {coordinates} {start}")
        assert written == count


def test_dimensions_that_repeat_memory():
    """A stride of 0 copies the same bytes for every coordinate."""
    tensor = Tensor(64)
    box = box_of(address=tensor.address, element="u8", shape=(16, 9, 2), strides=(0, 32), box=(16, 3, 2))
    tile = tma.load(box, tensor.memory, (0, 4, 0))
    expected = [tensor.bytes[:16]] * 3 + [tensor.bytes[32:48]] * 3
    np.testing.assert_array_equal(tile, expected)


# Sub-byte types --------------------------------------------------------------------------------------------


def test_packed_fours_are_copied_as_bytes():
    tensor = Tensor(4 * 64)
    box = box_of(address=tensor.address, element="b4x16", shape=(128, 4), strides=(64,), box=(64, 2))
    assert box.nbytes == 64
    np.testing.assert_array_equal(
        tma.load(box, tensor.memory, (32, 1)), tensor.bytes.reshape(4, 64)[1:3, 16:48]
    )
    tile = tma.load(box, tensor.memory, (-32, 3))
    np.testing.assert_array_equal(tile[0], [*[0] * 16, *tensor.bytes[3 * 64 : 3 * 64 + 16]])
    assert not tile[1].any()


def test_padded_fours_and_sixes():
    """16 elements, then 8 or 4 bytes that nobody may rely on; transaction bytes are those of the data."""
    tensor = Tensor(4 * 192)
    for element, data, row in (("b4x16_p64", 8, 64), ("b6x16_p32", 12, 96)):
        box = box_of(
            address=tensor.address,
            element=element,
            shape=(256, 2),
            strides=(192,),
            box=(128, 2),
            swizzle="128B",
        )
        assert box.nbytes == 2 * row and box.shared_bytes == 256
        groups = tma.load(box, tensor.memory, (128, 0)).reshape(2, 8, 16)
        for i in range(2):
            source = tensor.bytes[192 * i + row : 192 * i + 2 * row].reshape(8, data)
            np.testing.assert_array_equal(groups[i, :, :data], source)
        assert (groups[:, :, data:] == tma.PADDING).all()
        with pytest.raises(TensorMapError, match="multiple of 128"):
            tma.check_coordinates(box, (64, 0))


def test_sixes_are_packed_by_a_store():
    """Low 6 bits of bytes 1, 2, 3, 4 in a row: 1 | 2 << 6, 2 >> 2 | 3 << 4, 3 >> 4 | 4 << 2."""
    tensor = Tensor(96)
    box = box_of(address=tensor.address, element="b6x16_p32", shape=(128,), strides=(), box=(128,))
    tile = np.arange(128, dtype=np.uint8)[None] % 64 + np.uint8(0xC0)
    tile[0, :4] = (1, 2, 3, 0xC4)
    assert tma.store(box, tensor.memory, (0,), tile) == 96
    assert tensor.bytes[:3].tolist() == [0x81, 0x30, 0x10]
    whole = int.from_bytes(tensor.bytes.tobytes(), "little")
    assert [whole >> 6 * i & 63 for i in range(128)] == [int(v) & 63 for v in tile[0]]


# Coordinates that stop the TMA unit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "multiple"),
    [("u8", 16), ("bf16", 8), ("f32", 4), ("u64", 2), ("b4x16", 32), ("b4x16_p64", 128)],
)
def test_boxes_start_at_16_bytes(element, multiple):
    box = box_of(address=4096, element=element, shape=(256, 2), strides=(2048,), box=(128, 2))
    tma.check_coordinates(box, (-multiple, -1))
    for wrong in (multiple // 2, -multiple - 1):
        with pytest.raises(TensorMapError, match=f"a multiple of {multiple} for {element}, got {wrong}"):
            tma.check_coordinates(box, (wrong, 0))


def test_stores_start_inside():
    box = box_of(address=4096, element="f16", shape=(256, 2), strides=(2048,), box=(128, 2))
    tma.check_coordinates(box, (0, 0), store=True)
    with pytest.raises(TensorMapError, match=r"of a store must not be negative, got \(8, -1\)"):
        tma.check_coordinates(box, (8, -1), store=True)


def test_a_store_writes_16_bytes_of_which_a_row_has_9():
    """As an H200 does; a load of the same box takes the 9 bytes."""
    tensor = Tensor(3 * 32)
    before = tensor.bytes.reshape(3, 32).copy()
    box = box_of(address=tensor.address, element="u8", shape=(9, 3), strides=(32,), box=(32, 3))
    tile = np.arange(96, dtype=np.uint8).reshape(3, 32)
    assert tma.store(box, tensor.memory, (0, 0), tile) == 48
    np.testing.assert_array_equal(tensor.bytes.reshape(3, 32)[:, :16], tile[:, :16])
    np.testing.assert_array_equal(tensor.bytes.reshape(3, 32)[:, 16:], before[:, 16:])
    assert not tma.load(box, tensor.memory, (0, 0))[:, 9:].any()
    short = Tensor(2 * 32 + 9)
    box = box_of(address=short.address, element="u8", shape=(9, 3), strides=(32,), box=(32, 3))
    with pytest.raises(AddressError, match="writes whole 16 bytes, and rows of 9 bytes end within"):
        tma.store(box, short.memory, (0, 0), tile)


# Gather and scatter ----------------------------------------------------------------------------------------


def test_rows_of_a_gather_need_a_box_of_one_row():
    tensor = Tensor(4 * 64)
    one = box_of(address=tensor.address, element="u8", shape=(64, 4), strides=(64,), box=(64, 1))
    four = tma.rows_of(one, 4)
    assert (four.rows, four.nbytes, four.shared_bytes) == (4, 256, 256)
    two = box_of(address=tensor.address, element="u8", shape=(64, 4), strides=(64,), box=(64, 2))
    with pytest.raises(TensorMapError, match="box of one row, got rank 2 and box"):
        tma.rows_of(two, 4)


# Memory that is not there ----------------------------------------------------------------------------------


def test_only_bytes_that_are_touched_must_be_registered():
    tensor = Tensor(1024)
    gappy = Registry()
    for row in range(0, 8, 2):  # rows of 64 bytes, every second one registered
        gappy.add(Extent(f"row {row}", tensor.address + 64 * row, 64, "bytes"))
    memory = GlobalMemory(gappy)
    fields = {"address": tensor.address, "element": "u8", "box": (64, 4)}
    even = box_of(**fields, shape=(64, 100), strides=(128,))
    np.testing.assert_array_equal(tma.load(even, memory, (0, 0)), tensor.bytes[:512].reshape(4, 128)[:, :64])
    tile = np.arange(256, dtype=np.uint8).reshape(4, 64)
    assert tma.store(even, memory, (0, 0), tile) == 256
    np.testing.assert_array_equal(tensor.bytes[:512].reshape(4, 128)[:, :64], tile)
    with pytest.raises(AddressError, match=rf"the 64 byte\(s\) at {tensor.address + 512:#x} belong to no"):
        tma.load(even, memory, (0, 1))
    every = box_of(**fields, shape=(64, 8), strides=(64,))
    before = tensor.bytes.copy()
    with pytest.raises(AddressError, match=rf"{tensor.address + 64:#x} belong to no registered tensor"):
        tma.store(every, memory, (0, 0), tile)
    np.testing.assert_array_equal(tensor.bytes, before)


def test_interleaved_tensors_are_refused():
    with pytest.raises(TensorMapError, match="interleave 16B is not emulated"):
        box_of(
            address=4096, element="u16", shape=(8, 8, 8), strides=(128, 1024), box=(8, 2, 2), interleave="16B"
        )


# Reductions ------------------------------------------------------------------------------------------------


def test_a_reduction_leaves_alone_what_is_outside():
    tensor = Tensor(7 * 64)
    tensor.bytes.view(np.uint32)[:] = 1000
    box = box_of(address=tensor.address, element="u32", shape=(12, 7), strides=(64,), box=(8, 4))
    tile = np.arange(32, dtype=np.uint32).reshape(4, 8)
    assert tma.reduce(box, tensor.memory, (8, 5), tile.view(np.uint8), "add") == 32
    values = tensor.bytes.view(np.uint32).reshape(7, 16)
    assert values[5, 8:12].tolist() == [1000, 1001, 1002, 1003]
    assert values[6, 8:12].tolist() == [1008, 1009, 1010, 1011]
    assert (values != 1000).sum() == 7
