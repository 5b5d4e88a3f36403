"""Reading traces of many files: a folder of sessions, or statistics of clients."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from podsim.errors import InputError
from podsim.trace_clients import draw_requests, has_clients
from podsim.trace_files import is_archive, read_file
from podsim.trace_rows import Ints, ReadOptions, Rows

COPIES = "in a copy of another session's file"


def read_rows(path: Path, options: ReadOptions) -> Rows:
    """Read a trace: a file, a folder of session files, or a folder or archive of clients.

    Raises InputError: it cannot be read, has no known format, or has a wrong line.
    """
    if options.format == "servegen" or has_clients(path) or is_archive(path):
        if options.format not in (None, "servegen"):
            raise InputError(f"{path}: holds client statistics (servegen), not {options.format}")
        return draw_requests(path, options)
    if path.is_dir():
        return _read_sessions(path, options)
    rows = read_file(path, options)
    return _own_blocks(rows, 0) if rows.own_blocks else rows


def _read_sessions(folder: Path, options: ReadOptions) -> Rows:
    paths = sorted(path for path in folder.iterdir() if ".json" in path.suffixes)
    if not paths:
        raise InputError(f"{folder}: is a folder without session files (*.json) or client files")
    files: dict[bytes, Rows] = {}
    copies = 0
    digest = hashlib.sha256()
    next_block = 0
    for path in paths:
        rows = read_file(path, options)
        if not rows.format.document:
            raise InputError(
                f"{path}: is {rows.format.name}, but only session files are read by the folder"
            )
        digest.update(rows.sha256.encode())
        content = _content(rows)
        if content in files:
            copies += len(rows.lines)
            continue
        if files and rows.own_blocks != next(iter(files.values())).own_blocks:
            raise InputError(f"{path}: hash_id_scope differs from that of other files here")
        files[content] = rows = _own_blocks(rows, next_block) if rows.own_blocks else rows
        next_block = max(
            [next_block, *(int(ids.max()) + 1 for ids in rows.hash_ids or () if len(ids))]
        )
    return _joined(list(files.values()), copies, digest.hexdigest())


def _content(rows: Rows) -> bytes:
    """What makes two session files the same, whatever they are called."""
    digest = hashlib.blake2b()
    columns = (rows.time_ns, rows.num_prompt_tokens, rows.num_output_tokens, rows.think_ns)
    for column in (*columns, *(rows.hash_ids or ())):
        digest.update(b"|" if column is None else column.tobytes() + b"|")
    return digest.digest()


def _own_blocks(rows: Rows, first: int) -> Rows:
    """The blocks numbered anew from `first`: equal numbers of two files are not the same block."""
    if rows.hash_ids is None:
        return rows
    _, numbers = np.unique(np.concatenate(rows.hash_ids), return_inverse=True)
    ends = np.cumsum([len(ids) for ids in rows.hash_ids])
    return replace(rows, hash_ids=np.split(numbers.astype(np.int64) + first, ends[:-1]))


def _joined(files: list[Rows], copies: int, sha256: str) -> Rows:
    first = files[0]
    notes = list(dict.fromkeys(note for rows in files for note in rows.notes))
    if len(files) > 1:
        notes.append(
            f"the {len(files)} session files do not say when each session starts: all at 0 s "
            "(--session-qps spreads the starts)"
        )
    sessions, parents = _own_sessions(files)
    hashed = any(rows.hash_ids is not None for rows in files)
    return replace(
        first,
        lines=np.concatenate([rows.lines for rows in files]),
        time_ns=_stacked([rows.time_ns for rows in files], files),
        num_prompt_tokens=np.concatenate([rows.num_prompt_tokens for rows in files]),
        num_output_tokens=np.concatenate([rows.num_output_tokens for rows in files]),
        hash_ids=[ids for rows in files for ids in _ids(rows)] if hashed else None,
        session=_stacked(sessions, files),
        parent_session=_stacked(parents, files),
        think_ns=_stacked([rows.think_ns for rows in files], files),
        elapsed_ns=_stacked([rows.elapsed_ns for rows in files], files),
        notes=notes,
        dropped={COPIES: copies} if copies else {},
        sha256=sha256,
    )


def _ids(rows: Rows) -> list[Ints]:
    return rows.hash_ids or [np.empty(0, dtype=np.int64)] * len(rows.lines)


def _own_sessions(files: list[Rows]) -> tuple[list[Ints | None], list[Ints | None]]:
    """The sessions and parent sessions of each file, numbered on from those of the files before."""
    first = 0
    sessions, parents = [], []
    for rows in files:
        both = [_from(first, column) for column in (rows.session, rows.parent_session)]
        sessions.append(both[0])
        parents.append(both[1])
        first = max([first, *(int(column.max()) + 1 for column in both if column is not None)])
    return sessions, parents


def _from(first: int, numbers: Ints | None) -> Ints | None:
    return None if numbers is None else np.where(numbers >= 0, numbers + first, numbers)


def _stacked(columns: list[Ints | None], files: list[Rows]) -> Ints | None:
    if all(column is None for column in columns):
        return None
    return np.concatenate(
        [
            np.full(len(rows.lines), -1, dtype=np.int64) if column is None else column
            for column, rows in zip(columns, files, strict=True)
        ]
    )
