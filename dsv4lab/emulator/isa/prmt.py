"""Byte permutations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from dsv4lab.emulator.isa.registry import Action, Pure, instruction, unsupported
from dsv4lab.emulator.ptx import Immediate, Instruction

# Which of the eight bytes b7 b6 b5 b4 a3 a2 a1 a0 each byte of the result is, as four hexadecimal digits,
# for c & 3 = 0, 1, 2, 3.
MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}
_NIBBLES = np.array([0, 4, 8, 12], np.uint32)
_SEVEN, _EIGHT = np.array(7, np.uint32), np.array(8, np.uint32)


@instruction("prmt")
def prmt(ins: Instruction) -> Action:
    """Each byte of d is one of the eight of b:a, or its sign in all bits."""
    type_, *mode = ins.modifiers
    if type_ != "b32" or len(mode) > 1 or not set(mode) <= set(MODES):
        raise unsupported(ins)
    target, a, b, c = ins.operands
    reads, writes = ((a, "b32"), (b, "b32")), ((target, "b32"),)
    if isinstance(c, Immediate):
        selector = MODES[mode[0]][c.bits & 3] if mode else c.bits & 0xFFFF
        return Pure(fixed(selector), reads, writes)
    if not mode:
        return Pure(permuted, (*reads, (c, "b32")), writes)
    table = np.array(MODES[mode[0]], np.uint32)
    return Pure(lambda a, b, c: permuted(a, b, table[c & 3]), (*reads, (c, "b32")), writes)


def permuted(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """prmt of uint32 (...), each lane with its own selector."""
    first = int(c.flat[0])
    if np.count_nonzero(c == c.dtype.type(first)) == c.size:
        return fixed(first & 0xFFFF)(a, b)
    octets = (b.astype(np.uint64) << np.uint64(32) | a)[..., None].view(np.uint8)
    digits = c[..., None] >> _NIBBLES
    chosen = np.take_along_axis(octets, (digits & _SEVEN).astype(np.intp), axis=-1)
    signs = (chosen.view(np.int8) >> 7).view(np.uint8)
    return _joined(np.where(digits & _EIGHT, signs, chosen))


def _joined(octets: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(octets).view(np.uint32)[..., 0]


@cache
def fixed(selector: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """prmt with one selector, as shifts and masks of runs of neighbouring bytes."""
    digits = [selector >> 4 * i & 15 for i in range(4)]
    if any(digit & 8 for digit in digits):
        return _with_signs(digits)
    # For each source and each distance that bytes move, the bytes of the result that move so.
    moves: dict[tuple[int, int], int] = {}
    for place, digit in enumerate(digits):
        key = digit // 4, 8 * (place - digit % 4)
        moves[key] = moves.get(key, 0) | 0xFF << 8 * place
    steps = [(source, *_move(distance, mask)) for (source, distance), mask in moves.items()]

    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = None
        for source, move, amount, mask in steps:
            part = b if source else a
            if move is not None:
                part = move(part, amount)
            if mask is not None:
                part = part & mask
            result = part if result is None else result | part
        return result

    return apply


def _with_signs(digits: list[int]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    index = np.array([digit & 7 for digit in digits])
    signed = np.array([digit > 7 for digit in digits])

    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        chosen = (b.astype(np.uint64) << np.uint64(32) | a)[..., None].view(np.uint8)[..., index]
        return _joined(np.where(signed, (chosen.view(np.int8) >> 7).view(np.uint8), chosen))

    return apply


def _move(distance: int, mask: int) -> tuple[np.ufunc | None, np.ndarray, np.ndarray | None]:
    """How to shift a value, and what to mask it with; None for what changes nothing."""
    reach = 0xFFFFFFFF << distance & 0xFFFFFFFF if distance > 0 else 0xFFFFFFFF >> -distance
    move = np.left_shift if distance > 0 else np.right_shift if distance else None
    return move, np.array(abs(distance), np.uint32), None if mask == reach else np.array(mask, np.uint32)
