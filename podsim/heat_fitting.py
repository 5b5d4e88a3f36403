"""Fits how work lowers the clock (`podsim.heat`) to whole steps timed from rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from podsim.heat import Heats, Shares, Warming
from podsim.row_clocks import TO_THE_BOTTOM

Floats = NDArray[np.float64]

CELL = 0.005
"""Seconds in which a heat is taken to move in a straight line."""
ERROR_OF_A_WINDOW = 0.01
"""Relative errors below it count by their square, larger ones by their size."""
BOUNDS = {
    **{"products": (0.0, 2.0), "attention": (0.0, 2.0), "decodes": (0.0, 1.0), "idle": (0.0, 1.0)},
    **{"seconds": (0.005, 0.3), "slow_seconds": (0.3, 10.0), "slow_share": (0.0, 0.9)},
    **{"rest": (0.0, 0.3), "least": (0.0, 0.3)},
}
WITHOUT_CLOCKS = {"decodes": 0.22, "idle": 0.17}
"""Times alone hardly tell these, as decodes and rests are short in the steps that are watched. Of
two H200s whose clocks were read meanwhile; for profiles from before they were."""
GUESSES = (
    (0.4, 0.5, 0.2, 0.1, 0.05, 1.0, 0.2, 0.1, 0.1),
    (0.3, 0.4, 0.1, 0.0, 0.03, 0.6, 0.1, 0.05, 0.05),
)
"""Where the search begins; the better end counts."""


@dataclass(frozen=True, kw_only=True)
class SustainedRun:
    """Equal steps with prefill one after another from rest, or with decodes alone between them."""

    batch: str
    """Runs of one batch stand side by side."""
    num_tokens: int
    layers: float
    """Seconds of a step's layers at the clocks that their parts are timed at,"""
    clocked: float
    """of which so many go with the clock,"""
    row_fall: float
    """as which the parts are timed at this fall."""
    shares: Shares
    ends: Sequence[float]
    """Seconds at which windows end, the first of which begins with the run."""
    seconds: Sequence[float]
    """Mean of the layers of a step with prefill of each window,"""
    falls: Sequence[float] = ()
    """and fall of the clock, if it was read; NaN where a window has none."""
    is_exact: bool = True
    """Whether matrix products of so many tokens were timed; else what the steps of a batch have
    in common says nothing."""
    is_watched: bool = False
    """Whether its number of tokens gets a fall of its own: its steps are of prefill alone."""
    split: str = ""
    """Of a duty, such as "1 in 4": one step in so many has prefill."""
    between: float = 0.0
    """Seconds of steps of decodes alone after them,"""
    in_a_row: int = 1
    """and how many steps with prefill there are before."""
    decodes: Sequence[float] = ()
    """Mean step of decodes alone of each window, if there are any."""
    decode_products: float = 0.0
    """Seconds of the matrix products of such a step."""

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
            return np.asarray(np.floor(time / each) * row + np.minimum(time % each, row))

        return (worked(cells + CELL) - worked(cells)) / CELL


class TimedStep(NamedTuple):
    """A whole step with prefill, timed in a long row of such steps."""

    num_tokens: int
    shares: Shares
    fall: float
    """As which it was timed."""


def fit_heating(runs: Sequence[SustainedRun], steps: Sequence[TimedStep] = ()) -> Warming:
    """Falls, time constants and shares: the least relative errors of the windows' steps, of their
    clocks where these were read, and of the clocks of other whole steps.
    """
    from scipy.optimize import least_squares  # takes half a second to load, and only fits need it

    found_before = {} if any(run.falls for run in runs) else WITHOUT_CLOCKS
    watched = sorted({run.num_tokens for run in runs if run.is_watched})
    batches = [list(some) for _, some in groupby(runs, key=lambda run: run.batch)]

    def warming(parameters: Floats) -> Warming:
        values = parameters.tolist()
        falls = dict(zip(watched, values[len(BOUNDS) :], strict=True))
        names = dict(zip(BOUNDS, values, strict=False))
        return Warming(products_at=falls, **{**names, **found_before})

    def residuals(parameters: Floats) -> Floats:
        found = warming(parameters)
        errors = []
        for batch in batches:
            logs = np.concatenate([np.log(predicted(run, found) / run.seconds) for run in batch])
            logs = logs[np.isfinite(logs)]
            errors.append(logs if batch[0].is_exact else logs - logs.mean())
            errors += [_mean_falls(run, found) - run.falls for run in batch if run.falls]
        errors.append(np.array([_settled(step, found) - step.fall for step in steps]))
        together: Floats = np.concatenate(errors)
        return np.asarray(together[np.isfinite(together)])

    every = [*BOUNDS.values(), *(BOUNDS["products"] for _ in watched)]
    lowest, highest = zip(*every, strict=True)
    searches = [
        least_squares(
            residuals,
            guess + (guess[0],) * len(watched),
            bounds=(lowest, highest),
            loss="soft_l1",
            f_scale=ERROR_OF_A_WINDOW,
            **TO_THE_BOTTOM,
        )
        for guess in GUESSES
    ]
    return warming(min(searches, key=lambda found: found.cost).x)


def _settled(step: TimedStep, warming: Warming) -> float:
    drive = warming.drive(step.num_tokens, step.shares)
    return warming.fall(Heats(drive, drive))


def predicted(run: SustainedRun, warming: Warming) -> Floats:
    """Of a run's windows, the mean seconds of its steps' layers.

    NaN where decodes alone take a whole window.
    """
    share, falls, window = _course(run, warming)
    slower = _window_means(run, np.expm1(falls - run.row_fall), share, window)
    return np.asarray(run.layers + run.clocked * slower)


def _mean_falls(run: SustainedRun, warming: Warming) -> Floats:
    """The same of the clock."""
    share, falls, window = _course(run, warming)
    return _window_means(run, falls, share, window)


def _window_means(
    run: SustainedRun, values: Floats, share: Floats, window: NDArray[np.int64]
) -> Floats:
    """Of cells' values, weighted by the share of steps with prefill; NaN where there are none."""
    weights = np.bincount(window, share, len(run.ends))
    weights[weights == 0.0] = np.nan
    return np.asarray(np.bincount(window, share * values, len(run.ends)) / weights)


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
            x.append(more * (coolest - run.decode_products))
            y.append(np.asarray(run.decodes) - coolest - more * run.decode_products)
    if not x:
        return 0.0
    added, longer = np.concatenate(x), np.concatenate(y)
    return min(max(float(added @ longer / (added @ added)), 0.0), 1.0)


def _left_in_decodes(run: SustainedRun, warming: Warming) -> Floats:
    """Of a run's windows: what heats add to the clocked part of steps of decodes, as a share."""
    share, falls, window = _course(run, warming)
    rest = 1.0 - share
    weights = np.maximum(np.bincount(window, rest, len(run.ends)), 1e-12)
    added = np.expm1(falls - warming.fall(warming.at_rest))
    return np.asarray(np.bincount(window, rest * added, len(run.ends)) / weights)


def _course(run: SustainedRun, warming: Warming) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Of cells of a run: the share of steps with prefill, the fall, and the window."""
    share, window = run.course
    # Above the rest, from which a run begins.
    drives = share * (warming.drive(run.num_tokens, run.shares) - warming.rest)
    slow = warming.slow_share
    falls = warming.rest + (1.0 - slow) * _heats(drives, warming.seconds)
    falls += slow * _heats(drives, warming.slow_seconds)
    falls = np.maximum(falls, warming.least)
    return share, falls, window


def _heats(drives: Floats, tau: float) -> Floats:
    """Of each cell the mean of its heat, which is 0 at first."""
    from scipy.signal import lfilter

    kept = np.exp(-CELL / tau)
    ends = lfilter([1 - kept], [1, -kept], drives)
    return np.asarray((np.concatenate([[0.0], ends[:-1]]) + ends) / 2)
