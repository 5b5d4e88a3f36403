"""The search for the highest load of one deployment and one seed, trial after trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.latency import LatencyModel
from podsim.result_row import result_row
from podsim.simulation import MakeScheduler, Result, simulate, workload_trace
from podsim.slo import QUEUE_GROWS, Slo
from podsim.workload import Trace

PRECISION = 0.025
MAX_STEPS = 20  # of doubling, or of halving
AT_ONCE = 1e-3
"""Where arrivals take less than this share of a trial, a higher load is the same."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulation of a search."""

    purpose: str
    """bracket, bisect, length (twice the requests), or load (a load that was asked for)."""
    seed: int
    num_requests: int
    qps: float
    missed: tuple[str, ...]
    """The SLOs that were not met, and "queue grows" (see `slo.queue_grows`)."""
    values: tuple[float, ...]
    """The value of each SLO's statistic, in seconds."""
    row: Mapping[str, float]
    """See `result_row.ROW_COLUMNS`."""
    at_once: bool
    """Whether arrivals were so fast that a higher load is the same."""
    alone: bool
    """Whether no two requests were served together, so that a lower load is the same."""

    @property
    def passed(self) -> bool:
        return not self.missed


@dataclass(frozen=True, slots=True)
class SeedCapacity:
    """The search with one seed."""

    seed: int
    qps: float
    """The highest load that passed; 0 if none did."""
    failed_qps: float
    """The lowest load that failed; infinite if none did."""
    trials: tuple[Trial, ...]

    @property
    def limited_by(self) -> tuple[str, ...]:
        """What the lowest load that failed did not meet."""
        return next((t.missed for t in self.trials if t.qps == self.failed_qps), ())

    @property
    def best(self) -> Trial | None:
        """The trial at the capacity."""
        return next((t for t in self.trials if t.passed and t.qps == self.qps), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched: one deployment and one seed."""

    variant: str
    requests: Workload | Trace
    deployment: Deployment
    slos: tuple[Slo, ...]
    seed: int
    num_requests: int
    start: float = 1.0
    precision: float = PRECISION
    latency_model: LatencyModel | None = None
    scheduler: MakeScheduler | None = None
    loads: tuple[float, ...] = ()
    """In place of the bisection: trials at these loads, for this purpose."""
    purpose: str = "load"

    def trial(self, purpose: str, qps: float) -> Trial:
        """One simulation at a load."""
        trace = self.trace(qps)
        result = simulate(
            trace,
            self.deployment,
            latency_model=self.latency_model,
            scheduler=self.scheduler,
        )
        row = result_row(result, self.slos)
        if not row["completed"]:
            reason = result.requests["refused"][0]
            raise InputError(f"{self.variant or 'capacity'}: every request is refused: {reason}")
        requests = result.requests
        values = tuple(slo.value(result, requests) for slo in self.slos)
        met = zip(self.slos, values, strict=True)
        missed = [f"{slo.metric} {slo.statistic}" for slo, value in met if value > slo.limit]
        return Trial(
            purpose=purpose,
            seed=self.seed,
            num_requests=len(trace),
            qps=qps,
            missed=(*missed, *([QUEUE_GROWS] if row["queue_grows"] else [])),
            values=values,
            row=row,
            at_once=trace.duration < AT_ONCE * row["duration_s"],
            alone=_alone(result),
        )

    def trace(self, qps: float) -> Trace:
        """The requests of a trial."""
        if isinstance(self.requests, Trace):
            return self.requests.head(self.num_requests).at_rate(qps)
        return workload_trace(
            replace(self.requests, qps=qps, seed=self.seed, requests=self.num_requests)
        )


def _alone(result: Result) -> bool:
    steps = result.steps
    return bool((steps["num_running"] <= 1).all()) and not steps["num_waiting"].any()


def search(task: Search) -> SeedCapacity:
    """Double or halve the load until it is bracketed, then bisect."""
    trials: list[Trial] = []

    def passes(purpose: str, qps: float) -> bool:
        trials.append(task.trial(purpose, qps))
        return trials[-1].passed

    low, high = _bracket(passes, trials, task.start)
    while low > 0 and high < math.inf and high - low > task.precision * low:
        middle = (low + high) / 2
        low, high = (middle, high) if passes("bisect", middle) else (low, middle)
    return SeedCapacity(task.seed, low, high, tuple(trials))


def _bracket(
    passes: Callable[[str, float], bool], trials: Sequence[Trial], start: float
) -> tuple[float, float]:
    """A load that passes and one that fails: (0, x) if none passes, (x, inf) if none fails."""
    qps = start
    if passes("bracket", qps):
        for _ in range(MAX_STEPS):
            if trials[-1].at_once:
                break
            qps *= 2
            if not passes("bracket", qps):
                return qps / 2, qps
        return qps, math.inf
    for _ in range(MAX_STEPS):
        if trials[-1].alone:
            break
        qps /= 2
        if passes("bracket", qps):
            return qps, qps * 2
    return 0.0, qps


def at_loads(task: Search) -> tuple[Trial, ...]:
    """A trial at each of the task's loads."""
    return tuple(task.trial(task.purpose, qps) for qps in task.loads)
