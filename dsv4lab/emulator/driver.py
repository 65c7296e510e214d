"""A GPU in software, up to the launch: what host code launches is caught, recorded and handed on."""

from __future__ import annotations

import ctypes
import itertools
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch

from dsv4lab.emulator import shim
from dsv4lab.emulator.architectures import architecture
from dsv4lab.emulator.errors import EmulatorError, MachineMissingError, UnsupportedRuntimeCall
from dsv4lab.emulator.extents import Extent, Location
from dsv4lab.emulator.launch import Launch, check_configuration, launch_attribute
from dsv4lab.emulator.memory import Memory
from dsv4lab.emulator.modules import Module

# CUfunction_attribute of cuda.h.
_MAX_THREADS_PER_BLOCK = 0
_STATIC_SHARED_BYTES = 1

Executor = Callable[[Launch], None]


def no_machine(launch: Launch) -> None:
    """The executor until there is one."""
    raise MachineMissingError(
        f"the launch of {launch.kernel} was caught, but the emulator cannot execute kernels yet"
    )


class _Host:
    """Answers for one compiled function while its host code runs."""

    _handles = itertools.count(0x1000, 0x10)

    def __init__(self, device: Device, name: str, module: Module | None) -> None:
        self.device = device
        self.name = name
        self.module = module
        self._library = next(self._handles)
        self._kernels: dict[int, str] = {}

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run host code, if the device that it was compiled for is the one in use."""
        if not self.device.active:
            raise EmulatorError(
                f"{self.name} was compiled inside device({self.device.arch.name!r}), which has been left: "
                "a kernel compiled for the emulator runs only there; compile it anew where it shall run"
            )
        return shim.call(self, function, *arguments)

    def library(self) -> int:
        return self._library

    def kernel(self, library: int, name: str) -> int:
        if library != self._library or self.module is None:
            raise EmulatorError(f"kernel {name} was asked of a library that {self.name} does not have")
        if name not in self.module.parameter_sizes:
            raise EmulatorError(f"kernel {name} is not in the PTX of {self.name}: {self.module.kernels}")
        handle = next(self._handles)
        self._kernels[handle] = name
        return handle

    def device_attribute(self, number: int) -> int:
        if number not in self.device.arch.attributes:
            raise UnsupportedRuntimeCall(f"attribute {number} of {self.device.arch.name} is not known")
        return self.device.arch.attributes[number]

    def kernel_attribute(self, kernel: int, number: int) -> int:
        if number == _STATIC_SHARED_BYTES:
            return self.module.static_shared[self._kernels[kernel]]
        if number == _MAX_THREADS_PER_BLOCK:
            return self.device.arch.attributes[1]
        raise UnsupportedRuntimeCall(f"attribute {number} of kernel {self._kernels[kernel]} is not known")

    def launch(self, kernel: int, config: shim.LaunchConfig, arguments: Any) -> None:
        name = self._kernels[kernel]
        sizes = self.module.parameter_sizes[name]
        attributes = tuple(launch_attribute(config.attributes[i]) for i in range(config.attribute_count))
        launch = Launch(
            kernel=name,
            module=self.module,
            grid=tuple(config.grid),
            block=tuple(config.block),
            cluster=dict(attributes).get("cluster_dimension", (1, 1, 1)),
            shared_bytes=config.dynamic_shared,
            parameters=tuple(ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)),
            stream=config.stream or 0,
            attributes=attributes,
        )
        self.device.launch(launch)


class Device:
    """An emulated GPU: use `with device(arch) as gpu`.

    Attributes:
        arch: what it is.
        launches: every launch, the first one first; also those whose execution raised.
        executor: called with each Launch; what it raises reaches whoever called the compiled function.
        memory: its tensors and the registry of addresses.
    """

    _lock = threading.Lock()
    _current: ClassVar[Device | None] = None

    def __init__(self, arch: str, executor: Executor | None = None) -> None:
        self.arch = architecture(arch)
        self.executor: Executor = executor or no_machine
        self.launches: list[Launch] = []
        self.memory = Memory()
        self._undo: ExitStack | None = None
        self._used = False

    @property
    def active(self) -> bool:
        return Device._current is self

    def __enter__(self) -> Device:
        with Device._lock:
            if Device._current is not None:
                inner = Device._current.arch.name
                raise EmulatorError(f"device({inner!r}) is in use: leave it before entering another")
            if self._used:
                raise EmulatorError("this device has been left: call device(...) again for a new one")
            self._used = True
            # Importing it imports cutlass, which takes seconds.
            from dsv4lab.emulator.dsl import patched

            with ExitStack() as undo:
                dump = undo.enter_context(tempfile.TemporaryDirectory(prefix="dsv4lab-ptx-"))
                undo.enter_context(patched(self, dump))
                self._undo = undo.pop_all()
            Device._current = self
        return self

    def __exit__(self, *_: object) -> None:
        with Device._lock:
            Device._current = None
            self._undo.close()
            self.memory.clear()

    def host(self, name: str, module: Module | None) -> _Host:
        return _Host(self, name, module)

    def launch(self, launch: Launch) -> None:
        """Record one launch and hand it to the executor."""
        check_configuration(launch, self.arch)
        self.launches.append(launch)
        self.executor(launch)
        self.memory.check_guards()

    def empty(
        self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, *, name: str | None = None
    ) -> torch.Tensor:
        """See `Memory.empty`."""
        return self.memory.empty(shape, dtype, name=name)

    def from_torch(self, tensor: torch.Tensor, *, name: str | None = None) -> torch.Tensor:
        """See `Memory.from_torch`."""
        return self.memory.from_torch(tensor, name=name)

    def register(self, tensor: torch.Tensor, *, name: str | None = None) -> Extent:
        """See `Memory.register`."""
        return self.memory.register(tensor, name=name)

    def release(self, tensor: torch.Tensor) -> None:
        """See `Memory.release`."""
        self.memory.release(tensor)

    def lookup(self, address: int, nbytes: int = 1) -> Location:
        """See `Registry.lookup`."""
        return self.memory.registry.lookup(address, nbytes)


def device(arch: str, executor: Executor | None = None) -> Device:
    """A GPU in software, for the length of a `with` block.

    Inside, `cute.compile` and `@cute.jit` functions compile for this architecture, whatever was set or
    compiled before, and calling them launches here, on CPU tensors; `from_dlpack` must be called inside too.
    Leaving puts everything back. What was compiled inside then refuses to run, and what was compiled outside
    refuses to run inside. The block is the whole process's: meanwhile, other threads see the same device.

    Args:
        arch: "sm_90a", "sm_100a" or "sm_103a".
        executor: called with each Launch, instead of the emulator's own machine.

    Raises:
        ValueError: another architecture.
        EmulatorError: on entering, if a device is in use already.
    """
    return Device(arch, executor)
