"""Which actor last touched which cell in one way, for ways in which many may touch a cell at once."""

from __future__ import annotations

import numpy as np

# Cells of one CTA: a range, indices of cells, or (rows, columns) of the space's shape.
Cells = slice | np.ndarray | tuple


class Window:
    """The cells of one access in the flat arrays of a space.

    Args:
        base: where the CTA's cells begin.
        shape: of a CTA's cells.
        cells: those of the access.
    """

    def __init__(self, base: int, shape: tuple[int, ...], cells: Cells) -> None:
        self._inner = None
        if isinstance(cells, tuple):
            self._shape, self._inner = shape, cells
            self._index = slice(base, base + shape[0] * shape[1])
        elif isinstance(cells, slice):
            self._index = slice(base + cells.start, base + cells.stop)
        else:
            self._index = cells + base

    def of(self, flat: np.ndarray) -> np.ndarray:
        """The cells' values; a view unless indices were given."""
        found = flat[self._index]
        return found if self._inner is None else found.reshape(self._shape)[self._inner]

    def set(self, flat: np.ndarray, value: int) -> None:
        """Set all cells to one value."""
        if self._inner is None:
            flat[self._index] = value
        else:
            flat[self._index].reshape(self._shape)[self._inner] = value

    def cell(self, position: int) -> int:
        """Flat index of the cell at a position in `of`."""
        if self._inner is not None:
            numbers = np.arange(self._index.start, self._index.stop).reshape(self._shape)
            return int(numbers[self._inner].reshape(-1)[position])
        return self._index.start + position if isinstance(self._index, slice) else int(self._index[position])


class Marks:
    """When each actor last touched each cell in one way.

    An actor gets a row in a CTA the first time that it touches its cells; row 0 stays zero. A row costs
    memory where it is touched only.

    Args:
        ctas: how many there are.
        cluster_size: CTAs of a cluster.
        bits: a CTA's cells begin at its number times 2**bits.
        rows: how many to make room for at a time.
    """

    def __init__(self, ctas: int, cluster_size: int, bits: int, rows: int) -> None:
        self._total = ctas << bits
        self._bits = bits
        self._cluster_size = cluster_size
        self._rows = rows
        self._chunks: list[np.ndarray] = []
        self._used = np.ones(ctas, np.int64)
        self._row_of = np.zeros((ctas, 0), np.int64)
        # The newest stamp of each actor of each cluster, anywhere: most checks end here.
        self._newest = np.zeros((ctas // cluster_size, 0), np.int64)

    def unseen(self, clusters: int | np.ndarray, known: np.ndarray) -> np.ndarray:
        """Actors with marks that a row of known is not behind: (actors,), or (n, actors) of clusters (n,)."""
        if not self._chunks:
            return np.zeros(0, np.int64)
        self._fit(known.shape[-1])
        behind = self._newest[clusters] > known
        return np.flatnonzero(behind if behind.ndim == 1 else behind.any(axis=0))

    def of(self, cta: int, actor: int) -> np.ndarray | None:
        """The flat marks of an actor, None if it has none in this CTA."""
        row = int(self._row_of[cta, actor])
        return self._row(row) if row else None

    def latest(self, groups: np.ndarray, each: int, actors: np.ndarray) -> np.ndarray:
        """(len(actors), m, each) the marks of actors at groups (m,) of `each` cells."""
        rows = self._row_of[groups * each >> self._bits, actors[:, None]]
        size = self._total // each
        if len(self._chunks) == 1:
            return self._chunks[0].reshape(-1, each).take(rows * size + groups, axis=0)
        found = np.zeros((*rows.shape, each), np.int64)
        places = rows % self._rows * size + groups
        for number, chunk in enumerate(self._chunks):
            here = rows // self._rows == number
            found[here] = chunk.reshape(-1, each)[places[here]]
        return found

    def note(self, cta: int, window: Window, actor: int, stamp: int, room: int) -> None:
        """One actor, of `room` at present, touches cells of one CTA."""
        self._fit(room)
        if not self._row_of[cta, actor]:
            self._add_rows(np.array([cta]), np.array([actor]))
        window.set(self._row(int(self._row_of[cta, actor])), stamp)
        self._newest[cta // self._cluster_size, actor] = stamp

    def note_each(
        self, groups: np.ndarray, each: int, actors: np.ndarray, stamps: np.ndarray, room: int
    ) -> None:
        """Actors (m,), of `room` at present, touch groups (m,) of `each` cells."""
        self._fit(room)
        ctas = groups * each >> self._bits
        rows = self._row_of[ctas, actors]
        if not rows.all():
            self._add_rows(ctas, actors)
            rows = self._row_of[ctas, actors]
        places = rows % self._rows * (self._total // each) + groups
        if len(self._chunks) == 1:
            self._chunks[0].reshape(-1, each)[places] = stamps[:, None]
        else:
            for number, chunk in enumerate(self._chunks):
                here = rows // self._rows == number
                chunk.reshape(-1, each)[places[here]] = stamps[here, None]
        self._newest[ctas // self._cluster_size, actors] = stamps

    def _row(self, row: int) -> np.ndarray:
        start = row % self._rows * self._total
        return self._chunks[row // self._rows][start : start + self._total]

    def _add_rows(self, ctas: np.ndarray, actors: np.ndarray) -> None:
        for cta, actor in set(zip(ctas.tolist(), actors.tolist(), strict=True)):
            if not self._row_of[cta, actor]:
                self._row_of[cta, actor] = self._used[cta]
                self._used[cta] += 1
        while len(self._chunks) * self._rows < self._used.max():
            self._chunks.append(np.zeros(self._rows * self._total, np.int64))

    def _fit(self, actors: int) -> None:
        missing = actors - self._row_of.shape[1]
        if missing:
            self._row_of = np.pad(self._row_of, ((0, 0), (0, missing)))
            self._newest = np.pad(self._newest, ((0, 0), (0, missing)))
