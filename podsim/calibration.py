"""Calibration: from measured rows to a profile's fitted cost models and their held-out errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from podsim.attention_model import (
    FEATURES,
    AttentionModel,
    Geometry,
    decode_features,
    prefill_features,
    row_tiles,
    tile_work,
)
from podsim.batch import BatchShape
from podsim.errors import InputError
from podsim.hardware import Gpu
from podsim.latency import LAYER_OPS, SAMPLED_OPS, TOKEN_OPS, ProfiledLatency, op_seconds
from podsim.model import Model
from podsim.points import AttentionPoint
from podsim.profile import MEASUREMENTS_FILE, PROFILE_FILE, Profile, kernels_hash, read_profile

COLUMNS = (
    *("op", "strategy", "split", "num_tokens", "prefills", "decodes", "pass"),
    *("time_us", "time_p10_us", "time_p90_us", "repeats"),
)
LATER_COLUMNS = ("sm_clock_mhz", "work", "refused")
"""That the first profiles lack."""
_POINT = ["op", "strategy", "split", "num_tokens", "prefills", "decodes"]


def write(
    folder: Path,
    rows: Sequence[Mapping[str, object]],
    model: Model,
    gpu: Gpu,
    provenance: Mapping[str, object],
) -> Profile:
    """Leave measurements.csv and profile.json in a folder; the profile."""
    table = pd.DataFrame(rows, columns=[*COLUMNS, *LATER_COLUMNS]).fillna("")
    table.to_csv(folder / MEASUREMENTS_FILE, index=False, float_format="%.4f")
    measured = {
        **provenance,
        "date": datetime.now(UTC).date().isoformat(),
        "kernels_sha256": kernels_hash(),
    }
    profile = fit(folder, gpu.name, model, measured)
    (folder / PROFILE_FILE).write_text(profile.to_json(), encoding="utf-8")
    return profile


def refit(folder: Path) -> Profile:
    """Fit the rows of an existing profile folder again, keeping its provenance."""
    old = read_profile(folder, str(folder))
    model = Model(name=old.model, max_model_len=1, **old.shape)
    profile = fit(folder, old.gpu, model, old.provenance)
    (folder / PROFILE_FILE).write_text(profile.to_json(), encoding="utf-8")
    return profile


def fit(folder: Path, gpu: str, model: Model, provenance: Mapping[str, object]) -> Profile:
    """The profile of the rows in `folder`/measurements.csv.

    Raises InputError if the file cannot be read or lacks rows.
    """
    rows = read_measurements(folder / MEASUREMENTS_FILE)
    launch = _launch_costs(rows)
    # A timed graph of one kernel carries the cost of launching a graph; in a step it is paid once.
    rows["seconds"] = rows["time_us"] * 1e-6 - launch["graph"]
    grid, held_out = rows[rows["split"] == "grid"], rows[rows["split"] == "held_out"]
    kernels = provenance["geometry"]
    assert isinstance(kernels, dict)
    attention = _fit_attention(grid, _fitted_geometry(grid, Geometry.of(model, kernels)))
    kernels = kernels | {"tile_overhead": attention.geometry.tile_overhead}
    profile = Profile(
        source=str(folder),
        gpu=gpu,
        model=model.name,
        shape=model.shape,
        provenance=provenance,
        launch=launch,
        ops=_op_tables(grid),
        attention={
            "geometry": kernels,
            "features": {name: list(features) for name, features in FEATURES.items()},
            "coefficients": {name: list(c) for name, c in attention.coefficients.items()},
        },
        errors={},
        hull=_hull(grid),
    )
    return profile.with_errors(_errors(profile, model, attention, held_out))


def read_measurements(path: Path) -> pd.DataFrame:
    """One row a point: the median over the passes of its timings, but for refused ones."""
    try:
        rows = pd.read_csv(path, keep_default_na=False)
        missing = set(COLUMNS) - set(rows.columns)
        if missing:
            raise InputError(f"{path}: misses the column {sorted(missing)[0]}")
        rows["time_us"] = rows["time_us"].astype(float)
        if "refused" in rows.columns:
            rows = rows[rows["refused"] == ""]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a table of measurements: {error}") from None
    return rows.groupby(_POINT, sort=False)["time_us"].median().reset_index()


def _launch_costs(rows: pd.DataFrame) -> dict[str, float]:
    """Seconds of an empty kernel within a graph, and of launching a graph beside its kernels."""
    launches = rows[rows["op"] == "launch"].sort_values("num_tokens")
    count, time = launches["num_tokens"].to_numpy(float), launches["time_us"].to_numpy() * 1e-6
    if len(count) < 2:
        raise InputError("measurements.csv: no rows of the empty kernel (op launch)")
    # Theil and Sen: a host that stalled during one of these short timings does not move the line.
    later, earlier = np.triu_indices(len(count), 1)
    kernel = np.median((time[later] - time[earlier]) / (count[later] - count[earlier]))
    return {"graph": float(np.median(time - kernel * count)), "kernel": float(kernel)}


def _op_tables(grid: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    tables = {}
    for name in (*LAYER_OPS, *TOKEN_OPS, *SAMPLED_OPS):
        rows = grid[grid["op"] == name].sort_values("num_tokens")
        if len(rows) < 2:
            raise InputError(f"measurements.csv: {len(rows)} rows of '{name}', expected at least 2")
        tables[name] = {
            "num_tokens": rows["num_tokens"].tolist(),
            "seconds": rows["seconds"].round(10).tolist(),
        }
    return tables


def _points(rows: pd.DataFrame) -> list[BatchShape]:
    return [
        AttentionPoint.from_text(prefills, decodes, "").shape
        for prefills, decodes in zip(rows["prefills"], rows["decodes"], strict=True)
    ]


def _kind(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The attention rows that a kernel model is about."""
    rows = rows[rows["op"] == "attention"]
    if name == "prefill":
        return rows[rows["decodes"] == ""]
    if name == "decode":
        return rows[rows["prefills"] == ""]
    return rows[(rows["strategy"] == name) & (rows["prefills"] != "") & (rows["decodes"] != "")]


def _fitted_geometry(grid: pd.DataFrame, geometry: Geometry) -> Geometry:
    """With the tile overhead, in half blocks, under which the prefill rows fit best."""
    rows = _kind(grid, "prefill")
    shapes, seconds = _points(rows), rows["seconds"].to_numpy()

    def misfit(tile_overhead: float) -> float:
        tried = replace(geometry, tile_overhead=tile_overhead)
        works = [tile_work(row_tiles(shape.prefills, tried), tried) for shape in shapes]
        features = np.array([prefill_features(work, tried) for work in works])
        predicted = features @ _non_negative_fit(features, seconds)
        return float(np.square(predicted / seconds - 1).sum())

    return replace(geometry, tile_overhead=min(np.arange(0.0, 8.5, 0.5).tolist(), key=misfit))


def _fit_attention(grid: pd.DataFrame, geometry: Geometry) -> AttentionModel:
    """Each side alone first: the mixed strategies are described by the times of their sides."""
    coefficients: dict[str, list[float]] = {}
    model = AttentionModel(geometry, coefficients)
    for name in FEATURES:
        rows = _kind(grid, name)
        shapes = _points(rows)
        if name == "prefill":
            works = [tile_work(row_tiles(shape.prefills, geometry), geometry) for shape in shapes]
            features = [prefill_features(work, geometry) for work in works]
        elif name == "decode":
            features = [decode_features(shape, geometry) for shape in shapes]
        else:
            features = [model.features(name, shape) for shape in shapes]
        if len(features) < len(FEATURES[name]):
            raise InputError(f"measurements.csv: only {len(features)} rows to fit '{name}' on")
        coefficients[name] = _non_negative_fit(np.array(features), rows["seconds"].to_numpy())
    return model


def _non_negative_fit(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> list[float]:
    """Coefficients >= 0 with the least squared relative error."""
    solution, _ = nnls(features / seconds[:, None], np.ones(len(seconds)))
    return [float(value) for value in solution]


def _hull(grid: pd.DataFrame) -> dict[str, int]:
    shapes = _points(grid[grid["op"] == "attention"])
    linear, sampled = grid[grid["op"] == "qkv"], grid[grid["op"] == "lm_head"]
    contexts = [chunk.context_len for shape in shapes for chunk in shape.prefills]
    return {
        "num_tokens": int(linear["num_tokens"].max()),
        "num_sampled": int(sampled["num_tokens"].max()),
        "context_len": max(contexts + [shape.decode_context_max for shape in shapes]),
        "num_decodes": max(shape.num_decodes for shape in shapes),
        "decode_context_sum": max(shape.decode_context_sum for shape in shapes),
    }


# ------------------------------------------------------------------------------------- errors


def _errors(
    profile: Profile, model: Model, attention: AttentionModel, held_out: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """Of every kernel model and of whole steps: error on points that were not fitted on."""
    errors = {}
    for name in FEATURES:
        rows = _kind(held_out, name)
        predicted = [attention.seconds(name, shape) for shape in _points(rows)]
        errors[f"attention {name}"] = _error(predicted, rows["seconds"])
    for name, table in profile.ops.items():
        rows = held_out[held_out["op"] == name]
        interpolated = op_seconds(table, rows["num_tokens"])
        errors[name] = _error(interpolated, rows["seconds"])
    steps = held_out[held_out["op"] == "step"]
    for strategy in ("serial", "streams", "unified", "pod"):
        rows = steps[steps["strategy"] == strategy]
        latency = ProfiledLatency(profile, model, strategy)
        predicted = [latency.step_time(shape) for shape in _points(rows)]
        errors[f"step {strategy}"] = _error(predicted, rows["time_us"] * 1e-6)
    return errors


def _error(predicted: ArrayLike, measured: pd.Series[float]) -> dict[str, float]:
    relative = np.asarray(predicted) / measured.to_numpy() - 1
    if not len(relative):
        raise InputError("measurements.csv: a kernel has no held-out rows")
    size = np.abs(relative)
    return {
        "points": len(relative),
        "median": round(float(np.median(size)), 4),
        "p90": round(float(np.percentile(size, 90)), 4),
        "worst": round(float(size.max()), 4),
        "bias": round(float(relative.mean()), 4),
        "signed_p10": round(float(np.percentile(relative, 10)), 4),
        "signed_p90": round(float(np.percentile(relative, 90)), 4),
    }
