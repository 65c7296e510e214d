"""mma.sync: D = A B + C of one warp, all operands in registers.

f16, bf16, tf32, FP8 and 8-bit integers, in every shape with 8 columns that has them. Not emulated: f64, 4-bit
and 1-bit types, m8n8k4, sparse and block-scaled forms (sm_120).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4lab.emulator.isa.fragments import accumulator_of, registers_of, rows_of
from dsv4lab.emulator.isa.registry import Wait, instruction, unsupported
from dsv4lab.emulator.isa.warp_wide import elements, warp_wide
from dsv4lab.emulator.ptx import Instruction
from dsv4lab.emulator.tensor_core import dot, dot_integer

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

# Kind of arithmetic and bits of the types of A and B.
_TYPES = {
    "f16": ("f16", 16), "bf16": ("f16", 16), "tf32": ("tf32", 32), "e4m3": ("f8f6f4", 8),
    "e5m2": ("f8f6f4", 8), "s8": ("i8", 8), "u8": ("i8", 8),
}  # fmt: skip
_SHAPES = {
    "f16": ("m16n8k8", "m16n8k16"),
    "tf32": ("m16n8k4", "m16n8k8"),
    "f8f6f4": ("m16n8k16", "m16n8k32"),
    "i8": ("m8n8k16", "m16n8k16", "m16n8k32"),
}
_ACCUMULATORS = {
    "f16": ("f32", "f16"), "bf16": ("f32",), "tf32": ("f32",), "e4m3": ("f32", "f16"), "e5m2": ("f32", "f16"),
    "s8": ("s32",), "u8": ("s32",),
}  # fmt: skip
_DTYPES = {"f32": np.float32, "f16": np.float16, "s32": np.int32}


class Form(NamedTuple):
    """Shape and types: rows (16 or 8), depth K, kind of arithmetic, types of A and B, of the accumulator."""

    m: int
    k: int
    kind: str
    a: str
    b: str
    accumulator: str
    saturate: bool


def _form(ins: Instruction) -> Form:
    if len(ins.modifiers) < 5 or ins.modifiers[:2] != ("sync", "aligned"):
        raise unsupported(ins)
    *rest, d, a, b, c = ins.modifiers[2:]
    layout = [m for m in rest if m in ("row", "col")]
    shape, *others = [m for m in rest if m not in ("row", "col", "satfinite")]
    if others or layout != ["row", "col"] or a not in _TYPES or b not in _TYPES:
        raise unsupported(ins)
    (kind, bits), (other, _) = _TYPES[a], _TYPES[b]
    if kind != other or (bits > 8 and a != b) or shape not in _SHAPES[kind]:
        raise unsupported(ins)
    if d != c or d not in _ACCUMULATORS[a] or ("satfinite" in rest and kind != "i8"):
        raise unsupported(ins, f"accumulators of {d} and {c}")
    m, k = shape[1:].split("n8k")
    return Form(int(m), int(k), kind, a, b, d, "satfinite" in rest)


@instruction("mma")
def mma(ins: Instruction) -> Wait:
    """mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype d, a, b, c."""
    form = _form(ins)
    bits, tall = _TYPES[form.a][1], form.m // 8
    d, a, b, c = (elements(operand, "u32") for operand in ins.operands)
    across = 4 * 32 // bits  # columns that a register covers
    counts = (tall * (2 if form.accumulator != "f16" else 1), tall * form.k // across, form.k // across)
    if (len(d), len(a), len(b), len(c)) != (*counts, counts[0]):
        raise unsupported(ins, f"its operands have {len(d)}, {len(a)}, {len(b)} and {len(c)} registers")

    def core(batch: Batch, mask: np.ndarray, *registers: np.ndarray) -> tuple[np.ndarray, ...]:
        left = rows_of(registers[: len(a)], form.a, tall)
        right = rows_of(registers[len(a) : -len(c)], form.b, 1)
        total = accumulator_of(registers[-len(c) :], _DTYPES[form.accumulator], tall)
        _count(batch, mask, form)
        machine = batch.machine
        product = _multiply(left, right, total, form, machine.mma_mode, machine.arch.name)
        return registers_of(product, tall)

    return warp_wide(ins, core, (*a, *b, *c), d)


def _multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, form: Form, mode: str, arch: str) -> np.ndarray:
    if form.kind == "i8":
        return dot_integer(a, b, c, saturate=form.saturate)
    kind = "mma_fp8_sm90" if form.kind == "f8f6f4" and arch == "sm_90a" else form.kind
    return dot(a, b, c, kind=kind, types=(form.a, form.b), mode=mode, accumulator=form.accumulator)


def _count(batch: Batch, mask: np.ndarray, form: Form) -> None:
    warps = int(np.count_nonzero(mask[:, 0]))
    batch.machine.counters[f"mma.{form.kind}"] += warps
    batch.machine.counters["mma.flops"] += warps * 2 * form.m * 8 * form.k
