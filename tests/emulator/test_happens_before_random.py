"""Random programs, with the verdicts of a graph of what precedes what."""

from __future__ import annotations

import random

import numpy as np

from dsv4lab.emulator.happens_before import HappensBefore, ProxyError, RaceError


class Graph:
    """Everything that happens is a node that knows, as bits, all nodes that precede it."""

    def __init__(self, warps: int) -> None:
        self.before: list[int] = []
        self.now = [self.node() for _ in range(warps)]
        self.fences: list[int] = []
        self.pending: dict[object, int] = {}
        self.published: dict[object, int] = {}
        self.last: dict[object, int] = {}
        self.history: dict[tuple, list[tuple]] = {}

    def node(self, *preceding: int) -> int:
        bits = 0
        for p in preceding:
            bits |= self.before[p] | 1 << p
        self.before.append(bits)
        return len(self.before) - 1

    def step(self, warp: int) -> int:
        self.now[warp] = self.node(self.now[warp])
        return self.now[warp]

    def publish(self, node: int, key) -> None:
        self.pending[key] = self.pending.get(key, 0) | self.before[node] | 1 << node

    def release(self, warp: int, key) -> None:
        self.publish(self.step(warp), key)

    def complete(self, key) -> None:
        self.published[key] = self.pending.get(key, 0)

    def acquire(self, warp: int, key) -> None:
        self.before[self.step(warp)] |= self.published.get(key, 0)

    def fence(self, warp: int) -> None:
        self.fences.append(self.step(warp))

    def issue(self, warp: int, channel, in_order: bool) -> int:
        preceding = [self.step(warp)]
        if in_order and channel in self.last:
            preceding.append(self.last[channel])
        self.last[channel] = self.node(*preceding)
        return self.last[channel]

    def precedes(self, one: int, two: int) -> bool:
        return bool(self.before[two] >> one & 1)

    def fenced(self, one: int, two: int) -> bool:
        return any(self.precedes(one, fence) and self.precedes(fence, two) for fence in self.fences)

    def verdicts(self, accesses: list[tuple]) -> set[str]:
        """What is wrong with accesses (node, cell, write, atomic, generic) that happen at once."""
        found = set()
        for i, (node, cell, write, atomic, generic) in enumerate(accesses):
            others = [a for a in accesses[:i] if a[1] == cell] + self.history.get(cell, [])
            for other, _, wrote, was_atomic, was_generic in others:
                if other == node or not (write or wrote) or (atomic and was_atomic):
                    continue
                if not self.precedes(other, node):
                    found.add("race")
                elif wrote and was_generic and not generic and not self.fenced(other, node):
                    found.add("proxy")
        if not found:
            for access in accesses:
                self.history.setdefault(access[1], []).append(access)
        return found


class Programs:
    """Random programs of two clusters of two CTAs of two warps on eight cells a CTA, told to both models."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.order = HappensBefore(ctas=4, cluster_size=2, warps_per_cta=2, shared_bytes=64, granularity=8)
        self.graph = Graph(8)
        self.running: list[tuple] = []
        self.counts = {"fine": 0, "race": 0, "proxy": 0}

    def compare(self, accesses: list[tuple], real) -> None:
        expected = self.graph.verdicts(accesses)
        try:
            real()
            found = None
        except RaceError:
            found = "race"
        except ProxyError:
            found = "proxy"
        assert (found in expected) if expected else found is None, (found, expected, accesses)
        self.counts[found or "fine"] += 1

    def key(self, cluster: int):
        return cluster, self.random.randrange(3)

    def kind(self) -> tuple[bool, bool]:
        return self.random.random() < 0.5, self.random.random() < 0.2

    def step(self) -> None:
        choices = {
            self.access: 6,
            self.access_many: 2,
            self.synchronise: 8,
            self.arrive: 2,
            self.complete: 1,
            self.wait: 2,
            self.fence: 1,
            self.issue: 3,
            self.perform: 5,
        }
        self.random.choices(list(choices), list(choices.values()))[0]()

    def cells(self, cluster: int) -> tuple[int, list[int]]:
        return cluster * 2 + self.random.randrange(2), self.random.sample(
            range(8), self.random.choice((1, 1, 3))
        )

    def access(self) -> None:
        warp = self.random.randrange(8)
        (write, atomic), (cta, cells) = self.kind(), self.cells(warp // 4)
        node = self.graph.step(warp)
        offsets = 8 * np.array(cells)
        call = self.order.write if write else self.order.read
        self.compare(
            [(node, (cta, c), write, atomic, True) for c in cells],
            lambda: call("shared", cta, offsets, self.order.generic(warp), size=8, atomic=atomic),
        )

    def access_many(self) -> None:
        warps = self.random.sample(range(8), self.random.choice((1, 2, 3)))
        write, atomic = self.kind()
        each = self.random.choice((1, 1, 2))
        mask = np.zeros((len(warps), 32), bool)
        ctas, offsets = np.zeros((2, len(warps), 32), np.int64)
        accesses = []
        for row, warp in enumerate(warps):
            node = self.graph.step(warp)
            for lane in self.random.sample(range(32), 2):
                cta, (cell, *_) = self.cells(warp // 4)
                cell -= cell % each
                mask[row, lane], ctas[row, lane], offsets[row, lane] = True, cta, 8 * cell
                accesses += [(node, (cta, cell + i), write, atomic, True) for i in range(each)]
        warps = np.array(warps)
        self.compare(
            accesses,
            lambda: self.order.access_batch("shared", warps, ctas, offsets, 8 * each, mask, write, atomic),
        )

    def synchronise(self) -> None:
        cluster = self.random.randrange(2)
        warps = [4 * cluster + w for w in self.random.sample(range(4), self.random.choice((2, 2, 3)))]
        key = self.key(cluster)
        for warp in warps:
            self.graph.release(warp, key)
        self.graph.complete(key)
        for warp in warps:
            self.graph.acquire(warp, key)
        self.order.release(np.array(warps), key)
        self.order.complete(key)
        self.order.acquire(np.array(warps), key)

    def arrive(self) -> None:
        warp = self.random.randrange(8)
        key = self.key(warp // 4)
        self.graph.release(warp, key)
        self.order.release(warp, key)

    def complete(self) -> None:
        key = self.key(self.random.randrange(2))
        self.graph.complete(key)
        self.order.complete(key)

    def wait(self) -> None:
        warp = self.random.randrange(8)
        key = self.key(warp // 4)
        self.graph.acquire(warp, key)
        self.order.acquire(warp, key)

    def fence(self) -> None:
        warp = self.random.randrange(8)
        self.graph.fence(warp)
        self.order.fence_async(warp)

    def issue(self) -> None:
        if len(self.running) > 12:
            return
        warp = self.random.randrange(8)
        # An unordered channel is released with one key, an ordered one with any.
        key, in_order = self.key(warp // 4), self.random.random() < 0.4
        proxy = "async" if self.random.random() < 0.7 else "generic"
        channel = (warp // 4, "pipe", warp % 4 // 2, proxy) if in_order else ("channel", key, proxy)
        node = self.graph.issue(warp, channel, in_order)
        token = self.order.asynchronous(warp, channel, in_order, proxy)
        self.running.append((node, token, key, warp, proxy))

    def perform(self) -> None:
        if not self.running:
            return
        index = self.random.randrange(len(self.running))
        node, token, key, warp, proxy = self.running[index]
        if self.random.random() < 0.4:
            del self.running[index]
            self.graph.publish(node, key)
            self.order.release_access(token, key)
            return
        (write, atomic), (cta, cells) = self.kind(), self.cells(warp // 4)
        call = self.order.write if write else self.order.read
        self.compare(
            [(node, (cta, c), write, atomic, proxy == "generic") for c in cells],
            lambda: call("shared", cta, 8 * np.array(cells), token, size=8, atomic=atomic),
        )


def test_verdicts_are_those_of_a_graph():
    counts = {"fine": 0, "race": 0, "proxy": 0}
    for seed in range(200):
        programs = Programs(seed)
        for _ in range(250):
            programs.step()
        for verdict, count in programs.counts.items():
            counts[verdict] += count
    assert min(counts.values()) > 400, counts
