"""The table of trace formats: `FORMATS`. A new format is a row of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from podsim.errors import InputError
from podsim.trace_fields import Clock, dates, microseconds, milliseconds, nanoseconds, seconds
from podsim.trace_records import (
    Record,
    claude_code_requests,
    llmservingsim_requests,
    ragpulse_requests,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Which fields hold what. A file is recognised by its field names, never by magnitudes."""

    name: str
    kind: Literal["csv", "jsonl", "clients"]
    time: str | None
    """None: the file holds lengths only."""
    clock: Clock = seconds
    """Makes nanoseconds, from any origin, of the texts of the time field."""
    prompt: str
    output: str
    texts: frozenset[str] = frozenset()
    """Which of prompt and output are texts, for a tokenizer to count."""
    hash_ids: str | None = None
    """May be absent: numbers of the prompt's blocks, each implying all before it."""
    hash_block_size: int = 0
    hash_rounding: Literal["up", "down", "any", "cut"] = "up"
    """Whether a partial last block has a number; "any": not all blocks need one; "cut": the
    numbers are not of equal blocks, so there may be too many."""
    document: bool = False
    """Whether a file is one session, of which a folder holds many: block numbers are its own."""
    session: str | None = None
    """May be absent or empty: the session a request is a turn of."""
    parent: str | None = None
    """Given: `session` names the turn, and this its parent turn."""
    parent_session: str | None = None
    """May be absent or empty: the session that this one works for; see Trace.parent_session."""
    think: str | None = None
    """May be absent or empty: time from the completion of the turn before, on `clock`."""
    priority: str | None = None
    """May be absent or empty: a whole number, the lower the sooner a request is served."""
    elapsed: str | None = None
    """May be absent or empty: time from this request to its completion, as recorded: seconds."""
    wraps_after: int = 0
    """Nanoseconds after which the clock starts again from 0, if it does."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Fields that must hold this text in every row."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Further fields that tell the format, and the pattern of the first row's text."""
    nested: bool = False
    """Whether the requests lie inside the records: `marks` alone tell the format."""
    expand: Callable[[Record], Iterator[Record]] | None = None
    """Makes flat requests, with the fields above, of a record."""
    notes: tuple[str, ...] = ()
    """What a reader of results should know of any such trace."""

    @property
    def required(self) -> list[str]:
        """The fields every row has, as the format spells them."""
        return [*([self.time] if self.time else []), self.prompt, self.output]

    @property
    def optional(self) -> list[str]:
        """The fields that are read where they are there."""
        given = (
            *(self.hash_ids, self.session, self.parent, self.parent_session),
            *(self.think, self.elapsed, self.priority),
        )
        return [*(name for name in given if name), *self.only]

    @property
    def telling(self) -> list[str]:
        """The fields that tell the format."""
        return list(dict.fromkeys([*([] if self.nested else self.required), *self.marks]))

    def missing(self, first: Mapping[str, str]) -> list[str]:
        """The telling fields that the first row of a file, by name in lower case, lacks."""
        return [name for name in self.telling if name.casefold() not in first]

    def fits(self, first: Mapping[str, str]) -> bool:
        """Whether the file of that first row has this format."""
        return not self.missing(first) and all(
            re.fullmatch(pattern, first[name.casefold()], re.DOTALL)
            for name, pattern in self.marks.items()
        )


_ANY = ".*"

FORMATS = (  # the first that fits is taken, so the more demanding of two comes first
    Format(
        name="podsim",
        kind="csv",
        time="arrival_time",
        prompt="num_prompt_tokens",
        output="num_output_tokens",
        hash_ids="hash_ids",
        hash_rounding="any",
        session="session_id",
        parent_session="parent_session",
        think="think_time",
        priority="priority",
    ),
    Format(
        name="azure-lengths",
        kind="csv",
        time=None,
        prompt="ContextTokens",
        output="GeneratedTokens",
        marks={"TIMESTAMP": "XXX"},
    ),
    Format(
        name="azure",
        kind="csv",
        time="TIMESTAMP",
        clock=dates,
        prompt="ContextTokens",
        output="GeneratedTokens",
    ),
    Format(
        name="vidur",
        kind="csv",
        time="arrived_at",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
    Format(
        name="vidur-lengths",
        kind="csv",
        time=None,
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
    Format(
        name="burstgpt",
        kind="csv",
        time="Timestamp",
        prompt="Request tokens",
        output="Response tokens",
        session="Session ID",
        elapsed="Elapsed time",
    ),
    Format(
        name="splitwise-sim",
        kind="csv",
        time="arrival_timestamp",
        prompt="prompt_size",
        output="token_size",
        only={"request_type": "2"},  # other types are not LLM requests
    ),
    Format(
        name="claude-code",
        kind="jsonl",
        time="t",
        prompt="in",
        output="out",
        hash_ids="hash_ids",
        hash_block_size=64,
        hash_rounding="down",
        document=True,
        session="session_id",
        parent_session="parent_session",
        think="think_time",
        elapsed="api_time",
        marks={"requests": _ANY, "hash_id_scope": _ANY},
        nested=True,
        expand=claude_code_requests,
        notes=("subagents are sessions of their own, and times count from each session's start",),
    ),
    Format(
        name="llmservingsim",
        kind="jsonl",
        time="arrival_time_ns",
        clock=nanoseconds,
        prompt="input_toks",
        output="output_toks",
        session="session_id",
        think="tool_before_ns",
        marks={"arrival_time_ns": _ANY},
        nested=True,
        expand=llmservingsim_requests,
    ),
    Format(
        name="apex",
        kind="jsonl",
        time="StartTimeOffset",
        clock=nanoseconds,
        prompt="ContextTokens",
        output="GeneratedTokens",
    ),
    Format(
        name="ragpulse",
        kind="jsonl",
        time="timestamp",
        prompt="input_length",
        output="output_length",
        hash_ids="hash_ids",
        hash_block_size=512,
        hash_rounding="cut",
        session="session_id",
        wraps_after=7 * 86_400 * 10**9,
        marks={"hash_ids": r"\{.*"},
        expand=ragpulse_requests,
        notes=("parts of a prompt have up to 512 tokens, and count as 512 in its prefix",),
    ),
    Format(  # the field names of Mooncake, in other units
        name="qwen-bailian",
        kind="jsonl",
        time="timestamp",
        prompt="input_length",
        output="output_length",
        hash_ids="hash_ids",
        hash_block_size=16,
        session="chat_id",
        parent="parent_chat_id",
        marks={"chat_id": _ANY},
    ),
    Format(
        name="lmcache",
        kind="jsonl",
        time="timestamp",
        clock=microseconds,
        prompt="input",
        output="output",
        texts=frozenset({"input", "output"}),
        session="session_id",
    ),
    Format(
        name="aiperf",
        kind="jsonl",
        time="timestamp",
        clock=milliseconds,
        prompt="text_input",
        output="output_length",
        texts=frozenset({"text_input"}),
        session="session_id",
        think="delay",
    ),
    Format(
        name="mooncake",
        kind="jsonl",
        time="timestamp",
        clock=milliseconds,
        prompt="input_length",
        output="output_length",
        hash_ids="hash_ids",
        hash_block_size=512,
        session="session_id",
        think="delay",
    ),
    Format(  # never recognised, because nothing but the size of the blocks tells it from Mooncake
        name="vllm-timed",
        kind="jsonl",
        time="timestamp",
        clock=milliseconds,
        prompt="input_length",
        output="output_length",
        hash_ids="hash_ids",
        hash_block_size=16,
        session="session_id",
        think="delay",
    ),
    Format(  # statistics of clients: a folder or archive of chunk-*-trace.csv, chunk-*-dataset.json
        name="servegen",
        kind="clients",
        time="rate",
        prompt="input_tokens",
        output="output_tokens",
    ),
)


def format_named(name: str) -> Format:
    """The format of that name; InputError if there is none."""
    for fmt in FORMATS:
        if fmt.name == name:
            return fmt
    known = ", ".join(fmt.name for fmt in FORMATS)
    raise InputError(f"format is {name!r}, expected one of: {known}")
