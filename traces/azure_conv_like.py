"""Makes azure-conv-like.csv: requests of our own with the published statistics of a real trace.

The statistics are those of the conversation workload of the Azure LLM inference trace 2023; no row
of it is copied. Everything is drawn from evenly spaced quantiles, which a seeded generator only
puts in order, so that even these few requests match closely.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaincinv

SEED = 2023
NUM_REQUESTS = 6000
RATE = 5.53  # requests/s
GAP_CV = 1.094  # standard deviation / mean of the gaps between arrivals
PROBABILITIES = [0.0, 0.5, 0.9, 0.99, 1.0]
PROMPT_QUANTILES, PROMPT_MEAN = [2, 1020, 2734.5, 4142, 14050], 1154.7
OUTPUT_QUANTILES, OUTPUT_MEAN = [7, 129, 424, 601, 1000], 211.1
NORMAL_CORRELATION = -0.134  # of the copula: makes that of the lengths the published -0.112

OUT = Path(__file__).with_name("azure-conv-like.csv")


def quantile_function(
    u: NDArray[np.float64], quantiles: Sequence[float], bend: float
) -> NDArray[np.float64]:
    """Passes through `quantiles` at PROBABILITIES, geometric in u**bend between each two."""
    segment = np.clip(np.searchsorted(PROBABILITIES, u, side="right") - 1, 0, len(quantiles) - 2)
    p, q = np.array(PROBABILITIES), np.array(quantiles)
    within = (u - p[segment]) / np.diff(p)[segment]
    values: NDArray[np.float64] = q[segment] * (q[segment + 1] / q[segment]) ** (within**bend)
    return values


def lengths(quantiles: Sequence[float], mean: float) -> NDArray[np.int64]:
    """NUM_REQUESTS lengths in ascending order, with these quantiles and this mean."""
    u = np.linspace(0, 1, NUM_REQUESTS)

    def excess(bend: float) -> float:
        return float(quantile_function(u, quantiles, bend).mean() - mean)

    bend = brentq(excess, 0.1, 10)
    return np.rint(quantile_function(u, quantiles, bend)).astype(np.int64)


def arrival_times(rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds from the first arrival, with gamma-distributed gaps."""
    u = (np.arange(NUM_REQUESTS - 1) + 0.5) / (NUM_REQUESTS - 1)
    gaps = rng.permutation(gammaincinv(1 / GAP_CV**2, u))
    return np.concatenate([[0.0], np.cumsum(gaps / gaps.mean() / RATE)])


def rows() -> str:
    """The whole file."""
    rng = np.random.default_rng(SEED)
    times = arrival_times(rng)
    normal = rng.standard_normal((2, NUM_REQUESTS))
    rho = NORMAL_CORRELATION
    tied = rho * normal[0] + np.sqrt(1 - rho**2) * normal[1]
    prompts = lengths(PROMPT_QUANTILES, PROMPT_MEAN)[normal[0].argsort().argsort()]
    outputs = lengths(OUTPUT_QUANTILES, OUTPUT_MEAN)[tied.argsort().argsort()]
    lines = [f"{t:.6f},{p},{o}\n" for t, p, o in zip(times, prompts, outputs, strict=True)]
    return "".join(["arrival_time,num_prompt_tokens,num_output_tokens\n", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the trace azure-conv-like.")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write it")
    out = parser.parse_args().out
    out.write_bytes(rows().encode())
    print(f"{NUM_REQUESTS} requests with seed {SEED}: {out}")


if __name__ == "__main__":
    main()
