"""wgmma of sm_90a: fence, commit_group, wait_group and mma_async, D = A B + D of four warps.

A product is computed when its four warps have issued it, and the registers of D have it at once: a kernel
that reads them before it has waited is not found out, unless it never waits. To the race checker the reads of
shared memory are an asynchronous operation of each of the four warps: of its 16 rows of A, which other warps
need not know of before, and of all of B. Whichever warp waits knows that all four are complete. Not emulated:
sparse and 1-bit forms.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4lab.emulator.errors import at
from dsv4lab.emulator.isa.fragments import accumulator_of, registers_of, rows_of
from dsv4lab.emulator.isa.registry import Effect, Wait, instruction, unsupported
from dsv4lab.emulator.isa.warp_wide import elements, warp_wide
from dsv4lab.emulator.matrix_descriptor import decode_wgmma, read_matrix
from dsv4lab.emulator.ptx import Immediate, Instruction, Vector
from dsv4lab.emulator.tensor_core import dot, dot_integer
from dsv4lab.emulator.warpgroups import WARPS, Tokens, WarpgroupError, Warpgroups

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.machine import Machine

# Kind of arithmetic for counters, that of tensor_core, K, accumulators.
_TYPES = {
    "f16": ("f16", "f16", 16, ("f32", "f16")), "bf16": ("f16", "f16", 16, ("f32",)),
    "tf32": ("tf32", "tf32", 8, ("f32",)), "e4m3": ("f8f6f4", "wgmma_fp8", 32, ("f32", "f16")),
    "e5m2": ("f8f6f4", "wgmma_fp8", 32, ("f32", "f16")), "s8": ("i8", "", 32, ("s32",)),
    "u8": ("i8", "", 32, ("s32",)),
}  # fmt: skip
_DTYPES = {"f32": np.float32, "f16": np.float16, "s32": np.int32}
M = 64


class Form(NamedTuple):
    """One mma_async: N, K, types of A, B and D, where A is, signs and major-ness."""

    n: int
    k: int
    a: str
    b: str
    accumulator: str
    saturate: bool
    in_registers: bool
    negate_a: bool = False
    negate_b: bool = False
    major_a: str = "K"
    major_b: str = "K"


@instruction("wgmma")
def wgmma(ins: Instruction) -> Effect:
    """All wgmma instructions."""
    kind, *rest = ins.modifiers
    if kind == "mma_async" and rest[:2] == ["sync", "aligned"]:
        return _mma_async(ins)
    if rest != ["sync", "aligned"]:
        raise unsupported(ins)
    if kind == "fence":
        return warp_wide(ins, _fence, ())
    if kind == "commit_group":
        return warp_wide(ins, _commit, ())
    if kind == "wait_group":
        return warp_wide(ins, partial(_wait, ins, ins.operands[0].value), ())
    raise unsupported(ins)


def _fence(batch: Batch, mask: np.ndarray) -> None:
    batch.machine.state(Warpgroups).fenced[batch.warps[mask[:, 0]]] = True


def _commit(batch: Batch, mask: np.ndarray) -> None:
    for warp in batch.warps[mask[:, 0]].tolist():
        batch.machine.state(Warpgroups).commit(warp)


def _wait(ins: Instruction, pending: int, batch: Batch, mask: np.ndarray) -> None:
    machine = batch.machine
    for warp in batch.warps[mask[:, 0]].tolist():
        start, end = int(machine.time[warp]), machine.state(Warpgroups).wait(warp, pending)
        machine.counters["wgmma.waits"] += 1
        if end > start:
            machine.time[warp] = end
            if machine.trace is not None:
                cta, inside = divmod(warp, machine.warps_per_cta)
                machine.trace.add("wait", cta, inside, start, end, ins.line, ins.text.strip())


# mma_async -------------------------------------------------------------------------------------------------


def _form(ins: Instruction) -> Form:
    shape, *rest = ins.modifiers[3:]
    saturate = "satfinite" in rest
    types = [m for m in rest if m != "satfinite"]
    if not shape.startswith("m64n") or len(types) != 3 or types[1] not in _TYPES or types[2] not in _TYPES:
        raise unsupported(ins)
    n, k = map(int, shape.removeprefix("m64n").split("k"))
    d, a, b = types
    kind, _, depth, accumulators = _TYPES[a]
    sizes = range(8, 257, 8) if kind != "i8" else (8, 16, 24, *range(32, 257, 16))
    if (
        kind != _TYPES[b][0]
        or (depth < 32 and a != b)
        or k != depth
        or n not in sizes
        or d not in accumulators
    ):
        raise unsupported(ins)
    in_registers = isinstance(ins.operands[1], Vector)
    values = [operand.value for operand in ins.operands[4:] if isinstance(operand, Immediate)]
    expected = 0 if kind == "i8" else 2 if depth != 16 else 3 if in_registers else 4
    if len(values) != expected or len(ins.operands) != 4 + expected or (saturate and kind != "i8"):
        raise unsupported(ins, "its operands are of no known form")
    signs, majors = values[:2], [("K", "MN")[value] for value in values[2:]]
    if any(sign not in (1, -1) for sign in signs):
        raise unsupported(ins, f"it scales by {signs}")
    negated = [sign == -1 for sign in signs] or [False, False]
    majors = ["K"] * (2 - len(majors)) + majors
    return Form(n, k, a, b, d, saturate, in_registers, *negated, *majors)


def _mma_async(ins: Instruction) -> Wait:
    """d, a or a-desc, b-desc, scale-d{, imm-scale-a, imm-scale-b{{, imm-trans-a}, imm-trans-b}}."""
    form = _form(ins)
    d, a = elements(ins.operands[0], "u32"), elements(ins.operands[1], "u32" if form.in_registers else "u64")
    count = form.n // (4 if form.accumulator == "f16" else 2)
    if len(d) != count or (form.in_registers and len(a) != 4):
        raise unsupported(ins, f"D has {len(d)} registers")

    def core(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
        registers, left, (right, scale) = values[:count], values[count:-2], values[-2:]
        common = (scale, right) if form.in_registers else (scale, right, *left)
        same = _uniform(mask, common, ins)
        begin = partial(_begin, batch.machine, form)
        groups = batch.machine.state(Warpgroups).gather(batch, np.flatnonzero(mask[:, 0]), same, ins, begin)
        if not groups:
            return registers
        total = accumulator_of(registers, _DTYPES[form.accumulator])
        if form.in_registers:
            left = rows_of(left, form.a, 2)
        for first, (rows, operands) in groups.items():
            if form.in_registers:
                operands = -left[rows] if form.negate_a else left[rows], operands[1]
            else:
                a = operands[0].reshape(WARPS, 16, -1)
                operands = a[batch.warps[rows] - first], operands[1]
            _compute(batch, form, first, rows, operands, total, same[rows[0]][0], ins)
        return registers_of(total)

    reads = (*d, *a, (ins.operands[2], "u64"), (ins.operands[3], "pred"))
    return warp_wide(ins, core, reads, d)


def _uniform(mask: np.ndarray, values: tuple[np.ndarray, ...], ins: Instruction) -> list[tuple[int, ...]]:
    """For each row the values of its lanes, which must agree."""
    for value in values:
        differ = mask & (value != value[:, :1])
        if differ.any():
            row = int(np.nonzero(differ)[0][0])
            what = f"the lanes of a warp do not agree on the operands of {ins.opcode}"
            raise at(WarpgroupError(what), row)
    return list(zip(*(value[:, 0].tolist() for value in values), strict=True))


def _begin(
    machine: Machine, form: Form, first: int, same: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray]:
    """Read A (64, K), unless it is in registers, and B (N, K) of an operation that four warps issue now."""
    tokens, cta = machine.state(Warpgroups).issue(first), first // machine.warps_per_cta
    _, *descriptors = same
    b = _operand(machine, cta, descriptors[0], form, "b", tokens)
    return None if form.in_registers else _operand(machine, cta, descriptors[1], form, "a", tokens), b


def _compute(
    batch: Batch,
    form: Form,
    first: int,
    rows: list[int],
    operands: tuple[np.ndarray, np.ndarray],
    total: np.ndarray,
    accumulate: int,
    ins: Instruction,
) -> None:
    """Add the product of rows of a warpgroup to their accumulators in `total` (n, 16, N), in place."""
    a, b = operands
    c = total[rows].reshape(-1, form.n) if accumulate else None
    product = _multiply(a.reshape(-1, form.k), b, c, form, batch.machine.mma_mode)
    total[rows] = product.reshape(-1, 16, form.n)
    if first in batch.warps[rows]:
        _account(batch.machine, first, form, ins)


def _operand(machine: Machine, cta: int, bits: int, form: Form, side: str, tokens: Tokens) -> np.ndarray:
    """Values of A (64, K), of which a warp reads its 16 rows, or of B (N, K), of which each reads all."""
    major = getattr(form, f"major_{side}")

    def read(offsets: np.ndarray) -> np.ndarray:
        octets = machine.shared.read(cta, offsets, None)
        if machine.order is not None:
            axis = 0 if major == "K" else 1
            parts = np.split(offsets, WARPS, axis) if side == "a" else [offsets] * WARPS
            for part, token in zip(parts, tokens, strict=True):
                machine.order.read("shared", cta, part.reshape(-1), token)
        return octets

    rows, type_ = (M, form.a) if side == "a" else (form.n, form.b)
    values = read_matrix(read, decode_wgmma(bits), rows, form.k, type_, major)
    return -values if getattr(form, f"negate_{side}") else values


def _multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, form: Form, mode: str) -> np.ndarray:
    kind = _TYPES[form.a][1]
    if not kind:
        c = np.zeros((len(a), len(b)), np.int32) if c is None else c
        return dot_integer(a, b, c, saturate=form.saturate)
    return dot(a, b, c, kind=kind, types=(form.a, form.b), mode=mode, accumulator=form.accumulator)


def _account(machine: Machine, first: int, form: Form, ins: Instruction) -> None:
    """Counters, model time, trace of one operation of a warpgroup."""
    kind, size = _TYPES[form.a][0], M * form.n * form.k
    machine.counters[f"mma.{kind}"] += 1
    machine.counters["mma.flops"] += 2 * size
    start, end = machine.state(Warpgroups).occupy(first, kind, size)
    if machine.trace is not None:
        cta, warp = divmod(first, machine.warps_per_cta)
        text = f"{form.a} {M} x {form.n} x {form.k}"
        machine.trace.add("mma", cta, warp, start, end, ins.line, text, m=M, n=form.n, k=form.k)
