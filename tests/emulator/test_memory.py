"""Tensors of the emulator and the addresses that belong to them."""

from __future__ import annotations

import ctypes
import gc
import random

import numpy as np
import pytest
import torch

from dsv4lab.emulator import AddressError, dlpack
from dsv4lab.emulator.dlpack import pretend_cuda
from dsv4lab.emulator.extents import Extent, Registry, strided_nbytes
from dsv4lab.emulator.memory import Memory

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float4_e2m1fn_x2,
]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_is_aligned_and_unwritten(dtype, memory):
    tensors = [memory.empty((3, n), dtype) for n in (1, 5, 171, 512)]
    for tensor in tensors:
        assert tensor.data_ptr() % 512 == 0
        assert tensor.dtype == dtype and tensor.is_contiguous()
        assert (tensor.view(torch.uint8) == 0xFF).all()
        where = memory.registry.lookup(tensor.data_ptr() + tensor.nbytes - 1)
        assert where.offset == tensor.nbytes - 1
        for stray in (tensor.data_ptr() - 1, tensor.data_ptr() + tensor.nbytes):
            with pytest.raises(AddressError):
                memory.registry.lookup(stray)
    memory.check_guards()


def test_empty_takes_sizes_of_nothing(memory):
    for shape in (0, (4, 0), ()):
        tensor = memory.empty(shape)
        assert tensor.shape == ((shape,) if isinstance(shape, int) else shape)
    memory.check_guards()
    with pytest.raises(ValueError, match=r"shape must not be negative, got \(2, -1\)"):
        memory.empty((2, -1))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "expanded", "scalar"])
def test_from_torch_copies_values_and_strides(layout, memory):
    x = torch.randn(6, 10)
    x = {
        "contiguous": x,
        "transposed": x.T,
        "padded": x[:, :7],
        "expanded": x[:1].expand(6, 10),
        "scalar": x[0, 0],
    }[layout]
    copy = memory.from_torch(x, name="copy")
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr() and copy.data_ptr() % 512 == 0
    assert copy.stride() == (x.contiguous() if layout == "expanded" else x).stride()
    memory.check_guards()


@pytest.mark.parametrize("offset", [-512, -1, 40, 40 + 511])
def test_a_write_next_to_a_tensor_is_found(offset, memory):
    x = memory.empty(10, name="x")
    memory.check_guards()
    ctypes.c_uint8.from_address(x.data_ptr() + offset).value = 1
    side = "before" if offset < 0 else "after"
    with pytest.raises(
        AddressError, match=rf"1 byte\(s\) {side} x \(float32 \(10,\).*{x.data_ptr() + offset:#x}"
    ):
        memory.check_guards()


def test_register_and_release(memory):
    x = torch.zeros(4, 8)[:, 2:4]
    extent = memory.register(x, name="view")
    assert (extent.start, extent.nbytes) == (x.data_ptr(), 4 * (3 * 8 + 2))
    assert memory.registry.lookup(x.data_ptr() + 4, 4).offset == 4
    memory.release(x)
    with pytest.raises(AddressError, match="none is registered"):
        memory.registry.lookup(x.data_ptr())
    with pytest.raises(ValueError, match="must be one that"):
        memory.release(x)
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got int"):
        memory.register(3)
    with pytest.raises(ValueError, match="must be on the CPU, got one on meta"):
        memory.register(torch.empty(3, device="meta"))


def test_an_error_names_the_nearest_tensor():
    registry = Registry()
    registry.add(Extent("low", 1000, 100, "float32 (25,)"))
    registry.add(Extent("high", 2000, 100, "uint8 (100,)"))
    with pytest.raises(
        AddressError, match=r"4 byte.*0x460 .*end 24 bytes after the end of the nearest, low \(flo"
    ):
        registry.lookup(1120, 4)
    with pytest.raises(AddressError, match="start 10 bytes before the nearest, high"):
        registry.lookup(1990, 4)
    # Half in, half out.
    with pytest.raises(AddressError, match="end 2 bytes after the end of the nearest, low"):
        registry.lookup(1098, 4)
    with pytest.raises(AddressError, match="start 2 bytes before the nearest, high"):
        registry.lookup(1998, 4)
    assert registry.lookup(1096, 4).offset == 96
    with pytest.raises(ValueError, match="nbytes must be at least 1"):
        registry.lookup(1000, 0)


def test_lookup_agrees_with_a_search_of_all_extents():
    draw = random.Random(3)
    registry, extents = Registry(), {}
    for step in range(400):
        if extents and draw.random() < 0.4:
            key = draw.choice(list(extents))
            registry.remove(key)
            del extents[key]
        else:
            extent = Extent(str(step), draw.randrange(300), draw.randrange(60), "")
            extents[registry.add(extent)] = extent
        address, nbytes = draw.randrange(360), draw.choice((1, 4, 16))
        holders = [e for e in extents.values() if e.start <= address and address + nbytes <= e.end]
        if holders:
            found = registry.lookup(address, nbytes)
            assert found.extent in holders and found.offset == address - found.extent.start
            assert found.extent.nbytes == min(e.nbytes for e in holders)
        else:
            with pytest.raises(AddressError):
                registry.lookup(address, nbytes)
    assert registry.extents() == sorted(extents.values(), key=lambda e: (e.start, -e.nbytes))


def test_of_equal_extents_the_first_gives_its_name():
    registry = Registry()
    registry.add(Extent("weights", 64, 8, ""))
    registry.add(Extent("tensor 5", 64, 8, ""))
    assert registry.lookup(70).extent.label == "weights"


def test_what_is_lent_goes_with_its_owner(memory):
    class Owner:
        pass

    owner = Owner()
    memory.lend(owner, 4096, 16, "float32 (4,)")
    assert memory.registry.lookup(4100).offset == 4
    del owner
    gc.collect()
    with pytest.raises(AddressError):
        memory.registry.lookup(4100)


@pytest.mark.parametrize(
    ("shape", "strides", "bits", "nbytes"),
    [
        ((4, 8), (8, 1), 32, 128),
        ((4, 8), (1, 4), 32, 128),
        ((4, 6), (8, 1), 32, 4 * (24 + 6)),  # the last row ends without its padding
        ((), (), 16, 2),
        ((0, 5), (5, 1), 32, 0),
        ((5, 3), (0, 1), 8, 3),
        ((3,), (1,), 4, 2),  # three 4-bit numbers reach into a second byte
    ],
)
def test_bytes_of_a_strided_tensor(shape, strides, bits, nbytes):
    assert strided_nbytes(shape, strides, bits) == nbytes


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_a_capsule_says_where_its_tensor_lies_and_cuda_after(dtype):
    x = torch.zeros(6, 8, dtype=torch.uint8).view(dtype)[2:]
    capsule = x.__dlpack__()
    span = pretend_cuda(capsule)
    assert (span.start, span.nbytes) == (x.data_ptr(), 32)
    with pytest.raises(ValueError, match="CPU tensors, got one of DLPack device type 2"):
        pretend_cuda(capsule)


def test_a_capsule_of_numpy_in_both_versions():
    x = np.zeros((3, 5), np.float32)
    for options in ({}, {"max_version": (1, 0)}):
        span = pretend_cuda(x.__dlpack__(**options))
        assert (span.start, span.nbytes, span.description) == (x.ctypes.data, 60, "float32 (3, 5)")


def test_a_capsule_may_start_within_its_memory():
    x = torch.zeros(8)
    capsule = x.__dlpack__()
    managed = dlpack._Managed.from_address(dlpack._pointer(capsule, b"dltensor"))
    managed.tensor.byte_offset = 12
    assert pretend_cuda(capsule).start == x.data_ptr() + 12


def test_a_consumed_capsule_is_refused():
    capsule = torch.zeros(3).__dlpack__()
    torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(TypeError, match="fresh DLPack capsule"):
        pretend_cuda(capsule)
