"""Fits how work lowers the clock (`podsim.heat`) to whole steps timed from rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from podsim.heat import HALF, SECOND, Drive, Shares, Warming
from podsim.row_clocks import TO_THE_BOTTOM

Floats = NDArray[np.float64]

CELL = 0.005
"""Seconds in which a heat is taken to move in a straight line."""
ERROR_OF_A_WINDOW = 0.01
"""Relative errors below it count by their square, larger ones by their size."""
SEARCHED = {
    "products": (0.0, 2.0, 0.4, 0.3),
    "attention": (0.0, 2.0, 0.5, 0.4),
    "decodes": (0.0, 1.0, 0.2, 0.1),
    "idle": (0.0, 1.0, 0.1, 0.0),
    "seconds": (0.005, 0.3, 0.05, 0.03),
    "rest": (0.0, 0.3, 0.1, 0.05),
    "least": (0.0, 0.3, 0.1, 0.05),
    "at_once": (0.0, 0.3, 0.1, 0.05),
    "follows": (0.5, 1.2, 0.9, 1.0),
    "at_limit": (0.01, 0.3, 0.05, 0.1),
    "lower": (0.0, 0.2, 0.04, 0.03),
    "timed": (0.0, 1.0, 0.7, 0.4),
}
"""Of a `Warming`: the least and the most that a number may be, and where the two searches begin, of
which the better end counts."""
OF_OTHER_CARDS = {
    **{"attention": 0.286, "decodes": 0.149, "idle": 0.117, "rest": 0.087, "least": 0.049},
    **{"at_once": 0.147, "follows": 0.87, "seconds": 0.048, "at_limit": 0.077, "lower": 0.042},
    **{"timed": 0.55},
}
"""Medians of seven H200s, for profiles whose steps tell too little: all of them for those without
steps of decodes between others (`--quick`), and, of those from before clocks were read,"""
WITHOUT_CLOCKS = ("decodes", "idle", "at_once", "follows", "timed")
"""which times alone hardly tell, as decodes and rests are short in the steps that are watched."""


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


class TimedStep(NamedTuple):
    """A whole step with prefill, timed in a long row of such steps."""

    num_tokens: int
    shares: Shares
    fall: float
    """As which it was timed."""

    def drive(self, warming: Warming) -> Drive:
        return warming.drive(self.num_tokens, self.shares)


def fit_heating(runs: Sequence[SustainedRun], steps: Sequence[TimedStep] = ()) -> Warming:
    """Falls, and how fast they come: the least relative errors of the windows' steps, of their
    clocks where these were read, and of the clocks of other whole steps.
    """
    from scipy.optimize import least_squares  # takes half a second to load, and only fits need it

    known = _known(runs, steps)
    searched = [name for name in SEARCHED if name not in known]
    watched = sorted({run.num_tokens for run in runs if run.is_watched})
    batches = [list(some) for _, some in groupby(runs, key=lambda run: run.batch)]

    def warming(parameters: Floats) -> Warming:
        values = parameters.tolist()
        found = dict(zip(searched, values, strict=False))
        falls = dict(zip(watched, values[len(searched) :], strict=True))
        return Warming(products_at=falls, **{**found, **known})

    def residuals(parameters: Floats) -> Floats:
        found = warming(parameters)
        errors = []
        for batch in batches:
            means = [(run, *_means(run, found)) for run in batch]
            logs = np.concatenate([np.log(seconds / run.seconds) for run, seconds, _ in means])
            logs = logs[np.isfinite(logs)]
            errors.append(logs if batch[0].is_exact else logs - logs.mean())
            errors += [falls - run.falls for run, _, falls in means if run.falls]
        settled = [found.fall_as_timed(step.drive(found)) - step.fall for step in steps]
        errors.append(np.array(settled))
        together: Floats = np.concatenate(errors)
        return np.asarray(together[np.isfinite(together)])

    every = [SEARCHED[name] for name in [*searched, *("products" for _ in watched)]]
    lowest, highest, *guesses = zip(*every, strict=True)
    searches = [
        least_squares(
            residuals,
            guess,
            bounds=(lowest, highest),
            loss="soft_l1",
            f_scale=ERROR_OF_A_WINDOW,
            **TO_THE_BOTTOM,
        )
        for guess in guesses
    ]
    return warming(min(searches, key=lambda found: found.cost).x)


def _known(runs: Sequence[SustainedRun], steps: Sequence[TimedStep]) -> dict[str, float]:
    if not any(run.between for run in runs):
        return OF_OTHER_CARDS
    if not steps or not any(run.falls for run in runs):
        return {name: OF_OTHER_CARDS[name] for name in WITHOUT_CLOCKS}
    return {}


def predicted(run: SustainedRun, warming: Warming) -> Floats:
    """Of a run's windows, the mean seconds of its steps' layers.

    NaN where decodes alone take a whole window.
    """
    return _means(run, warming)[0]


def _means(run: SustainedRun, warming: Warming) -> tuple[Floats, Floats]:
    """That, and the mean falls of the clock."""
    share, falls, window = _course(run, warming)
    slower = _window_means(run, np.expm1(falls - run.row_fall), share, window)
    seconds = run.layers + run.clocked * warming.follows * slower
    return seconds, _window_means(run, falls, share, window)


def _window_means(
    run: SustainedRun, values: Floats, share: Floats, window: NDArray[np.int64]
) -> Floats:
    """Of cells' values, weighted by the share of steps with prefill; NaN where there are none."""
    weights = np.bincount(window, share, len(run.ends))
    weights[weights == 0.0] = np.nan
    return np.asarray(np.bincount(window, share * values, len(run.ends)) / weights)


def _course(run: SustainedRun, warming: Warming) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Of cells of a run: the share of steps with prefill, the fall, and the window."""
    share, window = run.course
    drive = warming.drive(run.num_tokens, run.shares)
    # Above the rest, from which a run begins.
    beyond = _heats(share * (drive.fall - warming.rest), warming.seconds)
    limited = _smooth(beyond / warming.at_limit)
    low, high = HALF
    for_long = _smooth((_heats(limited, SECOND) - low) / (high - low))
    falls = warming.rest + beyond + warming.lower * for_long * limited
    return share, np.maximum(falls, drive.at_once), window


def _smooth(part: Floats) -> Floats:
    """`podsim.heat.smooth` of many."""
    part = np.clip(part, 0.0, 1.0)
    return part * part * (3.0 - 2.0 * part)


def _heats(drives: Floats, tau: float) -> Floats:
    """Of each cell the mean of its heat, which is 0 at first."""
    from scipy.signal import lfilter

    kept = np.exp(-CELL / tau)
    ends = lfilter([1 - kept], [1, -kept], drives)
    return np.asarray((np.concatenate([[0.0], ends[:-1]]) + ends) / 2)
