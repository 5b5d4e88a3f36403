"""Whole steps of a profile by the clock that they ran at, beside what is predicted; no GPU.

    python benchmarks/clock_table.py validation/h200/910cdec5/profile

Of steps with prefill under serial: as a row of the profile they were timed alone or, one after
another from rest, in a window of seconds. Their parts were timed at another clock. `by clock` is
what the parts take if matrix products and prefill attention go with the clock and nothing else
does, over what was measured, minus 1: it needs clocks of the windows, which profiles read since
2026-11-22. A line at the end has the mean and the median of the sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from podsim.calibration import model_of, read_measurements
from podsim.held_out import shapes_of
from podsim.latency import ProfiledLatency
from podsim.op_tables import op_seconds
from podsim.profile import Profile, read_profile


def rows_by_clock(folder: Path) -> pd.DataFrame:
    """Of each step with prefill: batch, tokens, clocks of its parts and its own, and errors."""
    profile = read_profile(folder, str(folder))
    rows = read_measurements(folder / "measurements.csv")
    rows = rows[rows["op"].isin(["step", "sustained", "duty"]) & (rows["prefills"] != "")]
    rows = rows[rows["sm_clock_mhz"].notna() & ~rows["strategy"].str.startswith("decode ")]
    rows = rows[(rows["op"] != "step") | (rows["strategy"] == "serial")]
    return pd.DataFrame(_errors(profile, rows))


def _errors(profile: Profile, rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    alone = replace(profile, sustained={**profile.sustained, "slowdown": 0.0})
    model = model_of(profile)
    sums = ProfiledLatency(alone, model, "serial")
    highest = float(str(profile.provenance["max_sm_clock"]).removesuffix("MHz"))
    falls = profile.clock_falls
    clocks = {"num_tokens": falls["num_tokens"], "seconds": falls["falls"]}
    for shape, row in zip(shapes_of(rows), rows.itertuples(), strict=True):
        parts = sums.breakdown(shape)
        layers = parts.attention + parts.layers
        decodes = sums.attention.decode_seconds(
            max(shape.num_decodes, 1), shape.decode_context_sum, shape.decode_context_max
        )
        prefill = parts.attention - model.num_layers * decodes * (shape.num_decodes > 0)
        clocked = sums.matrix_seconds(shape.num_tokens) + max(prefill, 0.0)
        of_parts = highest / (1.0 + float(op_seconds(clocks, shape.num_tokens)))
        by_clock = layers + clocked * (of_parts / row.sm_clock_mhz - 1.0) + parts.once
        measured = float(row.time_us) * 1e-6
        yield {
            "op": row.op,
            "prefills": row.prefills,
            "decodes": row.decodes,
            "split or window": row.split if row.op == "step" else row.strategy,
            "tokens": shape.num_tokens,
            "MHz of parts": round(of_parts),
            "MHz": round(row.sm_clock_mhz),
            "sum of parts": (layers + parts.once) / measured - 1.0,
            "by clock": by_clock / measured - 1.0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="profile")
    found = rows_by_clock(parser.parse_args().folder)
    errors = ["sum of parts", "by clock"]
    print(found.to_string(index=False, formatters=dict.fromkeys(errors, "{:+.1%}".format)))
    for op, some in found.groupby("op"):
        sizes = [f"{name} {some[name].abs().median():.1%}, bias {some[name].mean():+.1%}"
                 for name in errors]  # fmt: skip
        print(f"{op}, {len(some)} rows: median error of the {'; '.join(sizes)}")


if __name__ == "__main__":
    main()
