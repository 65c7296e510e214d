"""ldmatrix and stmatrix: matrices between rows of 16 bytes in shared memory and the fragments of mma.

The table of a form says, for each byte of each lane's registers, which row it is in, row i being the 16 bytes
whose address lane i gives, and at which byte. The b8 forms agree with the thread-value layouts that CuTe has
of them, as the manual only draws theirs. Elements of 4 and 6 bits are loaded into the low bits of a byte
each; the manual does not say where the 4 bits go, but CUTLASS shifts them by 2 before mma.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4lab.emulator.errors import AddressError, at
from dsv4lab.emulator.isa.loadstore import load, store
from dsv4lab.emulator.isa.registry import Wait, instruction, unsupported
from dsv4lab.emulator.isa.warp_wide import elements, warp_wide
from dsv4lab.emulator.matrix_descriptor import split_six
from dsv4lab.emulator.ptx import Instruction

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_CARRIER = np.complex128  # 16 bytes
_PACKED = {"b4x16_p64": 4, "b6x16_p32": 6}


class Form(NamedTuple):
    """What is moved.

    Attributes:
        op: "ldmatrix" or "stmatrix".
        shape: "m8n8", "m8n16", "m16n16" or "m16n8".
        count: matrices.
        trans: whether they are transposed on the way.
        type: "b16", "b8", or the packed elements that are loaded, "b4x16_p64" or "b6x16_p32".
    """

    op: str
    shape: str
    count: int
    trans: bool
    type: str

    @property
    def rows(self) -> int:
        """Rows, and lanes that give the address of one."""
        return self.count * (16 if self.shape == "m16n16" else 8)

    @property
    def registers(self) -> int:
        """Registers of a lane."""
        return self.count * (2 if self.shape == "m16n16" else 1)


_LOADS = {("m8n8", "b16", False), ("m8n8", "b16", True), ("m16n16", "b8", True)}
_LOADS |= {("m8n16", type_, False) for type_ in _PACKED} | {("m16n16", type_, True) for type_ in _PACKED}
_STORES = {("m8n8", "b16", False), ("m8n8", "b16", True), ("m16n8", "b8", True)}


def form_of(ins: Instruction) -> Form:
    """The form of an ldmatrix or stmatrix. Raises UnsupportedInstruction."""
    modifiers = ins.modifiers
    count = next((int(m[1:]) for m in modifiers if m in ("x1", "x2", "x4")), 0)
    shape = next((m for m in modifiers if m[0] == "m" and m[1:2].isdigit()), "")
    form = Form(ins.op, shape, count, "trans" in modifiers, modifiers[-1])
    known = _LOADS if ins.op == "ldmatrix" else _STORES
    packed = "b8x16" in modifiers
    if not count or (shape, form.type, form.trans) not in known or packed != (form.type in _PACKED):
        raise unsupported(ins)
    if form.rows > 32:
        raise unsupported(ins, f"{count} matrices of {shape}")
    return form


@lru_cache
def table(form: Form) -> np.ndarray:
    """Places in 32 rows of 16 bytes, row * 16 + byte, of the bytes of registers: (registers, 32, 4)."""
    matrix = np.arange(form.count)[:, None, None]
    group, within = np.divmod(np.arange(32), 4)
    group, within, byte = group[None, :, None], within[None, :, None], np.arange(4)[None, None, :]
    if form.shape == "m16n16":
        half = np.arange(2)[None, :, None, None]
        row = matrix[:, None] * 16 + 4 * within[:, None] + byte[:, None]
        return (row * 16 + group[:, None] + 8 * half).reshape(-1, 32, 4)
    if form.shape == "m16n8":
        return (matrix * 8 + 2 * within + byte % 2) * 16 + group + byte // 2 * 8
    if form.trans:
        return (matrix * 8 + 2 * within + byte // 2) * 16 + 2 * group + byte % 2
    return (matrix * 8 + group) * 16 + 4 * within + byte


@instruction("ldmatrix")
def ldmatrix(ins: Instruction) -> Wait:
    """ldmatrix.sync.aligned.shape.num{.trans}{.shared}.type {d, ...}, [address]."""
    form, space = form_of(ins), _space(ins)
    places = table(form)
    writes = elements(ins.operands[0], "u32")
    if len(writes) != form.registers:
        raise unsupported(ins, f"{len(writes)} destinations for {form.registers} registers")

    def core(batch: Batch, mask: np.ndarray, address: np.ndarray) -> tuple[np.ndarray, ...]:
        mask = mask & (np.arange(32) < form.rows)
        _check_aligned(mask, address)
        rows = _rows(batch, mask, space, address, form.type)
        registers = rows.reshape(len(batch), 512).take(places, axis=1).view(np.uint32)[..., 0]
        _count(batch, "load", mask, form)
        return tuple(registers[:, i] for i in range(form.registers))

    return _noted(warp_wide(ins, core, ((ins.operands[1], "address"),), writes), form)


def _rows(batch: Batch, mask: np.ndarray, space: str, address: np.ndarray, type_: str) -> np.ndarray:
    """The row of each lane, (n, 32, 16) bytes; packed elements as a byte each. Padding is not read."""
    bits = _PACKED.get(type_)
    if bits is None:
        return _octets(load(batch, mask, space, address, 16))
    low = _octets(load(batch, mask, space, address, 8))
    if bits == 4:
        return np.stack([low & 15, low >> 4], axis=-1).reshape(*mask.shape, 16)
    return split_six(np.concatenate([low, _octets(load(batch, mask, space, address + 8, 4))], axis=-1))


def _octets(values: np.ndarray) -> np.ndarray:
    """The bytes (n, 32, size) of values (n, 32)."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, -1)


@instruction("stmatrix")
def stmatrix(ins: Instruction) -> Wait:
    """stmatrix.sync.aligned.shape.num{.trans}{.shared}.type [address], {a, ...}."""
    form, space = form_of(ins), _space(ins)
    # Each byte of a row comes from one byte of a register: the inverse of the table.
    places = np.argsort(table(form), axis=None)
    sources = elements(ins.operands[1], "u32")
    if len(sources) != form.registers:
        raise unsupported(ins, f"{len(sources)} sources for {form.registers} registers")

    def core(batch: Batch, mask: np.ndarray, address: np.ndarray, *registers: np.ndarray) -> None:
        mask = mask & (np.arange(32) < form.rows)
        _check_aligned(mask, address)
        octets = np.stack(registers, axis=1).view(np.uint8).reshape(len(batch), -1)
        rows = np.zeros((len(batch), 32), _CARRIER)
        rows[:, : form.rows] = octets.take(places, axis=1).view(_CARRIER)
        store(batch, mask, space, address, rows, 16)
        _count(batch, "store", mask, form)

    return _noted(warp_wide(ins, core, ((ins.operands[0], "address"), *sources)), form)


def _space(ins: Instruction) -> str:
    return "shared" if any(m.partition("::")[0] == "shared" for m in ins.modifiers) else "generic"


def _noted(action: Wait, form: Form) -> Wait:
    """Note how finely shared memory is accessed, for the race checker."""
    action.function.shared_bytes = 4 if form.type == "b6x16_p32" else 8 if form.type == "b4x16_p64" else 16
    return action


def _check_aligned(mask: np.ndarray, address: np.ndarray) -> None:
    wrong = mask & (address & 15 != 0)
    if wrong.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
        what = f"the row of a matrix at address {int(address[row, lane]):#x} is not aligned to 16 bytes"
        raise at(AddressError(what), row, lane)


def _count(batch: Batch, kind: str, mask: np.ndarray, form: Form) -> None:
    nbytes = 2 * _PACKED.get(form.type, 8)
    batch.machine.counters[f"shared.{kind}_bytes"] += int(np.count_nonzero(mask)) * nbytes
