"""Least squares with coefficients that are not negative, of relative errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REWEIGHTINGS = 15
"""Rounds of least squares, each with the weights that the errors of the last one ask for."""
ERROR_OF_A_TIMING = 0.02
"""Relative errors below it count as noise (their square is minimised), above it as they are."""


def fit_non_negative(features: Floats, seconds: Floats, penalties: Floats | None = None) -> Floats:
    """Coefficients >= 0 with the least relative error: its size, or near zero its square.

    `features` are [rows, features]; `penalties` [any, features] times the coefficients are to be
    near zero too.
    """
    from scipy.optimize import nnls  # takes half a second to load, and only fits need it

    relative = features / seconds[:, None]
    # Columns of like size: the stopping rule of the solver is absolute.
    scale = np.abs(relative).mean(axis=0) if penalties is None else np.ones(features.shape[1])
    scale = np.where(scale > 0, scale, 1.0)
    relative = relative / scale
    extra = np.zeros((0, features.shape[1])) if penalties is None else penalties
    weights = np.ones(len(seconds))
    for _ in range(REWEIGHTINGS):
        root = np.sqrt(weights)
        solution, _ = nnls(
            np.concatenate([relative * root[:, None], extra]),
            np.concatenate([root, np.zeros(len(extra))]),
            maxiter=50 * features.shape[1],
        )
        errors = np.abs(relative @ solution - 1)
        weights = 1 / np.maximum(errors, ERROR_OF_A_TIMING)
        weights /= weights.mean()
    return np.asarray(solution / scale)
