"""Simulated beside recorded: the tables and the figure of docs/accuracy.md, without a GPU.

    python benchmarks/accuracy_table.py [--runs validation/h200] [--out docs]

Reads the recordings that `benchmarks/record_runs.py` made, simulates each again, prints the errors
and leaves accuracy.csv and accuracy.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pandas as pd

from podsim.validation import ENGINE_FILE, Comparison, compare, read_recording

METRICS = {
    "request_throughput": "req/s",
    "tbt_p50": "TBT P50",
    "tbt_p90": "TBT P90",
    "tbt_p99": "TBT P99",
    "ttft_p50": "TTFT P50",
    "ttft_p90": "TTFT P90",
    "ttft_p99": "TTFT P99",
}


def row(comparison: Comparison) -> dict[str, object]:
    """Errors of one run: simulated over recorded, minus 1."""
    recorded, steps = comparison.recorded, comparison.steps()
    error = comparison.headline()["error"]
    gpu = recorded.steps["gpu_seconds"].to_numpy()
    host = recorded.steps["duration"].to_numpy() - gpu
    return {
        "run": recorded.name,
        "qps": round(recorded.trace.qps, 2),
        **{name: error[name] for name in METRICS},
        "step_median": steps.loc["all", "median"],
        "step_bias": steps.loc["all", "bias"],
        "step_total": steps.loc["all", "total"],
        "host_share": host.sum() / (host.sum() + gpu.sum()),
        "sm_clock_mhz": round(recorded.gpu["sm_clock_mhz"].mean()),
        "power_w": round(recorded.gpu["power_w"].mean()),
    }


def plot(table: pd.DataFrame, path: Path) -> None:
    """Error against load, a line for each workload and strategy."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    parts = table["run"].str.rsplit("-", n=1, expand=True)
    for axis, name in zip(axes, ("request_throughput", "tbt_p50", "ttft_p50"), strict=True):
        for setup, rows in table.groupby(parts[0], sort=False):
            axis.plot(parts[1][rows.index].astype(float), rows[name] * 100, marker="o", label=setup)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel="load", title=METRICS[name], ylim=(-30, 30))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("simulated over recorded (%)")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def markdown(table: pd.DataFrame) -> str:
    """The table of docs/accuracy.md."""
    columns = [*METRICS, "step_median", "step_bias", "step_total"]
    names = [*METRICS.values(), "step median", "step bias", "all steps"]
    lines = [
        f"| run | {' | '.join(names)} | host | clock |",
        f"|---|{'---|' * (len(names) + 2)}",
    ]
    for _, run in table.iterrows():
        cells = [
            f"{run[name]:.1%}" if name == "step_median" else f"{run[name]:+.1%}" for name in columns
        ]
        tail = f"{run['host_share']:.1%} | {run['sm_clock_mhz']:.0f}"
        lines.append(f"| {run['run']} | {' | '.join(cells)} | {tail} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("validation/h200"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in arguments.runs.glob(f"*/{ENGINE_FILE}"))
    rows = [row(compare(read_recording(folder), error_bars=False)) for folder in folders]
    table = pd.DataFrame(rows)
    table.to_csv(arguments.out / "accuracy.csv", index=False, float_format="%.4f")
    plot(table, arguments.out / "accuracy.png")
    print(markdown(table))


if __name__ == "__main__":
    main()
