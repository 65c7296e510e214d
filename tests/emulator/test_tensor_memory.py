"""Tensor memory: what is allocated where, and every use that must be refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dsv4lab.emulator.errors import UninitialisedError
from dsv4lab.emulator.happens_before import HappensBefore, RaceError
from dsv4lab.emulator.tensor_memory import COLUMNS, LANES, TensorMemory, TensorMemoryError


def machine(ctas=2, checks=("initialised", "leaks"), order=None):
    index = np.array([(i, 0, 0) for i in range(ctas)])
    return SimpleNamespace(
        ctas=ctas, checks=frozenset(checks), order=order, at_end=[], cta_index=index,
        instruction_now=lambda: None, blamed=lambda error, *_: error,
    )  # fmt: skip


def memory(**options):
    return TensorMemory(machine(**options))


def test_allocations_lie_one_after_the_other():
    tensor = memory()
    assert [tensor.allocate((0,), n) for n in (256, 128, 64, 32, 32)] == [0, 256, 384, 448, 480]
    assert tensor.allocate((0,), 32) is None
    assert tensor.allocate((1,), 512) == 0
    tensor.free((0,), 256, 128)
    assert tensor.allocate((0,), 32) == 256


def test_a_pair_gets_the_same_columns():
    tensor = memory()
    tensor.allocate((1,), 128)
    assert tensor.allocate((0, 1), 128) == 128
    tensor.free((0, 1), 128, 128)
    assert tensor.describe(0) == "none"
    assert tensor.describe(1) == "128 columns at 0x0"


@pytest.mark.parametrize("columns", [0, 16, 48, 96, 1024])
def test_sizes_are_powers_of_two_from_32_to_512(columns):
    with pytest.raises(TensorMemoryError, match="power of two"):
        memory().allocate((0,), columns)


def test_sizes_do_not_increase():
    tensor = memory()
    tensor.allocate((0,), 64)
    with pytest.raises(TensorMemoryError, match="128 columns of tensor memory after one of 64"):
        tensor.allocate((0,), 128)
    assert tensor.allocate((1,), 128) == 0


def test_nothing_is_allocated_after_the_permit_is_given_up():
    tensor = memory()
    tensor.relinquish(0)
    with pytest.raises(TensorMemoryError, match="relinquish"):
        tensor.allocate((0,), 32)
    assert tensor.allocate((1,), 32) == 0


@pytest.mark.parametrize("address, columns", [(0, 32), (64, 64), (32, 32), (0, 128)])
def test_only_whole_allocations_are_freed(address, columns):
    tensor = memory()
    tensor.allocate((0,), 64)
    with pytest.raises(TensorMemoryError, match=r"allocated are 64 columns at 0x0"):
        tensor.free((0,), address, columns)


def test_freed_twice():
    tensor = memory()
    tensor.allocate((0,), 64)
    tensor.free((0,), 0, 64)
    with pytest.raises(TensorMemoryError, match="allocated are none"):
        tensor.free((0,), 0, 64)


def test_memory_that_is_not_freed_is_noticed_at_the_end():
    world = machine()
    tensor = TensorMemory(world)
    tensor.allocate((1,), 64)
    with pytest.raises(TensorMemoryError, match=r"ends without freeing .* 64 columns at 0x0"):
        world.at_end[0]()
    tensor.free((1,), 0, 64)
    world.at_end[0]()


def test_leaks_are_looked_for_only_when_asked():
    world = machine(checks=())
    TensorMemory(world).allocate((0,), 32)
    world.at_end[0]()


def test_blocks_read_what_was_written():
    tensor = memory()
    tensor.allocate((1,), 512)
    values = np.arange(128 * 8, dtype=np.uint32).reshape(128, 8)
    tensor.write(1, slice(0, 128), 40, values, None)
    np.testing.assert_array_equal(tensor.read(1, slice(0, 128), 40, 8, None), values)
    lanes = np.array([3, 35, 99])
    np.testing.assert_array_equal(tensor.read(1, lanes, 42, 2, None), values[[3, 35, 99], 2:4])
    assert tensor.cells[1, 99, 47] == 99 * 8 + 7
    assert not tensor.cells[0].any()


def test_unwritten_cells_are_not_read():
    tensor = memory()
    tensor.allocate((0,), 64)
    tensor.write(0, slice(0, 16), 0, np.zeros((16, 4), np.uint32), None)
    with pytest.raises(UninitialisedError, match=r"16 cell\(s\).* lane 0, column 4"):
        tensor.read(0, slice(0, 16), 0, 5, None)
    with pytest.raises(UninitialisedError, match="lane 16, column 0"):
        tensor.read(0, np.array([15, 16]), 0, 4, None)


def test_a_new_allocation_holds_nothing():
    tensor = memory()
    tensor.allocate((0,), 32)
    tensor.write(0, slice(0, 128), 0, np.ones((128, 32), np.uint32), None)
    tensor.free((0,), 0, 32)
    tensor.allocate((0,), 32)
    with pytest.raises(UninitialisedError):
        tensor.read(0, slice(0, 128), 0, 32, None)


def test_without_the_check_unwritten_cells_are_zero():
    tensor = memory(checks=())
    tensor.allocate((0,), 32)
    assert not tensor.read(0, slice(0, 128), 0, 32, None).any()


def test_columns_outside_an_allocation():
    tensor = memory()
    tensor.allocate((0,), 64)
    zeros = np.zeros((128, 8), np.uint32)
    with pytest.raises(TensorMemoryError, match="column 64 of tensor memory was never allocated"):
        tensor.write(0, slice(0, 128), 60, zeros, None)
    with pytest.raises(TensorMemoryError, match="a CTA has 512"):
        tensor.read(0, slice(0, 128), 510, 8, None)
    tensor.free((0,), 0, 64)
    with pytest.raises(TensorMemoryError, match="column 0 of tensor memory was freed"):
        tensor.write(0, slice(0, 128), 0, zeros, None)


def test_fragments_of_several_warps_at_once():
    tensor = memory(ctas=3)
    for cta in range(3):
        tensor.allocate((cta,), 512)
    tensor.cells[:] = np.arange(3 * LANES * COLUMNS, dtype=np.uint32).reshape(3, LANES, COLUMNS)
    tensor.written[:] = True
    pattern = np.arange(32) * COLUMNS + np.arange(4)[:, None]
    ctas, addresses = np.array([0, 2, 2]), np.array([32 << 16 | 5, 0, 96 << 16 | 508])
    found = tensor.gather(ctas, addresses, pattern, (None,) * 3)
    assert found.shape == (4, 3, 32)
    assert found[0, 0, 0] == 32 * 512 + 5
    assert found[3, 1, 31] == 2 * 65536 + 31 * 512 + 3
    assert found[3, 2, 1] == 2 * 65536 + 97 * 512 + 511


def test_fragments_are_stored_where_they_are_loaded():
    tensor = memory(ctas=1)
    tensor.allocate((0,), 64)
    pattern = np.arange(32) * COLUMNS + np.arange(2)[:, None]
    values = np.random.default_rng(0).integers(0, 2**32, (2, 2, 32), np.uint32)
    where = np.array([0, 0]), np.array([64 << 16 | 7, 96 << 16 | 9])
    tensor.scatter(*where, pattern, values, (None, None))
    np.testing.assert_array_equal(tensor.gather(*where, pattern, (None, None)), values)
    np.testing.assert_array_equal(tensor.cells[0, 64:96, 7:9].T, values[:, 0])


def test_an_error_in_a_fragment_says_which_row():
    tensor = memory()
    tensor.allocate((0,), 64)
    tensor.write(0, slice(0, 128), 0, np.zeros((128, 32), np.uint32), None)
    pattern = np.arange(32) * COLUMNS + np.arange(8)[:, None]
    for address, match in ((64, "column 64 .* never allocated"), (508, "a CTA has 512")):
        with pytest.raises(TensorMemoryError, match=match) as caught:
            tensor.gather(np.zeros(3, np.int64), np.array([0, 8, address]), pattern, (None,) * 3)
        assert caught.value.row == 2
    with pytest.raises(UninitialisedError, match="lane 3, column 32") as caught:
        tensor.gather(np.zeros(2, np.int64), np.array([0, 3 << 16 | 25]), pattern, (None,) * 2)
    assert caught.value.row == 1
    assert caught.value.lane == 0


def test_accesses_come_to_the_race_check():
    order = HappensBefore(ctas=1, cluster_size=1, warps_per_cta=2, shared_bytes=1024)
    tensor = memory(ctas=1, order=order)
    tensor.allocate((0,), 64)
    zeros = np.zeros((128, 8), np.uint32)
    tensor.write(0, slice(0, 128), 0, zeros, order.generic(0))
    with pytest.raises(RaceError, match="lane 0, column 7"):
        tensor.read(0, slice(0, 64), 7, 1, order.generic(1))
    pattern = np.arange(32) * COLUMNS + np.arange(1)[:, None]
    where = np.array([0]), np.array([5])
    with pytest.raises(RaceError, match="lane 0, column 5"):
        tensor.scatter(*where, pattern, np.zeros((1, 1, 32), np.uint32), (order.generic(1),))
    order.release(0, "key")
    order.complete("key")
    order.acquire(1, "key")
    tensor.gather(*where, pattern, (order.generic(1),))
