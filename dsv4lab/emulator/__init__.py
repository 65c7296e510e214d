"""The launch side of a GPU in software: kernels of CuTe DSL compiled, launched and recorded without a GPU.

Compiled host code runs unmodified; each kernel it launches is caught and handed to an executor. There is no
executor that runs PTX yet. See `device`.
"""

from __future__ import annotations

from dsv4lab.emulator.driver import Device, device
from dsv4lab.emulator.errors import (
    AddressError,
    EmulatorError,
    MachineMissingError,
    UnsupportedRuntimeCall,
)
from dsv4lab.emulator.launch import Launch
from dsv4lab.emulator.modules import Module

__all__ = [
    "AddressError",
    "Device",
    "EmulatorError",
    "Launch",
    "MachineMissingError",
    "Module",
    "UnsupportedRuntimeCall",
    "device",
]
