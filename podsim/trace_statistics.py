"""Statistics of a trace: arrivals, lengths, prefixes and sessions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from podsim.trace_prefix import lru_hit_blocks, prefix_statistics
from podsim.workload_trace import Trace

Statistics = dict[str, float | None]


def inspect_trace(trace: Trace, cache_blocks: Sequence[int] = ()) -> dict[str, object]:
    """What there is to know of a trace, ready for JSON: seconds, tokens, requests/s, shares.

    A part that the trace has nothing for (arrivals, prefix, sessions) is None. lru: the hits of
    least-recently-used caches of so many blocks each.
    """
    return {
        "name": trace.name,
        "format": trace.format,
        "requests": len(trace),
        "rows_read": trace.rows_read,
        "dropped": dict(trace.dropped),
        "notes": list(trace.notes),
        "sha256": trace.sha256,
        "arrivals": arrival_statistics(trace) if trace.has_times else None,
        "prompt_tokens": length_statistics(trace.num_prompt_tokens),
        "output_tokens": length_statistics(trace.num_output_tokens),
        "length_correlation": _correlation(trace.num_prompt_tokens, trace.num_output_tokens),
        "prefix": prefix_statistics(trace),
        "lru": {str(n): lru_hit_blocks(trace.hash_ids or (), n) for n in cache_blocks} or None,
        "sessions": session_statistics(trace),
    }


def arrival_statistics(trace: Trace) -> Statistics:
    """When requests arrive. None for what a single moment does not have.

    rate is requests / duration. iat_cv: standard deviation / mean of the gaps. idc_1s: variance /
    mean of the counts in whole seconds from the first arrival on; 1 for Poisson arrivals. Minutes
    count from the first arrival too; the last one is not whole.
    """
    times = trace.arrival_time
    gaps = np.diff(times)
    duration = trace.duration
    counts = _runs(np.floor(times))
    minutes = _runs(np.floor(times / 60))
    empty_minutes = int(times[-1] // 60) + 1 - len(minutes)
    # Most seconds of a long trace may be empty: they are counted, not held.
    mean = len(times) / (np.floor(times[-1]) + 1)
    variance = (counts.astype(np.float64) ** 2).sum() / (np.floor(times[-1]) + 1) - mean**2
    return {
        "duration": duration,
        "rate": len(trace) / duration if duration > 0 else None,
        "iat_cv": float(gaps.std() / gaps.mean()) if duration > 0 else None,
        "idc_1s": float(variance / mean),
        "max_in_1s": int(counts.max()),
        "per_minute_min": 0 if empty_minutes else int(minutes.min()),
        "per_minute_max": int(minutes.max()),
        "empty_minutes": empty_minutes,
        "longest_gap": float(gaps.max()) if len(gaps) else None,
        "distinct_times": len(_runs(times)),
    }


def _runs(ordered: NDArray[np.float64]) -> NDArray[np.int64]:
    """How often each value occurs, in order."""
    starts = np.flatnonzero(np.diff(ordered, prepend=-1.0))
    return np.diff(starts, append=len(ordered))


def length_statistics(lengths: NDArray[np.int64]) -> Statistics:
    """Tokens: mean, quantiles and sum."""
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99]).tolist()
    return {
        "mean": float(lengths.mean()),
        "min": int(lengths.min()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": int(lengths.max()),
        "sum": int(lengths.sum()),
    }


def _correlation(prompts: NDArray[np.int64], outputs: NDArray[np.int64]) -> float | None:
    if prompts.min() == prompts.max() or outputs.min() == outputs.max():
        return None
    # In place: np.corrcoef would hold several copies of both.
    x, y = prompts - prompts.mean(), outputs - outputs.mean()
    return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


def session_statistics(trace: Trace) -> Statistics | None:
    """Turns of the sessions, and think times in seconds; None if the trace has no sessions."""
    if trace.session_id is None:
        return None
    _, turns = np.unique(trace.session_id[trace.session_id >= 0], return_counts=True)
    statistics: Statistics = {
        "sessions": len(turns),
        "requests_without": int((trace.session_id < 0).sum()),
        "turns_mean": float(turns.mean()) if len(turns) else None,
        "turns_max": int(turns.max()) if len(turns) else None,
    }
    think = np.empty(0) if trace.think_time is None else trace.think_time
    think = think[~np.isnan(think)]
    if len(think):
        p50, p99 = np.percentile(think, [50, 99]).tolist()
        statistics |= {"think_mean": float(think.mean()), "think_p50": p50, "think_p99": p99}
    return statistics
