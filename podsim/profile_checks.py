"""`podsim profile --check`: everything about a profile that can be checked without its GPU."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from podsim import calibration
from podsim.errors import InputError
from podsim.hardware import GPUS, Gpu
from podsim.latency import LAYER_OPS, SAMPLED_OPS, TOKEN_OPS
from podsim.model import Model
from podsim.profile import MEASUREMENTS_FILE, PROFILE_FILE, Profile, kernels_hash, read_profile
from podsim.profile_plan import Key, plan_profile, rows_sha256
from podsim.row_checks import Row, ceiling_rates, ceilings_of, disagreement, fault_of, name_of

MOST_LINES = 5
"""Findings of one kind that are written out."""
FIT_TOLERANCE = 1e-5
"""Relative difference of a fitted number from the one in the file: solvers round differently."""
SLACK = {"errors": 2e-4, "ops": 2e-10, "attention.overlap": 2e-6, "clock_sensitivity": 1e-6}
"""Differences that are none whatever the number: twice the last digit of those that the file holds
rounded, and how near a bound of 0 a search ends."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    text: str
    fault: bool
    """Whether the profile is refused for it; otherwise it lacks something that later ones have."""


def check_profile(folder: Path) -> list[Finding]:
    """What is wrong with a profile or missing in it; InputError if it cannot be read at all.

    Nothing that follows is checked on a broken basis: a profile of another GPU has no ceilings.
    """
    profile = read_profile(folder, str(folder))
    broken = [Finding(f"{PROFILE_FILE}: {text}", True) for text in schema_faults(profile)]
    broken += [Finding(f"{PROFILE_FILE}: {text}", True) for text in _machine_faults(profile)]
    if broken:
        return broken
    gpu = GPUS[profile.gpu]
    model = calibration.model_of(profile)
    rows = _rows(folder / MEASUREMENTS_FILE)
    findings = list(_kernels_findings(profile))
    findings += _missing_rows(profile, model, gpu, rows)
    findings += _row_findings(model, gpu, rows)
    findings += _lacks(profile, rows)
    return findings + _refit_findings(folder, profile, model)


def require_sound_rows(folder: Path) -> None:
    """InputError, naming the first, if a row of a profile could not have been timed on its GPU."""
    profile = read_profile(folder, str(folder))
    faults = [f"{PROFILE_FILE}: {text}" for text in _machine_faults(profile)]
    if not faults:
        rows, model = _rows(folder / MEASUREMENTS_FILE), calibration.model_of(profile)
        faults = [finding.text for finding in _row_findings(model, GPUS[profile.gpu], rows)]
    if faults:
        more = f" (`podsim profile --check {folder}` names more)" if len(faults) > 1 else ""
        raise InputError(f"{folder}/{faults[0]}{more}")


def _rows(path: Path) -> list[Row]:
    calibration.read_measurements(path)  # its errors name what is wrong with the file
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    for name in calibration.LATER_COLUMNS:
        if name not in table.columns:
            table[name] = ""
    return table.to_dict("records")  # type: ignore[return-value]


# ------------------------------------------------------------------------------- profile.json


def schema_faults(profile: Profile) -> Iterator[str]:
    """What of profile.json is not as docs/profile-format.md says."""
    for op in (*LAYER_OPS, *TOKEN_OPS, *SAMPLED_OPS):
        table = profile.ops.get(op, {})
        tokens, seconds = table.get("num_tokens", []), table.get("seconds", [])
        if len(tokens) < 2 or len(tokens) != len(seconds):
            yield f"ops.{op}: num_tokens and seconds must be two lists of one length, 2 or more"
        elif any(a >= b for a, b in itertools.pairwise(tokens)):
            yield f"ops.{op}: num_tokens do not increase"
        elif not all(math.isfinite(s) and s > 0 for s in seconds):
            yield f"ops.{op}: a time is not over 0"
    for part in ("geometry", "coefficients"):
        if part not in profile.attention:
            yield f"attention.{part} is missing"
            return
    for name, coefficients in profile.attention["coefficients"].items():
        if not coefficients or not all(math.isfinite(c) and c >= 0 for c in coefficients):
            yield f"attention.coefficients.{name}: expected numbers of at least 0"


def _machine_faults(profile: Profile) -> Iterator[str]:
    gpu = GPUS.get(profile.gpu)
    if gpu is None:
        yield f"gpu '{profile.gpu}' is not known; known: {', '.join(sorted(GPUS))}"
        return
    device = profile.provenance.get("device_name")
    if device != gpu.device_name:
        yield f"gpu '{profile.gpu}' is '{gpu.device_name}', but it was measured on '{device}'"
    num_sms = profile.provenance.get("num_sms")
    if num_sms != gpu.num_sms:
        yield f"gpu '{profile.gpu}' has {gpu.num_sms} SMs, but it was measured on {num_sms}"


def _kernels_findings(profile: Profile) -> Iterator[Finding]:
    measured, installed = str(profile.provenance.get("kernels_sha256")), kernels_hash()
    if measured != installed:
        yield Finding(
            f"{PROFILE_FILE}: of kernels {measured[:12]}, installed are {installed[:12]}: "
            "measure it again",
            True,
        )


# -------------------------------------------------------------------------- measurements.csv


def _missing_rows(profile: Profile, model: Model, gpu: Gpu, rows: Sequence[Row]) -> list[Finding]:
    """Rows that the plan of the measurement has and the table has not."""
    found = {(_key(row), int(str(row["pass"]))) for row in rows}
    recorded = profile.provenance.get("plan")
    plan = plan_profile(model, gpu, quick=bool(profile.provenance.get("quick", False)))
    if isinstance(recorded, dict) and recorded.get("sha256") != plan.sha256():
        if rows_sha256(iter(found)) == recorded.get("sha256"):
            return []
        return _partners_missing(found) or [
            Finding(
                f"{MEASUREMENTS_FILE}: {len(rows)} rows are not the {recorded.get('rows')} that "
                "were measured",
                True,
            )
        ]
    has_ceilings = any(row["op"] == "ceiling" for row in rows)
    planned = [row for row in plan.rows() if has_ceilings or row[0].op != "ceiling"]
    missing = [(key, number) for key, number in planned if (key, number) not in found]
    texts = [f"missing: {name_of({**key._asdict(), 'pass': n})}" for key, n in missing]
    return _summed_up(texts)


def _partners_missing(found: set[tuple[Key, int]]) -> list[Finding]:
    """Rows whose other passes are there."""
    passes = {number for _, number in found}
    keys = {key for key, _ in found if key.op != "ceiling"}
    missing = sorted((key, n) for key in keys for n in passes if (key, n) not in found)
    return _summed_up([f"missing: {name_of({**k._asdict(), 'pass': n})}" for k, n in missing])


def _key(row: Row) -> Key:
    texts = {name: str(row[name]) for name in Key._fields}
    return Key(**{**texts, "num_tokens": int(texts["num_tokens"])})  # type: ignore[arg-type]


def _row_findings(model: Model, gpu: Gpu, rows: Sequence[Row]) -> list[Finding]:
    """Rows that are impossible or too scattered, and were not refused when they were measured."""
    ceilings = ceilings_of(ceiling_rates(rows), gpu)
    texts = []
    first_passes: dict[Key, Row] = {}
    for line, row in enumerate(rows, 2):
        if row["refused"]:
            continue
        partner = first_passes.setdefault(_key(row), row)
        reason = fault_of(row, model, gpu, ceilings) or disagreement(row, partner)
        if reason:
            texts.append(f"line {line}: {name_of(row)}: {reason}")
    return _summed_up(texts)


def _summed_up(texts: Sequence[str]) -> list[Finding]:
    shown = [Finding(f"{MEASUREMENTS_FILE}: {text}", True) for text in texts[:MOST_LINES]]
    more = len(texts) - MOST_LINES
    if more > 0:
        shown.append(Finding(f"{MEASUREMENTS_FILE}: and {more} more like the last", True))
    return shown


def _lacks(profile: Profile, rows: Sequence[Row]) -> Iterator[Finding]:
    """What profiles of earlier versions have not."""
    if not any(row["op"] == "ceiling" for row in rows):
        yield Finding("no measured ceilings: checked against the published peaks", False)
    if not any(row["sm_clock_mhz"] for row in rows):
        yield Finding("no clock of its rows", False)
    if "plan" not in profile.provenance:
        yield Finding("no record of its plan: checked against the plan of this version", False)


# ---------------------------------------------------------------------------------- the refit


def _refit_findings(folder: Path, profile: Profile, model: Model) -> list[Finding]:
    """Whether profile.json is what its rows say."""
    try:
        again = calibration.fit(folder, profile.gpu, model, profile.provenance)
    except InputError as error:
        return [Finding(f"{MEASUREMENTS_FILE}: cannot be fitted: {error}", True)]
    texts = [
        f"{name} is not what a fit of its rows gives" for name in differing_parts(profile, again)
    ]
    return [Finding(f"{PROFILE_FILE}: {text}", True) for text in texts[:MOST_LINES]]


def differing_parts(profile: Profile, other: Profile) -> list[str]:
    """Names of the parts, at most three levels deep, in which two fits differ."""
    old, new = json.loads(profile.to_json()), json.loads(other.to_json())
    return sorted(set(_differences(old, new, "")))


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {*old, *new}:
            path = f"{name}.{key}".strip(".") if name.count(".") < 2 else name
            yield from _differences(old.get(key), new.get(key), path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for a, b in zip(old, new, strict=True):
            yield from _differences(a, b, name)
    elif isinstance(old, int | float) and isinstance(new, int | float):
        slack = max((size for part, size in SLACK.items() if name.startswith(part)), default=0.0)
        if not math.isclose(old, new, rel_tol=FIT_TOLERANCE, abs_tol=slack):
            yield name
    elif old != new:
        yield name
