"""The figure of docs/memory.md: mapping, transfers and offloaded layers, as they were measured.

python benchmarks/memory_figure.py --costs profiles/h200/memory --out docs/memory.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from podsim.layer_predictions import RESIDENT, predicted_layer
from podsim.memory_costs import APIS, DIRECTIONS, MemoryCosts, read_memory_costs
from podsim.offloaded_shapes import SHAPES

NUM_POINTS = 4
PAGE_GROUP = 2 * 2**20
"""Bytes of the page-groups that are shown."""


def plot_mapping(axis: Axes, rows: pd.DataFrame) -> None:
    """Of calls for one page-group, by state of the GPU and thread."""
    calls = rows[rows["api"].isin(APIS) & (rows["page_groups"] == 1)]
    table = calls.pivot_table(
        index="api", columns=["gpu", "thread"], values="time_us", aggfunc="median"
    ).loc[list(APIS)]
    width = 0.8 / table.shape[1]
    for number, (gpu, thread) in enumerate(table.columns):
        where = np.arange(len(APIS)) + (number - (table.shape[1] - 1) / 2) * width
        axis.bar(where, table[gpu, thread], width, label=f"{gpu} GPU, {thread} thread")
    axis.set_xticks(np.arange(len(APIS)), [api.replace("_", "\n") for api in APIS])
    axis.set(ylabel="us a call of 2 MB", title="virtual memory")


def plot_batches(axis: Axes, rows: pd.DataFrame) -> None:
    """Time of a page-group, by how many of them a call has."""
    for (api, gpu, thread), calls in rows[rows["page_groups"] >= 1].groupby(
        ["api", "gpu", "thread"], sort=False
    ):
        medians = calls.groupby("page_groups")["time_us"].median()
        if api not in APIS or len(medians) < 2:
            continue
        style = "-" if thread == "main" else "--"
        color = f"C{2 * (api == 'unmap') + (gpu == 'busy')}"
        label = f"{api}, {gpu} GPU, {thread} thread"
        axis.plot(medians.index, medians / medians.index, style, color=color, label=label)
    axis.set(xscale="log", ylim=(0, 40), xlabel="page-groups of a call")
    axis.set(ylabel="us a page-group of 2 MB", title="virtual memory, ranges in one call")


def plot_transfers(axis: Axes, rows: pd.DataFrame) -> None:
    """Bandwidth by size."""
    copies = rows[rows["direction"].isin(DIRECTIONS)]
    kinds = copies.groupby(["memory", "beside"], sort=False)
    for number, ((memory, beside), of_kind) in enumerate(kinds):
        for direction, group in of_kind.groupby("direction", sort=False):
            seconds = group.groupby("bytes")["time_us"].median() * 1e-6
            label = f"{direction} {memory}" + ("" if beside == "nothing" else f" beside {beside}")
            style = "-" if direction == DIRECTIONS[0] else "--"
            speed = seconds.index / seconds / 1e9
            axis.plot(seconds.index, speed, style, color=f"C{number}", marker=".", label=label)
    axis.set(xscale="log", xlabel="bytes of a copy", ylabel="GB/s", title="host and GPU")


def plot_layers(axis: Axes, rows: pd.DataFrame, costs: MemoryCosts) -> None:
    """Time by split, measured and predicted, over that without recomputing."""
    points = list(rows.groupby(["model", "batch", "context", "schedule", "layers"], sort=False))
    for number, (key, group) in enumerate(points[:: max(1, len(points) // NUM_POINTS)]):
        model, batch, context, schedule, layers = key
        seconds = group.groupby("split")["time_us"].median() * 1e-6
        compute = seconds[RESIDENT] / layers
        layer = predicted_layer(costs, SHAPES[model], batch * context, compute, schedule)
        shares = np.linspace(0, 1, 101)
        predicted = [layer.seconds(layers, s * batch * context, schedule) for s in shares]
        measured = seconds.drop(RESIDENT)
        label = f"{model}, {batch} x {context}"
        color = f"C{number}"
        axis.plot(measured.index / context, measured / measured[0], "o", color=color, label=label)
        axis.plot(shares, predicted / measured[0], color=color, lw=1)
    axis.set(
        xlabel="share of the tokens that is recomputed",
        ylabel="time over that of full transfer",
        title="offloaded layers: measured (dots), predicted (lines)",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = read_memory_costs(options.costs, str(options.costs))
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    calls = pd.read_csv(options.costs / "mapping.csv")
    calls = calls[calls["page_group"] == PAGE_GROUP]
    plot_mapping(axes[0, 0], calls)
    plot_batches(axes[0, 1], calls)
    plot_transfers(axes[1, 0], pd.read_csv(options.costs / "transfer.csv"))
    plot_layers(axes[1, 1], pd.read_csv(options.costs / "layers.csv"), costs)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
