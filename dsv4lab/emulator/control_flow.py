"""Basic blocks of a PTX function, and where lanes that a branch parts come together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4lab.emulator.ptx import Function, Instruction, Label, PtxError, Targets

_ENDS = ("exit", "ret", "trap")
_BRANCHES = ("bra", "brx")


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that run one after the other.

    Attributes:
        start: index of its first instruction.
        stop: index behind its last one.
        successors: blocks that may come next: the target of a branch, then the one behind it. A guarded
            exit has the block behind it alone, where the lanes that live go on.
        reconvergence: block at which lanes that part at its end meet again, the nearest that all surviving
            lanes pass; None where they never do.
    """

    start: int
    stop: int
    successors: tuple[int, ...]
    reconvergence: int | None


@dataclass(frozen=True, slots=True)
class ControlFlow:
    """The control-flow graph of a function.

    Attributes:
        blocks: in the order of the text; block 0 is the entry.
        block_of: block of each instruction.
        loops: (block that branches back, block it branches to) of each loop.
    """

    blocks: tuple[Block, ...]
    block_of: tuple[int, ...]
    loops: tuple[tuple[int, int], ...]

    def reconvergence(self, instruction: int) -> int | None:
        """Index of the instruction at which lanes that a branch parts meet again.

        Args:
            instruction: index of a branch.
        Returns:
            The index, or None if they do not meet before they end.
        """
        meeting = self.blocks[self.block_of[instruction]].reconvergence
        return None if meeting is None else self.blocks[meeting].start


def analyse(function: Function) -> ControlFlow:
    """The control-flow graph of a function.

    Lanes that end (`exit`, `ret`, `trap`) need not meet anyone again, so a way that can only end does not
    keep the others apart: behind `if (a) { if (b) return; ... }` the survivors meet where the outer branch
    closes. With one `ret` this is the immediate post-dominator.

    Args:
        function: a defined function.
    Returns:
        Its graph.
    Raises:
        PtxError: if control runs past the last instruction.
    """
    code = function.instructions
    starts = sorted(_leaders(code))
    stops = [*starts[1:], len(code)]
    block_at = {start: block for block, start in enumerate(starts)}
    successors = [
        tuple(dict.fromkeys(_block(block_at, target, code) for target in _targets(code, stop - 1)))
        for stop in stops
    ]
    meeting = _reconvergence(successors)
    blocks = tuple(map(Block, starts, stops, successors, meeting))
    block_of = tuple(
        block for block, (a, b) in enumerate(zip(starts, stops, strict=True)) for _ in range(a, b)
    )
    return ControlFlow(blocks, block_of, _loops(successors))


def branch_targets(instruction: Instruction) -> tuple[int, ...]:
    """Instructions that a `bra` or `brx.idx` may go to; empty for any other instruction."""
    if instruction.op not in _BRANCHES:
        return ()
    last = instruction.operands[-1] if instruction.operands else None
    if isinstance(last, Targets):
        return last.targets
    if isinstance(last, Label):
        return (last.target,)
    raise PtxError("a branch needs a label", instruction.line, instruction.text)


def _leaders(code: tuple[Instruction, ...]) -> set[int]:
    leaders = {0} if code else set()
    for index, instruction in enumerate(code):
        targets = branch_targets(instruction)
        leaders.update(targets)
        if targets or instruction.op in _ENDS:
            leaders.add(index + 1)
    leaders.discard(len(code))
    return leaders


def _targets(code: tuple[Instruction, ...], last: int) -> tuple[int, ...]:
    instruction = code[last]
    if instruction.op in _ENDS:
        return (last + 1,) if instruction.guard else ()
    targets = branch_targets(instruction)
    return targets if targets and not instruction.guard else (*targets, last + 1)


def _block(block_at: dict[int, int], target: int, code: tuple[Instruction, ...]) -> int:
    if target not in block_at:
        raise PtxError("control runs past the last instruction", code[-1].line, code[-1].text)
    return block_at[target]


def _loops(successors: list[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
    """Edges that close a cycle, by a walk from the entry."""
    loops, state = [], [0] * len(successors)  # 0: not seen, 1: on the way here, 2: done
    for root in range(len(successors)):
        if state[root]:
            continue
        state[root] = 1
        way = [(root, iter(successors[root]))]
        while way:
            block, rest = way[-1]
            for following in rest:
                if state[following] == 1:
                    loops.append((block, following))
                elif not state[following]:
                    state[following] = 1
                    way.append((following, iter(successors[following])))
                    break
            else:
                state[block] = 2
                way.pop()
    return tuple(loops)


def _reconvergence(successors: list[tuple[int, ...]]) -> list[int | None]:
    """Immediate post-dominator of each block among the ways that lead to the same end.

    The end that most blocks can reach goes first; blocks that cannot reach it lie on ways that only lead
    elsewhere, and are looked at by themselves. Blocks that reach no end at all run round for ever: for them
    any one of them counts as the end.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    meeting: list[int | None] = [None] * len(successors)
    left = set(range(len(successors)))
    ends = [block for block, following in enumerate(successors) if not following]
    while left:
        candidates = [end for end in ends if end in left] or [max(left)]
        reaching = [_reaching(end, predecessors, left) for end in candidates]
        order = max(reversed(reaching), key=len)
        _post_dominators(order, successors, meeting)
        left.difference_update(order)
    return meeting


def _reaching(end: int, predecessors: list[list[int]], among: set[int]) -> list[int]:
    """Blocks that can reach the end, each after at least one of its successors (reverse postorder)."""
    seen, order = {end}, []
    way = [(end, iter(predecessors[end]))]
    while way:
        block, rest = way[-1]
        for before in rest:
            if before in among and before not in seen:
                seen.add(before)
                way.append((before, iter(predecessors[before])))
                break
        else:
            order.append(block)
            way.pop()
    return order[::-1]


def _post_dominators(order: list[int], successors: list[tuple[int, ...]], meeting: list[int | None]) -> None:
    """Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm (2001), on the reversed graph."""
    place = {block: at for at, block in enumerate(order)}
    found = {order[0]: order[0]}

    def common(blocks: Iterable[int]) -> int:
        first, *rest = blocks
        for other in rest:
            while first != other:
                if place[first] < place[other]:
                    other = found[other]
                else:
                    first = found[first]
        return first

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            nearest = common(s for s in successors[block] if s in place and s in found)
            if found.get(block) != nearest:
                found[block] = nearest
                changed = True
    for block in order[1:]:
        meeting[block] = found[block]
