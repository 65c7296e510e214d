"""The functions of the CUDA runtime that compiled host code calls, answered in Python.

The host code of a kernel is machine code that calls `_cudaLaunchKernelEx` and a dozen others by name.
NVIDIA's runtime library exports them. Here each JIT engine is given its own before it links: pointers to the
functions below. So kernels for the emulator and kernels for a real GPU share nothing, whichever ran first.
(A library that exports the same names would not do: the JIT looks them up in the whole process, where the
library that was loaded first wins.)

An exception in one of them is kept, the host code is told that the call failed, and `call` raises it again
where Python called the kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Protocol

from dsv4lab.emulator.errors import EmulatorError, UnsupportedRuntimeCall

_SUCCESS = 0
_ERROR_UNKNOWN = 999  # cudaErrorUnknown

_void_p, _int, _uint = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_int_p, _void_pp = ctypes.POINTER(_int), ctypes.POINTER(_void_p)


class LaunchAttribute(ctypes.Structure):
    """cudaLaunchAttribute of driver_types.h: the union of values takes 64 bytes at offset 8."""

    _fields_ = (("id", _uint), ("pad", ctypes.c_byte * 4), ("value", ctypes.c_uint32 * 16))


class LaunchConfig(ctypes.Structure):
    """cudaLaunchConfig_t of driver_types.h."""

    _fields_ = (
        ("grid", _uint * 3),
        ("block", _uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("stream", _void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", _uint),
    )


class Host(Protocol):
    """Who answers for one compiled function while its host code runs."""

    def library(self) -> int: ...
    def kernel(self, library: int, name: str) -> int: ...
    def device_attribute(self, number: int) -> int: ...
    def kernel_attribute(self, kernel: int, number: int) -> int: ...
    def launch(self, kernel: int, config: LaunchConfig, arguments: Any) -> None: ...


class _Call(threading.local):
    """The compiled function whose host code this thread is in, and what went wrong in it."""

    host: Host | None = None
    error: BaseException | None = None


_call = _Call()


def call(host: Host, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`, which runs host code that `host` answers for; raises what was raised within it."""
    outer = _call.host, _call.error
    _call.host, _call.error = host, None
    result = None
    try:
        result = function(*arguments)
    except Exception:
        # What the DSL makes of the failed call says less than the error that made it fail.
        if _call.error is None:
            raise
    finally:
        error = _call.error
        _call.host, _call.error = outer
    if error is not None:
        raise error
    return result


def _answer(function: Callable[..., None], *types: Any) -> Any:
    """A C function that returns a cudaError_t, from one in Python that raises."""

    def answer(*arguments: Any) -> int:
        if _call.error is not None:
            return _ERROR_UNKNOWN
        try:
            if _call.host is None:
                raise EmulatorError("host code compiled for the emulator was run past it")
            function(_call.host, *arguments)
        except BaseException as error:
            _call.error = error
            return _ERROR_UNKNOWN
        return _SUCCESS

    return ctypes.CFUNCTYPE(_int, *types)(answer)


def _library_load(host: Host, library: Any, *_: Any) -> None:
    library[0] = host.library()


def _get_kernel(host: Host, kernel: Any, library: int, name: bytes) -> None:
    kernel[0] = host.kernel(library, name.decode())


def _get_device(host: Host, device: Any) -> None:
    device[0] = 0


def _set_device(host: Host, device: int) -> None:
    if device:
        raise UnsupportedRuntimeCall(f"the emulator has device 0 only, got {device}")


def _device_count(host: Host, count: Any) -> None:
    count[0] = 1


def _device_attribute(host: Host, value: Any, number: int, device: int) -> None:
    value[0] = host.device_attribute(number)


def _kernel_attribute(host: Host, value: Any, number: int, kernel: int, device: int) -> None:
    value[0] = host.kernel_attribute(kernel, number)


def _ignore(host: Host, *_: Any) -> None:
    """Attributes that are set allow more shared memory and larger clusters; a launch states both itself."""


def _launch_ex(host: Host, config: Any, kernel: int, arguments: Any) -> None:
    host.launch(kernel, config.contents, arguments)


# Signatures as in cuda_runtime_api.h and cuda.h.
_ANSWERS = {
    "_cudaLibraryLoadData": _answer(
        _library_load, _void_pp, _void_p, _void_p, _void_p, _uint, _void_p, _void_p, _uint
    ),
    "_cudaLibraryGetKernel": _answer(_get_kernel, _void_pp, _void_p, ctypes.c_char_p),
    "_cudaGetDevice": _answer(_get_device, _int_p),
    "_cudaSetDevice": _answer(_set_device, _int),
    "_cudaGetDeviceCount": _answer(_device_count, _int_p),
    "_cudaDeviceGetAttribute": _answer(_device_attribute, _int_p, _int, _int),
    "_cuKernelGetAttribute": _answer(_kernel_attribute, _int_p, _int, _void_p, _int),
    "_cudaFuncSetAttribute": _answer(_ignore, _void_p, _int, _int),
    "_cudaKernelSetAttributeForDevice": _answer(_ignore, _void_p, _int, _int, _int),
    "_cudaLaunchKernelEx": _answer(_launch_ex, ctypes.POINTER(LaunchConfig), _void_p, _void_pp),
}
_refusals: dict[str, Any] = {}


def _refusal(name: str) -> Any:
    """A C function that refuses, made once for each name: the JIT keeps its address for good."""

    def refuse(host: Host, *_: Any) -> None:
        raise UnsupportedRuntimeCall(f"the host code calls {name.removeprefix('_')}, which is not emulated")

    return _refusals.setdefault(name, _answer(refuse))


def external_functions(module: Any) -> list[str]:
    """Names of the functions that a compiled MLIR module declares and does not define."""
    return [
        op.attributes["sym_name"].value
        for op in module.body.operations
        if op.operation.name == "llvm.func" and len(op.regions[0].blocks) == 0
    ]


def link(engine: Any, module: Any, other: Callable[[str], Any] = lambda name: None) -> None:
    """Give a JIT engine the emulator's runtime, before it links: each `_cu...` function it declares.

    Args:
        engine: the execution engine of a compiled module, from which nothing has been looked up yet.
        module: that MLIR module.
        other: the C function for another name, or None.
    """
    for name in external_functions(module):
        known = _ANSWERS.get(name) or other(name)
        if known is not None or name.startswith("_cu"):
            engine.raw_register_runtime(name, ctypes.cast(known or _refusal(name), ctypes.c_void_p))
    engine.linked = True
