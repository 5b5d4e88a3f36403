"""How far a profile's steps one after another from rest are from what is predicted; no GPU.

    python benchmarks/heat_table.py profiles/h200/llama-3-8b
    python benchmarks/heat_table.py validation/h200/*/profile

A line for each batch that was timed for seconds: predicted over measured, minus 1, of the mean step
in each window. Steps with prefill, also where steps of decodes alone come between them.

Of several profiles: what is fitted to those steps on each card, and the medians, which
`podsim.heat_fitting` has for profiles that tell too little.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.calibration import model_of, sustained_runs
from podsim.heat import Warming
from podsim.heat_fitting import OF_OTHER_CARDS, predicted
from podsim.profile import read_profile


def warming_of(folder: Path) -> Warming:
    warming = Warming.of(read_profile(folder, str(folder)).sustained)
    if warming is None:
        raise SystemExit(f"{folder}: its steps were not watched one after another from rest")
    return warming


def show_errors(folder: Path) -> None:
    warming = warming_of(folder)
    for run in sustained_runs(folder, model_of(read_profile(folder, str(folder)))):
        errors = predicted(run, warming) / np.asarray(run.seconds) - 1
        ends = zip(run.ends, errors, strict=True)
        print(
            f"{run.batch:40}{run.split:10}",
            *(f"{end:g} s {error:+.1%}" for end, error in ends),
            sep="  ",
        )


def fitted_table(folders: list[Path]) -> pd.DataFrame:
    """A row for each profile: what of OF_OTHER_CARDS is not taken from there, and its medians."""
    rows = {str(folder): asdict(warming_of(folder)) for folder in folders}
    table = pd.DataFrame(rows).T[[*OF_OTHER_CARDS, "products"]].astype(float)
    table = table.where(table != pd.Series(OF_OTHER_CARDS).reindex(table.columns))
    return pd.concat([table, table.median().to_frame("median").T]).round(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="profiles")
    folders = parser.parse_args().folders
    if len(folders) == 1:
        show_errors(folders[0])
    else:
        print(fitted_table(folders).to_string(na_rep=""))


if __name__ == "__main__":
    main()
