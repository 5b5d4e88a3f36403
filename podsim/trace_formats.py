"""The file formats of request traces: `FORMATS`, and how the texts of their fields are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 10**9
MAX_NANOSECONDS = 2**63 - 1

Clock = Callable[[Sequence[str]], NDArray[np.int64]]


class BadValue(Exception):
    """The first wrong text of a column: its row, and what is wrong with it."""

    def __init__(self, row: int, text: str, expected: str) -> None:
        super().__init__(
            row, f"is {shown(text) if text.strip() else 'missing'}, expected {expected}"
        )


def shown(text: str, limit: int = 40) -> str:
    """A text of a file as a message quotes it, on one line and not too long."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


# ---- columns of text into columns of integers

_COUNT = re.compile(r"\s*[0-9]{1,18}(?:\.0*)?\s*")
_NUMBER = re.compile(r"\s*[0-9]{1,20}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,2})?\s*")
_DATE = re.compile(
    r"\s*((?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?)"
    r"(?:Z|([+-])([0-9]{2}):?([0-9]{2}))?\s*"
)
_HASH_IDS = re.compile(r"\[(?:[0-9]{1,18}(?:, [0-9]{1,18})*)?\]")


def _check(pattern: re.Pattern[str], texts: Sequence[str], expected: str) -> None:
    if not all(map(pattern.fullmatch, texts)):
        row = next(i for i, text in enumerate(texts) if not pattern.fullmatch(text))
        raise BadValue(row, texts[row], expected)


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


def _number_clock(unit: str, digits: int, texts: Sequence[str]) -> NDArray[np.int64]:
    """Counts of 10**digits nanoseconds, taken as decimals: a float would round a large origin."""
    _check(_NUMBER, texts, f"a time in {unit}")
    times = [round(Decimal(text).scaleb(digits)) for text in texts]
    if max(times) > MAX_NANOSECONDS:
        row = next(i for i, time in enumerate(times) if time > MAX_NANOSECONDS)
        raise BadValue(row, texts[row], f"a time in {unit}, below 292 years")
    return np.array(times, dtype=np.int64)


def _date_clock(texts: Sequence[str]) -> NDArray[np.int64]:
    """Dates and times to the nanosecond; a time without an offset is taken as UTC."""
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


def parse_hash_ids(
    block_size: int, texts: Sequence[str], tokens: NDArray[np.int64] | None
) -> list[NDArray[np.int64]]:
    """The block numbers of each row; one for every started block of its `tokens`, where known."""
    _check(_HASH_IDS, texts, "a list of block numbers")
    columns = []
    for row, text in enumerate(texts):
        ids = np.array(json.loads(text), dtype=np.int64)
        if tokens is not None and len(ids) != -(-tokens[row] // block_size):
            count = f"{-(-tokens[row] // block_size)} block numbers"
            expected = f"{count} ({tokens[row]} tokens in blocks of {block_size}), not {len(ids)}"
            raise BadValue(row, text, expected)
        columns.append(ids)
    return columns


# ---- the formats

_seconds: Clock = partial(_number_clock, "seconds", 9)
_milliseconds: Clock = partial(_number_clock, "milliseconds", 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Which fields hold what. A file is recognised by its field names, never by magnitudes."""

    name: str
    kind: Literal["csv", "jsonl"]
    time: str | None
    """None: the file holds lengths only."""
    clock: Clock = _seconds
    """Makes nanoseconds, from any origin, of the texts of the time field."""
    prompt: str
    output: str
    hash_ids: str | None = None
    """May be absent: numbers of the prompt's blocks, each implying all before it."""
    hash_block_size: int = 0
    marks: Mapping[str, str] = field(default_factory=dict)
    """Further fields that tell the format, and the text each holds ("": any)."""

    @property
    def required(self) -> list[str]:
        """The fields that are read, as the format spells them."""
        return [*([self.time] if self.time else []), self.prompt, self.output]

    def missing(self, first: Mapping[str, str]) -> list[str]:
        """The fields that the first row of a file, by name in lower case, should have as well."""
        return [n for n in [*self.required, *self.marks] if n.casefold() not in first]

    def fits(self, first: Mapping[str, str]) -> bool:
        """Whether the file of that first row has this format."""
        return not self.missing(first) and all(
            first[name.casefold()] == text for name, text in self.marks.items() if text
        )


FORMATS = (  # the first that fits is taken, so the more demanding of two comes first
    Format(
        name="podsim",
        kind="csv",
        time="arrival_time",
        prompt="num_prompt_tokens",
        output="num_output_tokens",
    ),
    Format(
        name="Azure lengths",
        kind="csv",
        time=None,
        prompt="ContextTokens",
        output="GeneratedTokens",
        marks={"TIMESTAMP": "XXX"},
    ),
    Format(
        name="Azure LLM inference",
        kind="csv",
        time="TIMESTAMP",
        clock=_date_clock,
        prompt="ContextTokens",
        output="GeneratedTokens",
    ),
    Format(
        name="Vidur",
        kind="csv",
        time="arrived_at",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
    Format(
        name="Vidur lengths",
        kind="csv",
        time=None,
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
    Format(  # the field names of Mooncake, in other units
        name="qwen-bailian",
        kind="jsonl",
        time="timestamp",
        prompt="input_length",
        output="output_length",
        hash_ids="hash_ids",
        hash_block_size=16,
        marks={"chat_id": ""},
    ),
    Format(
        name="Mooncake",
        kind="jsonl",
        time="timestamp",
        clock=_milliseconds,
        prompt="input_length",
        output="output_length",
        hash_ids="hash_ids",
        hash_block_size=512,
    ),
)
