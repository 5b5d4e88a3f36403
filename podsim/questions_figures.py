"""Figures of what `podsim kernels questions` measured, from its rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from podsim.questions_report import (
    LEAST_SHARE,
    policies_results,
    quantization_results,
    split_results,
    sweep_results,
    tiles_results,
)

COLOURS = {"streams": "tab:blue", "unified": "tab:green", "pod": "tab:red", "oracle": "black"}


def write_figure(part: str, rows: pd.DataFrame, file: IO[bytes]) -> None:
    """Write the figure of a part as PNG."""
    figure = FIGURES[part](rows)
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def sweep_figure(rows: pd.DataFrame) -> Figure:
    """Speedups of every batch against the share of prefill, and their distribution by model."""
    found = sweep_results(rows)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    shares, models = figure.subplots(1, 2, sharey=True)
    for name in ("unified", "streams", "pod"):
        shares.plot(found["prefill share"], found[name], ".", color=COLOURS[name], label=name,
                    markersize=4, alpha=0.7)  # fmt: skip
    share = np.linspace(0, 1, 201)
    shares.plot(share, 1 / np.maximum(share, 1 - share), color="black", lw=0.8,
                label="both sides at once")  # fmt: skip
    shares.set(xlabel="prefill's share of both sides alone", ylabel="speedup over serial")
    _plot_models(models, found)
    for axes in (shares, models):
        axes.axhline(1, color="black", lw=0.8)
        axes.grid(alpha=0.3)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _plot_models(axes: Axes, found: pd.DataFrame) -> None:
    share = found["prefill share"]
    both = found[(share >= LEAST_SHARE) & (share <= 1 - LEAST_SHARE)]
    models = list(both.groupby("model", sort=False))
    for i, name in enumerate(COLOURS):
        boxes = axes.boxplot(
            [part[name] for _, part in models],
            positions=[5 * model + i for model in range(len(models))],
            widths=0.7,
            whis=(0, 100),
        )
        for line in [line for lines in boxes.values() for line in lines]:
            line.set_color(COLOURS[name])
    axes.set_xticks([5 * i + 1.5 for i in range(len(models))], [str(name) for name, _ in models])
    axes.set_title(f"each side {LEAST_SHARE:.0%} and more; black: the longer side", fontsize=9)


def quantization_figure(rows: pd.DataFrame) -> Figure:
    times = quantization_results(rows) * 1e3
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    alone, mixed = figure.subplots(1, 2)
    for name in times:
        axes = alone if str(name).startswith("decode") else mixed
        axes.plot(times.index, times[name], ".-", lw=1, markersize=3, label=name)
    for axes, title in ((alone, "decode alone"), (mixed, "with a prefill chunk")):
        axes.set(xlabel="decodes", ylabel="ms", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def tiles_figure(rows: pd.DataFrame) -> Figure:
    found = tiles_results(rows)
    families = list(found.groupby("family", sort=False))
    figure = Figure(figsize=(3.6 * len(families) + 0.5, 4.2), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for axes, (family, part) in zip(panels, families, strict=True):
        for tile, some in part.groupby("tile", sort=False):
            mean = some.groupby("context")["over_best"].mean()
            axes.plot(mean.index, mean, "o-", lw=1, markersize=4, label=tile)
        axes.set(title=family, xlabel="context", xscale="log")
        axes.set_xticks(sorted(part["context"].unique()), sorted(part["context"].unique()))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("time over the fastest tile's, mean over the decodes")
    return figure


def policies_figure(rows: pd.DataFrame) -> Figure:
    gains = policies_results(rows).iloc[::-1]
    figure = Figure(figsize=(10, 0.32 * len(gains) + 2), layout="constrained")
    axes = figure.subplots()
    marks = "s*ovx^<>+d"
    for i, name in enumerate(gains):
        axes.plot(gains[name], gains.index, marks[i % len(marks)], label=name, alpha=0.8)
    axes.axvline(1, color="black", lw=0.8)
    axes.set(xlabel="speedup over serial")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def split_figure(rows: pd.DataFrame) -> Figure:
    found = split_results(rows)
    sides, knobs = found["side"].unique(), found["knob"].unique()
    figure = Figure(figsize=(4 * len(knobs), 3.2 * len(sides) + 0.6), layout="constrained")
    grid = figure.subplots(len(sides), len(knobs), squeeze=False, sharey="row")
    for panels, side in zip(grid, sides, strict=True):
        for axes, knob in zip(panels, knobs, strict=True):
            some = found[(found["side"] == side) & (found["knob"] == knob)]
            for (context, decodes), line in some.groupby(["context", "decodes"], sort=False):
                axes.plot(line["value"], line["over_usual"], "o-", lw=1, markersize=4,
                          label=f"{decodes} decodes at {context}")  # fmt: skip
            axes.set(xlabel=knob, xscale="log")
            axes.set_xticks(values := sorted(some["value"].unique()), [f"{v:g}" for v in values])
            axes.minorticks_off()
            axes.axhline(1, color="black", lw=0.8)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"{side}: time over its own splits'")
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "sweep": sweep_figure,
    "quantization": quantization_figure,
    "tiles": tiles_figure,
    "policies": policies_figure,
    "split": split_figure,
}
