"""Reports: the tables on the terminal and the folder of files a run leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from rich import box
from rich.table import Table

from podsim import metrics
from podsim.config import Workload, to_toml
from podsim.errors import InputError
from podsim.profile import Profile
from podsim.simulation import Result

_LATENCY_ROWS = {
    "ttft": "TTFT",
    "tbt": "TBT",
    "tpot": "TPOT",
    "e2e_latency": "End-to-end latency",
    "queue_time": "Queue time",
}
_TIME_COLUMNS = (
    *("arrival_time", "scheduled_time", "first_token_time", "finish_time"),
    *("queue_time", "ttft", "e2e_latency", "tpot"),
    *("start", "duration"),
)

# ---------------------------------------------------------------------------------- terminal


def summary_table(result: Result) -> Table:
    """Latencies of a run: mean and percentiles."""
    table = _table(describe(result))
    table.add_column("")
    for name in ("mean", *(f"P{p}" for p in metrics.PERCENTILES)):
        table.add_column(name, justify="right")
    latency = metrics.latencies(result.log, result.requests)
    for key, label in _LATENCY_ROWS.items():
        row = latency[key]
        names = ("mean", *(f"p{p}" for p in metrics.PERCENTILES))
        table.add_row(label, *(format_seconds(row[name]) for name in names))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def describe(result: Result) -> str:
    deployment = result.deployment
    replicas = f"{deployment.replicas} x " if deployment.replicas > 1 else ""
    return (
        f"{deployment.model} on {replicas}{deployment.gpu}, {deployment.attention} attention, "
        f"token budget {deployment.token_budget}; {result.trace.name}, {result.trace.qps:.2f} req/s"
    )


def summary_lines(result: Result) -> list[str]:
    """Throughput and use of a run, one fact a line."""
    summary = result.summary()
    own = _podsim(summary)
    lines = [
        f"Requests     {summary['completed']} completed, {summary['failed']} refused, "
        f"{own['preemptions']} preemptions",
        f"Throughput   {summary['request_throughput']:.2f} req/s, "
        f"{summary['output_throughput']:,.0f} output tokens/s, "
        f"{summary['total_token_throughput']:,.0f} tokens/s over {summary['duration']:,.1f} s",
        f"Replicas     busy {own['busy_share']:.1%}, batch {own['batch_size_mean']:.1f} mean "
        f"{own['batch_size_max']} max, KV cache {own['kv_used_mean']:.1%} mean "
        f"{own['kv_used_max']:.1%} max of {own['num_blocks']:,} blocks",
        f"Mixed steps  {own['mixed_step_share']:.1%} of the busy time had prefill and decode",
        f"Simulated    {own['num_steps']:,} steps in {result.wall_time:.1f} s",
    ]
    if "prefix_hit_rate" in own:
        lines.append(
            f"Prefix cache {own['prefix_hit_rate']:.1%} of prompt tokens found; "
            f"{own['prefix_hit_rate_ideal']:.1%} if it never lost any"
        )
    refused = own["refused"]
    assert isinstance(refused, dict)
    lines += [f"Refused      {count}: {reason}" for reason, count in refused.items()]
    lines += [f"Dropped      {n}: {reason}" for reason, n in result.trace.dropped.items() if n]
    lines += [f"Note         {note}" for note in result.trace.notes]
    return lines + [f"Note         {note}" for note in _latency_notes(result)]


def _latency_notes(result: Result) -> list[str]:
    notes = getattr(result.latency_model, "notes", None)
    return list(notes()) if notes is not None else []


def format_seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:,.2f} s"


def _podsim(summary: Mapping[str, object]) -> Mapping[str, object]:
    own = summary["podsim"]
    assert isinstance(own, dict)
    return own


# ------------------------------------------------------------------------------------ compare

_COMPARED = {
    "ttft_p50": ("TTFT P50", "s"),
    "ttft_p99": ("TTFT P99", "s"),
    "tbt_p50": ("TBT P50", "s"),
    "tbt_p99": ("TBT P99", "s"),
    "tpot_p50": ("TPOT P50", "s"),
    "e2e_latency_p50": ("E2E P50", "s"),
    "e2e_latency_p99": ("E2E P99", "s"),
    "queue_time_p50": ("Queue P50", "s"),
    "request_throughput": ("Requests/s", ""),
    "output_throughput": ("Output tok/s", ""),
    "busy_share": ("Busy", "%"),
    "kv_used_max": ("KV cache max", "%"),
    "preemptions": ("Preemptions", ""),
    "completed": ("Completed", ""),
}


def comparison(results: Mapping[str, Result]) -> pd.DataFrame:
    """One row a metric (seconds, shares, counts), one column a variant."""
    return pd.DataFrame({name: _headline(result) for name, result in results.items()})


def _headline(result: Result) -> dict[str, float]:
    summary = result.summary()
    own = _podsim(summary)
    values: dict[str, float] = {}
    for key in _COMPARED:
        latency, _, statistic = key.rpartition("_")
        if latency in _LATENCY_ROWS:
            distribution = own[latency]
            assert isinstance(distribution, dict)
            values[key] = distribution[statistic]
        else:
            value = own[key] if key in own else summary[key]
            assert isinstance(value, int | float)
            values[key] = float(value)
    return values


def comparison_table(compared: pd.DataFrame, title: str) -> Table:
    """Variants side by side, with differences from the first in per cent."""
    table = _table(title)
    table.add_column("", no_wrap=True)
    first, *others = compared.columns
    table.add_column(str(first), justify="right", no_wrap=True)
    for variant in others:
        table.add_column(str(variant), justify="right", no_wrap=True)
        table.add_column("", justify="right", style="dim", no_wrap=True)
    for key, (label, unit) in _COMPARED.items():
        base, *values = compared.loc[[key]].to_numpy(dtype=float)[0].tolist()
        cells = [_format(base, unit)]
        for value in values:
            cells += [_format(value, unit), _difference(value, base)]
        table.add_row(label, *cells)
    return table


def _format(value: float, unit: str) -> str:
    if unit == "s":
        return format_seconds(value)
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _difference(value: float, first: float) -> str:
    if first == 0 or math.isnan(first) or math.isnan(value):
        return ""
    return f"{value / first - 1:+.1%}"


# ------------------------------------------------------------------------------------- folder


@contextmanager
def result_folder(directory: Path, made_by: str = "config.toml") -> Iterator[Path]:
    """A folder to write results into, which takes its name only when all is written.

    A folder of earlier results, known by the file `made_by`, is replaced. Raises InputError,
    before any work is done, if it cannot be written or holds something else.
    """
    if directory.exists() and not _may_replace(directory, made_by):
        raise InputError(f"{directory}: not empty, and no podsim result; name another --out")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise InputError(f"{directory}: cannot write results here: {error.strerror}") from None
    try:
        yield scratch
        scratch.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(scratch, directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot write results: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _may_replace(directory: Path, made_by: str) -> bool:
    if not directory.is_dir():
        return False
    return not any(directory.iterdir()) or (directory / made_by).exists()


def save(result: Result, workload: Workload | None, directory: Path) -> None:
    """Write one run: summary.json, requests.csv, steps.csv, config.toml, latency.png."""
    summary = json.dumps(_without_nan(result.summary()), indent=2)
    (directory / "summary.json").write_text(summary + "\n", encoding="utf-8")
    _write_csv(result.requests, directory / "requests.csv")
    _write_csv(result.steps, directory / "steps.csv")
    config = to_toml(workload, result.deployment)
    (directory / "config.toml").write_text(config, encoding="utf-8")
    plot_latencies({result.deployment.attention: result}, directory / "latency.png")


def save_comparison(compared: pd.DataFrame, results: Mapping[str, Result], directory: Path) -> None:
    """Write compare.csv and latency.png."""
    compared.rename_axis("metric").to_csv(directory / "compare.csv", float_format="%.9g")
    plot_latencies(results, directory / "latency.png")


def error_table(profile: Profile) -> Table:
    """How far each kernel model of a profile is from points it was not fitted on."""
    title = f"{profile.model} on {profile.gpu}: error on held-out points"
    table = _table(title)
    for name in ("kernel", "points", "median", "P90", "worst", "bias"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for kernel, error in profile.errors.items():
        cells = [f"{error[name]:.1%}" for name in ("median", "p90", "worst")]
        table.add_row(kernel, f"{error['points']:.0f}", *cells, f"{error['bias']:+.1%}")
    return table


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    """Seconds to the nanosecond, and the unit in the column's name."""
    renamed = table.rename(columns={name: f"{name}_s" for name in _TIME_COLUMNS})
    renamed.to_csv(path, index=False, float_format="%.9f")


def _without_nan(value: object) -> object:
    """JSON has no NaN: a metric without any sample is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def plot_latencies(results: Mapping[str, Result], path: Path) -> None:
    """Cumulative distributions of TTFT, TBT and end-to-end latency, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, result in results.items():
        requests = result.requests
        ones = np.ones(len(requests), dtype=np.int64)
        _plot_cdf(axes[0], requests["ttft"], ones, name)
        _plot_cdf(axes[1], result.log.gap_duration, result.log.gap_count, name)
        _plot_cdf(axes[2], requests["e2e_latency"], ones, name)
    for axis, label in zip(axes, ("TTFT", "TBT", "End-to-end latency"), strict=True):
        axis.set(xlabel=f"{label} (s)", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of samples")
    if len(results) > 1:
        axes[2].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_cdf(axis: object, values: ArrayLike, counts: ArrayLike, name: str) -> None:
    """Draw a CDF up to its 99.9th percentile, through at most 400 points."""
    array, weights = np.asarray(values, dtype=np.float64), np.asarray(counts)
    array, weights = array[~np.isnan(array)], weights[~np.isnan(array)]
    if array.size == 0:
        return
    shares = np.linspace(0, 99.9, 400)
    points = metrics.weighted_percentiles(array, weights, shares)
    axis.plot(points, shares / 100, label=name)  # type: ignore[attr-defined]
