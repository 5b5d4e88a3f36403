"""How long the operations of a step beside attention take, by its tokens.

Each is described by the roofline: a launch, its bytes, and its FLOPs beyond what they hide behind
those bytes, at the shares of the GPU's peaks that fit best. That is a line with one turn. What was
measured above or below it comes on top, straight between the measured points: matrix products
change their tiles from one number of tokens to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from podsim.fit_non_negative import fit_non_negative
from podsim.hardware import Gpu
from podsim.model import Model
from podsim.roofline import op_traffic

Floats = NDArray[np.float64]

LAYER_OPS = {
    "rmsnorm": 2,
    "qkv": 1,
    "rope_and_cache": 1,
    "output": 1,
    "gate_up": 1,
    "silu_mul": 1,
    "down": 1,
}
"""How often each operation but attention runs in a layer."""

MATRIX_OPS = ("qkv", "output", "gate_up", "down")
"""The matrix products among them."""

TOKEN_OPS = ("embedding", "rmsnorm")
SAMPLED_OPS = ("lm_head", "sampling")
"""What a step runs once, over all its tokens and over those that come out."""

ALIGNED = 16
"""Tokens. Of the powers of two, the one by which matrix rows to fit on predict each other with the
least error, in the median, the mean and at P90 (`benchmarks/alignment.py`)."""

OpTable = Mapping[str, Any]
"""Of an operation in a profile: `num_tokens` and `seconds`, as measured, and its `roofline`."""


def op_seconds(table: OpTable, num_tokens: ArrayLike) -> Floats:
    """Of one operation: its roofline, and what the measured points of the same alignment have
    beside theirs, linear between them.

    Multiples of `ALIGNED` run other matrix kernels than their neighbours. Costs that are scaled
    from another GPU have no roofline of their own: they are straight between their points.
    """
    wanted = np.asarray(num_tokens, dtype=np.int64)
    measured, seconds = np.array(table["num_tokens"]), np.array(table["seconds"])
    line = table.get("roofline", {})
    beside = seconds - roofline_seconds(line, measured)
    aligned = measured % ALIGNED == 0
    on = np.interp(wanted, measured[aligned], beside[aligned])
    off = np.interp(wanted, measured[~aligned], beside[~aligned])
    found: Floats = roofline_seconds(line, wanted) + np.where(wanted % ALIGNED == 0, on, off)
    return found


NEAR = 0.25
"""Numbers of tokens are near another that differ from it by at most such a share."""


def beyond_neighbours(num_tokens: NDArray[np.int64], values: Floats) -> Floats:
    """How far each value lies beyond the median of those near it, of the same alignment."""
    aligned = num_tokens % ALIGNED == 0
    found = np.zeros(len(values))
    for i, n in enumerate(num_tokens):
        near = (np.abs(num_tokens / n - 1.0) <= NEAR) & (aligned == aligned[i])
        found[i] = values[i] - np.median(values[near])
    return found


def roofline_seconds(line: Mapping[str, float], num_tokens: NDArray[np.int64]) -> Floats:
    """Of the line that `fit_roofline` finds; 0 without one."""
    seconds = line.get("fixed", 0.0) + line.get("per_token", 0.0) * num_tokens
    beyond = np.maximum(num_tokens - line.get("turn", 0.0), 0.0)
    return np.asarray(seconds + line.get("per_token_beyond", 0.0) * beyond, dtype=np.float64)


def fit_roofline(
    model: Model, gpu: Gpu, op: str, num_tokens: Sequence[int], seconds: Floats
) -> dict[str, float]:
    """The line through what was measured, with the least relative error; no slope is negative.

    Seconds: `fixed` (launch and weights), `per_token` (its activations) and, of matrix products,
    `per_token_beyond` the `turn` (tokens), from which their FLOPs take longer than their bytes at
    the published peaks.
    """
    none, one = op_traffic(model, op, 0), op_traffic(model, op, 1)
    weights = none.bytes / gpu.peak_bandwidth
    moved = (one.bytes - none.bytes) / gpu.peak_bandwidth
    counts = np.asarray(num_tokens, dtype=np.float64)
    features = [np.full(len(counts), 1e-6), weights + moved * counts]
    flops = one.flops / gpu.peak_flops - moved
    turn = weights / flops if flops > 0 else 0.0
    if flops > 0:
        features.append(flops * np.maximum(counts - turn, 0.0))
    launch, of_bytes, *of_flops = fit_non_negative(np.stack(features, axis=1), seconds).tolist()
    line = {"fixed": launch * 1e-6 + of_bytes * weights, "per_token": of_bytes * moved}
    if of_flops:
        line |= {"turn": turn, "per_token_beyond": of_flops[0] * flops}
    return line
