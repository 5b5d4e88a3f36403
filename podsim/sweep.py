"""A sweep: every simulation of a plan, spread over cores or machines, resumable, in one table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from podsim.collectives import COLLECTIVES_FILE
from podsim.errors import InputError
from podsim.profile import PROFILE_FILE
from podsim.ray_workers import on_ray
from podsim.result_row import ROW_COLUMNS
from podsim.sweep_journal import Journal, podsim_version
from podsim.sweep_plan import Range, SweepPlan, read_plan
from podsim.sweep_point import Point, run_point
from podsim.sweep_table import check_pareto, write_table
from podsim.workers import Died, in_processes, num_cores

JOURNAL_FILE = "journal.jsonl"

OnProgress = Callable[[int, int], None]
"""Told how many simulations are done, earlier ones included, and how many of them failed."""


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """What a sweep left."""

    table: Path
    """CSV: a row a simulation."""
    num_rows: int
    num_failed: int
    """Rows with an error in place of numbers."""
    num_simulated: int
    """Rows of this call; the others were there."""


def run_sweep(
    plan: SweepPlan | Path,
    out: Path,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    on_progress: OnProgress | None = None,
) -> SweepOutcome:
    """Simulate what a plan (or its TOML file) says; leave sweep.csv in a folder.

    What an earlier call left unfinished there is gone on with, and gives the same table. jobs:
    processes of this machine, by default one a core; ray: the address of a Ray cluster to use
    instead, or "local". InputError if the folder holds something else, or for a wrong plan. A
    script that calls this keeps the call under `if __name__ == "__main__":`.
    """
    if isinstance(plan, Path):
        plan = read_plan(plan)
    check_pareto(plan)
    _make_folder(out)
    try:
        with Journal(out / JOURNAL_FILE, _identity(plan), len(plan)) as journal:
            before = journal.num_done
            _simulate_missing(plan, journal, jobs or num_cores(), ray, on_progress)
            num_failed = write_table(plan, journal, out)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{out}: {reason}; what is finished there is kept") from None
    return SweepOutcome(out / "sweep.csv", len(plan), num_failed, len(plan) - before)


def _simulate_missing(
    plan: SweepPlan, journal: Journal, jobs: int, ray: str | None, on_progress: OnProgress | None
) -> None:
    num_missing = len(plan) - journal.num_done
    if num_missing == 0:
        return
    function, missing = partial(run_point, plan), journal.missing()
    if ray is None:
        results = in_processes(function, missing, min(jobs, num_missing))
    else:
        results = on_ray(function, missing, ray, jobs)
    num_failed = 0
    with closing(results):
        for index, point in results:
            if isinstance(point, Died):
                point = Point(error=str(point))
            journal.append(index, point.error, point.numbers)
            num_failed += point.error != ""
            if on_progress is not None:
                on_progress(journal.num_done, num_failed)


def _make_folder(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / JOURNAL_FILE).exists():
        raise InputError(f"{out}: not empty, and no podsim sweep; name another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write results here: {error.strerror}") from None


def _identity(plan: SweepPlan) -> dict[str, object]:
    """What rows must share to be of one table."""
    choices = {
        name: asdict(choice) if isinstance(choice, Range) else list(choice)
        for name, choice in plan.choices.items()
    }
    return {
        "podsim": podsim_version(),
        "options": choices,
        "samples": plan.samples,
        "seed": plan.seed if plan.samples else 0,
        "slo": [str(slo) for slo in plan.slos],
        "columns": list(ROW_COLUMNS),
        "files": _hashes(plan),
    }


def _hashes(plan: SweepPlan) -> dict[str, str]:
    """Of the files that the options name; a folder of traces is not looked into."""
    named = {
        "trace": [Path(str(name)) for name in plan.values("trace")],
        "profile": [Path(str(name)) / PROFILE_FILE for name in plan.values("profile")],
        "collectives": [Path(str(name)) / COLLECTIVES_FILE for name in plan.values("collectives")],
    }
    hashes = {}
    for path in (path for paths in named.values() for path in paths if path.is_file()):
        with path.open("rb") as file:
            hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
