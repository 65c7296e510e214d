"""Which warps run next: batches at basic blocks, branches, warps that wait, and when nothing can go on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from dsv4lab.emulator.batch import Batch, Frames, bits_of, mask_of
from dsv4lab.emulator.blame import deadlock, instruction_of, located
from dsv4lab.emulator.errors import EmulatorError, InstructionLimitError, KernelTrap, at, at_instruction
from dsv4lab.emulator.machine import Machine
from dsv4lab.emulator.program import Block
from dsv4lab.emulator.translate import compile_block
from dsv4lab.emulator.waits import Reason

# One choice in this many ignores what would be fastest, so that races come to light in some order.
_WHIM = 12
# Keys of warps and lanes that only wait for each other: that they have met changes nothing for others.
_MEETINGS = ("lanes", "bar", "cluster", "wgmma")


class Scheduler:
    """Runs the warps of a wave until all have ended.

    Rows at the same block run together. Those that are furthest behind go first, which brings rows that have
    parted together again; now and then chance decides instead.

    Args:
        machine: the wave.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.program = machine.program
        self.dice = machine.dice
        self.ready: dict[tuple[int, bool], list[Batch]] = {}
        self.parked: dict[Hashable, list[tuple[int, Batch, Reason | str]]] = {}
        # Rows that have given up waiting since something last changed: warp, block and what it waited for.
        self.given_up: set[tuple[int, int, Hashable]] = set()
        self.frames = Frames()
        self.alive = machine.alive
        self.left = machine.warps

    def execute(self) -> None:
        """Run the wave to its end. Raises what the kernel did wrong."""
        try:
            self._start()
            while self.left:
                self._step()
            while self.machine.pending:
                self.machine.perform()
            self.machine.current = None
            for function in self.machine.at_end:
                function()
        except EmulatorError as error:
            raise located(error, self.machine) from None
        except Exception as error:
            ins = instruction_of(error, self.program)
            error.add_note(f"in {self.program.kernel}, {f'PTX line {ins.line}: {ins.text}' if ins else ''}")
            raise

    def _start(self) -> None:
        machine = self.machine
        warps = np.arange(machine.warps)
        mask = np.ones((machine.warps, 32), np.bool_)
        rest = machine.threads_per_cta % 32
        if rest:
            mask[machine.warps_per_cta - 1 :: machine.warps_per_cta, rest:] = False
            self.alive[:] = bits_of(mask)
        none = np.full(machine.warps, -1, np.int64)
        whole = mask.all(1)
        for part, full in ((whole, True), (~whole, False)):
            if part.any():
                self._put(0, Batch(machine, warps[part], mask[part], none[part], full, 0))

    def _put(self, block: int, batch: Batch) -> None:
        self.ready.setdefault((block, batch.full), []).append(batch)

    # One step.

    def _step(self) -> None:
        machine = self.machine
        if machine.woken:
            self._unpark()
        if not self.ready:
            self._wait()
            return
        if machine.pending and self.dice.randrange(_WHIM) == 0:
            machine.perform()
            return
        number, batch = self._choose()
        block = self.program.blocks[number]
        run = machine.run
        run.executed += block.count * len(batch)
        run.rows[number] += len(batch)
        if run.executed > run.options.limit:
            raise at_instruction(self._limit(), block.first)
        result = self._run(block, batch)
        if batch.parked:
            batch = self._park(block, batch)
            if batch is None:
                return
        self._go_on(block, batch, result)

    def _choose(self) -> tuple[int, Batch]:
        """The block to run next, and all rows that stand at it as one batch."""
        ready = self.ready
        keys = list(ready)
        if len(keys) == 1:
            key = keys[0]
        elif self.dice.randrange(_WHIM) == 0:
            key = keys[self.dice.randrange(len(keys))]
        else:
            key = min(keys, key=lambda k: min(batch.clock for batch in ready[k]))
        batches = ready.pop(key)
        return key[0], batches[0] if len(batches) == 1 else self._merge(batches)

    def _merge(self, batches: list[Batch]) -> Batch:
        warps = np.concatenate([b.warps for b in batches])
        mask = np.concatenate([b.mask for b in batches])
        frames = np.concatenate([b.frames for b in batches])
        clock = min(b.clock for b in batches)
        full = batches[0].full
        order = np.argsort(warps, kind="stable")
        warps, mask, frames = warps[order], mask[order], frames[order]
        if not full and (warps[1:] == warps[:-1]).any():
            warps, mask, frames = _rejoin(warps, mask, frames)
            full = bool(mask.all() and (frames < 0).all())
        return Batch(self.machine, warps, mask, frames, full, clock)

    def _run(self, block: Block, batch: Batch) -> Any:
        machine = self.machine
        function = compile_block(self.program, block, batch.full)
        machine.time[batch.index] += block.count
        batch.clock += block.count
        machine.current = batch
        return function(machine, batch)

    def _limit(self) -> InstructionLimitError:
        return InstructionLimitError(
            f"more than {self.machine.run.options.limit} warp-instructions were executed: the kernel "
            "runs for ever, or `limit` is too small for it"
        )

    # Waiting.

    def _park(self, block: Block, batch: Batch) -> Batch | None:
        """Set aside the rows that an instruction has parked; returns the others."""
        for row, (key, reason) in batch.parked.items():
            self.parked.setdefault(key, []).append((block.number, batch.take(np.array([row])), reason))
        stay = np.ones(len(batch), np.bool_)
        stay[list(batch.parked)] = False
        batch.parked.clear()
        return batch.take(stay) if stay.any() else None

    def _unpark(self) -> None:
        if any(key[0] not in _MEETINGS for key in self.machine.woken):
            self.given_up.clear()
        for key in self.machine.woken:
            for block, batch, _ in self.parked.pop(key, ()):
                self._put(block, batch)
        self.machine.woken.clear()

    def _wait(self) -> None:
        """No row is ready: perform all that is under way, so that rows wake together."""
        machine = self.machine
        if not machine.pending:
            if not self._give_up():
                raise deadlock(self.machine, self.parked, self.frames)
            return
        # What this puts under way in turn waits until rows have run again.
        for _ in range(machine.pending):
            machine.perform()

    def _give_up(self) -> bool:
        """Rows that wait only for a time go on, each once until something changes. Whether there are any."""
        found = False
        for key, entries in list(self.parked.items()):
            stay = []
            for entry in entries:
                block, batch, reason = entry
                place = (int(batch.warps[0]), block, key)
                if place in self.given_up or getattr(reason, "give_up", None) is None:
                    stay.append(entry)
                    continue
                found = True
                self.given_up.add(place)
                reason.give_up()
                self._put(block, batch)
            self.parked[key] = stay
        return found

    # Where control goes.

    def _go_on(self, block: Block, batch: Batch, taken: np.ndarray | None) -> None:
        end = block.end
        if end is None:
            self._go(block.following, batch)
        elif end.op == "bra":
            if taken is None:
                self._go(block.targets[0], batch)
            else:
                self._branch(block, batch, taken)
        elif end.op == "brx":
            self._switch(block, batch, taken)
        else:
            self._end(block, batch, taken)

    def _go(self, block: int, batch: Batch) -> None:
        # A row with all lanes is in no frame.
        if not batch.full:
            batch = self._meet(block, batch)
            if batch is None:
                return
        self._put(block, batch)

    def _meet(self, block: int, batch: Batch) -> Batch | None:
        """Rows whose frame meets at this block are dissolved in it; returns the others."""
        frames = self.frames
        here = (batch.frames >= 0) & (frames.block[batch.frames] == block)
        if not here.any():
            return batch
        complete = frames.arrive(batch.frames[here], bits_of(batch.mask[here]))
        self._resume(block, complete, batch.clock)
        return batch.take(~here) if not here.all() else None

    def _resume(self, block: int, complete: np.ndarray, clock: int) -> None:
        """Warps whose lanes have all met go on together."""
        if not len(complete):
            return
        frames = self.frames
        warps, parents = frames.warp[complete], frames.parent[complete]
        mask = mask_of(frames.expected[complete])
        frames.close(complete)
        whole = mask.all(1) & (parents < 0)
        for part, full in ((whole, True), (~whole, False)):
            if part.any():
                self._go(block, Batch(self.machine, warps[part], mask[part], parents[part], full, clock))

    def _branch(self, block: Block, batch: Batch, taken: np.ndarray) -> None:
        target, following = block.targets[0], block.following
        taken = taken if batch.full else taken & batch.mask
        count = np.count_nonzero(taken)
        if count == 0:
            self._go(following, batch)
            return
        if count == (taken.size if batch.full else np.count_nonzero(batch.mask)):
            self._go(target, batch)
            return
        some = taken.any(1)
        every = (taken == batch.mask).all(1)
        mixed = some & ~every
        if every.any():
            self._go(target, batch.take(every))
        if not some.all():
            self._go(following, batch.take(~some))
        if mixed.any():
            self._part(block, batch, mixed, [(target, taken), (following, batch.mask & ~taken)])

    def _part(self, block: Block, batch: Batch, rows: np.ndarray, ways: list[tuple[int, np.ndarray]]) -> None:
        """Lanes of a row go different ways."""
        frames = self._open(block.meeting, batch, rows)
        self.machine.run.counters["divergent_branches"] += int(np.count_nonzero(rows))
        for target, mask in ways:
            going = rows & mask.any(1)
            if going.any():
                self._go(target, batch.with_mask(going, mask[going], frames[going[rows]]))

    def _open(self, meeting: int, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """Frames in which the lanes of these rows will meet: their own where it already is at that block."""
        outer = batch.frames[rows]
        if meeting < 0:
            return outer
        new = (outer < 0) | (self.frames.block[outer] != meeting)
        result = outer.copy()
        if new.any():
            result[new] = self.frames.open(
                batch.warps[rows][new], meeting, outer[new], bits_of(batch.mask[rows][new])
            )
        return result

    def _switch(self, block: Block, batch: Batch, index: np.ndarray) -> None:
        """brx.idx: a branch with many targets; lanes whose guard is false have the index -1."""
        beyond = (index >= len(block.targets)) & batch.mask
        if beyond.any():
            row, lane = (int(axis[0]) for axis in np.nonzero(beyond))
            what = f"the index {int(index[row, lane])} of brx.idx is beyond its {len(block.targets)} targets"
            raise at(at_instruction(EmulatorError(what), block.end), row, lane)
        ways = [(t, (index == i) & batch.mask) for i, t in enumerate(block.targets)]
        ways.append((block.following, (index < 0) & batch.mask))
        whole = np.zeros(len(batch), np.bool_)
        for target, mask in ways:
            alike = (mask == batch.mask).all(1)
            whole |= alike
            if alike.any():
                self._go(target, batch.take(alike))
        if not whole.all():
            self._part(block, batch, ~whole, ways)

    def _end(self, block: Block, batch: Batch, ending: np.ndarray | None) -> None:
        """Lanes end."""
        gone = batch.mask if ending is None else ending & batch.mask
        if block.end.op == "trap" and gone.any():
            row, lane = (int(axis[0]) for axis in np.nonzero(gone))
            raise at(at_instruction(KernelTrap("the kernel stopped itself"), block.end), row, lane)
        bits = bits_of(gone)
        alive = self.alive
        np.bitwise_and.at(alive, batch.warps, ~bits)
        self._leave(batch, bits)
        ended = np.unique(batch.warps[(alive[batch.warps] == 0) & (bits != 0)])
        self.left -= len(ended)
        if bits.any():
            touched = np.unique(batch.warps[bits != 0])
            for function in self.machine.on_exit:
                function(touched)
        if ending is not None:
            rest = batch.mask & ~gone
            going = rest.any(1)
            if going.any():
                same = not gone.any()
                self._go(
                    block.following,
                    batch if same else batch.with_mask(going, rest[going], batch.frames[going]),
                )

    def _leave(self, batch: Batch, bits: np.ndarray) -> None:
        """Frames no longer expect lanes that have ended."""
        inside = (batch.frames >= 0) & (bits != 0)
        if not inside.any():
            return
        complete = self.frames.leave(batch.frames[inside], bits[inside])
        for frame in np.unique(complete).tolist():
            self._resume(int(self.frames.block[frame]), np.array([frame]), batch.clock)


def _rejoin(
    warps: np.ndarray, mask: np.ndarray, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts of one warp that stand at the same block in the same frame are one row again."""
    pairs = np.stack([warps, frames], 1)
    unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
    joined = np.zeros((len(unique), 32), np.bool_)
    np.logical_or.at(joined, inverse.reshape(-1), mask)
    return unique[:, 0].copy(), joined, unique[:, 1].copy()
