"""Fits what whole steps take beside the sum of their parts: see `ProfiledLatency.matrix_share`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.batch import BatchShape
from podsim.config import STRATEGIES
from podsim.held_out import shapes_of
from podsim.latency import ProfiledLatency
from podsim.model import Model
from podsim.profile import Profile

ROUNDS = 10
"""In which each number takes what the others leave; the second changes it by 1 %."""

Floats = NDArray[np.float64]


class Step(NamedTuple):
    """A whole step that was timed; seconds without what is run once a step."""

    has_prefill: bool
    share: float
    """The matrix products' share of the layers' time."""
    seconds: float
    """Predicted, of the layers with their attention."""
    missing: float
    """Measured seconds above those."""
    hidden: float
    """Seconds that overlap hides, predicted."""
    serial: float
    """The number of the step with the same batch under serial; -1: none."""


def fit_steps(profile: Profile, model: Model, grid: pd.DataFrame) -> dict[str, float]:
    """`slowdown`, `overlap_loss` and `layer_gap`, and to how many steps they were fitted.

    `layer_gap` is the median over steps of decodes alone, which have little else. `overlap_loss` is
    the least squares of how much more the strategies that overlap exceed their parts than serial
    does with the same batch. `slowdown` is the least squares of what is left of steps with prefill.
    Without whole steps to fit on there is none.
    """
    steps = _steps(profile, model, grid)
    columns: Floats = np.array(steps, dtype=np.float64).reshape(-1, len(Step._fields))
    has_prefill, share, seconds, missing, hidden, serial = columns.T
    with_prefill, load, quiet = has_prefill > 0, share**2, (1 - share) ** 2
    overlap = share * hidden / seconds
    overlaps = (hidden > 0) & (serial >= 0)
    same = serial[overlaps].astype(np.int64)
    slowdown = overlap_loss = gaps = 0.0
    for _ in range(ROUNDS):
        if not with_prefill.all():
            left = missing - slowdown * load * seconds
            gaps = max(0.0, float(np.median((left / quiet)[~with_prefill])))
        left = (missing - gaps * quiet) / seconds
        if overlaps.any():
            excess = left - slowdown * load
            overlap_loss = _through_zero(overlap[overlaps], excess[overlaps] - excess[same])
        if with_prefill.any():
            left -= overlap_loss * overlap
            slowdown = _through_zero(load[with_prefill], left[with_prefill])
    return {
        "slowdown": slowdown,
        "overlap_loss": overlap_loss,
        "layer_gap": gaps / model.num_layers,
        "steps": len(steps),
    }


def _steps(profile: Profile, model: Model, grid: pd.DataFrame) -> list[Step]:
    rows = grid[(grid["op"] == "step") & grid["strategy"].isin(STRATEGIES)]
    found: list[Step] = []
    serial: dict[BatchShape, int] = {}
    for strategy in ("serial", *(name for name in STRATEGIES if name != "serial")):
        latency = ProfiledLatency(profile, model, strategy)
        timed = rows[rows["strategy"] == strategy]
        for shape, seconds in zip(shapes_of(timed), timed["seconds"], strict=True):
            if strategy == "serial":
                serial[shape] = len(found)
            parts = latency.breakdown(shape)
            layers = parts.attention + parts.layers
            time = latency.attention_time(shape)
            found.append(
                Step(
                    bool(shape.prefills),
                    latency.matrix_share(shape.num_tokens, layers, time.drawing),
                    layers,
                    seconds - parts.once - layers,
                    time.hidden,
                    serial.get(shape, -1),
                )
            )
    return found


def _through_zero(x: Floats, y: Floats) -> float:
    """Slope of the line through 0 with the least squares; not negative."""
    return max(0.0, float(x @ y / (x @ x)))
