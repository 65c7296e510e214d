"""printf of kernels: the format string and its arguments in memory, as text."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import AddressError, EmulatorError
from dsv4lab.emulator.windows import LOCAL_WINDOW, SHARED_WINDOW

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_LONGEST = 4096
# Flags, width, precision, length, conversion.
_FIELD = re.compile(r"%([-+ #0]*)(\d*)(\.\d+)?(hh|h|ll|l|z|j|t)?([diouxXeEfFgGaAcsp%])")
_WIDE = ("l", "ll", "z", "j", "t")


def bytes_at(batch: Batch, row: int, lane: int, address: int, nbytes: int) -> bytes:
    """Bytes at a generic address, as one lane sees it."""
    machine = batch.machine
    if address >= LOCAL_WINDOW:
        offset = address - LOCAL_WINDOW
        return machine.local[batch.warps[row], lane, offset : offset + nbytes].tobytes()
    if address >= SHARED_WINDOW:
        _, cta, offset = machine.generic(int(batch.ctas[row]), address)
        return machine.shared.bytes[cta, offset : offset + nbytes].tobytes()
    return machine.memory.view(address, nbytes).tobytes()


def text_at(batch: Batch, row: int, lane: int, address: int) -> str:
    """A string that ends with a zero byte."""
    found = bytearray()
    while len(found) < _LONGEST:
        try:
            byte = bytes_at(batch, row, lane, address + len(found), 1)
        except AddressError as error:
            raise EmulatorError(f"a string at {address:#x} does not end: {error}") from None
        if byte == b"\0":
            return found.decode(errors="replace")
        found += byte
    raise EmulatorError(f"a string at {address:#x} is longer than {_LONGEST} bytes")


def formatted(batch: Batch, row: int, lane: int, form: str, arguments: int) -> str:
    """What printf makes of a format and of arguments packed at an address, each aligned to its size."""
    offset = 0

    def field(match: re.Match[str]) -> str:
        nonlocal offset
        flags, width, precision, length, kind = match.groups()
        if kind == "%":
            return "%"
        size = 8 if kind in "eEfFgGaAsp" or length in _WIDE else 4
        offset = -(-offset // size) * size
        raw = bytes_at(batch, row, lane, arguments + offset, size)
        offset += size
        return _field(batch, row, lane, f"%{flags}{width}{precision or ''}", kind, raw)

    return _FIELD.sub(field, form)


def _field(batch: Batch, row: int, lane: int, shape: str, kind: str, raw: bytes) -> str:
    number = int.from_bytes(raw, "little", signed=kind in "di")
    if kind in "di":
        return (shape + "d") % number
    if kind in "eEfFgG":
        return (shape + kind) % struct.unpack("<d", raw)
    if kind in "aA":
        return float(np.frombuffer(raw, "<f8")[0]).hex()
    if kind == "c":
        return (shape + "c") % (number & 0xFF)
    if kind == "s":
        return (shape + "s") % text_at(batch, row, lane, number)
    if kind == "p":
        return (shape + "s") % f"{number:#x}"
    return (shape + ("d" if kind == "u" else kind)) % number
