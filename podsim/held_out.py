"""What a profile's models predict for measured rows, and how far off they are on held-out ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from podsim.attention_features import FEATURES
from podsim.attention_model import AttentionModel
from podsim.batch import BatchShape
from podsim.config import STRATEGIES
from podsim.errors import InputError
from podsim.latency import ProfiledLatency
from podsim.model import Model
from podsim.op_tables import op_seconds
from podsim.points import AttentionPoint
from podsim.profile import Profile

HEAVY_TAIL = 8
"""P99 over P50 of the decodes' contexts, from which on a batch counts as heavy-tailed."""
SEVERAL_CHUNKS = (2, 4)


def points_of(rows: pd.DataFrame) -> list[AttentionPoint]:
    """The batches of attention and step rows."""
    return [
        AttentionPoint.from_text(prefills, decodes, split)
        for prefills, decodes, split in zip(
            rows["prefills"], rows["decodes"], rows["split"], strict=True
        )
    ]


def shapes_of(rows: pd.DataFrame) -> list[BatchShape]:
    return [point.shape for point in points_of(rows)]


def rows_of(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The attention rows that a kernel model is about."""
    rows = rows[rows["op"] == "attention"]
    if name == "prefill":
        return rows[rows["decodes"] == ""]
    if name == "decode":
        return rows[rows["prefills"] == ""]
    return rows[(rows["strategy"] == name) & (rows["prefills"] != "") & (rows["decodes"] != "")]


def without_whole_blocks(rows: pd.DataFrame, block_n: int) -> pd.DataFrame:
    """Without the batches whose decodes all end with a block of keys, as hardly any in serving do.

    As tiles of their own (unified) they save the masked part of a block.
    """
    whole = [
        all(context % block_n == 0 for context in point.decode_contexts)
        for point in points_of(rows)
    ]
    return rows[~np.array(whole, dtype=bool)]


def predictions(profile: Profile, model: Model, rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each measured one of a kernel, an operation or a whole step.

    Columns: kernel, split, batch (text), measured, as_timed and predicted (seconds), heavy_tail,
    several_chunks (bool). `rows` have the columns `seconds` and `seconds_as_timed`.
    """
    return pd.concat([*_attention(profile, model, rows), *_operations(profile, rows),
                      *_steps(profile, model, rows)], ignore_index=True)  # fmt: skip


def _attention(profile: Profile, model: Model, rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    attention = AttentionModel.of(model, profile.attention)
    for name in FEATURES:
        mine = rows_of(rows, name)
        points = points_of(mine)
        predicted = [attention.seconds(name, point.shape) for point in points]
        yield _table(f"attention {name}", mine, predicted, points)


def _operations(profile: Profile, rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    for name, table in profile.ops.items():
        mine = rows[rows["op"] == name]
        yield _table(name, mine, op_seconds(table, mine["num_tokens"]), None)


def _steps(profile: Profile, model: Model, rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    steps = rows[rows["op"] == "step"]
    for strategy in STRATEGIES:
        mine = steps[steps["strategy"] == strategy]
        latency = ProfiledLatency(profile, model, strategy)
        points = points_of(mine)
        predicted = [latency.step_time(point.shape) for point in points]
        yield _table(f"step {strategy}", mine, predicted, points)


def _table(
    kernel: str, rows: pd.DataFrame, predicted: ArrayLike, points: list[AttentionPoint] | None
) -> pd.DataFrame:
    tokens = [f"{n} tokens" for n in rows["num_tokens"]]
    return pd.DataFrame(
        {
            "kernel": kernel,
            "split": rows["split"].to_numpy(),
            "batch": tokens if points is None else [point.summary for point in points],
            "measured": rows["seconds"].to_numpy(),
            "as_timed": rows["seconds_as_timed"].to_numpy(),
            "predicted": np.asarray(predicted, dtype=float),
            "heavy_tail": [is_heavy_tailed(point) for point in points or ()] or False,
            "several_chunks": [has_several_chunks(point) for point in points or ()] or False,
        }
    )


def is_heavy_tailed(point: AttentionPoint) -> bool:
    """Whether the longest decodes have far more context than most."""
    if not point.decode_contexts:
        return False
    middle, high = np.percentile(point.decode_contexts, (50, 99))
    return bool(high >= HEAVY_TAIL * middle)


def has_several_chunks(point: AttentionPoint) -> bool:
    """Whether chunks of several prompts share the batch."""
    low, high = SEVERAL_CHUNKS
    return low <= len(point.prefills) <= high


def held_out_errors(table: pd.DataFrame) -> dict[str, dict[str, object]]:
    """Of `predictions`, the relative error of each kernel on rows that were not fitted on.

    Attention has rows of their own for heavy-tailed batches and for those of 2 to 4 chunks, where
    there are such batches. Rows that were brought to their usual clock (`podsim.row_clocks`) have
    the errors against what was timed too. Raises InputError if a kernel has no held-out rows.
    """
    errors: dict[str, dict[str, object]] = {}
    for kernel, rows in table.groupby("kernel", sort=False):
        held_out = rows[rows["split"] == "held_out"]
        if held_out.empty:
            raise InputError(f"measurements.csv: '{kernel}' has no held-out rows")
        errors[str(kernel)] = _error(held_out)
        if not str(kernel).startswith("attention"):
            continue
        for name, column in (("heavy tail", "heavy_tail"), ("several chunks", "several_chunks")):
            some = held_out[held_out[column]]
            if len(some):
                errors[f"{kernel}, {name}"] = _error(some)
    return errors


def _error(rows: pd.DataFrame) -> dict[str, object]:
    relative, as_timed = (
        (rows["predicted"] / rows[column] - 1).to_numpy() for column in ("measured", "as_timed")
    )
    worst = str(rows["batch"].iloc[int(np.abs(relative).argmax())])
    error = {**error_summary(relative), "worst_batch": worst}
    if not np.array_equal(relative, as_timed):
        timed = error_summary(as_timed)
        error |= {f"{name}_as_timed": timed[name] for name in ("median", "p90", "bias")}
    return error


def error_summary(relative: NDArray[np.float64]) -> dict[str, float]:
    """What a profile says of relative errors: of their size, and with their sign."""
    size = np.abs(relative)
    return {
        "points": len(relative),
        "median": round(float(np.median(size)), 4),
        "p90": round(float(np.percentile(size, 90)), 4),
        "worst": round(float(size.max()), 4),
        "bias": round(float(relative.mean()), 4),
        "signed_p10": round(float(np.percentile(relative, 10)), 4),
        "signed_p90": round(float(np.percentile(relative, 90)), 4),
    }
