"""Service-level objectives: what a load must meet, and which requests meet them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from podsim import metrics
from podsim.batch import BatchShape
from podsim.config import Deployment, require_name
from podsim.errors import InputError
from podsim.latency import LatencyModel
from podsim.model import model_named
from podsim.simulation import Result, latency_model_for

METRICS = {
    "ttft": "ttft",
    "tbt": "tbt",
    "tpot": "tpot",
    "e2e": "e2e_latency",
    "queue": "queue_time",
}
"""The names of an SLO and of the tables. All but TBT have one value a request."""

STRICT, RELAXED = 5.0, 25.0
"""Sarathi-Serve's limits on TBT, in decode iterations (arXiv 2403.02310, table 3)."""
MEDIAN_QUEUE_TIME = 2.0
"""Seconds: Sarathi-Serve's limit on the median scheduling delay."""
DECODE_BATCH, DECODE_CONTEXT = 32, 4096
"""The decode iteration that those limits are multiples of."""

QUEUE_GROWS = "queue grows"


@dataclass(frozen=True, slots=True)
class Slo:
    """A limit in seconds on a statistic of a latency metric."""

    metric: str
    """A key of METRICS."""
    statistic: str
    """"mean", or a percentile: "p99"."""
    limit: float

    def __post_init__(self) -> None:
        require_name(f"SLO '{self}': unknown metric", self.metric, METRICS)
        if self.statistic != "mean" and not 0 <= self._percentile() <= 100:
            raise InputError(f"SLO '{self}': statistic is '{self.statistic}', expected mean or p99")
        if not 0 < self.limit < math.inf:
            raise InputError(f"SLO '{self}': limit is {self.limit:g}, expected seconds above 0")

    def __str__(self) -> str:
        return f"{self.metric}:{self.statistic}:{self.limit:.4g}"

    def _percentile(self) -> float:
        try:
            return float(self.statistic.removeprefix("p")) if self.statistic[:1] == "p" else -1.0
        except ValueError:
            return -1.0

    def value(self, result: Result, requests: pd.DataFrame) -> float:
        """The statistic of a run, whose `requests` table is given; NaN if there is no sample."""
        if self.metric == "tbt":
            values, counts = np.asarray(result.log.gap_duration), np.asarray(result.log.gap_count)
        else:
            values = requests[METRICS[self.metric]].dropna().to_numpy(dtype=np.float64)
            counts = np.ones(len(values), dtype=np.int64)
        if len(values) == 0:
            return math.nan
        if self.statistic == "mean":
            return float(np.average(values, weights=counts))
        return float(metrics.weighted_percentiles(values, counts, [self._percentile()])[0])


def parse_slo(text: str) -> Slo:
    """An SLO written METRIC:STATISTIC:SECONDS, such as ttft:p99:2.0. InputError if it is not."""
    parts = text.strip().split(":")
    try:
        metric, statistic, limit = parts[0], parts[1], float(parts[2])
    except (IndexError, ValueError):
        parts = []
    if len(parts) != 3:
        raise InputError(f"SLO '{text}': expected METRIC:STATISTIC:SECONDS, such as ttft:p99:2.0")
    return Slo(metric, statistic, limit)


def default_slos(
    deployment: Deployment, latency_model: LatencyModel | None = None, iterations: float = STRICT
) -> tuple[Slo, Slo]:
    """Those of Sarathi-Serve: P99 TBT of at most `iterations` decode iterations of 32 requests
    with 4K tokens each on this deployment, and a median queue time of at most 2 s.
    """
    model = latency_model or latency_model_for(deployment, model_named(deployment.model))
    shape = BatchShape.of(decode_contexts=[DECODE_CONTEXT] * DECODE_BATCH)
    iteration = model.step_time(shape)
    return Slo("tbt", "p99", iterations * iteration), Slo("queue", "p50", MEDIAN_QUEUE_TIME)


def slo_attainment(requests: pd.DataFrame, slos: Sequence[Slo]) -> float:
    """The share of requests that meet every per-request limit; a refused one meets none.

    The limits are those of the SLOs, of each metric the widest, whatever the statistic; TBT has no
    value of a request, and so no part in this. A metric without a value (TPOT of one token) is met.
    """
    limits: dict[str, float] = {}
    for slo in slos:
        if slo.metric != "tbt":
            limits[slo.metric] = max(slo.limit, limits.get(slo.metric, 0.0))
    met = (requests["refused"] == "").to_numpy()
    for metric, limit in limits.items():
        met = met & ~(requests[METRICS[metric]] > limit).to_numpy()
    return float(met.mean())


def goodput(requests: pd.DataFrame, slos: Sequence[Slo]) -> float:
    """Requests/s that meet every per-request limit, from the first arrival to the last token."""
    end = requests["finish_time"].max()
    if not end > 0:
        return 0.0
    return slo_attainment(requests, slos) * len(requests) / float(end)


def queue_grows(requests: pd.DataFrame) -> bool:
    """Whether the load is more than the deployment can serve, however long its users would wait.

    True if the requests that wait for their first step are more at the last arrival than at the
    middle one by over two standard deviations of a Poisson count of the arrivals in between.
    """
    served = requests[requests["refused"] == ""]
    arrivals, starts = (np.sort(served[c].to_numpy()) for c in ("arrival_time", "scheduled_time"))
    half = len(arrivals) // 2
    if half == 0:
        return False
    at = arrivals[[half - 1, -1]]
    waiting = np.searchsorted(arrivals, at, "right") - np.searchsorted(starts, at, "right")
    return bool(waiting[1] - waiting[0] > 2 * math.sqrt(len(arrivals) - half))
