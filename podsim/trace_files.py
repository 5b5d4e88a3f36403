"""Reading trace files: which format a file has, and its rows as checked columns."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_formats import (
    FORMATS,
    BadValue,
    Format,
    parse_hash_ids,
    parse_token_counts,
    shown,
)

BLOCK_ROWS = 65_536  # rows held as text at a time

Row = tuple[int, tuple[str, ...]]  # the line it starts on, the texts of the fields that are read


def _recognise(path: Path, kind: str, names: Sequence[str], texts: Sequence[str]) -> Format:
    first = {name.casefold(): text for name, text in zip(names, texts, strict=True)}
    formats = [fmt for fmt in FORMATS if fmt.kind == kind]
    for fmt in formats:
        if fmt.fits(first):
            return fmt
    nearest = min(formats, key=lambda fmt: (len(fmt.missing(first)), len(fmt.marks)))
    missing = nearest.missing(first)
    if len(missing) == 1:
        needed = f"{nearest.name} needs {', '.join(nearest.required)}"
        raise InputError(
            f"{path}:1: {missing[0]} is missing, expected a field of that name ({needed})"
        )
    known = "; ".join(f"{fmt.name}: {', '.join([*fmt.required, *fmt.marks])}" for fmt in formats)
    found = shown(", ".join(names), 100)
    raise InputError(
        f"{path}:1: the fields are {found}, expected those of a known format ({known})"
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a trace file, in file order, every text of them checked."""

    format: Format
    lines: NDArray[np.int64]
    """The line of the file each row starts on, from 1."""
    time_ns: NDArray[np.int64] | None
    num_prompt_tokens: NDArray[np.int64]
    num_output_tokens: NDArray[np.int64]
    hash_ids: list[NDArray[np.int64]] | None
    ignored: list[str]
    """Fields of the file that are not read."""
    sha256: str


def read_rows(path: Path, *, allow_zero: bool) -> Rows:
    """Read a trace file, plain or gzipped; the first wrong line of it raises InputError."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file) if zipped else file
            # Bytes that are not UTF-8 become "\ufffd", which no number contains.
            text = io.TextIOWrapper(data, "utf-8-sig", errors="replace", newline="")
            return _read_text(path, text, sha256, allow_zero)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}") from error


def _read_text(path: Path, text: Iterable[str], sha256: str, allow_zero: bool) -> Rows:
    lines = iter(text)
    head = next(lines, "")
    if not head.strip():
        raise InputError(f"{path}:1: is empty, expected the header or first record of a trace")
    if head.startswith("version https://git-lfs"):
        raise InputError(
            f"{path}:1: is a git-lfs pointer, not the data: fetch it with git lfs pull"
        )
    if "\0" in head or "\ufffd" in head:
        raise InputError(f"{path}:1: is {shown(head)}, expected text: CSV or JSON lines")
    open_table = _jsonl_table if head.lstrip().startswith("{") else _csv_table
    table = open_table(path, chain([head], lines))
    blocks = [_parse(path, table, block, allow_zero) for block in _blocks(table.rows)]
    if not blocks:
        raise InputError(f"{path}:2: is missing, expected a row after the header")
    fmt = table.format
    column = {
        name: np.concatenate([numbers[name] for _, numbers, _ in blocks]) for name in fmt.required
    }
    return Rows(
        format=fmt,
        lines=np.concatenate([numbered for numbered, _, _ in blocks]),
        time_ns=column[fmt.time] if fmt.time else None,
        num_prompt_tokens=column[fmt.prompt],
        num_output_tokens=column[fmt.output],
        hash_ids=[ids for _, _, hashes in blocks for ids in hashes]
        if fmt.hash_ids in table.names
        else None,
        ignored=table.ignored,
        sha256=sha256,
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """A file that was recognised: the fields that are read, and their texts row by row."""

    format: Format
    names: list[str]
    ignored: list[str]
    rows: Iterator[Row]


def _csv_table(path: Path, lines: Iterable[str]) -> _Table:
    records = _csv_records(path, lines)
    _, header = next(records, (1, [""]))  # none: the file is a pair of quotes
    names = [name.strip() for name in header]
    first = list(islice(records, 1))
    fmt = _recognise(path, "csv", names, first[0][1] if first else [""] * len(names))
    folded = [name.casefold() for name in names]
    for name in fmt.required:
        if folded.count(name.casefold()) > 1:
            raise InputError(f"{path}:1: {name} is there twice, expected one such column")
    pick = itemgetter(*(folded.index(name.casefold()) for name in fmt.required))
    rows = ((line, pick(record)) for line, record in chain(first, records))
    return _Table(fmt, fmt.required, _ignored(fmt, names), rows)


def _csv_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    start = 1
    width = 0
    try:
        for record in reader:
            line, start = start, reader.line_num + 1
            if not record or (len(record) == 1 and not record[0].strip()):
                continue
            width = width or len(record)
            if len(record) != width:
                raise InputError(f"{path}:{line}: has {len(record)} fields, expected {width}")
            yield line, record
    except csv.Error as error:
        raise InputError(f"{path}:{start}: is not CSV: {error}") from None


def _jsonl_table(path: Path, lines: Iterable[str]) -> _Table:
    records = _json_records(path, lines)
    line, first = next(records)
    fmt = _recognise(path, "jsonl", list(first), [_text(value) for value in first.values()])
    names = [*fmt.required, *([fmt.hash_ids] if fmt.hash_ids in first else [])]
    rows = (
        (line, tuple(_text(record.get(name)) for name in names))
        for line, record in chain([(line, first)], records)
    )
    return _Table(fmt, names, _ignored(fmt, first), rows)


def _json_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    decode = json.JSONDecoder(parse_float=str, parse_constant=str).decode  # as they were written
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            record = decode(text)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{line}: is {shown(text.strip())}, expected a JSON object")
        yield line, record


def _text(value: object) -> str:
    """A JSON value as a CSV file would hold it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _ignored(fmt: Format, names: Iterable[str]) -> list[str]:
    used = {name.casefold() for name in [*fmt.required, *fmt.marks, fmt.hash_ids or ""]}
    return [name for name in names if name.casefold() not in used]


def _blocks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows by the thousand; those before a row that cannot be read come before its error."""
    block: list[Row] = []
    try:
        for row in rows:
            block.append(row)
            if len(block) == BLOCK_ROWS:
                yield block
                block = []
    except InputError:
        if block:
            yield block
        raise
    if block:
        yield block


def _parse(
    path: Path, table: _Table, block: list[Row], allow_zero: bool
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]], list[NDArray[np.int64]]]:
    """The lines, the columns of numbers and the hash_ids of a block."""
    fmt = table.format
    texts = dict(zip(table.names, zip(*[row for _, row in block], strict=True), strict=True))
    token_counts = partial(parse_token_counts, 0 if allow_zero else 1)
    numbers: dict[str, NDArray[np.int64]] = {}
    hashes: list[NDArray[np.int64]] = []
    problems: list[tuple[int, str]] = []
    for name in table.names:
        try:
            if name == fmt.hash_ids:
                hashes = parse_hash_ids(fmt.hash_block_size, texts[name], numbers.get(fmt.prompt))
            else:
                read = fmt.clock if name == fmt.time else token_counts
                numbers[name] = read(texts[name])
        except BadValue as bad:
            row, problem = bad.args
            problems.append((row, f"{name} {problem}"))
    if problems:
        row, problem = min(problems, key=itemgetter(0))
        raise InputError(f"{path}:{block[row][0]}: {problem}")
    return np.array([line for line, _ in block], dtype=np.int64), numbers, hashes
