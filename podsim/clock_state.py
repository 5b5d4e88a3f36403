"""Rows of a measurement that were timed while something outside held the card's clock down.

A card draws its power from a host that it shares. For a minute or more its SMs can run 15 % slower
under the same work than before and after; kernels that compute take as much longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from podsim.profile_journal import Row, key_of

WINDOW = 81
"""Rows in a row whose median tells the state: single clocks scatter by 5 % and more."""
LOWER = 0.04
"""How far, as a logarithm, the clock is below that of the points' other passes."""


def refuse_held_down(rows: Sequence[Row]) -> list[Row]:
    """The rows, in the order they were timed; refused where the clock was held down for a while.

    A row is kept if no other pass of its point was timed with a free clock.
    """
    clocks = [_clock(row) for row in rows]
    partners = _partners(rows)
    held = _held_down(clocks, partners)
    found = list(rows)
    for i, others in enumerate(partners):
        free = [j for j in others if not held[j]]
        if held[i] and free and not rows[i]["refused"]:
            reason = (
                f"the SM clock was held at {clocks[i]:.0f} MHz for a while, "
                f"{clocks[free[0]]:.0f} in the other pass"
            )
            found[i] = {**rows[i], "refused": reason}
    return found


def _clock(row: Row) -> float:
    text = row["sm_clock_mhz"]
    return float(text) if text else math.nan


def _partners(rows: Sequence[Row]) -> list[list[int]]:
    """Of each row, the other passes of its point."""
    points: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        points.setdefault(key_of(row), []).append(i)
    return [[j for j in points[key_of(row)] if j != i] for i, row in enumerate(rows)]


def _held_down(clocks: Sequence[float], partners: Sequence[Sequence[int]]) -> list[bool]:
    below = [
        math.log(clock / max(clock, *(clocks[j] for j in others))) if others else math.nan
        for clock, others in zip(clocks, partners, strict=True)
    ]
    median = pd.Series(below).rolling(WINDOW, center=True, min_periods=WINDOW // 4).median()
    return [value < -LOWER for value in median]  # false where there is no median
