"""Compiling and calling kernels: once for each configuration, on a GPU's stream or in the emulator.

A kernel file offers a factory: `make(*config)` returns a `@cute.jit` host function of pointers, numbers and,
last, a stream. `launch` compiles what the factory makes, keeps it, and calls it with torch tensors.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import make_ptr

from dsv4lab.emulator import Device, Module, current_device

ELEMENTS = {
    torch.float32: cutlass.Float32,
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.uint8: cutlass.Uint8,
    torch.int32: cutlass.Int32,
    torch.int64: cutlass.Int64,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
}
# The alignment that kernels may assume of every tensor they are given, in bytes.
ALIGNMENT = 16
_ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
# A launch that begins in one process and ends in another is the exception: files are small and few.
_SUFFIX = ".o"


@dataclass(frozen=True)
class As:
    """A tensor whose elements a kernel takes as another type, such as packed codes as Float4E2M1FN."""

    tensor: torch.Tensor
    element: type[cutlass.Numeric]


@dataclass(frozen=True)
class Long:
    """A number that a kernel takes as 64 bits."""

    value: int


Argument = torch.Tensor | As | Long | int | float | None
Factory = Callable[..., Callable[..., Any]]

_on_gpu: dict[tuple, Callable[..., Any]] = {}
_noted: ContextVar[dict | None] = ContextVar("dsv4lab_noted", default=None)
_emulated: WeakKeyDictionary[Device, dict[tuple, Callable[..., Any]]] = WeakKeyDictionary()


def target(device: torch.device | str) -> str:
    """What kernels are compiled for: a GPU's architecture, or of CPU tensors that of the emulated GPU in use.

    Raises:
        RuntimeError: the GPU is none that kernels are written for, or no emulated GPU is in use.
    """
    device = torch.device(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability not in _ARCHITECTURES:
            raise RuntimeError(f"no kernels are written for a GPU of compute capability {capability}")
        return _ARCHITECTURES[capability]
    emulated = current_device()
    if emulated is None:
        raise RuntimeError(f"kernels run on {device} only inside `with dsv4lab.emulator.device(...)`")
    return emulated.arch.name


def launch(make: Factory, config: tuple, arguments: Sequence[Argument]) -> None:
    """Call the kernel that `make(*config)` gives, compiled at its first call.

    Args:
        make: a kernel's factory, a module-level function.
        config: what it is compiled for; hashable, without tensors.
        arguments: of the host function, without its stream; a None becomes a null pointer. Tensors are
            contiguous, on one device, and begin at multiples of 16 bytes.

    Raises:
        ValueError: a tensor is not aligned, or tensors are on several devices.
        RuntimeError: it would have to compile while a CUDA graph is captured.
    """
    tensors = [a.tensor if isinstance(a, As) else a for a in arguments if isinstance(a, As | torch.Tensor)]
    device = _device_of(tensors)
    values = [_value(argument) for argument in arguments]
    if (noted := _noted.get()) is not None:
        noted[make, config] = tuple(_kind(argument) for argument in arguments)
        return
    emulated = current_device() if device.type == "cpu" else None
    if emulated is None:
        stream = cuda.CUstream(torch.cuda.current_stream(device).cuda_stream)
        _compiled(_on_gpu, make, config, target(device), [*values, stream])(*values, stream)
        return
    compiled = _emulated.setdefault(emulated, {})
    # Aliases: what is released below must be neither the caller's own registration nor one tensor twice.
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    for tensor in held:
        emulated.register(tensor)
    try:
        stream = cuda.CUstream(0)
        _compiled(compiled, make, config, target(device), [*values, stream])(*values, stream)
    finally:
        for tensor in held:
            emulated.release(tensor)


def compiled_for(device: Device) -> dict[tuple[Factory, tuple], Module]:
    """What was compiled for an emulated GPU, by factory and configuration."""
    return {
        (make, config): function.host.module
        for (make, config, _), function in _emulated.get(device, {}).items()
    }


def _device_of(tensors: list[torch.Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"a kernel's tensors must be on one device, got {sorted(map(str, devices))}")
    for tensor in tensors:
        if tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"a kernel's tensors must begin at multiples of {ALIGNMENT} bytes, got one of shape "
                f"{tuple(tensor.shape)} at {tensor.data_ptr():#x}"
            )
    return devices.pop()


def _value(argument: Argument) -> Any:
    """What the host function gets."""
    if isinstance(argument, Long):
        return cutlass.Int64(argument.value)
    if isinstance(argument, int):
        return cutlass.Int32(argument)
    if isinstance(argument, float):
        return cutlass.Float32(argument)
    if argument is None:
        return make_ptr(cutlass.Uint8, 0, cute.AddressSpace.gmem, assumed_align=ALIGNMENT)
    if isinstance(argument, As):
        tensor, element = argument.tensor, argument.element
    else:
        tensor, element = argument, ELEMENTS[argument.dtype]
    return make_ptr(element, tensor.data_ptr(), cute.AddressSpace.gmem, assumed_align=ALIGNMENT)


def _compiled(known: dict, make: Factory, config: tuple, arch: str, values: list[Any]) -> Callable[..., Any]:
    key = (make, config, arch)
    found = known.get(key)
    if found is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{make.__module__}.{make.__name__}{config} is not compiled yet, and a CUDA graph is being "
                "captured: call it, or `warmup`, once before"
            )
        on_disk = known is _on_gpu
        found = known[key] = (
            _from_disk(make, config, arch, values) if on_disk else _compile(make, config, values)
        )
    return found


@contextmanager
def noting() -> Iterator[dict[tuple[Factory, tuple], tuple[str, ...]]]:
    """Note which kernels are launched, with arguments of what kinds, in place of launching them.

    Yields:
        What `compile_to_disk` takes, by factory and configuration.
    """
    token = _noted.set({})
    try:
        yield _noted.get()
    finally:
        _noted.reset(token)


def compile_to_disk(make: Factory, config: tuple, kinds: tuple[str, ...], device: torch.device) -> None:
    """Compile a kernel for the GPU and keep it on disk, where any process finds it."""
    numbers = {"int": 0, "float": 0.0, "Long": Long(0), "None": None}
    values = [
        _value(numbers[kind])
        if kind in numbers
        else make_ptr(getattr(cutlass, kind), 0, cute.AddressSpace.gmem, assumed_align=ALIGNMENT)
        for kind in kinds
    ]
    _from_disk(make, config, target(device), [*values, cuda.CUstream(0)])


def on_disk(make: Factory, config: tuple, device: torch.device) -> bool:
    """Whether a kernel is compiled and kept."""
    return (cache_folder() / (cache_name(make, config, target(device)) + _SUFFIX)).exists()


def _kind(argument: Argument) -> str:
    """The name of an element type that a pointer is to, or of a number's type."""
    if isinstance(argument, As):
        return argument.element.__name__
    if isinstance(argument, torch.Tensor):
        return ELEMENTS[argument.dtype].__name__
    return "None" if argument is None else type(argument).__name__


def _compile(make: Factory, config: tuple, values: list[Any]) -> Callable[..., Any]:
    return cute.compile(make(*config), *values)


# Kernels that outlive the process.


def cache_folder() -> Path:
    """Where compiled kernels are kept: DSV4LAB_CACHE, or dsv4lab/kernels in the user's cache folder."""
    if "DSV4LAB_CACHE" in os.environ:
        return Path(os.environ["DSV4LAB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4lab" / "kernels"


@cache
def sources_digest() -> str:
    """A digest of the source of all kernels: what one of them calls may be in any file."""
    digest = hashlib.sha256(cutlass.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cache_name(make: Factory, config: tuple, arch: str) -> str:
    """Name of a compiled kernel's file and of the function in it."""
    said = repr((make.__module__, make.__name__, config, arch, sources_digest()))
    return f"{make.__name__}_{arch}_{hashlib.sha256(said.encode()).hexdigest()[:24]}"


def _from_disk(make: Factory, config: tuple, arch: str, values: list[Any]) -> Callable[..., Any]:
    """The kernel kept on disk; compiled, and kept, if there is none."""
    name = cache_name(make, config, arch)
    path = cache_folder() / (name + _SUFFIX)
    if path.exists():
        return getattr(cutlass.runtime.load_module(str(path)), name)
    compiled = _compile(make, config, values)
    _keep(path, compiled.dump_to_object(name))
    return compiled


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
