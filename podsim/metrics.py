"""Metrics: tables and headline numbers computed from an event log. Definitions: docs/metrics.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from podsim.event_log import EventLog
from podsim.trace_prefix import prefix_statistics

if TYPE_CHECKING:
    from podsim.simulation import Result

PERCENTILES = (50, 90, 99)

STEP_KINDS = ("prefill", "decode", "mixed")


def request_table(log: EventLog) -> pd.DataFrame:
    """One row a request, in order of arrival: times in seconds, NaN where something never happened.

    `refused` says why a request was not served, and is empty if it was.
    """
    table = pd.DataFrame({name: np.asarray(column) for name, column in log.requests.items()})
    table = table.sort_values("request_id", ignore_index=True)
    table["refused"] = [log.refused.get(request_id, "") for request_id in table["request_id"]]
    for name in ("scheduled_time", "first_token_time", "finish_time"):
        table[name] = table[name].where(table[name] >= 0)
    table["queue_time"] = table["scheduled_time"] - table["arrival_time"]
    table["ttft"] = table["first_token_time"] - table["arrival_time"]
    table["e2e_latency"] = table["finish_time"] - table["arrival_time"]
    gaps = table["num_output_tokens"] - 1
    table["tpot"] = ((table["e2e_latency"] - table["ttft"]) / gaps).where(gaps > 0)
    return table


def preemption_table(log: EventLog) -> pd.DataFrame:
    """One row a preemption: request_id, and time in seconds."""
    return pd.DataFrame(
        {"request_id": np.asarray(log.preempted_id), "time": np.asarray(log.preempted_time)}
    )


def step_table(log: EventLog) -> pd.DataFrame:
    """One row a step: `start` and `duration` in seconds, then tokens, requests and blocks."""
    return pd.DataFrame({name: np.asarray(column) for name, column in log.steps.items()})


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
    return float(np.bincount(end.astype(np.int64), tokens_out(steps, requests)).max())


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


def latencies(log: EventLog, requests: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The distribution of each latency metric, in seconds."""
    return {
        "ttft": distribution(requests["ttft"]),
        "tbt": distribution(log.gap_duration, log.gap_count),
        "tpot": distribution(requests["tpot"]),
        "e2e_latency": distribution(requests["e2e_latency"]),
        "queue_time": distribution(requests["queue_time"]),
    }


_VLLM_NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "tbt", "e2el": "e2e_latency"}


def summarize(result: Result) -> dict[str, object]:
    """Headline numbers of a run: `vllm bench serve` keys (ms), podsim's own under "podsim" (s)."""
    requests = result.requests
    served = requests[requests["refused"] == ""]
    latency = latencies(result.log, requests)
    duration = float(served["finish_time"].max()) if len(served) else 0.0
    input_tokens = int(served["num_prompt_tokens"].sum())
    output_tokens = int(served["num_output_tokens"].sum())
    per_second = 1 / duration if duration else 0.0
    qps = result.trace.qps
    summary: dict[str, object] = {
        "backend": "podsim",
        "model_id": result.deployment.model,
        "num_prompts": len(requests),
        "request_rate": "inf" if math.isinf(qps) else qps,
        "duration": duration,
        "completed": len(served),
        "failed": len(requests) - len(served),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(served) * per_second,
        "request_goodput": None,
        "output_throughput": output_tokens * per_second,
        "total_token_throughput": (input_tokens + output_tokens) * per_second,
        "max_output_tokens_per_s": max_output_tokens_per_s(result.steps, requests),
        "max_concurrent_requests": max_concurrent_requests(requests),
    }
    for vllm_name, name in _VLLM_NAMES.items():
        for statistic, value in latency[name].items():
            key = {"p50": "median"}.get(statistic, statistic)
            summary[f"{key}_{vllm_name}_ms"] = value * 1000
    summary["podsim"] = {
        **latency,
        **_use(result, duration),
        **_prefix_cache(result, served),
        "refused": requests.loc[requests["refused"] != "", "refused"].value_counts().to_dict(),
        "trace": _provenance(result),
    }
    return summary


def _use(result: Result, duration: float) -> dict[str, object]:
    """How busy the replicas were, weighted by time; preemptions."""
    steps = result.steps
    span = duration * result.deployment.replicas
    seconds = steps["duration"].to_numpy()
    used_share = steps["num_used_blocks"].to_numpy() / result.num_blocks
    batch = (steps["num_prefills"] + steps["num_decodes"]).to_numpy()
    mixed = (steps["num_prefills"] > 0) & (steps["num_decodes"] > 0)
    busy = float(seconds.sum())
    return {
        "num_steps": len(steps),
        "num_blocks": result.num_blocks,
        "busy_share": busy / span if span else 0.0,
        "mixed_step_share": float(seconds[mixed].sum()) / busy if busy else 0.0,
        "kv_used_mean": float(seconds @ used_share) / span if span else 0.0,
        "kv_used_max": float(used_share.max(initial=0.0)),
        "batch_size_mean": float(seconds @ batch) / busy if busy else 0.0,
        "batch_size_max": int(batch.max(initial=0)),
        "preemptions": int(sum(result.log.requests["num_preemptions"])),
    }


def _prefix_cache(result: Result, served: pd.DataFrame) -> dict[str, object]:
    """Prompt tokens found in the prefix cache, and what a cache without end would find."""
    if not result.deployment.prefix_caching:
        return {}
    prompt_tokens = int(served["num_prompt_tokens"].sum())
    ideal = prefix_statistics(result.trace)
    return {
        "prefix_hit_rate": int(served["num_cached_tokens"].sum()) / max(prompt_tokens, 1),
        "prefix_hit_rate_ideal": ideal["hit_tokens"] if ideal else float("nan"),
    }


def _provenance(result: Result) -> dict[str, object]:
    trace = result.trace
    return {
        "name": trace.name,
        "sha256": trace.sha256,
        "rows_read": trace.rows_read,
        "dropped": dict(trace.dropped),
        "notes": list(trace.notes),
    }
