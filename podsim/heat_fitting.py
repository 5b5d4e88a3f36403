"""Fits how work lowers the clock (`podsim.heat`) to whole steps timed from rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    "overlap": (0.0, 2.0, 0.4, 0.2),
    "balanced_overlap": (0.0, 2.0, 0.3, 0.2),
    "idle": (0.0, 1.0, 0.1, 0.0),
    "seconds": (0.005, 0.3, 0.05, 0.03),
    "rest": (0.0, 0.3, 0.1, 0.05),
    "least": (0.0, 0.3, 0.1, 0.05),
    "at_once": (0.0, 0.3, 0.1, 0.05),
    "follows": (0.5, 1.2, 0.9, 1.0),
    "longer": (0.0, 0.03, 0.003, 0.006),
    "at_limit": (0.01, 0.3, 0.05, 0.1),
    "lower": (0.0, 0.2, 0.04, 0.03),
    "timed": (0.0, 1.0, 0.7, 0.4),
}
"""Of a `Warming`: the least and the most that a number may be, and where the two searches begin, of
which the better end counts."""
OF_OTHER_CARDS = {
    **{"attention": 0.277, "decodes": 0.17, "overlap": 0.556, "balanced_overlap": 0.324},
    **{"idle": 0.127, "rest": 0.082, "least": 0.052, "at_once": 0.141, "follows": 0.869},
    **{"longer": 0.004, "seconds": 0.052, "at_limit": 0.096, "lower": 0.041, "timed": 0.478},
}
"""Medians of nine H200s (`benchmarks/heat_table.py validation/h200/*/profile`), for profiles whose
steps tell too little: all of them for those without steps of decodes between others (`--quick`); of
those whose steps hardly overlap,"""
LEAST_OVERLAP = 0.01
BESIDE = {"overlap": "overlapped", "balanced_overlap": "balanced"}
WITHOUT_LONG = (*BESIDE, "decodes")
"""which are medians of six, as short contexts hardly tell them (each overlap is told by its own
share, decodes by either); and, of those from before clocks were read,"""
WITHOUT_CLOCKS = (*WITHOUT_LONG, "idle", "at_once", "follows", "longer", "timed")
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
    beyond: float = 0.0
    """See `TimedStep`."""
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
    """Of a duty, such as "1 in 4": one step in so many has prefill. Else how it is timed."""
    between: float = 0.0
    """Seconds of steps of decodes alone after them,"""
    in_a_row: int = 1
    """and how many steps with prefill there are before."""

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
    beyond: float = 0.0
    """By how much the layers of so many tokens are timed lower than those of numbers near."""

    def drive(self, warming: Warming) -> Drive:
        return warming.drive(self.num_tokens, self.shares, self.beyond)


def fit_heating(runs: Sequence[SustainedRun], steps: Sequence[TimedStep] = ()) -> Warming:
    """Falls, and how fast they come: the least relative errors of the windows' steps, of their
    clocks where these were read, and of the clocks of other whole steps.
    """
    from scipy.optimize import least_squares  # takes half a second to load, and only fits need it

    known = _known(runs, steps)
    searched = [name for name in SEARCHED if name not in known]
    watched = sorted({run.num_tokens for run in runs if run.is_watched})
    courses = _Courses(runs)
    seconds = np.concatenate([run.seconds for run in runs])
    unread = [[math.nan] * len(run.ends) for run in runs]
    clocks = np.concatenate([run.falls or nan for run, nan in zip(runs, unread, strict=True)])
    course_alone = _windows_of_inexact(runs)

    def warming(parameters: Floats) -> Warming:
        values = parameters.tolist()
        found = dict(zip(searched, values, strict=False))
        falls = dict(zip(watched, values[len(searched) :], strict=True))
        return Warming(products_at=falls, **{**found, **known})

    def residuals(parameters: Floats) -> Floats:
        found = warming(parameters)
        predicted_seconds, falls = courses.means(found)
        logs = np.log(predicted_seconds / seconds)
        for windows in course_alone:
            logs[windows] -= np.nanmean(logs[windows])
        settled = [found.fall_as_timed(step.drive(found)) - step.fall for step in steps]
        together: Floats = np.concatenate([logs, falls - clocks, settled])
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


def _windows_of_inexact(runs: Sequence[SustainedRun]) -> list[slice]:
    """Of batches of which only the course counts."""
    found, first = [], 0
    for _, some in groupby(runs, key=lambda run: run.batch):
        batch = list(some)
        last = first + sum(len(run.ends) for run in batch)
        found += [] if batch[0].is_exact else [slice(first, last)]
        first = last
    return found


def _known(runs: Sequence[SustainedRun], steps: Sequence[TimedStep]) -> dict[str, float]:
    if not any(run.between for run in runs):
        return OF_OTHER_CARDS
    untold: Sequence[str] = WITHOUT_CLOCKS
    if steps and any(run.falls for run in runs):
        most = {share: max(getattr(run.shares, share) for run in runs) for share in BESIDE.values()}
        untold = [name for name, share in BESIDE.items() if most[share] <= LEAST_OVERLAP]
        untold += ["decodes"] if len(untold) == len(BESIDE) else []
    return {name: OF_OTHER_CARDS[name] for name in untold}


def predicted(run: SustainedRun, warming: Warming) -> Floats:
    """Of a run's windows, the mean seconds of its steps' layers.

    NaN where decodes alone take a whole window.
    """
    return _Courses([run]).means(warming)[0]


class _Courses:
    """Runs side by side, each a row of cells."""

    def __init__(self, runs: Sequence[SustainedRun]) -> None:
        self._runs = runs
        cells = np.arange(round(max(run.ends[-1] for run in runs) / CELL), dtype=np.float64) * CELL
        self._share = np.array([run.share(cells) for run in runs])
        sizes = [len(run.ends) + 1 for run in runs]  # with a window for what comes after the end
        firsts = np.cumsum([0, *sizes])
        ended = [np.searchsorted(run.ends, cells + CELL / 2) for run in runs]
        self._window = (np.array(ended) + firsts[:-1, None]).ravel()
        self._windows = np.delete(np.arange(firsts[-1]), firsts[1:] - 1)
        self._worked = np.bincount(self._window, self._share.ravel(), firsts[-1])[self._windows]
        self._worked[self._worked == 0.0] = np.nan
        each = [len(run.ends) for run in runs]
        self._layers = np.repeat([run.layers for run in runs], each)
        self._clocked = np.repeat([run.clocked for run in runs], each)
        self._row_falls = np.array([[run.row_fall] for run in runs])

    def means(self, warming: Warming) -> tuple[Floats, Floats]:
        """Of all windows of all runs, mean seconds of the steps' layers, and falls of the clock."""
        falls = self._falls(warming)
        slower = self._means_of(np.expm1(falls - self._row_falls))
        longer = warming.longer + warming.follows * slower
        return self._layers + self._clocked * longer, self._means_of(falls)

    def _means_of(self, values: Floats) -> Floats:
        """In windows, weighted by the share of steps with prefill; NaN where there are none."""
        sums = np.bincount(self._window, (self._share * values).ravel())
        return np.asarray(sums[self._windows] / self._worked)

    def _falls(self, warming: Warming) -> Floats:
        drives = [warming.drive(run.num_tokens, run.shares, run.beyond) for run in self._runs]
        driven, at_once = (np.array(column)[:, None] for column in zip(*drives, strict=True))
        # Above the rest, from which a run begins.
        beyond = _heats(self._share * (driven - warming.rest), warming.seconds)
        limited = _smooth(beyond / warming.at_limit)
        low, high = HALF
        for_long = _smooth((_heats(limited, SECOND) - low) / (high - low))
        falls = warming.rest + beyond + warming.lower * for_long * limited
        return np.asarray(np.maximum(falls, at_once))


def _smooth(part: Floats) -> Floats:
    """`podsim.heat.smooth` of many."""
    part = np.clip(part, 0.0, 1.0)
    return part * part * (3.0 - 2.0 * part)


def _heats(drives: Floats, tau: float) -> Floats:
    """Of each cell of each row the mean of its heat, which is 0 at first."""
    from scipy.signal import lfilter

    kept = np.exp(-CELL / tau)
    ends = lfilter([1 - kept], [1, -kept], drives)
    before = np.concatenate([np.zeros((len(ends), 1)), ends[:, :-1]], axis=1)
    return np.asarray((before + ends) / 2)
