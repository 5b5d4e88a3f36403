"""`podsim profile --check`: everything about a profile that can be checked without its GPU."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from podsim import calibration
from podsim.errors import InputError
from podsim.hardware import GPUS, Gpu
from podsim.model import Model
from podsim.op_tables import LAYER_OPS, SAMPLED_OPS, TOKEN_OPS
from podsim.profile import MEASUREMENTS_FILE, PROFILE_FILE, Profile, kernels_hash, read_profile
from podsim.profile_plan import Key, plan_profile, rows_sha256
from podsim.row_checks import (
    MOST_APART,
    Row,
    ceiling_rates,
    ceilings_of,
    disagreement,
    fault_of,
    name_of,
    number,
)

MOST_LINES = 5
"""Findings of one kind that are written out."""
NUMBERS = ("num_tokens", "pass", "time_us", "time_p10_us", "time_p90_us")
"""Columns that every row has numbers in."""
FIT_TOLERANCE = 1e-5
"""Relative difference of a fitted number from the one in the file: solvers round differently."""
CEILING_DIGITS = 1e-5
"""Relative difference of a ceiling from its row's that is none: it has 6 digits, and the time 4
decimals of a microsecond."""
SLACK = {
    **{"errors": 2e-4, "ops": 2e-10, "attention.overlap": 2e-6, "clock_sensitivity": 1e-6},
    **{f"sustained.{name}": 1e-8 for name in ("decodes", "overlap", "longer", "lower", "timed")},
}
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
    findings += missing_rows(profile, model, gpu, rows)
    findings += _row_findings(model, gpu, rows)
    findings += _ceiling_findings(profile, rows)
    findings += _lacks(profile, rows)
    if any(finding.fault for finding in findings):
        return findings  # of other rows than these, what is fitted differs anyway
    return findings + _refit_findings(folder, profile, model)


def require_sound_rows(folder: Path) -> None:
    """InputError, naming the first, if a row of a profile could not have been timed on its GPU."""
    profile = read_profile(folder, str(folder), to_refit=True)
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
    for name in NUMBERS:
        wrong = table.index[pd.to_numeric(table[name], errors="coerce").isna()]
        if len(wrong):
            text = f"line {wrong[0] + 2}: {name} is '{table[name][wrong[0]]}', expected a number"
            raise InputError(f"{path}: {text}")
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


def missing_rows(profile: Profile, model: Model, gpu: Gpu, rows: Sequence[Row]) -> list[Finding]:
    """Rows that the plan of the measurement has and the table has not, and the other way round."""
    found = Counter((_key(row), int(str(row["pass"]))) for row in rows)
    plan = plan_profile(model, gpu, quick=bool(profile.provenance.get("quick", False)))
    planned, recorded = list(plan.rows()), profile.provenance.get("plan")
    if isinstance(recorded, dict):
        # A newer plan has more rows, after those of the older ones: --extend times them.
        count = recorded.get("rows")
        planned = planned[:count] if isinstance(count, int) else []
        if rows_sha256(iter(planned)) != recorded.get("sha256"):
            return _not_as_recorded(found, recorded)
    elif not any(row["op"] == "ceiling" for row in rows):
        planned = [(key, number) for key, number in planned if key.op != "ceiling"]
    missing, more = Counter(planned) - found, found - Counter(planned)
    if not isinstance(recorded, dict):
        more.clear()  # of which version its plan was is not known
    texts = [f"missing: {_name(*row)}" for row in missing]
    return _summed_up([*texts, *(f"not among what was planned: {_name(*row)}" for row in more)])


def _not_as_recorded(
    found: Counter[tuple[Key, int]], recorded: Mapping[str, object]
) -> list[Finding]:
    """Of a profile whose plan does not begin this version's: only which rows it had is known."""
    if rows_sha256(found.elements()) == recorded.get("sha256"):
        return []
    text = f"{found.total()} rows are not the {recorded.get('rows')} that were measured"
    return _summed_up([text])


def _name(key: Key, number: int) -> str:
    return name_of({**key._asdict(), "pass": number})


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
    return _summed_up([*texts, *_launch_faults(rows)])


def _launch_faults(rows: Sequence[Row]) -> Iterator[str]:
    """The shortest launch is that of an empty kernel, which the rows of `launch` time once more."""
    empty = [row for row in rows if (row["op"], row["num_tokens"]) == ("launch", "1")]
    times = [number(row, "time_us") for row in empty if not row["refused"]]
    for line, row in enumerate(rows, 2):
        if row["strategy"] != "launch_latency" or row["refused"] or not times:
            continue
        time, again = number(row, "time_us"), min(times)
        if max(time, again) > MOST_APART * min(time, again):
            yield (
                f"line {line}: {name_of(row)}: {time:,.2f} us, but the launch of an empty kernel "
                f"took {again:,.2f} us"
            )


def _ceiling_findings(profile: Profile, rows: Sequence[Row]) -> Iterator[Finding]:
    """Whether the ceilings in profile.json are those of the rows."""
    recorded, rates = profile.provenance.get("ceilings"), ceiling_rates(rows)
    if not isinstance(recorded, dict):
        return
    for name in sorted({*recorded, *rates}):
        there, of_rows = recorded.get(name), rates.get(name)
        known = isinstance(there, int | float) and of_rows is not None
        if not known or not math.isclose(there or 0, of_rows or 0, rel_tol=CEILING_DIGITS):
            given = "nothing" if of_rows is None else f"{of_rows:.6g}"
            text = f"provenance.ceilings.{name} is {there}, its rows give {given}"
            yield Finding(f"{PROFILE_FILE}: {text}", True)


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
