"""Launches of real CuTe DSL kernels, caught on a machine without a GPU."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import cutlass
import cutlass.cute as cute
import nbformat
import numpy as np
import pytest
import torch
from cutlass.base_dsl.jit_executor import JitExecutor
from cutlass.cute import runtime as cute_runtime
from cutlass.cute.runtime import from_dlpack, make_ptr
from cutlass.cute.typing import AddressSpace
from cutlass.cutlass_dsl import CuTeDSL
from cutlass.utils import HardwareInfo
from nbclient import NotebookClient

from dsv4lab.emulator import EmulatorError, UnsupportedRuntimeCall, current_device, device
from dsv4lab.emulator.architectures import ARCHITECTURES

BOTH = pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])


def record(launch) -> None:
    """An executor that does nothing."""


def numbers(gpu, address: int, count: int) -> np.ndarray:
    """The float32 values at an address, which must belong to a registered tensor."""
    gpu.lookup(address, 4 * count)
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def dynamic(tensor: torch.Tensor):
    return from_dlpack(tensor).mark_layout_dynamic()


def pointer(tensor: torch.Tensor):
    return make_ptr(cutlass.Float32, tensor.data_ptr(), AddressSpace.gmem, assumed_align=16)


@BOTH
def test_the_captured_parameters_are_those_of_the_call(arch, kernels):
    with device(arch) as gpu:
        first = [gpu.from_torch(torch.randn(300)) for _ in range(3)]
        compiled = cute.compile(kernels.add, *map(dynamic, first))
        compiled(*map(dynamic, first))
        # Other pointers and another length, without compiling again.
        second = [torch.randn(1000) for _ in range(3)]
        compiled(*map(dynamic, second))
    for a, b, c in (first, second):
        assert torch.equal(c, a + b)
    assert [launch.grid for launch in gpu.launches] == [(3, 1, 1), (8, 1, 1)]
    one, two = gpu.launches
    assert (one.block, one.cluster, one.shared_bytes, one.stream) == ((128, 1, 1), (1, 1, 1), 0, 0)
    assert one.module is two.module and one.kernel in one.module.kernels


def test_jit_functions_launch_here_without_being_compiled_first(kernels):
    a, b, c = torch.randn(77), torch.randn(77), torch.zeros(77)
    with device("sm_100a") as gpu:
        kernels.add(dynamic(a), dynamic(b), dynamic(c))
    assert len(gpu.launches) == 1
    assert torch.equal(c, a + b)


def test_compiled_functions_take_torch_tensors_themselves(kernels):
    a, b, c = torch.randn(77), torch.randn(77), torch.zeros(77)
    with device("sm_100a") as gpu:
        cute.compile(kernels.add, *map(dynamic, (a, b, c)))(a, b, c)
        # What the DSL made of them was lent for the call.
        assert not gpu.memory.registry.extents()
    assert torch.equal(c, a + b)


def test_tensors_are_taken_back_on_leaving():
    with device("sm_100a") as gpu:
        x, y = gpu.empty(3), torch.zeros(3)
        gpu.register(y)
        lent = from_dlpack(y)
        assert len(gpu.memory.registry.extents()) == 3
        gpu.release(x)
        assert len(gpu.memory.registry.extents()) == 2
    assert not gpu.memory.registry.extents()
    del lent


def test_host_code_without_a_kernel_runs(kernels, capfd):
    with device("sm_100a") as gpu:
        kernels.say(7)
        cute.compile(kernels.say, 1)(8)
    assert capfd.readouterr().out == "said 7\nsaid 8\n"
    assert not gpu.launches


def test_each_device_compiles_for_its_own_architecture(kernels):
    """One process, after cutlass was imported and read its environment."""
    targets = []
    for arch in ("sm_100a", "sm_90a", "sm_103a", "sm_100a"):
        with device(arch, executor=record) as gpu:
            kernels.nothing()
            cute.compile(kernels.nothing)()
        for launch in gpu.launches:
            assert launch.module.arch == arch
            targets.append(launch.module.ptx.split(".target ")[1].split()[0].rstrip(","))
    assert targets == ["sm_100a"] * 2 + ["sm_90a"] * 2 + ["sm_103a"] * 2 + ["sm_100a"] * 2


@BOTH
def test_a_cluster_and_its_shared_memory_are_captured(arch, kernels):
    with device(arch, executor=record) as gpu:
        out = gpu.empty(8, torch.int32)
        kernels.cluster_ranks(from_dlpack(out), 2, 1024)
    (launch,) = gpu.launches
    assert (launch.grid, launch.block) == ((8, 1, 1), (32, 1, 1))
    assert (launch.cluster, launch.shared_bytes) == ((2, 1, 1), 1024)
    assert launch.parameters == (struct.pack("<Q", out.data_ptr()),)
    assert dict(launch.attributes)["cooperative"] == (0,)


@BOTH
def test_a_tma_descriptor_travels_as_a_parameter(arch, kernels):
    with device(arch, executor=record) as gpu:
        source, target = gpu.empty((256, 96), name="source"), gpu.empty((64, 32))
        kernels.fetch_tile(from_dlpack(source, assumed_align=128), from_dlpack(target))
        (launch,) = gpu.launches
        descriptor, out = launch.parameters
        words = struct.unpack("<16Q", descriptor)
        assert gpu.lookup(words[0]).extent.label == "source"
    assert words[0] == source.data_ptr()
    # Sizes less one, the innermost first.
    assert (words[4] & 0xFFFFFFFF, words[4] >> 32) == (95, 255)
    assert out == struct.pack("<Q", target.data_ptr())
    # The tile, and a barrier before it, padded to the tile's alignment.
    assert launch.shared_bytes == 128 + 64 * 32 * 4


@BOTH
def test_one_host_call_may_launch_several_kernels(arch, kernels):
    x = torch.arange(32.0)

    with device(arch) as gpu:

        def execute(launch) -> None:
            (address,) = struct.unpack("<Q", launch.parameters[0])
            (value,) = struct.unpack("<f", launch.parameters[1])
            values = numbers(gpu, address, 32)
            values[:] = values * value if "_scale" in launch.kernel else values + value

        gpu.executor = execute
        gpu.register(x)
        kernels.scale_then_shift(pointer(x), 3.0, 0.5)
    scale, shift = gpu.launches
    assert "_scale" in scale.kernel and "_shift" in shift.kernel
    assert scale.module is shift.module and set(scale.module.kernels) == {scale.kernel, shift.kernel}
    assert torch.equal(x, torch.arange(32.0) * 3 + 0.5)


def test_what_the_executor_raises_reaches_the_caller_as_it_is(kernels):
    error = KeyError("from the executor")

    def fail(launch) -> None:
        raise error

    x = torch.zeros(32)
    with device("sm_100a", executor=fail) as gpu:
        compiled = cute.compile(kernels.scale_then_shift, pointer(x), 1.0, 1.0)
        with pytest.raises(KeyError) as raised:
            compiled(pointer(x), 1.0, 1.0)
        assert raised.value is error and raised.value.__context__ is None
        # The host code stops where a launch fails, as it does on a GPU.
        assert len(gpu.launches) == 1 and "_scale" in gpu.launches[0].kernel

        error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            compiled(pointer(x), 1.0, 1.0)

        gpu.executor = record
        compiled(pointer(x), 1.0, 1.0)
        assert len(gpu.launches) == 4


def test_a_kernel_may_be_called_while_another_executes(kernels):
    with device("sm_100a") as gpu:

        def execute(launch) -> None:
            if len(gpu.launches) == 1:
                gpu.executor = record
                kernels.nothing()

        gpu.executor = execute
        kernels.nothing()
        assert len(gpu.launches) == 2


@pytest.mark.parametrize("through", ["call", "to", "executor"])
def test_what_was_compiled_inside_refuses_to_run_outside(through, kernels):
    with device("sm_100a", executor=record) as gpu:
        compiled = cute.compile(kernels.nothing)
        if through == "executor":
            compiled = compiled.to(0)
        if through != "to":
            compiled()
    launched = len(gpu.launches)
    with pytest.raises(EmulatorError, match=r"compiled inside device\('sm_100a'\), which has been left"):
        compiled.to(0)() if through == "to" else compiled()
    with device("sm_100a", executor=record) as another, pytest.raises(EmulatorError, match="has been left"):
        compiled.to(0)() if through == "to" else compiled()
    assert not another.launches and len(gpu.launches) == launched


def run_for_real(compiled) -> None:
    """Call a kernel that touches nothing, for a real GPU; says whether it got as far as the driver."""
    try:
        compiled()
    except EmulatorError:
        raise
    except Exception as error:
        assert "cudaError" in str(error)  # no driver, or no GPU of this architecture


def test_kernels_for_a_gpu_and_for_the_emulator_do_not_meet(kernels):
    """Whichever library the process has loaded: a first call outside loads NVIDIA's for good."""
    outside = cute.compile(kernels.nothing)
    run_for_real(outside)
    run_for_real(kernels.nothing)  # leaves what it compiled in the DSL's cache
    executor = outside.to(0) if torch.cuda.is_available() else None
    arch = CuTeDSL._get_dsl().envar.arch
    with device(arch if arch in ARCHITECTURES else "sm_100a", executor=record) as gpu:
        kernels.nothing()
        assert len(gpu.launches) == 1
        for function in filter(None, (outside, executor)):
            with pytest.raises(EmulatorError, match="not compiled inside this"):
                function()
    run_for_real(outside)
    run_for_real(kernels.nothing)
    run_for_real(cute.compile(kernels.nothing))
    assert len(gpu.launches) == 1


def state_of_the_dsl() -> dict:
    dsl = CuTeDSL._get_dsl()
    options = cute.compile._compile_options.options.items()
    return {
        "environment": dict(os.environ),
        "settings": dict(vars(dsl.envar)),
        "options": {kind.__name__: option.value for kind, option in options},
        "own": set(vars(dsl)),
        "provider": set(vars(dsl.compiler_provider)),
        "libraries": dsl.get_shared_libs(),
        "cached": list(dsl.jit_cache._dict),
        "run": JitExecutor.run_compiled_program,
        "tensor": cute_runtime._Tensor.__init__,
        "hardware": HardwareInfo.__init__,
    }


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_puts_everything_back(fails, kernels):
    before = state_of_the_dsl()
    try:
        with device("sm_90a", executor=record) as gpu:
            cute.compile(kernels.nothing)()
            kernels.nothing()
            (folder,) = {Path(CuTeDSL._get_dsl().envar.dump_dir)}
            assert folder.is_dir() and not list(folder.iterdir())
            inside = state_of_the_dsl()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert len(gpu.launches) == 2
    assert state_of_the_dsl() == before
    changed = {key for key in before if before[key] != inside[key]}
    assert {"settings", "own", "libraries", "run", "tensor", "hardware"} <= changed
    assert not folder.exists()


def test_tensors_are_device_tensors_inside_only():
    x = torch.zeros(4)
    assert from_dlpack(x).memspace == AddressSpace.generic
    with device("sm_100a"):
        assert from_dlpack(x).memspace == AddressSpace.gmem
        assert from_dlpack(np.zeros(4, np.float32)).memspace == AddressSpace.gmem
    assert from_dlpack(x).memspace == AddressSpace.generic


def test_only_one_device_at_a_time(kernels):
    gpu = device("sm_100a", executor=record)
    with gpu:
        with pytest.raises(EmulatorError, match=r"device\('sm_100a'\) is in use"), device("sm_90a"):
            pass
        with pytest.raises(EmulatorError, match="is in use"), gpu:
            pass
        kernels.nothing()  # still the first one's
    assert len(gpu.launches) == 1
    with pytest.raises(EmulatorError, match="call device"), gpu:
        pass
    with pytest.raises(ValueError, match="arch must be one of sm_90a, sm_100a, sm_103a, got 'sm_80'"):
        device("sm_80")


def test_a_function_without_ptx_is_refused(kernels):
    with device("sm_100a", executor=record) as gpu:
        CuTeDSL._get_dsl().envar.keep_ptx = False
        with pytest.raises(EmulatorError, match="without keeping its PTX"):
            cute.compile(kernels.nothing)
        with pytest.raises(EmulatorError, match="without keeping its PTX"):
            kernels.nothing()
    assert not gpu.launches


def test_options_of_the_caller_still_count(kernels, tmp_path):
    with device("sm_100a", executor=record):
        compiled = cute.compile(kernels.nothing, options=f"--dump-dir={tmp_path} --keep-cubin --keep-ptx")
        compiled()
        with pytest.raises(EmulatorError, match="another architecture than sm_100a"):
            cute.compile(kernels.nothing, options="--gpu-arch=sm_90a")
    assert {path.suffix for path in tmp_path.iterdir()} == {".cubin", ".ptx"}
    assert compiled.artifacts.CUBIN[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("elements", "cluster", "smem", "message"),
    [
        (7, 2, 0, r"grid must be a multiple of cluster \(2, 1, 1\), got \(7, 1, 1\)"),
        (8, 1, 232449, "a block has at most 232448 bytes of shared memory, got 232449"),
    ],
)
def test_a_launch_that_a_gpu_would_refuse_is_refused(elements, cluster, smem, message, kernels):
    with device("sm_100a", executor=record) as gpu:
        out = gpu.empty(elements, torch.int32)
        with pytest.raises(EmulatorError, match=message):
            kernels.cluster_ranks(from_dlpack(out), cluster, smem)
        assert not gpu.launches


@pytest.mark.parametrize(("arch", "sms"), [("sm_90a", 132), ("sm_100a", 148)])
def test_questions_about_the_hardware_are_answered(arch, sms, kernels):
    with device(arch):
        assert cute.compile(kernels.nothing).num_devices == 1
        assert HardwareInfo().get_device_multiprocessor_count() == sms
        assert HardwareInfo().get_max_active_clusters(2) == sms // 2
        with pytest.raises(UnsupportedRuntimeCall, match="cudaLibrary_t"):
            _ = cute.compile(kernels.nothing).library


def test_writing_into_a_guard_zone_is_noticed(kernels):
    with device("sm_100a") as gpu:
        x = gpu.empty(32, name="x")

        def execute(launch) -> None:
            ctypes.c_float.from_address(x.data_ptr() + 4 * 32).value = 1.0

        gpu.executor = execute
        with pytest.raises(EmulatorError, match=r"after x \(float32 \(32,\)"):
            kernels.scale_then_shift(pointer(x), 1.0, 1.0)


def test_after_a_mistake_the_next_launch_works(kernels):
    """In the same device and in the next, and the process is as it was."""
    for _ in range(2):
        with device("sm_100a") as gpu:
            x = gpu.from_torch(torch.arange(32.0), name="x")
            outside = torch.zeros(32)
            run = cute.compile(kernels.scale_then_shift, pointer(x), 1.0, 1.0)
            with pytest.raises(EmulatorError, match="belong to no registered tensor") as caught:
                run(pointer(outside), 2.0, 1.0)
            assert caught.value.cta == (0, 0, 0) and caught.value.lane == 0 and caught.value.line
            before = len(gpu.memory.registry.extents())
            run(pointer(x), 2.0, 1.0)
            assert x.tolist() == [2.0 * i + 1.0 for i in range(32)]
            assert len(gpu.memory.registry.extents()) == before
        assert current_device() is None


LATCHED = """
import sys
import dsv4lab.emulator
assert "cutlass" not in sys.modules
others = {name for name in sys.modules if name.startswith("dsv4lab.")} - {"dsv4lab.emulator"}
assert all(name.startswith("dsv4lab.emulator.") for name in others), others

import importlib.util
spec = importlib.util.spec_from_file_location("launch_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
with dsv4lab.emulator.device("sm_100a", executor=lambda launch: None) as gpu:
    kernels.nothing()
print(gpu.launches[0].module.ptx.split(".target ")[1].split()[0])
try:
    kernels.nothing()
except Exception as error:
    print(type(error).__name__)
"""


def test_settings_of_the_environment_do_not_matter_and_come_back(tmp_path):
    settings = {"ARCH": "sm_80", "LIBS": "/nowhere.so", "KEEP": "ptx", "DUMP_DIR": str(tmp_path)}
    environment = os.environ | {f"CUTE_DSL_{name}": value for name, value in settings.items()}
    script = [sys.executable, "-c", LATCHED, str(Path(__file__).with_name("launch_kernels.py"))]
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["sm_100a", "FileNotFoundError"], run.stderr
    assert not list(tmp_path.iterdir())


NOTEBOOK = (
    """
import cutlass.cute as cute
from dsv4lab.emulator import device

@cute.kernel
def inner():
    pass

@cute.jit
def outer():
    inner().launch(grid=(3, 1, 1), block=(32, 1, 1))
""",
    """
def fail(launch):
    raise LookupError(launch.grid)

with device("sm_90a") as gpu:
    gpu.executor = fail
    try:
        cute.compile(outer)()
    except LookupError as error:
        print(error, gpu.launches[0].module.arch)
""",
)


def test_in_jupyter():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert notebook.cells[1].outputs[0].text == "(3, 1, 1) sm_90a\n"
