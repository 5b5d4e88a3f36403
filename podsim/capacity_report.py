"""Reports of capacity searches: the table on the terminal, capacity.csv and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.table import Table

from podsim.capacity import CONFIDENCE, Capacity
from podsim.result_row import num_gpus
from podsim.slo import Slo

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def capacity_table(capacities: Mapping[str, Capacity], name: str) -> Table:
    """One row a variant: its capacity, how sure it is, and what limits it."""
    found = next(iter(capacities.values()))
    seeds = f"{len(found.seeds)} seeds" if len(found.seeds) > 1 else "1 seed"
    title = (
        f"Capacity: {name}, {seeds} x {found.num_requests} requests a trial, "
        f"precision {found.precision:.1%}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    headings = ("Requests/s", f"{CONFIDENCE:.0%} interval", "Seeds", "Per GPU", "Goodput/s")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("SLOs")
    table.add_column("Limited by")
    for variant, capacity in capacities.items():
        table.add_row(
            variant, *_cells(capacity), " ".join(map(str, capacity.slos)), _limit(capacity)
        )
    return table


def _cells(capacity: Capacity) -> list[str]:
    interval = capacity.interval
    values = [seed.qps for seed in capacity.seeds]
    return [
        f"{capacity.mean:.4g}",
        f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "-",
        f"{min(values):.4g} to {max(values):.4g}" if interval else "-",
        f"{capacity.per_gpu:.4g}" if num_gpus(capacity.deployment) > 1 else "",
        f"{capacity.goodput:.4g}",
    ]


def _limit(capacity: Capacity) -> str:
    return capacity.limited_by or "-"


def capacity_lines(capacities: Mapping[str, Capacity]) -> list[str]:
    """What the table leaves unsaid: how the interval is made, and warnings."""
    lines = []
    if any(capacity.interval for capacity in capacities.values()):
        lines.append(f"Interval     of the mean over the seeds, {CONFIDENCE:.0%}, Student's t")
    else:
        lines.append("Interval     none of one search (a trace's own arrivals are always the same)")
    num_trials = sum(len(capacity.trials) for capacity in capacities.values())
    lines.append(f"Simulations  {num_trials:,}")
    several = len(capacities) > 1
    return lines + [
        f"Warning      {variant + ': ' if several else ''}{warning}"
        for variant, capacity in capacities.items()
        for warning in capacity.warnings
    ]


def loads_table(trials: pd.DataFrame, name: str) -> Table:
    """Goodput of each variant at each load, the mean over seeds."""
    title = f"{name}: mean over {trials['seed'].nunique()} seeds"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    columns = {
        "goodput": "Goodput/s",
        "slo_attainment": "Attainment",
        "ttft_p99_s": "TTFT P99 (s)",
        "tbt_p99_s": "TBT P99 (s)",
        "queue_p50_s": "Queue P50 (s)",
        "passed": "Seeds that pass",
    }
    table.add_column("")
    for heading in ("Requests/s", *columns.values()):
        table.add_column(heading, justify="right")
    for (variant, qps), rows in trials.groupby(["variant", "qps"], sort=False):
        means = [rows[column].mean() for column in columns]
        cells = [f"{mean:.4g}" for mean in means[:-1]]
        cells[1] = f"{means[1]:.1%}"
        table.add_row(str(variant), f"{qps:.4g}", *cells, f"{means[-1]:.0%}")
    return table


# -------------------------------------------------------------------------------------- files


def save_capacities(capacities: Mapping[str, Capacity], directory: Path) -> None:
    """Write capacity.csv, a row a simulation, and capacity.png."""
    tables = pd.concat([found.table() for found in capacities.values()], ignore_index=True)
    save_trials(tables, directory)
    plot_capacities(capacities, directory / "capacity.png")


def save_trials(trials: pd.DataFrame, directory: Path) -> None:
    """Write capacity.csv, a row a simulation."""
    trials.to_csv(directory / "capacity.csv", index=False, float_format="%.9g")


def plot_capacities(capacities: Mapping[str, Capacity], path: Path) -> None:
    """Each SLO's latency against the load, a line a variant, with its limit and the capacities."""
    from matplotlib.figure import Figure

    slos = next(iter(capacities.values())).slos
    figure = Figure(figsize=(4.6 * len(slos), 3.8), layout="constrained")
    axes = figure.subplots(1, len(slos), squeeze=False)[0]
    for which, axis in enumerate(axes):
        for color, (variant, capacity) in enumerate(capacities.items()):
            _plot_variant(axis, variant, capacity, which, f"C{color % 10}")
        _label(axis, slos[which], [found.mean for found in capacities.values()])
    if len(capacities) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _plot_variant(axis: Axes, variant: str, capacity: Capacity, which: int, color: str) -> None:
    for number, seed in enumerate(capacity.seeds):
        trials = sorted(seed.trials, key=lambda trial: trial.qps)
        loads, values = zip(*((t.qps, t.values[which]) for t in trials), strict=True)
        label = variant if number == 0 else None
        axis.plot(loads, values, color=color, label=label, lw=0.8, marker="o", ms=2.5)
    axis.axhline(capacity.slos[which].limit, color=color, ls="--", lw=0.8)
    axis.axvline(capacity.mean, color=color, ls=":", lw=0.8)


def _label(axis: Axes, slo: Slo, capacities: Sequence[float]) -> None:
    """Up to the loads and latencies around the capacities, not to those of the first doublings."""
    axis.set_xlabel("load (requests/s)")
    axis.set_ylabel(f"{slo.metric} {slo.statistic} (s); dashed: the SLO")
    highest = max(capacities)
    if highest > 0:
        axis.set_xlim(0, 1.5 * highest)
    axis.set_ylim(0, 3 * slo.limit)
    axis.grid(alpha=0.3)
