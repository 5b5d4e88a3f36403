"""Fits how matrix work slows later steps down (`podsim.heat`) to steps timed from rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from podsim.heat import Warming
from podsim.row_clocks import TO_THE_BOTTOM

Floats = NDArray[np.float64]

SLOW_FROM = 0.3
"""Seconds: the time constant of the fast heat is below it, that of the slow one above."""
CELL = 0.002
"""Seconds in which a heat is taken to move in a straight line."""
FIRST_GUESS = (0.2, 0.05, 0.05, 1.0, 0.05)
LEAST = (0.0, 0.005, 0.0, SLOW_FROM, 0.0)
MOST = (10.0, SLOW_FROM, 10.0, 10.0, 2.0)


@dataclass(frozen=True)
class SustainedRun:
    """Equal steps with prefill one after another from rest, or with decodes alone between them."""

    batch: str
    """Runs of one batch take the same time after a rest; they stand side by side."""
    load: float
    drive: float
    ends: Sequence[float]
    """Seconds at which windows end, the first of which begins with the run."""
    seconds: Sequence[float]
    """Mean step with prefill of each window."""
    between: float = 0.0
    """Seconds of steps of decodes alone after them,"""
    in_a_row: int = 1
    """and how many steps with prefill there are before."""
    decodes: Sequence[float] = ()
    """Mean step of decodes alone of each window, if there are any."""
    products: float = 0.0
    """Seconds of the matrix products of such a step."""
    split: str = ""
    """Of a duty, such as "1 in 4": one step in so many has prefill."""
    expected: float = 0.0
    """A step with prefill as operations are timed, after some 0.1 s of their own work."""

    @cached_property
    def course(self) -> tuple[Floats, NDArray[np.int64]]:
        """Of cells of CELL seconds from the start: the share of steps with prefill, the window."""
        cells = np.arange(round(self.ends[-1] / CELL), dtype=np.float64) * CELL
        return self.share(cells), np.searchsorted(self.ends, cells + CELL / 2)

    def share(self, cells: Floats) -> Floats:
        """Of cells from the run's start, how much steps with prefill take."""
        row = self.in_a_row * float(np.mean(self.seconds))
        each = row + self.between

        def worked(time: Floats) -> Floats:
            whole, part = np.divmod(time, each)
            return np.asarray(whole * row + np.minimum(part, row))

        return (worked(cells + CELL) - worked(cells)) / CELL


def fit_heating(runs: Sequence[SustainedRun]) -> Warming:
    """What heats add to a step, their time constants, the headroom: least squares of logarithms.

    Without runs that have decodes between their steps nothing tells the headroom: it is 0 then.
    """
    from scipy.optimize import least_squares  # takes half a second to load, and only fits need it

    free = 5 if any(run.between for run in runs) else 4
    batches = [list(some) for _, some in groupby(runs, key=lambda run: run.batch)]

    def residuals(parameters: Floats) -> Floats:
        warming = Warming(*parameters.tolist())
        found = []
        for batch in batches:
            at_rest = [np.log(run.seconds) - np.log(slowdowns(run, warming)) for run in batch]
            logs = np.concatenate(at_rest)
            logs = logs[np.isfinite(logs)]
            found.append(logs - logs.mean())
        return np.concatenate(found)

    bounds = (LEAST[:free], MOST[:free])
    found = least_squares(residuals, FIRST_GUESS[:free], bounds=bounds, **TO_THE_BOTTOM)
    return Warming(*(float(value) for value in found.x))


def slowdowns(run: SustainedRun, warming: Warming) -> Floats:
    """Of a run's windows: the mean time of its steps' layers over that after a long rest.

    NaN where decodes alone take a whole window.
    """
    share, added, window = _course(run, warming)
    weights = np.bincount(window, share, len(run.ends))
    weights[weights == 0.0] = np.nan
    return np.asarray(1 + run.load * np.bincount(window, share * added, len(run.ends)) / weights)


def fit_clock_share(runs: Sequence[SustainedRun], warming: Warming) -> float:
    """Of the seconds of a step of decodes alone that are no matrix products, the share that goes
    with the clock.

    Least squares of how much longer such steps take after bursts, steps with prefill in a row, than
    where there is hardly any, with the same decodes. Without bursts nothing tells: it is 0 then.
    """
    batches = [list(some) for _, some in groupby(runs, key=lambda run: run.batch)]
    x, y = [], []
    for batch in batches:
        bursts = [run for run in batch if run.in_a_row > 1]
        quiet = [run for run in batch if run.in_a_row == 1 and run.decodes]
        if not bursts or not quiet:
            continue
        base = max(quiet, key=lambda run: run.between)
        coolest = float(np.mean(base.decodes))
        for run in bursts:
            more = _left_in_decodes(run, warming) - _left_in_decodes(base, warming).mean()
            x.append(more * (coolest - run.products))
            y.append(np.asarray(run.decodes) - coolest - more * run.products)
    if not x:
        return 0.0
    added, longer = np.concatenate(x), np.concatenate(y)
    return min(max(float(added @ longer / (added @ added)), 0.0), 1.0)


def _left_in_decodes(run: SustainedRun, warming: Warming) -> Floats:
    """Of a run's windows: what heats add to the clocked part of steps of decodes, as a share."""
    share, added, window = _course(run, warming)
    rest = 1.0 - share
    weights = np.maximum(np.bincount(window, rest, len(run.ends)), 1e-12)
    return np.asarray(np.bincount(window, rest * added, len(run.ends)) / weights)


def _course(run: SustainedRun, warming: Warming) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Of cells of a run: the share of steps with prefill, what heats add, and the window."""
    share, window = run.course
    drives = share * run.drive - (1 - share) * warming.headroom
    added = warming.heating * _heats(drives, warming.seconds, warming)
    added += warming.slow_heating * _heats(drives, warming.slow_seconds, warming)
    return share, added, window


def _heats(drives: Floats, tau: float, warming: Warming) -> Floats:
    """Of each cell its heat, as far as it slows steps down: see `Warming.factor`."""
    from scipy.signal import lfilter

    kept = np.exp(-CELL / tau)
    start = warming.at_rest.fast
    ends, _ = lfilter([1 - kept], [1, -kept], drives, zi=[kept * start])
    starts = np.concatenate([[start], ends[:-1]])
    # The mean of a line's part above 0 is smooth in the parameters, also where the line crosses 0.
    low, high = np.minimum(starts, ends), np.maximum(starts, ends)
    rise = np.maximum(high - low, 1e-300)
    above = np.maximum(high, 0.0)
    return np.asarray(np.where(low < 0.0, above * (above / rise), low + high) / 2)
