"""tcgen05.cp: from shared memory, through a matrix descriptor, to tensor memory.

Each CTA of the group copies from its own shared memory to its own tensor memory. A row goes to the lane of
its number, counted from the address; 4x256b, which PTX does not spell out, to that lane of each quarter, as
CuTe models it. Of compressed 16-byte chunks only the bytes that hold elements are read.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.isa.registry import Action, Effect, unsupported
from dsv4lab.emulator.isa.tcgen05_pipe import TensorPipes, cta_group
from dsv4lab.emulator.matrix_descriptor import CHUNK, chunk_offsets, decode_tcgen05
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.tensor_memory import LANES, TensorMemory, TensorMemoryError

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

# Rows, bytes of a row, and what goes with the shape.
_SHAPES = {
    ("128x256b", None): (128, 32),
    ("4x256b", None): (4, 32),
    ("128x128b", None): (128, 16),
    ("64x128b", "warpx2::02_13"): (64, 16),
    ("64x128b", "warpx2::01_23"): (64, 16),
    ("32x128b", "warpx4"): (32, 16),
}
# Bytes that hold the 16 elements of a chunk.
_COMPRESSED = {"b6x16_p32": 12, "b4x16_p64": 8}
# Model: shared memory gives 128 bytes a cycle.
_BYTES_PER_CYCLE = 128


class Form(NamedTuple):
    """Form of a copy: rows and bytes of the source, how it is spread over lanes, how it is compressed."""

    rows: int
    nbytes: int
    spread: str | None
    source: str | None


def copy(ins: Instruction) -> Action:
    """tcgen05.cp [address], matrix descriptor."""
    group = cta_group(ins)
    form = _form(ins)
    address, matrix = ins.operands

    def function(batch: Batch, mask: np.ndarray, addresses: np.ndarray, matrices: np.ndarray) -> None:
        for row, lane in batch.lanes(mask):
            try:
                _issue(batch, row, form, group, int(addresses[row, lane]), int(matrices[row, lane]), ins)
            except EmulatorError as error:
                raise at(error, row, lane) from None

    return Effect(function, reads=((address, "address"), (matrix, "b64")))


def _form(ins: Instruction) -> Form:
    shape = next((m for m in ins.modifiers if m.endswith("b") and "x" in m), None)
    spread = next((m for m in ins.modifiers if m.startswith("warpx")), None)
    source = next((m for m in ins.modifiers if m in _COMPRESSED), None)
    if (shape, spread) not in _SHAPES or ("b8x16" in ins.modifiers) != (source is not None):
        raise unsupported(ins)
    return Form(*_SHAPES[shape, spread], "4x256b" if shape == "4x256b" else spread, source)


def _issue(
    batch: Batch, row: int, form: Form, group: int, address: int, matrix: int, ins: Instruction
) -> None:
    machine, warp = batch.machine, int(batch.warps[row])
    pipes, tensor = machine.state(TensorPipes), machine.state(TensorMemory)
    ctas = pipes.use(int(batch.ctas[row]), group)
    lane, column = address >> 16, address & 0xFFFF
    if lane and (form.spread != "4x256b" or lane >= 32):
        raise TensorMemoryError(f"tcgen05.cp to lane {lane} of tensor memory, where this shape cannot begin")
    descriptor = decode_tcgen05(matrix)
    offsets = chunk_offsets(descriptor, form.rows, form.nbytes // CHUNK, "K")
    by = pipes.access(warp)
    lanes, rows = _lanes(form, lane)

    def perform() -> None:
        for cta in ctas:
            data = _source(machine.shared.read, cta, offsets, form.source, by)
            tensor.write(cta, lanes, column, data.view(np.uint32)[rows], by)

    machine.counters["tcgen05.cp_bytes"] += form.rows * form.nbytes * len(ctas)
    cycles = -(-form.rows * form.nbytes // _BYTES_PER_CYCLE)
    start, end = pipes.occupy(ctas, warp, cycles)
    if machine.trace is not None:
        text = f"{form.rows} x {form.nbytes} bytes to tensor memory, column {column}"
        place = warp % machine.warps_per_cta
        machine.trace.add("cp", int(batch.ctas[row]), place, start, end, ins.line, text, column=column)
    pipes.later(ctas, perform, warp)


@cache
def _lanes(form: Form, lane: int) -> tuple[slice | np.ndarray, np.ndarray]:
    """Lanes that a copy writes, and the row of the source that each gets."""
    if form.spread == "4x256b":
        return lane + 32 * np.arange(4), np.arange(4)
    every = np.arange(LANES)
    if form.spread == "warpx2::01_23":
        return slice(0, LANES), every // 64 * 32 + every % 32
    return slice(0, LANES), every % form.rows


def _source(read, cta: int, offsets: np.ndarray, source: str | None, by) -> np.ndarray:
    """Bytes (rows, nbytes) that go to tensor memory."""
    used = _COMPRESSED.get(source, CHUNK)
    octets = read(cta, offsets[..., None] + np.arange(used), by)
    if source == "b4x16_p64":
        # An e2m1 stands in the middle of its byte.
        octets = np.stack([octets << 2 & 0x3C, octets >> 2 & 0x3C], axis=-1)
    elif source == "b6x16_p32":
        bits = np.unpackbits(octets, axis=-1, bitorder="little").reshape(*octets.shape[:-1], 16, 6)
        octets = np.packbits(bits, axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).reshape(len(offsets), -1)
