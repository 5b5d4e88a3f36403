"""Reads the fields of trace files: columns of texts in, checked columns of integers out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 10**9
MAX_NANOSECONDS = 2**62 - 1  # half of what an int64 holds, so that a sum of two still fits
MISSING = -1  # a time, a session or a duration that the file leaves empty

Clock = Callable[[Sequence[str]], NDArray[np.int64]]
CountTokens = Callable[[str], int]


class BadValue(Exception):
    """The first wrong text of a column: its row, and what is wrong with it."""

    def __init__(self, row: int, text: str, expected: str) -> None:
        super().__init__(
            row, f"is {shown(text) if text.strip() else 'missing'}, expected {expected}"
        )


def shown(text: str, limit: int = 40) -> str:
    """A text of a file as a message quotes it, on one line and not too long."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


# ASCII: float() takes off no other space.
_COUNT = re.compile(r"\s*[0-9]{1,18}(?:\.0*)?\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[0-9]{1,20}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,2})?\s*", re.ASCII)
_DATE = re.compile(
    r"\s*((?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?)"
    r"(?:Z|([+-])([0-9]{2}):?([0-9]{2}))?\s*"
)


def _check(pattern: re.Pattern[str], texts: Sequence[str], expected: str) -> None:
    if not all(map(pattern.fullmatch, texts)):
        row = next(i for i, text in enumerate(texts) if not pattern.fullmatch(text))
        raise BadValue(row, texts[row], expected)


# ---- tokens


def parse_token_counts(least: int, texts: Sequence[str]) -> NDArray[np.int64]:
    """Whole numbers of tokens from `least` on."""
    _check(_COUNT, texts, "a whole number of tokens")
    counts = np.array(list(map(float, texts)))
    bad = (counts < least) | (counts >= MAX_TOKENS)
    if bad.any():
        row = int(bad.argmax())
        if counts[row] < least:
            hint = f"at least {least} (--zero-length drop leaves out such rows)"
            raise BadValue(row, texts[row], hint)
        raise BadValue(row, texts[row], f"fewer than {MAX_TOKENS} tokens")
    return counts.astype(np.int64)


def count_tokens_of_texts(
    count: CountTokens, least: int, texts: Sequence[str]
) -> NDArray[np.int64]:
    """Tokens of each text, as the caller's `count` says."""
    counts = [str(count(text)) if text else "0" for text in texts]
    try:
        return parse_token_counts(least, counts)
    except BadValue as bad:
        raise BadValue(bad.args[0], texts[bad.args[0]] or "0", "a text with tokens") from None


# ---- times


def _number_clock(unit: str, digits: int, texts: Sequence[str]) -> NDArray[np.int64]:
    """Counts of 10**digits nanoseconds, taken as decimals: a float would round a large origin."""
    _check(_NUMBER, texts, f"a time in {unit}")
    times = [round(Decimal(text).scaleb(digits)) for text in texts]
    if max(times) > MAX_NANOSECONDS:
        row = next(i for i, time in enumerate(times) if time > MAX_NANOSECONDS)
        raise BadValue(row, texts[row], f"a time in {unit}, below 146 years")
    return np.array(times, dtype=np.int64)


def dates(texts: Sequence[str]) -> NDArray[np.int64]:
    """Nanoseconds of dates and times; one without an offset is taken as UTC."""
    expected = "a date and time such as 2023-11-16 18:17:03.9799600"
    _check(_DATE, texts, expected)
    parts = [match.groups() for match in map(_DATE.fullmatch, texts) if match]
    try:
        local = np.array([date for date, *_ in parts], dtype="datetime64[ns]").astype(np.int64)
    except ValueError:  # it looks like a date, but there is no such day or hour
        row = next(i for i, (date, *_) in enumerate(parts) if not _is_date(date))
        raise BadValue(row, texts[row], expected) from None
    minutes = [
        0 if sign is None else int(sign + "1") * (60 * int(h) + int(m)) for _, sign, h, m in parts
    ]
    return local - np.array(minutes, dtype=np.int64) * 60_000_000_000


def _is_date(text: str) -> bool:
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True


seconds: Clock = partial(_number_clock, "seconds", 9)
milliseconds: Clock = partial(_number_clock, "milliseconds", 6)
microseconds: Clock = partial(_number_clock, "microseconds", 3)
nanoseconds: Clock = partial(_number_clock, "nanoseconds", 0)


def where_given(clock: Clock, texts: Sequence[str]) -> NDArray[np.int64]:
    """What `clock` makes of the texts, MISSING of the empty ones."""
    given = [i for i, text in enumerate(texts) if text.strip()]
    times = np.full(len(texts), MISSING, dtype=np.int64)
    if given:
        try:
            times[given] = clock([texts[i] for i in given])
        except BadValue as bad:  # its row counts the given texts only
            bad.args = (given[bad.args[0]], bad.args[1])
            raise
    return times


# ---- sessions


class SessionNumbers:
    """Numbers the sessions of a file from 0, in order of appearance; no name: MISSING."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": MISSING, "-1": MISSING}
        self._next = itertools.count()

    def of_names(self, names: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._number(name) for name in names], dtype=np.int64)

    def of_turns(self, turns: Sequence[str], parents: Sequence[str]) -> NDArray[np.int64]:
        """For turns that name their parent turn instead of a session; "-1" is no parent."""
        sessions = []
        for turn, parent in zip(turns, parents, strict=True):
            # The parent may lie before the start of the trace: its children share a session still.
            session = self._number(turn if parent in ("-1", "") else parent)
            self._numbers[turn] = session
            sessions.append(session)
        return np.array(sessions, dtype=np.int64)

    def _number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = next(self._next)
        return number


# ---- blocks


def parse_hash_ids(
    values: Sequence[object], tokens: NDArray[np.int64] | None, block_size: int, rounding: str
) -> list[NDArray[np.int64]]:
    """The block numbers of each row; an empty list where the row has none.

    One for each block of the row's `tokens`, where known: of started blocks if `rounding` is "up",
    of full ones if "down", and so many at most if it is "any"; "cut" leaves out those beyond.
    """
    columns = []
    for row, value in enumerate(values):
        ids = _block_numbers(value)
        if ids is None or (len(ids) and ids.min() < 0):
            raise BadValue(row, str(value), "a list of block numbers")
        if tokens is not None and value not in (None, ""):
            started = -(-int(tokens[row]) // block_size)
            blocks = int(tokens[row]) // block_size if rounding == "down" else started
            if rounding == "cut":
                ids = ids[:started]
            elif len(ids) > blocks or (len(ids) < blocks and rounding != "any"):
                expected = (
                    f"{blocks} block numbers ({tokens[row]} tokens in blocks of {block_size}; "
                    f"--block-size sets another), not {len(ids)}"
                )
                raise BadValue(row, str(value), expected)
        columns.append(ids)
    return columns


def _block_numbers(value: object) -> NDArray[np.int64] | None:
    """A list of JSON, or numbers with spaces between of a CSV field; None if neither."""
    if isinstance(value, str):
        if value.strip() and not re.fullmatch(r"\s*[0-9]{1,18}(?: [0-9]{1,18})*\s*", value):
            return None
        return np.array(value.split(), dtype=np.int64)
    if value is None or value == []:
        return np.empty(0, dtype=np.int64)
    if not isinstance(value, list):
        return None
    try:
        ids = np.array(value)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return ids if ids.dtype == np.int64 and ids.ndim == 1 else None
