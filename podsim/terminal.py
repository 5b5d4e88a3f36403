"""What a run prints: tables and lines for the terminal."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager

import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from podsim import metrics
from podsim.collectives import Collectives
from podsim.memory_costs import MemoryCosts
from podsim.profile import Profile
from podsim.simulation import Result
from podsim.step_costs import kernel_table

LATENCY_ROWS = {
    "ttft": "TTFT",
    "tbt": "TBT",
    "tpot": "TPOT",
    "e2e_latency": "End-to-end latency",
    "queue_time": "Queue time",
}
# ---------------------------------------------------------------------------------- terminal


def summary_table(result: Result) -> Table:
    """Latencies of a run: mean and percentiles."""
    table = _table(describe(result))
    table.add_column("")
    for name in ("mean", *(f"P{p}" for p in metrics.PERCENTILES)):
        table.add_column(name, justify="right")
    latency = own_part(result.summary())
    for key, label in LATENCY_ROWS.items():
        row = latency[key]
        assert isinstance(row, dict)
        names = ("mean", *(f"p{p}" for p in metrics.PERCENTILES))
        table.add_row(label, *(format_seconds(row[name]) for name in names))
        if result.intervals:
            table.add_row("", *(format_interval(result.intervals[f"{key}_{n}"]) for n in names))
    return table


def format_interval(interval: tuple[float, float]) -> str:
    """Seconds from low to high."""
    low, high = interval
    if math.isnan(low):
        return "-"
    least, most = format_seconds(low), format_seconds(high)
    if least.split()[-1] == most.split()[-1]:
        least = least.split()[0]
    return f"[dim]{least} to {most}[/dim]"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def describe(result: Result) -> str:
    deployment = result.deployment
    replicas = f"{deployment.replicas} x " if deployment.replicas > 1 else ""
    gpu = f"{deployment.gpu} (uncalibrated)" if result.uncalibrated else deployment.gpu
    gpus = deployment.tensor_parallel_size
    shared = f" (tensor parallel over {gpus})" if gpus > 1 else ""
    return (
        f"{deployment.model} on {replicas}{gpu}{shared}, {deployment.attention} attention, "
        f"token budget {deployment.token_budget}; {result.trace.name}, {result.trace.qps:.2f} req/s"
    )


def summary_lines(result: Result) -> list[str]:
    """Throughput and use of a run, one fact a line."""
    summary = result.summary()
    own = own_part(summary)
    lines = [
        f"Requests     {summary['completed']} completed, {summary['failed']} refused, "
        f"{own['preemptions']} preemptions",
        f"Throughput   {summary['request_throughput']:.2f} req/s{_span(result)}, "
        f"{summary['output_throughput']:,.0f} output tokens/s, "
        f"{summary['total_token_throughput']:,.0f} tokens/s over {summary['duration']:,.1f} s",
        f"Replicas     busy {own['busy_share']:.1%}, batch {own['batch_size_mean']:.1f} mean "
        f"{own['batch_size_max']} max, KV cache {own['kv_used_mean']:.1%} mean "
        f"{own['kv_used_max']:.1%} max of {own['num_blocks']:,} blocks",
        f"Mixed steps  {own['mixed_step_share']:.1%} of the busy time had prefill and decode",
        f"Simulated    {own['num_steps']:,} steps in {result.wall_time:.1f} s"
        f"{', and twice more for the error bars' if result.intervals else ''}",
    ]
    if "prefix_hit_rate" in own:
        lines.append(
            f"Prefix cache {own['prefix_hit_rate']:.1%} of prompt tokens found; "
            f"{own['prefix_hit_rate_ideal']:.1%} if it never lost any"
        )
    if "memory" in own:
        lines += memory_lines(own["memory"])
    refused = own["refused"]
    assert isinstance(refused, dict)
    lines += [f"Refused      {count}: {reason}" for reason, count in refused.items()]
    lines += [f"Dropped      {n}: {reason}" for reason, n in result.trace.dropped.items() if n]
    lines += [f"Note         {note}" for note in result.trace.notes]
    return lines + [f"Note         {note}" for note in result.notes]


def _span(result: Result) -> str:
    """The throughput's error bar, where there are error bars."""
    if not result.intervals:
        return ""
    low, high = result.intervals["request_throughput"]
    return f" ({low:.2f} to {high:.2f})"


def memory_lines(memory: object) -> list[str]:
    """What the memory system of a run did."""
    assert isinstance(memory, dict)
    m: dict[str, float] = memory
    if "offloaded_steps" in m:
        return [
            f"Host memory  {m['offloaded_steps']:,.0f} steps took "
            f"{format_seconds(m['added_time'])} longer for KV cache there; "
            f"{m['h2d_bytes_moved'] / 1e9:,.1f} GB to the GPU, "
            f"{m['recomputed_tokens'] / max(m['loaded_tokens'], 1):.1%} of its tokens recomputed"
        ]
    lines = []
    if "swapped_requests" in m:
        lines.append(
            f"Swapping     {m['swapped_requests']:,.0f} requests out, copied in "
            f"{format_seconds(m['swap_time'])}"
        )
    if "mapped_blocks" in m:
        lines += [
            f"vAttention   page-groups of {m['page_group_bytes'] / 1024:,.0f} KB "
            f"({m['tokens_per_page_group']:,.0f} tokens), {m['mapped_blocks']:,.0f} blocks mapped, "
            f"{m['unmapped_blocks']:,.0f} unmapped",
            f"Mapped       at most {m['mapped_bytes_max'] / 1e9:.2f} GB; at most "
            f"{m['unfilled_bytes_max'] / 1e9:.2f} GB without tokens in it; requests' blocks wasted "
            f"at most {m['fragmentation_bytes_max'] / 1e9:.2f} GB (each at a time of its own)",
            f"Mapping      {format_seconds(m['background_time'])} in the background",
        ]
    waited = f"{m['stalled_steps']:,.0f} steps waited {format_seconds(m['stall_time'])} in all"
    return [*lines, f"Waits        {waited}"]


def note_lines(results: Mapping[str, Result]) -> list[str]:
    """What a reader should know of the costs, with the variants that it is about."""
    notes: dict[str, list[str]] = {}
    for name, result in results.items():
        for note in result.notes:
            notes.setdefault(note, []).append(name)
    return [
        note if len(names) == len(results) else f"{', '.join(names)}: {note}"
        for note, names in notes.items()
    ]


def format_seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:,.2f} s"


def own_part(summary: Mapping[str, object]) -> Mapping[str, object]:
    """What a summary holds beside the keys of vLLM."""
    own = summary["podsim"]
    assert isinstance(own, dict)
    return own


# ------------------------------------------------------------------------------------ compare

COMPARED = {
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
    "batch_size_mean": ("Batch mean", ""),
    "preemptions": ("Preemptions", ""),
    "completed": ("Completed", ""),
}


def comparison(results: Mapping[str, Result]) -> pd.DataFrame:
    """One row a metric (seconds, shares, counts), one column a variant."""
    return pd.DataFrame({name: _headline(result) for name, result in results.items()})


def memory_comparison(results: Mapping[str, Result]) -> list[str]:
    """Why variants of KV cache differ: the batch, attention and memory work of each."""
    if all(result.deployment.kv == "ideal" and not result.memory for result in results.values()):
        return []
    lines: list[str] = []
    for name, result in results.items():
        own = own_part(result.summary())
        memory = own.get("memory", {})
        assert isinstance(memory, dict)
        text = f"{name}: batch {own['batch_size_mean']:.1f} mean"
        kernels = kernel_table(result, result.steps, result.requests)
        if kernels is not None:
            seconds = float(kernels.loc[["attention"]].to_numpy().sum())
            text += f", attention {format_seconds(seconds)}"
        held_up = memory.get("stall_time", 0.0) + memory.get("added_time", 0.0)
        lines.append(f"{text}, steps held up by memory work {format_seconds(held_up)}")
    return lines


def _headline(result: Result) -> dict[str, float]:
    summary = result.summary()
    own = own_part(summary)
    values: dict[str, float] = {}
    for key in COMPARED:
        latency, _, statistic = key.rpartition("_")
        if latency in LATENCY_ROWS:
            distribution = own[latency]
            assert isinstance(distribution, dict)
            values[key] = distribution[statistic]
        else:
            value = own[key] if key in own else summary[key]
            assert isinstance(value, int | float)
            values[key] = float(value)
    return values


def comparison_tables(
    compared: pd.DataFrame, title: str, console: Console, unclear: Unclear = frozenset()
) -> Iterator[Table]:
    """Variants side by side, as many beside the first as the console is wide, in several tables."""
    first, *others = map(str, compared.columns)
    while others:
        count = len(others)
        while count > 1 and width_of(compared[[first, *others[:count]]], unclear) > console.width:
            count -= 1
        yield comparison_table(compared[[first, *others[:count]]], title, unclear)
        others = others[count:]


def width_of(compared: pd.DataFrame, unclear: Unclear) -> int:
    """Of a comparison's table where nothing limits it."""
    return Console(width=10_000).measure(comparison_table(compared, "", unclear)).maximum


def comparison_table(compared: pd.DataFrame, title: str, unclear: Unclear = frozenset()) -> Table:
    """Variants side by side, with differences from the first in per cent.

    A difference that the error bars leave unclear is marked with a tilde.
    """
    table = _table(title)
    table.add_column("", no_wrap=True)
    first, *others = compared.columns
    table.add_column(str(first).replace(",", ",\n"), justify="right", no_wrap=True)
    for variant in others:
        table.add_column(str(variant).replace(",", ",\n"), justify="right", no_wrap=True)
        table.add_column("", justify="right", style="dim", no_wrap=True)
    for key, (label, unit) in COMPARED.items():
        base, *values = compared.loc[[key]].to_numpy(dtype=float)[0].tolist()
        cells = [format_metric(base, unit)]
        for name, value in zip(others, values, strict=True):
            mark = " ~" if (str(name), key) in unclear else ""
            cells += [format_metric(value, unit), format_difference(value, base) + mark]
        table.add_row(label, *cells)
    return table


Unclear = Set[tuple[str, str]]
"""Variants and metrics whose difference from the first variant may be the error of the profile."""


def unclear_differences(results: Mapping[str, Result]) -> Unclear:
    """Where the interval of a variant overlaps that of the first; nothing without error bars."""
    first, *others = results.items()
    return {
        (name, key)
        for name, result in others
        for key in COMPARED
        if _overlap(first[1].intervals, result.intervals, key)
    }


def error_lines(results: Mapping[str, Result]) -> list[str]:
    """Of each other variant: which differences from the first are larger than their error.

    Larger than the error bars of the two together; nothing without error bars.
    """
    first, *others = results.items()
    if first[1].intervals is None:
        return []
    unclear = unclear_differences(results)
    keys = [key for key in COMPARED if key in first[1].intervals]
    lines = []
    for name, _ in others:
        clear = [COMPARED[key][0] for key in keys if (name, key) not in unclear]
        rest = [COMPARED[key][0] for key in keys if (name, key) in unclear]
        text = f"larger than their error: {', '.join(clear) or 'none'}"
        lines.append(f"{name} against {first[0]}: {text}; not: {', '.join(rest) or 'none'}")
    return ["Errors       " + line for line in lines]


def _overlap(first: metrics.Intervals | None, second: metrics.Intervals | None, key: str) -> bool:
    if first is None or second is None or key not in first:
        return False
    return first[key][0] <= second[key][1] and second[key][0] <= first[key][1]


def format_metric(value: float, unit: str) -> str:
    if unit == "s":
        return format_seconds(value)
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def format_difference(value: float, first: float) -> str:
    if first == 0 or math.isnan(first) or math.isnan(value):
        return ""
    return f"{value / first - 1:+.1%}".replace("-0.0%", "+0.0%")


# ------------------------------------------------------------------------------------ profile


def error_table(profile: Profile) -> Table:
    """How far each kernel model of a profile is from points it was not fitted on."""
    return _errors(f"{profile.model} on {profile.gpu}", profile.errors)


def collectives_table(collectives: Collectives) -> Table:
    """How far interpolated times of collectives are from messages that were held out."""
    return _errors(f"collectives on {collectives.gpu}", collectives.errors)


def memory_errors_table(costs: MemoryCosts) -> Table:
    """How far memory costs are from rows that they were not fitted on."""
    return _errors(f"memory systems on {costs.gpu}", costs.errors)


def _errors(of: str, errors: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table(f"{of}: error on held-out points")
    for name in ("kernel", "points", "median", "P90", "worst", "bias"):
        is_kernel = name == "kernel"
        table.add_column(name, justify="left" if is_kernel else "right", no_wrap=is_kernel)
    has_timed = any("median_as_timed" in error for error in errors.values())
    if has_timed:
        table.add_column("as timed", justify="right")
    has_worst = any("worst_batch" in error for error in errors.values())
    if has_worst:
        table.add_column("worst batch")
    for kernel, error in errors.items():
        cells = [f"{error[name]:.1%}" for name in ("median", "p90", "worst")]
        cells.append(f"{error['bias']:+.1%}")
        if has_timed:
            cells.append(_as_timed(error))
        if has_worst:
            cells.append(str(error["worst_batch"]))
        table.add_row(kernel, f"{error['points']:.0f}", *cells)
    return table


def _as_timed(error: Mapping[str, float]) -> str:
    """Median, P90 and bias; nothing of a kernel whose rows stay as timed."""
    if "median_as_timed" not in error:
        return ""
    median, p90, bias = (error[f"{name}_as_timed"] for name in ("median", "p90", "bias"))
    return f"{median:.1%} / {p90:.1%}, {bias:+.1%}"


# ----------------------------------------------------------------------------------- progress

PATIENCE = 2.0
"""Seconds before a progress bar appears."""


class _Rate(ProgressColumn):
    """What is done in a second of real time."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        rate = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        return Text(f"{rate} {self.unit}/s", style="progress.data.speed")


@contextmanager
def progress_bar(
    label: str, total: int | None, console: Console, unit: str = "req"
) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal for what takes over two seconds, told how many units are done.

    Without a total, as where nothing can be told, it shows the time. Nothing is written where the
    console is no terminal.
    """
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit)),
        *(TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    progress = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    task = progress.add_task(label, total=total)
    timer = threading.Timer(PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done: progress.update(task, completed=done)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
