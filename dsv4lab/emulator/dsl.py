"""Where the emulator takes hold of CuTe DSL: the one file that knows its inside (nvidia-cutlass-dsl 4.8.1).

Everything is put back on leaving. The environment is not touched: the DSL reads it once, on import.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from cutlass.base_dsl.dsl import DSLSingletonMeta
from cutlass.base_dsl.jit_executor import JitExecutor
from cutlass.cute import runtime as cute_runtime
from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction
from cutlass.utils import HardwareInfo

from dsv4lab.emulator import dlpack, shim, tvm_functions
from dsv4lab.emulator.errors import EmulatorError, UnsupportedRuntimeCall
from dsv4lab.emulator.modules import Module

if TYPE_CHECKING:
    from dsv4lab.emulator.driver import Device

_run = JitExecutor.run_compiled_program
_load = CudaDialectJitCompiledFunction._load_cuda_library


class EmulatedExecutor(JitExecutor):
    """Runs the host code of a function compiled for the emulator."""

    host: Any

    def run_compiled_program(self, exe_args: list[Any]) -> int | None:
        return self.host.run(_run, self, exe_args)


class EmulatedFunction(CudaDialectJitCompiledFunction):
    """A function compiled for the emulator."""

    num_devices = 1
    host: Any

    def _load_cuda_library(self) -> list[Any]:
        self.host.run(_load, self)
        # The handle is the emulator's: on a machine with a driver, nobody must ask that to unload it.
        return []

    def to(self, device: int | None = None) -> JitExecutor:
        executor = super().to(device)
        executor.__class__, executor.host = EmulatedExecutor, self.host
        return executor

    @property
    def library(self) -> Any:
        raise UnsupportedRuntimeCall(f"{self.host.name}: the emulator has no cudaLibrary_t to hand out")


def _refuse(*_: Any, **__: Any) -> None:
    raise EmulatorError(
        "a kernel that was not compiled inside this `with device(...)` block was called in it: "
        "compile it here, so that its PTX is known"
    )


@contextmanager
def patched(device: Device, dump_dir: str) -> Iterator[None]:
    """Make CuTe DSL compile for a device and launch on it."""
    singletons = list(DSLSingletonMeta._instances.values())
    providers = {id(dsl.compiler_provider): dsl.compiler_provider for dsl in singletons}
    with ExitStack() as stack:
        for provider in providers.values():
            _set(stack, provider, "jit", _linking(provider.jit))
        for dsl in singletons:
            _patch_dsl(stack, dsl, device, dump_dir)
        _set(stack, JitExecutor, "run_compiled_program", _refuse)
        _set(stack, CudaDialectJitCompiledFunction, "_load_cuda_library", _refuse)
        _set(stack, cute_runtime._Tensor, "__init__", _adopting(cute_runtime._Tensor.__init__, device))
        for name, answer in _hardware(device).items():
            _set(stack, HardwareInfo, name, answer)
        if tvm_functions.installed():
            for owner, name, value in tvm_functions.replacements(_refuse):
                _set(stack, owner, name, value)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack unwinds."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


def _patch_dsl(stack: ExitStack, dsl: Any, device: Device, dump_dir: str) -> None:
    stack.callback(_restore, dsl.envar, dict(vars(dsl.envar)))
    dsl.envar.arch = device.arch.name
    dsl.envar.keep_ptx = dsl.envar.keep_cubin = True
    dsl.envar.dump_dir = dump_dir
    # Nothing from an earlier compilation is used, nor is anything left behind for a later one.
    dsl.envar.no_cache = True
    # NVIDIA's runtime library stays out of the engine: `shim.link` brings all that it would resolve.
    _set(stack, dsl, "get_shared_libs", lambda: [])
    _set(stack, dsl, "_prepare_compilation", _preparing(dsl, dsl._prepare_compilation))
    _set(stack, dsl, "_build_jit_function", _building(dsl._build_jit_function, device, dump_dir))


def _restore(envar: Any, saved: dict[str, Any]) -> None:
    vars(envar).clear()
    vars(envar).update(saved)


def _preparing(dsl: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with a copy of the options: `cute.compile` has one object for all its calls, and the device's
    settings would stay in it for good."""

    @functools.wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        dsl.compile_options = copy.deepcopy(dsl.compile_options)
        return original(*args, **kwargs)

    return prepare


def _linking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def jit(module: Any, *args: Any, **kwargs: Any) -> Any:
        engine = original(module, *args, **kwargs)
        shim.link(engine, module, tvm_functions.answer)
        return engine

    return jit


def _building(original: Callable[..., Any], device: Device, dump_dir: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(func_type: Any, module: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
        ordinary = func_type is CudaDialectJitCompiledFunction
        make = EmulatedFunction if ordinary else func_type
        function = original(make, module, engine, *args, **kwargs)
        compiled = None
        if function.has_gpu_module:
            if engine is None:
                raise EmulatorError(
                    f"{function.function_name} was compiled for another architecture than {device.arch.name}"
                )
            if not getattr(engine, "linked", False):
                raise EmulatorError("CuTe DSL made a JIT engine in a way that the emulator does not know")
            kept = function.artifacts
            compiled = Module(function.function_name, device.arch.name, str(kept.PTX), kept.CUBIN or b"")
        function.host = device.host(function.function_name, compiled)
        if not ordinary:
            tvm_functions.adopt(function, function.host)
        _forget_artifacts(dump_dir)
        return function

    return build


def _forget_artifacts(dump_dir: str) -> None:
    """Empty the private folder: what it held has been read, and must not be taken for a later kernel's."""
    for name in os.listdir(dump_dir):
        os.unlink(os.path.join(dump_dir, name))


def _adopting(original: Callable[..., None], device: Device) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("enable_tvm_ffi") and isinstance(tensor, torch.Tensor):
            self._shown = tvm_functions.Shown(tensor, device.memory)
            original(self, self._shown, *args, **kwargs)
            return
        original(self, tensor, *args, **kwargs)
        span = dlpack.pretend_cuda(self._dlpack_data)
        device.memory.lend(self, span.start, span.nbytes, span.description)

    return init


def _hardware(device: Device) -> dict[str, Callable[..., Any]]:
    """Answers of `cutlass.utils.HardwareInfo`, by which kernels size persistent grids."""
    arch = device.arch
    return {
        "__init__": lambda self, device_id=0: None,
        "get_device_multiprocessor_count": lambda self: arch.sm_count,
        "get_l2_cache_size_in_bytes": lambda self: arch.l2_bytes,
        # As if a cluster could lie anywhere; a real GPU may hold a few less.
        "get_max_active_clusters": lambda self, cluster_size, stream=None: arch.sm_count // cluster_size,
    }
