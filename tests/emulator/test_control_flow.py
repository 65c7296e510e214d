"""Basic blocks, successors and where parted lanes meet again, on functions small enough to draw."""

from __future__ import annotations

import random

import pytest

from dsv4lab.emulator import ptx
from dsv4lab.emulator.control_flow import analyse, branch_targets
from dsv4lab.emulator.ptx import PtxError

HEADER = (
    ".version 8.8\n.target sm_100a\n.address_size 64\n.entry k()\n{\n.reg .pred %p<9>; .reg .b32 %r<9>;\n"
)


def function(body: str) -> ptx.Function:
    return ptx.parse(HEADER + body + "\n}\n").function("k")


def flow(body: str):
    return analyse(function(body))


def edges(graph) -> dict[int, tuple[int, ...]]:
    return {number: block.successors for number, block in enumerate(graph.blocks)}


def meetings(graph) -> list[int | None]:
    return [block.reconvergence for block in graph.blocks]


STEP = "add.s32 %r1, %r1, 1;\n"


def test_a_straight_line_is_one_block():
    graph = flow(STEP * 3 + "ret;")
    assert [(b.start, b.stop, b.successors, b.reconvergence) for b in graph.blocks] == [(0, 4, (), None)]
    assert graph.block_of == (0, 0, 0, 0) and graph.loops == ()


def test_a_diamond_meets_behind_both_sides():
    graph = flow(f"@%p1 bra ELSE; {STEP} bra END; ELSE: {STEP} END: {STEP} ret;")
    assert [(b.start, b.stop) for b in graph.blocks] == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert edges(graph) == {0: (2, 1), 1: (3,), 2: (3,), 3: ()}
    assert meetings(graph) == [3, 3, 3, None]
    assert graph.reconvergence(0) == 4
    assert graph.block_of == (0, 1, 1, 2, 3, 3)


def test_an_if_without_else_meets_at_its_target():
    graph = flow(f"@!%p1 bra END; {STEP} END: ret;")
    assert edges(graph) == {0: (2, 1), 1: (2,), 2: ()}
    assert graph.reconvergence(0) == 2


def test_nested_diamonds_meet_inside_out():
    graph = flow(
        f"@%p1 bra OUTER; @%p2 bra INNER; {STEP} INNER: {STEP} bra END; OUTER: {STEP} END: {STEP} ret;"
    )
    inner = graph.block_of[3]
    assert meetings(graph)[0] == graph.block_of[6]  # the outer one at END
    assert meetings(graph)[1] == inner
    assert graph.reconvergence(0) == 6 and graph.reconvergence(1) == 3


def test_a_loop_meets_behind_its_last_branch():
    graph = flow(f"L: {STEP} @%p1 bra L; {STEP} ret;")
    assert edges(graph) == {0: (0, 1), 1: ()}
    assert graph.loops == ((0, 0),)
    assert graph.reconvergence(1) == 2


def test_a_loop_with_a_break_and_a_loop_within():
    graph = flow(f"OUT: {STEP} @%p1 bra END; IN: {STEP} @%p2 bra IN; @%p3 bra OUT; END: ret;")
    out, inner, back, end = (graph.block_of[i] for i in (0, 2, 4, 5))
    assert edges(graph) == {out: (end, inner), inner: (inner, back), back: (out, end), end: ()}
    assert meetings(graph) == [end, back, end, None]
    assert set(graph.loops) == {(inner, inner), (back, out)}


def test_the_wait_loop_that_inline_asm_writes():
    graph = flow(f"LAB_WAIT: {STEP} @%p1 bra.uni DONE; bra.uni LAB_WAIT; DONE: ret;")
    assert edges(graph) == {0: (2, 1), 1: (0,), 2: ()}
    assert graph.loops == ((1, 0),)
    assert graph.reconvergence(1) == 3


def test_a_guarded_exit_keeps_nobody_apart():
    graph = flow(f"@%p1 bra ELSE; @%p2 exit; {STEP} bra END; ELSE: {STEP} END: ret;")
    assert edges(graph)[1] == (2,)
    assert graph.reconvergence(0) == 5


@pytest.mark.parametrize("end", ["ret", "exit", "trap"])
def test_a_way_that_ends_keeps_nobody_apart(end):
    # if (p1) { if (p2) end; step } step; ret: the lanes that live meet behind the outer if.
    graph = flow(f"@%p1 bra JOIN; @%p2 bra DEAD; {STEP} bra JOIN; DEAD: {end}; JOIN: {STEP} ret;")
    dead, join = graph.block_of[4], graph.block_of[5]
    assert edges(graph)[dead] == ()
    assert meetings(graph) == [join, graph.block_of[2], join, None, None]
    assert graph.reconvergence(0) == 5
    # The side that lives is no meeting point of its own: lanes that take DEAD never come there.
    assert graph.blocks[1].successors == (dead, 2)


def test_both_sides_of_a_dead_way_meet_within_it():
    graph = flow(f"@%p1 bra LIVE; @%p2 bra A; {STEP} A: {STEP} trap; LIVE: {STEP} @%p3 bra X; {STEP} X: ret;")
    assert graph.reconvergence(0) == 5  # all that survive are in LIVE
    assert graph.reconvergence(1) == 3
    assert graph.reconvergence(6) == 8


def test_a_loop_without_end():
    graph = flow(f"L: {STEP} @%p1 bra M; {STEP} M: {STEP} bra L;")
    assert edges(graph) == {0: (2, 1), 1: (2,), 2: (0,)}
    assert graph.reconvergence(1) == 3 and graph.loops == ((2, 0),)


def test_a_branch_table_goes_to_each_target_once():
    graph = flow(f"T: .branchtargets A, B, A; brx.idx %r1, T; A: {STEP} bra END; B: {STEP} END: ret;")
    assert edges(graph) == {0: (1, 2), 1: (3,), 2: (3,), 3: ()}
    assert graph.reconvergence(0) == 4
    assert branch_targets(function("T: .branchtargets A, A; brx.idx %r1, T; A: ret;").instructions[0]) == (
        1,
        1,
    )


def test_a_guarded_table_may_fall_through():
    graph = flow("T: .branchtargets A; @%p1 brx.idx %r1, T; trap; A: ret;")
    assert edges(graph)[0] == (2, 1)


@pytest.mark.parametrize(
    "body", [STEP, f"@%p1 ret; {STEP}", f"L: {STEP} @%p1 bra L;", "@%p1 bra E; ret; E:", "@%p1 ret;"]
)
def test_control_must_not_run_past_the_end(body):
    with pytest.raises(PtxError, match="control runs past the last instruction"):
        flow(body)


def test_a_branch_needs_a_label():
    with pytest.raises(PtxError, match="a branch needs a label"):
        flow("bra %r1; ret;")


def test_an_unreachable_block_is_a_block():
    graph = flow(f"bra END; {STEP} END: ret;")
    assert edges(graph) == {0: (2,), 1: (2,), 2: ()}


def on_every_way(successors, start: int, end: int) -> set[int]:
    """Blocks that each way from start to end passes, by taking them out one by one."""

    def reaches(without: int) -> bool:
        seen, todo = set(), [start]
        while todo:
            block = todo.pop()
            if block in seen or block == without:
                continue
            seen.add(block)
            todo += successors[block]
        return end in seen

    return {block for block in range(len(successors)) if block != start and not reaches(block)}


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_against_the_definition(seed):
    """With a single end, the meeting point is the post-dominator that all other ones post-dominate."""
    random_ = random.Random(seed)
    count = random_.randint(3, 12)
    lines = []
    for block in range(count - 1):
        guard = random_.random() < 0.8
        target = random_.randrange(count)
        # Unguarded jumps go down only, so that the end can be reached from everywhere.
        target = target if guard else random_.randrange(block + 1, count)
        lines.append(f"B{block}: {STEP} {'@%p1 ' if guard else ''}bra B{target};")
    graph = flow("\n".join([*lines, f"B{count - 1}: ret;"]))
    successors = [block.successors for block in graph.blocks]
    end = len(successors) - 1
    for number, block in enumerate(graph.blocks[:-1]):
        post = on_every_way(successors, number, end)
        nearest = [p for p in post if post - {p} <= on_every_way(successors, p, end)]
        assert nearest == [block.reconvergence]
