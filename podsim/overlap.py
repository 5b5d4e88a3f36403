"""How much of a mixed batch's two sides runs at the same time: a table, linear between its knots.

A strategy takes launch costs and a share of the time that its sides would take one after the
other. The share depends on how much of that time is prefill, on how busy the prefill alone would
keep the SMs, and on how many waves of prefill tiles there are: one table over the first and the
second, plus one over the first and the third.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Of the sides' time, that of the prefill."""
BUSY = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Share of the SMs' time that the prefill works."""
WAVES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Prefill tiles an SM."""

Table = Sequence[Sequence[float]]
Place = tuple[int, float]


@dataclass(frozen=True, slots=True)
class Overlap:
    """The two tables of a strategy: a row for each of SHARES."""

    by_busy: Table
    by_waves: Table

    @classmethod
    def of(cls, values: Mapping[str, Table]) -> Overlap:
        return cls(values["by_busy"], values["by_waves"])

    def at(self, share: float, busy: Place, waves: Place) -> float:
        """Of the sides' time, what the batch takes."""
        i, part = place(SHARES, share)
        j, busy_part = busy
        k, waves_part = waves
        low, high = self.by_busy[i], self.by_busy[i + 1]
        low_too, high_too = self.by_waves[i], self.by_waves[i + 1]
        first = low[j] + busy_part * (low[j + 1] - low[j])
        first += low_too[k] + waves_part * (low_too[k + 1] - low_too[k])
        second = high[j] + busy_part * (high[j + 1] - high[j])
        second += high_too[k] + waves_part * (high_too[k + 1] - high_too[k])
        return first + part * (second - first)


def place(knots: Sequence[float], at: float) -> Place:
    """The knot before `at` and the part of the way to the next; the ends hold beyond them."""
    if at >= knots[-1]:
        return len(knots) - 2, 1.0
    i = bisect_right(knots, at) - 1
    return i, (at - knots[i]) / (knots[i + 1] - knots[i])


def hats(knots: Sequence[float], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., knots]: the weights of the values at the knots in `between`."""
    return np.stack(
        [np.interp(at, knots, row) for row in np.eye(len(knots))],
        axis=-1,
    )


def table_weights(
    share: NDArray[np.float64], busy: NDArray[np.float64], waves: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[batches, cells]: the weights of both tables' cells, one table after the other."""
    shares = hats(SHARES, share)
    return np.concatenate(
        [
            (shares[:, :, None] * hats(knots, at)[:, None, :]).reshape(len(share), -1)
            for knots, at in ((BUSY, busy), (WAVES, waves))
        ],
        axis=1,
    )


def roughness() -> NDArray[np.float64]:
    """[pairs, cells]: the differences of neighbouring cells of both tables."""
    sizes = [len(BUSY), len(WAVES)]
    numbers = np.split(np.arange(len(SHARES) * sum(sizes)), [len(SHARES) * sizes[0]])
    pairs: list[tuple[int, int]] = []
    for cells, columns in zip(numbers, sizes, strict=True):
        grid = cells.reshape(len(SHARES), columns)
        pairs += zip(grid[1:].ravel().tolist(), grid[:-1].ravel().tolist(), strict=True)
        pairs += zip(grid[:, 1:].ravel().tolist(), grid[:, :-1].ravel().tolist(), strict=True)
    rows = np.zeros((len(pairs), len(SHARES) * sum(sizes)))
    later, earlier = np.array(pairs).T
    rows[np.arange(len(pairs)), later] = 1.0
    rows[np.arange(len(pairs)), earlier] = -1.0
    return rows


def longer_side() -> NDArray[np.float64]:
    """[cells]: of the sides' time, that of the longer one; the table by waves has none of it."""
    shares = np.array(SHARES)
    longer = np.maximum(shares, 1 - shares)
    return np.concatenate([np.repeat(longer, len(BUSY)), np.zeros(len(SHARES) * len(WAVES))])


def tables(cells: NDArray[np.float64]) -> dict[str, list[list[float]]]:
    """The two tables of the cells that `table_weights` weighs."""
    parts = np.split(cells, [len(SHARES) * len(BUSY)])
    return {
        name: part.reshape(len(SHARES), -1).round(6).tolist()
        for name, part in zip(("by_busy", "by_waves"), parts, strict=True)
    }
