"""What strategies that overlap take longer in whole steps than serial does; needs no GPU.

    python benchmarks/overlap_in_steps.py

Of every profile: whole steps under `streams` and `pod` that are there to fit on, beside serial ones
of the same batch. What they exceed their parts by more than serial does, over the layers' seconds,
is fitted by `OVERLAP_LOSS` (of the hidden seconds, times the matrix products' share) and
`OVERLAP_COST` (of all): on one profile, and on all but one. The errors are those on held-out whole
steps of the profile itself, of which nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim import latency
from podsim.batch import BatchShape
from podsim.calibration import model_of, rows_at_usual_clock
from podsim.held_out import shapes_of
from podsim.latency import OVERLAPPING, ProfiledLatency
from podsim.profile import read_profile

ROOT = Path(__file__).parent.parent
COLUMNS = ["hidden", "constant"]


def main() -> None:
    latency.OVERLAP_LOSS = latency.OVERLAP_COST = 0.0  # what is to be found
    rows = pd.concat([rows_of(folder) for folder in profiles()])
    grid, held_out = (rows[rows["split"] == split] for split in ("grid", "held_out"))
    print("profile                    loss   cost  none   own fit  fit of the others")
    errors = []
    for name in rows["profile"].unique():
        own, others = grid[grid["profile"] == name], grid[grid["profile"] != name]
        judged = held_out[held_out["profile"] == name]
        loss, cost = fitted(own)
        coefficients = (np.zeros(2), fitted(own), fitted(others))
        mine = [judged["excess"] - judged[COLUMNS].to_numpy() @ found for found in coefficients]
        errors.append(mine)
        sizes = " ".join(f"{error.abs().mean():8.2%}" for error in mine)
        print(f"{name:24} {loss:+7.2f} {cost:+6.2%} {sizes}")
    together = [pd.concat(error).abs().mean() for error in zip(*errors, strict=True)]
    loss, cost = fitted(grid)
    print(f"{'all':24} {loss:+7.2f} {cost:+6.2%} " + " ".join(f"{size:8.2%}" for size in together))


def profiles() -> list[Path]:
    """The shipped ones, and those of other cards beside recordings, each once."""
    shipped = sorted(path.parent for path in (ROOT / "profiles" / "h200").glob("*/profile.json"))
    beside = {
        path.parent.parent.name: path.parent
        for tree in ("h200-again", "h200")
        for path in sorted((ROOT / "validation" / tree).glob("*/profile/profile.json"))
    }
    return [*shipped, *beside.values()]


def rows_of(folder: Path) -> pd.DataFrame:
    """Of each step that overlaps: what it exceeds its parts by more than serial does."""
    name = folder.parent.name if folder.name == "profile" else folder.name
    return pd.DataFrame(_excesses(folder)).assign(profile=name)


def _excesses(folder: Path) -> Iterator[dict[str, object]]:
    profile = read_profile(folder, str(folder))
    model, rows = model_of(profile), rows_at_usual_clock(folder, profile)
    rows = rows[(rows["op"] == "step") & (rows["prefills"] != "") & (rows["decodes"] != "")]
    by_serial: dict[BatchShape, float] = {}
    for strategy in ("serial", *OVERLAPPING):
        provider = ProfiledLatency(profile, model, strategy)
        mine = rows[rows["strategy"] == strategy]
        for shape, row in zip(shapes_of(mine), mine.itertuples(), strict=True):
            parts = provider.breakdown(shape)
            layers = parts.attention + parts.layers
            excess = (float(row.seconds) - parts.total) / layers
            if strategy == "serial":
                by_serial[shape] = excess
            elif shape in by_serial:
                time = provider.attention_time(shape)
                share = provider.matrix_share(shape.num_tokens, layers, time.drawing)
                yield {
                    "split": row.split,
                    "hidden": share * time.hidden / layers,
                    "constant": 1.0,
                    "excess": excess - by_serial[shape],
                }


def fitted(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Loss and cost with the least squares."""
    found, *_ = np.linalg.lstsq(rows[COLUMNS].to_numpy(), rows["excess"].to_numpy(), rcond=None)
    return np.asarray(found)


if __name__ == "__main__":
    main()
