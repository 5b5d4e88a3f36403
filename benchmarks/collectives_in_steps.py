"""What is left of recorded steps for their collectives, beside the collectives measured alone.

    python benchmarks/collectives_in_steps.py validation/tp4

Of a run of `podsim validate --tp N`. Needs no GPU. A row is the graphs up to a power of two tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.graph_sizes import graph_size
from podsim.latency import ProfiledLatency
from podsim.validation import Comparison, compare, read_recording


def by_size(comparison: Comparison) -> pd.DataFrame:
    """Medians by the tokens of a step's graph, up to a power of two.

    `gpu_ms` and `predicted_ms` leave out the host. `left_us` is an all-reduce, if all else in the
    step took what was predicted; `alone_us`, what it was measured to take on its own.
    """
    recorded, model = comparison.recorded, comparison.simulated.latency_model
    assert isinstance(model, ProfiledLatency)
    assert model.collectives is not None
    deployment, steps, collectives = recorded.deployment, recorded.steps, model.collectives
    requests = steps["num_decodes"] + steps["num_prefills"]
    host = (
        deployment.host_overhead
        + deployment.host_overhead_per_request * requests
        + deployment.host_overhead_with_prefill * (steps["num_prefills"] > 0)
    )
    predicted = comparison.predicted - host
    missing = steps["gpu_seconds"] - predicted
    sizes = (steps["num_prefill_tokens"] + steps["num_decodes"]).map(graph_size)
    alone = np.array([collectives.seconds(n, 0) for n in sizes]) / collectives.num_all_reduces
    table = pd.DataFrame(
        {
            "tokens": sizes.map(lambda n: 1 << (n - 1).bit_length()),
            "steps": 1,
            "host_ms": (steps["duration"] - steps["gpu_seconds"]) * 1e3,
            "predicted_host_ms": host * 1e3,
            "gpu_ms": steps["gpu_seconds"] * 1e3,
            "predicted_ms": predicted * 1e3,
            "alone_us": alone * 1e6,
            "left_us": (alone + missing / collectives.num_all_reduces) * 1e6,
        }
    )
    return table.groupby("tokens").agg(
        {name: "sum" if name == "steps" else "median" for name in table if name != "tokens"}
    )


def markdown(table: pd.DataFrame) -> str:
    """As docs/tensor-parallel.md has it."""
    head = ("tokens, padded, up to", "steps", "GPU ms", "predicted", "an all-reduce alone, us")
    lines = [f"| {' | '.join(head)} | left for it |", "|---" * 6 + "|"]
    lines += [
        f"| {row.Index} | {row.steps:,} | {row.gpu_ms:.2f} | {row.predicted_ms:.2f} | "
        f"{row.alone_us:.1f} | {row.left_us:.1f} |"
        for row in table.itertuples()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    table = by_size(compare(read_recording(parser.parse_args().recording), error_bars=False))
    print(markdown(table))
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
