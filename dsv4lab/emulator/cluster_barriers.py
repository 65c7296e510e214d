"""The barrier of each cluster: barrier.cluster.arrive and barrier.cluster.wait.

Every thread of the cluster that has not ended arrives once a phase, and waits before it arrives again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.emulator.barriers import BarrierError
from dsv4lab.emulator.batch import bits_of, mask_of
from dsv4lab.emulator.convergence import alive
from dsv4lab.emulator.errors import at

if TYPE_CHECKING:
    from dsv4lab.emulator.machine import Machine


class ClusterBarriers:
    """The barriers of a wave's clusters; `machine.state(ClusterBarriers)` is the one of a machine.

    Attributes:
        phase: int64 (clusters,), completions.
        completed_at: int64 (clusters,), model time of the last completion.
        due: int64 (warps, 32), the phase in which a lane has arrived and not yet waited for, -1 for none.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.width = machine.cluster_size * machine.warps_per_cta
        clusters = machine.ctas // machine.cluster_size
        self.phase, self.completed_at, self._latest = np.zeros((3, clusters), np.int64)
        self.due = np.full((machine.warps, 32), -1, np.int64)
        self._arrived = np.zeros(machine.warps, np.uint32)
        machine.on_exit.append(self._exited)

    def arrive(self, warps: np.ndarray, mask: np.ndarray) -> None:
        """Lanes (n, 32) bool of warps (n,) arrive. Raises BarrierError with row and lane."""
        clusters = warps // self.width
        row, lane = np.nonzero(mask)
        again = self.due[warps[row], lane] >= 0
        if again.any():
            i = int(again.argmax())
            what = f"{self.describe(int(clusters[row[i]]))} is arrived at again before it was waited for"
            raise at(BarrierError(what), int(row[i]), int(lane[i]))
        self.due[warps[row], lane] = self.phase[clusters[row]]
        np.bitwise_or.at(self._arrived, warps, bits_of(mask))
        np.maximum.at(self._latest, clusters, self.machine.time[warps])
        self._settle(np.unique(clusters[mask.any(1)]))

    def complete(self, warps: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Which rows (n,) bool find the phase complete in which their lanes arrived; these wait no longer.

        Raises:
            BarrierError: a lane has not arrived.
        """
        due = self.due[warps]
        early = mask & (due < 0)
        if early.any():
            row, lane = (int(axis[0]) for axis in np.nonzero(early))
            cluster = int(warps[row]) // self.width
            raise at(BarrierError(f"{self.describe(cluster)} is waited for without an arrival"), row, lane)
        done = ((due < self.phase[warps // self.width][:, None]) | ~mask).all(1)
        row, lane = np.nonzero(mask & done[:, None])
        self.due[warps[row], lane] = -1
        return done

    def _settle(self, clusters: np.ndarray) -> None:
        """Complete the phases of these clusters that no lane is missing from."""
        missing = (alive(self.machine) & ~self._arrived).reshape(-1, self.width)[clusters].any(1)
        come = self._arrived.reshape(-1, self.width)
        for cluster in clusters[~missing].tolist():
            if not come[cluster].any():
                continue
            come[cluster] = 0
            self.phase[cluster] += 1
            self.completed_at[cluster], self._latest[cluster] = self._latest[cluster], 0
            if self.machine.order is not None:
                self.machine.order.complete(("cluster", cluster))
            self.machine.wake(("cluster", cluster))

    def _exited(self, warps: np.ndarray) -> None:
        """Lanes of these warps have ended: others need not wait for them."""
        self._settle(np.unique(warps // self.width))

    def describe(self, cluster: int) -> str:
        """Which cluster, its phase, and how many threads have arrived."""
        first = ", ".join(map(str, self.machine.cta_index[cluster * self.machine.cluster_size].tolist()))
        lanes = slice(cluster * self.width, (cluster + 1) * self.width)
        come = int(mask_of(self._arrived[lanes] & alive(self.machine)[lanes]).sum())
        left = int(mask_of(alive(self.machine)[lanes]).sum())
        return (
            f"the barrier of the cluster that begins with CTA ({first}) "
            f"(phase {self.phase[cluster]}, {come} of {left} threads have arrived)"
        )
