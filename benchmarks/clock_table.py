"""Whole steps by the clock that they ran at, beside what is predicted; no GPU.

    python benchmarks/clock_table.py validation/h200/e9214e9e/profile
    python benchmarks/clock_table.py validation/h200/2b883af9/summary-serial-1024-0.95

Of a profile: its steps with prefill under serial, timed alone or, one after another from rest, in
windows of seconds (long contexts under POD too). Of recordings whose engine noted the clock of
every step: all steps, by kind.

Their parts were timed at another clock. `by clock` is what the parts take at the clock of the step,
over what was measured, minus 1: matrix products and attention follow the clock as the passes of the
profile over one point do (`clock_sensitivity`), in steps with prefill by `follows` of that and
`longer` by a share, and nothing else does. Profiles read the clocks of
windows, and engines note those of steps, since 2026-11-22. Of a recording, `predicted` is what the
simulator says, which predicts the clock too. Errors are means, `scatter` standard deviations.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy_table import errors_on_gpu

from podsim.batch import BatchShape
from podsim.calibration import model_of, read_measurements
from podsim.held_out import shapes_of
from podsim.latency import ProfiledLatency
from podsim.metrics import STEP_KINDS, step_kinds
from podsim.model import model_named
from podsim.profile import PROFILE_FILE, Profile, find_profile, read_profile
from podsim.validation import CLOCK_COLUMN, read_recording


class Parts:
    """What the parts of a step take, each as it is timed alone, and how they follow the clock."""

    def __init__(self, profile: Profile, strategy: str, graph_padding: bool = False) -> None:
        self._latency = ProfiledLatency(
            profile, model_of(profile), strategy, graph_padding=graph_padding
        )
        self._highest = float(str(profile.provenance["max_sm_clock"]).removesuffix("MHz"))

    def seconds(self, shape: BatchShape, megahertz: float) -> tuple[float, float]:
        """Their sum, without the host, and at another clock."""
        parts = self._latency.parts(shape)
        total = parts.attention + parts.layers + parts.once
        warming = self._latency.warming
        fall = math.log(self._highest / megahertz)
        as_timed = self._latency.clock_fall(shape.num_tokens)
        slower = math.expm1(fall - as_timed)
        if warming is not None and shape.prefills:
            slower = warming.slower(fall, as_timed)
        return total, total + (parts.clocked_attention + parts.clocked_layers) * slower

    def clock(self, num_tokens: int) -> float:
        """At which the parts of so many tokens were timed, in MHz."""
        return self._highest * math.exp(-self._latency.clock_fall(num_tokens))


def rows_by_clock(folder: Path) -> pd.DataFrame:
    """Of each step with prefill of a profile: batch, clocks of its parts and its own, errors."""
    profile = read_profile(folder, str(folder))
    parts = {name: Parts(profile, name) for name in ("serial", "pod")}
    rows = read_measurements(folder / "measurements.csv")
    rows = rows[rows["op"].isin(["step", "sustained", "duty"]) & (rows["prefills"] != "")]
    rows = rows[rows["sm_clock_mhz"].notna() & ~rows["strategy"].str.startswith("decode ")]
    rows = rows[(rows["op"] != "step") | (rows["strategy"] == "serial")]
    return pd.DataFrame(_errors(parts, rows))


def _errors(parts: dict[str, Parts], rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    for shape, row in zip(shapes_of(rows), rows.itertuples(), strict=True):
        mine = parts.get(row.split, parts["serial"])
        total, by_clock = mine.seconds(shape, row.sm_clock_mhz)
        measured = float(row.time_us) * 1e-6
        yield {
            "op": row.op,
            "prefills": row.prefills,
            "decodes": row.decodes,
            "split, window": row.split if row.op == "step" else f"{row.split}, {row.strategy}",
            "tokens": shape.num_tokens,
            "MHz of parts": round(mine.clock(shape.num_tokens)),
            "MHz": round(row.sm_clock_mhz),
            "sum of parts": total / measured - 1.0,
            "by clock": by_clock / measured - 1.0,
        }


def steps_by_clock(folder: Path) -> pd.DataFrame:
    """Of a recording's kinds of steps: clocks and errors on the GPU alone."""
    recorded = read_recording(folder)
    if CLOCK_COLUMN not in recorded.steps:
        raise SystemExit(f"{folder}: its engine did not note the clock of its steps")
    served, clocks = recorded.deployment, recorded.steps[CLOCK_COLUMN].to_numpy()
    beside = None if served.profile is None else Path(served.profile)
    profile = find_profile(served.gpu, model_named(served.model), beside)
    parts = Parts(profile, served.attention, graph_padding=True)
    seconds = np.array(
        [parts.seconds(*step)[1] for step in zip(recorded.shapes, clocks.tolist(), strict=True)]
    )
    by_clock = seconds / recorded.steps["gpu_seconds"].to_numpy() - 1.0
    predicted, kinds = errors_on_gpu(recorded), step_kinds(recorded.steps)
    rows = []
    for index, kind in enumerate(STEP_KINDS):
        mine = kinds == index
        if mine.any():
            rows.append(
                {
                    "run": recorded.name,
                    "kind": kind,
                    "steps": int(mine.sum()),
                    "MHz": round(float(clocks[mine].mean())),
                    "predicted": predicted[mine].mean(),
                    "scatter": predicted[mine].std(),
                    "by clock": by_clock[mine].mean(),
                    "its scatter": by_clock[mine].std(),
                }
            )
    return pd.DataFrame(rows)


def show(rows: pd.DataFrame) -> None:
    errors = rows.select_dtypes("float").columns
    print(rows.to_string(index=False, formatters=dict.fromkeys(errors, "{:+.1%}".format)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="a profile, or recordings")
    folders = parser.parse_args().folders
    profiles = [folder for folder in folders if (folder / PROFILE_FILE).exists()]
    for folder in profiles:
        found = rows_by_clock(folder)
        show(found)
        for op, some in found.groupby("op"):
            sizes = [f"{name} {some[name].abs().median():.1%}, bias {some[name].mean():+.1%}"
                     for name in ("sum of parts", "by clock")]  # fmt: skip
            print(f"{op}, {len(some)} rows: median error of the {'; '.join(sizes)}")
    recordings = [folder for folder in folders if folder not in profiles]
    if recordings:
        show(pd.concat([steps_by_clock(folder) for folder in recordings]))


if __name__ == "__main__":
    main()
