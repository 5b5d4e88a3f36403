"""The table of a sweep: CSV, Parquet where pyarrow is there, and a plot of the Pareto front."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from podsim.config import Deployment, Workload, option_types, require_name
from podsim.errors import InputError
from podsim.pareto import MORE_IS_BETTER, on_front
from podsim.result_row import ROW_COLUMNS
from podsim.sweep_journal import Journal
from podsim.sweep_plan import SweepPlan
from podsim.trace_writers import atomic_file

COST = "cost_per_hour"
ROWS_AT_ONCE = 65_536
MAX_POINTS = 20_000  # drawn
MAX_LINES = 12

Cell = object
Row = list[Cell]


@dataclass(frozen=True, slots=True)
class Front:
    """The two numbers of each row that are weighed, and which rows are on the front."""

    names: tuple[str, str]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    group: NDArray[np.int64]
    members: NDArray[np.bool_]


def check_pareto(plan: SweepPlan) -> None:
    """InputError if a plan asks for a front that its table cannot have."""
    if not plan.pareto:
        return
    if len(plan.pareto) != 2:
        raise InputError(f"pareto is {', '.join(plan.pareto)}: expected two columns")
    for name in plan.pareto:
        require_name("pareto: unknown column", name, (*ROW_COLUMNS, COST))
        if name == COST and plan.cost_per_gpu_hour is None:
            raise InputError("pareto by cost_per_hour needs cost_per_gpu_hour in [sweep]")
        if name in ("goodput", "slo_attainment") and not plan.slos:
            raise InputError(f"pareto by {name} needs an slo in [sweep]")
    for name in plan.within or ():
        require_name("within: unknown option", name, tuple(plan.choices))


def write_table(plan: SweepPlan, journal: Journal, out: Path) -> int:
    """Write sweep.csv and what belongs to it from a full journal; how many rows have an error."""
    front = _front(plan, journal) if plan.pareto else None
    columns = _columns(plan)
    num_failed = 0
    with atomic_file(out / "sweep.csv") as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in _rows(plan, journal, front):
            writer.writerow([_csv_cell(cell) for cell in row])
            num_failed += row[-1] != ""
        text.detach()
    _write_parquet(columns, plan, _rows(plan, journal, front), out / "sweep.parquet")
    if front is not None:
        with atomic_file(out / "pareto.png") as file:
            _plot(front, file)
    return num_failed


def _columns(plan: SweepPlan) -> list[str]:
    cost = [COST] if plan.cost_per_gpu_hour is not None else []
    pareto = ["pareto"] if plan.pareto else []
    return ["index", *plan.choices, *ROW_COLUMNS, *cost, *pareto, "error"]


def _rows(plan: SweepPlan, journal: Journal, front: Front | None) -> Iterator[Row]:
    """Rows of the table, in order; None where there is no number."""
    for index, error, numbers in journal.rows():
        values: Row = list(numbers) if numbers else [None] * len(ROW_COLUMNS)
        row: Row = [index, *plan.options(index).values(), *values]
        if plan.cost_per_gpu_hour is not None:
            row.append(_cost(plan, numbers))
        if front is not None:
            row.append(int(front.members[index]))
        yield [*row, error]


def _cost(plan: SweepPlan, numbers: Sequence[float | None]) -> float | None:
    gpus = numbers[ROW_COLUMNS.index("gpus")] if numbers else None
    if gpus is None or plan.cost_per_gpu_hour is None:
        return None
    return gpus * plan.cost_per_gpu_hour


def _csv_cell(cell: Cell) -> Cell:
    return f"{cell:.9g}" if isinstance(cell, float) else cell


def _write_parquet(
    columns: Sequence[str], plan: SweepPlan, rows: Iterator[Row], path: Path
) -> None:
    """The same table, some rows at a time; nothing without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        return
    types = {
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        str: pyarrow.string(),
        bool: pyarrow.bool_(),
    }
    kinds = {**option_types(Workload), **option_types(Deployment)}
    kinds |= {"index": int, "pareto": int, "error": str}
    schema = pyarrow.schema([(name, types[kinds.get(name, float)]) for name in columns])
    with atomic_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while part := list(islice(rows, ROWS_AT_ONCE)):
            arrays = [
                pyarrow.array(cells, type=field.type)
                for cells, field in zip(zip(*part, strict=True), schema, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


# -------------------------------------------------------------------------------------- front


def _front(plan: SweepPlan, journal: Journal) -> Front:
    columns = _columns(plan)
    names = (plan.pareto[0], plan.pareto[1])
    places = [columns.index(name) for name in names]
    numbers = tuple(array("d") for _ in names)
    within = _within(plan)
    groups: dict[tuple[object, ...], int] = {}
    group = array("q")
    for row in _rows(plan, journal, None):
        for values, place in zip(numbers, places, strict=True):
            cell = row[place]
            values.append(cell if isinstance(cell, int | float) else np.nan)
        key = tuple(row[1 + i] for i in within)
        group.append(groups.setdefault(key, len(groups)))
    first, second = (np.asarray(values) for values in numbers)
    signs = [-1.0 if name in MORE_IS_BETTER else 1.0 for name in names]
    members = on_front(signs[0] * first, signs[1] * second, np.asarray(group))
    return Front(names, first, second, np.asarray(group), members)


def _within(plan: SweepPlan) -> list[int]:
    """Places, among the options, of those in which rows that are compared are equal."""
    workload = {option.name for option in fields(Workload)}
    names = workload if plan.within is None else set(plan.within)
    return [i for i, name in enumerate(plan.choices) if name in names]


def _plot(front: Front, file: IO[bytes]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    drawn = np.arange(0, len(front.first), max(1, len(front.first) // MAX_POINTS))
    axes.scatter(front.first[drawn], front.second[drawn], s=6, color="0.7", label="simulations")
    groups = np.unique(front.group[front.members])
    for group in groups[:MAX_LINES]:
        which = np.flatnonzero(front.members & (front.group == group))
        which = which[np.argsort(front.first[which], kind="stable")]
        axes.plot(front.first[which], front.second[which], marker="o", ms=4, lw=1)
    more = len(groups) - MAX_LINES
    title = f"Pareto front: {int(front.members.sum())} of {len(front.first)} simulations"
    axes.set_title(title + (f" ({more} more workloads)" if more > 0 else ""), fontsize=10)
    axes.set_xlabel(front.names[0])
    axes.set_ylabel(front.names[1])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
