"""The variables of a module in global and constant memory: strings, tables, counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4lab.emulator.errors import EmulatorError
from dsv4lab.emulator.modules import Module

if TYPE_CHECKING:
    from dsv4lab.emulator.driver import Device


def allocate(module: Module, device: Device) -> dict[str, int]:
    """Give each variable memory of the device, with its first value; returns the addresses by name."""
    parsed = module.parsed
    variables = [v for v in parsed.globals if v.space in ("global", "const")]
    variables += [v for f in parsed.functions for v in f.variables if v.space in ("global", "const")]
    tensors = {}
    for variable in variables:
        if variable.linkage == "extern":
            raise EmulatorError(f"{module.name}: the variable {variable.name} is defined nowhere")
        tensor = device.empty((max(variable.size, 1),), torch.uint8, name=variable.name)
        tensor.zero_()
        if variable.initializer:
            tensor[: len(variable.initializer)] = torch.frombuffer(
                bytearray(variable.initializer), dtype=torch.uint8
            )
        tensors[variable.name] = tensor
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for variable in variables:
        for relocation in variable.relocations:
            if relocation.symbol not in addresses:
                raise EmulatorError(
                    f"{variable.name} holds the address of {relocation.symbol}, which has none"
                )
            value = addresses[relocation.symbol] + relocation.addend
            octets = value.to_bytes(8, "little")[: relocation.size]
            end = relocation.offset + relocation.size
            tensors[variable.name][relocation.offset : end] = torch.frombuffer(
                bytearray(octets), dtype=torch.uint8
            )
    return addresses
