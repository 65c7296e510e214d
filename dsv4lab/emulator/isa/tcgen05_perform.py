"""tcgen05.mma as it is performed: operands from their memories, D = A B^T + D, D to tensor memory.

Of two CTAs each has half of A's rows and half of B's columns in its shared memory, and half of the
accumulator's rows in its tensor memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.instruction_descriptor import InstructionDescriptor
from dsv4lab.emulator.isa.tcgen05_layouts import Block, accumulator
from dsv4lab.emulator.isa.tcgen05_operands import (
    Matrix,
    accumulated,
    from_shared,
    from_tensor,
    kept,
    scale_values,
    to_cells,
)
from dsv4lab.emulator.tensor_core import dot, dot_integer
from dsv4lab.emulator.tensor_memory import TensorMemory

if TYPE_CHECKING:
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine

_ACCUMULATORS = {"f16": np.float16, "f32": np.float32, "s32": np.int32}


@dataclass(frozen=True, slots=True)
class Form:
    """What an MMA's text says.

    Attributes:
        kind: of instruction_descriptor.KINDS.
        group: CTAs that take part.
        a_in_tensor: A is in tensor memory.
        block: values along K that share a scale; 0 for a kind without scales.
        masked: it has a mask of lanes that are not written.
        shift: D is multiplied by 2**-shift first.
    """

    kind: str
    group: int
    a_in_tensor: bool
    block: int
    masked: bool
    shift: int


@dataclass(frozen=True, slots=True)
class Work:
    """An MMA that was issued.

    Attributes:
        form, descriptor: what it is.
        ctas: the CTA, or both of the pair.
        d: address of the accumulator.
        a: where it is in shared memory, or its column in tensor memory.
        b: where it is in shared memory.
        scales: columns of the scales of A and B.
        accumulate: D is read too.
        disabled: bool (ctas, 128), lanes that are not written; or None.
        by: token of its accesses.
    """

    form: Form
    descriptor: InstructionDescriptor
    ctas: tuple[int, ...]
    d: int
    a: Matrix | int
    b: Matrix
    scales: tuple[int, ...]
    accumulate: bool
    disabled: np.ndarray | None
    by: Access | None


def perform(machine: Machine, work: Work) -> None:
    """Do an MMA. Raises what its memories refuse."""
    descriptor, count = work.descriptor, len(work.ctas)
    parts = [
        from_shared(machine, cta, work.b, descriptor.n // count, descriptor, "b", work.by)
        for cta in work.ctas
    ]
    b = np.concatenate(parts) if count > 1 else parts[0]
    tensor = machine.state(TensorMemory)
    for place, cta in enumerate(work.ctas):
        a = None
        if not work.form.a_in_tensor:
            a = from_shared(machine, cta, work.a, descriptor.m // count, descriptor, "a", work.by)
        for block in accumulator(descriptor.m, descriptor.n, count, work.d >> 16):
            rows = from_tensor(tensor, cta, block.lanes, work.a, descriptor, work.by) if a is None else a
            found = _product(machine.mma_mode, tensor, work, cta, block, rows, b)
            lanes, written = kept(block, None if work.disabled is None else work.disabled[place])
            tensor.write(cta, lanes, work.d & 0xFFFF, to_cells(found[written]), work.by)


def _product(
    mode: str, tensor: TensorMemory, work: Work, cta: int, block: Block, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """A block of the new accumulator."""
    descriptor, b = work.descriptor, b[slice(*block.columns)]
    shape, parts = (len(a), len(b)), _parts(len(a), len(b), descriptor.k)
    c = _accumulator(tensor, work, cta, block, shape)
    c, b = c.reshape(len(a), parts, -1).swapaxes(0, 1), b.reshape(parts, -1, descriptor.k)
    if descriptor.kind == "i8":
        found = dot_integer(a, b, c, saturate=descriptor.saturate)
    else:
        scaled = _scales(tensor, work, cta, block, shape) if work.form.block else {}
        if scaled:
            scaled["scales_b"] = scaled["scales_b"].reshape(parts, b.shape[1], -1)
        found = dot(
            a, b, c, kind=descriptor.kind, types=descriptor.types, mode=mode,
            accumulator=descriptor.d, **scaled,
        )  # fmt: skip
    return found.swapaxes(0, 1).reshape(shape)


@cache
def _parts(m: int, n: int, k: int) -> int:
    """Parts of N that are multiplied one by one, so small that BLAS does not start threads for them.

    It does beyond 2**18 multiply-adds, gains nothing by it at these sizes, and loses much on busy cores.
    """
    return next(parts for parts in range(1, n + 1) if n % parts == 0 and m * n * k <= parts << 18)


def _scales(
    tensor: TensorMemory, work: Work, cta: int, block: Block, shape: tuple[int, int]
) -> dict[str, np.ndarray | str]:
    """The scales that go with a block, as `dot` takes them."""
    descriptor = work.descriptor
    count = descriptor.k // work.form.block
    found = {"scale_type": descriptor.scale}
    for side, column, rows in zip("ab", work.scales, shape, strict=True):
        found[f"scales_{side}"] = scale_values(
            tensor, cta, column, rows, block.partitions, descriptor, side, count, work.by
        )
    return found


def _accumulator(
    tensor: TensorMemory, work: Work, cta: int, block: Block, shape: tuple[int, int]
) -> np.ndarray:
    """C of a block: what its cells hold, or zeros."""
    type_ = work.descriptor.d
    if not work.accumulate:
        return np.zeros(shape, _ACCUMULATORS[type_])
    c = accumulated(tensor.read(cta, block.lanes, work.d & 0xFFFF, shape[1], work.by), type_)
    # float64 holds it exactly, down to below the subnormals of fp32.
    return np.ldexp(c.astype(np.float64), -work.form.shift) if work.form.shift else c
