"""Capacity: the highest load that meets the SLOs, by bisection on whole simulations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict, TypeVar, Unpack

import numpy as np
import pandas as pd

from podsim.capacity_search import PRECISION, Search, SeedCapacity, Trial, at_loads, search
from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.latency import LatencyModel
from podsim.result_row import num_gpus
from podsim.simulation import MakeScheduler
from podsim.slo import STRICT, Slo, default_slos
from podsim.workers import Died, in_processes
from podsim.workload import Trace

NUM_REQUESTS = 2048
"""Of a trial, as in Sarathi-Serve's search."""
NUM_SEEDS = 5
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Capacity:
    """The capacity of one deployment: each seed's, their mean, and how sure that is."""

    variant: str
    deployment: Deployment
    slos: tuple[Slo, ...]
    precision: float
    num_requests: int
    seeds: tuple[SeedCapacity, ...]
    length_trials: tuple[Trial, ...]
    """At two precisions below the mean, with twice the requests; empty if there are no more."""

    @cached_property
    def mean(self) -> float:
        """Requests/s, over the seeds."""
        return float(np.mean([seed.qps for seed in self.seeds]))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean over seeds, by Student's t; None of a single seed.

        It spans from below the mean of the loads that passed to above that of those that failed:
        the search tells no more of a seed than that its capacity lies between the two.
        """
        if len(self.seeds) < 2:
            return None
        from scipy.special import stdtrit

        values = [seed.qps for seed in self.seeds]
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
        failed = float(np.mean([seed.failed_qps for seed in self.seeds]))
        return max(self.mean - half, 0.0), failed + half

    @property
    def per_gpu(self) -> float:
        return self.mean / num_gpus(self.deployment)

    @property
    def goodput(self) -> float:
        """Requests/s that meet all per-request limits at each seed's capacity, their mean."""
        return float(np.mean([s.best.row["goodput"] if s.best else 0.0 for s in self.seeds]))

    @property
    def limited_by(self) -> str:
        """What fails above the capacity, most frequent first."""
        found = [what for seed in self.seeds for what in seed.limited_by]
        return ", ".join(sorted(dict.fromkeys(found), key=lambda what: -found.count(what)))

    @property
    def warnings(self) -> list[str]:
        """Why the numbers should be read with care."""
        lines = []
        if any(seed.qps == 0 for seed in self.seeds):
            lines.append("no load meets the SLOs, not even one request at a time")
        if any(math.isinf(seed.failed_qps) for seed in self.seeds):
            lines.append(
                f"{self.num_requests} requests all at once meet the SLOs: they do not bound the "
                "load, ask for more requests"
            )
        if refused := max(trial.row["refused"] for trial in self.trials):
            lines.append(f"{refused:.0f} requests of a trial are refused, too long at any load")
        return lines + self._length_warnings()

    def _length_warnings(self) -> list[str]:
        if self.mean == 0:
            return []
        if not self.length_trials:
            return ["the trace has no more requests, so the effect of their number is not known"]
        failed = sum(not trial.passed for trial in self.length_trials)
        if 2 * failed < len(self.length_trials):
            return []
        qps = self.length_trials[0].qps
        return [
            f"the capacity depends on the length of a trial: with {2 * self.num_requests} requests "
            f"{failed} of {len(self.length_trials)} seeds fail at {qps:.4g} requests/s; ask for "
            "more requests"
        ]

    @property
    def trials(self) -> list[Trial]:
        return [*(t for seed in self.seeds for t in seed.trials), *self.length_trials]

    def description(self) -> dict[str, object]:
        """The result as plain values; loads in requests/s."""
        return {
            "mean": self.mean,
            "interval": self.interval,
            "seeds": [seed.qps for seed in self.seeds],
            "goodput": self.goodput,
            "per_gpu": self.per_gpu,
            "slos": [str(slo) for slo in self.slos],
            "limited_by": self.limited_by,
            "uncalibrated": any(trial.row["uncalibrated"] for trial in self.trials),
            "warnings": self.warnings,
        }

    def table(self) -> pd.DataFrame:
        """One row a simulation."""
        return trial_table(self.variant, self.slos, self.trials)


def trial_table(variant: str, slos: Sequence[Slo], trials: Sequence[Trial]) -> pd.DataFrame:
    """One row a trial: what it was for, its load, whether it passed, and its numbers."""
    rows = [
        {
            "variant": variant,
            "slos": " ".join(map(str, slos)),
            "purpose": trial.purpose,
            "seed": trial.seed,
            "requests": trial.num_requests,
            "qps": trial.qps,
            "passed": trial.passed,
            "missed": ", ".join(trial.missed),
            **trial.row,
        }
        for trial in trials
    ]
    return pd.DataFrame(rows)


class TrialOptions(TypedDict, total=False):
    """What trials are made of, whichever loads they are at."""

    slos: Sequence[Slo]
    """Limits; without any, Sarathi-Serve's (see `slo.default_slos`)."""
    iterations: float
    """Of decode, that Sarathi-Serve's limit on TBT is long: 5 (strict) or 25 (relaxed)."""
    seeds: int
    """How many, from the workload's own on. A replay of a trace's own arrivals has one."""
    num_requests: int
    """Of a trial; default: the workload's, or 2048."""
    latency_model: LatencyModel
    scheduler: MakeScheduler
    """As for `simulate`."""


def find_capacity(
    requests: Workload | Trace,
    deployment: Deployment,
    *,
    precision: float = PRECISION,
    start: float | None = None,
    jobs: int = 1,
    **trials: Unpack[TrialOptions],
) -> Capacity:
    """The capacity of one deployment; see `find_capacities`."""
    variants = {"": deployment}
    found = find_capacities(
        requests, variants, precision=precision, start=start, jobs=jobs, **trials
    )
    return found[""]


def find_capacities(
    requests: Workload | Trace,
    variants: Mapping[str, Deployment],
    *,
    precision: float = PRECISION,
    start: float | None = None,
    jobs: int = 1,
    on_search: Callable[[str], None] | None = None,
    **trials: Unpack[TrialOptions],
) -> dict[str, Capacity]:
    """The highest load of each variant that meets the SLOs and at which the queue does not grow.

    precision: the lowest load that failed is at most this share above the highest that passed.
    start: the first load, in requests/s; default: the workload's qps, or 1 a replica. on_search is
    told the variant of each search that is finished. InputError for a workload without a rate.
    """
    if not 0 < precision <= 0.25:
        raise InputError(f"precision is {precision:g}, expected above 0, at most 0.25")
    tasks = [
        replace(task, precision=precision, start=_start(task, start))
        for task in _searches(requests, variants, trials)
    ]
    found: dict[str, list[SeedCapacity]] = {name: [] for name in variants}
    for task, result in _run(search, tasks, jobs):
        found[task.variant].append(result)
        if on_search is not None:
            on_search(task.variant)
    capacities = {
        task.variant: Capacity(
            variant=task.variant,
            deployment=task.deployment,
            slos=task.slos,
            precision=precision,
            num_requests=found[task.variant][0].trials[0].num_requests,
            seeds=tuple(sorted(found[task.variant], key=lambda result: result.seed)),
            length_trials=(),
        )
        for task in tasks
    }
    return _with_length_trials(capacities, tasks, jobs)


def measure_loads(
    requests: Workload | Trace,
    variants: Mapping[str, Deployment],
    loads: Sequence[float],
    *,
    jobs: int = 1,
    on_load: Callable[[str], None] | None = None,
    **trials: Unpack[TrialOptions],
) -> pd.DataFrame:
    """Goodput and latencies of each variant at given loads: one row a simulation; no search.

    on_load is told the variant of each simulation that is finished.
    """
    if not loads or not min(loads) > 0:
        raise InputError(f"loads are {list(loads)}, expected numbers above 0")
    tasks = [
        replace(task, loads=(qps,))
        for task in _searches(requests, variants, trials)
        for qps in loads
    ]
    order = {id(task): index for index, task in enumerate(tasks)}
    done = []
    for task, result in _run(at_loads, tasks, jobs):
        done.append((task, result))
        if on_load is not None:
            on_load(task.variant)
    done.sort(key=lambda pair: order[id(pair[0])])
    tables = [trial_table(task.variant, task.slos, trials) for task, trials in done]
    return pd.concat(tables, ignore_index=True)


def _searches(
    requests: Workload | Trace, variants: Mapping[str, Deployment], options: TrialOptions
) -> list[Search]:
    """A search for each variant and seed."""
    if not variants:
        raise InputError("no deployment to search the capacity of")
    seeds = options.get("seeds", NUM_SEEDS)
    if seeds < 1:
        raise InputError(f"seeds is {seeds}, expected at least 1")
    num_requests, first_seed = None, 0
    if isinstance(requests, Workload):
        _check_workload(requests)
        num_requests, first_seed = requests.requests, requests.seed
    if isinstance(requests, Trace) or requests.arrivals is None:
        seeds = 1  # a replay has nothing random
    model = options.get("latency_model")
    iterations = options.get("iterations", STRICT)
    return [
        Search(
            variant=name,
            requests=requests,
            deployment=deployment,
            slos=tuple(options.get("slos", ())) or default_slos(deployment, model, iterations),
            seed=first_seed + i,
            num_requests=options.get("num_requests") or num_requests or NUM_REQUESTS,
            latency_model=model,
            scheduler=options.get("scheduler"),
        )
        for name, deployment in variants.items()
        for i in range(seeds)
    ]


def _check_workload(workload: Workload) -> None:
    if workload.arrivals == "static":
        raise InputError("arrivals 'static' have no rate: a capacity needs poisson or others")
    for name, instead in (("rate_scale", "qps, where the search starts"), ("duration", "requests")):
        if getattr(workload, name) is not None:
            raise InputError(f"{name} has no meaning in a search of the load; give {instead}")


def _start(task: Search, start: float | None) -> float:
    if start is None and isinstance(task.requests, Workload):
        start = task.requests.qps
    start = float(task.deployment.replicas) if start is None else start
    if not start > 0:
        raise InputError(f"start is {start:g}, expected requests/s above 0")
    return start


Found = TypeVar("Found")


def _run(
    function: Callable[[Search], Found], tasks: Sequence[Search], jobs: int
) -> Iterator[tuple[Search, Found]]:
    for task, result in in_processes(function, tasks, min(jobs, len(tasks))):
        if isinstance(result, Died):
            raise InputError(f"{task.variant}, seed {task.seed}: {result}")
        yield task, result


def _with_length_trials(
    capacities: Mapping[str, Capacity], tasks: Sequence[Search], jobs: int
) -> dict[str, Capacity]:
    """Look whether trials of twice the length would have given lower capacities."""
    longer = []
    for task in tasks:
        found = capacities[task.variant]
        doubled = replace(
            task,
            num_requests=2 * found.num_requests,
            loads=(found.mean * (1 - 2 * found.precision),),
            purpose="length",
        )
        if found.mean > 0 and len(doubled.trace(1.0)) == doubled.num_requests:
            longer.append(doubled)
    trials: dict[str, list[Trial]] = {name: [] for name in capacities}
    if longer:
        for task, results in _run(at_loads, longer, jobs):
            trials[task.variant] += results
    return {
        name: replace(found, length_trials=tuple(sorted(trials[name], key=lambda t: t.seed)))
        for name, found in capacities.items()
    }
