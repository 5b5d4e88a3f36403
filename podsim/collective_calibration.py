"""Calibration of collectives: which messages are timed, and from the timed rows to their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from podsim.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    COLLECTIVES,
    COLLECTIVES_FILE,
    NVLS_SETTING,
    Collectives,
    MessageTimes,
    error_name,
    read_collectives,
)
from podsim.errors import InputError
from podsim.fit_non_negative import fit_non_negative
from podsim.hardware import Gpu
from podsim.held_out import error_summary
from podsim.model import BYTES_PER_VALUE
from podsim.trace_writers import atomic_file

MEASUREMENTS_FILE = "measurements.csv"
COLUMNS = (
    *("op", "num_gpus", "bytes", "split", "pass"),
    *("time_us", "time_p10_us", "time_p90_us", "calls", "repeats"),
)

SMALLEST, LARGEST = 8 * 2**10, 256 * 2**20
"""Bytes of the messages that are measured."""
SIZES_PER_OCTAVE = 4
NUM_HELD_OUT = 32
HIDDEN_SIZES = (4096, 5120, 8192)
VOCAB_SIZES = (32000, 64000, 128256)
"""Widths of the rows that held-out messages are made of: those of models that are served."""
MOST_JUMP = 3.0
"""Between neighbouring sizes: a message can be sent as two of half its size, each no slower than
the smaller neighbour, so that twice its time is the most; the rest is noise."""
MOST_DROP = 0.5
"""Of a larger message's time against a smaller one's: NCCL changes its algorithm now and then."""


# -------------------------------------------------------------------------------------- points


class CollectivePoint(NamedTuple):
    """A message to time."""

    op: str
    num_bytes: int
    """Of all_reduce, on each GPU; of all_gather, of the gathered result."""
    split: str
    """"grid" to interpolate between, "held_out" to judge by."""


def collective_points(num_gpus: int) -> list[CollectivePoint]:
    """What is timed among so many GPUs: sizes evenly spread over each octave, and messages of
    whole rows of activations (all_reduce) and logits (all_gather), drawn at random.
    """
    rng = np.random.default_rng(0)
    step = SMALLEST // SIZES_PER_OCTAVE
    octaves = (LARGEST // SMALLEST).bit_length() - 1
    grid = [
        (SIZES_PER_OCTAVE + k) * step << octave
        for octave in range(octaves)
        for k in range(SIZES_PER_OCTAVE)
    ]
    points = []
    for op, widths in ((ALL_REDUCE, HIDDEN_SIZES), (ALL_GATHER, VOCAB_SIZES)):
        # Each GPU sends as many values of a gathered message as every other.
        share = BYTES_PER_VALUE * (num_gpus if op == ALL_GATHER else 1)
        sizes = [size // share * share for size in (*grid, LARGEST)]
        points += [CollectivePoint(op, size, "grid") for size in sizes]
        held_out: set[int] = set()
        while len(held_out) < NUM_HELD_OUT:
            wanted = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))
            row = BYTES_PER_VALUE * int(rng.choice(widths))
            size = max(1, round(wanted / row)) * row // share * share
            if SMALLEST < size <= sizes[-1] and size not in sizes:
                held_out.add(size)
        points += [CollectivePoint(op, size, "held_out") for size in sorted(held_out)]
    return points


# ----------------------------------------------------------------------------------------- fit


def write(
    folder: Path, rows: Sequence[Mapping[str, object]], gpu: Gpu, provenance: Mapping[str, object]
) -> Collectives:
    """Leave measurements.csv and collectives.json in a folder; what they hold."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.to_csv(folder / MEASUREMENTS_FILE, index=False, float_format="%.4f")
    return _fit_and_save(folder, gpu, {**provenance, "date": datetime.now(UTC).date().isoformat()})


def refit(folder: Path, gpus: Mapping[str, Gpu]) -> Collectives:
    """Check and fit the rows of an existing folder again, keeping its provenance."""
    old = read_collectives(folder, str(folder))
    if old.gpu not in gpus:
        raise InputError(f"{old.source}: measured on '{old.gpu}', which podsim does not know")
    return _fit_and_save(folder, gpus[old.gpu], old.provenance)


def _fit_and_save(folder: Path, gpu: Gpu, provenance: Mapping[str, object]) -> Collectives:
    found = fit(folder, gpu, provenance)
    with atomic_file(folder / COLLECTIVES_FILE) as file:
        file.write(found.to_json().encode())
    return found


def fit(folder: Path, gpu: Gpu, provenance: Mapping[str, object]) -> Collectives:
    """The times of the rows in `folder`/measurements.csv: of each message the median of its passes,
    and the line with the least relative error through them.

    Raises InputError, naming line or message, for rows that cannot be read, lack a pass, or are of
    times that cannot be.
    """
    path = folder / MEASUREMENTS_FILE
    rows = _read_rows(path)
    in_switch = provenance.get(NVLS_SETTING) != "0"
    columns = [rows[name].tolist() for name in ("op", "num_gpus", "bytes", "time_us")]
    for line, (op, num_gpus, num_bytes, time_us) in enumerate(zip(*columns, strict=True), 2):
        least = least_seconds(op, num_gpus, num_bytes, gpu, in_switch) * 1e6
        if time_us < least:
            raise InputError(
                f"{path}:{line}: {op} of {num_bytes} bytes among {num_gpus} GPUs took "
                f"{time_us:.1f} us, but the links need {least:.1f} us"
            )
    tables: dict[str, dict[str, dict[str, Any]]] = {op: {} for op in COLLECTIVES}
    errors = {}
    for num_gpus in sorted(set(rows["num_gpus"].tolist())):
        for op in COLLECTIVES:
            mine = rows[(rows["op"] == op) & (rows["num_gpus"] == num_gpus)]
            name = error_name(op, num_gpus)
            table, errors[name] = _fit_one(f"{path}: {name}", mine, rows["pass"].nunique())
            tables[op][str(num_gpus)] = table
    return Collectives(str(folder), gpu.name, provenance, tables, errors)


def least_seconds(op: str, num_gpus: int, num_bytes: int, gpu: Gpu, in_switch: bool) -> float:
    """What a GPU's links need for the bytes that must come in; 0 if their rate is unknown.

    Of a gathered message that is all but its own share. Adding up without the switches' help
    needs that twice: the parts to add, then the sums of the others (Thakur et al. 2005).
    """
    if gpu.link_bandwidth is None:
        return 0.0
    times = 1 if op == ALL_GATHER or in_switch else 2
    return times * (num_gpus - 1) / num_gpus * num_bytes / gpu.link_bandwidth


def _read_rows(path: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
        missing = sorted(set(COLUMNS) - set(rows.columns))
        if missing:
            raise InputError(f"{path}: misses the column {missing[0]}")
        kinds = {"num_gpus": np.int64, "bytes": np.int64, "time_us": np.float64}
        rows = rows.astype(kinds)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a table of measurements: {error}") from None
    for name, allowed in (("op", COLLECTIVES), ("split", ("grid", "held_out"))):
        unknown = rows[~rows[name].isin(allowed)]
        if len(unknown):
            line, value = unknown.index[0] + 2, unknown[name].iloc[0]
            raise InputError(f"{path}:{line}: {name} is {value!r}, expected {' or '.join(allowed)}")
    wrong = rows[~((rows["time_us"] > 0) & (rows["bytes"] > 0) & (rows["num_gpus"] > 1))]
    if len(wrong):
        raise InputError(f"{path}:{wrong.index[0] + 2}: a time, size or number of GPUs cannot be")
    if rows.empty:
        raise InputError(f"{path}: no rows")
    return rows


def _fit_one(
    name: str, rows: pd.DataFrame, num_passes: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The table of one collective among so many GPUs, and its held-out error."""
    timings: dict[tuple[str, int], list[float]] = {}
    for row in zip(*(rows[key].tolist() for key in ("split", "bytes", "time_us")), strict=True):
        timings.setdefault(row[:2], []).append(row[2])
    found: dict[str, dict[int, float]] = {"grid": {}, "held_out": {}}
    for (split, size), microseconds in sorted(timings.items()):
        count = len(microseconds)
        if count != num_passes:
            raise InputError(f"{name}: {count} rows of {size} bytes, expected {num_passes}")
        found[split][size] = round(median(microseconds) * 1e-6, 10)
    grid, held_out = found["grid"], found["held_out"]
    if len(grid) < 2 or not held_out:
        raise InputError(f"{name}: too few rows of the grid, or none held out")
    for (size, seconds), (larger, longer) in pairwise(grid.items()):
        most = MOST_JUMP * max(1.0, larger / size / 2)
        if not MOST_DROP * seconds <= longer <= most * seconds:
            raise InputError(
                f"{name}: {size} bytes took {seconds * 1e6:.1f} us, but {larger} bytes "
                f"{longer * 1e6:.1f} us: measure again"
            )
    times = MessageTimes(list(grid), list(grid.values()), *_line(grid))
    predicted = np.array([times.at(size) for size in held_out])
    table: dict[str, Any] = {
        "latency": times.latency,
        "seconds_per_byte": times.seconds_per_byte,
        "bytes": [*grid],
        "seconds": [*grid.values()],
    }
    return table, error_summary(predicted / np.array(list(held_out.values())) - 1)


def _line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Latency and seconds a byte of messages by their bytes, neither negative."""
    sizes = np.array(list(seconds), dtype=np.float64)
    features = np.stack([np.ones(len(sizes)), sizes], axis=1)
    latency, per_byte = fit_non_negative(features, np.array(list(seconds.values()))).tolist()
    return round(latency, 10), float(f"{per_byte:.4g}")
