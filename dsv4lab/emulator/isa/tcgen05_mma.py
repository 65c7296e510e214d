"""tcgen05.mma as it is issued, by one thread: its form, its checks, its model time.

Collector hints are ignored. Not emulated: .sp, .ws, .ashift.

Model time, for the timeline only: a tensor core does so many multiply-adds a cycle; 16384 of FP4 are B200's 9
PFLOPS dense with 148 SMs at 1.85 GHz. M = 64 takes as long as M = 128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.errors import EmulatorError, at
from dsv4lab.emulator.instruction_descriptor import KINDS, InstructionDescriptor, decode
from dsv4lab.emulator.isa.registry import Action, Effect, unsupported
from dsv4lab.emulator.isa.tcgen05_operands import matrix
from dsv4lab.emulator.isa.tcgen05_perform import Form, Work, perform
from dsv4lab.emulator.isa.tcgen05_pipe import TensorPipes, cta_group
from dsv4lab.emulator.matrix_descriptor import DescriptorError
from dsv4lab.emulator.ptx import Immediate, Instruction, Memory, Vector
from dsv4lab.emulator.tensor_memory import TensorMemoryError

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

MULTIPLY_ADDS_PER_CYCLE = {
    "tf32": 2048,
    "f16": 4096,
    "i8": 8192,
    "f8f6f4": 8192,
    "mxf8f6f4": 8192,
    "mxf4": 16384,
    "mxf4nvf4": 16384,
}
# Values along K that share a scale.
_BLOCKS = {
    ("mxf8f6f4", "scale_vec::1X"): 32,
    ("mxf8f6f4", "block32"): 32,
    ("mxf8f6f4", None): 32,
    ("mxf4", "scale_vec::2X"): 32,
    ("mxf4", "block32"): 32,
    ("mxf4", None): 32,
    ("mxf4nvf4", "scale_vec::2X"): 32,
    ("mxf4nvf4", "block32"): 32,
    ("mxf4nvf4", "scale_vec::4X"): 16,
    ("mxf4nvf4", "block16"): 16,
}
_NOT_EMULATED = ("sp", "ws", "ashift")


def mma(ins: Instruction) -> Action:
    """tcgen05.mma [d], a, b, descriptor{, [scales], [scales]}{, {mask}}, accumulate{, shift}."""
    form, (d, a, b, descriptor, *rest) = _form(ins), ins.operands
    # A constant may stand for the predicate too.
    if len(rest) > 1 + 2 * (form.block > 0) + form.masked:
        rest.pop()
    *extra, accumulate = rest
    if form.masked:
        extra = extra[0].elements
    reads = [(d, "address"), (a, "address" if form.a_in_tensor else "b64"), (b, "b64"), (descriptor, "b32")]
    reads += [(accumulate, "pred"), *((operand, "u32" if form.masked else "address") for operand in extra)]

    def function(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> None:
        for row, lane in batch.lanes(mask):
            try:
                _issue(batch, row, form, [int(value[row, lane]) for value in values], ins)
            except EmulatorError as error:
                raise at(error, row, lane) from None

    return Effect(function, reads=tuple(reads))


def _form(ins: Instruction) -> Form:
    kind = next((m.removeprefix("kind::") for m in ins.modifiers if m.startswith("kind::")), None)
    group = cta_group(ins)
    if kind not in KINDS or any(m in ins.modifiers for m in _NOT_EMULATED):
        raise unsupported(ins)
    vector = next((m for m in ins.modifiers if m.startswith(("scale_vec", "block1", "block3"))), None)
    scaled = kind.startswith("mx")
    if scaled != ("block_scale" in ins.modifiers) or (scaled and (kind, vector) not in _BLOCKS):
        raise unsupported(ins, "these scales do not go with its kind")
    masked = any(isinstance(operand, Vector) for operand in ins.operands)
    last = ins.operands[-1]
    shifted = isinstance(last, Immediate) and len(ins.operands) > 5 + 2 * scaled + masked
    if len(ins.operands) != 5 + 2 * scaled + masked + shifted or (shifted and kind not in ("f16", "tf32")):
        raise unsupported(ins, "its operands are of no known form")
    if masked and len(ins.operands[4]) != 4 * group:
        raise unsupported(ins, f"its lane mask must have {4 * group} words")
    shift = int(last.value) if shifted else 0
    if not 0 <= shift <= 15:
        raise unsupported(ins, f"it scales D by {shift}, and 0 to 15 is possible")
    block = _BLOCKS[kind, vector] if scaled else 0
    return Form(kind, group, isinstance(ins.operands[1], Memory), block, masked, shift)


def _issue(batch: Batch, row: int, form: Form, values: list[int], ins: Instruction) -> None:
    machine, warp = batch.machine, int(batch.warps[row])
    pipes = machine.state(TensorPipes)
    ctas = pipes.use(int(batch.ctas[row]), form.group)
    d, a, b, bits, accumulate, *extra = values
    descriptor = decode(bits, form.kind, form.group)
    _check_scales(descriptor, form)
    if descriptor.k == 96 and not machine.arch.name.startswith("sm_103"):
        raise unsupported(ins, f"{machine.arch.name} has no MMA with K = 96, which sm_103a has")
    _check_lane(d, descriptor, "D", form.group)
    if form.a_in_tensor:
        _check_lane(a, descriptor, "A", form.group, d >> 16)
    place_a = a & 0xFFFF if form.a_in_tensor else matrix(a, descriptor)
    scales = () if form.masked else tuple(_scale_column(address) for address in extra)
    work = Work(
        form, descriptor, ctas, d, place_a, matrix(b, descriptor), scales, bool(accumulate),
        _disabled(extra) if form.masked else None, pipes.access(warp),
    )  # fmt: skip
    _account(batch, row, work, ins)
    pipes.later(ctas, lambda: perform(machine, work), warp)


def _account(batch: Batch, row: int, work: Work, ins: Instruction) -> None:
    """Counters, model time, trace."""
    machine, warp, form, descriptor = batch.machine, int(batch.warps[row]), work.form, work.descriptor
    m, n, k = descriptor.m, descriptor.n, descriptor.k
    machine.counters[f"mma.{form.kind}"] += 1
    machine.counters["mma.flops"] += 2 * m * n * k
    cycles = -(-max(m // form.group, 128) * n * k // MULTIPLY_ADDS_PER_CYCLE[form.kind])
    start, end = machine.state(TensorPipes).occupy(work.ctas, warp, cycles)
    if machine.trace is not None:
        column, place = work.d & 0xFFFF, warp % machine.warps_per_cta
        text = f"{form.kind} {m} x {n} x {k} to column {column}"
        cta = int(batch.ctas[row])
        machine.trace.add("mma", cta, place, start, end, ins.line, text, m=m, n=n, k=k, column=column)


def _check_scales(descriptor: InstructionDescriptor, form: Form) -> None:
    ids = descriptor.scale_id_a, descriptor.scale_id_b
    if form.block == 32 and descriptor.scale == "ue4m3":
        raise DescriptorError("scales of type ue4m3 go with blocks of 16 values, not 32")
    # A cell holds four scales: those of 16 values fill it, with K = 96 one and a half.
    step = {(16, 64): 4, (16, 96): 2, (32, 64): 2}.get((form.block, descriptor.k), 1)
    if any(i % step for i in ids):
        raise DescriptorError(
            f"the scale ids {ids} of an MMA with K = {descriptor.k} and blocks of {form.block}: they must be "
            + ("0" if step == 4 else "0 or 2")
        )


def _check_lane(
    address: int, descriptor: InstructionDescriptor, name: str, group: int, other: int | None = None
) -> None:
    half = descriptor.m == 64 and group == 1
    lane = address >> 16
    if lane not in ((0, 16) if half else (0,)) or other not in (None, lane):
        raise TensorMemoryError(
            f"{name} of an MMA with M = {descriptor.m} at lane {lane} of tensor memory: it must be at lane 0"
            + (" or 16, A and D at the same" if half else "")
        )


def _scale_column(address: int) -> int:
    # CuTe leaves the scale id in the two highest bits of the address.
    if address >> 16 & 0x3FFF:
        raise TensorMemoryError(f"scale factors at {address:#x} of tensor memory: they must be at lane 0")
    return address & 0xFFFF


def _disabled(words: list[int]) -> np.ndarray | None:
    if not any(words):
        return None
    octets = np.array(words, np.uint32).view(np.uint8)
    return np.unpackbits(octets, bitorder="little").view(np.bool_).reshape(-1, 128)
