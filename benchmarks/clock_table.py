"""Whole steps by the clock that they ran at, beside what is predicted; no GPU.

    python benchmarks/clock_table.py validation/h200/e9214e9e/profile
    python benchmarks/clock_table.py validation/h200/2b883af9/summary-serial-1024-0.95
    python benchmarks/clock_table.py --sizes validation/h200/4ac2db1d/chat-*

Of a profile: its steps with prefill under serial, timed alone or, one after another from rest, in
windows of seconds (long contexts under POD too). Of recordings whose engine noted the clock of
every step: all steps, by kind.

Their parts were timed at another clock. `by clock` is what the parts take at the clock of the step,
over what was measured, minus 1: matrix products and attention follow the clock as the passes of the
profile over one point do (`clock_sensitivity`), in steps with prefill by `follows` of that and
`longer` by a share, and nothing else does. Profiles read the clocks of
windows, and engines note those of steps, since 2026-11-22. Of a recording, `predicted` is what the
simulator says, which predicts the clock too. Errors are means, `scatter` standard deviations.

With `--sizes` the steps with prefill of all recordings together, by the size of their graph. `per
1 %` is how much `by clock` rises with a clock that is 1 % lower. Where it is above 0, a lower clock
makes steps longer by less than their matrix products and attention are taken to be.
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
from podsim.errors import InputError
from podsim.graph_sizes import graph_size
from podsim.held_out import shapes_of
from podsim.latency import ProfiledLatency
from podsim.metrics import STEP_KINDS, step_kinds
from podsim.model import model_named
from podsim.profile import PROFILE_FILE, Profile, find_profile, read_profile
from podsim.validation import CLOCK_COLUMN, read_recording

FEWEST_STEPS = 20
"""Of a size, to say how they follow the clock."""


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


def recorded_steps(folder: Path) -> pd.DataFrame:
    """Of each step of a recording: kind, size of its graph, clock, errors on the GPU alone."""
    recorded = read_recording(folder)
    if CLOCK_COLUMN not in recorded.steps:
        raise InputError(f"{folder}: its engine did not note the clock of its steps")
    served, clocks = recorded.deployment, recorded.steps[CLOCK_COLUMN].to_numpy()
    beside = None if served.profile is None else Path(served.profile)
    profile = find_profile(served.gpu, model_named(served.model), beside)
    parts = Parts(profile, served.attention, graph_padding=True)
    seconds = np.array(
        [parts.seconds(*step)[1] for step in zip(recorded.shapes, clocks.tolist(), strict=True)]
    )
    return pd.DataFrame(
        {
            "run": recorded.name,
            "kind": np.array(STEP_KINDS)[step_kinds(recorded.steps)],
            "size": [graph_size(shape.num_tokens) for shape in recorded.shapes],
            "MHz": clocks,
            "predicted": errors_on_gpu(recorded),
            "by clock": seconds / recorded.steps["gpu_seconds"].to_numpy() - 1.0,
        }
    )


def steps_by_clock(steps: pd.DataFrame) -> pd.DataFrame:
    """Of each run's kinds of steps: clocks and errors."""
    return pd.DataFrame(
        {"run": run, "kind": kind, **_means(some)}
        for (run, kind), some in steps.groupby(["run", "kind"], sort=False)
    )


def sizes_by_clock(steps: pd.DataFrame) -> pd.DataFrame:
    """The same of steps with prefill, by size; those of which there are enough."""
    rows = []
    for size, some in steps[steps["kind"] != "decode"].groupby("size"):
        if len(some) >= FEWEST_STEPS:
            slope = float(np.polyfit(np.log(some["MHz"]), some["by clock"], 1)[0])
            rows.append({"size": size, **_means(some), "per 1 %": -0.01 * slope})
    if not rows:
        raise InputError(f"no size of graph has {FEWEST_STEPS} steps with prefill")
    return pd.DataFrame(rows)


def _means(steps: pd.DataFrame) -> dict[str, float]:
    return {
        "steps": len(steps),
        "MHz": round(float(steps["MHz"].mean())),
        "predicted": steps["predicted"].mean(),
        "scatter": steps["predicted"].std(ddof=0),
        "by clock": steps["by clock"].mean(),
        "its scatter": steps["by clock"].std(ddof=0),
    }


def show(rows: pd.DataFrame) -> None:
    errors = rows.select_dtypes("float").columns
    formats = dict.fromkeys(errors, "{:+.1%}".format) | {"per 1 %": "{:+.2%}".format}
    print(rows.to_string(index=False, formatters=formats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="a profile, or recordings")
    parser.add_argument("--sizes", action="store_true", help="of recordings: by size of the graph")
    arguments = parser.parse_args()
    try:
        show_all(arguments.folders, arguments.sizes)
    except InputError as error:
        raise SystemExit(str(error)) from None


def show_all(folders: list[Path], by_size: bool) -> None:
    profiles = [folder for folder in folders if (folder / PROFILE_FILE).exists()]
    if by_size and profiles:
        raise InputError(f"{profiles[0]}: --sizes is of recordings, and this is a profile")
    for folder in profiles:
        found = rows_by_clock(folder)
        show(found)
        for op, some in found.groupby("op"):
            sizes = [f"{name} {some[name].abs().median():.1%}, bias {some[name].mean():+.1%}"
                     for name in ("sum of parts", "by clock")]  # fmt: skip
            print(f"{op}, {len(some)} rows: median error of the {'; '.join(sizes)}")
    recordings = [folder for folder in folders if folder not in profiles]
    if recordings:
        steps = pd.concat([recorded_steps(folder) for folder in recordings])
        show(sizes_by_clock(steps) if by_size else steps_by_clock(steps))


if __name__ == "__main__":
    main()
