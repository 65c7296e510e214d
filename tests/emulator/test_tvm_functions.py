"""Functions compiled with --enable-tvm-ffi: called with torch tensors, in the emulator only."""

# No annotations from __future__: cute.kernel reads them as types.
from typing import NamedTuple

import cutlass
import pytest
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor, make_fake_stream

from dsv4lab.emulator import AddressError, EmulatorError, device

pytest.importorskip("tvm_ffi")


@cute.kernel
def _scale(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32, past: cutlass.Int32):
    i, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    y[row + past, i] = x[row, i] * factor


@cute.jit
def scale(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32, past: cutlass.Int32, stream):
    grid, block = (cute.size(x, mode=[0]), 1, 1), (cute.size(x, mode=[1]), 1, 1)
    _scale(x, y, factor, past).launch(grid=grid, block=block, stream=stream)


class Pair(NamedTuple):
    x: cute.Tensor
    y: cute.Tensor


@cute.jit
def scale_pair(pair: Pair, factor: cutlass.Float32, past: cutlass.Int32 = 0):
    grid, block = (cute.size(pair.x, mode=[0]), 1, 1), (cute.size(pair.x, mode=[1]), 1, 1)
    _scale(pair.x, pair.y, factor, past).launch(grid=grid, block=block)


def fakes():
    rows = cute.sym_int()
    return [make_fake_compact_tensor(cutlass.Float32, (rows, 32), stride_order=(1, 0)) for _ in range(2)]


def compiled():
    """The function for tensors of any number of rows, on whatever stream is TVM-FFI's."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(scale, *fakes(), 1.0, 0, stream, options="--enable-tvm-ffi")


def test_tensors_of_torch():
    """Any CPU tensor of the right shape, of the emulator or not, and not after the call."""
    with device("sm_100a") as gpu:
        function = compiled()
        x, y = gpu.from_torch(torch.randn(5, 32)), gpu.empty((5, 32))
        function(x, y, 3.0, 0)
        assert torch.equal(y, 3 * x)
        known = len(gpu.memory.registry.extents())
        x, y = torch.randn(9, 32, requires_grad=True), torch.zeros(9, 32)
        function(x, y, 2.0, 0)
        assert torch.equal(y, 2 * x.detach())
        assert len(gpu.memory.registry.extents()) == known
        with pytest.raises(ValueError, match=r"Mismatched x\.shape\[1\]"):
            function(torch.randn(9, 31), y, 2.0, 0)
        with pytest.raises(AddressError, match="belong to no registered tensor"):
            function(x.detach(), y, 2.0, 1)
    assert [launch.grid for launch in gpu.launches] == [(5, 1, 1), (9, 1, 1), (9, 1, 1)]


def test_tensors_of_cute():
    """from_dlpack(..., enable_tvm_ffi=True), to compile with and to call with."""
    x, y = torch.randn(4, 32), torch.zeros(4, 32)
    with device("sm_90a") as gpu:
        a, b = (from_dlpack(t, assumed_align=16, enable_tvm_ffi=True) for t in (x, y))
        function = cute.compile(scale, a, b, 1.0, 0, make_fake_stream(), options="--enable-tvm-ffi")
        function(a, b, 4.0, 0, 0)
        assert torch.equal(y, 4 * x)
        function(x, y, 5.0, 0, 0)
        assert torch.equal(y, 5 * x)
        del a, b
        assert not gpu.memory.registry.extents()


def test_tuples_defaults_and_names():
    """Tensors within a NamedTuple, arguments by name, defaults."""
    x, y = torch.randn(3, 32), torch.zeros(3, 32)
    with device("sm_100a"):
        function = cute.compile(scale_pair, Pair(*fakes()), 1.0, options="--enable-tvm-ffi")
        function(Pair(x, y), factor=2.0)
    assert torch.equal(y, 2 * x)


def test_only_here():
    """What was compiled inside does not run outside; another error of the executor reaches the caller."""

    def fail(launch):
        raise ZeroDivisionError("of the executor")

    x, y = torch.randn(3, 32), torch.zeros(3, 32)
    with device("sm_100a", executor=fail):
        function = compiled()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="of the executor"):
                function(x, y, 1.0, 0)
    with pytest.raises(EmulatorError, match="which has been left"):
        function(x, y, 1.0, 0)
    with device("sm_100a"), pytest.raises(EmulatorError, match="which has been left"):
        function(x, y, 1.0, 0)


def test_a_function_from_outside_is_refused_inside():
    """One compiled for a real GPU."""
    function = cute.compile(
        scale, *fakes(), 1.0, 0, make_fake_stream(), options="--enable-tvm-ffi --gpu-arch sm_90a"
    )
    x, y = torch.randn(3, 32), torch.zeros(3, 32)
    with device("sm_90a"), pytest.raises(EmulatorError, match="was not compiled inside"):
        function(x, y, 1.0, 0, 0)
