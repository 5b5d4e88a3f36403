"""How far a profile's steps one after another from rest are from what is predicted; no GPU.

    python benchmarks/heat_table.py profiles/h200/llama-3-8b

A line for each batch that was timed for seconds: predicted over measured, minus 1, of the mean step
in each window. Steps with prefill, also where steps of decodes alone come between them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from podsim.calibration import model_of, sustained_runs
from podsim.heat import Warming
from podsim.heat_fitting import predicted
from podsim.profile import read_profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="profile")
    folder = parser.parse_args().folder
    profile = read_profile(folder, str(folder))
    warming = Warming.of(profile.sustained)
    if warming is None:
        raise SystemExit(f"{folder}: its steps were not watched one after another from rest")
    for run in sustained_runs(folder, model_of(profile)):
        errors = predicted(run, warming) / np.asarray(run.seconds) - 1
        ends = zip(run.ends, errors, strict=True)
        print(
            f"{run.batch:40}{run.split:10}",
            *(f"{end:g} s {error:+.1%}" for end, error in ends),
            sep="  ",
        )


if __name__ == "__main__":
    main()
