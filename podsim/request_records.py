"""Per-request records that other tools read: lists of `vllm bench serve`, AIPerf's JSON lines."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping

import numpy as np
import pandas as pd

from podsim.simulation import Result

AIPERF_FILE = "profile_export.jsonl"


def detailed_lists(result: Result) -> dict[str, object]:
    """What `vllm bench serve --save-detailed` adds to its JSON, in seconds, requests in order.

    A refused request is a failed one: zeros, no gaps, and its reason in `errors`. The gaps of a
    request whose steps do not tell them (it was preempted) are an empty list.
    """
    requests = result.requests
    failed = (requests["refused"] != "").to_numpy()
    return {
        "input_lens": requests["num_prompt_tokens"].tolist(),
        "output_lens": requests["num_output_tokens"].where(~failed, 0).tolist(),
        "ttfts": requests["ttft"].fillna(0.0).tolist(),
        "itls": list(token_gaps(requests, result.steps)),
        "latencies": requests["e2e_latency"].fillna(0.0).tolist(),
        "start_times": requests["arrival_time"].tolist(),
        "errors": requests["refused"].tolist(),
    }


def token_gaps(requests: pd.DataFrame, steps: pd.DataFrame) -> Iterator[list[float]]:
    """Of each request: the seconds between its tokens, which came out of its replica's steps.

    Every step between its first and its last token gave it one, unless it was preempted: then
    the list is empty.
    """
    middles, ends = {}, {}
    for replica, of in steps.groupby("replica"):
        ends[replica] = (of["start"] + of["duration"]).to_numpy()
        middles[replica] = (of["start"] + of["duration"] / 2).to_numpy()
    columns = ("replica", "first_token_time", "finish_time", "num_output_tokens")
    rows = zip(*(requests[name].tolist() for name in columns), strict=True)
    for replica, first, last, num_tokens in rows:
        if not last > first:
            yield []
            continue
        begin, end = np.searchsorted(middles[replica], (first, last)) - 1
        told = end - begin == num_tokens - 1
        yield np.diff(ends[replica][begin : end + 1]).tolist() if told else []


def aiperf_lines(result: Result) -> Iterator[str]:
    """One JSON object a request, as in AIPerf's `profile_export.jsonl`; times from the start."""
    for row in result.requests.to_dict("records"):
        start = round(row["arrival_time"] * 1e9)
        refused = row["refused"]
        metadata = {
            "session_num": row["request_id"],
            "x_request_id": str(row["request_id"]),
            "turn_index": 0,
            "request_start_ns": start,
            "request_ack_ns": None,
            "request_end_ns": start if refused else round(row["finish_time"] * 1e9),
            "worker_id": "podsim" if refused else f"replica_{row['replica']}",
            "record_processor_id": "podsim",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            "cancellation_time_ns": None,
        }
        error = {"code": 400, "type": "RequestRefused", "message": refused} if refused else None
        metrics = _failed_metrics(row) if refused else _aiperf_metrics(row)
        record = {"metadata": metadata, "metrics": metrics, "error": error}
        yield json.dumps(record) + "\n"


def _failed_metrics(row: Mapping[Hashable, float]) -> dict[str, object]:
    return {"error_isl": _value(row["num_prompt_tokens"], "tokens")}


def _aiperf_metrics(row: Mapping[Hashable, float]) -> dict[str, object]:
    metrics: dict[str, object] = {
        "input_sequence_length": _value(row["num_prompt_tokens"], "tokens"),
        "output_sequence_length": _value(row["num_output_tokens"], "tokens"),
        "output_token_count": _value(row["num_output_tokens"], "tokens"),
        "time_to_first_token": _value(row["ttft"] * 1000, "ms"),
        "request_latency": _value(row["e2e_latency"] * 1000, "ms"),
    }
    if row["tpot"] > 0:
        metrics["inter_token_latency"] = _value(row["tpot"] * 1000, "ms")
        user = _value(1 / row["tpot"], "tokens/sec/user")
        metrics["output_token_throughput_per_user"] = user
    return metrics


def _value(value: float, unit: str) -> dict[str, object]:
    return {"value": value, "unit": unit}
