"""One figure of a comparison: distributions side by side, requests and steps one against one."""

from __future__ import annotations

from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from podsim import metrics
from podsim.validation import Comparison

COLORS = {"decode": "tab:blue", "mixed": "tab:orange", "prefill": "tab:green"}


def plot_comparison(comparison: Comparison, file: IO[bytes]) -> None:
    """Write the figure as PNG."""
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    (ttft, tbt), (requests, steps) = figure.subplots(2, 2)
    log = comparison.simulated.log
    table = comparison.requests()
    _plot_cdf(ttft, "TTFT (s)", table["ttft"], table["ttft_simulated"])
    _plot_cdf(tbt, "TBT (s)", comparison.recorded.gaps, log.gap_duration, log.gap_count)
    _plot_requests(requests, comparison)
    _plot_steps(steps, comparison)
    figure.suptitle(comparison.recorded.name, fontsize=11)
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def _plot_cdf(
    axes: Axes,
    label: str,
    measured: ArrayLike,
    simulated: ArrayLike,
    counts: ArrayLike | None = None,
) -> None:
    share = np.linspace(0, 100, 1001)
    real = np.asarray(measured, dtype=np.float64)
    made = np.asarray(simulated, dtype=np.float64)
    weights = np.ones(made.size, dtype=np.int64) if counts is None else np.asarray(counts)
    weights, made = weights[~np.isnan(made)], made[~np.isnan(made)]
    real = real[~np.isnan(real)]
    if not real.size or not made.size:
        axes.set_axis_off()
        return
    axes.plot(np.percentile(real, share), share, label="measured", color="black")
    axes.plot(
        metrics.weighted_percentiles(made, weights, share),
        share,
        label="simulated",
        color="tab:red",
        ls="--",
    )
    axes.set(xlabel=label, ylabel="share at most so long (%)", ylim=(0, 100), xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _plot_requests(axes: Axes, comparison: Comparison) -> None:
    table = comparison.requests()
    axes.scatter(table["e2e_latency"], table["e2e_latency_simulated"], s=6, alpha=0.6)
    _against(axes, "end-to-end latency of a request (s)", "simulated (s)")


def _plot_steps(axes: Axes, comparison: Comparison) -> None:
    steps = comparison.recorded.steps
    kinds = metrics.step_kinds(steps)
    measured = steps["duration"].to_numpy() * 1000
    for i, kind in enumerate(metrics.STEP_KINDS):
        chosen = kinds == i
        axes.scatter(
            measured[chosen],
            comparison.predicted[chosen] * 1000,
            s=4,
            alpha=0.4,
            label=kind,
            color=COLORS[kind],
        )
    _against(axes, "step (ms)", "predicted (ms)")
    axes.legend(frameon=False, markerscale=3)


def _against(axes: Axes, measured: str, simulated: str) -> None:
    """Logarithmic axes, and the line on which both are equal."""
    axes.set(xlabel=measured, ylabel=simulated, xscale="log", yscale="log")
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="black", lw=0.8)
    axes.grid(alpha=0.3)
