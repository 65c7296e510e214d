"""A GPU in software: what host code launches is caught, recorded and executed."""

from __future__ import annotations

import ctypes
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch

from dsv4lab.emulator import shim
from dsv4lab.emulator.architectures import architecture
from dsv4lab.emulator.errors import EmulatorError, UnsupportedRuntimeCall, in_kernel
from dsv4lab.emulator.extents import Extent, Location
from dsv4lab.emulator.launch import Launch, check_configuration, launch_attribute, parameter_bytes
from dsv4lab.emulator.memory import Memory
from dsv4lab.emulator.modules import Module
from dsv4lab.emulator.program import Program
from dsv4lab.emulator.run import CHECKS, Options, Run, Watch
from dsv4lab.emulator.trace import Counters, Trace
from dsv4lab.emulator.variables import allocate

# CUfunction_attribute of cuda.h.
_MAX_THREADS_PER_BLOCK = 0
_STATIC_SHARED_BYTES = 1

Executor = Callable[[Launch], None]


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
        options: how it executes launches.
        launches: every launch, the first one first; also those whose execution raised.
        runs: what the execution of each launch has counted and traced, in the same order.
        executor: called with each Launch; what it raises reaches whoever called the compiled function.
        memory: its tensors and the registry of addresses.
    """

    _lock = threading.Lock()
    _current: ClassVar[Device | None] = None

    def __init__(self, arch: str, executor: Executor | None, options: Options) -> None:
        self.arch = architecture(arch)
        self.options = options
        self.executor: Executor = executor or self.execute
        self.launches: list[Launch] = []
        self.runs: list[Run] = []
        self._programs: dict[tuple[str, str], Program] = {}
        self._variables: dict[str, dict[str, int]] = {}
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

    def run_ptx(
        self,
        text: str,
        *arguments: torch.Tensor | int | float | bytes,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] = (32, 1, 1),
        cluster: tuple[int, int, int] = (1, 1, 1),
        shared_bytes: int = 0,
        kernel: str | None = None,
    ) -> Run:
        """Launch a kernel given as PTX; this needs no `with` block.

        Args:
            text: a PTX module.
            arguments: one for each parameter: a tensor of `empty`, `from_torch` or `register` for its
                address, an integer, a float (for 4 bytes an f32), or the parameter's bytes.
            grid, block, cluster, shared_bytes: as of Launch.
            kernel: name of the `.entry`; may be left out if there is but one.
        Returns:
            The run, with its counters and trace.
        """
        module = Module("ptx", self.arch.name, text)
        if kernel is None and len(module.kernels) != 1:
            raise ValueError(f"kernel must name one of {', '.join(module.kernels)}, got None")
        kernel = kernel or module.kernels[0]
        if kernel not in module.kernels:
            raise ValueError(f"kernel must be one of {', '.join(module.kernels)}, got {kernel!r}")
        sizes = module.parameter_sizes[kernel]
        if len(arguments) != len(sizes):
            raise ValueError(f"{kernel} has {len(sizes)} parameters, got {len(arguments)} arguments")
        parameters = tuple(map(parameter_bytes, arguments, sizes))
        attributes = () if cluster == (1, 1, 1) else (("cluster_dimension", cluster),)
        self.launch(
            Launch(kernel, module, grid, block, cluster, shared_bytes, parameters, attributes=attributes)
        )
        return self.runs[-1]

    def execute(self, launch: Launch) -> None:
        """Execute one launch; raises what the kernel did wrong."""
        program = self.program(launch.module, launch.kernel)
        run = Run(launch, program, self.arch, self.memory, self.options, len(self.runs))
        self.runs.append(run)
        run.execute()

    def program(self, module: Module, kernel: str) -> Program:
        """A kernel made ready to run, once."""
        key = (module.digest, kernel)
        if key not in self._programs:
            if module.digest not in self._variables:
                self._variables[module.digest] = allocate(module, self)
            try:
                self._programs[key] = Program(module.parsed, kernel, self._variables[module.digest])
            except EmulatorError as error:
                raise in_kernel(error, kernel, None, None) from None
        return self._programs[key]

    @property
    def counters(self) -> Counters:
        """The counts of all launches together; those of one are `runs[i].counters`."""
        total = Counters()
        for run in self.runs:
            total.update(run.counters)
        return total

    @property
    def trace(self) -> Trace | None:
        """The events of the last launch; None before the first, or with trace=False."""
        return self.runs[-1].trace if self.runs else None

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


def current_device() -> Device | None:
    """The device whose `with` block the process is in."""
    return Device._current


def device(
    arch: str,
    *,
    checks: str | Iterable[str] = "all",
    mma: str = "exact",
    seed: int = 0,
    limit: int = 100_000_000,
    strict: bool = True,
    trace: bool = True,
    watch: Watch | None = None,
    executor: Executor | None = None,
) -> Device:
    """A GPU in software, for the length of a `with` block.

    Inside, `cute.compile` and `@cute.jit` functions compile for this architecture, whatever was set or
    compiled before, and calling them launches here, on CPU tensors; `from_dlpack` must be called inside too.
    Leaving puts everything back. What was compiled inside then refuses to run, and what was compiled outside
    refuses to run inside. The block is the whole process's: meanwhile, other threads see the same device.

    Args:
        arch: "sm_90a", "sm_100a" or "sm_103a".
        checks: what to watch: "all", "none" or some of "initialised", "race", "proxy", "barriers", "leaks".
            Bounds and alignment always are.
        mma: "exact" sums in float64 and rounds once; "hardware" follows the published bit model.
        seed: of the order in which warps run and asynchronous operations complete.
        limit: warp-instructions that one launch may execute.
        strict: global addresses must be of a registered tensor; otherwise memory that the process has mapped
            for writing will do.
        trace: record events for `Device.trace`.
        watch: called with the Machine and the Instruction whenever an asynchronous operation (a bulk copy, an
            MMA, ...) or a part of one has been performed: the moment to look at the machine's memories.
        executor: called with each Launch, instead of executing it.

    Raises:
        ValueError: another architecture, or an option that does not exist.
        EmulatorError: on entering, if a device is in use already.
    """
    if isinstance(checks, str):
        checks = {"all": CHECKS, "none": ()}.get(checks, (checks,))
    options = Options(frozenset(checks), mma, seed, limit, strict, trace, watch)
    return Device(arch, executor, options)
