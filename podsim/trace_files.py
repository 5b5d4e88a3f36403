"""Reading trace files: which format a file has, and its rows as checked columns."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from podsim.errors import InputError
from podsim.trace_fields import shown
from podsim.trace_formats import FORMATS, Format, format_named
from podsim.trace_records import BadRecord, Record
from podsim.trace_rows import ReadOptions, Row, Rows, Table, rows_of


def read_file(path: Path, options: ReadOptions) -> Rows:
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
            return rows_of(_table(path, text, options), options, sha256, _teller(file, options))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}") from error
    except RecursionError:
        raise InputError(f"{path}: cannot be read: is nested too deeply") from None


def _teller(file: BinaryIO, options: ReadOptions) -> Callable[[], None]:
    """Tells `options.on_bytes` how far the file has been read since it was told last."""
    told = 0

    def tell() -> None:
        nonlocal told
        if options.on_bytes is not None:
            read, told = file.tell() - told, file.tell()
            options.on_bytes(read)

    return tell


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, compressed or not."""
    try:
        return path.is_file() and tarfile.is_tarfile(path)
    except (OSError, EOFError, zlib.error):
        return False


# ---- recognition


def _table(path: Path, lines: Iterator[str], options: ReadOptions) -> Table:
    comments: list[str] = []
    head = next(lines, "")
    while head.startswith("#"):  # podsim's own files say how they were made
        comments.append(head[1:].strip())
        head = next(lines, "")
    start = len(comments) + 1
    if not head.strip():
        raise InputError(
            f"{path}:{start}: is empty, expected the header or first record of a trace"
        )
    if head.startswith("version https://git-lfs"):
        raise InputError(
            f"{path}:1: is a git-lfs pointer, not the data: fetch it with git lfs pull"
        )
    if "\0" in head or "\ufffd" in head:
        raise InputError(f"{path}:{start}: is {shown(head)}, expected text: CSV or JSON lines")
    if head.lstrip().startswith("{"):
        return _jsonl_table(path, chain([head], lines), options)
    return _csv_table(path, chain([head], lines), options, comments)


def _recognise(
    place: str, kind: str, names: Sequence[str], texts: Sequence[str], options: ReadOptions
) -> Format:
    first = {name.casefold(): text for name, text in zip(names, texts, strict=True)}
    if options.format is not None:
        return _forced(place, format_named(options.format), kind, first)
    formats = [fmt for fmt in FORMATS if fmt.kind == kind]
    for fmt in formats:
        if fmt.fits(first):
            return fmt
    nearest = min(formats, key=lambda fmt: (len(fmt.missing(first)), len(fmt.marks)))
    if len(nearest.missing(first)) == 1 and len(nearest.telling) > 1:
        raise InputError(_lacks(place, nearest, first))
    known = "; ".join(f"{fmt.name}: {', '.join(fmt.telling)}" for fmt in formats)
    found = shown(", ".join(names), 100)
    raise InputError(f"{place}: the fields are {found}, expected those of a known format ({known})")


def _forced(place: str, fmt: Format, kind: str, first: Mapping[str, str]) -> Format:
    if fmt.kind != kind:
        words = {"csv": "CSV", "jsonl": "JSON lines", "clients": "a folder or archive of clients"}
        raise InputError(f"{place}: is {words[kind]}, but {fmt.name} is {words[fmt.kind]}")
    # Only the fields: the marks tell a format from another, and the user has done that.
    if not fmt.nested and any(name.casefold() not in first for name in fmt.required):
        raise InputError(_lacks(place, fmt, first))
    return fmt


def _lacks(place: str, fmt: Format, first: Mapping[str, str]) -> str:
    missing = fmt.missing(first)[0]
    return (
        f"{place}: {missing} is missing, expected a field of that name "
        f"({fmt.name} needs {', '.join(fmt.telling)})"
    )


def _unused(fmt: Format, names: Iterable[str]) -> list[str]:
    used = {name.casefold() for name in [*fmt.required, *fmt.marks, *fmt.optional]}
    unused = [name for name in names if name.casefold() not in used]
    return [f"columns not used: {', '.join(unused)}"] if unused else []


# ---- CSV


def _csv_table(
    path: Path, lines: Iterable[str], options: ReadOptions, comments: list[str]
) -> Table:
    start = len(comments) + 1
    records = _csv_records(path, lines, start)
    _, header = next(records, (1, [""]))  # none: the file is a pair of quotes
    names = [name.strip() for name in header]
    first = list(islice(records, 1))
    texts = first[0][1] if first else [""] * len(names)
    fmt = _recognise(f"{path}:{start}", "csv", names, texts, options)
    folded = [name.casefold() for name in names]
    wanted = [*fmt.required, *(name for name in fmt.optional if name.casefold() in folded)]
    for name in wanted:
        if folded.count(name.casefold()) > 1:
            raise InputError(f"{path}:{start}: {name} is there twice, expected one such column")
    pick = itemgetter(*(folded.index(name.casefold()) for name in wanted))
    return Table(
        path=path,
        format=fmt,
        names=wanted,
        rows=((line, pick(record)) for line, record in chain(first, records)),
        block_size=_block_size(path, fmt, options, comments),
        notes=[*_unused(fmt, names), *(MADE_WITH + text for text in comments if text)],
        starts_at=start,
    )


MADE_WITH = "made with: "  # a note of a comment of podsim's own format
HASH_BLOCK_SIZE = "hash_block_size "  # the comment that goes with a hash_ids column


def _block_size(path: Path, fmt: Format, options: ReadOptions, comments: list[str]) -> int:
    if options.block_size is not None or fmt.hash_block_size:
        return options.block_size or fmt.hash_block_size
    for number, comment in enumerate(comments, 1):
        if comment.startswith(HASH_BLOCK_SIZE):
            text = comment.removeprefix(HASH_BLOCK_SIZE)
            if not (text.isascii() and text.isdigit() and 0 < int(text[:10]) < 10**9):
                raise InputError(
                    f"{path}:{number}: hash_block_size is {shown(text)}, expected tokens"
                )
            comments.remove(comment)
            return int(text[:10])
    return 16  # what engines use


def _csv_records(
    path: Path, lines: Iterable[str], first_line: int
) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    start = first_line
    width = 0
    try:
        for record in reader:
            line, start = start, reader.line_num + first_line
            if not record or (len(record) == 1 and not record[0].strip()):
                continue
            width = width or len(record)
            if len(record) != width:
                raise InputError(f"{path}:{line}: has {len(record)} fields, expected {width}")
            yield line, record
    except csv.Error as error:
        raise InputError(f"{path}:{start}: is not CSV: {error}") from None


# ---- JSON


def _jsonl_table(path: Path, lines: Iterable[str], options: ReadOptions) -> Table:
    records = _json_records(path, lines)
    line, first = next(records)
    texts = [_text(value) for value in first.values()]
    fmt = _recognise(f"{path}:1", "jsonl", list(first), texts, options)
    names = [*fmt.required, *fmt.optional]
    return Table(
        path=path,
        format=fmt,
        names=names,
        rows=_json_rows(path, fmt, names, chain([(line, first)], records)),
        block_size=options.block_size or fmt.hash_block_size,
        notes=[] if fmt.nested else _unused(fmt, first),
        own_blocks=fmt.document and first.get("hash_id_scope") != "global",
    )


def _json_rows(
    path: Path, fmt: Format, names: list[str], records: Iterator[tuple[int, Record]]
) -> Iterator[Row]:
    texts = [(name, name != fmt.hash_ids) for name in names]
    number = 0
    for nth, (line, record) in enumerate(records):
        if fmt.document and nth:
            raise InputError(f"{path}:{line}: is a second session, expected one in a file")
        try:
            for request in fmt.expand(record) if fmt.expand else (record,):
                number += 1
                yield (
                    number if fmt.document else line,
                    tuple(
                        _text(request.get(name)) if as_text else request.get(name)
                        for name, as_text in texts
                    ),
                )
        except BadRecord as bad:
            raise InputError(f"{path}:{line}: {bad}") from None


def _json_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    decode = json.JSONDecoder(parse_float=str, parse_constant=str).decode  # as they were written
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if line == 1 and text.strip() == "{":  # one record, spread over the lines of the file
            text = "".join([text, *lines])
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
