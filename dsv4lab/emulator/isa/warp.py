"""Instructions that lanes of a warp execute together: shfl, vote, match, redux, elect, activemask.

The lanes that a member mask names wait for each other at the instruction. A lane whose own mask does not
name it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4lab.emulator.batch import bits_of
from dsv4lab.emulator.convergence import Convergence, ConvergenceError, together
from dsv4lab.emulator.errors import UninitialisedError, at
from dsv4lab.emulator.isa.registry import Effect, Typed, Wait, instruction, unsupported
from dsv4lab.emulator.ptx import Immediate, Instruction, Not, Operand, Pair, Sink

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch

_ALL = np.uint32(0xFFFFFFFF)
_LANE = np.arange(32, dtype=np.uint32)
_NAN = np.uint32(0x7FFFFFFF)


# Lanes that take part --------------------------------------------------------------------------------------


def _collective(ins: Instruction, core: Callable[..., Any], reads: Typed, writes: Typed) -> Wait:
    """An instruction whose last operand is the member mask.

    `core` is a function of (mask, *reads, members) on arrays (n, 32), one row for each warp.
    """
    members = ins.operands[-1]
    everybody = isinstance(members, Immediate) and members.bits & 0xFFFFFFFF == 0xFFFFFFFF
    reads = (*reads, (members, "u32"))

    def function(batch: Batch, mask: np.ndarray, *values: np.ndarray) -> Any:
        if everybody and mask.all():
            return core(mask, *values)
        gathered = _gathered(batch, mask, values[-1], ins)
        results = together(batch, gathered, core, *values)
        return _unless_parked(results, (mask & ~gathered).any(1), reads, values, writes)

    return Wait(function, reads, writes)


def _unless_parked(
    results: Any, parked: np.ndarray, reads: Typed, values: tuple[np.ndarray, ...], writes: Typed
) -> Any:
    """Results that leave operands of parked rows (n,) as they are: those execute the instruction again."""
    if not parked.any() or results is None:
        return results
    kept = list(results) if isinstance(results, tuple) else [results]
    for i, (target, _) in enumerate(writes):
        for (source, _), value in zip(reads, values, strict=True):
            if source == target:
                kept[i] = np.where(parked[:, None], value, kept[i])
            elif source == Not(target):
                kept[i] = np.where(parked[:, None], ~value, kept[i])
    return tuple(kept) if isinstance(results, tuple) else kept[0]


def _gathered(batch: Batch, mask: np.ndarray, members: np.ndarray, ins: Instruction) -> np.ndarray:
    """The lanes (n, 32) bool of warps that are complete; the other rows are parked."""
    outside = mask & (members >> _LANE & 1 == 0)
    if outside.any():
        row, lane = (int(axis[0]) for axis in np.nonzero(outside))
        raise at(
            ConvergenceError(
                f"the lane executes {ins.opcode} with the member mask {int(members[row, lane]):#010x}, "
                "which does not name it"
            ),
            row,
            lane,
        )
    needed = np.bitwise_or.reduce(np.where(mask, members, np.uint32(0)), axis=1)
    return mask & batch.machine.state(Convergence).gather(batch, mask, needed, ins)[:, None]


def _peers(mask: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Which lanes take part with each lane: (n, 1, 32) where a row has one mask, else (n, 32, 32)."""
    first = np.where(mask, members, np.uint32(0)).max(1)[:, None]
    if ((members == first) | ~mask).all():
        members = first
    return mask[:, None, :] & (members[:, :, None] >> _LANE & 1 != 0)


def _ballot(lanes: np.ndarray) -> np.ndarray:
    """(n, m, 32) bool as uint32 (n, m)."""
    return bits_of(lanes.reshape(-1, 32)).reshape(lanes.shape[:2])


def _split(operand: Operand, kinds: tuple[str, str]) -> Typed:
    """The writes of d or of d|p."""
    if isinstance(operand, Pair):
        return (operand.first, kinds[0]), (operand.second, kinds[1])
    return ((operand, kinds[0]), (Sink(), kinds[1]))


def warp_sync(ins: Instruction) -> Wait:
    """bar.warp.sync membermask."""
    return _collective(ins, lambda mask, members: None, (), ())


# shfl ------------------------------------------------------------------------------------------------------


@instruction("shfl")
def shfl(ins: Instruction) -> Wait:
    """shfl.sync.mode.b32 d{|p}, a, b, c, membermask."""
    if len(ins.modifiers) != 3 or ins.modifiers[0] != "sync" or ins.modifiers[2] != "b32":
        raise unsupported(ins)
    mode = ins.modifiers[1]
    if mode not in ("up", "down", "bfly", "idx"):
        raise unsupported(ins)
    target, *operands = ins.operands
    sources = tuple((operand, "u32") for operand in operands)
    writes = _split(target, ("u32", "pred"))

    def function(batch: Batch, mask: np.ndarray, *reads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        full, here = mask.all() and (reads[3] == _ALL).all(), mask
        if not full:
            mask = _gathered(batch, mask, reads[3], ins)
        checked = not full and "initialised" in batch.machine.checks

        def core(mask: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, members: np.ndarray):
            source, valid = _sources(mode, b, c)
            given = True if full else np.take_along_axis(mask, source, 1) & (members >> source & 1 != 0)
            if checked and not (given | ~mask).all():
                _refuse_source(mask & ~given, source, mask)
            value = np.take_along_axis(a, source, 1)
            return (value if full else np.where(given, value, a)), valid

        results = together(batch, mask, core, *reads)
        return _unless_parked(results, (here & ~mask).any(1), sources, reads, writes)

    return Wait(function, sources, writes)


def _sources(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads (n, 32), and whether it lies in the lane's segment."""
    lane = _LANE.astype(np.int64)
    distance, clamp, segment = (x.astype(np.int64) for x in (b & 31, c & 31, c >> 8 & 31))
    first = lane & segment
    last = first | clamp & ~segment
    if mode == "up":
        source = lane - distance
        valid = source >= last
    else:
        source = {
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": first | distance & ~segment,
        }[mode]
        valid = source <= last
    return np.where(valid, source, lane), valid


def _refuse_source(wrong: np.ndarray, source: np.ndarray, mask: np.ndarray) -> None:
    row, lane = (int(axis[0]) for axis in np.nonzero(wrong))
    raise UninitialisedError(
        f"lane {lane} reads lane {int(source[row, lane])}, which does not take part in the shuffle "
        f"(lanes {int(bits_of(mask[[row]])[0]):#010x} execute it)"
    )


# vote and match --------------------------------------------------------------------------------------------


@instruction("vote")
def vote(ins: Instruction) -> Wait:
    """vote.sync.{all, any, uni}.pred p, {!}a, membermask; vote.sync.ballot.b32 d, {!}a, membermask."""
    if ins.modifiers[:1] != ("sync",) or ins.modifiers[1:] not in _VOTES:
        raise unsupported(ins)
    count = _VOTES[ins.modifiers[1:]]

    def core(mask: np.ndarray, value: np.ndarray, members: np.ndarray) -> np.ndarray:
        peers = _peers(mask, members)
        return count(peers, value[:, None, :])

    target, value, _ = ins.operands
    kind = "u32" if ins.modifiers[1] == "ballot" else "pred"
    return _collective(ins, core, ((value, "pred"),), ((target, kind),))


def _all(peers: np.ndarray, value: np.ndarray) -> np.ndarray:
    return (value | ~peers).all(2)


def _any(peers: np.ndarray, value: np.ndarray) -> np.ndarray:
    return (value & peers).any(2)


_VOTES: dict[tuple[str, ...], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ("all", "pred"): _all,
    ("any", "pred"): _any,
    ("uni", "pred"): lambda peers, value: _all(peers, value) | ~_any(peers, value),
    ("ballot", "b32"): lambda peers, value: _ballot(peers & value),
}


@instruction("match")
def match(ins: Instruction) -> Wait:
    """match.any.sync.type d, a, membermask; match.all.sync.type d{|p}, a, membermask."""
    kind, *rest = ins.modifiers
    if kind not in ("any", "all") or rest not in (["sync", "b32"], ["sync", "b64"]):
        raise unsupported(ins)

    def core(mask: np.ndarray, value: np.ndarray, members: np.ndarray):
        peers = _peers(mask, members)
        same = peers & (value[:, :, None] == value[:, None, :])
        if kind == "any":
            return _ballot(same), True
        agree = (same | ~peers).all(2)
        return np.where(agree, _ballot(peers), np.uint32(0)), agree

    def function(*values: np.ndarray):
        found, agree = core(*values)
        return found, np.broadcast_to(agree, found.shape)

    target, value, _ = ins.operands
    return _collective(ins, function, ((value, rest[1]),), _split(target, ("u32", "pred")))


# redux -----------------------------------------------------------------------------------------------------


@instruction("redux")
def redux(ins: Instruction) -> Wait:
    """redux.sync.op.type d, a, membermask; redux.sync.{min, max}{.abs}{.NaN}.f32 on sm_100a."""
    op, *options, type_ = ins.modifiers[1:]
    if ins.modifiers[0] != "sync" or (op, type_) not in _REDUCTIONS:
        raise unsupported(ins)
    if type_ == "f32" and {"abs", "NaN"}.issuperset(options):
        reduce_ = _float_reduction(op, "abs" in options, "NaN" in options)
    elif not options:
        ufunc, neutral = _REDUCTIONS[op, type_]

        def reduce_(peers: np.ndarray, value: np.ndarray) -> np.ndarray:
            value = np.where(peers, value, value.dtype.type(neutral))
            return ufunc.reduce(value, axis=2, dtype=value.dtype)
    else:
        raise unsupported(ins)
    kind = "u32" if type_ == "f32" else type_

    def core(mask: np.ndarray, value: np.ndarray, members: np.ndarray) -> np.ndarray:
        return reduce_(_peers(mask, members), value[:, None, :])

    target, value, _ = ins.operands
    return _collective(ins, core, ((value, kind),), ((target, kind),))


_U, _S = np.iinfo(np.uint32), np.iinfo(np.int32)
_REDUCTIONS = {
    ("add", "u32"): (np.add, 0),
    ("add", "s32"): (np.add, 0),
    ("min", "u32"): (np.minimum, _U.max),
    ("max", "u32"): (np.maximum, _U.min),
    ("min", "s32"): (np.minimum, _S.max),
    ("max", "s32"): (np.maximum, _S.min),
    ("and", "b32"): (np.bitwise_and, _U.max),
    ("or", "b32"): (np.bitwise_or, 0),
    ("xor", "b32"): (np.bitwise_xor, 0),
    ("min", "f32"): (np.minimum, None),
    ("max", "f32"): (np.maximum, None),
}


def _float_reduction(op: str, absolute: bool, nan: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """On bit patterns: -0 is below +0; NaN is left out, or with .NaN is the result."""
    choose, neutral = (np.minimum, _S.max) if op == "min" else (np.maximum, _S.min)

    def reduce_(peers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        if absolute:
            bits = bits & np.uint32(0x7FFFFFFF)
        is_nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
        # Integers in the order of the floats they stand for.
        key = bits.view(np.int32) ^ (bits.view(np.int32) >> 31 & 0x7FFFFFFF)
        best = choose.reduce(np.where(peers & ~is_nan, key, np.int32(neutral)), axis=2)
        found = (best ^ (best >> 31 & 0x7FFFFFFF)).view(np.uint32)
        none = (peers & is_nan).any(2) if nan else ~(peers & ~is_nan).any(2)
        return np.where(none, _NAN, found)

    return reduce_


# elect and activemask --------------------------------------------------------------------------------------


@instruction("elect")
def elect(ins: Instruction) -> Wait:
    """elect.sync d|p, membermask: the leader is the lowest lane of the mask."""
    if ins.modifiers != ("sync",):
        raise unsupported(ins)

    def core(mask: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leader = _peers(mask, members).argmax(2)
        return leader.astype(np.uint32), leader == _LANE

    return _collective(ins, core, (), _split(ins.operands[0], ("u32", "pred")))


@instruction("activemask")
def activemask(ins: Instruction) -> Effect:
    """activemask.b32 d: the lanes that execute it now."""

    def function(batch: Batch, mask: np.ndarray) -> np.ndarray:
        return bits_of(mask)[:, None]

    return Effect(function, (), ((ins.operands[0], "u32"),))
