"""Moves: registers, constants, addresses, and vectors packed into wider registers."""

from __future__ import annotations

import numpy as np

from dsv4lab.emulator.isa.registry import Pure, instruction, unsupported
from dsv4lab.emulator.lane_types import bit_width
from dsv4lab.emulator.ptx import Instruction, Sink, Vector
from dsv4lab.emulator.windows import LOCAL_WINDOW, SHARED_WINDOW

_WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


def _same(value: np.ndarray) -> np.ndarray:
    return value


@instruction("mov")
def mov(ins: Instruction) -> Pure:
    """mov.type d, a; mov.b64 d, {a, b}; mov.b64 {a, b}, d."""
    target, source = ins.operands
    type_ = ins.modifiers[-1]
    if isinstance(source, Vector):
        return _pack(type_, target, source)
    if isinstance(target, Vector):
        return _unpack(type_, target, source)
    type_ = type_ if type_ in ("pred", "b128") else f"b{bit_width(type_)}"
    return Pure(_same, ((source, type_),), ((target, type_),))


def _pack(type_: str, target, source: Vector) -> Pure:
    bits = bit_width(type_) // len(source)
    part, whole = f"b{bits}", f"b{bit_width(type_)}"

    def pack(*parts: np.ndarray) -> np.ndarray:
        stacked = np.stack(np.broadcast_arrays(*parts), -1)
        return stacked if whole == "b128" else stacked.view(_WORDS[bit_width(whole)])[..., 0]

    return Pure(pack, tuple((element, part) for element in source), ((target, whole),))


def _unpack(type_: str, target: Vector, source) -> Pure:
    bits = bit_width(type_) // len(target)
    part, whole = f"b{bits}", f"b{bit_width(type_)}"
    wanted = [i for i, element in enumerate(target) if not isinstance(element, Sink)]

    def unpack(value: np.ndarray) -> tuple[np.ndarray, ...] | np.ndarray:
        if whole != "b128":
            value = np.ascontiguousarray(value)[..., None].view(_WORDS[bits])
        parts = tuple(np.ascontiguousarray(value[..., i]) for i in wanted)
        return parts if len(parts) > 1 else parts[0]

    return Pure(unpack, ((source, whole),), tuple((target.elements[i], part) for i in wanted))


@instruction("cvta")
def cvta(ins: Instruction) -> Pure:
    """Between addresses of a space and generic ones; those of global, const and param memory are the same."""
    target, source = ins.operands
    space = next(m for m in ins.modifiers if m != "to").partition("::")[0]
    back = ins.modifiers[0] == "to"
    window = _WINDOWS.get(space, 0)

    def convert(address: np.ndarray) -> np.ndarray:
        return (address - window if back else address + window).view(np.uint64)

    return Pure(
        convert if window else lambda address: address.view(np.uint64),
        ((source, "address"),),
        ((target, "b64"),),
    )


@instruction("isspacep")
def isspacep(ins: Instruction) -> Pure:
    """Whether a generic address lies in a space's window."""
    target, source = ins.operands
    space = ins.modifiers[0].partition("::")[0]
    if space in _WINDOWS:
        window = _WINDOWS[space]
        return Pure(lambda a: (a >= window) & (a < 2 * window), ((source, "address"),), ((target, "pred"),))
    if space == "global":
        return Pure(lambda a: a < SHARED_WINDOW, ((source, "address"),), ((target, "pred"),))
    raise unsupported(ins, f"addresses of {space} memory are not told apart from global ones")
