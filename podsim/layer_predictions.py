"""Predicted times of offloaded layers, and how far they are from chains that were timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from podsim.held_out import error_summary
from podsim.kvpr import OffloadedLayer
from podsim.memory_costs import MemoryCosts
from podsim.offloaded_shapes import SHAPES, LayerShape

RESIDENT = -1
"""In the place of a split: the cache is on the GPU."""


def predicted_layer(
    costs: MemoryCosts, shape: LayerShape, tokens: int, compute: float, schedule: str
) -> OffloadedLayer:
    """A layer of the chains that are timed, with so many tokens in host memory."""
    load = costs.transfer_costs("h2d pinned beside matrix")
    return OffloadedLayer(
        tokens,
        kv_bytes=2 * shape.num_outputs,
        x_bytes=2 * shape.hidden_size,
        transfer=load,
        recompute=costs.recompute_costs(shape.hidden_size, shape.num_outputs, shape.rotary),
        compute=compute,
        weights=load.at(shape.weight_bytes) if schedule == "column" else 0.0,
        handoff=costs.handoff,
        relay=costs.relay,
    )


def predicted_split(
    costs: MemoryCosts, model: str, batch: int, context: int, schedule: str, num_layers: int = 1
) -> int:
    """Tokens of each request to recompute, in layers that compute nothing besides."""
    layer = predicted_layer(costs, SHAPES[model], batch * context, 0.0, schedule)
    return round(layer.best_split(num_layers, schedule) / batch)


def judge_layers(costs: MemoryCosts, rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """How far predictions are from chains of layers that were timed and never fitted.

    `full` and `kvpr`: times without and with recomputation. `best split`: the predicted one against
    the best measured, `as good`: against the nearest of `as_good`. `regret`: the time with the
    measured split nearest to the predicted one, over the best time.
    """
    found: dict[str, list[float]] = {}
    keys = ["model", "batch", "context", "schedule", "layers"]
    for key, group in rows.groupby(keys, sort=False):
        model, batch, context, schedule, layers = map(str, key)
        point = _Point(model, int(batch), int(context), schedule, int(layers))
        medians = group.groupby("split")["time_us"].median() * 1e-6
        seconds = dict(zip(map(int, medians.index), medians.tolist(), strict=True))
        for name, value in _judged(costs, point, seconds, as_good(group)):
            found.setdefault(f"layers {point.schedule}: {name}", []).append(value)
    return {name: error_summary(np.array(values)) for name, values in found.items()}


class _Point(NamedTuple):
    model: str
    batch: int
    context: int
    schedule: str
    layers: int


def _judged(
    costs: MemoryCosts, point: _Point, seconds: Mapping[int, float], good: tuple[int, int]
) -> Iterator[tuple[str, float]]:
    """What one point says, from its seconds by split and those that are as good as the best."""
    compute = seconds[RESIDENT] / point.layers
    seconds = {split: value for split, value in seconds.items() if split != RESIDENT}
    tokens, shape = point.batch * point.context, SHAPES[point.model]
    layer = predicted_layer(costs, shape, tokens, compute, point.schedule)
    for split, measured in seconds.items():
        predicted = layer.seconds(point.layers, split * point.batch, point.schedule)
        yield ("kvpr" if split else "full"), predicted / measured - 1
    wanted = layer.best_split(point.layers, point.schedule) / point.batch
    best = min(seconds, key=lambda split: seconds[split])
    nearest = min(seconds, key=lambda split: abs(split - wanted))
    yield "best split", split_error(wanted, best)
    yield "as good", split_error(wanted, min(max(round(wanted), good[0]), good[1]))
    yield "regret", seconds[nearest] / seconds[best] - 1


def split_error(wanted: float, best: int) -> float:
    """Of a predicted split, relative to a measured one; 1 if something is recomputed for nothing.
    A token is none.
    """
    if abs(wanted - best) < 1:
        return 0.0
    return wanted / best - 1 if best else 1.0


def as_good(rows: pd.DataFrame) -> tuple[int, int]:
    """Of one point: the splits about the best measured one, first and last, that take no longer
    than it by more than passes differ, in the median of the point. Between timed splits the times
    are taken as straight.
    """
    timed = rows[rows["split"] != RESIDENT].groupby("split")["time_us"]
    medians = timed.median()
    spread = float(((timed.max() - timed.min()) / medians).median())
    at, seconds = medians.index.to_numpy(np.int64), medians.to_numpy()
    splits = np.arange(at[-1] + 1)
    longer = np.interp(splits, at, seconds) > seconds.min() * (1 + spread)
    best = int(at[seconds.argmin()])
    before, after = np.flatnonzero(longer[:best]), np.flatnonzero(longer[best:])
    first = int(before[-1]) + 1 if len(before) else 0
    return first, best + int(after[0]) - 1 if len(after) else int(splits[-1])
