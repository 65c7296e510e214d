"""Instructions that lanes of a warp execute together: bar.warp.sync, vote, match, elect; and activemask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.batch import bits_of
from dsv4lab.emulator.isa.collective import EVERYBODY, LANE, collective, peers_of, with_predicate
from dsv4lab.emulator.isa.registry import Effect, Wait, instruction, unsupported
from dsv4lab.emulator.ptx import Instruction

if TYPE_CHECKING:
    from dsv4lab.emulator.batch import Batch


@instruction("bar.warp.sync")
def warp_sync(ins: Instruction) -> Wait:
    """bar.warp.sync membermask."""
    return collective(ins, lambda mask, members: None, (), ())


@instruction("vote")
def vote(ins: Instruction) -> Wait:
    """vote.sync.{all, any, uni}.pred p, {!}a, membermask; vote.sync.ballot.b32 d, {!}a, membermask."""
    if ins.modifiers[:1] != ("sync",) or ins.modifiers[1:] not in _VOTES:
        raise unsupported(ins)
    count = _VOTES[ins.modifiers[1:]]

    def core(mask: np.ndarray, value: np.ndarray, members: np.ndarray) -> np.ndarray:
        peers = peers_of(mask, members)
        return count(peers, value[:, None, :])

    target, value, _ = ins.operands
    kind = "u32" if ins.modifiers[1] == "ballot" else "pred"
    return collective(
        ins, core, ((value, "pred"),), ((target, kind),), lambda value: count(EVERYBODY, value[:, None, :])
    )


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
        peers = peers_of(mask, members)
        same = peers & (value[:, :, None] == value[:, None, :])
        if kind == "any":
            return _ballot(same), True
        agree = (same | ~peers).all(2)
        return np.where(agree, _ballot(peers), np.uint32(0)), agree

    def function(*values: np.ndarray):
        found, agree = core(*values)
        return found, np.broadcast_to(agree, found.shape)

    target, value, _ = ins.operands
    return collective(ins, function, ((value, rest[1]),), with_predicate(target, ("u32", "pred")))


def _ballot(lanes: np.ndarray) -> np.ndarray:
    """(n, m, 32) bool as uint32 (n, m)."""
    return bits_of(lanes.reshape(-1, 32)).reshape(lanes.shape[:2])


@instruction("elect")
def elect(ins: Instruction) -> Wait:
    """elect.sync d|p, membermask: the leader is the lowest lane of the mask."""
    if ins.modifiers != ("sync",):
        raise unsupported(ins)

    def core(mask: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leader = peers_of(mask, members).argmax(2)
        return leader.astype(np.uint32), leader == LANE

    first = np.zeros((1, 1), np.uint32), (LANE == 0)[None]
    return collective(ins, core, (), with_predicate(ins.operands[0], ("u32", "pred")), lambda: first)


@instruction("activemask")
def activemask(ins: Instruction) -> Effect:
    """activemask.b32 d: the lanes that execute it now."""

    def function(batch: Batch, mask: np.ndarray) -> np.ndarray:
        return bits_of(mask)[:, None]

    return Effect(function, (), ((ins.operands[0], "u32"),))
