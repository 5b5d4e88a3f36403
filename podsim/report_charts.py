"""The charts of a report as data: binned series and distributions, in the units they are shown in.

A chart is drawn by report.js, which knows three types: `lines`, `areas` (stacked over time) and
`bars` (stacked, one bar a row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from podsim.config import Workload
from podsim.metrics import STEP_KINDS, step_kinds, weighted_percentiles
from podsim.simulation import Result
from podsim.step_costs import kernel_table

NUM_BINS = 120
CDF_PERCENTILES = np.concatenate([np.linspace(0, 99, 199), np.linspace(99.1, 100, 10)])
OVER_TIME = (50, 99)

Chart = dict[str, object]
Series = dict[str, object]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A result with its tables, which are made once."""

    name: str
    result: Result
    requests: pd.DataFrame
    steps: pd.DataFrame
    summary: Mapping[str, object]
    workload: Workload | None
    """The options its requests came from, if they came from options."""

    @classmethod
    def of(cls, name: str, result: Result, workload: Workload | None) -> Run:
        return cls(name, result, result.requests, result.steps, result.summary(), workload)

    @property
    def end(self) -> float:
        return float(self.requests["finish_time"].max()) if len(self.steps) else 0.0


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Every chart of the runs laid over each other; those that stack are one a run."""
    end = max(run.end for run in runs)
    edges = np.linspace(0, end if end > 0 else 1.0, NUM_BINS + 1)
    return [
        _cdf("cdf-ttft", "TTFT", runs, lambda run: (run.requests["ttft"], None)),
        _cdf("cdf-tbt", "TBT", runs, lambda run: (log_gaps(run), run.result.log.gap_count)),
        _cdf(
            "cdf-e2e", "End-to-end latency", runs, lambda run: (run.requests["e2e_latency"], None)
        ),
        _percentiles("ttft", "TTFT by time of arrival", runs, edges, _ttfts),
        _percentiles("tbt", "TBT over time", runs, edges, _tbts),
        *(_time_by_kind(run, i, edges, alone=len(runs) == 1) for i, run in enumerate(runs)),
        *(_tokens(run, i, edges, alone=len(runs) == 1) for i, run in enumerate(runs)),
        _requests_in_steps(runs, edges),
        _kv_blocks(runs, edges),
        *_kernels(runs),
    ]


def log_gaps(run: Run) -> ArrayLike:
    return run.result.log.gap_duration


# ---- distributions

Samples = Callable[[Run], tuple[ArrayLike, ArrayLike | None]]


def _cdf(key: str, label: str, runs: Sequence[Run], samples: Samples) -> Chart:
    points = {}
    for run in runs:
        values, counts = samples(run)
        array = np.asarray(values, dtype=np.float64)
        weights = np.ones(len(array), dtype=np.int64) if counts is None else np.asarray(counts)
        known = ~np.isnan(array)
        if known.any():
            points[run.name] = weighted_percentiles(array[known], weights[known], CDF_PERCENTILES)
    scale, unit = _unit(points.values())
    lines = [
        _line(name, points[name] * scale, CDF_PERCENTILES, colour)
        for colour, name in enumerate(run.name for run in runs)
        if name in points
    ]
    x = {"label": f"{label} ({unit})", "log": all(min(p) > 0 for p in points.values())}
    y = {"label": "% of requests" if key != "cdf-tbt" else "% of gaps", "max": 100}
    return _chart("lines", key, f"{label}: distribution", x, y, lines, legend=len(runs) > 1)


def _unit(values: Iterable[Floats]) -> tuple[float, str]:
    """Milliseconds where the median of everything is below a second."""
    array = np.concatenate([np.zeros(0), *(np.ravel(v) for v in values)])
    array = array[~np.isnan(array)]
    return (1.0, "s") if array.size and np.median(array) >= 1 else (1000.0, "ms")


# ---- over time

Weighted = Callable[[Run], tuple[Floats, Floats, NDArray[np.int64]]]


def _ttfts(run: Run) -> tuple[Floats, Floats, NDArray[np.int64]]:
    served = run.requests.dropna(subset=["ttft"])
    values = served["ttft"].to_numpy()
    return served["arrival_time"].to_numpy(), values, np.ones(len(values), dtype=np.int64)


def _tbts(run: Run) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """The gap of a decode is its step: exact but for gaps in which a request was preempted."""
    steps = run.steps[run.steps["num_decodes"] > 0]
    seconds = steps["duration"].to_numpy()
    return (steps["start"] + seconds).to_numpy(), seconds, steps["num_decodes"].to_numpy()


def _percentiles(key: str, title: str, runs: Sequence[Run], edges: Floats, of: Weighted) -> Chart:
    """P50 and P99 in bins of time, wide enough for about 20 samples each."""
    found = {}
    for run in runs:
        times, values, counts = of(run)
        num_bins = int(np.clip(len(values) // 20, 1, NUM_BINS))
        own = np.linspace(0, edges[-1], num_bins + 1)
        found[run.name] = own, _binned_percentiles(times, values, counts, own)
    scale, unit = _unit([table for _, table in found.values()])
    lines = []
    for i, (name, (own, table)) in enumerate(found.items()):
        for j, percentile in enumerate(OVER_TIME):
            label = f"P{percentile}" if len(runs) == 1 else f"{name} P{percentile}"
            colour = j if len(runs) == 1 else i
            lines.append(_line(label, _middles(own), table[j] * scale, colour, dashed=j > 0))
    y = {"label": f"{key.upper()} ({unit})"}
    return _chart("lines", key, title, _time_axis(edges), y, lines)


def _binned_percentiles(
    times: Floats, values: Floats, counts: NDArray[np.int64], edges: Floats
) -> Floats:
    table = np.full((len(OVER_TIME), len(edges) - 1), np.nan)
    order = np.argsort(times, kind="stable")
    values, counts = values[order], counts[order]
    cuts = np.searchsorted(times[order], edges[1:-1], side="right")
    for i, (low, high) in enumerate(zip([0, *cuts], [*cuts, len(values)], strict=True)):
        if high > low:
            table[:, i] = weighted_percentiles(values[low:high], counts[low:high], OVER_TIME)
    return table


def time_means(steps: pd.DataFrame, weights: Floats, edges: Floats) -> Floats:
    """In each bin of time: the mean of a quantity that each step holds while it runs, else 0.

    Summed over the replicas. Exact: a step that spans two bins counts in both.
    """
    mean = np.zeros(len(edges) - 1)
    for index in steps.groupby("replica").indices.values():
        start, seconds = (steps[name].to_numpy()[index] for name in ("start", "duration"))
        held = weights[index]
        before = np.concatenate([[0.0], np.cumsum(held * seconds)])
        step = np.searchsorted(start, edges, side="right") - 1
        current = np.maximum(step, 0)
        into = np.where(step < 0, 0.0, np.clip(edges - start[current], 0, seconds[current]))
        mean += np.diff(before[current] + held[current] * into) / np.diff(edges)
    return mean


def _time_by_kind(run: Run, index: int, edges: Floats, *, alone: bool) -> Chart:
    kinds = step_kinds(run.steps)
    replicas = run.result.deployment.replicas
    areas = []
    for i, kind in enumerate(STEP_KINDS):
        share = time_means(run.steps, (kinds == i).astype(float), edges) / replicas
        areas.append(_line(kind, _middles(edges), share * 100, kind))
    title = "Time of the replicas, by kind of step" + ("" if alone else f": {run.name}")
    y = {"label": "% of time", "max": 100}
    return _chart("areas", _numbered("kinds", index, alone), title, _time_axis(edges), y, areas)


def _tokens(run: Run, index: int, edges: Floats, *, alone: bool) -> Chart:
    steps = run.steps
    bins = np.clip(np.searchsorted(edges, steps["start"].to_numpy(), "right") - 1, 0, NUM_BINS - 1)
    num_steps = np.bincount(bins, minlength=NUM_BINS)
    areas = []
    for name, column in (("prefill", "num_prefill_tokens"), ("decode", "num_decodes")):
        total = np.bincount(bins, steps[column].to_numpy(), minlength=NUM_BINS)
        mean = np.divide(total, num_steps, out=np.zeros(NUM_BINS), where=num_steps > 0)
        areas.append(_line(f"{name} tokens", _middles(edges), mean, name))
    title = "Batch: mean tokens of a step" + ("" if alone else f": {run.name}")
    key = _numbered("tokens", index, alone)
    return _chart("areas", key, title, _time_axis(edges), {"label": "tokens"}, areas)


def _numbered(key: str, index: int, alone: bool) -> str:
    return key if alone else f"{key}-{index}"


def _requests_in_steps(runs: Sequence[Run], edges: Floats) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        for j, name in enumerate(("running", "waiting")):
            mean = time_means(run.steps, run.steps[f"num_{name}"].to_numpy(dtype=float), edges)
            label = name if len(runs) == 1 else f"{run.name} {name}"
            colour = j if len(runs) == 1 else i
            lines.append(_line(label, _middles(edges), mean, colour, dashed=j > 0))
    title = "Requests running and waiting, mean"
    return _chart("lines", "requests", title, _time_axis(edges), {"label": "requests"}, lines)


def _kv_blocks(runs: Sequence[Run], edges: Floats) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        used = run.steps["num_used_blocks"].to_numpy(dtype=float) / run.result.num_blocks * 100
        mean = time_means(run.steps, used, edges) / run.result.deployment.replicas
        start = run.steps["start"].to_numpy()
        bins = np.clip(np.searchsorted(edges, start, "right") - 1, 0, NUM_BINS - 1)
        most = np.zeros(NUM_BINS)
        np.maximum.at(most, bins, used)
        for j, (name, values) in enumerate((("mean", mean), ("max", most))):
            label = name if len(runs) == 1 else f"{run.name} {name}"
            colour = j if len(runs) == 1 else i
            lines.append(_line(label, _middles(edges), values, colour, dashed=j > 0))
    y = {"label": "% of the KV blocks"}
    return _chart("lines", "kv", "KV cache in use", _time_axis(edges), y, lines)


# ---- bars


def _kernels(runs: Sequence[Run]) -> list[Chart]:
    """Mean milliseconds of a step by kernel, a bar for each kind of step."""
    tables = {}
    for run in runs:
        table = kernel_table(run.result, run.steps, run.requests)
        if table is not None:
            kinds = step_kinds(run.steps)
            for i, kind in enumerate(STEP_KINDS):
                if kind in table:
                    label = kind if len(runs) == 1 else f"{kind}, {run.name}"
                    tables[i, label] = table[kind] / (kinds == i).sum() * 1000
    if not tables:
        return []
    rows = [label for _, label in sorted(tables, key=lambda key: key[0])]
    found = {label: column for (_, label), column in tables.items()}
    bars: list[Series] = []
    kernels = dict.fromkeys(name for column in found.values() for name in column.index)
    for colour, kernel in enumerate(kernels):
        values = [_rounded(float(found[row].get(kernel, 0.0))) for row in rows]
        bars.append({"name": str(kernel), "colour": colour, "values": values})
    title = "Mean step, by kernel"
    chart = _chart("bars", "kernels", title, {"label": "ms a step"}, {"rows": rows}, bars)
    return [chart]


# ---- shared


def _chart(
    type: str,
    key: str,
    title: str,
    x: Mapping[str, object],
    y: Mapping[str, object],
    series: Sequence[Series],
    *,
    legend: bool = True,
) -> Chart:
    return {
        **{"id": key, "type": type, "title": title},
        **{"x": dict(x), "y": dict(y), "legend": legend, "series": list(series)},
    }


def _line(
    name: str, x: ArrayLike, y: ArrayLike, colour: int | str, *, dashed: bool = False
) -> Series:
    return {
        **{"name": name, "colour": colour, "dashed": dashed},
        **{"x": _numbers(x), "y": _numbers(y)},
    }


def _time_axis(edges: Floats) -> dict[str, object]:
    return {"label": "simulated time (s)", "min": 0, "max": _rounded(float(edges[-1]))}


def _middles(edges: Floats) -> Floats:
    return (edges[:-1] + edges[1:]) / 2


def _numbers(values: ArrayLike) -> list[float | None]:
    return [_rounded(value) for value in np.asarray(values, dtype=np.float64).tolist()]


def _rounded(value: float) -> float | None:
    """Five digits are more than a figure shows."""
    return None if math.isnan(value) else float(f"{value:.5g}")
