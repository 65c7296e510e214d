"""One kernel launch: what the host code asked for, and whether a GPU would grant it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import torch

from dsv4lab.emulator.architectures import SHARED_OPTIN, Architecture
from dsv4lab.emulator.errors import EmulatorError
from dsv4lab.emulator.modules import Module
from dsv4lab.emulator.shim import LaunchAttribute

# cudaLaunchAttributeID of driver_types.h: name, and how many 32-bit words of the 16 its value has.
_LAUNCH_ATTRIBUTES = {
    2: ("cooperative", 1),
    4: ("cluster_dimension", 3),
    5: ("cluster_scheduling_policy", 1),
    6: ("programmatic_stream_serialization", 1),
    8: ("priority", 1),
    11: ("preferred_cluster_dimension", 3),
    14: ("preferred_shared_memory_carveout", 1),
}

Dim3 = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as the host code asked for it.

    Args:
        kernel: mangled name, an `.entry` of the module's PTX.
        module: what was compiled.
        grid: CTAs in x, y and z.
        block: threads of a CTA in x, y and z.
        cluster: CTAs of a cluster in x, y and z.
        shared_bytes: dynamic shared memory of a CTA.
        parameters: the bytes of each kernel parameter, in the order of the `.param` declarations.
        stream: handle of the stream, 0 for the default one.
        attributes: (name, 32-bit words of the value) of each launch attribute, in the order given.
    """

    kernel: str
    module: Module
    grid: Dim3
    block: Dim3
    cluster: Dim3
    shared_bytes: int
    parameters: tuple[bytes, ...] = field(repr=False)
    stream: int = 0
    attributes: tuple[tuple[str, tuple[int, ...]], ...] = ()


def launch_attribute(attribute: LaunchAttribute) -> tuple[str, tuple[int, ...]]:
    """Its name and the words of its value."""
    name, words = _LAUNCH_ATTRIBUTES.get(attribute.id, (f"attribute {attribute.id}", 16))
    # The rest of the union is whatever lay on the host code's stack.
    return name, tuple(attribute.value[:words])


def parameter_bytes(argument: torch.Tensor | int | float | bytes, size: int) -> bytes:
    """An argument as the bytes of a kernel parameter: of a tensor its address."""
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    if isinstance(argument, float):
        return struct.pack("<f" if size == 4 else "<d", argument)
    if isinstance(argument, int):
        return (argument % (1 << 8 * size)).to_bytes(size, "little")
    if len(argument) != size:
        raise ValueError(f"an argument has {len(argument)} bytes, and its parameter {size}")
    return bytes(argument)


def check_configuration(launch: Launch, arch: Architecture) -> None:
    """Raise EmulatorError for a launch that the GPU would refuse."""
    limits = arch.attributes

    def refuse(what: str) -> None:
        raise EmulatorError(f"launch of {launch.kernel} on {arch.name}: {what}")

    for name, size, first in (("grid", launch.grid, 5), ("block", launch.block, 2)):
        most = tuple(limits[first + axis] for axis in range(3))
        if any(not 1 <= n <= limit for n, limit in zip(size, most, strict=True)):
            refuse(f"{name} must be between (1, 1, 1) and {most}, got {size}")
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if threads > limits[1]:
        refuse(f"a block has at most {limits[1]} threads, got {launch.block}, which is {threads}")
    if any(n % c for n, c in zip(launch.grid, launch.cluster, strict=True)):
        refuse(f"grid must be a multiple of cluster {launch.cluster}, got {launch.grid}")
    shared = launch.shared_bytes + launch.module.static_shared[launch.kernel]
    if shared > limits[SHARED_OPTIN]:
        refuse(f"a block has at most {limits[SHARED_OPTIN]} bytes of shared memory, got {shared}")
