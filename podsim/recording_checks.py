"""Whether the files of a recording are whole: each error names the file, the line and the value.

Each table was written at once and says what the others say again: which tokens came out of which
step, and how many each request was served.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.points import AttentionPoint

TEXTS = ("refused", "prefills")
"""Columns that hold text; empty in most rows."""
SECONDS = (
    *("arrival_time", "start", "duration", "time"),
    *("gpu_seconds", "table_seconds", "mapping_seconds"),
)
SINCE_ARRIVAL = {
    "queue_time": "scheduled_time",
    "ttft": "first_token_time",
    "e2e_latency": "finish_time",
}
OF_SERVED = (*SINCE_ARRIVAL.values(), *SINCE_ARRIVAL)
"""Seconds that a refused request has not; nor has it `tpot`, or a request of one token."""
MEASURED = (*SECONDS, "sm_clock_mhz", "power_w")
"""All other columns are counts."""
ROUNDING = 1e-6
"""Seconds by which times in a file, rounded to 0.1 us, may contradict each other."""

OPTIONS = (
    *("model", "gpu", "attention", "scheduler", "order", "token_budget", "max_num_seqs"),
    *("num_blocks", "host_overhead", "graph_padding", "kv", "preemption"),
)
"""Of the deployment of every recording, to the last that is written."""
TEXTS_OF_ENGINE = ("name", "device_name", "driver", "torch", "triton", "date")


def check_engine(source: Path, engine: Mapping[str, Any]) -> None:
    """InputError if a machine's description lacks what a comparison needs."""
    for name in TEXTS_OF_ENGINE:
        if not isinstance(engine.get(name), str):
            raise InputError(f"{source}: {name} is {engine.get(name)!r}, expected text")
    host_time = engine.get("host_time")
    if not isinstance(host_time, dict):
        raise InputError(f"{source}: host_time is {host_time!r}, expected its parts")
    for name in ("fixed", "per_request", "with_prefill"):
        value: Any = host_time.get(name, 0.0 if name == "with_prefill" else None)
        if not _is_seconds(value):
            raise InputError(f"{source}: host_time {name} is {value!r}, expected seconds")
    starts = engine.get("kernel_starts", [0.0, 0.0])  # which the first recordings lack
    if not (isinstance(starts, list) and len(starts) == 2 and all(map(_is_seconds, starts))):
        raise InputError(f"{source}: kernel_starts is {starts!r}, expected two times in seconds")


def _is_seconds(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf  # type: ignore[operator]


def check_options(source: Path, options: Iterable[str]) -> None:
    """InputError if the options of a deployment were cut off: their defaults would be taken."""
    missing = [name for name in OPTIONS if name not in options]
    if missing:
        raise InputError(f"{source}: no '{missing[0]}'")


def read_table(source: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table of a recording, gzipped if its name says so; it may have more than these columns.

    Raises InputError for one that was cut off within a line, or holds what is not of its column,
    and OSError.
    """
    data = source.read_bytes()
    try:
        data = gzip.decompress(data) if source.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{source}: broken: {error}") from None
    num_lines = data.count(b"\n")
    if not data.endswith(b"\n"):
        raise InputError(f"{source}: line {num_lines + 1}: cut off")
    try:
        header = data[: data.index(b"\n")].decode().strip().split(",")
        missing = [name for name in columns if name not in header]
        if missing:
            raise InputError(f"{source}: no column '{missing[0]}'")
        if data.count(b",") != num_lines * (len(header) - 1):
            raise ValueError("not as many values in every line")
        kinds = {name: _kind(name) for name in header}
        with np.errstate(invalid="ignore"):  # infinite where whole numbers are: an error anyway
            table = pd.read_csv(io.BytesIO(data), dtype=kinds, skip_blank_lines=False)
    except InputError:
        raise
    except (ValueError, OverflowError) as error:
        _require_numbers(source, data)  # slowly, for the place
        raise InputError(f"{source}: not a table of a recording: {error}") from None
    for name in header:
        if name in TEXTS:
            table[name] = table[name].astype(object).fillna("")
        else:
            _require_values(source, name, table[name].to_numpy())
    return table


def _kind(column: str) -> type:
    if column in TEXTS:
        return str
    return float if column in (*MEASURED, *OF_SERVED, "tpot") else int


def _require_numbers(source: Path, data: bytes) -> None:
    """InputError for the first line that has too many values or too few, or no number."""
    header, *rows = csv.reader(data.decode(errors="replace").splitlines())
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise InputError(f"{source}: line {line}: {len(row)} values, expected {len(header)}")
        for name, text in zip(header, row, strict=True):
            kind = _kind(name)
            try:
                kind(text or "nan" if kind is float else text)
            except ValueError:
                number = "a number" if kind is float else "a whole number"
                raise _bad(source, line, name, repr(text), number) from None


def _require_values(source: Path, name: str, values: NDArray[Any]) -> None:
    """None negative or infinite; missing only where a request was refused, or had one token."""
    least = -1 if name == "replica" else 0  # -1: of a refused request
    bad = ~((values >= least) & (values < np.inf))
    if name in (*OF_SERVED, "tpot"):
        bad &= ~np.isnan(values)
    if name in ("duration", "num_prompt_tokens", "num_output_tokens"):
        bad |= values == 0
        _refuse_first(source, name, values, bad, "a number over 0")
    _refuse_first(source, name, values, bad, "a number of at least 0")


def _bad(source: Path, line: int, name: str, value: str, expected: str) -> InputError:
    return InputError(f"{source}: line {line}: {name} is {value}, expected {expected}")


def _refuse_first(
    source: Path, name: str, values: Sequence[Any] | NDArray[Any], bad: NDArray[Any], expected: str
) -> None:
    """InputError for the first row that is bad."""
    if bad.any():
        row = int(np.argmax(bad))
        raise _bad(source, row + 2, name, str(values[row]), expected)


def _require_in_order(source: Path, name: str, times: NDArray[np.float64]) -> None:
    early = np.diff(times, prepend=0.0) < 0
    _refuse_first(source, name, times, early, "no earlier time than the line before")


def check_requests(source: Path, requests: pd.DataFrame) -> None:
    """InputError if requests are missing, out of order, or served and without their times."""
    if requests.empty:
        raise InputError(f"{source}: no requests")
    ids, arrivals = (requests[name].to_numpy() for name in ("request_id", "arrival_time"))
    _refuse_first(source, "request_id", ids, ids != np.arange(len(ids)), "one more in every line")
    _require_in_order(source, "arrival_time", arrivals)
    served = requests["refused"].to_numpy() == ""
    several = requests["num_output_tokens"].to_numpy() > 1
    for name in (*OF_SERVED, "tpot"):
        values = requests[name].to_numpy()
        bad = served & np.isnan(values) & (several | (name != "tpot"))
        _refuse_first(source, name, values, bad, "seconds of a request that was not refused")
    for name, time in SINCE_ARRIVAL.items():
        values = requests[name].to_numpy()
        bad = np.abs(requests[time].to_numpy() - arrivals - values) > ROUNDING
        _refuse_first(source, name, values, bad, f"{time} less arrival_time")


def check_steps(source: Path, steps: pd.DataFrame) -> None:
    """InputError if steps are out of order, or one's composition is not as counted."""
    _require_in_order(source, "start", steps["start"].to_numpy())
    columns = steps[["prefills", "num_prefills", "num_prefill_tokens"]]
    for line, (text, num_prefills, num_tokens) in enumerate(columns.itertuples(index=False), 2):
        try:
            chunks = AttentionPoint.from_text(text, "", "").prefills
        except ValueError:
            raise _bad(source, line, "prefills", repr(text), "tokens@context of each") from None
        if (len(chunks), sum(n for n, _ in chunks)) != (num_prefills, num_tokens):
            expected = f"{num_prefills} with {num_tokens} tokens"
            raise _bad(source, line, "prefills", repr(text), expected)


def check_tokens(
    source: Path, tokens: pd.DataFrame, requests: pd.DataFrame, steps: pd.DataFrame
) -> None:
    """InputError if not every step gave, and every request got, as many tokens as is said."""
    lengths = np.where(requests["refused"] == "", requests["num_output_tokens"], 0)
    expected = {"step": steps["num_sampled"].to_numpy(), "request_id": lengths}
    for name, owned in expected.items():
        owners = tokens[name].to_numpy()
        beyond = owners >= len(owned)
        what = "steps" if name == "step" else "requests"
        _refuse_first(source, name, owners, beyond, f"one of the {len(owned)} {what}")
        found = np.bincount(owners, minlength=len(owned))
        wrong = np.flatnonzero(found != owned)
        if len(wrong):
            i = int(wrong[0])
            raise InputError(f"{source}: {found[i]} tokens of {name} {i}, expected {owned[i]}")
