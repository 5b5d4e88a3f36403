"""The folder of files that a run leaves."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from podsim.config import Workload, to_toml
from podsim.errors import InputError
from podsim.perfetto import write_trace_events
from podsim.report_charts import Run
from podsim.report_html import comparison_page, run_page
from podsim.request_records import AIPERF_FILE, aiperf_lines, detailed_lists
from podsim.simulation import Result

_TIME_COLUMNS = (
    *("arrival_time", "scheduled_time", "first_token_time", "finish_time"),
    *("queue_time", "ttft", "e2e_latency", "tpot"),
    *("start", "duration", "time", "stall"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files to leave beside the usual ones. Raises InputError for what cannot be written."""

    trace_events: int | None = None
    """Write trace.json with at most so many events."""
    parquet: bool = False
    aiperf: bool = False
    save_detailed: bool = False
    """Put the lists of every request into summary.json, as vLLM's option of this name does."""

    def __post_init__(self) -> None:
        if self.trace_events is not None and self.trace_events < 1:
            raise InputError(f"trace_events is {self.trace_events}, expected at least 1")
        if self.parquet and importlib.util.find_spec("pyarrow") is None:
            raise InputError("--parquet needs pyarrow: pip install 'podsim[parquet]'")

    def require_folder(self, folder: Path | None) -> None:
        """InputError if files are asked for and there is no folder to leave them in."""
        asked = [name for name in self.__slots__ if getattr(self, name)]
        if folder is None and asked:
            raise InputError(f"--{asked[0].replace('_', '-')} needs a folder: give --out FOLDER")


FILES_FILE = ".podsim-files"
"""In a result folder: the files that podsim wrote there, and may replace."""


@contextmanager
def result_folder(directory: Path) -> Iterator[Path]:
    """A folder to write results into, which takes its name only when all is written.

    A folder of earlier results is replaced. Raises InputError, before any work is done, if it
    cannot be written or holds anything else.
    """
    directory = directory.resolve()
    _require_replaceable(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise InputError(f"{directory}: cannot write results here: {error.strerror}") from None
    try:
        yield scratch
        scratch.chmod(0o755)
        listed = "".join(f"{name}\n" for name in _files_of(scratch))
        (scratch / FILES_FILE).write_text(listed, encoding="utf-8")
        _require_replaceable(directory)
        _replace(directory, scratch)
    except OSError as error:
        raise InputError(f"{directory}: cannot write results: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(directory: Path, scratch: Path) -> None:
    """Put the new folder in the place of the old one, which stays if that fails."""
    if not directory.exists():
        os.replace(scratch, directory)
        return
    old = scratch.with_name(f"{scratch.name}.old")
    os.replace(directory, old)
    try:
        os.replace(scratch, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _require_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: is no folder; name another --out")
    if directory.is_mount():
        raise InputError(f"{directory}: is a mount point; name a folder in it")
    listed = directory / FILES_FILE
    own = set(listed.read_text(encoding="utf-8").splitlines()) if listed.is_file() else set()
    foreign = [name for name in _files_of(directory) if name not in own]
    if foreign:
        raise InputError(
            f"{directory}: {foreign[0]} is of no result of this podsim; remove it or name another "
            "--out"
        )


def _files_of(directory: Path) -> list[str]:
    """Of a folder and those in it, by name from there; empty folders too."""
    entries = [path for path in directory.rglob("*") if path.name != FILES_FILE]
    leaves = (path for path in entries if not path.is_dir() or not any(path.iterdir()))
    return sorted(path.relative_to(directory).as_posix() for path in leaves)


def save(
    result: Result,
    workload: Workload | None,
    directory: Path,
    outputs: Outputs | None = None,
    name: str | None = None,
) -> list[str]:
    """Write one run; docs/metrics.md lists the files. Notes on what a file does not hold."""
    outputs = outputs or Outputs()
    if result.streamed is not None:
        return _save_streamed(result, workload, directory)
    run = Run.of(name or result.deployment.attention, result, workload)
    config = to_toml(workload, result.deployment)
    hashes = run_hashes(result, config)
    (directory / "config.toml").write_text(config, encoding="utf-8")
    summary = _complete(run.summary, hashes)
    if outputs.save_detailed:
        summary = {**summary, **detailed_lists(result), "podsim": summary["podsim"]}
    (directory / "summary.json").write_text(to_json(summary), encoding="utf-8")
    tables = {"requests": _with_units(run.requests), "steps": _with_units(run.steps)}
    for file, table in tables.items():
        table.to_csv(directory / f"{file}.csv", index=False, float_format="%.9f")
        if outputs.parquet:
            table.to_parquet(directory / f"{file}.parquet", engine="pyarrow", index=False)
    if result.memory:
        table = _with_units(result.memory_table)
        table.to_csv(directory / "memory.csv", index=False, float_format="%.9g")
    if outputs.aiperf:
        with (directory / AIPERF_FILE).open("w", encoding="utf-8") as lines:
            lines.writelines(aiperf_lines(result))
    _write_page(run_page(run, hashes), directory)
    if outputs.trace_events is None:
        return []
    written = write_trace_events(result, directory / "trace.json", outputs.trace_events)
    return [f"trace.json holds {written.note}"]


def _save_streamed(result: Result, workload: Workload | None, directory: Path) -> list[str]:
    """The rest of a run whose requests were written as they finished."""
    config = to_toml(workload, result.deployment)
    (directory / "config.toml").write_text(config, encoding="utf-8")
    summary = _complete(result.summary(), run_hashes(result, config))
    (directory / "summary.json").write_text(to_json(summary), encoding="utf-8")
    return ["no steps.csv and no report.html; requests.csv is in order of leaving"]


def request_writer(directory: Path | None) -> Callable[[pd.DataFrame], None]:
    """Appends tables of requests to requests.csv; without a folder, nothing is kept."""
    if directory is None:
        return lambda table: None
    path = directory / "requests.csv"

    def append(table: pd.DataFrame) -> None:
        renamed = _with_units(table)
        header = not path.exists()
        renamed.to_csv(path, mode="a", header=header, index=False, float_format="%.9f")

    return append


def save_comparison(
    compared: pd.DataFrame,
    results: Mapping[str, Result],
    workload: Workload | Mapping[str, Workload] | None,
    directory: Path,
) -> None:
    """Write compare.csv and the report of all variants; `workload` of all, or of each by name."""
    more = {
        name: {
            "outside_measured_share": result.outside_measured_share,
            "uncalibrated": float(result.uncalibrated is not None),
        }
        for name, result in results.items()
    }
    compared = pd.concat([compared, pd.DataFrame(more)])
    table = pd.concat([compared, _interval_columns(compared, results)], axis=1)
    table.rename_axis("metric").to_csv(directory / "compare.csv", float_format="%.9g")
    runs = [
        Run.of(name, result, workload[name] if isinstance(workload, Mapping) else workload)
        for name, result in results.items()
    ]
    hashes = {
        run.name: run_hashes(run.result, to_toml(run.workload, run.result.deployment))
        for run in runs
    }
    _write_page(comparison_page(runs, compared, hashes), directory)


def _interval_columns(compared: pd.DataFrame, results: Mapping[str, Result]) -> pd.DataFrame:
    """Of each variant with error bars: the low and the high end of each metric's interval."""
    columns = {}
    for name, result in results.items():
        if result.intervals is not None:
            spans = [result.intervals.get(str(key), (math.nan,) * 2) for key in compared.index]
            columns[f"{name} low"] = [low for low, _ in spans]
            columns[f"{name} high"] = [high for _, high in spans]
    return pd.DataFrame(columns, index=compared.index)


def run_hashes(result: Result, config: str) -> dict[str, str]:
    """SHA-256 of what a run was made from: trace, config.toml, kernels that were measured."""
    hashes = {
        "trace_sha256": result.trace.sha256,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
    }
    profile = getattr(result.latency_model, "profile", None)
    if profile is not None:
        hashes["kernels_sha256"] = str(profile.provenance.get("kernels_sha256", "unknown"))
    return hashes


def full_summary(result: Result, workload: Workload | None) -> dict[str, object]:
    """What summary.json holds: the summary of a run and the hashes of what it was made from."""
    return _complete(result.summary(), run_hashes(result, to_toml(workload, result.deployment)))


def _complete(summary: Mapping[str, object], hashes: Mapping[str, str]) -> dict[str, object]:
    own = summary["podsim"]
    assert isinstance(own, dict)
    return {**summary, "podsim": {**own, "hashes": dict(hashes)}}


def to_json(value: object) -> str:
    """JSON, with null for a metric that has no sample."""
    return json.dumps(_without_nan(value), indent=2) + "\n"


def _write_page(page: str, directory: Path) -> None:
    (directory / "report.html").write_text(page, encoding="utf-8", newline="\n")


def _with_units(table: pd.DataFrame) -> pd.DataFrame:
    """Seconds carry their unit in the column's name; a CSV has them to the nanosecond."""
    return table.rename(columns={name: f"{name}_s" for name in _TIME_COLUMNS})


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
