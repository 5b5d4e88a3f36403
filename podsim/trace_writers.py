"""Writing traces: `WRITERS`, the formats a trace can be written in."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_files import HASH_BLOCK_SIZE, MADE_WITH
from podsim.trace_prefix import regrouped, unshared
from podsim.workload_trace import Trace

Write = Callable[[Trace, Sequence[str]], Iterator[str]]

# ---- files


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name only when all is written; a pipe or a device is written as it is.

    InputError, before anything is written, if the folder is not there or not writable.
    """
    if path.is_dir():
        raise InputError(f"{path}: cannot be written: is a directory")
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as device:
                yield device
            return
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        number, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(number, "wb") as file:
            yield file
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        Path(scratch).unlink(missing_ok=True)


def write_trace(
    trace: Trace,
    file: IO[bytes],
    format: str = "podsim",
    *,
    made: Sequence[str] = (),
    zipped: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write a trace in a format of WRITERS, gzipped if `zipped`.

    made: lines on how the trace was made; podsim's own format keeps them as comments. on_progress
    is told how many lines are written, now and then.
    InputError: an unknown format, or a trace without times where the format needs them.
    """
    check_format(format)
    if format != "vidur":
        trace.require_times()
    lines = WRITERS[format](trace, made)
    if on_progress is not None:
        lines = _counted(lines, on_progress)
    if not zipped:
        file.writelines(line.encode() for line in lines)
        return
    with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as data:  # no date in it
        data.writelines(line.encode() for line in lines)


def _counted(lines: Iterator[str], on_progress: Callable[[int], None]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number % 1000 == 0:
            on_progress(number)
        yield line


def check_format(format: str) -> None:
    """InputError unless traces can be written in it."""
    if format not in WRITERS:
        raise InputError(f"output format is {format!r}, expected one of: {', '.join(WRITERS)}")


# ---- formats


def _podsim(trace: Trace, made: Sequence[str]) -> Iterator[str]:
    """Everything a trace holds; times to the nanosecond."""
    names = ["arrival_time", "num_prompt_tokens", "num_output_tokens"]
    columns: list[Iterator[str]] = [map(_seconds, _nanoseconds(trace.arrival_time))]
    columns += [map(str, c.tolist()) for c in (trace.num_prompt_tokens, trace.num_output_tokens)]
    before = [note.removeprefix(MADE_WITH) for note in trace.notes if note.startswith(MADE_WITH)]
    comments = [" ".join(line.split()) for line in [*before, *made]]
    if trace.session_id is not None:
        names.append("session_id")
        columns.append(map(_unless_negative, trace.session_id.tolist()))
    if trace.parent_session is not None:
        names.append("parent_session")
        columns.append(map(_unless_negative, trace.parent_session.tolist()))
    if trace.think_time is not None:
        names.append("think_time")
        known = np.nan_to_num(trace.think_time, nan=-1.0)
        columns.append("" if ns < 0 else _seconds(ns) for ns in _nanoseconds(known))
    if trace.priority is not None:
        names.append("priority")
        columns.append(map(str, trace.priority.tolist()))
    if trace.hash_ids is not None:
        comments.insert(0, f"{HASH_BLOCK_SIZE}{trace.hash_block_size}")
        names.append("hash_ids")
        columns.append(" ".join(map(str, ids.tolist())) for ids in trace.hash_ids)
    yield from (f"# {comment}\n" for comment in comments)
    yield ",".join(names) + "\n"
    for row in zip(*columns, strict=True):
        yield ",".join(row) + "\n"


def _vidur(trace: Trace, made: Sequence[str]) -> Iterator[str]:
    times = map(_seconds, _nanoseconds(trace.arrival_time)) if trace.has_times else None
    lengths = zip(trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist(), strict=True)
    yield ("arrived_at," if times else "") + "num_prefill_tokens,num_decode_tokens\n"
    for prompt, output in lengths:
        yield (f"{next(times)}," if times else "") + f"{prompt},{output}\n"


def _mooncake(trace: Trace, made: Sequence[str]) -> Iterator[str]:
    """Milliseconds, blocks of 512 if any are known; sessions in the fields that AIPerf reads."""
    return _json_lines(trace, regrouped(trace, 512))


def _vllm_timed(trace: Trace, made: Sequence[str]) -> Iterator[str]:
    """Milliseconds, blocks of 16: vLLM makes the prompts of them, so there always are some."""
    hash_ids = regrouped(trace, 16)
    return _json_lines(trace, unshared(trace, 16) if hash_ids is None else hash_ids)


def _json_lines(trace: Trace, hash_ids: tuple[NDArray[np.int64], ...] | None) -> Iterator[str]:
    times = np.rint(trace.arrival_time * 1000).astype(np.int64).tolist()
    lengths = zip(trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist(), strict=True)
    for i, (prompt, output) in enumerate(lengths):
        record: dict[str, object] = {
            "timestamp": times[i],
            "input_length": prompt,
            "output_length": output,
        }
        if hash_ids is not None:
            record["hash_ids"] = hash_ids[i].tolist()
        if trace.session_id is not None and trace.session_id[i] >= 0:
            record["session_id"] = str(trace.session_id[i])
        if trace.think_time is not None and trace.think_time[i] >= 0:
            record["delay"] = round(float(trace.think_time[i]) * 1000)
        yield json.dumps(record) + "\n"


WRITERS: dict[str, Write] = {
    "podsim": _podsim,
    "mooncake": _mooncake,
    "vidur": _vidur,
    "vllm-timed": _vllm_timed,
}


def not_kept(trace: Trace, format: str) -> list[str]:
    """What the format cannot hold of this trace."""
    columns: tuple[str, ...] = ("parent_session", "priority") if format != "podsim" else ()
    if format == "vidur":
        columns = ("hash_ids", "session_id", "think_time", *columns)
    lost = [name for name in columns if getattr(trace, name) is not None]
    if format in ("mooncake", "vllm-timed"):
        lost.append("times below a millisecond")
    return lost


def _nanoseconds(seconds: NDArray[np.float64]) -> list[int]:
    nanoseconds: list[int] = np.rint(seconds * 1e9).astype(np.int64).tolist()
    return nanoseconds


def _seconds(nanoseconds: int) -> str:
    """An exact decimal: a float would be written in as many digits as it takes."""
    whole, rest = divmod(nanoseconds, 10**9)
    return f"{whole}.{rest:09d}".rstrip("0") if rest else str(whole)


def _unless_negative(number: int) -> str:
    return "" if number < 0 else str(number)
