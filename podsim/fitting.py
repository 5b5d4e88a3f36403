"""Fits the attention model: coefficients that are not negative, with the least relative error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from podsim.attention_features import (
    FEATURES,
    Geometry,
    decode_features,
    matrix_load,
    prefill_features,
    row_tiles,
    tile_work,
)
from podsim.attention_model import DECODE_HEAVY, AttentionModel
from podsim.batch import BatchShape
from podsim.errors import InputError
from podsim.fit_non_negative import fit_non_negative
from podsim.overlap import Overlap, longer_side, roughness, table_weights, tables
from podsim.unified_features import drawn, unified_features, unified_work

Floats = NDArray[np.float64]

ROUGHNESS = 0.6
"""Weight of the differences of neighbouring cells of a table; by cross-validation."""
LIKENESS = 0.1
"""Weight of the differences of POD's tables for its two sets of tiles."""
TILE_OVERHEADS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""Blocks; those that are tried."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Batches of one kernel and what each took, in seconds."""

    shapes: Sequence[BatchShape]
    seconds: Floats


def fit_attention(timings: Mapping[str, Timings], geometry: Geometry) -> AttentionModel:
    """Each side alone first: mixed batches are described by the times of their sides.

    Raises InputError if a kernel has fewer timings than its model has coefficients.
    """
    for name, features in FEATURES.items():
        if len(timings[name].shapes) < len(features):
            raise InputError(
                f"measurements.csv: only {len(timings[name].shapes)} rows to fit '{name}' on"
            )
    geometry = _fit_tile_overhead(timings, geometry)
    prefill, _ = _fit_prefill(timings["prefill"], geometry)
    coefficients = {"prefill": prefill, "decode": _fit_decode(timings["decode"], geometry)}
    model = AttentionModel(geometry, coefficients, {})
    for name in ("serial", "streams", "pod"):
        _fit_mixed(name, timings[name], model)
    coefficients["unified"], _ = _fit_unified(timings["unified"], geometry)
    return model


def _fit_tile_overhead(timings: Mapping[str, Timings], geometry: Geometry) -> Geometry:
    """With the tile overhead under which the rows of both kernels that run tiles fit best."""

    def misfit(tried: Geometry) -> float:
        _, prefill = _fit_prefill(timings["prefill"], tried)
        _, unified = _fit_unified(timings["unified"], tried)
        return prefill + unified

    tried = [replace(geometry, tile_overhead=overhead) for overhead in TILE_OVERHEADS]
    return min(tried, key=misfit)


def _fit_prefill(timings: Timings, geometry: Geometry) -> tuple[list[float], float]:
    """The coefficients, and the mean of the relative errors' size."""
    features = np.array(
        [
            prefill_features(
                tile_work(row_tiles(shape.prefills, geometry), geometry),
                geometry,
                matrix_load(shape.num_tokens, geometry),
            )
            for shape in timings.shapes
        ]
    )
    solution = fit_non_negative(features, timings.seconds)
    return solution.tolist(), _mean_error(features @ solution, timings)


def _fit_decode(timings: Timings, geometry: Geometry) -> list[float]:
    features = [decode_features(shape, geometry) for shape in timings.shapes]
    coefficients: list[float] = fit_non_negative(np.array(features), timings.seconds).tolist()
    return coefficients


def _fit_unified(timings: Timings, geometry: Geometry) -> tuple[list[float], float]:
    """The coefficients, and the mean of the relative errors' size.

    The load depends on what is fitted: a few rounds, the first from the times as measured.
    """
    rows = _unified_rows(timings.shapes, geometry)
    unloaded: Sequence[float] = timings.seconds.tolist()
    for _ in range(4):
        solution = fit_non_negative(rows(unloaded), timings.seconds)
        unloaded = (rows(None) @ solution).tolist()
    return solution.tolist(), _mean_error(rows(unloaded) @ solution, timings)


def _mean_error(predicted: Floats, timings: Timings) -> float:
    """The mean of the relative errors' size."""
    return float(np.abs(predicted / timings.seconds - 1).mean())


def _unified_rows(
    shapes: Sequence[BatchShape], geometry: Geometry
) -> Callable[[Sequence[float] | None], Floats]:
    """The features under the load that follows from the attention's seconds; None: no load."""
    works = [unified_work(shape, geometry) for shape in shapes]

    def rows(unloaded: Sequence[float] | None) -> Floats:
        loads = (
            [0.0] * len(shapes)
            if unloaded is None
            else [
                drawn(shape.num_tokens, seconds, work, geometry)
                for shape, seconds, work in zip(shapes, unloaded, works, strict=True)
            ]
        )
        features = [
            unified_features(shape, work, geometry, load)
            for shape, work, load in zip(shapes, works, loads, strict=True)
        ]
        return np.array(features)

    return rows


def _fit_mixed(name: str, timings: Timings, model: AttentionModel) -> None:
    """Leave what is fitted in the model."""
    sides = [model.sides(name, shape) for shape in timings.shapes]
    both = np.array([s.prefill + s.decode for s in sides])
    waves = np.array([s.side.waves for s in sides])
    items = np.array([s.decode_items for s in sides])
    keys = np.array([s.side.keys for s in sides])
    launches = np.stack([np.ones(len(sides)), items, waves, np.minimum(items, waves), keys], axis=1)
    cells = table_weights(
        np.array([s.prefill for s in sides]) / both,
        np.array([s.side.busy for s in sides]),
        waves,
    )
    differences = ROUGHNESS * roughness()
    heavy = np.array([model.is_decode_heavy(name, shape) for shape in timings.shapes])
    if heavy.any():
        # A table for each set of tiles, alike where one has no timings.
        cells = np.concatenate([cells * ~heavy[:, None], cells * heavy[:, None]], axis=1)
        same = LIKENESS * np.eye(differences.shape[1])
        differences = np.block(
            [
                [differences, np.zeros_like(differences)],
                [np.zeros_like(differences), differences],
                [same, -same],
            ]
        )
    # Sides on SMs of their own take as long as the longer one: smooth is what is paid beside it.
    apart = float(name == "streams")
    longer = np.array([apart * max(s.prefill, s.decode) for s in sides])
    # Of the order of seconds, as the cells are: the roughness is then small beside the errors.
    features = np.concatenate([launches * 1e-6, longer[:, None], cells * both[:, None]], axis=1)
    rough = np.pad(differences, ((0, 0), (launches.shape[1] + 1, 0)))
    solution = fit_non_negative(features, timings.seconds, rough)
    coefficients, (paid_of_longer,), values = np.split(
        solution, [launches.shape[1], launches.shape[1] + 1]
    )
    parts = np.split(values, 2 if heavy.any() else 1)
    parts = [part + paid_of_longer * longer_side() for part in parts]
    model.coefficients[name] = (coefficients * 1e-6).tolist()
    model.overlaps[name] = Overlap.of(tables(parts[0]))
    if name == "pod":
        model.overlaps[DECODE_HEAVY] = Overlap.of(tables(parts[-1]))
