"""What this machine can run, and why not the rest."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# Backend -> (compute capabilities that run it, architecture its kernels are compiled for).
CAPABILITIES = {"hopper": ((9, 0),), "blackwell": ((10, 0), (10, 3))}
ARCHITECTURES = {"sm_90a": "hopper", "sm_100a": "blackwell", "sm_103a": "blackwell"}
BACKENDS = ("reference", *CAPABILITIES, "emulator")


@dataclass(frozen=True)
class Status:
    """Whether something can run here: true or false as a condition, with the reason when false."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


def supports(what: str) -> Status:
    """Say whether this machine can run a backend, has a GPU, or has a GPU of an architecture.

    Args:
        what: "reference", "hopper", "blackwell" (the backend: GPU, kernels and their compiler) or "emulator";
            "cuda" (any NVIDIA GPU torch can use); "kernels" (one that "hopper" or "blackwell" runs on);
            "sm_90a", "sm_100a", "sm_103a" (one of that architecture).

    Returns:
        A `Status`, true or false, whose `reason` says why not when false.

    Raises:
        ValueError: `what` is none of these.
    """
    if what == "reference":
        return Status(True)
    if what == "cuda":
        return _cuda()
    if what == "kernels":
        statuses = [_kernel_backend(name) for name in CAPABILITIES]
        return next(filter(None, statuses), statuses[0])
    if what in ARCHITECTURES:
        digits = what.removeprefix("sm_").removesuffix("a")
        return _capability(((int(digits[:-1]), int(digits[-1])),))
    if what == "emulator":
        found = cutlass_dsl_version()
        return Status(True) if found else Status(False, "nvidia-cutlass-dsl is not installed")
    if what in CAPABILITIES:
        return _kernel_backend(what)
    known = ", ".join((*BACKENDS, "cuda", "kernels", *ARCHITECTURES))
    raise ValueError(f"what is {what!r}, but must be one of {known}")


def kernels_unavailable(backend: str, device: torch.device) -> str | None:
    """Why the kernels of a backend cannot run on tensors of a device; None if they can.

    Args:
        backend: "hopper" or "blackwell".
        device: a GPU, or the CPU, where an emulated GPU must be in use.
    """
    if device.type == "cuda":
        status = supports(backend)
        return None if status else status.reason
    if device.type != "cpu":
        return f"kernels run on GPUs and emulated ones, not on {device.type}"
    if not _written(backend):
        return f"the {backend} kernels are not written yet"
    # Whoever emulates a GPU has imported the emulator.
    emulator = sys.modules.get("dsv4lab.emulator")
    emulated = emulator.current_device() if emulator else None
    names = [name for name, known in ARCHITECTURES.items() if known == backend]
    if emulated is None:
        return f"on the CPU it runs only inside `with dsv4lab.emulator.device({names[0]!r})`"
    if emulated.arch.name not in names:
        return f"the emulated GPU is {emulated.arch.name}, the kernels need {' or '.join(names)}"
    return None


def _written(backend: str) -> bool:
    return (KERNELS / f"{backend}.py").exists()


def _cuda() -> Status:
    if torch.version.cuda is None:
        return Status(False, f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return Status(
            False, "torch finds no NVIDIA GPU it can use" if driver_version() else "no NVIDIA driver"
        )
    return Status(True)


def _capability(wanted: tuple[tuple[int, int], ...]) -> Status:
    status = _cuda()
    if not status:
        return status
    found = torch.cuda.get_device_capability()
    names = " or ".join(f"sm_{major}{minor}" for major, minor in wanted)
    reason = f"the GPU is sm_{found[0]}{found[1]}, the kernels need {names}"
    return Status(True) if found in wanted else Status(False, reason)


def _kernel_backend(name: str) -> Status:
    missing = []
    if not _written(name):
        missing.append(f"the {name} kernels are not written yet")
    if cutlass_dsl_version() is None:
        missing.append("nvidia-cutlass-dsl is not installed")
    if not (gpu := _capability(CAPABILITIES[name])):
        missing.append(gpu.reason)
    return Status(not missing, "; ".join(missing))


@functools.cache  # reading it takes 0.4 ms, and every call of an operation asks
def cutlass_dsl_version() -> str | None:
    """The installed version of nvidia-cutlass-dsl, without importing it; None if there is none."""
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The highest CUDA version the installed NVIDIA driver takes, such as "13.0"; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpus() -> list[str]:
    """Name, architecture and memory of every GPU torch can use."""
    if not _cuda():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in found]


def c_compiler() -> str | None:
    """The path of a C compiler, which torch.compile needs on a CPU; None if there is none."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def report() -> dict:
    """Everything `dsv4lab doctor` says, as plain data.

    Returns:
        "machine": name -> text; "backends": name -> {"available": bool, "reason": str}.
    """
    cuda = _cuda()
    machine = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none: a CPU build",
        "GPU": "; ".join(gpus()) or f"none: {cuda.reason}",
        "NVIDIA driver": f"takes CUDA up to {driver_version()}" if driver_version() else "none",
        "cutlass-dsl": cutlass_dsl_version() or "none: pip install 'nvidia-cutlass-dsl[cu13]'",
        "C compiler": c_compiler() or "none: torch.compile has no CPU code generator",
    }
    backends = {name: supports(name) for name in BACKENDS}
    return {
        "machine": machine,
        "backends": {name: {"available": bool(s), "reason": s.reason} for name, s in backends.items()},
    }
