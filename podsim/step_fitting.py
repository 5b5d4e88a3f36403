"""Fits what whole steps take beside the sum of their parts: see `ProfiledLatency`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from podsim.held_out import shapes_of
from podsim.latency import ProfiledLatency
from podsim.model import Model
from podsim.profile import Profile


def fit_steps(profile: Profile, model: Model, grid: pd.DataFrame) -> dict[str, float]:
    """`layer_gap`, and to how many steps it was fitted.

    The median over steps of decodes alone, which have little else. Without any there is none.
    """
    rows = grid[(grid["op"] == "step") & (grid["strategy"] == "serial") & (grid["prefills"] == "")]
    latency = ProfiledLatency(profile, model, "serial")
    gaps = []
    for shape, seconds in zip(shapes_of(rows), rows["seconds"], strict=True):
        parts = latency.parts(shape)
        layers = parts.attention + parts.layers
        quiet = 1.0 - parts.products / layers
        gaps.append((seconds - parts.once - layers) / (quiet * quiet))
    gap = max(0.0, float(np.median(gaps))) if gaps else 0.0
    return {"layer_gap": gap / model.num_layers, "steps": len(gaps)}
