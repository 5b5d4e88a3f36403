"""A finished profile taken up again, to measure what a newer plan has and it has not."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from podsim.errors import InputError
from podsim.model import Model
from podsim.profile import MEASUREMENTS_FILE, Profile, read_profile
from podsim.profile_journal import JOURNAL_FILE, Journal, Row
from podsim.profile_plan import Plan
from podsim.profile_run import identity_of, is_started


def reopen(
    folder: Path, plan: Plan, model: Model, gpu_name: str, provenance: Mapping[str, object]
) -> None:
    """Leave a journal beside a finished profile from which `run_profile` goes on to the plan's end.

    `provenance` is that of this machine now. Raises InputError, and leaves the folder as it was, if
    the profile was measured on another machine, with other kernels, or by a plan that does not
    begin this one. A journal that is there already stays.
    """
    if is_started(folder):
        return
    profile = read_profile(folder, str(folder))
    identity = identity_of(plan, model, gpu_name, provenance)
    _require_same(profile, identity)
    try:
        with (folder / MEASUREMENTS_FILE).open(encoding="utf-8", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{folder / MEASUREMENTS_FILE}: {error.strerror}") from None
    scratch = folder / f"{JOURNAL_FILE}.new"
    try:
        with Journal(scratch, identity, plan) as journal:
            card = str(profile.provenance.get("card", ""))
            _fill(journal, plan, rows, _seconds_each(profile, plan, len(rows)), card)
        scratch.replace(folder / JOURNAL_FILE)
    finally:
        scratch.unlink(missing_ok=True)


def _fill(
    journal: Journal, plan: Plan, rows: list[Row], seconds: Mapping[str, float], card: str
) -> None:
    first = 0
    for job, number in plan.turns:
        mine = rows[first : first + len(job.keys)]
        for line, (row, key) in enumerate(zip(mine, job.keys, strict=False), first + 2):
            found = (*(row[name] for name in key._fields), row["pass"])
            if found != (*map(str, key), str(number)):
                raise InputError(
                    f"{MEASUREMENTS_FILE}:{line}: not the row that comes here in this version's "
                    "plan: measure the profile anew"
                )
        if len(mine) < len(job.keys):
            break
        journal.append(mine, seconds[job.kind], card)
        first += len(mine)
    if first < len(rows):
        raise InputError(
            f"{MEASUREMENTS_FILE}:{first + 2}: this version's plan ends before: measure anew"
        )


def _seconds_each(profile: Profile, plan: Plan, num_rows: int) -> dict[str, float]:
    """Of a sequence of each kind that is measured: its share of the kind's wall time."""
    counts: dict[str, int] = {}
    for job, _ in plan.turns:
        num_rows -= len(job.keys)
        if num_rows < 0:
            break
        counts[job.kind] = counts.get(job.kind, 0) + 1
    wall = profile.provenance["wall_seconds"]
    assert isinstance(wall, dict)
    return {kind: float(wall[kind]) / count for kind, count in counts.items()}


def _require_same(profile: Profile, identity: Mapping[str, object]) -> None:
    found = {**profile.provenance, "model": profile.model, "gpu": profile.gpu}
    found["shape"] = profile.shape
    for name, now in identity.items():
        if name != "plan_sha256" and found.get(name) != now:
            raise InputError(
                f"{profile.source}: {name} is {found.get(name)!r} there, {now!r} now: measure it "
                "anew"
            )
