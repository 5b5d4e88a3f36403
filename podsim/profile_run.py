"""Measuring a profile: the plan gone through, rows checked and kept, interrupted work resumed.

What runs on the GPU comes in as a function, so that all of this is tested without one.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Protocol

from podsim import calibration
from podsim.errors import InputError
from podsim.hardware import Gpu
from podsim.model import Model
from podsim.profile import MEASUREMENTS_FILE, PROFILE_FILE, Profile, kernels_hash
from podsim.profile_journal import JOURNAL_FILE, Journal, Row, key_of
from podsim.profile_plan import CEILINGS, Job, Plan
from podsim.row_checks import ceiling_rates, ceilings_of, disagreement, fault_of

SPREAD_TARGET = 0.05
"""A sequence is repeated until P90 minus P10, over the median, is at most so much for each of its
operations,"""
SPREAD_FLOOR = 1e-6
"""or at most so many seconds,"""
MOST_ROUNDS = 2
"""or so many rounds are done,"""
LONG_ROUND = 0.25
"""or its timings together take as many seconds: then they are a mean over the ups and downs of the
clock already, and whole steps of large models would take most of a profile's time."""
ATTEMPTS = 2
"""A sequence with a row that cannot be believed is prepared and timed again so often in all."""


@dataclass(frozen=True, slots=True)
class Round:
    """Some repetitions of a sequence."""

    seconds: Mapping[str, Sequence[float]]
    """Of each row of the job, by `Job.label`: of each repetition."""
    sm_clock: float | None
    """Mean over the repetitions, in Hz; None if the device does not tell."""
    fault: str = ""
    """Why they cannot be believed, if the device can tell."""
    sm_clocks: Mapping[str, float] = field(default_factory=dict)
    """By `Job.label`, in Hz, of rows that have clocks of their own."""


class TimedSequence(Protocol):
    """A job made ready to run: compiled, captured."""

    @property
    def work(self) -> float | None:
        """Bytes or FLOPs of a ceiling."""

    def round(self, first: bool) -> Round:
        """Warm up, longer if this is the first round, and repeat."""


Prepare = Callable[[Job], TimedSequence]


def run_profile(
    folder: Path,
    plan: Plan,
    model: Model,
    gpu: Gpu,
    provenance: Mapping[str, object],
    prepare: Prepare,
    on_progress: Callable[[int, int], None],
    command: str,
    started: float,
) -> Profile:
    """Measure what of a plan is missing in a folder's journal; then leave the profile there.

    `provenance` is what the measurements depend on; `command` repeats them. `on_progress` is told
    how many of how many sequences are done. `started` is when all this began, of
    `time.perf_counter`: what passes from then to the first sequence is the start.
    The profile's files appear whole, once all is measured.
    Raises InputError, before anything is measured, if the folder holds something else or another
    measurement.
    """
    require_place(folder)
    identity = identity_of(plan, model, gpu.name, provenance)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Journal(folder / JOURNAL_FILE, identity, plan) as journal:
            start = time.perf_counter() - started
            card = str(provenance.get("card", ""))
            for index in range(journal.num_done, len(plan.turns)):
                on_progress(index, len(plan.turns))
                job, number = plan.turns[index]
                started = time.perf_counter()
                check = _checks(journal, model, gpu)
                rows = _measured(job, number, prepare, check)
                journal.append(rows, time.perf_counter() - started, card)
            on_progress(len(plan.turns), len(plan.turns))
            origin = {**provenance, **_cards(journal), "command": command}
            profile = _finish(folder, plan, model, gpu, origin, journal, start)
        (folder / JOURNAL_FILE).unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write the profile: {error.strerror}") from None
    return profile


def identity_of(
    plan: Plan, model: Model, gpu_name: str, provenance: Mapping[str, object]
) -> dict[str, object]:
    """What must be the same where a measurement goes on: another card of the same kind may."""
    machine = {name: value for name, value in provenance.items() if name != "card"}
    return {
        **machine,
        "kernels_sha256": kernels_hash(),
        "model": model.name,
        "shape": model.shape,
        "gpu": gpu_name,
        "quick": plan.quick,
        "plan_sha256": plan.sha256(),
    }


def _cards(journal: Journal) -> dict[str, str]:
    """Which card a profile is of, and from which sequences on it is of others."""
    (_, first), *others = journal.cards
    if not first and not others:
        return {}
    texts = [first or "unknown", *(f"from sequence {n} on {card}" for n, card in others)]
    return {"card": ", ".join(texts)}


def require_place(folder: Path) -> None:
    """InputError if a folder holds something that is neither a profile nor the start of one."""
    if not folder.exists():
        return
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {""}
    if found and not found & {PROFILE_FILE, JOURNAL_FILE}:
        raise InputError(f"{folder}: not empty, and no profile; name another --out")


def is_started(folder: Path) -> bool:
    """Whether a folder holds the start of a measurement."""
    return (folder / JOURNAL_FILE).exists()


def _checks(journal: Journal, model: Model, gpu: Gpu) -> Callable[[Row], str]:
    """Tells why a row cannot be believed, from the rows before; the ceilings are the first."""
    ceilings = ceilings_of(ceiling_rates(journal.rows[: len(CEILINGS)]), gpu)

    def check(row: Row) -> str:
        partner = journal.first_passes.get(key_of(row))
        reason = fault_of(row, model, gpu, ceilings)
        return reason or (disagreement(row, partner) if partner else "")

    return check


def _measured(job: Job, number: int, prepare: Prepare, check: Callable[[Row], str]) -> list[Row]:
    """The rows of a job; those that cannot be believed carry the reason."""
    rows: list[Row] = []
    for _ in range(ATTEMPTS):
        timed = _timed(job, number, prepare(job))
        rows = [{**row, "refused": row["refused"] or check(row)} for row in timed]
        if not any(row["refused"] for row in rows):
            break
    return rows


def _timed(job: Job, number: int, sequence: TimedSequence) -> list[Row]:
    """Repeat a sequence until its timings are close together."""
    rounds = [sequence.round(True)]
    once = job.kind in ("ceiling", "sustained", "duty")
    while len(rounds) < MOST_ROUNDS and not once and not _is_close(rounds) and not _is_long(rounds):
        rounds.append(sequence.round(False))
    fault = next((r.fault for r in rounds if r.fault), "")
    rows: list[Row] = []
    for key in job.keys:
        seconds = [s for r in rounds for s in r.seconds[job.label(key)]]
        low, *_, high = quantiles(seconds, n=10)
        measured = [r.sm_clocks.get(job.label(key), r.sm_clock) for r in rounds]
        clocks = [clock for clock in measured if clock is not None]
        middle = min(seconds) if job.kind == "ceiling" else median(seconds)
        rows.append(
            {
                **{name: str(value) for name, value in key._asdict().items()},
                "pass": str(number),
                "time_us": f"{middle * 1e6:.4f}",
                "time_p10_us": f"{low * 1e6:.4f}",
                "time_p90_us": f"{high * 1e6:.4f}",
                "repeats": str(len(seconds)),
                "sm_clock_mhz": f"{sum(clocks) / len(clocks) / 1e6:.0f}" if clocks else "",
                "work": "" if sequence.work is None else f"{sequence.work:.0f}",
                "refused": fault,
            }
        )
    return rows


def _is_close(rounds: Sequence[Round]) -> bool:
    return all(
        high - low <= max(SPREAD_TARGET * median(seconds), SPREAD_FLOOR)
        for name in rounds[0].seconds
        for seconds in [[s for r in rounds for s in r.seconds[name]]]
        for low, *_, high in [quantiles(seconds, n=10)]
    )


def _is_long(rounds: Sequence[Round]) -> bool:
    return sum(sum(timed) for r in rounds for timed in r.seconds.values()) >= LONG_ROUND


_SCRATCH = ".finishing"


def _finish(
    folder: Path,
    plan: Plan,
    model: Model,
    gpu: Gpu,
    provenance: Mapping[str, object],
    journal: Journal,
    start_seconds: float,
) -> Profile:
    """Fit, and move the finished files in; the journal stays until both are there."""
    scratch = folder / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    rows = _both_refused(journal.rows)
    measured = {
        **provenance,
        "quick": plan.quick,
        "timing": TIMING,
        "plan": {"rows": len(journal.rows), "sha256": plan.sha256()},
        "ceilings": {name: float(f"{v:.6g}") for name, v in ceiling_rates(journal.rows).items()},
        "refused_rows": sum(bool(row["refused"]) for row in rows),
        "sequences": {kind: len(s) for kind, s in journal.seconds.items()},
    }
    wall = {"start": round(start_seconds, 1)}
    wall |= {kind: round(sum(seconds), 1) for kind, seconds in journal.seconds.items()}
    try:
        profile = calibration.write(scratch, rows, model, gpu, measured, wall)
        (folder / PROFILE_FILE).unlink(missing_ok=True)  # never a new table beside an old fit
        for name in (MEASUREMENTS_FILE, PROFILE_FILE):
            os.replace(scratch / name, folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return profile


def _both_refused(rows: Sequence[Row]) -> list[Row]:
    """Where two passes disagree and neither has a fault of its own, which is right is not known."""
    points: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        points.setdefault(key_of(row), []).append(index)
    found = list(rows)
    for pair in points.values():
        for i, j in itertools.combinations(pair, 2):
            reason = disagreement(rows[i], rows[j])
            if reason and {rows[i]["refused"], rows[j]["refused"]} <= {"", reason}:
                found[i], found[j] = ({**rows[k], "refused": reason} for k in (i, j))
    return found


TIMING = (
    "inside its layer, after 40 ms of that layer's own work on numbers drawn anew; sustained and "
    "duty: whole steps one after another from rest, the mean of a window; ceilings: the best of "
    "short bursts after a pause"
)
"""What state of the card a profile's times are of."""
