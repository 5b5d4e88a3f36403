"""Latency against load for each attention strategy: the figure of the README.

    python benchmarks/attention_under_load.py --out docs

Long prompts (lognormal, median 8,000 tokens), 600 requests a point, Llama-3.1-8B on one H200.
Leaves attention-under-load.csv and attention-under-load.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pandas as pd

import podsim
from podsim.config import STRATEGIES

RATES = (1.6, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4)


def measure(rate: float, attention: str) -> dict[str, object]:
    trace = podsim.synthetic_trace(
        arrivals="poisson",
        qps=rate,
        num_requests=600,
        prompt_tokens="lognormal:8000:0.5",
        output_tokens="lognormal:330:0.6",
        seed=0,
    )
    deployment = podsim.Deployment(model="llama-3.1-8b", attention=attention, token_budget=1024)
    summary = podsim.simulate(trace, deployment).summary()
    return {
        "qps": rate,
        "attention": attention,
        "ttft_p50_ms": summary["median_ttft_ms"],
        "tbt_p99_ms": summary["p99_itl_ms"],
        "output_tokens_per_s": summary["output_throughput"],
    }


def plot(table: pd.DataFrame, path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for attention, rows in table.groupby("attention", sort=False):
        left.plot(rows["qps"], rows["ttft_p50_ms"] / 1000, marker="o", ms=3, label=attention)
        right.plot(rows["qps"], rows["tbt_p99_ms"], marker="o", ms=3, label=attention)
    left.set(xlabel="requests/s", ylabel="TTFT P50 (s)", ylim=(0, 3))
    right.set(xlabel="requests/s", ylabel="TBT P99 (ms)", ylim=(0, None))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle("Llama-3.1-8B on one H200, 8K-token prompts, token budget 1024")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out = parser.parse_args().out
    table = pd.DataFrame([measure(rate, name) for name in STRATEGIES for rate in RATES])
    table.to_csv(out / "attention-under-load.csv", index=False, float_format="%.2f")
    plot(table, out / "attention-under-load.png")
    print(table.pivot(index="qps", columns="attention", values="ttft_p50_ms").round(0))


if __name__ == "__main__":
    main()
