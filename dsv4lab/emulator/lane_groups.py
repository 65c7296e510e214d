"""Lanes of a row that say the same: mostly all of them, and then they are handled as one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# What lanes say, and which they are: (32,) bool.
Group = tuple[tuple[int, ...], np.ndarray]


def groups(mask: np.ndarray, *values: np.ndarray) -> Iterator[tuple[int, list[Group]]]:
    """For each row with lanes in the mask: the row, and its lanes by what they say, lowest lane first.

    Args:
        mask: (n, 32) bool.
        values: (n, 32) integers each.
    """
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return
    lanes = mask if len(rows) == len(mask) else mask[rows]
    lowest = lanes.argmax(1)
    alike = np.ones(len(rows), np.bool_)
    firsts = []
    for value in values:
        first = value[rows, lowest]
        firsts.append(first.tolist())
        if any(value.strides):
            alike &= ((value[rows] == first[:, None]) | ~lanes).all(1)
    for row, here, same, *said in zip(rows.tolist(), lanes, alike.tolist(), *firsts, strict=True):
        yield row, [(tuple(said), here)] if same else _parted(here, [value[row] for value in values])


def _parted(here: np.ndarray, values: list[np.ndarray]) -> list[Group]:
    found: dict[tuple[int, ...], np.ndarray] = {}
    for lane in np.flatnonzero(here).tolist():
        said = tuple(int(value[lane]) for value in values)
        found.setdefault(said, np.zeros(32, np.bool_))[lane] = True
    return list(found.items())
