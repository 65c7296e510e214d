"""A GPU in software: kernels of CuTe DSL, compiled for Hopper and Blackwell, run on the CPU.

Compiled host code runs unmodified; each kernel it launches is executed from its PTX. See `device`.
"""

from __future__ import annotations

from dsv4lab.emulator.driver import Device, current_device, device
from dsv4lab.emulator.errors import (
    AddressError,
    DeadlockError,
    EmulatorError,
    InstructionLimitError,
    KernelTrap,
    UninitialisedError,
    UnsupportedRuntimeCall,
)
from dsv4lab.emulator.isa.registry import UnsupportedInstruction
from dsv4lab.emulator.launch import Launch
from dsv4lab.emulator.modules import Module

__all__ = [
    "AddressError",
    "DeadlockError",
    "Device",
    "EmulatorError",
    "InstructionLimitError",
    "KernelTrap",
    "Launch",
    "Module",
    "UninitialisedError",
    "UnsupportedInstruction",
    "UnsupportedRuntimeCall",
    "current_device",
    "device",
]
