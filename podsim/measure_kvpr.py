"""Times real decode layers with the KV cache in host memory, against the same without.

Rows of `layers.csv` (docs/memory.md): chains of layers at points drawn at random, with the cache on
the GPU (resident), all transferred (split 0), and with several splits around the predicted one.
Nothing is fitted to them: they judge the predictions. Before it is timed, every split is checked to
give what it should (`podsim.check_offload`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from podsim.check_offload import NUM_CACHES, split_errors
from podsim.offloaded_layers import HostBuffers, OffloadedLayers
from podsim.offloaded_shapes import SHAPES

NUM_LAYERS = 6
RESIDENT = -1
"""In the place of a split: the cache is on the GPU."""
POINTS_PER_MODEL = 7
SEED = 6
"""Of the points. Another whenever the model of a layer changes, which then has not seen them."""
MOST_TOKENS = 131072
"""Of a point, all requests together: 2 GB of K and V in a layer of 4096."""
FRACTIONS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4)
"""Splits that are timed, of the predicted one,"""
OF_CONTEXT = (0.1, 0.25, 0.5, 0.75)
"""and of the context, whatever is predicted: in a row, where what a layer waits for changes by the
split. In a column it waits for its weights, and the times are straight."""
PASSES = 2
REPEATS = 3
LEAD_CYCLES = 20_000_000
"""About ten milliseconds that the GPU sleeps while the host queues a chain."""

Row = dict[str, object]
Progress = Callable[[str], None]
Predict = Callable[[str, int, int, str], int]
"""The split predicted best, in tokens of each request: of model, batch, context and schedule."""


class Point(NamedTuple):
    model: str
    batch: int
    context: int


def points() -> list[Point]:
    """Batches of 1 to 64 and contexts of 128 to 8192, evenly spread in their logarithms."""
    rng = np.random.default_rng(SEED)
    found = []
    for model in SHAPES:
        mine: list[Point] = []
        while len(mine) < POINTS_PER_MODEL:
            batch = round(2 ** rng.uniform(0, 6))
            context = round(2 ** rng.uniform(7, 13))
            if batch * context <= MOST_TOKENS:
                mine.append(Point(model, batch, context))
        found += mine
    return found


def measure(
    schedule: str, predict: Predict, on_progress: Progress = lambda text: None
) -> list[Row]:
    """Every row of a schedule. RuntimeError if a split gives something else than it should."""
    host = _host_buffers(points())
    rows = []
    for point in points():
        on_progress(f"{point.model}, batch {point.batch}, context {point.context}, {schedule}")
        rows += _measure_point(point, schedule, host, predict(*point, schedule))
        torch.cuda.empty_cache()
    return rows


def check(rows: pd.DataFrame, on_progress: Progress = lambda text: None) -> pd.DataFrame:
    """Rows that were timed, with the `error` that `measure` gives each. RuntimeError as there."""
    chains = []
    for key, group in rows.groupby([*Point._fields, "schedule"], sort=False):
        model, batch, context, schedule = map(str, key)
        chains.append((Point(model, int(batch), int(context)), schedule, group["split"]))
    host = _host_buffers([point for point, _, _ in chains])
    errors = pd.Series(float("nan"), rows.index)
    for point, schedule, splits in chains:
        on_progress(f"{point.model}, batch {point.batch}, context {point.context}, {schedule}")
        timed = sorted(set(splits) - {RESIDENT})
        errors[splits.index] = splits.map(_errors(point, schedule, timed, host))
        torch.cuda.empty_cache()
    return rows.assign(error=errors)


def _host_buffers(places: Sequence[Point]) -> HostBuffers:
    """Room for the caches of a check, which has the most."""
    most = max(point.batch * point.context * SHAPES[point.model].hidden_size for point in places)
    return HostBuffers(NUM_CACHES * 3 * most, torch.bfloat16, torch.device("cuda"))


def _errors(
    point: Point, schedule: str, splits: Sequence[int], host: HostBuffers
) -> dict[int, float]:
    host.reset()
    shape = SHAPES[point.model]
    return split_errors(
        shape, point.batch, point.context, schedule, splits, num_layers=NUM_LAYERS, host=host
    )


def _measure_point(point: Point, schedule: str, host: HostBuffers, predicted: int) -> list[Row]:
    of_context = OF_CONTEXT if schedule == "row" else ()
    splits = splits_around(predicted, point.context, of_context)
    errors = _errors(point, schedule, splits, host)
    host.reset()
    layers = OffloadedLayers(
        SHAPES[point.model],
        batch=point.batch,
        context=point.context,
        num_layers=NUM_LAYERS,
        host=host,
        weights_on_host=schedule == "column",
    )
    chains: dict[int, Callable[[], object]] = {RESIDENT: layers.resident}
    chains |= {split: partial(layers.offloaded, split, schedule) for split in splits}
    for split in (RESIDENT, 0, splits[-1]):  # the first time is not timed
        chains[split]()
    rows = []
    rng = np.random.default_rng(0)
    for number in range(PASSES):
        for split in rng.permutation(list(chains)).tolist():
            seconds = [_seconds(chains[split]) for _ in range(REPEATS)]
            place = {"schedule": schedule, "layers": NUM_LAYERS, "split": split, "pass": number}
            times = {"time_us": float(np.median(seconds)) * 1e6, "repeats": REPEATS}
            rows.append(point._asdict() | place | times | {"error": errors.get(split)})
    return rows


def splits_around(predicted: int, context: int, of_context: Sequence[float] = ()) -> list[int]:
    """Nothing, everything, what lies around the predicted split, and parts of the context, in whole
    tokens.
    """
    near = {round(fraction * predicted) for fraction in FRACTIONS}
    near |= {round(fraction * context) for fraction in of_context}
    return sorted({0, context, *(split for split in near if 0 < split < context)})


def _seconds(chain: Callable[[], object]) -> float:
    """Of one run of a chain, all of it queued before it begins."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    chain()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000
