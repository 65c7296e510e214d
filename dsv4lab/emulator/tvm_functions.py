"""Functions that CuTe DSL compiles with the option --enable-tvm-ffi: they take tensors through TVM-FFI.

Many published kernels are compiled so. Their host code is an ordinary one behind a function of the TVM-FFI
ABI, which loads the kernels at its first call and takes tensors of CUDA devices only. NVIDIA's loader links
it with libraries of its own; here it is looked up in the engine that `shim.link` has linked, and is handed
CPU tensors that say that they lie on CUDA device 0. Nothing of this is used where tvm_ffi is not installed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dsv4lab.emulator import dlpack

if TYPE_CHECKING:
    from dsv4lab.emulator.memory import Memory

_void_p, _int, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_init, _load = ctypes.CFUNCTYPE(_int, _void_p), ctypes.CFUNCTYPE(_int, _void_p, _int)
_set_error = ctypes.CFUNCTYPE(None, _text, _text)
_KIND, _MESSAGE = b"RuntimeError", b"the emulated device failed"


def installed() -> bool:
    """Whether functions of TVM-FFI can be compiled at all."""
    return importlib.util.find_spec("tvm_ffi") is not None


# What the host code calls -----------------------------------------------------------------------------------


def _load_once(state: int, init: int, load: int, set_error: int) -> int:
    """Have the host code load its library and kernels, if `state` (void **) says that it has not yet."""
    loaded, library = _void_p.from_address(state), _void_p()
    if loaded.value:
        return 0
    failed = _init(init)(ctypes.addressof(library)) or _load(load)(ctypes.addressof(library), 0)
    if failed:
        _set_error(set_error)(_KIND, _MESSAGE)
        return -1
    loaded.value = library.value
    return 0


def _raise_cuda_error(name: bytes, code: int) -> None:
    """Say by TVM-FFI's means that a call failed; `shim.call` knows why."""
    _tvm_function("TVMFFIErrorSetRaisedFromCStr", _set_error)(_KIND, _MESSAGE)


def _tvm_function(name: str, type_: Any) -> Any:
    from tvm_ffi.libinfo import find_libtvm_ffi

    return type_((name, ctypes.CDLL(find_libtvm_ffi())))


_ANSWERS = {
    "cuda_dialect_init_library_once": ctypes.CFUNCTYPE(_int, _void_p, _void_p, _void_p, _void_p)(_load_once),
    "CuteDSLRT_TVMFFISetRaisedCudaError": ctypes.CFUNCTYPE(None, _text, _int)(_raise_cuda_error),
    # Called when an engine goes, perhaps after Python has: a function that does nothing, and not of Python.
    "cuda_dialect_unload_library_once": ctypes.CDLL(None).getpid,
    "cuda_dialect_get_error_name": ctypes.CDLL(None).getpid,
}


def answer(name: str) -> Any:
    """The C function for a name that the host code of a TVM-FFI function declares; None if it is not one."""
    if name.startswith("TVMFFI"):
        return _tvm_function(name, ctypes.CFUNCTYPE(_int))
    return _ANSWERS.get(name)


# How it is made and called ----------------------------------------------------------------------------------


class Shown:
    """A CPU tensor that says it lies on CUDA device 0, for whoever asks for its DLPack capsule."""

    def __init__(self, tensor: torch.Tensor, memory: Memory) -> None:
        self.tensor, self.memory = tensor.detach(), memory

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.tensor.__dlpack__()
        span = dlpack.pretend_cuda(capsule)
        self.memory.lend(self, span.start, span.nbytes, span.description)
        return capsule


@contextmanager
def shown(value: Any, memory: Memory) -> Iterator[Any]:
    """An argument with all its tensors shown to TVM-FFI, and lent to the kernels while the block lasts."""
    keep: list[Shown] = []
    try:
        yield _show(value, memory, keep)
    finally:
        keep.clear()


def _show(value: Any, memory: Memory, keep: list[Shown]) -> Any:
    import tvm_ffi

    if isinstance(value, torch.Tensor):
        keep.append(Shown(value, memory))
        return tvm_ffi.from_dlpack(keep[-1])
    if type(value) in (tuple, list):
        return type(value)(_show(item, memory, keep) for item in value)
    if isinstance(value, tuple):  # a NamedTuple
        return type(value)(*(_show(item, memory, keep) for item in value))
    if type(value) is dict:
        return {key: _show(item, memory, keep) for key, item in value.items()}
    return value


@functools.cache
def _kinds() -> dict[type, Callable[..., Any]]:
    """CuTe DSL's classes of TVM-FFI functions, and how each is called."""
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider

    kinds = (provider.TVMFFIJitCompiledFunction, provider.TVMFFIJitCompiledFunctionWithKwargs)
    return {kind: kind.__call__ for kind in kinds}


@functools.cache
def _emulated(kind: type) -> type:
    """The class of functions that were compiled for the emulator."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with shown((args, kwargs), self.host.device.memory) as (args, kwargs):
            return self.host.run(functools.partial(_kinds()[kind], self, *args, **kwargs))

    return type(f"Emulated{kind.__name__}", (kind,), {"__call__": call})


def adopt(function: Any, host: Any) -> None:
    """Have a function of TVM-FFI call its host code through `host`."""
    function.__class__, function.host = _emulated(type(function)), host


def _create(self: Any) -> Any:
    import tvm_ffi

    if self.engine is None:
        return None
    packed = self.engine.raw_lookup(f"__tvm_ffi_{self.function_name}")
    return tvm_ffi.Function.__from_mlir_packed_safe_call__(packed, keep_alive_object=self.engine)


def replacements(refuse: Callable[..., Any]) -> Iterator[tuple[type, str, Any]]:
    """(class, attribute, value) to set in CuTe DSL while functions are compiled and run here."""
    for kind in _kinds():
        yield kind, "__call__", refuse
        yield kind, "_create_tvm_ffi_function", _create
