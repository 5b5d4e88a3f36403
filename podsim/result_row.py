"""One run as one flat row of numbers: what sweeps and capacity searches keep of a simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from podsim import metrics
from podsim.config import Deployment
from podsim.simulation import Result
from podsim.slo import METRICS, Slo, goodput, queue_grows, slo_attainment

STATISTICS = ("mean", "p50", "p90", "p99")

ROW_COLUMNS = (
    "gpus",
    *(f"{name}_{statistic}_s" for name in METRICS for statistic in STATISTICS),
    *("request_throughput", "output_throughput", "total_token_throughput"),
    *("goodput", "slo_attainment"),
    *("completed", "refused", "preemptions", "duration_s"),
    *("busy_share", "kv_used_max", "queue_grows", "outside_measured_share", "uncalibrated"),
)
"""Seconds where the name says `_s`, throughput and goodput a second, shares of 1, counts; 1 or 0
where loads are more than can be served, and where nobody measured the GPU.
"""


def num_gpus(deployment: Deployment) -> int:
    """GPUs of all replicas."""
    return deployment.replicas * deployment.tensor_parallel_size


def result_row(result: Result, slos: Sequence[Slo] = ()) -> dict[str, float]:
    """The numbers of ROW_COLUMNS; goodput and slo_attainment are NaN without SLOs."""
    requests, log = result.requests, result.log
    served = requests[requests["refused"] == ""]
    duration = float(served["finish_time"].max()) if len(served) else 0.0
    per_second = 1 / duration if duration else 0.0
    inputs, outputs = (int(served[f"num_{n}_tokens"].sum()) for n in ("prompt", "output"))
    latency = metrics.latencies(log, requests)
    steps = log.steps
    busy = float(np.asarray(steps["duration"]).sum()) * per_second / result.deployment.replicas
    used = np.asarray(steps["num_used_blocks"]).max(initial=0) / result.num_blocks
    values = [
        num_gpus(result.deployment),
        *(latency[name][statistic] for name in METRICS.values() for statistic in STATISTICS),
        *(n * per_second for n in (len(served), outputs, inputs + outputs)),
        *((goodput(requests, slos), slo_attainment(requests, slos)) if slos else (np.nan,) * 2),
        *(len(served), len(requests) - len(served), sum(log.requests["num_preemptions"])),
        *(duration, busy, used, int(queue_grows(requests))),
        *(result.outside_measured_share, int(result.uncalibrated is not None)),
    ]
    return dict(zip(ROW_COLUMNS, map(float, values), strict=True))
