"""What each emulated GPU answers when a kernel's host code asks for its properties."""

from __future__ import annotations

from dataclasses import dataclass, field

# Numbers of cudaDeviceAttr in CUDA's driver_types.h; the driver's CUdevice_attribute has the same.
SM_COUNT = 16
L2_BYTES = 38
CAPABILITY_MAJOR = 75
CAPABILITY_MINOR = 76
SHARED_OPTIN = 97

# The same on compute capabilities 9.0, 10.0 and 10.3: the table of technical specifications in the CUDA C++
# Programming Guide. All of them were also read from an H200 with cuDeviceGetAttribute (driver 580, 2026-11).
COMMON = {
    1: 1024,  # threads of a block
    2: 1024,  # block, x
    3: 1024,  # block, y
    4: 64,  # block, z
    5: 2**31 - 1,  # grid, x
    6: 65535,  # grid, y
    7: 65535,  # grid, z
    8: 49152,  # shared memory of a block without opting in
    9: 65536,  # constant memory
    10: 32,  # lanes of a warp
    12: 65536,  # 32-bit registers of a block
    39: 2048,  # threads of an SM
    81: 233472,  # shared memory of an SM
    82: 65536,  # 32-bit registers of an SM
    95: 1,  # cooperative launch
    SHARED_OPTIN: 232448,  # shared memory of a block, opted in: that of an SM less the reserved 1024
    106: 32,  # blocks of an SM
    111: 1024,  # shared memory reserved in each block
    120: 1,  # clusters
}


@dataclass(frozen=True)
class Architecture:
    """One GPU that kernels are compiled for.

    Args:
        name: as the compiler takes it, such as "sm_100a".
        gpu: the product whose numbers are used.
        attributes: value by number of cudaDeviceAttr.
    """

    name: str
    gpu: str
    attributes: dict[int, int] = field(repr=False)

    @property
    def sm_count(self) -> int:
        return self.attributes[SM_COUNT]

    @property
    def l2_bytes(self) -> int:
        return self.attributes[L2_BYTES]


def _architecture(name: str, gpu: str, capability: tuple[int, int], sm_count: int, l2: int) -> Architecture:
    own = {CAPABILITY_MAJOR: capability[0], CAPABILITY_MINOR: capability[1], SM_COUNT: sm_count, L2_BYTES: l2}
    return Architecture(name, gpu, COMMON | own)


ARCHITECTURES = {
    a.name: a
    for a in (
        # Both numbers read from an H200.
        _architecture("sm_90a", "H200", (9, 0), 132, 62914560),
        # 148 SMs: B200's product data. L2 of 126 MB: NVIDIA's Blackwell tuning guide. Not measured here.
        _architecture("sm_100a", "B200", (10, 0), 148, 126 * 2**20),
        # B200's numbers: nothing was measured on a B300. They set sizes of persistent grids, nothing else.
        _architecture("sm_103a", "B300", (10, 3), 148, 126 * 2**20),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture of a name; ValueError for one that the emulator does not know."""
    if name not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    return ARCHITECTURES[name]
