"""One figure of a trace: arrivals over time, and the distributions of lengths."""

from __future__ import annotations

from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from podsim.workload_trace import Trace

NUM_BINS = 120


def plot_trace(trace: Trace, file: IO[bytes]) -> None:
    """Write the figure as PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    arrivals, lengths = figure.subplots(1, 2)
    _plot_arrivals(trace, arrivals)
    _plot_lengths(trace, lengths)
    figure.suptitle(f"{trace.name}: {len(trace):,} requests", fontsize=11)
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _plot_arrivals(trace: Trace, axes: Axes) -> None:
    axes.set_title("Arrivals", fontsize=10)
    if not trace.has_times:
        axes.text(0.5, 0.5, "no arrival times", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    end = max(trace.duration, 1e-9)
    unit, name = next(
        (u, n)
        for u, n in ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if end >= 2 * u or u == 1
    )
    counts, edges = np.histogram(trace.arrival_time, NUM_BINS, (0, end))
    axes.stairs(counts / np.diff(edges), edges / unit, fill=True, color="tab:blue")
    axes.set_xlabel(f"time ({name})")
    axes.set_ylabel(f"requests/s, over {end / NUM_BINS:.3g} s")
    axes.set_xlim(0, end / unit)
    axes.set_ylim(bottom=0)


def _plot_lengths(trace: Trace, axes: Axes) -> None:
    axes.set_title("Lengths", fontsize=10)
    share = np.linspace(0, 100, 501)
    columns = {"prompt": trace.num_prompt_tokens, "output": trace.num_output_tokens}
    for name, lengths in columns.items():
        axes.plot(np.percentile(lengths, share), share, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of requests at most so long (%)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
