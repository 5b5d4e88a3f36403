"""Calibration: from measured rows to a profile's fitted cost models and their held-out errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.attention_features import FEATURES, Geometry
from podsim.errors import InputError
from podsim.fitting import Timings, fit_attention
from podsim.hardware import Gpu, gpu_named
from podsim.heat_fitting import SustainedRun, TimedStep, fit_heating
from podsim.held_out import held_out_errors, predictions, rows_of, shapes_of, without_whole_blocks
from podsim.latency import ProfiledLatency
from podsim.model import Model
from podsim.op_tables import (
    LAYER_OPS,
    MATRIX_OPS,
    SAMPLED_OPS,
    TOKEN_OPS,
    OpTable,
    fit_roofline,
    op_seconds,
)
from podsim.profile import MEASUREMENTS_FILE, PROFILE_FILE, Profile, kernels_hash, read_profile
from podsim.row_clocks import attention_at_usual_clock, products_at_usual_clock
from podsim.sensitivity import Sensitivity
from podsim.step_fitting import fit_steps
from podsim.trace_writers import atomic_file

Floats = NDArray[np.float64]

COLUMNS = (
    *("op", "strategy", "split", "num_tokens", "prefills", "decodes", "pass"),
    *("time_us", "time_p10_us", "time_p90_us", "repeats"),
)
LATER_COLUMNS = ("sm_clock_mhz", "work", "refused")
"""That the first profiles lack."""
NEIGHBOURHOOD, SCATTER, JITTER, FEWEST_NEIGHBOURS = 0.2, 0.1, 7e-7, 5
"""Of the points of an operation that moves bytes: see `_without_scatter`. Relative distance in
tokens, distance in time (relative, or in seconds if that is more) and number, by cross-validation
on rows to fit on."""
_POINT = ["op", "strategy", "split", "num_tokens", "prefills", "decodes"]


def write(
    folder: Path,
    rows: Sequence[Mapping[str, object]],
    model: Model,
    gpu: Gpu,
    provenance: Mapping[str, object],
    wall_seconds: Mapping[str, float],
) -> Profile:
    """Leave measurements.csv and profile.json in a folder; the profile.

    `wall_seconds` are those of all that came before; those of the fit and their sum come to them.
    """
    started = perf_counter()
    table = pd.DataFrame(rows, columns=[*COLUMNS, *LATER_COLUMNS]).fillna("")
    table.to_csv(folder / MEASUREMENTS_FILE, index=False, float_format="%.4f")
    measured = {
        **provenance,
        "date": datetime.now(UTC).date().isoformat(),
        "kernels_sha256": kernels_hash(),
    }
    profile = fit(folder, gpu.name, model, measured)
    wall = {**wall_seconds, "fit": round(perf_counter() - started, 1)}
    wall["total"] = round(sum(wall.values()), 1)
    profile = replace(profile, provenance={**measured, "wall_seconds": wall})
    (folder / PROFILE_FILE).write_text(profile.to_json(), encoding="utf-8")
    return profile


def refit(folder: Path) -> Profile:
    """Fit the rows of an existing profile folder again, keeping its provenance.

    Raises InputError, and leaves the folder as it was, if they cannot be read, fitted or written.
    """
    old = read_profile(folder, str(folder), to_refit=True)
    profile = fit(folder, old.gpu, model_of(old), old.provenance)
    with atomic_file(folder / PROFILE_FILE) as file:
        file.write(profile.to_json().encode())
    return profile


def fit(folder: Path, gpu: str, model: Model, provenance: Mapping[str, object]) -> Profile:
    """The profile of the rows in `folder`/measurements.csv.

    Raises InputError if the file cannot be read or lacks rows.
    """
    measured = _measured(folder, gpu, model)
    rows, ops = measured.rows, measured.ops
    grid = rows[rows["split"] == "grid"]
    kernels = provenance["geometry"]
    assert isinstance(kernels, dict)
    kernels = kernels | measured.layer
    geometry = Geometry.of(model, kernels)
    fitted_on = {name: rows_of(grid, name) for name in FEATURES}
    fitted_on["unified"] = without_whole_blocks(fitted_on["unified"], geometry.block_n)
    timings = {name: _timings(rows) for name, rows in fitted_on.items()}
    attention = fit_attention(timings, geometry)
    kernels = kernels | {"tile_overhead": attention.geometry.tile_overhead}
    profile = Profile(
        source=str(folder),
        gpu=gpu,
        model=model.name,
        shape=model.shape,
        provenance=provenance,
        launch=measured.launch,
        ops=ops,
        attention={
            "geometry": kernels,
            "features": {name: list(features) for name, features in FEATURES.items()},
            "coefficients": attention.coefficients,
            "overlap": {
                name: {"by_busy": overlap.by_busy, "by_waves": overlap.by_waves}
                for name, overlap in attention.overlaps.items()
            },
        },
        sustained={},
        clock_falls=_clock_falls(grid, provenance),
        clock_sensitivity={name: asdict(found) for name, found in measured.follows.items()},
        errors={},
        hull=_hull(grid),
    )
    profile = replace(profile, sustained={**profile.sustained, **fit_steps(profile, model, grid)})
    heating = _heating(profile, model, rows)
    profile = replace(profile, sustained={**profile.sustained, **heating})
    return profile.with_errors(held_out_errors(predictions(profile, model, rows)))


def write_plots(folder: Path, profile: Profile) -> Path:
    """Leave figures of the rows of a profile folder against its models; where they are."""
    from podsim import fit_plots  # matplotlib takes half a second to load

    rows = rows_at_usual_clock(folder, profile)
    return fit_plots.write_plots(folder, predictions(profile, model_of(profile), rows))


def model_of(profile: Profile) -> Model:
    """The model whose shape a profile is of."""
    return Model(name=profile.model, max_model_len=1, **profile.shape)


class Measured(NamedTuple):
    """What the rows of a folder say before attention and whole steps are fitted."""

    rows: pd.DataFrame
    """One a point, with its `seconds` at the usual clock, and `seconds_as_timed`."""
    launch: dict[str, float]
    ops: dict[str, OpTable]
    layer: dict[str, float]
    """What `Geometry` is told of a layer beside attention."""
    follows: dict[str, Sensitivity]


def _measured(folder: Path, gpu: str, model: Model) -> Measured:
    """Read, without the launches of graphs and what chance adds to clocks (`row_clocks`).

    A timed graph of one kernel carries the cost of launching a graph; in a step it is paid once.
    """
    passes = _read_passes(folder / MEASUREMENTS_FILE)
    launch = _launch_costs(_one_row_a_point(passes))
    launches = np.where(passes["op"].isin(["step", "sustained", "duty"]), 0.0, launch["graph"])
    passes["seconds"] = passes["seconds_as_timed"] = passes["time_us"] * 1e-6 - launches
    passes["seconds"], products, passes["usual_clock_mhz"] = products_at_usual_clock(passes, model)
    grid = _one_row_a_point(passes[passes["split"] == "grid"])
    ops = _op_tables(grid, model, gpu_named(gpu))
    linear = _linear_token_seconds(ops)
    quiet = _quiet_layer_seconds(ops, linear)
    passes["seconds"], attention = attention_at_usual_clock(
        passes, model, gpu_named(gpu), linear, quiet
    )
    layer = {"linear_token_seconds": linear, "quiet_layer_seconds": quiet}
    return Measured(_one_row_a_point(passes), launch, ops, layer, products | attention)


def read_measurements(path: Path) -> pd.DataFrame:
    """One row a point: the median of its timings over the passes, the mean of the clocks.

    Refused rows do not count.
    """
    return _one_row_a_point(_read_passes(path))


def rows_at_usual_clock(folder: Path, profile: Profile) -> pd.DataFrame:
    """One row a point of a profile's folder: its `seconds` as they are fitted (`row_clocks`)."""
    return _measured(folder, profile.gpu, model_of(profile)).rows


def _one_row_a_point(passes: pd.DataFrame) -> pd.DataFrame:
    times = passes.columns.intersection(["time_us", "seconds", "seconds_as_timed"])
    points = passes.groupby(_POINT, sort=False)
    clocks = passes.columns.intersection(["sm_clock_mhz", "usual_clock_mhz"])
    how = dict.fromkeys(times, "median") | dict.fromkeys(clocks, "mean")
    return points.agg(how).reset_index()


def _read_passes(path: Path) -> pd.DataFrame:
    """The rows that are not refused."""
    try:
        rows = pd.read_csv(path, keep_default_na=False)
        missing = set(COLUMNS) - set(rows.columns)
        if missing:
            raise InputError(f"{path}: misses the column {sorted(missing)[0]}")
        rows["time_us"] = rows["time_us"].astype(float)
        if "refused" in rows.columns:
            rows = rows[rows["refused"] == ""].copy()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a table of measurements: {error}") from None
    clocks = rows["sm_clock_mhz"] if "sm_clock_mhz" in rows.columns else np.nan
    rows["sm_clock_mhz"] = pd.to_numeric(clocks, errors="coerce")
    return rows


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


def _op_tables(grid: pd.DataFrame, model: Model, gpu: Gpu) -> dict[str, OpTable]:
    tables: dict[str, OpTable] = {}
    for name in (*LAYER_OPS, *TOKEN_OPS, *SAMPLED_OPS):
        rows = grid[grid["op"] == name].sort_values("num_tokens")
        if len(rows) < 2:
            raise InputError(f"measurements.csv: {len(rows)} rows of '{name}', expected at least 2")
        num_tokens, seconds = rows["num_tokens"].to_numpy(float), rows["seconds"].to_numpy()
        if name not in (*MATRIX_OPS, "lm_head"):
            seconds = _without_scatter(num_tokens, seconds)
        tables[name] = {
            "num_tokens": rows["num_tokens"].tolist(),
            "seconds": seconds.round(10).tolist(),
            "roofline": fit_roofline(model, gpu, name, rows["num_tokens"].tolist(), seconds),
        }
    return tables


def _clock_falls(grid: pd.DataFrame, provenance: Mapping[str, object]) -> dict[str, list[float]]:
    """Of layers over every number of tokens, at the usual clock of their products; nothing where
    the card did not tell it.
    """
    rows = grid[grid["op"] == MATRIX_OPS[0]].sort_values("num_tokens")
    falls = np.maximum(_falls(provenance, rows["usual_clock_mhz"]), 0.0)
    if not len(falls) or not np.isfinite(falls).all():
        return {}
    return {"num_tokens": rows["num_tokens"].tolist(), "falls": falls.round(4).tolist()}


def _without_scatter(num_tokens: Floats, seconds: Floats) -> Floats:
    """Of an operation that moves bytes: each point on the line through its neighbours.

    Its few microseconds repeat to half of one, and it runs one kernel for any number of tokens;
    where that changes, or takes another turn of the SMs, the time jumps by more. A point with few
    neighbours stays as measured.
    """
    smooth = seconds.copy()
    for i, (n, time) in enumerate(zip(num_tokens, seconds, strict=True)):
        near = np.abs(num_tokens / n - 1) <= NEIGHBOURHOOD
        near &= np.abs(seconds - time) <= max(SCATTER * time, JITTER)
        if near.sum() >= FEWEST_NEIGHBOURS:
            smooth[i] = np.polyval(np.polyfit(num_tokens[near] - n, seconds[near], 1), 0)
    return smooth


def _linear_token_seconds(ops: Mapping[str, OpTable]) -> float:
    """What a token adds to the matrix products of a layer, from a quarter of the most tokens on."""
    seconds = 0.0
    for name in MATRIX_OPS:
        num_tokens, times = np.array(ops[name]["num_tokens"]), np.array(ops[name]["seconds"])
        most = num_tokens >= num_tokens[-1] / 4
        seconds += float(np.polyfit(num_tokens[most], times[most], 1)[0])
    return seconds


def _quiet_layer_seconds(ops: Mapping[str, OpTable], linear_token_seconds: float) -> float:
    """What a layer takes beside its tokens' matrix products: the median of what was measured."""
    num_tokens = np.array(ops["qkv"]["num_tokens"])
    layers = [count * op_seconds(ops[name], num_tokens) for name, count in LAYER_OPS.items()]
    beside = np.sum(layers, axis=0) - linear_token_seconds * num_tokens
    return max(0.0, float(np.median(beside)))


def _heating(profile: Profile, model: Model, rows: pd.DataFrame) -> dict[str, Any]:
    """How much work lowers the clock of the steps after it, and for how long: see `podsim.heat`.

    Nothing is known without steps that were timed one after another from rest, or without the
    clocks that their parts were timed at.
    """
    runs = [*_sustained_runs(profile, model, rows)]
    if not runs or not profile.clock_falls:
        return {}
    warming = fit_heating(runs, [*_timed_steps(profile, model, rows)])
    falls = {str(n): fall for n, fall in warming.products_at.items()}
    return {**asdict(warming), "products_at": falls}


def _timed_steps(profile: Profile, model: Model, rows: pd.DataFrame) -> Iterator[TimedStep]:
    """The whole steps with prefill to fit on; under serial, which overlaps nothing."""
    steps = rows[(rows["op"] == "step") & (rows["strategy"] == "serial")]
    steps = steps[(steps["split"] == "grid") & (steps["prefills"] != "")]
    latency = ProfiledLatency(profile, model, "serial")
    falls = _falls(profile.provenance, steps["sm_clock_mhz"])
    for shape, fall in zip(shapes_of(steps), falls, strict=bool(falls)):
        n = shape.num_tokens
        yield TimedStep(n, latency.parts(shape).shares, fall, latency.fall_beyond(n))


def sustained_runs(folder: Path, model: Model) -> list[SustainedRun]:
    """Steps one after another from rest that a profile has timed, with what it predicts."""
    profile = read_profile(folder, str(folder))
    return [*_sustained_runs(profile, model, rows_at_usual_clock(folder, profile))]


def _sustained_runs(profile: Profile, model: Model, rows: pd.DataFrame) -> Iterator[SustainedRun]:
    latencies = {name: ProfiledLatency(profile, model, name) for name in ("serial", "pod")}
    rows = rows[rows["op"].isin(["sustained", "duty"])]
    for key, run in rows.groupby(["op", "prefills", "decodes", "split"], sort=False):
        op, prefills, decoded, split = map(str, key)
        shape = shapes_of(run.head(1))[0]
        latency = latencies.get(split, latencies["serial"])
        parts = latency.parts(shape)
        layers = parts.attention + parts.layers
        decodes = run[run["strategy"].str.startswith("decode ")]
        mixed = run.drop(decodes.index)
        in_a_row, of_all = map(int, split.split(" in ")) if op == "duty" else (1, 1)
        if mixed.empty or (of_all > in_a_row and decodes.empty):
            continue  # refused
        alone = decodes["seconds"].tolist()
        is_exact = shape.num_tokens in profile.ops[MATRIX_OPS[0]]["num_tokens"]
        yield SustainedRun(
            batch=f"{op} {prefills} {decoded}",
            num_tokens=shape.num_tokens,
            layers=layers,
            clocked=parts.clocked_attention + parts.clocked_layers,
            row_fall=latency.clock_fall(shape.num_tokens),
            shares=parts.shares,
            beyond=latency.fall_beyond(shape.num_tokens),
            ends=[float(text.split()[-2]) for text in mixed["strategy"]],
            seconds=(mixed["seconds"] - parts.once).tolist(),
            falls=_falls(profile.provenance, mixed["sm_clock_mhz"]),
            is_exact=is_exact,
            is_watched=is_exact and op == "sustained" and not decoded,
            split=split,
            between=(of_all - in_a_row) * float(np.mean(alone)) if alone else 0.0,
            in_a_row=in_a_row,
        )


def _falls(provenance: Mapping[str, object], clocks: pd.Series[float]) -> list[float]:
    """Logarithms of the highest clock over these, NaN where one was not read; none if none was."""
    most = str(provenance.get("max_sm_clock", ""))
    if not most or clocks.isna().all():
        return []
    falls: list[float] = np.log(float(most.removesuffix("MHz")) / clocks.to_numpy(float)).tolist()
    return falls


def _timings(rows: pd.DataFrame) -> Timings:
    return Timings(shapes_of(rows), rows["seconds"].to_numpy())


def _hull(grid: pd.DataFrame) -> dict[str, int]:
    shapes = shapes_of(grid[grid["op"] == "attention"])
    linear, sampled = grid[grid["op"] == "qkv"], grid[grid["op"] == "lm_head"]
    contexts = [chunk.context_len for shape in shapes for chunk in shape.prefills]
    return {
        "num_tokens": int(linear["num_tokens"].max()),
        "num_sampled": int(sampled["num_tokens"].max()),
        "context_len": max(contexts + [shape.decode_context_max for shape in shapes]),
        "num_decodes": max(shape.num_decodes for shape in shapes),
        "decode_context_sum": max(shape.decode_context_sum for shape in shapes),
    }
