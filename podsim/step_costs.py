"""Where the time of the steps went: by kind of step, and by kernel."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.batch import BatchShape
from podsim.heat import Shares
from podsim.latency import ProfiledLatency
from podsim.metrics import STEP_KINDS, step_kinds, tokens_out
from podsim.op_tables import LAYER_OPS, MATRIX_OPS, SAMPLED_OPS, TOKEN_OPS, op_seconds
from podsim.simulation import Result

Floats = NDArray[np.float64]

KERNELS = {
    "attention": "attention",
    "gate_up": "gate-up",
    "down": "down",
    "qkv": "QKV",
    "output": "output",
    "rmsnorm": "element-wise",
    "rope_and_cache": "element-wise",
    "silu_mul": "element-wise",
    "embedding": "embedding, launch, host",
    "lm_head": "LM head, sampling",
    "sampling": "LM head, sampling",
    "launch": "embedding, launch, host",
    "collectives": "collectives",
    "memory": "memory system",
}
"""The operations of a step and the name each is shown under."""


def kind_table(steps: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of step: how many, their seconds and tokens, percentiles of their duration."""
    kinds = step_kinds(steps)
    tokens = (steps["num_prefill_tokens"] + steps["num_decodes"]).to_numpy()
    seconds = steps["duration"].to_numpy()
    rows = {}
    for index, kind in enumerate(STEP_KINDS):
        mine = kinds == index
        if mine.any():
            p50, p99 = np.percentile(seconds[mine], (50, 99)).tolist()
            rows[kind] = {
                "steps": int(mine.sum()),
                "seconds": float(seconds[mine].sum()),
                "mean": float(seconds[mine].mean()),
                "p50": p50,
                "p99": p99,
                "tokens": float(tokens[mine].mean()),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def kernel_table(
    result: Result, steps: pd.DataFrame, requests: pd.DataFrame
) -> pd.DataFrame | None:
    """Seconds of each kernel (row) in each kind of step (column); None if the costs do not tell.

    Attention is what is left of a step's time: the log does not hold the contexts it depends on.
    """
    model = result.latency_model
    if not isinstance(model, ProfiledLatency) or steps.empty:
        return None
    tokens = (steps["num_prefill_tokens"] + steps["num_decodes"]).to_numpy()
    has_prefill = steps["num_prefills"].to_numpy() > 0
    shapes, which = np.unique(
        np.stack([tokens, tokens_out(steps, requests), has_prefill], axis=1),
        axis=0,
        return_inverse=True,
    )
    parts = {name: seconds[which.ravel()] for name, seconds in _without_attention(model, shapes)}
    num_requests = (steps["num_prefills"] + steps["num_decodes"]).to_numpy()
    parts["launch"] = parts["launch"] + _host(model, num_requests, has_prefill)
    if result.memory:
        parts["memory"] = _held_up(result, steps)
    total = steps["duration"].to_numpy()
    in_layers = total - sum(seconds for name, seconds in parts.items() if name not in LAYER_OPS)
    products = sum((parts[name] for name in MATRIX_OPS), np.zeros(len(total)))
    attention = in_layers - sum(parts[name] for name in LAYER_OPS)
    warmth = _warmth(model, steps, tokens, products, attention)
    parts |= {name: parts[name] * warmth for name in MATRIX_OPS}
    parts = {"attention": total - sum(parts.values(), np.zeros(len(total))), **parts}
    kinds = step_kinds(steps)
    table = pd.DataFrame(
        {
            kind: {name: float(seconds[kinds == index].sum()) for name, seconds in parts.items()}
            for index, kind in enumerate(STEP_KINDS)
            if (kinds == index).any()
        }
    )
    return table.groupby(lambda name: KERNELS[str(name)], sort=False).sum()


def _warmth(
    model: ProfiledLatency,
    steps: pd.DataFrame,
    tokens: NDArray[np.int64],
    products: Floats,
    attention: Floats,
) -> Floats:
    """Of each step: time of its matrix products over their measured time (`replica_heat.Heat`).

    The log has neither the heats nor what drove them, but both follow from the times of the steps,
    nearly: all attention of a step with prefill is taken for prefill's on full SMs, so what decodes
    and overlap draw is not told apart.
    """
    found = np.ones(len(steps))
    warming = model.warming
    if warming is None:
        return found
    replicas, starts = steps["replica"].to_numpy(), steps["start"].to_numpy()
    prefills, durations = steps["num_prefills"].to_numpy() > 0, steps["duration"].to_numpy()
    for replica in np.unique(replicas):
        heats, time = warming.at_rest, 0.0
        for i in np.flatnonzero(replicas == replica).tolist():
            num_tokens = int(tokens[i])
            follows = model.clocked_products(num_tokens) * model.scale / products[i]
            if not prefills[i]:
                left = warming.left(heats, starts[i] - time, durations[i])
                found[i] = 1.0 + follows * left
                continue
            full = model.matrix_seconds(num_tokens) / durations[i]
            heats = warming.rested(heats, starts[i] - time)
            shares = Shares(full, attention[i] / durations[i], 0.0)
            drive = model.drive(warming, num_tokens, shares)
            fall = warming.fall_in(drive, heats, durations[i])
            found[i] = 1.0 + follows * warming.slower(fall, model.clock_fall(num_tokens))
            heats = warming.worked(heats, drive, durations[i])
            time = starts[i] + durations[i]
    return found


def _held_up(result: Result, steps: pd.DataFrame) -> Floats:
    """Of each step: the seconds that memory work added; a replica's steps are in its own order."""
    seconds = np.zeros(len(steps))
    replicas = steps["replica"].to_numpy()
    for replica, memory in enumerate(result.memory):
        seconds[replicas == replica] = memory.log.held_up
    return seconds


def _host(
    model: ProfiledLatency, num_requests: NDArray[np.int64], has_prefill: NDArray[np.bool_]
) -> Floats:
    """Of each step, the host's seconds beside those that every step has."""
    return np.asarray(
        model.host_per_request * num_requests + model.host_with_prefill * has_prefill, dtype=float
    )


def _without_attention(
    model: ProfiledLatency, shapes: NDArray[np.int64]
) -> list[tuple[str, Floats]]:
    """Seconds of each operation but attention for rows of (tokens, tokens out, has prefill).

    Without what the host takes by what a step has. The latency model's own sums, shared out by the
    measured times of the operations in them.
    """
    batches = [
        BatchShape.of([(n, n)]) if has_prefill else BatchShape.of_decodes(n, n, 1)
        for n, _, has_prefill in shapes.tolist()
    ]
    sums = [
        model.parts(batch._replace(num_sampled=m))._asdict()
        for batch, m in zip(batches, shapes[:, 1].tolist(), strict=True)
    ]
    layers = np.array([row["layers"] for row in sums])
    once = np.array([row["once"] for row in sums])
    tokens, sampled = shapes[:, 0], shapes[:, 1]
    ops = model.profile.ops
    in_layers = {name: n * op_seconds(ops[name], tokens) for name, n in LAYER_OPS.items()}
    total = np.sum(list(in_layers.values()), axis=0)
    parts = [(name, layers * seconds / total) for name, seconds in in_layers.items()]
    at_ends = {name: op_seconds(ops[name], tokens) for name in TOKEN_OPS}
    at_ends |= {
        name: np.where(sampled > 0, op_seconds(ops[name], sampled), 0.0) for name in SAMPLED_OPS
    }
    total = np.sum(list(at_ends.values()), axis=0)
    has_prefill = shapes[:, 2] > 0
    kernels = once - model.step_overhead
    kernels -= _host(model, np.where(has_prefill, 1, tokens), has_prefill)
    parts += [(name, kernels * seconds / total) for name, seconds in at_ends.items()]
    overhead = np.full(len(shapes), model.step_overhead)
    combined: dict[str, Floats] = {}
    parts.append(("launch", overhead))
    if model.collectives is not None:
        parts.append(("collectives", np.array([row["collectives"] for row in sums])))
    for name, seconds in parts:
        combined[name] = combined.get(name, np.zeros(len(shapes))) + seconds
    return list(combined.items())
