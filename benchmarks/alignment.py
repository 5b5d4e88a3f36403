"""How well rows of matrix products predict each other, by which multiples are tables of their own.

    python benchmarks/alignment.py

Of every shipped profile: each number of tokens that products were timed at to fit on is left out,
and taken from the line between its neighbours of the same alignment. Needs no GPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.op_tables import MATRIX_OPS

PROFILES = Path(__file__).parent.parent / "profiles" / "h200"
FEWEST = 64
"""Tokens up to which every number may lie between any others."""
MULTIPLES = (1, 4, 8, 16, 32, 64, 128)


def left_out(tokens: NDArray[np.int64], times: NDArray[np.float64], multiple: int) -> list[float]:
    """Relative errors of the inner points beyond FEWEST."""
    aligned = tokens % multiple == 0
    errors = []
    for index in range(1, len(tokens) - 1):
        if tokens[index] <= FEWEST:
            continue
        alike = (aligned == aligned[index]) | (tokens <= FEWEST)
        alike[index] = False
        line = np.interp(tokens[index], tokens[alike], times[alike])
        errors.append(abs(float(line / times[index]) - 1))
    return errors


def main() -> None:
    found: dict[int, list[float]] = {multiple: [] for multiple in MULTIPLES}
    for path in sorted(PROFILES.glob("*/profile.json")):
        rows = pd.read_csv(path.with_name("measurements.csv"), keep_default_na=False)
        rows = rows[(rows["split"] == "grid") & (rows["refused"] == "")]
        for op in (*MATRIX_OPS, "lm_head"):
            mine = rows[rows["op"] == op]
            times = mine.groupby(mine["num_tokens"].astype(int))["time_us"].mean()
            for multiple, errors in found.items():
                errors += left_out(times.index.to_numpy(), times.to_numpy(), multiple)
    print("multiples of  points  median    mean     P90")
    for multiple, errors in found.items():
        parts = (np.median(errors), np.mean(errors), np.quantile(errors, 0.9))
        print(f"{multiple:12} {len(errors):7} " + " ".join(f"{part:7.2%}" for part in parts))


if __name__ == "__main__":
    main()
