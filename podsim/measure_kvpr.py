"""Times real decode layers with the KV cache in host memory, against the same without.

Rows of `layers.csv` (docs/memory.md): chains of layers at points drawn at random, with the cache on
the GPU (resident), all transferred (split 0), and with several splits around the predicted one.
Nothing is fitted to them: they judge the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

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
    """Every row of a schedule. RuntimeError if a chain gives something else than resident."""
    widest = max(shape.hidden_size for shape in SHAPES.values())
    host = HostBuffers(MOST_TOKENS * 3 * widest, torch.bfloat16, torch.device("cuda"))
    rows = []
    for point in points():
        on_progress(f"{point.model}, batch {point.batch}, context {point.context}, {schedule}")
        rows += _measure_point(point, schedule, host, predict(*point, schedule))
        torch.cuda.empty_cache()
    return rows


def _measure_point(point: Point, schedule: str, host: HostBuffers, predicted: int) -> list[Row]:
    host.reset()
    layers = OffloadedLayers(
        SHAPES[point.model],
        batch=point.batch,
        context=point.context,
        num_layers=NUM_LAYERS,
        host=host,
        weights_on_host=schedule == "column",
    )
    of_context = OF_CONTEXT if schedule == "row" else ()
    splits = splits_around(predicted, point.context, of_context)
    _check(layers, splits, schedule)
    chains: dict[int, Callable[[], object]] = {RESIDENT: layers.resident}
    chains |= {split: partial(layers.offloaded, split, schedule) for split in splits}
    rows = []
    rng = np.random.default_rng(0)
    for number in range(PASSES):
        for split in rng.permutation(list(chains)).tolist():
            seconds = [_seconds(chains[split]) for _ in range(REPEATS)]
            place = {"schedule": schedule, "layers": NUM_LAYERS, "split": split, "pass": number}
            times = {"time_us": float(np.median(seconds)) * 1e6, "repeats": REPEATS}
            rows.append(point._asdict() | place | times)
    return rows


def splits_around(predicted: int, context: int, of_context: Sequence[float] = ()) -> list[int]:
    """Nothing, everything, what lies around the predicted split, and parts of the context, in whole
    tokens.
    """
    near = {round(fraction * predicted) for fraction in FRACTIONS}
    near |= {round(fraction * context) for fraction in of_context}
    return sorted({0, context, *(split for split in near if 0 < split < context)})


def _check(layers: OffloadedLayers, splits: Sequence[int], schedule: str) -> None:
    """Whether all chains give the same: recomputed K and V are rounded like those transferred."""
    expected = layers.resident().float()
    for split in (0, splits[len(splits) // 2], splits[-1]):
        found = layers.offloaded(split, schedule).float()
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < 0.02:
            raise RuntimeError(f"split {split}: off by {error:.1%} of the largest value")


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
