"""st.async and red.async to shared memory of a cluster, whose bytes an mbarrier of the same CTA counts.

Both go through the generic proxy. What the lanes of a warp send to one barrier arrives together, some time
later; a red.async is atomic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import Barriers
from dsv4lab.emulator.errors import AddressError, EmulatorError, at
from dsv4lab.emulator.isa.registry import Effect, instruction, unsupported
from dsv4lab.emulator.lane_types import DTYPES
from dsv4lab.emulator.ptx import Instruction, Operand, Vector
from dsv4lab.emulator.shared_address import locate

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch
    from dsv4lab.emulator.happens_before import Access
    from dsv4lab.emulator.machine import Machine

Place = tuple[int, int]
_Change = Callable[[np.ndarray, np.ndarray], np.ndarray]

_STORED = ("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64")
_CHANGES: dict[str, _Change] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda old, most: np.where(old >= most, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - old.dtype.type(1)),
}
_REDUCED = {(op, type_) for op in ("min", "max", "add") for type_ in ("u32", "s32")} | {
    ("inc", "u32"), ("dec", "u32"), ("add", "u64"), ("and", "b32"), ("or", "b32"), ("xor", "b32"),
}  # fmt: skip


@instruction("st.async")
def store_async(ins: Instruction) -> Effect:
    """st.async{.weak}{.shared::cluster}.mbarrier::complete_tx::bytes{.v2, .v4}.type [a], b, [mbar]."""
    *rest, type_ = [m for m in ins.modifiers if m != "async"]
    known = {"weak", "shared::cluster", "mbarrier::complete_tx::bytes", "v2", "v4"}
    if type_ not in _STORED or not known.issuperset(rest) or len(ins.operands) != 3:
        raise unsupported(ins)
    address, value, barrier = ins.operands
    elements = tuple(value) if isinstance(value, Vector) else (value,)
    return _effect(ins, address, barrier, elements, type_, None)


@instruction("red.async")
def reduce_async(ins: Instruction) -> Effect:
    """red.async{.relaxed}{.cluster}{.shared::cluster}.mbarrier::complete_tx::bytes.op.type [a], b, [mbar]."""
    *rest, op, type_ = [m for m in ins.modifiers if m != "async"]
    known = {"relaxed", "cluster", "shared::cluster", "mbarrier::complete_tx::bytes"}
    if (op, type_) not in _REDUCED or not known.issuperset(rest) or len(ins.operands) != 3:
        raise unsupported(ins)
    address, value, barrier = ins.operands
    return _effect(ins, address, barrier, (value,), type_, _CHANGES[op])


def _effect(
    ins: Instruction,
    address: Operand,
    barrier: Operand,
    elements: tuple[Operand, ...],
    type_: str,
    change: _Change | None,
) -> Effect:
    nbytes = DTYPES[type_].itemsize * len(elements)
    space = "shared::cluster" if "shared::cluster" in ins.modifiers else None

    def function(
        batch: Batch, mask: np.ndarray, addresses: np.ndarray, barriers: np.ndarray, *values: np.ndarray
    ) -> None:
        machine = batch.machine
        data = np.stack(values, -1)
        sent: dict[tuple[int, Place], list[tuple[int, np.ndarray]]] = defaultdict(list)
        for row, lane in batch.lanes(mask):
            places = (int(where[row, lane]) for where in (addresses, barriers))
            try:
                target, signal = (locate(machine, int(batch.ctas[row]), place, space) for place in places)
                _check(target, signal, nbytes, machine)
            except EmulatorError as error:
                at(error, row, lane)
                raise
            sent[int(batch.warps[row]), signal].append((target[1], data[row, lane]))
        for (warp, signal), stores in sent.items():
            access = machine.access_async(warp, ("mbarrier", *signal), proxy="generic")
            time = int(machine.time[warp])
            arrive = partial(_arrive, machine, signal, stores, change, access, time)
            machine.later(("st.async", warp), arrive, warp)

    function.shared_bytes = min(nbytes, 8)
    reads = ((address, "address"), (barrier, "address"), *((element, type_) for element in elements))
    return Effect(function, reads)


def _check(target: Place, signal: Place, nbytes: int, machine: Machine) -> None:
    if target[0] != signal[0]:
        ranks = (place[0] % machine.cluster_size for place in (target, signal))
        raise AddressError(
            "the data goes to the CTA of rank {}, and the mbarrier is in that of {}".format(*ranks)
        )
    if target[1] % nbytes:
        raise AddressError(f"the shared offset {target[1]:#x} is not aligned to the {nbytes} bytes stored")


def _arrive(
    machine: Machine,
    signal: Place,
    stores: list[tuple[int, np.ndarray]],
    change: _Change | None,
    access: Access | None,
    time: int,
) -> None:
    """The lanes' data is written, and counted by the barrier."""
    cta, total = signal[0], 0
    for offset, value in stores:
        total += value.nbytes
        if change is None:
            machine.shared.write_range(cta, offset, value.view(np.uint8), access)
            continue
        if access is not None:
            machine.order.write("shared", cta, np.array([offset]), access, size=value.nbytes, atomic=True)
        old = machine.shared.read_range(cta, offset, value.nbytes, None).view(value.dtype)
        machine.shared.write_range(cta, offset, change(old, value).astype(value.dtype).view(np.uint8), None)
    machine.counters["shared.store_bytes"] += total
    machine.state(Barriers).complete_tx(*signal, total, access, time)
