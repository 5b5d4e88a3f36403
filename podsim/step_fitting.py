"""Fits what whole steps take beside the sum of their parts: see `ProfiledLatency.matrix_share`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.config import STRATEGIES
from podsim.held_out import shapes_of
from podsim.latency import OVERLAPPING, ProfiledLatency
from podsim.model import Model
from podsim.profile import Profile

ROUNDS = 10
"""In which each number takes what the other leaves; the second changes it by 1 %."""

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


def fit_steps(profile: Profile, model: Model, grid: pd.DataFrame) -> dict[str, float]:
    """`slowdown` and `layer_gap`, and to how many steps they were fitted.

    `layer_gap` is the median over steps of decodes alone, which have little else; `slowdown` is the
    least squares of what is left of steps with prefill. Both are of strategies that overlap
    nothing. Without whole steps to fit on there is none.
    """
    steps = _steps(profile, model, grid)
    columns: Floats = np.array(steps, dtype=np.float64).reshape(-1, len(Step._fields))
    has_prefill, share, seconds, missing = columns.T
    with_prefill, load, quiet = has_prefill > 0, share**2, (1 - share) ** 2
    slowdown = gaps = 0.0
    for _ in range(ROUNDS):
        if not with_prefill.all():
            left = missing - slowdown * load * seconds
            gaps = max(0.0, float(np.median((left / quiet)[~with_prefill])))
        left = (missing - gaps * quiet) / seconds
        if with_prefill.any():
            slowdown = _through_zero(load[with_prefill], left[with_prefill])
    return {"slowdown": slowdown, "layer_gap": gaps / model.num_layers, "steps": len(steps)}


def _steps(profile: Profile, model: Model, grid: pd.DataFrame) -> list[Step]:
    rows = grid[grid["op"] == "step"]
    found = []
    for strategy in STRATEGIES:
        if strategy in OVERLAPPING:
            continue
        latency = ProfiledLatency(profile, model, strategy)
        timed = rows[rows["strategy"] == strategy]
        for shape, seconds in zip(shapes_of(timed), timed["seconds"], strict=True):
            parts = latency.breakdown(shape)
            layers = parts.attention + parts.layers
            drawing = latency.attention_time(shape).drawing
            share = latency.matrix_share(shape.num_tokens, layers, drawing)
            found.append(Step(bool(shape.prefills), share, layers, seconds - parts.once - layers))
    return found


def _through_zero(x: Floats, y: Floats) -> float:
    """Slope of the line through 0 with the least squares; not negative."""
    return max(0.0, float(x @ y / (x @ x)))
