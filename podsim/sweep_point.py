"""One simulation of a sweep: what a worker does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from podsim.config import Deployment, Workload, options_from
from podsim.errors import InputError
from podsim.result_row import ROW_COLUMNS, result_row
from podsim.simulation import simulate, workload_trace
from podsim.sweep_plan import SweepPlan


@dataclass(frozen=True, slots=True)
class Point:
    """What became of one simulation."""

    numbers: tuple[float | None, ...] = ()
    """Of ROW_COLUMNS; nothing after an error."""
    error: str = ""


def run_point(plan: SweepPlan, index: int) -> Point:
    """One simulation of a plan; what goes wrong in it is its result, and stops no other."""
    try:
        options = plan.options(index)
        workload = options_from(Workload, options)
        deployment = options_from(Deployment, options)
        row = result_row(simulate(workload_trace(workload), deployment), plan.slos)
    except InputError as error:
        return Point(error=str(error))
    except Exception as error:
        return Point(error=f"{type(error).__name__}: {error}".splitlines()[0])
    return Point(tuple(_rounded(row[name]) for name in ROW_COLUMNS))


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.9g}")
