"""The requests to simulate: `load_trace` reads them, `synthetic_trace` makes them up."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_fields import MAX_NANOSECONDS, MISSING, CountTokens
from podsim.trace_folders import read_rows
from podsim.trace_rows import Ints, ReadOptions, Rows
from podsim.workload_arrivals import ARRIVALS
from podsim.workload_synthetic import LengthSpec, Synthetic, generate, synthetic_trace
from podsim.workload_trace import Trace

__all__ = [
    "ARRIVALS",
    "LengthSpec",
    "ReadOptions",
    "Synthetic",
    "Trace",
    "generate",
    "load_once",
    "load_trace",
    "read_trace",
    "shipped_traces",
    "synthetic_trace",
]


def shipped_traces() -> list[str]:
    """The names that `load_trace` knows without a path."""
    names = [entry.name for entry in files("podsim.traces").iterdir()]
    return sorted(name.removesuffix(".csv") for name in names if name.endswith(".csv"))


def load_trace(
    source: str | Path,
    *,
    zero_length: str = "error",
    format: str | None = None,
    count_tokens: CountTokens | None = None,
    seed: int = 0,
) -> Trace:
    """Read a trace from a file, plain or gzipped, or by the name of one that podsim ships.

    The formats are in `podsim.trace_formats`; `format` names one in place of recognising it.
    Rows without a prompt or an output token are an error, or with zero_length="drop" left out and
    counted. Rows out of time order are sorted. `count_tokens` counts those of a text, where a
    format holds texts; `seed` is for requests drawn from client statistics.
    InputError: no such file, an unknown format, or a wrong line, named by its number.
    """
    options = ReadOptions(
        zero_length=zero_length, format=format, count_tokens=count_tokens, seed=seed
    )
    return read_trace(source, options)


def load_once(source: str, *, zero_length: str, format: str | None, seed: int) -> Trace:
    """`load_trace`, which keeps the last traces and reads a file again only if it has changed."""
    try:
        status = os.stat(source)
    except OSError:
        changed = None
    else:
        changed = (status.st_mtime_ns, status.st_size)
    trace = _kept(source, changed, zero_length, format, 0)
    if trace.format == "servegen" and seed:  # the only one that is drawn from a seed
        return _kept(source, changed, zero_length, format, seed)
    return trace


@lru_cache(maxsize=4)
def _kept(
    source: str, changed: tuple[int, int] | None, zero_length: str, format: str | None, seed: int
) -> Trace:
    return load_trace(source, zero_length=zero_length, format=format, seed=seed)


def read_trace(source: str | Path, options: ReadOptions) -> Trace:
    """`load_trace` with all options there are."""
    if source in shipped_traces():
        with as_file(files("podsim.traces") / f"{source}.csv") as path:
            return replace(_trace(path, read_rows(path, options)), name=str(source))
    if not os.path.exists(source):
        shipped = ", ".join(shipped_traces())
        raise InputError(f"{source}: no such file, nor a trace that podsim ships ({shipped})")
    return _trace(Path(source), read_rows(Path(source), options))


def _trace(path: Path, rows: Rows) -> Trace:
    """Rows as a trace: without those of zero length, in order of time."""
    notes = list(rows.notes)
    dropped, kept = _without_zero_lengths(path, rows)
    time_ns = rows.time_ns
    if time_ns is None:
        notes.append("the file holds lengths only, no arrival times")
        arrival_time = np.full(len(rows.lines), np.nan)[kept]
    else:
        time_ns = _unwrapped(_with_turns(path, rows, time_ns, notes), rows, notes)
        disorder = _disorder(time_ns[kept], rows.lines[kept])
        if disorder:
            if not rows.format.document:  # whose subagents stand between its turns
                notes += disorder
            kept = np.arange(len(time_ns))[kept]
            kept = kept[np.argsort(time_ns[kept], kind="stable")]
        in_order = time_ns[kept]
        arrival_time = (in_order - in_order[0]) / 1e9
    hash_ids = rows.hash_ids
    if hash_ids is not None:
        hash_ids = [hash_ids[i] for i in np.arange(len(hash_ids))[kept].tolist()]
    trace = Trace(
        name=path.name,
        arrival_time=arrival_time,
        num_prompt_tokens=rows.num_prompt_tokens[kept],
        num_output_tokens=rows.num_output_tokens[kept],
        rows_read=rows.rows_read,
        dropped=dropped,
        notes=tuple(notes),
        sha256=rows.sha256,
        hash_ids=tuple(hash_ids) if hash_ids is not None else None,
        hash_block_size=rows.hash_block_size if hash_ids is not None else None,
        session_id=rows.session[kept] if rows.session is not None else None,
        parent_session=None if rows.parent_session is None else rows.parent_session[kept],
        priority=None if rows.priority is None else np.maximum(rows.priority[kept], 0),
        format=rows.format.name,
    )
    return replace(trace, think_time=_think_time(rows, kept, trace))


Kept = slice | Ints  # which rows: a slice of all costs no memory, and files may be large


def _without_zero_lengths(path: Path, rows: Rows) -> tuple[dict[str, int], Kept]:
    no_output = rows.num_output_tokens == 0
    no_prompt = (rows.num_prompt_tokens == 0) & ~no_output
    dropped = {
        **rows.dropped,
        "zero output tokens": int(no_output.sum()),
        "zero prompt tokens": int(no_prompt.sum()),
    }
    zero = no_output | no_prompt
    if zero.all():
        raise InputError(f"{path}: all {len(zero)} rows have zero tokens, none is left")
    kept: Kept = np.flatnonzero(~zero) if zero.any() else slice(None)
    return {reason: count for reason, count in dropped.items() if count}, kept


def _with_turns(path: Path, rows: Rows, time_ns: Ints, notes: list[str]) -> Ints:
    """A time for the turns that have none: a think time after the turn before them."""
    waiting = np.flatnonzero(time_ns == MISSING)
    if not len(waiting):
        return time_ns
    times = time_ns.copy()
    last: dict[int, int] = {}  # time of a session's turn, by session
    sessions = rows.session if rows.session is not None else np.full(len(times), MISSING)
    thinks = rows.think_ns if rows.think_ns is not None else np.full(len(times), MISSING)
    for row, session in enumerate(sessions.tolist()):
        if times[row] == MISSING:
            if session == MISSING or session not in last:
                name = rows.format.time
                raise InputError(
                    f"{path}:{rows.lines[row]}: {name} is missing, expected one, or an earlier "
                    "turn of the same session_id"
                )
            times[row] = min(last[session] + max(int(thinks[row]), 0), MAX_NANOSECONDS)
        last[session] = int(times[row])
    notes.append(
        f"{len(waiting)} turns come after the turn before them: their arrival times count its "
        "service as no time"
    )
    return times


def _unwrapped(time_ns: Ints, rows: Rows, notes: list[str]) -> Ints:
    """Times of a clock that starts again from 0: it did where it fell by half the span."""
    if not rows.format.wraps_after or len(time_ns) < 2:
        return time_ns
    falls = np.flatnonzero(np.diff(time_ns) < -(int(time_ns.max() - time_ns.min()) / 2)) + 1
    if not len(falls) or len(falls) * rows.format.wraps_after > MAX_NANOSECONDS:
        return time_ns
    laps = np.zeros(len(time_ns), dtype=np.int64)
    laps[falls] = 1
    notes.append(
        f"the clock starts again at line {rows.lines[falls[0]]}"
        f"{f' and {len(falls) - 1} more' if len(falls) > 1 else ''}: unwrapped, "
        f"{rows.format.wraps_after / 1e9:g} s later each time"
    )
    return time_ns + np.cumsum(laps) * rows.format.wraps_after


def _disorder(time_ns: Ints, lines: NDArray[np.int32]) -> list[str]:
    if (time_ns[1:] >= time_ns[:-1]).all():
        return []
    early = np.maximum.accumulate(time_ns) - time_ns
    late = np.count_nonzero(early)
    reset = len(time_ns) > 2 and early.max() > (time_ns.max() - time_ns.min()) / 2
    hint = "; if the clock was set back there, two stretches overlap now" if reset else ""
    return [
        f"{late} rows were not in time order: sorted (line {lines[early.argmax()]} goes back "
        f"furthest, {early.max() / 1e9:g} s{hint})"
    ]


def _think_time(rows: Rows, kept: Kept, trace: Trace) -> NDArray[np.float64] | None:
    """Seconds from the completion of what a turn waits for: as the file says or its times imply."""
    if trace.session_id is None or not trace.has_times:
        return None
    previous = trace.previous_turn
    turn = np.flatnonzero(previous >= 0)
    think = np.full(len(trace), np.nan)
    if rows.think_ns is not None:
        waits = np.concatenate([turn, [first for first, *_ in trace.parent_turns]]).astype(int)
        given = rows.think_ns[kept][waits]
        think[waits] = np.where(given >= 0, given / 1e9, np.nan)
    elif rows.elapsed_ns is not None:
        before = previous[turn]
        elapsed = rows.elapsed_ns[kept][before]
        waited = trace.arrival_time[turn] - trace.arrival_time[before] - elapsed / 1e9
        think[turn] = np.where(elapsed >= 0, np.maximum(waited, 0), np.nan)
    else:
        return None
    if rows.elapsed_ns is not None:
        _count_from_parent_turns(think, trace, rows.elapsed_ns[kept] / 1e9)
    return think


def _count_from_parent_turns(
    think: NDArray[np.float64], trace: Trace, elapsed: NDArray[np.float64]
) -> None:
    """A file counts from the turn before, also where sessions that worked for it ended later."""
    ended = np.where(elapsed >= 0, trace.arrival_time + elapsed, np.nan)
    for first, last, started_by, after in trace.parent_turns:
        if not np.isnan(ended[started_by]):
            think[first] = max(trace.arrival_time[first] - ended[started_by], 0)
        if after >= 0 and not np.isnan(ended[last]):
            since = max(trace.arrival_time[after] - ended[last], 0)
            think[after] = np.fmin(think[after], since)
