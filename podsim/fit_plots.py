"""A figure for each kernel of a profile: predicted against measured times."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from podsim.errors import InputError
from podsim.trace_writers import atomic_file

PLOTS_FOLDER = "plots"
COLOURS = {"grid": "tab:gray", "held_out": "tab:blue"}
LABELS = {"grid": "fitted on", "held_out": "held out"}


def write_plots(folder: Path, predictions: pd.DataFrame) -> Path:
    """Leave a PNG for each kernel of `held_out.predictions` in `folder`/plots; that folder.

    Raises InputError if one cannot be written; each appears whole.
    """
    plots = folder / PLOTS_FOLDER
    try:
        plots.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{plots}: cannot be written: {error.strerror}") from None
    for kernel, rows in predictions.groupby("kernel", sort=False):
        name = str(kernel).replace(" ", "-").replace("_", "-")
        figure = _figure(str(kernel), rows)
        with atomic_file(plots / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return plots


def _figure(kernel: str, rows: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9, 4))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.13, top=0.9, wspace=0.22)
    times, errors = figure.subplots(1, 2)
    for split, colour in COLOURS.items():
        some = rows[rows["split"] == split]
        measured, predicted = some["measured"] * 1e6, some["predicted"] * 1e6
        style = {"s": 9, "color": colour, "alpha": 0.7, "linewidths": 0}
        times.scatter(measured, predicted, label=LABELS[split], **style)
        errors.scatter(measured, (predicted / measured - 1) * 100, **style)
    ends = [rows["measured"].min() * 1e6, rows["measured"].max() * 1e6]
    times.plot(ends, ends, color="black", linewidth=0.8)
    times.set(xscale="log", yscale="log", xlabel="measured (µs)", ylabel="predicted (µs)")
    times.legend()
    errors.axhline(0, color="black", linewidth=0.8)
    errors.set(xscale="log", xlabel="measured (µs)", ylabel="error (%)")
    for axes in (times, errors):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(ScalarFormatter())
                axis.set_minor_formatter(NullFormatter())
    figure.suptitle(kernel, fontsize=11)
    return figure
