"""Rows of a trace: `Rows`, columns of integers made of the texts of a recognised file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_fields import (
    BadValue,
    CountTokens,
    SessionNumbers,
    count_tokens_of_texts,
    parse_hash_ids,
    parse_token_counts,
    seconds,
    shown,
    where_given,
)
from podsim.trace_formats import Format

BLOCK_ROWS = {"csv": 65_536, "jsonl": 4096}  # rows held as text at a time; JSON may hold long lists

Ints = NDArray[np.int64]
Row = tuple[int, tuple[object, ...]]  # the line it starts on, the fields that are read
ReadColumn = Callable[[Sequence[str]], Ints]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read a trace file; every option has a default."""

    format: str | None = None
    """The name of a format; None: recognise it."""
    zero_length: str = "error"
    """Rows without a prompt or an output token: "error", or "drop" (counted)."""
    block_size: int | None = None
    """Tokens of a block of hash_ids, where it is not the format's own."""
    count_tokens: CountTokens | None = None
    """Counts the tokens of a text, for formats that hold texts."""
    seed: int = 0
    """Of the requests drawn from client statistics (servegen)."""
    client_window: tuple[float, float] = (0.0, math.inf)
    """Seconds of the client statistics to draw requests from."""
    on_bytes: Callable[[int], None] | None = None
    """Told, now and then, how many more bytes of the files have been read."""

    def __post_init__(self) -> None:
        if self.zero_length not in ("error", "drop"):
            raise InputError(f"zero length is {self.zero_length!r}, expected 'error' or 'drop'")
        if self.block_size is not None and self.block_size < 1:
            raise InputError(f"block size is {self.block_size}, expected at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}, expected 0 or more")
        first, last = self.client_window
        if not 0 <= first < last:
            raise InputError(f"client window is {first:g}:{last:g}, expected FROM below TO")

    @property
    def least_tokens(self) -> int:
        return 0 if self.zero_length == "drop" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a trace, in file order, every text of them checked."""

    format: Format
    lines: NDArray[np.int32]
    """The line of the file each row starts on, from 1."""
    time_ns: Ints | None
    """From any origin; MISSING where a turn follows its predecessor after think_ns."""
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    hash_ids: list[Ints] | None = None
    hash_block_size: int = 0
    session: Ints | None = None
    """Numbers from 0; MISSING for a request without a session. Also of the next four."""
    parent_session: Ints | None = None
    priority: Ints | None = None
    think_ns: Ints | None = None
    elapsed_ns: Ints | None = None
    notes: Sequence[str] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Requests of the source that are not among these rows."""
    own_blocks: bool = False
    """Whether equal block numbers of another file are other blocks."""
    sha256: str = ""

    @property
    def rows_read(self) -> int:
        return len(self.lines) + sum(self.dropped.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file that was recognised: the fields that are read, row by row."""

    path: Path
    format: Format
    names: list[str]
    rows: Iterator[Row]
    block_size: int
    notes: list[str]
    starts_at: int = 1
    """The line of its header."""
    own_blocks: bool = False

    def place(self, line: int) -> str:
        return f"{self.path}: request {line}" if self.format.document else f"{self.path}:{line}"


def rows_of(table: Table, options: ReadOptions, sha256: str, on_block: Callable[[], None]) -> Rows:
    """Read all rows of a table, calling `on_block` from time to time.

    The first wrong line raises InputError.
    """
    fmt = table.format
    if fmt.texts and options.count_tokens is None:
        raise InputError(
            f"{table.path}: {fmt.name} holds texts, count their tokens with --chars-per-token 4 "
            "or --tokenizer MODULE:FUNCTION"
        )
    columns = Columns(fmt, options, table.block_size)
    blocks = []
    for block in _blocks(table.rows, fmt.kind):
        blocks.append(_parse(table, columns, block))
        on_block()
    if not blocks:
        raise InputError(
            f"{table.path}:{table.starts_at + 1}: is missing, expected a row after the header"
        )
    hash_ids = [ids for _, _, part in blocks for ids in part]
    column: dict[str, Ints] = {}
    for name in list(blocks[0][1]):
        column[name] = np.concatenate([numbers.pop(name) for _, numbers, _ in blocks])
    return Rows(
        format=fmt,
        lines=np.concatenate([lines for lines, _, _ in blocks]),
        time_ns=column.get("time"),
        num_prompt_tokens=column["prompt"],
        num_output_tokens=column["output"],
        hash_ids=hash_ids if any(map(len, hash_ids)) else None,
        hash_block_size=table.block_size,
        session=_unless_all_missing(column.get("session")),
        parent_session=_unless_all_missing(column.get("parent_session")),
        priority=_unless_all_missing(column.get("priority")),
        think_ns=_unless_all_missing(column.get("think")),
        elapsed_ns=_unless_all_missing(column.get("elapsed")),
        notes=[*table.notes, *fmt.notes],
        own_blocks=table.own_blocks,
        sha256=sha256,
    )


def _unless_all_missing(column: Ints | None) -> Ints | None:
    return column if column is not None and (column >= 0).any() else None


def _blocks(rows: Iterator[Row], kind: str) -> Iterator[list[Row]]:
    """Rows by the thousand; those before a row that cannot be read come before its error."""
    block: list[Row] = []
    try:
        for row in rows:
            block.append(row)
            if len(block) == BLOCK_ROWS[kind]:
                yield block
                block = []
    except InputError:
        if block:
            yield block
        raise
    if block:
        yield block


class Columns:
    """How the fields of a format become columns: one table, role by role."""

    def __init__(self, fmt: Format, options: ReadOptions, block_size: int) -> None:
        self.format = fmt
        self.block_size = block_size
        self.sessions = SessionNumbers()
        # A turn that waits for the one before it may have no time of its own.
        time = partial(where_given, fmt.clock) if fmt.think else fmt.clock
        count = partial(parse_token_counts, options.least_tokens)
        text = count
        if options.count_tokens is not None:
            text = partial(count_tokens_of_texts, options.count_tokens, options.least_tokens)
        readers: list[tuple[str, str | None, ReadColumn]] = [
            ("time", fmt.time, time),
            ("prompt", fmt.prompt, text if fmt.prompt in fmt.texts else count),
            ("output", fmt.output, text if fmt.output in fmt.texts else count),
            ("session", None if fmt.parent else fmt.session, self.sessions.of_names),
            ("parent_session", fmt.parent_session, self.sessions.of_names),
            ("think", fmt.think, partial(where_given, fmt.clock)),
            ("priority", fmt.priority, partial(where_given, partial(parse_token_counts, 0))),
            ("elapsed", fmt.elapsed, partial(where_given, seconds)),
        ]
        self.readers = [(role, name, read) for role, name, read in readers if name]


def _parse(
    table: Table, columns: Columns, block: list[Row]
) -> tuple[NDArray[np.int32], dict[str, Ints], list[Ints]]:
    """The lines, the columns of numbers by role, and the hash_ids of a block."""
    fmt = table.format
    fields = dict(zip(table.names, zip(*[row for _, row in block], strict=True), strict=True))
    numbers: dict[str, Ints] = {}
    hashes: list[Ints] = []
    problems: list[tuple[int, str]] = []
    for role, name, read in columns.readers:
        if name in fields:
            try:
                numbers[role] = read(fields[name])
            except BadValue as bad:
                problems.append((bad.args[0], f"{name} {bad.args[1]}"))
    if fmt.hash_ids in fields:
        try:
            hashes = parse_hash_ids(
                fields[fmt.hash_ids], numbers.get("prompt"), table.block_size, fmt.hash_rounding
            )
        except BadValue as bad:
            problems.append((bad.args[0], f"{fmt.hash_ids} {bad.args[1]}"))
    problems += _others(fmt, fields)
    if problems:
        row, problem = min(problems, key=itemgetter(0))
        raise InputError(f"{table.place(block[row][0])}: {problem}")
    if fmt.parent and fmt.session in fields and fmt.parent in fields:
        numbers["session"] = columns.sessions.of_turns(fields[fmt.session], fields[fmt.parent])
    return np.array([line for line, _ in block], dtype=np.int32), numbers, hashes


def _others(fmt: Format, fields: Mapping[str, Sequence[str]]) -> Iterator[tuple[int, str]]:
    """The first row of each field that does not hold what it must."""
    for name, expected in fmt.only.items():
        for row, text in enumerate(fields.get(name, ())):
            if text.strip() != expected:
                yield row, f"{name} is {shown(text)}, expected {expected}"
                break
