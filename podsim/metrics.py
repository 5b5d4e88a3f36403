"""Metrics: tables and headline numbers computed from an event log. Definitions: docs/metrics.md."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from podsim.event_log import EventLog
from podsim.step_memory import StepMemory
from podsim.trace_prefix import prefix_statistics

if TYPE_CHECKING:
    from podsim.simulation import Result

PERCENTILES = (50, 90, 99)

LATENCIES = ("ttft", "tbt", "tpot", "e2e_latency", "queue_time")

STEP_KINDS = ("prefill", "decode", "mixed")


def request_table(log: EventLog) -> pd.DataFrame:
    """One row a request, in order of arrival: times in seconds, NaN where something never happened.

    `refused` says why a request was not served, and is empty if it was.
    """
    requests = log.requests  # arrays: pandas takes a millisecond for what they take microseconds
    order = np.argsort(requests["request_id"], kind="stable")
    columns: dict[str, Any] = {name: values[order] for name, values in requests.items()}
    columns["refused"] = [log.refused.get(i, "") for i in columns["request_id"].tolist()]
    for name in ("scheduled_time", "first_token_time", "finish_time"):
        columns[name] = np.where(columns[name] >= 0, columns[name], np.nan)
    columns["queue_time"] = columns["scheduled_time"] - columns["arrival_time"]
    columns["ttft"] = columns["first_token_time"] - columns["arrival_time"]
    columns["e2e_latency"] = columns["finish_time"] - columns["arrival_time"]
    gaps = np.where(columns["num_output_tokens"] > 1, columns["num_output_tokens"] - 1, np.nan)
    columns["tpot"] = (columns["e2e_latency"] - columns["ttft"]) / gaps
    return pd.DataFrame(columns)


def preemption_table(log: EventLog) -> pd.DataFrame:
    """One row a preemption: request_id, its time, and when the request was worked on again (s)."""
    return pd.DataFrame(
        {
            "request_id": np.asarray(log.preempted_id),
            "time": np.asarray(log.preempted_time),
            "resumed_time": np.asarray(log.resumed_time),
        }
    )


def step_table(log: EventLog) -> pd.DataFrame:
    """One row a step: `start` and `duration` in seconds, then tokens, requests and blocks."""
    return pd.DataFrame({name: np.asarray(column) for name, column in log.steps.items()})


def memory_table(memory: Sequence[StepMemory]) -> pd.DataFrame:
    """One row a batch at which something of a replica's memory changed."""
    tables = [
        pd.DataFrame({"replica": i, **{k: np.asarray(v) for k, v in m.log.columns.items()}})
        for i, m in enumerate(memory)
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def step_kinds(steps: pd.DataFrame) -> NDArray[np.int64]:
    """Of each step: the index of its kind in STEP_KINDS."""
    has_prefill = steps["num_prefills"].to_numpy() > 0
    has_decode = steps["num_decodes"].to_numpy() > 0
    return np.where(has_prefill, np.where(has_decode, 2, 0), 1)


def tokens_out(steps: pd.DataFrame, requests: pd.DataFrame) -> NDArray[np.int64]:
    """Of each step: the tokens that came out, one a decode and one a prompt that it completed.

    A prompt computed again after a preemption, whose last chunk emits too, is not counted.
    """
    emitted = steps["num_decodes"].to_numpy().copy()
    first = requests.dropna(subset=["first_token_time"])
    for replica, rows in first.groupby("replica"):
        index = np.flatnonzero(steps["replica"].to_numpy() == replica)
        start, duration = (steps[name].to_numpy()[index] for name in ("start", "duration"))
        # The step with this end: its middle is before the token, the middle of the next is not.
        step = np.searchsorted(start + duration / 2, rows["first_token_time"].to_numpy()) - 1
        np.add.at(emitted, index[step], 1)
    return emitted


def max_output_tokens_per_s(steps: pd.DataFrame, requests: pd.DataFrame) -> float:
    """The most tokens that came out in a whole second after the first arrival, as vLLM counts."""
    served = requests[requests["refused"] == ""]
    if served.empty or steps.empty:
        return 0.0
    end = (steps["start"] + steps["duration"]).to_numpy() - served["arrival_time"].min()
    _, second = np.unique(end.astype(np.int64), return_inverse=True)
    return float(np.bincount(second, tokens_out(steps, requests)).max())


def max_concurrent_requests(requests: pd.DataFrame) -> int:
    """The most requests between arrival and last token at once; one that ends makes room first."""
    served = requests[requests["refused"] == ""]
    times = np.concatenate([served["finish_time"], served["arrival_time"]])
    change = np.repeat([-1, 1], len(served))
    return int(np.cumsum(change[np.lexsort((change, times))]).max(initial=0))


def weighted_percentiles(
    values: ArrayLike, counts: ArrayLike, percentiles: ArrayLike
) -> NDArray[np.float64]:
    """`numpy.percentile` of each value repeated `count` times, without repeating it."""
    order = np.argsort(values, kind="stable")
    sorted_values = np.asarray(values, dtype=np.float64)[order]
    ends = np.cumsum(np.asarray(counts)[order])
    rank = (ends[-1] - 1) * np.asarray(percentiles, dtype=np.float64) / 100
    low = np.floor(rank).astype(np.int64)
    below = sorted_values[np.searchsorted(ends, low, side="right")]
    above = sorted_values[np.searchsorted(ends, np.minimum(low + 1, ends[-1] - 1), side="right")]
    return np.asarray(below + (above - below) * (rank - low))


def distribution(values: ArrayLike, counts: ArrayLike | None = None) -> dict[str, float]:
    """Mean, standard deviation and percentiles, skipping NaN; all NaN if there is nothing."""
    array = np.asarray(values, dtype=np.float64)
    weights = np.ones(array.size, dtype=np.int64) if counts is None else np.asarray(counts)
    array, weights = array[~np.isnan(array)], weights[~np.isnan(array)]
    if array.size == 0:
        return dict.fromkeys(["mean", "std", *(f"p{p}" for p in PERCENTILES)], float("nan"))
    mean = float(np.average(array, weights=weights))
    std = float(np.sqrt(np.average((array - mean) ** 2, weights=weights)))
    quantiles = weighted_percentiles(array, weights, PERCENTILES)
    names = [f"p{p}" for p in PERCENTILES]
    return {"mean": mean, "std": std, **dict(zip(names, map(float, quantiles), strict=True))}


def latencies(
    log: EventLog, requests: pd.DataFrame | Mapping[str, ArrayLike]
) -> dict[str, dict[str, float]]:
    """The distribution of each latency metric, in seconds, from the requests' columns."""
    return {
        "ttft": distribution(requests["ttft"]),
        "tbt": distribution(log.gap_duration, log.gap_count),
        "tpot": distribution(requests["tpot"]),
        "e2e_latency": distribution(requests["e2e_latency"]),
        "queue_time": distribution(requests["queue_time"]),
    }


_VLLM_NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "tbt", "e2el": "e2e_latency"}


Intervals = dict[str, tuple[float, float]]
"""Of a headline number, such as "ttft_p50" (seconds) or "request_throughput": low and high."""

_THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")


def intervals(summaries: Sequence[Mapping[str, object]]) -> Intervals:
    """About each headline number of the first run, what it spans over all; NaN without samples.

    Batches that happen to differ may move all other runs to one side: as far to the other then.
    """
    found: Intervals = {}
    for latency in LATENCIES:
        for statistic in ("mean", *(f"p{p}" for p in PERCENTILES)):
            values = [_own_number(summary, latency, statistic) for summary in summaries]
            found[f"{latency}_{statistic}"] = _about(values)
    for name in _THROUGHPUTS:
        values = [float(summary[name]) for summary in summaries]  # type: ignore[arg-type]
        found[name] = _about(values)
    return found


def _about(values: Sequence[float]) -> tuple[float, float]:
    first, low, high = values[0], min(values), max(values)
    if first == low:
        low = max(2 * first - high, 0.0)
    elif first == high:
        high = 2 * first - low
    return low, high


def _own_number(summary: Mapping[str, object], latency: str, statistic: str) -> float:
    own = summary["podsim"]
    assert isinstance(own, dict)
    return float(own[latency][statistic])


@dataclass(slots=True)
class RequestTotals:
    """What a summary needs of the requests: sums, and the latencies of each."""

    completed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finish_time: float = 0.0
    latencies: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in LATENCIES if name != "tbt"}
    )

    def add(self, requests: pd.DataFrame) -> None:
        """Requests of a table like `request_table`."""
        is_refused = requests["refused"] != ""
        self.refused.update(requests.loc[is_refused, "refused"].tolist())
        served = requests[~is_refused]
        self.completed += len(served)
        self.prompt_tokens += int(served["num_prompt_tokens"].sum())
        self.output_tokens += int(served["num_output_tokens"].sum())
        self.cached_tokens += int(served["num_cached_tokens"].sum())
        self.preemptions += int(served["num_preemptions"].sum())
        if len(served):
            self.finish_time = max(self.finish_time, float(served["finish_time"].max()))
        for name, values in self.latencies.items():
            values.extend(requests[name].tolist())


def summarize(result: Result) -> dict[str, object]:
    """Headline numbers of a run: `vllm bench serve` keys (ms), podsim's own under "podsim" (s)."""
    totals = result.streamed
    most_concurrent: int | None = None
    most_tokens: float | None = None
    if totals is None:
        requests = result.requests
        totals = RequestTotals()
        totals.add(requests)
        most_concurrent = max_concurrent_requests(requests)
        if result.log.keep_steps:
            most_tokens = max_output_tokens_per_s(result.steps, requests)
    latency = latencies(result.log, totals.latencies)
    duration = totals.finish_time
    refused = sum(totals.refused.values())
    per_second = 1 / duration if duration else 0.0
    qps = result.trace.qps
    summary: dict[str, object] = {
        "backend": "podsim",
        "model_id": result.deployment.model,
        "num_prompts": totals.completed + refused,
        "request_rate": "inf" if math.isinf(qps) else qps,
        "duration": duration,
        "completed": totals.completed,
        "failed": refused,
        "total_input_tokens": totals.prompt_tokens,
        "total_output_tokens": totals.output_tokens,
        "request_throughput": totals.completed * per_second,
        "request_goodput": None,
        "output_throughput": totals.output_tokens * per_second,
        "total_token_throughput": (totals.prompt_tokens + totals.output_tokens) * per_second,
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_concurrent,
    }
    for vllm_name, name in _VLLM_NAMES.items():
        for statistic, value in latency[name].items():
            key = {"p50": "median"}.get(statistic, statistic)
            summary[f"{key}_{vllm_name}_ms"] = value * 1000
    summary["podsim"] = {
        **latency,
        **_use(result, duration),
        "preemptions": totals.preemptions,
        **_prefix_cache(result, totals),
        **_memory(result),
        **({"intervals": result.intervals} if result.intervals else {}),
        "outside_measured_share": result.outside_measured_share,
        **({"uncalibrated": result.uncalibrated} if result.uncalibrated else {}),
        "notes": result.notes,
        "refused": dict(totals.refused.most_common()),
        "trace": _provenance(result),
    }
    return summary


def _use(result: Result, duration: float) -> dict[str, object]:
    """How busy the replicas were, weighted by time."""
    totals = result.log.step_totals()
    span = duration * result.deployment.replicas
    return {
        "num_steps": totals.num_steps,
        "num_blocks": result.num_blocks,
        "busy_share": totals.busy / span if span else 0.0,
        "mixed_step_share": totals.mixed / totals.busy if totals.busy else 0.0,
        "kv_used_mean": totals.used_blocks / result.num_blocks / span if span else 0.0,
        "kv_used_max": totals.max_used_blocks / result.num_blocks,
        "batch_size_mean": totals.batch / totals.busy if totals.busy else 0.0,
        "batch_size_max": totals.max_batch,
    }


def _prefix_cache(result: Result, totals: RequestTotals) -> dict[str, object]:
    """Prompt tokens found in the prefix cache, and what a cache without end would find."""
    if not result.deployment.prefix_caching:
        return {}
    ideal = prefix_statistics(result.trace)
    return {
        "prefix_hit_rate": totals.cached_tokens / max(totals.prompt_tokens, 1),
        "prefix_hit_rate_ideal": ideal["hit_tokens"] if ideal else float("nan"),
    }


def _memory(result: Result) -> dict[str, object]:
    """What the memory systems did: totals of the replicas, the largest of sizes and settings."""
    if not result.memory:
        return {}
    summaries = [memory.summary() for memory in result.memory]
    totals = {
        name: sum(s[name] for s in summaries) if is_total(name) else max(s[name] for s in summaries)
        for name in summaries[0]
    }
    return {"memory": {"kv": result.deployment.kv, **totals}}


def is_total(name: str) -> bool:
    """Whether a number of a memory system's summary adds up over replicas."""
    return name.endswith(("_steps", "_time", "_blocks", "_moved", "_requests", "_tokens"))


def _provenance(result: Result) -> dict[str, object]:
    trace = result.trace
    return {
        "name": trace.name,
        "sha256": trace.sha256,
        "rows_read": trace.rows_read,
        "dropped": dict(trace.dropped),
        "notes": list(trace.notes),
    }
