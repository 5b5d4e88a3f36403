"""From measured rows of memory systems to `memory.json`: fitted costs and how far they are off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.held_out import error_summary
from podsim.layer_predictions import judge_layers
from podsim.memory_costs import APIS, MEMORY_FILE, Curve, Line, MemoryCosts, recompute_name
from podsim.trace_writers import atomic_file

Floats = NDArray[np.float64]

LAYER_COLUMNS = ("model", "batch", "context", "schedule", "layers", "split", "pass", "time_us")
COLUMNS = {
    "mapping": ("api", "page_group", "page_groups", "gpu", "thread", "pass", "time_us"),
    "growth": ("page_group", "page_groups", "thread", "beside", "first", "pass", "time_us"),
    "transfer": ("direction", "memory", "beside", "bytes", "split", "pass", "time_us"),
    "recompute": ("hidden", "outputs", "rotated", "tokens", "split", "pass", "time_us"),
    "layers": LAYER_COLUMNS,
    "layers-column": LAYER_COLUMNS,
    "paged": (
        *("op", "block_size", "requests", "blocks", "contiguous_us", "paged_us", "workload"),
    ),
}
"""Of the file of each part, `PART.csv`; there may be more."""
STATES = {"idle": ("idle", "main"), "busy": ("busy", "background")}
"""State of the GPU and thread in which the calls of each set of costs were timed."""
GROWING = {"idle": "main", "busy": "background"}
"""Which thread a cache grows in, between and beside steps, for each set of costs."""
SERVING = "sampling"
"""What goes on beside growth where an engine serves: what samples the card's clock and power."""
HANDOFF, RELAY = "handoff", "relay"
"""In the place of a direction: not a copy, but what passes between a copy and a kernel, or between
two copies that wait for each other by way of another stream."""


CHAIN_COLUMN = "layers"
"""Of recompute.csv, where recomputing was timed between so many layers. Rows without it were timed
one recomputation after the other, which leaves its weights in the cache: they go on a line."""


def write_rows(
    folder: Path, part: str, rows: Sequence[Mapping[str, object]] | pd.DataFrame
) -> None:
    """Leave `PART.csv` in a folder."""
    table = pd.DataFrame(rows)
    _write(folder / f"{part}.csv", table.to_csv(index=False, float_format="%.4f"))


def with_more(part: str, kept: pd.DataFrame, rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Rows of a part that were there, and new ones: further passes of growth are numbered on, the
    cycles of mapping take the place of others.
    """
    new = pd.DataFrame(rows)
    if part == "mapping":
        kept = kept[kept["api"] != "cycle"]
    if part == "growth":
        new["pass"] += kept["pass"].max() + 1
    return pd.concat([kept, new], ignore_index=True)


def fit_folder(folder: Path, gpu: str, provenance: Mapping[str, object]) -> MemoryCosts:
    """Fit all parts whose rows are in a folder, and leave memory.json there.

    Raises InputError, naming file and column, for rows that cannot be read, or if there are none.
    """
    rows = {part: read_rows(folder, part) for part in COLUMNS if (folder / f"{part}.csv").is_file()}
    if not rows:
        raise InputError(f"{folder}: no rows of memory systems ({', '.join(COLUMNS)}.csv)")
    fitted: dict[str, object] = {}
    errors: dict[str, dict[str, float]] = {}
    if "mapping" in rows:
        fitted["mapping"] = _mapping(rows["mapping"])
        fitted["interference"] = _interference(rows["mapping"])
    if "growth" in rows:
        fitted["growth"], of_growth = _growth(rows["growth"])
        errors |= of_growth
    if "transfer" in rows:
        directions = rows["transfer"]["direction"]
        fitted["handoff"] = _between(rows["transfer"][directions == HANDOFF]) or 0.0
        fitted["relay"] = _between(rows["transfer"][directions == RELAY])
        copies = rows["transfer"][~directions.isin([HANDOFF, RELAY])]
        fitted["transfer"], of_transfer = _fits(copies, _transfer_name, "bytes", _line)
        errors |= of_transfer
    if "recompute" in rows:
        fit = _curve if CHAIN_COLUMN in rows["recompute"].columns else _line
        fitted["recompute"], of_recompute = _fits(rows["recompute"], _recompute_name, "tokens", fit)
        errors |= of_recompute
    if "paged" in rows:
        fitted["paged"] = _paged(rows["paged"])
    costs = MemoryCosts(str(folder), gpu, provenance, **fitted, errors=errors)  # type: ignore[arg-type]
    for part in ("layers", "layers-column"):
        if part in rows:
            errors |= judge_layers(costs, rows[part])
    _write(folder / MEMORY_FILE, costs.to_json())
    return costs


def _write(path: Path, text: str) -> None:
    """The file appears whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    with atomic_file(path) as file:
        file.write(text.encode())


def read_rows(folder: Path, part: str) -> pd.DataFrame:
    """Those of `PART.csv`. InputError, naming file and column, if they cannot be read."""
    path = folder / f"{part}.csv"
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a table of rows: {error}") from None
    missing = [name for name in COLUMNS[part] if name not in table.columns]
    if missing:
        raise InputError(f"{path}: misses the column {missing[0]}")
    for name in ("time_us", "contiguous_us", "paged_us"):
        if name in table.columns:
            values = pd.to_numeric(table[name], errors="coerce")
            wrong = table.index[(values <= 0) | (values.isna() & table[name].notna())]
            if len(wrong):
                value = table[name][wrong[0]]
                raise InputError(f"{path}:{wrong[0] + 2}: {name} is {value}, expected a time")
    return table


def fit_line(units: Floats, seconds: Floats) -> Line:
    """Neither part negative, with the least squares of the relative error."""
    features = np.column_stack([1 / seconds, units / seconds])
    fixed, per_unit = non_negative(features)
    return Line(float(fixed), float(per_unit))


def non_negative(features: Floats) -> Floats:
    """Coefficients >= 0 whose products with the features are all as near to 1 as can be."""
    from scipy.optimize import nnls  # takes half a second to load, and only fits need it

    scale = np.abs(features).max(axis=0)
    return np.asarray(nnls(features / scale, np.ones(len(features)))[0] / scale)


def _as_json(line: Line) -> dict[str, float]:
    return {"fixed": line.fixed, "per_unit": line.per_unit}


# ------------------------------------------------------------------------------------- mapping


def _mapping(rows: pd.DataFrame) -> dict[str, object]:
    found: dict[str, dict[str, object]] = {}
    for size, of_size in rows[rows["api"].isin(APIS)].groupby("page_group"):
        for state, (gpu, thread) in STATES.items():
            mine = of_size[(of_size["gpu"] == gpu) & (of_size["thread"] == thread)]
            lines = {}
            for api, calls in mine.groupby("api"):
                medians = calls.groupby("page_groups")["time_us"].median() * 1e-6
                counts = medians.index.to_numpy(float)
                if len(counts) > 1:
                    line = fit_line(counts, medians.to_numpy())
                else:
                    line = Line(0.0, float(medians.iloc[0] / counts[0]))
                lines[str(api)] = _as_json(line)
            if set(lines) == set(APIS):
                found.setdefault(str(size), {})[state] = lines
    return {**found}


def _interference(rows: pd.DataFrame) -> dict[str, object]:
    """Of steps beside a thread that maps for a `share` of the time: seconds more a second of it."""
    found: dict[str, object] = {}
    for size, steps in rows[rows["api"] == "step"].groupby("page_group"):
        alone = float(steps[steps["thread"] == "none"]["time_us"].median())
        beside = steps[steps["thread"] == "background"]
        longer = float(beside["time_us"].median())
        mapping = float(beside["share"].median()) * longer
        found[str(size)] = max(0.0, (longer - alone) / mapping)
    return found


def _growth(rows: pd.DataFrame) -> tuple[dict[str, object], dict[str, dict[str, float]]]:
    """Lines of a block's growth while an engine serves, by page-groups; the last pass is held out.

    Slots that grow for the first time and later ones count alike.
    """
    served = rows[rows["beside"] == SERVING]
    held_out = served["pass"] == rows["pass"].max()
    found: dict[str, dict[str, object]] = {}
    errors: dict[str, dict[str, float]] = {}
    for size, of_size in served.groupby("page_group"):
        for state, thread in GROWING.items():
            mine = of_size[of_size["thread"] == thread]
            grid, last = (
                mine[held_out[mine.index] == held].groupby("page_groups")["time_us"].mean() * 1e-6
                for held in (False, True)
            )
            if grid.empty:
                raise InputError(f"growth.csv: under two passes in the {thread} thread")
            line = fit_line(grid.index.to_numpy(float), grid.to_numpy())
            found.setdefault(str(size), {})[state] = _as_json(line)
            predicted = np.array([line.at(units) for units in last.index])
            name = f"growth by {int(str(size)) >> 20} MB, {thread} thread"
            errors[name] = error_summary(predicted / last.to_numpy() - 1)
    return {**found}, errors


# ----------------------------------------------------------------------- transfers, recompute


def _between(rows: pd.DataFrame) -> float | None:
    """Seconds; None where it was not timed."""
    return None if rows.empty else float(rows["time_us"].median()) * 1e-6


def _transfer_name(key: Sequence[object]) -> str:
    direction, memory, beside = key
    return f"{direction} {memory}" + ("" if beside == "nothing" else f" beside {beside}")


def _recompute_name(key: Sequence[object]) -> str:
    hidden, outputs, rotated = (int(str(value)) for value in key)
    return recompute_name(hidden, outputs, bool(rotated))


Fitted = tuple[Callable[[float], float], dict[str, object]]
"""Seconds by units, and how memory.json has it."""


def _line(units: Floats, seconds: Floats) -> Fitted:
    line = fit_line(units, seconds)
    return line.at, {**_as_json(line)}


def _curve(units: Floats, seconds: Floats) -> Fitted:
    """Through all that was measured: products go by tiles, and cost at least what their weights
    take to be read. More tokens never take less.
    """
    longest = np.maximum.accumulate(seconds)
    knots: dict[str, object] = {"units": units.tolist(), "seconds": longest.tolist()}
    return Curve(tuple(units), tuple(longest)).at, knots


def _fits(
    rows: pd.DataFrame,
    name_of: Callable[[Sequence[object]], str],
    unit: str,
    fit: Callable[[Floats, Floats], Fitted],
) -> tuple[dict[str, object], dict[str, dict[str, float]]]:
    """A cost of each group of rows, and its error on those held out."""
    keys = list(rows.columns[:3])
    costs: dict[str, object] = {}
    errors: dict[str, dict[str, float]] = {}
    for key, group in rows.groupby(keys, sort=False):
        assert isinstance(key, tuple)
        medians = group.groupby(["split", unit])["time_us"].median() * 1e-6
        grid, held_out = (medians[split] for split in ("grid", "held_out"))
        at, cost = fit(grid.index.to_numpy(float), grid.to_numpy())
        name = name_of(key)
        costs[name] = cost
        predicted = np.array([at(units) for units in held_out.index])
        errors[name] = error_summary(predicted / held_out.to_numpy() - 1)
    return costs, errors


# --------------------------------------------------------------------------------------- paged


def _paged(rows: pd.DataFrame) -> dict[str, object]:
    """Ratios of the kernels' times, and the host's seconds of a table (op "table", in paged_us)."""
    found: dict[str, object] = {}
    for size, of_size in rows.groupby("block_size"):
        timed = of_size.loc[of_size["op"] != "table", "workload"]
        kernels: dict[str, object] = {"heads": ", ".join(sorted({w.split()[0] for w in timed}))}
        for op in ("prefill", "decode"):
            mine = of_size[of_size["op"] == op]
            if mine.empty:
                raise InputError(f"paged.csv: no rows of '{op}' with blocks of {size} tokens")
            kernels[op] = float((mine["paged_us"] / mine["contiguous_us"]).median())
        table = of_size[of_size["op"] == "table"]
        if len(table) < 3:
            raise InputError(f"paged.csv: under 3 rows of 'table' with blocks of {size} tokens")
        seconds = table["paged_us"].to_numpy(float) * 1e-6
        counts = [np.ones(len(table)), *(table[n].to_numpy(float) for n in ("requests", "blocks"))]
        features = np.column_stack(counts) / seconds[:, None]
        parts = non_negative(features)
        names = ("table_step", "table_request", "table_block")
        found[str(size)] = kernels | dict(zip(names, map(float, parts), strict=True))
    return found
